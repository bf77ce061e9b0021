"""Check several organs together: whether they collide, and what each gains and loses alone and beside the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft import data as text_data
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.compat import check_checkpoint
from neurograft.composition_report import CompositionReport, Domain, Interference, OrganInside, Row, Score, Segment
from neurograft.errors import IncompatibleError, ModelError, UsageError
from neurograft.files import atomic_file, check_output_file
from neurograft.findings import Finding
from neurograft.models import ModelDirectory, fit_sequence_length, load_config, load_model, load_tokenizer, resolve
from neurograft.placement.sampling import FEWEST_UNITS
from neurograft.record import unique_names
from neurograft.several import (
    Modes,
    Organs,
    Placement,
    Positions,
    collision_findings,
    each_place,
    in_order,
    open_organs,
    steps_of,
)
from neurograft.studies import studying
from neurograft.transplantation import config_of

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedModel

    from neurograft.manifest import Mode
    from neurograft.organ import Organ

log = logging.getLogger("neurograft")

Paths = str | Path | Sequence[str | Path]
Progress = Callable[[int, int], None]
GENERAL = "general"
_WINDOW = 512  # tokens
_WORTH_SAYING = 1.02
"""Perplexity that is higher by less than this is not called interference, however sure it is."""


@dataclass(frozen=True)
class _Evaluation:
    """How text is scored."""

    sequence_length: int | None
    batch_size: int
    max_tokens: int | None
    seed: int
    bootstrap_samples: int


def compose(
    organs: Organs,
    recipient: str | Path,
    *,
    at: Positions = None,
    mode: Modes = None,
    data: Mapping[str, Paths] | None = None,
    general: Paths | None = None,
    output: str | Path | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    seed: int = 0,
    bootstrap_samples: int = 1000,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CompositionReport:
    """Check several organs against one recipient, and against each other; nothing of the recipient is changed.

    Each organ is checked as `check` does, then whether two would stand in each other's way, and whether the whole can
    be expressed as one model. With text, perplexities are measured on each data set for the recipient, for each organ
    alone and for all together; for three or more organs also for all but each; and where several are inserted at one
    position also in the reverse order.

    Args:
        organs: Organs, or the paths of their files.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        at: Position of each organ; see `transplant`.
        mode: Mode of each organ; see `transplant`.
        data: Name -> files, folders or a Hub dataset id of a domain; see `neurograft.data.read_documents`.
        general: Text that belongs to no organ's domain; a data set named `general`.
        output: Markdown file to write the report to, ending in `.md`.
        sequence_length: Tokens in a window; see `evaluate`.
        batch_size: Windows in a forward pass.
        max_tokens: At most about this many tokens of each data set, whole documents from its start.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        seed: Seed of the bootstrap.
        bootstrap_samples: How often documents are drawn anew.
        overwrite: Whether an existing report may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all).

    Raises:
        UsageError: An argument is wrong, or the report exists.
        OrganFileError: An organ file can't be trusted.
        ModelError: The recipient can't be read or cut into layers, or a loss is not finite.
        DataError: There is no text, or it can't be read.
    """
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must not be negative.")
    if output is not None:
        given = [path for text in (*(data or {}).values(), general) for path in text_data.paths_of(text)]
        _check_output(Path(output), overwrite=overwrite, inputs=[Path(recipient), *given])
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    documents = _read(data or {}, general, reading)
    opened = open_organs(organs)
    places = each_place(at, mode, len(opened))
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    with studying():
        checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
        found = _check(list(zip(opened, places, strict=True)), checkpoint, trust_remote_code)
    report = CompositionReport(
        recipient=directory.name, organs=found.organs, layers=found.layers, findings=found.findings, seed=seed
    )
    if documents and not report.blocked:
        settings = _Evaluation(
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            bootstrap_samples=bootstrap_samples,
        )
        report = _Measuring.start(directory, found, documents, settings, trust_remote_code, progress).measure(report)
    if output is not None:
        with atomic_file(Path(output), overwrite=overwrite) as temporary:
            temporary.write_text(report.markdown(), encoding="utf-8")
    return report


def _check_output(path: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    if path.suffix != ".md":
        raise UsageError(f"the report is Markdown, so its name ends in .md, and {path} does not.")
    check_output_file(path, overwrite=overwrite, inputs=inputs)


def _read(data: Mapping[str, Paths], general: Paths | None, reading: dict[str, Any]) -> dict[str, list[str]]:
    """Read all texts before anything else is done."""
    if general is not None and GENERAL in data:
        raise UsageError(f"a data set is named {GENERAL}, and --general was given as well; rename one.")
    paths = {**data, **({GENERAL: general} if general is not None else {})}
    return {name: text_data.read_documents(path, **reading) for name, path in paths.items()}


@dataclass(frozen=True)
class _Found:
    """What is known before anything is measured."""

    placements: list[Placement]
    """In the order in which they come to stand."""
    names: list[str]
    """The organs' names in the result, in that order."""
    organs: list[OrganInside]
    layers: list[Segment]
    findings: list[Finding]


