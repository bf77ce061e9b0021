"""The paper's five questions, asked again on one's own model and domains, within a budget of training tokens."""

from __future__ import annotations

import datetime
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurograft import data as text_data
from neurograft import ranks
from neurograft.anatomy import describe
from neurograft.composition import compose
from neurograft.composition_report import CompositionReport
from neurograft.data import Documents
from neurograft.errors import UsageError
from neurograft.extraction import extract, parse_layers
from neurograft.files import refuse_overlap
from neurograft.identity import as_identity
from neurograft.layer_weights import quiet_transformers
from neurograft.models import ModelDirectory, load_config, load_model, load_tokenizer, resolve
from neurograft.organ import Organ, clean_name, read_organ
from neurograft.placement.results import ScanReport
from neurograft.placement.sampling import draw_sample
from neurograft.placement.scan import scan
from neurograft.study.cross_domain import study_cross_domain
from neurograft.study.folders import (
    PAGE,
    check_folder,
    check_names,
    going_on,
    kept,
    starting_from,
    write_study,
)
from neurograft.study.paper_results import METHODS, PaperReport, PositionStudy, Shares, Transfer, divide
from neurograft.study.results import CONTROLS, CrossDomainReport
from neurograft.training.baselines import find_methods, require_extra
from neurograft.training.comparison import compare, installed_versions, machine_name
from neurograft.training.comparison_results import Comparison
from neurograft.training.measuring import digest_of
from neurograft.training.options import TrainingOptions, fit_to_model, parse_options
from neurograft.training.protocols import train, tune_layers
from neurograft.training.search import DECIDED_BY_PAPER

log = logging.getLogger("neurograft")

Paths = str | Path | Sequence[str | Path]


