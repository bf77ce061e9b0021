"""Does an organ from another domain help a model with a small one? The paper's fifth question, with controls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurograft import data as text_data
from neurograft import ranks
from neurograft.errors import DataError, NeurograftError, UsageError
from neurograft.extraction import extract
from neurograft.files import refuse_overlap
from neurograft.identity import as_identity
from neurograft.models import ModelDirectory, load_config, load_tokenizer, resolve
from neurograft.organ import Organ, clean_name, read_manifest, read_organ
from neurograft.study.folders import PAGE, check_folder, check_names, going_on, starting_from, write_study
from neurograft.study.results import CONTROLS, NO_ORGAN, UNTRAINED, ArmRun, CrossDomainReport, GapPoint, summarise
from neurograft.training import measuring
from neurograft.training.baselines import require_extra
from neurograft.training.comparison import installed_versions, machine_name
from neurograft.training.loop import Batches, Texts
from neurograft.training.measuring import Job, Measured, digest_of
from neurograft.training.options import TrainingOptions, fit_to_model, parse_options
from neurograft.training.protocols import train
from neurograft.training.search import DECIDED_BY_STUDY, Settings

log = logging.getLogger("neurograft")


def study_cross_domain(
    model: str | Path,
    *,
    domains: Mapping[str, str | Path | Sequence[str | Path]],
    target: str | Path | Sequence[str | Path],
    output: str | Path,
    tokens: int,
    organ_tokens: int | None = None,
    target_tokens: int = 20_000,
    layers: int = 3,
    at: int | None = None,
    seeds: int = 3,
    evaluations: int = 8,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    isolated: bool = True,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> CrossDomainReport:
    """Train organs on other domains, let each learn a small target domain, and watch how far it learns that by heart.

    The paper (arXiv 2601.13580) reports that an organ from another domain acts as a regulariser in models of a billion
    parameters. Here an organ is trained on each of `domains`, as layers inserted at `at`, and then goes on training
    there on a small text of the target domain. Beside it stand two controls, with the same text in the same order and
    as many layers that train: layers inserted as identities, which no domain has trained before, and no organ at all,
    but the model's own layers from there. Every few steps the loss is measured on a sample of the text that trains and
    on text of the same domain that does not, `eval_tokens` of each; their difference is the gap.

    What was done is kept in `output`; if the study is interrupted, the same call goes on from there.

    Args:
        model: A Hub id, a transformers directory or a `.gguf` file.
        domains: Name -> files, folders or a Hub dataset id with the text that one organ is trained on.
        target: The small domain's text; see `neurograft.data.read_documents`.
        output: Folder for results.json, results.md, report.html and the trained organs.
        tokens: Training tokens of each run on the target text, over as many passes as it takes.
        organ_tokens: Training tokens of each organ on its own domain; left out, as many as `tokens`.
        target_tokens: How much of the target text there is to train on, about; small, so that it is learnt by heart.
        layers: How many layers an organ has.
        at: Position of the inserted layers; left out, a third of the way, as in the paper.
        seeds: How often each is repeated, with seeds from 0.
        evaluations: How many times both losses are measured in each run, after the first.
        eval_data: Held-out text of the target domain; left out, a share of its documents is kept for it.
        isolated: Whether every run on the target text has a process of its own.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        overwrite: Whether a finished report in `output` may be replaced; runs that both share are not run again.
        trust_remote_code: See `neurograft.models.resolve`.
        **options: Other fields of `TrainingOptions`, for organs and runs alike, such as `lr`, `sequence_length`.

    Raises:
        UsageError: An option, a name, a number or the output is wrong.
        DataError: There is too little text, or it can't be read.
        NeurograftError: plotly is missing, or an organ could not be trained.
        KeyboardInterrupt: Interrupted; the same call goes on from there.
    """
    ranks.refuse_several("study")
    require_extra("plotly", "a study", "report")
    folder = Path(output)
    check_names(domains, CONTROLS)
    check_folder(folder, overwrite=overwrite)
    refuse_overlap(folder, [Path(model), *text_data.paths_of(target), *text_data.paths_of(eval_data)])
    shared = _shared_options(options, tokens, seeds, evaluations)
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    directory = resolve(model, trust_remote_code=trust_remote_code)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    shared = fit_to_model(shared, config, directory.name)
    place = _Place.of(directory, layers, at, trust_remote_code)
    texts, batches = _read_target(target, eval_data, shared, reading, directory, target_tokens, trust_remote_code)
    bench = _Bench(folder, directory, place, texts, shared, isolated, trust_remote_code)
    with going_on(folder):
        organs = bench.train_organs(domains, organ_tokens or tokens, seeds, reading)
        for seed in range(seeds):
            organs |= {(UNTRAINED, seed): bench.identities(), (NO_ORGAN, seed): bench.own_layers()}
        runs = [
            bench.run(arm, seed, organs[arm, seed])
            for seed in range(seeds)
            for arm in _in_turn([*domains, *CONTROLS], seed)
        ]
    report = CrossDomainReport(
        model=directory.name,
        layer_count=place.layer_count,
        layers=layers,
        position=place.position,
        domains=list(domains),
        organ_tokens=organ_tokens or tokens,
        target_tokens=int(batches.training.input_ids.numel()),
        tokens=tokens,
        steps=batches.steps,
        seeds=list(range(seeds)),
        options=shared.model_dump(mode="json", exclude=set(DECIDED_BY_STUDY)),
        arms=summarise([*domains, *CONTROLS], runs),
        runs=runs,
        versions=installed_versions(),
        machine=machine_name(),
    )
    _write(report, folder)
    return report


def _shared_options(options: dict[str, Any], tokens: int, seeds: int, evaluations: int) -> TrainingOptions:
    for name in options:
        if name in DECIDED_BY_STUDY:
            raise UsageError(f"a study decides {name} itself; leave it out.")
    if min(tokens, seeds, evaluations) < 1:
        raise UsageError(
            f"tokens, seeds and evaluations are {tokens}, {seeds} and {evaluations}; each must be positive."
        )
    # How far a text is learnt by heart shows at the end, so no run stops early.
    return parse_options(**options, max_tokens=tokens, evaluations=evaluations, patience=evaluations + 1)


@dataclass(frozen=True)
class _Place:
    """Where organs are inserted, and which of the model's own layers train instead in the control without one."""

    layer_count: int
    position: int
    layers: int

    @classmethod
    def of(cls, directory: ModelDirectory, layers: int, at: int | None, trust: bool) -> _Place:
        from neurograft.layer_values import count_name

        config = load_config(directory, trust_remote_code=trust)
        count = int(getattr(config, count_name(config)))
        position = count // 3 if at is None else at
        if not 1 <= layers <= count:
            raise UsageError(f"an organ of {layers} layers can't be made of {directory.name}, which has {count}.")
        if not 0 <= position <= count:
            raise UsageError(f"position {position} is outside {directory.name}: give 0 to {count}.")
        return cls(count, position, layers)

    @property
    def own(self) -> str:
        """The model's own layers from the position on, or its last ones: START:STOP."""
        start = min(self.position, self.layer_count - self.layers)
        return f"{start}:{start + self.layers}"


