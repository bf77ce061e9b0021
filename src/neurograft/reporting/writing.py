"""Write one HTML page about organs, transplanted models and measurements."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from neurograft.errors import UsageError
from neurograft.files import atomic_file, check_output_file
from neurograft.organ import organ_path
from neurograft.reporting import sections
from neurograft.reporting.page import page
from neurograft.reporting.paper_sections import paper_sections
from neurograft.reporting.sources import Sources, read_sources
from neurograft.training.baselines import require_extra

log = logging.getLogger("neurograft")

_SUFFIXES = (".html", ".htm")


class ReportWritten(BaseModel):
    """What a report holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str
    bytes: int
    organs: list[str]
    models: list[str]
    scans: list[str]
    comparisons: list[str]
    evaluations: list[str]
    compositions: list[str]
    studies: list[str]
    plans: list[str]
    prompts: int


def report(
    sources: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    title: str | None = None,
    prompts: Sequence[str] = (),
    recipient: str | Path | None = None,
    tokens: int = 60,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> ReportWritten:
    """Write one self-contained HTML page that works without a network, in light and dark, on phones and on paper.

    The page shows transplanted models as stacks of layers, what organs claim and how they were trained, perplexity over
    positions, evaluations with intervals, comparisons with LoRA, and how models go on with prompts. It holds no text
    but the prompts that it is given and what models make of them.

    Args:
        sources: Organ files, folders that `transplant`, `recover`, `compare` or `study` wrote, and JSON files with what
            `plan`, `scan`, `compare`, `compose`, `study` or `evaluate` print with `--json`.
        output: HTML file to write.
        title: Title of the page; left out, it names the sources.
        prompts: Texts that every transplanted model among the sources, and `recipient` before them, go on with.
        recipient: The model that they are compared with; a Hub id, a directory or a `.gguf` file.
        tokens: At most so many new tokens for each prompt.
        overwrite: Whether an existing file may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        UsageError: A source is nothing that can be reported on, the output exists or is no HTML file, or prompts are
            given and no model that could go on with them.
        OrganError: An organ file can't be read.
        ModelError: A model can't be read.
        NeurograftError: plotly is not installed.
    """
    paths = [organ_path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)]
    target = Path(output)
    if target.suffix not in _SUFFIXES:
        raise UsageError(f"{target} should end in .html, which is what a report is.")
    check_output_file(target, overwrite=overwrite, inputs=paths)
    if tokens < 1:
        raise UsageError(f"{tokens} new tokens were asked for; at least one is needed.")
    require_extra("plotly", "a report", "report")
    found = read_sources(paths)
    models: list[tuple[str, str | Path]] = [] if recipient is None else [("before", recipient)]
    models += [(path.resolve().name, path) for path in paths if path.is_dir() and (path / "neurograft.json").is_file()]
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty; give the beginning of a text with --prompt.")
    if prompts and not models:
        raise UsageError("prompts need a model that goes on with them; give a transplanted model, or --recipient.")
    if recipient is not None and not prompts:
        raise UsageError("--recipient is the model that goes on with prompts; give at least one --prompt.")
    parts = _sections(found)
    if prompts:
        from neurograft.reporting.continuations import continue_prompts

        said = continue_prompts(models, prompts, tokens=tokens, trust_remote_code=trust_remote_code)
        parts.append(sections.continuation_section(said))
    text = page(title or _title(found), parts, plots=any('class="plot"' in part for part in parts))
    with atomic_file(target, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return ReportWritten(
        output=str(target),
        bytes=target.stat().st_size,
        organs=[manifest.name for manifest in found.manifests],
        models=[name for name, _ in found.models],
        scans=[name for name, _ in found.scans],
        comparisons=[name for name, _ in found.comparisons],
        evaluations=[name for name, _ in found.evaluations],
        compositions=[name for name, _ in found.compositions],
        studies=[name for name, _ in (*found.studies, *found.papers)],
        plans=[name for name, _ in found.plans],
        prompts=len(prompts),
    )


def _sections(found: Sources) -> list[str]:
    return [
        *(sections.model_section(*each) for each in found.models),
        *(sections.evaluation_section(*each) for each in found.evaluations),
        *(sections.composition_section(*each) for each in found.compositions),
        *(sections.plan_section(*each) for each in found.plans),
        *(sections.scan_section(*each) for each in found.scans),
        *(sections.organ_section(manifest) for manifest in found.manifests),
        *(sections.comparison_section(*each) for each in found.comparisons),
        *(sections.cross_domain_section(*each) for each in found.studies),
        *(part for _, study in found.papers for part in paper_sections(study)),
    ]


def _title(found: Sources) -> str:
    """Name what the page is about, the most telling first."""
    names = [
        *(name for name, _ in found.models),
        *(manifest.name for _, manifest in found.organs),
        *(f"{scan.organ} in {scan.recipient}" for _, scan in found.scans),
        *(f"ways to adapt {comparison.model}" for _, comparison in found.comparisons),
        *(evaluation.model for _, evaluation in found.evaluations),
        *(f"several organs in {composition.recipient}" for _, composition in found.compositions),
        *(f"organs from another domain in {study.model}" for _, study in found.studies),
        *(f"the paper's questions, asked of {study.model}" for _, study in found.papers),
        *(f"a plan for {plan.model}" for _, plan in found.plans),
    ]
    return ", ".join(dict.fromkeys(names[:3])) + (", and more" if len(names) > 3 else "")
