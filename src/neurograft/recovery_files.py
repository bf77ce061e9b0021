"""Write a recovered model: what was trained in the place of what was there, which is kept, and the record of both."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neurograft import __version__
from neurograft.anatomy import describe
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import VerificationError
from neurograft.extraction import organ_from_checkpoint
from neurograft.files import combine_digests
from neurograft.layer_weights import to_disk
from neurograft.manifest import RECORD_FILE, SCHEMA_VERSION, ChangedLayer, Recovery, SurgicalRecord
from neurograft.model_files import Written, plan_files, write_model
from neurograft.models import ModelDirectory, load_model_and_unused
from neurograft.number_formats import held, load_piece
from neurograft.organ import Organ, clean_name
from neurograft.record import EXPLANT_FOLDER, free_explant, layer_digests
from neurograft.steps import Step
from neurograft.tensor_files import Piece, torch_name
from neurograft.training.recovery import RecoveryPlan
from neurograft.transplanted import Transplanted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def write_recovered(
    case: Transplanted,
    model: PreTrainedModel,
    plan: RecoveryPlan,
    answers: torch.Tensor,
    target: Path,
) -> tuple[list[ChangedLayer], dict[str, str]]:
    """Write the model and its explants into the folder `target`; the record is still missing then.

    Args:
        case: The model as it was before.
        model: The same, trained, in float32.
        plan: What trained.
        answers: (L, T, S) of the layers as they were before, to the probe.
        target: An empty folder.

    Returns:
        The layers that are not as they were, and tensor name -> digest for the whole model.

    Raises:
        VerificationError: Something that was not to train did, or the model's files were changed meanwhile.
    """
    checkpoint = case.checkpoint
    new = {number: _changed_pieces(model, checkpoint, number) for number in plan.layers}
    _refuse_other_changes(new, plan)
    config = (checkpoint.directory.path / "config.json").read_text(encoding="utf-8")
    written = write_model(checkpoint, plan_files(checkpoint, *_trained_layers(checkpoint, new)), config, target)
    digests = _refuse_changed_meanwhile(case, new, written)
    if (checkpoint.directory.path / EXPLANT_FOLDER).is_dir():
        shutil.copytree(checkpoint.directory.path / EXPLANT_FOLDER, target / EXPLANT_FOLDER)
    numbers = [number for number in plan.layers if new[number]]
    outside = [number for number in numbers if number not in case.own]
    explants = _write_explants(case, outside, answers, target)
    changed = []
    found = layer_digests(digests, checkpoint.layer_prefix, checkpoint.layer_count)
    for number in numbers:
        path, layer = explants.get(number, (None, 0))
        digest = found[number]
        assert digest is not None
        changed.append(
            ChangedLayer(
                origin=case.record.layers[number],
                digest=digest,
                tensors=sorted(new[number]),
                explant=path,
                explant_layer=layer,
            )
        )
    return changed, digests


def _changed_pieces(model: PreTrainedModel, checkpoint: Checkpoint, number: int) -> dict[str, Piece]:
    """Return the tensors of one layer that differ from those on disk, by their names inside it, as the files have them.

    What is the same stays bytes in the files; only what was trained is held in memory.
    """
    import torch

    old = checkpoint.layer_pieces(number)
    changed = {}
    for key, tensor in to_disk(model, range(number, number + 1)).items():
        inner = key.split(".", 2)[2]
        stored = load_piece(old[inner])
        rounded = tensor.to("cpu", stored.dtype)
        if not torch.equal(rounded, stored):
            changed[inner] = held(rounded.clone())
    return changed


def _trained_layers(
    checkpoint: Checkpoint, new: Mapping[int, Mapping[str, Piece]]
) -> tuple[tuple[Step, ...], dict[str, Piece]]:
    """Return where each layer of the recovered model comes from, and the layers that changed, as those of an organ."""
    changed = [number for number in sorted(new) if new[number]]
    steps = tuple(
        Step("organ", changed.index(number)) if number in changed else Step("recipient", number)
        for number in range(checkpoint.layer_count)
    )
    pieces = {
        f"layers.{place}.{inner}": new[number].get(inner, piece)
        for place, number in enumerate(changed)
        for inner, piece in checkpoint.layer_pieces(number).items()
    }
    return steps, pieces


def _refuse_changed_meanwhile(
    case: Transplanted, new: Mapping[int, Mapping[str, Piece]], written: Written
) -> dict[str, str]:
    """Return the digests of what was written, after checking that all that did not train is as it was.

    Raises:
        VerificationError: The model's files were changed while recovery ran.
    """
    trained = {case.checkpoint.layer_names(number)[inner] for number in new for inner in new[number]}
    digests = {name: digest for name, digest in written.digests.items() if digest is not None}
    if {n: d for n, d in digests.items() if n not in trained} != {
        n: d for n, d in case.digests.items() if n not in trained
    }:
        raise VerificationError(
            f"the files of {case.checkpoint.directory.path} were changed while recovery ran; the result was not kept."
        )
    return digests


def _refuse_other_changes(new: Mapping[int, Mapping[str, Piece]], plan: RecoveryPlan) -> None:
    """Check that at the seams only vectors changed; other scopes train whole layers."""
    matrices = [name for pieces in new.values() for name, piece in pieces.items() if len(piece.shape) > 1]
    if plan.scope == "seams" and matrices:
        raise VerificationError(
            f"the tensor {matrices[0]} changed, although only vectors were to train at the seams; nothing was written."
        )


def _write_explants(
    case: Transplanted, numbers: Sequence[int], answers: torch.Tensor, target: Path
) -> dict[int, tuple[str, int]]:
    """Save layers as they were before, a file for each run of them; return layer -> (path, number in the file)."""
    places: dict[int, tuple[str, int]] = {}
    for run in _runs(numbers):
        path = free_explant(clean_name(f"{case.name[:60]}-beside-{run.start}-{run.stop}"), target)
        explant = organ_from_checkpoint(
            case.checkpoint,
            run,
            answers=answers,
            dtype="float32",
            name=Path(path).stem,
            description=f"what stood beside {case.name} before recovery",
            kind="explant",
        )
        (target / EXPLANT_FOLDER).mkdir(exist_ok=True)
        explant.save(target / path)
        places.update({number: (path, number - run.start) for number in run})
    return places


def _runs(numbers: Sequence[int]) -> list[range]:
    """Join numbers that follow each other: 3, 4, 8 become [3, 5) and [8, 9)."""
    runs: list[range] = []
    for number in sorted(numbers):
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def take_over_written(
    model: PreTrainedModel,
    case: Transplanted,
    plan: RecoveryPlan,
    written: ModelDirectory,
    unused: set[str],
    trust_remote_code: bool,
) -> None:
    """Load what was written, compare all of it with the model, and give the model the weights as the files round them.

    Args:
        model: The trained model, in float32.
        case: The model as it was before.
        plan: What trained.
        written: What was written.
        unused: Kinds of tensors in the files that the model had no place for before.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        VerificationError: They are not the same.
    """
    import torch

    loaded, left = load_model_and_unused(written, dtype=torch.float32, trust_remote_code=trust_remote_code)
    present, there = model.state_dict(), loaded.state_dict()
    if set(present) != set(there) or left - unused:
        raise VerificationError("the result would be loaded with other tensors than were trained; it was not kept.")
    path = describe(model).layers_path
    trained = tuple(f"{path}.{number}." for number in plan.layers)
    rtol, atol = _rounding(case.checkpoint, plan.layers)
    for name, tensor in there.items():
        here = present[name]
        same = torch.equal(here.cpu(), tensor)
        near = name.startswith(trained) and torch.allclose(here.cpu(), tensor, rtol=rtol, atol=atol)
        if not same and not near:
            raise VerificationError(f"the result would hold other values in {name} than were trained; it was not kept.")
        if not same:
            here.copy_(tensor)


def _rounding(checkpoint: Checkpoint, layers: Sequence[int]) -> tuple[float, float]:
    """Return how far the files round values at most, relative and absolute: not at all in float32."""
    import torch

    pieces = [piece for number in layers for piece in checkpoint.layer_pieces(number).values() if piece.is_float]
    dtypes = {getattr(torch, torch_name(piece.dtype)) for piece in pieces}
    narrow = [torch.finfo(dtype) for dtype in dtypes - {torch.float32, torch.float64}]
    rtol = max((info.eps for info in narrow), default=0.0)
    return rtol, max((info.tiny for info in narrow), default=0.0)


def write_record(case: Transplanted, recovery: Recovery, digests: Mapping[str, str], target: Path) -> SurgicalRecord:
    """Write the surgical record with one more recovery, and return it."""
    found = layer_digests(digests, case.checkpoint.layer_prefix, len(case.record.layers))
    layers = [
        origin.model_copy(update={"digest": digest}) for origin, digest in zip(case.record.layers, found, strict=True)
    ]
    update = {
        "schema_version": SCHEMA_VERSION,
        "neurograft_version": __version__,
        "tensors_digest": combine_digests(digests),
        "layers": layers,
        "recoveries": [*case.record.recoveries, recovery],
    }
    record = case.record.model_copy(update=update)
    (target / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def recovered_organ(
    case: Transplanted,
    record: SurgicalRecord,
    written: ModelDirectory,
    answers: torch.Tensor,
    trust_remote_code: bool,
) -> Organ:
    """Take the recovered organ out of what was written, as an organ that knows all its trainings.

    Args:
        case: The model as it was before.
        record: The record as it is now.
        written: The model as it is now.
        answers: (L, T, S) of its layers to the probe.
        trust_remote_code: See `neurograft.models.resolve`.
    """
    before = case.operation.manifest
    organ = organ_from_checkpoint(
        open_checkpoint(written, trust_remote_code=trust_remote_code),
        range(case.own[0], case.own[-1] + 1),
        answers=answers,
        dtype="float32",
        name=clean_name(f"{case.name.removesuffix('-recovered')[:86]}-recovered"),
        version=case.operation.organ_version,
        license=before.license if before else None,
        description=before.description if before else None,
    )
    own = [recovery for recovery in record.recoveries if recovery.organ == case.name]
    update = {
        "source": before.source if before else organ.manifest.source,
        "training": own[-1].training,
        "training_history": [*(before.trainings if before else []), *(recovery.training for recovery in own[:-1])],
        "evaluations": own[-1].evaluations,
        "scans": [],  # they and the audits were of other weights
        "audits": [],
        "recommended_mode": case.operation.mode,
        "recommended_position": case.own[0],
    }
    return Organ(organ.manifest.model_copy(update=update), organ.tensors)