def _read_target(
    target: Any, eval_data: Any, options: TrainingOptions, reading: dict[str, Any], directory: ModelDirectory,
    target_tokens: int, trust: bool,
) -> tuple[Texts, Batches]:  # fmt: skip
    """Read the target domain, and keep about so many tokens of it to train on, from all over it."""
    documents = text_data.read_documents(target, **reading)
    if eval_data is not None:
        training, held_out = documents, text_data.read_documents(eval_data, **reading)
    else:
        training, held_out = text_data.split_documents(documents, held_out=options.held_out)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust)
    lengths = [len(tokens) for tokens in text_data.tokenize_documents(training, tokenizer)]
    stride = max(1, sum(lengths) // target_tokens)
    texts = Texts(training[::stride], held_out)
    batches = Batches.build(texts, tokenizer, options)
    if len(batches.training.input_ids) < options.batch_size:
        raise DataError(
            f"the target text to train on fills {len(batches.training.input_ids)} sequences of "
            f"{options.sequence_length} tokens, and a batch takes {options.batch_size}; give more --target-tokens, a "
            "smaller --batch-size or a shorter --sequence-length."
        )
    return texts, batches


def _in_turn(arms: list[str], number: int) -> list[str]:
    first = number % len(arms)
    return arms[first:] + arms[:first]


class _Bench:
    """Trains organs and runs arms, and keeps what they came to.

    Args:
        folder: The study's folder.
        directory: The model.
        place: Where organs go.
        texts: The target domain.
        options: Of every run on it.
        isolated: Whether each of them has a process of its own.
        trust: See `neurograft.models.resolve`.
    """

    def __init__(
        self, folder: Path, directory: ModelDirectory, place: _Place, texts: Texts, options: TrainingOptions,
        isolated: bool, trust: bool,
    ) -> None:  # fmt: skip
        self.folder, self.directory, self.place, self.texts = folder, directory, place, texts
        self.options, self.isolated, self.trust = options, isolated, trust
        parts = {name: text_data.fingerprint(getattr(texts, name)) for name in ("training", "held_out")}
        self._start = {**starting_from(directory), "texts": parts}

    def train_organs(
        self, domains: Mapping[str, Any], tokens: int, seeds: int, reading: dict[str, Any]
    ) -> dict[tuple[str, int], Path]:
        """Train an organ for each domain and seed, or take those that are there; return their files."""
        texts = {name: text_data.fingerprint(text_data.read_documents(d, **reading)) for name, d in domains.items()}
        options = self.options.model_dump(exclude_none=True, exclude=set(DECIDED_BY_STUDY))
        organs = {}
        for seed in range(seeds):
            for name, data in domains.items():
                path = self._file(f"{name}-{seed}", texts[name], tokens, self.options.model_dump(mode="json"))
                organs[name, seed] = path
                if path.is_file():
                    log.info("organ of %s, seed %d: done before", name, seed)
                    continue
                log.info("training an organ on %s, seed %d", name, seed)
                train(
                    read_organ(self.own_layers(), for_use=False), host=self.directory.path, data=data, output=path,
                    name=clean_name(name), trust_remote_code=self.trust, protocol="insert", at=self.place.position,
                    max_tokens=tokens, evaluations=2, patience=3, seed=seed, **reading, **options,
                )  # fmt: skip
        return organs

    def _file(self, name: str, *depends_on: Any) -> Path:
        """Return where an organ is kept that depends on the model, the place and on more."""
        what = [self._start["model"], self.place.own, self.place.position, *depends_on]
        return self.folder / "organs" / f"{name}-{digest_of(what)[:12]}.safetensors"

    def own_layers(self) -> Path:
        """Return the file of the model's own layers from the position on."""
        path = self._file("own")
        if not path.is_file():
            extract(self.directory.path, layers=self.place.own, output=path, trust_remote_code=self.trust)
        return path

    def identities(self) -> Path:
        """Return the file of layers that do nothing yet, to be inserted at the position."""
        path = self._file("untrained")
        if not path.is_file():
            organ = as_identity(read_organ(self.own_layers(), for_use=False))
            where = {"recommended_mode": "insert", "recommended_position": self.place.position}
            Organ(organ.manifest.model_copy(update=where), organ.tensors).save(path)
        return path

    def run(self, arm: str, seed: int, organ: Path) -> ArmRun:
        """Let one arm learn the target domain."""
        options = {**self.options.model_dump(mode="json", exclude_none=True), "seed": seed}
        settings: Settings = {"layers": self.place.own}
        what = {
            **self._start, "arm": arm, "organ": read_manifest(organ).tensors_digest, "options": options,
            "settings": settings, "watched": self.options.eval_tokens, "isolated": self.isolated,
        }  # fmt: skip
        job = Job(
            model=str(self.directory.path), method="organ" if arm == NO_ORGAN else "insert", settings=settings,
            options=options, organ=str(organ), training=self.texts.training, validation=self.texts.held_out,
            watched_tokens=self.options.eval_tokens, trust_remote_code=self.trust,
        )  # fmt: skip
        title = f"{arm}, seed {seed}"
        try:
            measured = measuring.measure_once(job, what, self.folder, title, isolated=self.isolated)
        except NeurograftError as error:
            log.warning("%s failed: %s", title, error)
            return ArmRun(arm=arm, seed=seed, points=[], best=None, error=str(error))
        return ArmRun(arm=arm, seed=seed, points=_points(measured), best=measured.perplexity["validation"])


def _points(measured: Measured) -> list[GapPoint]:
    return [
        GapPoint(step=point.step, training=point.training, held_out=point.perplexity)
        for point in measured.curve
        if point.training is not None
    ]


def _write(report: CrossDomainReport, folder: Path) -> None:
    from neurograft.reporting.page import page
    from neurograft.reporting.sections import cross_domain_section
    from neurograft.study.cross_domain_report import markdown

    shown = page("Organs from another domain", [cross_domain_section(report.model, report)], plots=True)
    write_study(folder, report, {"results.md": markdown(report), PAGE: shown})
