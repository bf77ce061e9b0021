"""What a report can be made of: organ files, transplanted models, and the JSON that other verbs write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ValidationError

from neurograft.composition_report import CompositionReport
from neurograft.errors import UsageError
from neurograft.evaluation import EvaluationReport
from neurograft.manifest import Manifest, SurgicalRecord
from neurograft.organ import read_manifest
from neurograft.placement.plan_results import PlanReport
from neurograft.placement.results import ScanReport
from neurograft.record import read_record
from neurograft.study.paper_results import PaperReport
from neurograft.study.results import CrossDomainReport
from neurograft.training.comparison_results import Comparison

# A result is a few hundred KB at most; a larger file is something else, and is not read into memory.
_LARGEST_RESULT = 64 << 20
_RESULTS: tuple[type[BaseModel], ...] = (
    ScanReport, Comparison, EvaluationReport, CompositionReport, CrossDomainReport, PaperReport, PlanReport,
)  # fmt: skip


@dataclass
class Sources:
    """Everything that a report is made of, each with the name of the file or folder it came from."""

    organs: list[tuple[str, Manifest]] = field(default_factory=list)
    models: list[tuple[str, SurgicalRecord]] = field(default_factory=list)
    scans: list[tuple[str, ScanReport]] = field(default_factory=list)
    comparisons: list[tuple[str, Comparison]] = field(default_factory=list)
    evaluations: list[tuple[str, EvaluationReport]] = field(default_factory=list)
    compositions: list[tuple[str, CompositionReport]] = field(default_factory=list)
    studies: list[tuple[str, CrossDomainReport]] = field(default_factory=list)
    papers: list[tuple[str, PaperReport]] = field(default_factory=list)
    plans: list[tuple[str, PlanReport]] = field(default_factory=list)

    @property
    def manifests(self) -> list[Manifest]:
        """Manifests of all organs that are there, in files or in models, each once."""
        found = [manifest for _, manifest in self.organs]
        for _, record in self.models:
            found += [operation.manifest for operation in record.operations if operation.manifest is not None]
        return list({manifest.file_digest: manifest for manifest in found}.values())


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Read everything that a report is to be made of.

    Args:
        paths: Organ files (`.safetensors`), folders that `transplant`, `recover`, `compare` or `study` wrote, and
            `.json` files with what `plan`, `scan`, `compare`, `compose`, `study` or `evaluate` print with `--json`.

    Raises:
        UsageError: There is none, or one is nothing of the kind.
        OrganError: An organ file can't be read.
        ModelError: A folder's surgical record can't be read.
    """
    if not paths:
        raise UsageError("a report needs something to report on: an organ file, a transplanted model, or a scan.")
    sources = Sources()
    for path in map(Path, paths):
        _read(path, sources)
    return sources


def _read(path: Path, sources: Sources) -> None:
    if path.is_dir():
        record = read_record(path)
        if record is not None:
            sources.models.append((path.resolve().name, record))
            return
        path = path / "results.json"
    if not path.is_file():
        raise UsageError(_explain_missing(path))
    if path.suffix == ".safetensors":
        sources.organs.append((path.name, read_manifest(path)))
        return
    result = _read_result(path)
    name = path.parent.resolve().name if path.name == "results.json" else path.stem
    if isinstance(result, ScanReport):
        sources.scans.append((name, result))
    elif isinstance(result, Comparison):
        sources.comparisons.append((name, result))
    elif isinstance(result, EvaluationReport):
        sources.evaluations.append((name, result))
    elif isinstance(result, CompositionReport):
        sources.compositions.append((name, result))
    elif isinstance(result, CrossDomainReport):
        sources.studies.append((name, result))
    elif isinstance(result, PaperReport):
        sources.papers.append((name, result))
    elif isinstance(result, PlanReport):
        sources.plans.append((name, result))


def _explain_missing(path: Path) -> str:
    if path.name == "results.json" and path.parent.is_dir():
        return (
            f"{path.parent} has neither neurograft.json, as a transplanted model has, nor the results.json of a "
            "comparison or a study."
        )
    return f"{path} does not exist; give an organ file, a transplanted model, or what scan --json printed."


def _read_result(path: Path) -> BaseModel:
    """Read the JSON of a verb, whichever it is.

    Raises:
        UsageError: It is none of them.
    """
    wanted = "what plan, scan, compare, compose, study or evaluate print with --json"
    if path.stat().st_size > _LARGEST_RESULT:
        raise UsageError(f"{path} is too large to be {wanted}.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no organ file and no JSON; give {wanted}.") from error
    if isinstance(content, dict):
        content.pop("blocked", None)  # the verdict that compose prints beside what it found, from which it follows
        for kind in _RESULTS:
            try:
                return kind.model_validate_json(json.dumps(content))
            except ValidationError:
                continue
    raise UsageError(f"{path} is not {wanted}.")
