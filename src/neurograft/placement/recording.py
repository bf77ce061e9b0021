"""Write what a scan found into the organ's own manifest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from neurograft.checkpoint import open_checkpoint
from neurograft.compat import align
from neurograft.errors import VerificationError
from neurograft.manifest import Scan, ScanPoint
from neurograft.models import ModelDirectory
from neurograft.organ import Organ, now, open_organ
from neurograft.placement.results import Place, ScanReport
from neurograft.studies import studying

log = logging.getLogger("neurograft")


def record_scan(
    path: Path, scanned: Organ, report: ScanReport, directory: ModelDirectory, *, trust_remote_code: bool = False
) -> Organ:
    """Add a scan to an organ's file, and let the organ recommend the best place; its tensors stay as they are.

    A scan whose budget left places out is recorded, and recommends nothing.

    A recommended position is one of the donor. Where the recipient's layers can be matched with the donor's by their
    weights, as `check` does, the best position is counted back to the donor; otherwise it is recommended as it is.

    Args:
        path: The organ's file.
        scanned: The organ that was read from it.
        report: The scan.
        directory: The recipient.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        The organ as written.

    Raises:
        OrganFileError: The file can't be trusted any more.
        VerificationError: Its tensors are not those that were scanned.
    """
    organ = open_organ(path)
    if organ.manifest.tensors_digest != scanned.manifest.tensors_digest:
        raise VerificationError(f"{path} does not hold any more what was scanned; nothing was recorded in it.")
    with studying():
        checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
        alignment = align(organ, checkpoint)
    shift = 0 if alignment is None else alignment.layer - organ.manifest.source.layer_start
    update: dict[str, Any] = {
        "scans": [*organ.manifest.scans, to_manifest(report)],
        "recommended_mode": report.mode,
        "recommended_position": max(report.position - shift, 0),
    }
    if report.unmeasured:
        log.warning("%d places were not measured, so the organ goes on recommending what it did", report.unmeasured)
        update = {"scans": update["scans"]}
    return Organ(organ.manifest.model_copy(update=update), organ.tensors).save(path, overwrite=True)


def to_manifest(report: ScanReport) -> Scan:
    """Return what a manifest keeps of a scan: digests and figures, no text."""
    return Scan(
        recipient=report.recipient,
        layer_count=report.layer_count,
        mode=report.mode,
        position=report.position,
        data_fingerprint=report.domain.fingerprint,
        documents=report.domain.documents,
        tokens=report.domain.tokens,
        recipient_perplexity=report.domain.perplexity,
        recover_tokens=report.recover_tokens or 0,
        points=[point for place in report.places if (point := _point(place)) is not None],
        seed=report.seed,
        versions=report.versions,
        when=now(),
    )


def _point(place: Place) -> ScanPoint | None:
    if place.domain is None:
        return None
    return ScanPoint(
        mode=place.mode,
        position=place.position,
        tokens=place.domain.tokens,
        perplexity=place.domain.perplexity,
        ratio=place.domain.ratio,
        low=place.domain.low,
        high=place.domain.high,
        apart=bool(place.apart),
        general_ratio=None if place.general is None else place.general.ratio,
    )
