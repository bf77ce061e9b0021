"""Take an organ out of a transplanted model directory, and prove that the original is back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from neurograft import __version__
from neurograft.anatomy import LayerOrigin, layer_origins
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import ModelError, OrganFileError, VerificationError
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
    SCHEMA_VERSION,
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
from neurograft.organ import read_organ
from neurograft.planning import Step, make_plan, organ_origins
from neurograft.record import EXPLANT_FOLDER, layer_digest, read_record
from neurograft.undoing import (
    ExplantLayer,
    OldLayer,
    choose_operation,
    explants_of,
    label_of,
    layers_without,
    recoveries_without,
)

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


@dataclass(frozen=True)
class _Explanted:
    """Layers out of several explants, numbered as if they were one organ's."""

    numbers: dict[ExplantLayer, int]
    tensors: dict[str, torch.Tensor]
    """`layers.{number}.{name}` -> tensor."""
    rows: list[Row]
    """Their per-layer configuration values."""
    known: list[LayerOrigin]

    @classmethod
    def read(cls, folder: Path, layers: Sequence[OldLayer]) -> _Explanted:
        """Read the explants, relative to `folder`, that some layers of the model without an organ come from.

        Raises:
            OrganFileError: One is missing, altered, or lacks a layer.
        """
        wanted = [layer.source for layer in layers if isinstance(layer.source, ExplantLayer)]
        organs = {path: read_organ(folder / path) for path in dict.fromkeys(source.path for source in wanted)}
        known = {path: organ_origins(organ) for path, organ in organs.items()}
        read = cls({}, {}, [], [])
        for number, source in enumerate(wanted):
            organ = organs[source.path]
            if source.layer >= organ.layer_count:
                raise OrganFileError(f"{folder / source.path} has {organ.layer_count} layers, and one more is needed.")
            read.numbers[source] = number
            read.tensors.update({f"layers.{number}.{n}": t for n, t in organ.layer(source.layer).items()})
            read.rows.append(organ.manifest.anatomy.layer_values[source.layer])
            read.known.append(known[source.path][source.layer])
        return read

    def steps(self, layers: Sequence[OldLayer]) -> tuple[Step, ...]:
        """Say where each layer of the model without the organ comes from."""
        return tuple(
            Step("organ", self.numbers[layer.source])
            if isinstance(layer.source, ExplantLayer)
            else Step("recipient", layer.source)
            for layer in layers
        )


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
        directory: A directory that `transplant` or `recover` wrote.
        organ: Which organ, by name; may be left out where there is only one.
        output: Directory to write.
        overwrite: Whether an existing model directory may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        UsageError: No such organ, several and none named, another has to go first, or `output` exists or overlaps the
            input.
        ModelError: The directory holds no transplanted model.
        VerificationError: The result is not the original's to the bit, because the model was changed since; nothing was
            written.
    """
    source, output = resolve(directory, trust_remote_code=trust_remote_code), Path(output)
    check_output_directory(output, overwrite=overwrite, inputs=[source.path])
    record = read_record(source.path)
    if record is None:
        raise ModelError(f"{source.path} has no {RECORD_FILE}: no organ was put into it by neurograft.")
    operation = choose_operation(record, organ)
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if checkpoint.layer_count != len(record.layers):
        raise ModelError(
            f"{source.path} has {checkpoint.layer_count} layers and its {RECORD_FILE} describes {len(record.layers)}."
        )
    old = layers_without(record, operation)
    explanted = _Explanted.read(source.path, old)
    steps, origins = explanted.steps(old), [layer.origin for layer in old]
    tensors = planned_tensors(checkpoint, steps, explanted.tensors)
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
        _write_removed(checkpoint, record, operation, left, steps, explanted, tensors, origins, digests, temporary)
        log.info("reading the result back to prove it")
        return _prove(record, operation, left, temporary, output, trust_remote_code)


def _prove_layers(digests: Mapping[str, str], prefix: str, origins: Sequence[Origin], organ: str) -> None:
    for position, origin in enumerate(origins):
        if layer_digest(digests, prefix, position) != origin.digest:
            raise VerificationError(
                f"{label_of(origin)} was changed since the transplant, so removing {organ} would not restore it; "
                "nothing was written."
            )


def _write_removed(
    checkpoint: Checkpoint,
    record: SurgicalRecord,
    operation: Operation,
    left: list[Operation],
    steps: tuple[Step, ...],
    explanted: _Explanted,
    tensors: Mapping[str, torch.Tensor],
    origins: list[Origin],
    digests: Mapping[str, str],
    target: Path,
) -> None:
    if not left:
        write_files(checkpoint, tensors, record.original_config, target)
        return
    rows = {"recipient": checkpoint.rows, "organ": explanted.rows}
    known = {"recipient": layer_origins(checkpoint.skeleton, "the model"), "organ": explanted.known}
    write_model(checkpoint, make_plan(checkpoint.skeleton, steps, rows, known), tensors, target)
    (target / EXPLANT_FOLDER).mkdir()
    recoveries = recoveries_without(record, operation.organ)
    for path in explants_of(left, recoveries):
        shutil.copyfile(checkpoint.directory.path / path, target / path)
    update = {
        "schema_version": SCHEMA_VERSION,
        "layers": origins,
        "operations": left,
        "recoveries": recoveries,
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