def _check(
    asked: Sequence[tuple[Organ, tuple[int | None, Mode | None]]], checkpoint: Checkpoint, trust_remote_code: bool
) -> _Found:
    """Check each organ by itself, then all of them together."""
    reports = {}
    placements = []
    for organ, (at, mode) in asked:
        log.info("checking %s against %s", organ.name, checkpoint.directory.name)
        report, _ = check_checkpoint(organ, checkpoint, at=at, mode=mode, trust_remote_code=trust_remote_code)
        placements.append(Placement(organ, report.position, report.mode))
        reports[id(placements[-1])] = report
    placements = in_order(placements)
    names = unique_names(placements, checkpoint)
    organs = [
        OrganInside(
            name=name,
            version=placement.organ.manifest.version,
            mode=placement.mode,
            position=placement.at,
            layer_count=placement.organ.layer_count,
            findings=reports[id(placement)].findings,
        )
        for name, placement in zip(names, placements, strict=True)
    ]
    findings, layers = [], []
    if not any(finding.severity == "blocks" for organ in organs for finding in organ.findings):
        findings = collision_findings(placements, checkpoint.layer_count)
        if not findings:
            findings = _whole(placements, checkpoint, trust_remote_code)
            layers = _segments(placements, names, checkpoint.layer_count)
    return _Found(placements, names, organs, layers, findings)


def _whole(placements: Sequence[Placement], checkpoint: Checkpoint, trust_remote_code: bool) -> list[Finding]:
    """Try to express the recipient with all the organs as one model."""
    try:
        if len(placements) > 1:
            config_of(placements, checkpoint, trust_remote_code=trust_remote_code)
    except IncompatibleError as error:
        return [Finding(severity="blocks", subject="together", why=str(error).rstrip("."))]
    return []


def _segments(placements: Sequence[Placement], names: Sequence[str], layer_count: int) -> list[Segment]:
    """Return the runs of layers that the model with all organs consists of, first to last."""
    sources = [
        (name, layer)
        for name, placement in zip(names, placements, strict=True)
        for layer in range(placement.organ.layer_count)
    ]
    segments: list[Segment] = []
    for step in steps_of(placements, layer_count):
        name, layer = sources[step.layer] if step.source == "organ" else (None, step.layer)
        last = segments[-1] if segments else None
        if last is not None and last.organ == name and last.stop == layer:
            segments[-1] = last.model_copy(update={"stop": layer + 1})
        else:
            segments.append(Segment(organ=name, start=layer, stop=layer + 1))
    return segments


