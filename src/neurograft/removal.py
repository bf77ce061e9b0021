"""Take an organ out of a transplanted model directory, and prove that the original is back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from neurograft import __version__
from neurograft.anatomy import layer_origins
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import ModelError, UsageError, VerificationError
from neurograft.files import (
    atomic_directory,
    check_output_directory,
    combine_digests,
    file_sha256,
    tensor_digest,
)
from neurograft.layer_values import Row
from neurograft.manifest import (
    RECORD_FILE,
    Digest,
    Operation,
    Origin,
    SurgicalRecord,
)
from neurograft.model_files import planned_tensors, write_files, write_model
from neurograft.models import (
    ModelDirectory,
    resolve,
)
from neurograft.organ import Organ, read_organ
from neurograft.planning import Step, make_plan, organ_origins
from neurograft.record import EXPLANT_FOLDER, layer_digest, read_record

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")


class Removal(BaseModel):
    """What `remove` did, and its proof."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organ: str
    output: str
    original_restored: bool
    """Whether this was the last organ, so that the directory holds the original recipient again."""
    tensors_digest: Digest
    config_digest: Digest
    expected_tensors_digest: Digest | None
    """The original's, from the surgical record; `None` while other organs are left."""
    expected_config_digest: Digest | None
    organs_left: list[str]


