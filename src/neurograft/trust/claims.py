"""What an organ's manifest claims that it gains and keeps, measured anew in another model, on other text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from neurograft.errors import UsageError
from neurograft.evaluation import DataSetResult, EvaluationReport, evaluate
from neurograft.manifest import Manifest, ScanPoint

log = logging.getLogger("neurograft")

Paths = str | Path | Sequence[str | Path]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Claim(_Part):
    """One claim: perplexity with the organ over that without it."""

    kind: Literal["gain", "retention"]
    """Of the text that it was trained for, or of other text."""
    source: str
    """Where the manifest says so."""
    claimed: float
    """The ratio that the manifest gives; below 1, the organ helps."""
    measured: float | None = None
    """The ratio here; `None` where there was no text to measure it on."""
    low: float | None = None
    """Limits of its 95 % interval."""
    high: float | None = None
    verdict: Literal["holds", "fails", "open", "not measured"]
    """`open`: the limit lies within the interval, so that more text is needed to tell."""


class ClaimsReport(_Part):
    """What `verify --claims` measured."""

    recipient: str
    mode: str
    position: int
    tolerance: float
    claims: list[Claim]
    evaluation: EvaluationReport
    """What was measured on `domain` and, if there was such text, on `general`."""
    holds: bool
    """Whether every claim that was measured holds."""


def claims_of(manifest: Manifest) -> list[Claim]:
    """Return what a manifest claims: the evaluation after training, and the best place of the last scan."""
    claims = [
        _claim("gain", f"evaluation on {each.data} ({each.tokens:,} tokens)", each.after / each.before)
        for each in manifest.evaluations
    ]
    if manifest.scans:
        scan = manifest.scans[-1]
        best = next((point for point in scan.points if _is_best(point, scan.mode, scan.position)), None)
        where = f"scan in {scan.recipient}, {scan.mode} at {scan.position}"
        claims += [] if best is None else [_claim("gain", where, best.ratio)]
        claims += [] if best is None or best.general_ratio is None else [_claim("retention", where, best.general_ratio)]
    return claims


def _is_best(point: ScanPoint, mode: str, position: int) -> bool:
    return (point.mode, point.position) == (mode, position)


def _claim(kind: Literal["gain", "retention"], source: str, ratio: float) -> Claim:
    return Claim(kind=kind, source=source, claimed=ratio, verdict="not measured")


def measure_claims(
    organ: Path,
    recipient: str | Path,
    data: Paths,
    general: Paths | None = None,
    *,
    tolerance: float = 0.05,
    at: int | None = None,
    max_tokens: int | None = None,
    reading: Mapping[str, Any] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ClaimsReport:
    """Measure what an organ's manifest claims: it is put into the recipient in memory, and the same text read by both.

    Args:
        organ: The organ's file.
        recipient: A Hub id, a directory or a `.gguf` file.
        data: Text of the kind that the organ was trained on; see `neurograft.data.read_documents`.
        general: Other text, on which nothing should be lost.
        tolerance: A claim holds if the measured ratio is at most the claimed one times 1 + this, with its whole
            interval; it fails if the whole interval is above that.
        at: Position; left out, the one that matches by weights, else the one that the organ recommends.
        max_tokens: At most about so many tokens of each text.
        reading: Further arguments of `read_documents`.
        seed: Of the bootstrap.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all).

    Raises:
        UsageError: The manifest claims nothing, or the tolerance is negative.
        IncompatibleError: The organ does not fit.
        DataError, ModelError, OrganFileError: An input can't be read.
    """
    from neurograft.compat import check
    from neurograft.models import load_model, load_tokenizer, resolve
    from neurograft.organ import Organ, open_organ
    from neurograft.surgery import graft

    if tolerance < 0:
        raise UsageError(f"the tolerance is {tolerance}; it must not be negative.")
    opened: Organ = open_organ(organ, for_use=False)
    claims = claims_of(opened.manifest)
    if not claims:
        raise UsageError(
            f"the manifest of {organ} claims nothing that could be measured: it has neither evaluations nor scans."
        )
    fit = check(opened, recipient, at=at, alignment="skip", trust_remote_code=trust_remote_code)
    texts = {"domain": data} | ({} if general is None else {"general": general})
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    model = load_model(directory, trust_remote_code=trust_remote_code)
    log.info("measuring %s in %s", opened.name, directory.name)
    with graft(model, opened, at=fit.position, mode=fit.mode) as grafted:
        report = evaluate(
            (grafted, tokenizer), data=texts, baseline=recipient, max_tokens=max_tokens, seed=seed,
            trust_remote_code=trust_remote_code, progress=progress, **(reading or {}),
        )  # fmt: skip
    judged = [_judge(claim, report.data, 1 + tolerance) for claim in claims]
    return ClaimsReport(
        recipient=directory.name,
        mode=fit.mode,
        position=fit.position,
        tolerance=tolerance,
        claims=judged,
        evaluation=report.model_copy(update={"model": f"{directory.name} with {opened.name}"}),
        holds=all(claim.verdict in ("holds", "not measured") for claim in judged),
    )


def _judge(claim: Claim, data: Mapping[str, DataSetResult], factor: float) -> Claim:
    result = data.get("domain" if claim.kind == "gain" else "general")
    if result is None or result.ratio is None or result.ratio_low is None or result.ratio_high is None:
        return claim
    limit = claim.claimed * factor
    verdict = "holds" if result.ratio_high <= limit else "fails" if result.ratio_low > limit else "open"
    found = {"measured": result.ratio, "low": result.ratio_low, "high": result.ratio_high, "verdict": verdict}
    return claim.model_copy(update=found)
