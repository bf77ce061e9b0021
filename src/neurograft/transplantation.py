"""Put an organ into a model directory; the result is checked before it gets its name."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neurograft import probe
from neurograft.anatomy import describe
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.compat import check_checkpoint, refuse_blocked
from neurograft.errors import VerificationError
from neurograft.extraction import organ_from_checkpoint
from neurograft.files import (
    atomic_directory,
    check_output_directory,
)
from neurograft.manifest import (
    RECORD_FILE,
    Mode,
    SurgicalRecord,
)
from neurograft.model_files import planned_tensors, write_model
from neurograft.models import (
    ModelDirectory,
    load_model_and_unused,
    resolve,
)
from neurograft.organ import Organ, clean_name, read_organ
from neurograft.planning import Plan, plan_graft
from neurograft.record import EXPLANT_FOLDER, make_record, unique_name
from neurograft.surgery import verify_graft

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")


def transplant(
    organ: str | Path | Organ,
    recipient: str | Path,
    *,
    at: int | None = None,
    mode: Mode | None = None,
    output: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> SurgicalRecord:
    """Put an organ into a recipient on disk; the result is a new plain transformers directory.

    The recipient is never changed. The result is loaded and every layer asked the probe questions before the
    directory gets its name. What `replace` took out is kept beside it, so that `remove` is exact.

    Args:
        organ: An organ, or the path of its file.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        at: Position, 0 to L; left out, the one that matches by weights, else the one that the organ recommends.
        mode: `replace` or `insert`; left out, what the organ recommends.
        output: Directory to write.
        overwrite: Whether an existing model directory may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        The surgical record, also written as `neurograft.json`.

    Raises:
        UsageError: The position is out of range, or `output` exists or overlaps the recipient.
        OrganFileError, ModelError: An input can't be read or trusted.
        IncompatibleError: The organ does not fit.
        VerificationError: The result would compute something else; nothing was written.
    """
    output = Path(output)
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    check_output_directory(output, overwrite=overwrite, inputs=[directory.path])
    organ = organ if isinstance(organ, Organ) else read_organ(organ)
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    log.info("checking %s against %s", organ.name, directory.name)
    report = check_checkpoint(organ, checkpoint, at=at, mode=mode, trust_remote_code=trust_remote_code)
    refuse_blocked(report)
    plan = plan_graft(checkpoint.skeleton, organ, at=report.position, mode=report.mode)
    return _write_transplant(
        organ, checkpoint, plan, report.position, report.mode, output, overwrite, trust_remote_code
    )


def _write_transplant(
    organ: Organ,
    checkpoint: Checkpoint,
    plan: Plan,
    at: int,
    mode: Mode,
    output: Path,
    overwrite: bool,
    trust_remote_code: bool,
) -> SurgicalRecord:
    log.info("asking the recipient's layers the probe questions")
    before = _measure(checkpoint.directory, trust_remote_code)
    tensors = planned_tensors(checkpoint, plan.steps, _cast_like(organ, checkpoint))
    with atomic_directory(output, overwrite=overwrite) as temporary:
        log.info("writing %s", output)
        write_model(checkpoint, plan, tensors, temporary)
        explant = _write_explant(organ, checkpoint, at, mode, before, temporary, trust_remote_code)
        record = make_record(organ, checkpoint, plan, at, mode, tensors, temporary, explant)
        (temporary / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        log.info("loading the result to verify it")
        _verify_written(organ, plan, before, ModelDirectory(temporary, output.name), trust_remote_code)
    return record


@dataclass(frozen=True)
class _Measured:
    """What a loaded model was seen to do."""

    answers: torch.Tensor
    cache_gap: float
    dtype: str
    unused: set[str]
    """Kinds of tensors in the files that the model has no place for."""


def _measure(directory: ModelDirectory, trust_remote_code: bool) -> _Measured:
    model, unused = load_model_and_unused(directory, trust_remote_code=trust_remote_code)
    probe.refuse_future_leak(model, directory.name)
    answers = probe.probe_layers(model, describe(model).layers_path)
    return _Measured(answers, probe.cache_gap(model), str(model.dtype).removeprefix("torch."), unused)


def _verify_written(
    organ: Organ, plan: Plan, before: _Measured, directory: ModelDirectory, trust_remote_code: bool
) -> None:
    after = _measure(directory, trust_remote_code)
    if new := after.unused - before.unused:
        raise VerificationError(
            f"the result would hold tensors that its model has no place for, such as {sorted(new)[0]}; it was not kept."
        )
    verify_graft(organ, plan, before.answers, after.answers, after.dtype)
    if after.cache_gap > max(10 * before.cache_gap, 1e-3):
        raise VerificationError(
            f"with the KV cache the result's logits are {after.cache_gap:.2g} of their size off (the recipient's: "
            f"{before.cache_gap:.2g}), so it was not kept."
        )


def _cast_like(organ: Organ, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the organ's tensors in the dtypes that the recipient's layers have on disk."""
    sample = checkpoint.load(list(checkpoint.layer_names(0).values()))
    dtypes = {inner: sample[name].dtype for inner, name in checkpoint.layer_names(0).items()}
    floating = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    common = max(set(floating), key=floating.count) if floating else None
    cast = {}
    for name, tensor in organ.tensors.items():
        dtype = dtypes.get(name.split(".", 2)[2], common)
        cast[name] = tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor
    return cast


def _write_explant(
    organ: Organ,
    checkpoint: Checkpoint,
    at: int,
    mode: Mode,
    before: _Measured,
    target: Path,
    trust_remote_code: bool,
) -> str | None:
    """Save what `replace` takes out as an organ of its own; return its path relative to `target`."""
    old = checkpoint.directory.path / EXPLANT_FOLDER
    if old.is_dir():
        shutil.copytree(old, target / EXPLANT_FOLDER)
    if mode == "insert":
        return None
    name = unique_name(organ.name, checkpoint)
    explant = organ_from_checkpoint(
        checkpoint,
        range(at, at + organ.layer_count),
        before.answers,
        dtype=before.dtype,
        name=clean_name(f"{name}-explant"[:96]),
        description=f"what {name} replaced",
        kind="explant",
        trust_remote_code=trust_remote_code,
    )
    (target / EXPLANT_FOLDER).mkdir(exist_ok=True)
    path = f"{EXPLANT_FOLDER}/{name}.safetensors"
    explant.save(target / path)
    return path