def study_paper(
    model: str | Path,
    *,
    domains: Mapping[str, Paths],
    output: str | Path,
    tokens: int,
    general: Paths | None = None,
    layers: int = 3,
    positions: int = 7,
    seeds: int = 3,
    trials: int = 3,
    isolated: bool = True,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> PaperReport:
    """Ask the five questions of Neural Organ Transplantation (arXiv 2601.13580) of a model and some domains.

    1. Position: an organ of each domain, trained `standalone` from floor(L/3) as in the paper, is inserted at positions
       all over the model and measured there as it comes and after a short recovery. Beside it stand layers that do
       nothing yet, after the same recovery: what they reach is the position's and the recovery's doing alone.
    2. Transferability: an organ of each domain, trained in place, goes into a sibling, all layers of which were trained
       on another domain.
    3. Several organs: those organs together in one model, each on every domain.
    4. Comparison: organ, `standalone`, LoRA and full fine-tuning, as `compare` does it.
    5. Cross-domain: organs of all domains under a small part of `general`, as `study_cross_domain` does it; without
       general text, organs of all domains but the first under a small part of that.

    A share of each text's documents is held out from everything that trains, and all figures are of those. What is
    finished is kept in `output`; if the study is interrupted, the same call goes on after it.

    Args:
        model: A Hub id, a transformers directory or a `.gguf` file.
        domains: Name -> files, folders or a Hub dataset id with a domain's text, at least two; see
            `neurograft.data.read_documents`.
        output: Folder for results.json, results.md, report.html, the organs, and the parts of the study.
        tokens: Training tokens of everything together, repeats counted again.
        general: Text that belongs to no domain, on which forgetting shows, and the target of the last question.
        layers: How many layers an organ has.
        positions: How many positions are tried, evenly from 0 to L.
        seeds: Runs of each method of the comparison, and of each arm of the last question.
        trials: Settings tried for each method of the comparison.
        isolated: Whether every run of the last two questions has a process of its own.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        overwrite: Whether a finished report in `output` may be replaced; what both share is not run again.
        trust_remote_code: See `neurograft.models.resolve`.
        **options: Other fields of `TrainingOptions`, the same for all runs, such as `sequence_length`, `batch_size`.

    Raises:
        UsageError: An option, a name, a number or the output is wrong, or there are too few tokens or layers.
        DataError: There is too little text, or it can't be read.
        NeurograftError: A package of the `compare` extra is missing, or a part failed.
        KeyboardInterrupt: Interrupted; the same call goes on from there.
    """
    ranks.refuse_several("study")
    require_extra("plotly", "a study", "report")
    find_methods(METHODS)
    started, folder = time.monotonic(), Path(output)
    check_names(domains, CONTROLS)
    if len(domains) < 2:
        raise UsageError("the paper's questions need at least two domains: give --domain NAME=PATH again.")
    check_folder(folder, overwrite=overwrite)
    given = [path for text in (*domains.values(), general) for path in text_data.paths_of(text)]
    refuse_overlap(folder, [Path(model), *given])
    crossed = len(domains) - (general is None)
    shared, shares = _shared_options(options, tokens, len(domains), crossed, positions, seeds, trials)
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    directory = resolve(model, trust_remote_code=trust_remote_code)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    shared = fit_to_model(shared, config, directory.name)
    places = _Places.of(config, directory.name, layers, positions, len(domains))
    texts = _read(domains, general, shared, reading)
    _check_amount(texts, load_tokenizer(directory, trust_remote_code=trust_remote_code), shared)
    asking = _Asking(folder, model, directory, texts, places, shares, shared, isolated, trust_remote_code)
    with going_on(folder):
        together, transfers = asking.together(), asking.transfers()
        report = PaperReport(
            model=directory.name,
            layer_count=places.layer_count,
            layers=layers,
            domains=list(domains),
            tokens=tokens,
            run_tokens=shares.run,
            recovery_tokens=shares.recovery,
            seeds=list(range(seeds)),
            options=shared.model_dump(mode="json", exclude=set(DECIDED_BY_PAPER)),
            positions=asking.positions(),
            transfers=transfers,
            together=together,
            comparisons=asking.comparisons(seeds, trials),
            cross_domain=asking.cross_domain(seeds),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            seconds=round(time.monotonic() - started, 1),
            versions=installed_versions(),
            machine=machine_name(),
        )
    _write(report, folder)
    return report


def _shared_options(
    options: dict[str, Any], tokens: int, domains: int, crossed: int, positions: int, seeds: int, trials: int
) -> tuple[TrainingOptions, Shares]:
    for name in options:
        if name in DECIDED_BY_PAPER:
            raise UsageError(f"a study decides {name} itself; leave it out.")
    if min(tokens, seeds, trials) < 1 or positions < 2:
        raise UsageError(
            f"tokens, seeds, trials and positions are {tokens}, {seeds}, {trials} and {positions}; they must be "
            "positive, and positions at least 2."
        )
    chosen = parse_options(**options)
    step = chosen.batch_size * chosen.accumulate * chosen.sequence_length
    shares = divide(
        tokens, domains=domains, crossed=crossed, positions=positions, seeds=seeds, trials=trials, step=step
    )
    return chosen, shares


@dataclass(frozen=True)
class _Places:
    """Where organs come from, and where they are tried."""

    layer_count: int
    paper: str
    """The paper's choice, from floor(L/3): START:STOP."""
    apart: list[str]
    """For each domain a range of its own, so that all organs go into one model."""
    positions: list[int]

    @classmethod
    def of(cls, config: Any, name: str, layers: int, positions: int, domains: int) -> _Places:
        from neurograft.layer_values import count_name

        count = int(getattr(config, count_name(config)))
        spacing = count // (domains + 1)
        if not 1 <= layers <= spacing:
            raise UsageError(
                f"{domains} organs of {layers} layers each don't go into {name} together, which has {count} layers; "
                "give fewer --layers or fewer domains."
            )
        start = parse_layers("auto", count).start
        starts = [spacing * (number + 1) for number in range(domains)]
        tried = {round(number * count / (positions - 1)) for number in range(positions)}
        return cls(count, f"{start}:{start + layers}", [f"{start}:{start + layers}" for start in starts], sorted(tried))


@dataclass(frozen=True)
class _Texts:
    """What trains, and what is held out from everything that does."""

    training: dict[str, Documents]
    held_out: dict[str, Documents]
    general: tuple[Documents, Documents] | None
    """A part to train on, and one to measure on."""

    @property
    def elsewhere(self) -> Documents | None:
        """General text that nothing trains on."""
        return None if self.general is None else self.general[1]

    def fingerprints(self) -> dict[str, str]:
        """Return a digest of each."""
        parts = {f"{name} training": documents for name, documents in self.training.items()}
        parts |= {f"{name} held-out": documents for name, documents in self.held_out.items()}
        if self.general is not None:
            parts |= {"general training": self.general[0], "general held-out": self.general[1]}
        return {name: text_data.fingerprint(documents) for name, documents in parts.items()}


def _read(
    domains: Mapping[str, Paths], general: Paths | None, options: TrainingOptions, reading: dict[str, Any]
) -> _Texts:
    log.info("reading the text")

    def divided(paths: Paths) -> tuple[Documents, Documents]:
        parts = text_data.split_documents(text_data.read_documents(paths, **reading), held_out=options.held_out)
        return Documents(parts[0]), Documents(parts[1])

    parts = {name: divided(paths) for name, paths in domains.items()}
    training, held_out = ({name: each[number] for name, each in parts.items()} for number in (0, 1))
    return _Texts(training, held_out, None if general is None else divided(general))


def _check_amount(texts: _Texts, tokenizer: Any, options: TrainingOptions) -> None:
    """Refuse held-out text that is too little to compare positions on, before anything trains.

    Raises:
        DataError: It is.
    """
    for name, documents in texts.held_out.items():
        draw_sample(
            f"held-out {name}", documents, tokenizer, max_tokens=options.eval_tokens,
            sequence_length=options.sequence_length, seed=0,
        )  # fmt: skip


class _Asking:
    """Trains and measures what each question needs, and keeps it.

    Args:
        folder: The study's folder.
        model: The model, as it was given.
        directory: The same, resolved.
        texts: The domains.
        places: Where organs come from and go.
        shares: Tokens of each run.
        options: Of every run.
        isolated: Whether runs that can have a process of their own do.
        trust: See `neurograft.models.resolve`.
    """

    def __init__(
        self, folder: Path, model: str | Path, directory: ModelDirectory, texts: _Texts, places: _Places,
        shares: Shares, options: TrainingOptions, isolated: bool, trust: bool,
    ) -> None:  # fmt: skip
        self.folder, self.model, self.directory, self.texts, self.places = folder, model, directory, texts, places
        self.shares, self.isolated, self.trust = shares, isolated, trust
        self.eval_tokens, self.sequence_length = options.eval_tokens, options.sequence_length
        self._batch_size = options.batch_size
        self._options = options.model_dump(exclude_unset=True, exclude=set(DECIDED_BY_PAPER))
        self._start = {**starting_from(directory), "texts": texts.fingerprints(), "options": self._options}

    def positions(self) -> list[PositionStudy]:
        """Ask where an organ goes."""
        found = []
        for name in self.texts.training:
            organ = self.organ(name, self.places.paper, "standalone")
            nothing = as_identity(extract(self.model, layers=self.places.paper, trust_remote_code=self.trust))
            found.append(
                PositionStudy(
                    domain=name,
                    as_it_comes=self._scan(name, organ, None, f"{name}, as it comes"),
                    recovered=self._scan(name, organ, self.shares.recovery, f"{name}, after recovery"),
                    control=self._scan(name, nothing, self.shares.recovery, f"{name}, untrained layers after recovery"),
                )
            )
        return found

    def transfers(self) -> list[Transfer]:
        """Ask whether an organ is of use in another model."""
        names = list(self.texts.training)
        found = []
        for name, other in zip(names, [*names[1:], names[0]], strict=True):
            organ = self._apart(name)
            home = self._compose([organ], f"{name} in its own host")
            what = {**self._what(organ), "sibling": other, "tokens": self.shares.run}
            away = kept(self.folder, CompositionReport, what, lambda o=other, g=organ: self._away(g, o))  # type: ignore[misc]
            found.append(Transfer(domain=name, tuned_on=other, home=home, away=away))
        return found

    def together(self) -> CompositionReport:
        """Ask what several organs come to."""
        return self._compose([self._apart(name) for name in self.texts.training], "all organs")

    def comparisons(self, seeds: int, trials: int) -> dict[str, Comparison]:
        """Ask how organs stand beside LoRA and full fine-tuning."""
        return {
            name: compare(
                self.model, data=training, eval_data=self.texts.held_out[name], general=self.texts.elsewhere,
                output=self.folder / f"comparison-{name}", tokens=self.shares.run, search_tokens=self.shares.trial,
                methods=METHODS, seeds=seeds, trials=trials, evaluations=4, isolated=self.isolated, overwrite=True,
                trust_remote_code=self.trust, **self._options,
            )
            for name, training in self.texts.training.items()
        }  # fmt: skip

    def cross_domain(self, seeds: int) -> CrossDomainReport:
        """Ask whether organs of other domains help with a small text."""
        first, *others = self.texts.training
        if self.texts.general is not None:
            others, (target, held_out) = [first, *others], self.texts.general
        else:
            target, held_out = self.texts.training[first], self.texts.held_out[first]
        return study_cross_domain(
            self.model, domains={name: self.texts.training[name] for name in others}, target=target,
            eval_data=held_out, output=self.folder / "cross-domain", tokens=self.shares.run,
            target_tokens=self.shares.trial, layers=self._count(), seeds=seeds, evaluations=4, isolated=self.isolated,
            overwrite=True, trust_remote_code=self.trust, **self._options,
        )  # fmt: skip

    def organ(self, name: str, layers: str, protocol: str) -> Organ:
        """Return a domain's organ, trained now or by an earlier run."""
        digest = digest_of({**self._start, "layers": layers, "tokens": self.shares.run})[:12]
        path = self.folder / "organs" / f"{name}-{protocol}-{digest}.safetensors"
        if not path.is_file():
            log.info("training an organ on %s, %s", name, protocol)
            train(
                extract(self.model, layers=layers, trust_remote_code=self.trust), host=self.model,
                data=self.texts.training[name], output=path, name=clean_name(name), trust_remote_code=self.trust,
                protocol=protocol, max_tokens=self.shares.run, **self._options,
            )  # fmt: skip
        return read_organ(path, for_use=False)

    def _apart(self, name: str) -> Organ:
        return self.organ(name, self.places.apart[list(self.texts.training).index(name)], "in_place")

    def _count(self) -> int:
        start, _, stop = self.places.paper.partition(":")
        return int(stop) - int(start)

    def _what(self, *organs: Organ) -> dict[str, Any]:
        return {**self._start, "organs": [organ.manifest.tensors_digest for organ in organs]}

    def _scan(self, domain: str, organ: Organ, recover: int | None, title: str) -> ScanReport:
        what = {**self._what(organ), "domain": domain, "positions": self.places.positions, "recover": recover}

        def make() -> ScanReport:
            log.info("positions: %s", title)
            return scan(
                organ, self.model, data=self.texts.held_out[domain], general=self.texts.elsewhere,
                modes="insert", positions=self.places.positions, prune="never", max_tokens=self.eval_tokens,
                recover_tokens=recover, recover_data=None if recover is None else self.texts.training[domain],
                sequence_length=self.sequence_length, batch_size=self._batch_size, trust_remote_code=self.trust,
            )  # fmt: skip

        return kept(self.folder, ScanReport, what, make)

    def _compose(self, organs: Sequence[Organ], title: str) -> CompositionReport:
        def make() -> CompositionReport:
            log.info("measuring %s", title)
            return self._measure(organs, self.model)

        return kept(self.folder, CompositionReport, self._what(*organs), make)

    def _measure(self, organs: Sequence[Organ], recipient: str | Path) -> CompositionReport:
        return compose(
            organs, recipient, data=self.texts.held_out, general=self.texts.elsewhere, max_tokens=self.eval_tokens,
            sequence_length=self.sequence_length, batch_size=self._batch_size, trust_remote_code=self.trust,
        )  # fmt: skip

    def _away(self, organ: Organ, tuned_on: str) -> CompositionReport:
        """Train all layers of the model on another domain, and measure an organ in it."""
        log.info("training all layers on %s, for %s to go into", tuned_on, organ.name)
        with tempfile.TemporaryDirectory(prefix=".cache-", dir=self.folder) as cache:
            sibling = Path(cache) / f"{self.directory.name}-{tuned_on}"
            model = load_model(self.directory, dtype=torch.float32, trust_remote_code=self.trust)
            tokenizer = load_tokenizer(self.directory, trust_remote_code=self.trust)
            every = list(model.get_submodule(describe(model).layers_path).children())
            tune_layers(
                model, tokenizer, self.texts.training[tuned_on], layers=every, max_tokens=self.shares.run,
                **self._options,
            )  # fmt: skip
            with quiet_transformers():
                model.save_pretrained(sibling)
                tokenizer.save_pretrained(sibling)
            del model, every
            return self._measure([organ], sibling)


def _write(report: PaperReport, folder: Path) -> None:
    from neurograft.reporting.page import page
    from neurograft.reporting.paper_sections import paper_sections
    from neurograft.study.paper_report import markdown

    shown = page(f"The paper's questions, asked of {report.model}", paper_sections(report), plots=True)
    write_study(folder, report, {"results.md": markdown(report), PAGE: shown})
