"""The surgical record beside a transplanted model: what was done, and what the original was."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from neurograft import __version__
from neurograft.checkpoint import Checkpoint
from neurograft.errors import ModelError
from neurograft.files import (
    combine_digests,
    file_sha256,
    read_bounded,
)
from neurograft.layer_values import LAYER_NUMBER
from neurograft.manifest import (
    RECORD_FILE,
    SCHEMA_VERSION,
    Operation,
    Origin,
    SurgicalRecord,
    Verify,
)
from neurograft.model_files import Written
from neurograft.organ import now
from neurograft.several import Placement
from neurograft.steps import Step

EXPLANT_FOLDER = "explants"


def read_record(directory: Path) -> SurgicalRecord | None:
    """Read the surgical record beside a model; `None` if there is none.

    Raises:
        ModelError: It is there, and not as its schema says, or from a newer neurograft.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(read_bounded(path).decode())
        version = data["schema_version"]
        if version > SCHEMA_VERSION:
            raise ModelError(
                f"{path} has schema {version}, and this neurograft reads up to {SCHEMA_VERSION}; install a newer one."
            )
        return SurgicalRecord.model_validate(data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = "" if first is None else f" ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        raise ModelError(f"{path} is no surgical record as neurograft writes it{reason}.") from error


def make_record(
    placements: Sequence[Placement],
    checkpoint: Checkpoint,
    steps: Sequence[Step],
    written: Written,
    original: Mapping[str, str | None],
    target: Path,
    explants: Sequence[str | None],
    verified: Verify,
) -> SurgicalRecord:
    """Describe a transplant whose files are written already.

    Args:
        placements: What was put in, in the order in which it stands.
        checkpoint: The recipient.
        steps: Where each layer of the result comes from; see `several.steps_of`.
        written: The result's files.
        original: The recipient's tensors, by their names on disk there, and their digests where they are known.
        target: The result's folder.
        explants: For each placement the path of what was taken out, relative to `target`.
        verified: How the result is checked.
    """
    previous = read_record(checkpoint.directory.path)
    before = list(previous.layers) if previous else _original_layers(checkpoint, original)
    names = unique_names(placements, checkpoint)
    sources = [
        (name, layer)
        for name, placement in zip(names, placements, strict=True)
        for layer in range(placement.organ.layer_count)
    ]
    layers = []
    digests = layer_digests(written.digests, checkpoint.layer_prefix, len(steps))
    for step, digest in zip(steps, digests, strict=True):
        name, layer = sources[step.layer] if step.source == "organ" else ("", 0)
        layers.append(before[step.layer] if not name else Origin(organ=name, layer=layer, digest=digest))
    operations = [
        _operation(name, placement, explant, before, verified)
        for name, placement, explant in zip(names, placements, explants, strict=True)
    ]
    return SurgicalRecord(
        neurograft_version=__version__,
        recipient=previous.recipient if previous else checkpoint.directory.name,
        original_config=previous.original_config
        if previous
        else (checkpoint.directory.path / "config.json").read_text(encoding="utf-8"),
        original_tensors_digest=previous.original_tensors_digest if previous else combine_known(original),
        original_config_digest=previous.original_config_digest if previous else checkpoint.config_digest(),
        tensors_digest=combine_known(written.digests),
        config_digest=file_sha256(target / "config.json"),
        layers=layers,
        # From the last to the first, so that each position is also the one in the model as the one before left it.
        operations=[*(previous.operations if previous else []), *reversed(operations)],
        recoveries=previous.recoveries if previous else [],
        linked=written.linked,
    )


def _operation(
    name: str, placement: Placement, explant: str | None, before: Sequence[Origin], verified: Verify
) -> Operation:
    """Describe the transplant of one organ into layers that came from where `before` says."""
    manifest = placement.organ.manifest
    return Operation(
        organ=name,
        organ_version=manifest.version,
        organ_file_digest=manifest.file_digest,
        mode=placement.mode,
        position=placement.at,
        explant=explant,
        explant_origins=list(before[placement.at : placement.stop]),
        manifest=manifest.model_copy(update={"sketch": None}),  # most of its size, and of use only in the organ file
        verified=verified,
        when=now(),
    )


def _original_layers(checkpoint: Checkpoint, digests: Mapping[str, str | None]) -> list[Origin]:
    found = layer_digests(digests, checkpoint.layer_prefix, checkpoint.layer_count)
    return [Origin(organ=None, layer=layer, digest=digest) for layer, digest in enumerate(found)]


def combine_known(digests: Mapping[str, str | None]) -> str | None:
    """Combine named digests; `None` if one of them is not known."""
    known = {name: digest for name, digest in digests.items() if digest is not None}
    return combine_digests(known) if len(known) == len(digests) else None


def layer_digests(digests: Mapping[str, str | None], prefix: str, count: int) -> list[str | None]:
    """Combine the digests of each layer's tensors, by their names inside the layer; `None` where one is not known.

    Args:
        digests: Tensor name -> digest, of a whole model.
        prefix: What stands before the layer number in the names.
        count: How many layers there are.
    """
    layers: list[dict[str, str | None]] = [{} for _ in range(count)]
    for name, digest in digests.items():
        number, _, inner = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and re.fullmatch(LAYER_NUMBER, number) and int(number) < count:
            layers[int(number)][inner] = digest
    return list(map(combine_known, layers))


def unique_names(placements: Sequence[Placement], checkpoint: Checkpoint) -> list[str]:
    """Return the organs' names, numbered where one of that name is in the recipient already, or among them before."""
    record = read_record(checkpoint.directory.path)
    taken = {operation.organ for operation in record.operations} if record else set()
    names = []
    for name in (placement.organ.name for placement in placements):
        candidates = [name, *(f"{name[:90]}-{number}" for number in range(2, len(taken) + 2))]
        names.append(next(candidate for candidate in candidates if candidate not in taken))
        taken.add(names[-1])
    return names


def free_explant(name: str, directory: Path) -> str:
    """Return the path, relative to a model directory, of an explant that is not there yet.

    A file of the organ's own name may be there although no such organ is: another one may stand for a layer in it.
    """
    path, number = f"{EXPLANT_FOLDER}/{name}.safetensors", 1
    while (directory / path).exists():
        number += 1
        path = f"{EXPLANT_FOLDER}/{name}-{number}.safetensors"
    return path