@dataclass
class _Measuring:
    """The losses of one recipient with various organs in it, on the same documents."""

    model: PreTrainedModel
    names: dict[str, Placement]
    tokens: dict[str, list[list[int]]]
    """Data set -> documents -> token ids."""
    separator: int
    length: int
    settings: _Evaluation
    progress: Progress | None
    done: int = 0

    @classmethod
    def start(
        cls,
        directory: ModelDirectory,
        found: _Found,
        documents: Mapping[str, list[str]],
        settings: _Evaluation,
        trust_remote_code: bool,
        progress: Progress | None,
    ) -> _Measuring:
        """Load the recipient and cut the text into tokens."""
        import torch

        config = load_config(directory, trust_remote_code=trust_remote_code)
        length = fit_sequence_length(settings.sequence_length, _WINDOW, config, directory.name)
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        log.info("loading %s", directory.name)
        model = load_model(directory, trust_remote_code=trust_remote_code)
        torch.nn.Module.to(model, torch.accelerator.current_accelerator() or torch.device("cpu"))
        tokens = {
            name: _first(text_data.tokenize_documents(texts, tokenizer), settings.max_tokens)
            for name, texts in documents.items()
        }
        names = dict(zip(found.names, found.placements, strict=True))
        return cls(model, names, tokens, text_data.separator_token(tokenizer), length, settings, progress)

    def measure(self, report: CompositionReport) -> CompositionReport:
        """Measure every row of the matrix and compare the organs together with each of them alone."""
        variants = self._variants()
        losses: dict[str, dict[str, numpy.ndarray]] = {}
        for name, inside in variants.items():
            log.info("measuring %s", name)
            losses[name] = self._losses(inside, len(variants))
        rows = [
            Row(
                name=name,
                organs=[organ for organ, _ in inside],
                scores={key: self._score(key, losses[name], losses[_RECIPIENT]) for key in self.tokens},
            )
            for name, inside in variants.items()
        ]
        interference = [self._interference(key, rows, losses) for key in self.tokens]
        findings = [*report.findings, *_interference_findings(interference, self._few()), *self._general_findings(rows)]
        update = {
            "rows": rows,
            "interference": interference,
            "findings": [*findings, *_order_findings(rows)],
            "data": [
                Domain(name=name, documents=len(lists), tokens=sum(map(len, lists)))
                for name, lists in self.tokens.items()
            ],
            "sequence_length": self.length,
        }
        return report.model_copy(update=update)

    def _variants(self) -> dict[str, list[tuple[str, Placement]]]:
        """Return the rows of the matrix: name -> the organs inside, in the order in which they are put in."""
        all_of_them = list(self.names.items())
        variants: dict[str, list[tuple[str, Placement]]] = {_RECIPIENT: []}
        variants.update({name: [(name, placement)] for name, placement in all_of_them})
        if len(all_of_them) > 1:
            variants[_TOGETHER] = all_of_them
        if len(all_of_them) > 2:
            variants.update(
                {f"all but {name}": [item for item in all_of_them if item[0] != name] for name in self.names}
            )
        inserted = [placement.at for _, placement in all_of_them if placement.mode == "insert"]
        if len(set(inserted)) < len(inserted):
            variants[_REVERSED] = all_of_them[::-1]
        return variants

    def _losses(self, inside: Sequence[tuple[str, Placement]], rows: int) -> dict[str, numpy.ndarray]:
        """Return for each data set the losses of its documents, (D,), in nats, with some organs in the model."""
        from neurograft.surgery import graft

        if not inside:
            return {name: self._document_losses(name, lists, rows) for name, lists in self.tokens.items()}
        placements = [placement for _, placement in inside]
        with graft(
            self.model,
            [placement.organ for placement in placements],
            at=[placement.at for placement in placements],
            mode=[placement.mode for placement in placements],
        ):
            return {name: self._document_losses(name, lists, rows) for name, lists in self.tokens.items()}

    def _document_losses(self, name: str, lists: list[list[int]], rows: int) -> numpy.ndarray:
        import numpy

        from neurograft.evaluation import document_losses

        total = rows * sum(len(ids) for documents in self.tokens.values() for ids in documents)

        def count(tokens: int) -> None:
            self.done += tokens
            if self.progress is not None:
                self.progress(self.done, total)

        pairs = document_losses(
            self.model,
            lists,
            sequence_length=self.length,
            batch_size=self.settings.batch_size,
            separator_id=self.separator,
            progress=count,
        )
        losses = numpy.array([loss for loss, _ in pairs])
        if not numpy.isfinite(losses).all():
            raise ModelError(f"the loss on {name} is not finite in {(~numpy.isfinite(losses)).sum()} documents.")
        return losses

    def _score(self, name: str, own: Mapping[str, numpy.ndarray], other: Mapping[str, numpy.ndarray]) -> Score:
        """Return a perplexity, beside another one on the same documents."""
        tokens = sum(map(len, self.tokens[name]))
        ratio, low, high = self._ratio(name, own[name], other[name])
        return Score(perplexity=_exp(float(own[name].sum()) / tokens), ratio=ratio, low=low, high=high)

    def _ratio(self, name: str, own: numpy.ndarray, other: numpy.ndarray) -> tuple[float, float, float]:
        """Return the ratio of two perplexities and its 95 % interval, by bootstrap over documents."""
        import numpy

        counts = numpy.array([len(ids) for ids in self.tokens[name]])
        generator = numpy.random.default_rng(self.settings.seed)
        draws = generator.integers(len(counts), size=(self.settings.bootstrap_samples, len(counts)))  # (samples, D)
        difference = own - other
        logs = difference[draws].sum(1) / numpy.maximum(counts[draws].sum(1), 1)
        low, high = numpy.quantile(logs, [0.025, 0.975])
        return _exp(float(difference.sum()) / int(counts.sum())), _exp(float(low)), _exp(float(high))

    def _few(self) -> list[str]:
        """Return the data sets with too few documents to draw anew from."""
        return [name for name, documents in self.tokens.items() if len(documents) < FEWEST_UNITS]

    def _interference(
        self, name: str, rows: Sequence[Row], losses: Mapping[str, Mapping[str, numpy.ndarray]]
    ) -> Interference:
        """Compare all organs together with the one that alone is best on a data set."""
        best = min((row for row in rows if len(row.organs) == 1), key=lambda row: row.scores[name].perplexity)
        together = _TOGETHER if _TOGETHER in losses else best.name
        ratio, low, high = self._ratio(name, losses[together][name], losses[best.name][name])
        return Interference(data=name, best=best.name, ratio=ratio, low=low, high=high)

    def _general_findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Say what all organs together do to general text."""
        row = next((row for row in rows if row.name == _TOGETHER), None)
        if row is None or GENERAL not in row.scores:
            return []
        score = row.scores[GENERAL]
        severity: Any = "risks" if score.low > 1 and score.ratio > _WORTH_SAYING else "notes"
        why = f"with all organs perplexity on general text is {score.show_ratio()} times the recipient's"
        return [Finding(severity=severity, subject=GENERAL, why=why)]


_RECIPIENT, _TOGETHER, _REVERSED = "recipient", "together", "together, in reverse order"


def _interference_findings(interference: Sequence[Interference], few: Sequence[str]) -> list[Finding]:
    """Say on which domains the organs together are worse than the best of them alone.

    Args:
        interference: On each data set.
        few: Data sets with too few documents for an interval over documents to mean much.
    """
    findings = [
        Finding(
            severity="notes", subject="text", why=f"{name} has fewer than {FEWEST_UNITS} documents, so that its "
            "intervals, which are over documents, say little; give more documents",
        )
        for name in few
    ]  # fmt: skip
    for item in interference:
        if item.data != GENERAL and item.data not in few and item.low > 1 and item.ratio > _WORTH_SAYING:
            why = (
                f"on {item.data} perplexity with all organs is {item.show_ratio()} times that with {item.best} alone; "
                "recover around one of them, put them further apart, or leave one out"
            )
            findings.append(Finding(severity="risks", subject="interference", why=why))
    return findings


def _order_findings(rows: Sequence[Row]) -> list[Finding]:
    """Say whether organs that are inserted at one position would do better in the reverse order."""
    by_name = {row.name: row for row in rows}
    if _REVERSED not in by_name:
        return []
    better = [
        name
        for name, score in by_name[_REVERSED].scores.items()
        if score.perplexity < by_name[_TOGETHER].scores[name].perplexity
    ]
    why = f"in the reverse order perplexity is lower on {', '.join(better) or 'no data set'}"
    return [Finding(severity="notes", subject="order", why=why)]


def _first(token_lists: list[list[int]], limit: int | None) -> list[list[int]]:
    """Return whole documents from the start until there are `limit` tokens; at least one."""
    if limit is None:
        return token_lists
    chosen: list[list[int]] = []
    for tokens in token_lists:
        chosen.append(tokens)
        if sum(map(len, chosen)) >= limit:
            break
    return chosen


def _exp(value: float) -> float:
    return math.exp(min(value, 700))