def remove(
    directory: str | Path,
    *,
    organ: str | None = None,
    output: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Removal:
    """Take an organ out of a transplanted model directory, and prove by digest that nothing of it is left.

    Args:
        directory: A directory that `transplant` wrote.
        organ: Which organ, by name; may be left out where there is only one.
        output: Directory to write.
        overwrite: Whether an existing model directory may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        UsageError: No such organ, several and none named, or `output` exists or overlaps the input.
        ModelError: The directory holds no transplanted model.
        VerificationError: The result is not the original's to the bit, because the model was changed since; nothing was
            written.
    """
    source, output = resolve(directory, trust_remote_code=trust_remote_code), Path(output)
    check_output_directory(output, overwrite=overwrite, inputs=[source.path])
    record = read_record(source.path)
    if record is None:
        raise ModelError(f"{source.path} has no {RECORD_FILE}: no organ was put into it by neurograft.")
    operation = _choose_operation(record, organ)
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if checkpoint.layer_count != len(record.layers):
        raise ModelError(
            f"{source.path} has {checkpoint.layer_count} layers and its {RECORD_FILE} describes {len(record.layers)}."
        )
    explant = read_organ(source.path / operation.explant) if operation.explant else None
    steps, origins = _steps_without(record, operation)
    tensors = planned_tensors(checkpoint, steps, explant.tensors if explant else {})
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    left = [other for other in record.operations if other is not operation]
    _prove_layers(digests, checkpoint.layer_prefix, origins, operation.organ)
    if not left and combine_digests(digests) != record.original_tensors_digest:
        raise VerificationError(
            f"without {operation.organ} the tensors of {source.path} are not the original's: tensors outside the "
            f"layers were changed since "
            "the transplant; nothing was written."
        )
    with atomic_directory(output, overwrite=overwrite) as temporary:
        log.info("writing %s", output)
        _write_removed(checkpoint, record, operation, left, steps, explant, tensors, origins, digests, temporary)
        log.info("reading the result back to prove it")
        return _prove(record, operation, left, temporary, output, trust_remote_code)


def _choose_operation(record: SurgicalRecord, organ: str | None) -> Operation:
    names = [operation.organ for operation in record.operations]
    if organ is None and len(names) == 1:
        return record.operations[0]
    if organ is None:
        raise UsageError(f"the model holds several organs ({', '.join(names)}); say which one with --organ.")
    if organ not in names:
        raise UsageError(f"the model holds no organ named {organ}; it holds {', '.join(names)}.")
    return record.operations[names.index(organ)]


def _steps_without(record: SurgicalRecord, operation: Operation) -> tuple[tuple[Step, ...], list[Origin]]:
    """Plan the model without one organ: its layers go, or make room for those that they replaced.

    Raises:
        UsageError: A later organ replaced some of its layers.
    """
    own = {origin.layer for origin in record.layers if origin.organ == operation.organ}
    later = record.operations[record.operations.index(operation) + 1 :]
    over = [other.organ for other in later if any(origin.organ == operation.organ for origin in other.explant_origins)]
    if over:
        raise UsageError(f"the organ {over[-1]} replaced layers of {operation.organ}; remove {over[-1]} first.")
    if operation.mode == "replace" and own != set(range(len(operation.explant_origins))):
        raise ModelError(f"the surgical record does not list all layers of {operation.organ}.")
    steps: list[Step] = []
    origins: list[Origin] = []
    for position, origin in enumerate(record.layers):
        if origin.organ != operation.organ:
            steps.append(Step("recipient", position))
            origins.append(origin)
        elif operation.mode == "replace":
            steps.append(Step("organ", origin.layer))
            origins.append(operation.explant_origins[origin.layer])
    return tuple(steps), origins


def _prove_layers(digests: Mapping[str, str], prefix: str, origins: Sequence[Origin], organ: str) -> None:
    for position, origin in enumerate(origins):
        if layer_digest(digests, prefix, position) != origin.digest:
            owner = (
                f"layer {origin.layer} of {origin.organ}" if origin.organ else f"the original's layer {origin.layer}"
            )
            raise VerificationError(
                f"{owner} was changed since the transplant, so removing {organ} would not restore it; nothing was "
                f"written."
            )


def _write_removed(
    checkpoint: Checkpoint,
    record: SurgicalRecord,
    operation: Operation,
    left: list[Operation],
    steps: tuple[Step, ...],
    explant: Organ | None,
    tensors: Mapping[str, torch.Tensor],
    origins: list[Origin],
    digests: Mapping[str, str],
    target: Path,
) -> None:
    if not left:
        write_files(checkpoint, tensors, record.original_config, target)
        return
    rows: dict[str, list[Row]] = {
        "recipient": checkpoint.rows,
        "organ": explant.manifest.anatomy.layer_values if explant else [],
    }
    known = {
        "recipient": layer_origins(checkpoint.skeleton, "the model"),
        "organ": organ_origins(explant) if explant else [],
    }
    write_model(checkpoint, make_plan(checkpoint.skeleton, steps, rows, known), tensors, target)
    (target / EXPLANT_FOLDER).mkdir()
    for other in left:
        if other.explant:
            shutil.copyfile(checkpoint.directory.path / other.explant, target / other.explant)
    update = {
        "layers": origins,
        "operations": left,
        "tensors_digest": combine_digests(digests),
        "config_digest": file_sha256(target / "config.json"),
        "neurograft_version": __version__,
    }
    (target / RECORD_FILE).write_text(
        record.model_copy(update=update).model_dump_json(indent=2) + "\n", encoding="utf-8"
    )


def _prove(
    record: SurgicalRecord,
    operation: Operation,
    left: list[Operation],
    written: Path,
    output: Path,
    trust_remote_code: bool,
) -> Removal:
    """Digest what was written, as read back from disk, and compare it with the record."""
    checkpoint = open_checkpoint(ModelDirectory(written, output.name), trust_remote_code=trust_remote_code)
    tensors, config = combine_digests(checkpoint.digests()), checkpoint.config_digest()
    if not left and (tensors, config) != (record.original_tensors_digest, record.original_config_digest):
        raise VerificationError(f"what was written for {output} does not have the original's digests; it was not kept.")
    return Removal(
        organ=operation.organ,
        output=str(output),
        original_restored=not left,
        tensors_digest=tensors,
        config_digest=config,
        expected_tensors_digest=record.original_tensors_digest if not left else None,
        expected_config_digest=record.original_config_digest if not left else None,
        organs_left=[other.organ for other in left],
    )
