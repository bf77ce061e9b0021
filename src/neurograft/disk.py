"""Extract, transplant and remove on model directories: tensors move as bytes, and every result is checked."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from neurograft import __version__, probe
from neurograft.anatomy import build_skeleton, describe, layer_origins
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.compat import check_checkpoint, refuse_blocked
from neurograft.errors import ModelError, UsageError, VerificationError
from neurograft.files import (
    atomic_directory,
    check_output_directory,
    check_output_file,
    combine_digests,
    file_sha256,
    require_space,
    tensor_digest,
)
from neurograft.layer_values import Row, changed_values
from neurograft.layer_weights import expected_tensors, to_disk
from neurograft.manifest import (
    RECORD_FILE,
    SCHEMA_VERSION,
    Digest,
    LayerAnatomy,
    Manifest,
    Mode,
    Operation,
    Origin,
    Source,
    SurgicalRecord,
)
from neurograft.models import (
    ModelDirectory,
    fingerprint_tokenizer,
    load_config,
    load_model,
    load_model_and_unused,
    load_tokenizer_if_any,
    resolve,
)
from neurograft.organ import UNSEALED, Organ, clean_name, config_to_json, dtype_name, now, read_organ
from neurograft.planning import Plan, Step, make_plan, plan_graft
from neurograft.surgery import verify_graft

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

EXPLANT_FOLDER = "explants"
_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$|^config\.json$|^model\.safetensors\.index\.json$"
)
_RANGE = re.compile(r"^\s*(\d+)\s*:\s*(\d+)\s*$")
PAPER_LAYERS = 3


def parse_layers(layers: str | range | tuple[int, int], layer_count: int) -> range:
    """Return a layer range, half-open and zero-based.

    Args:
        layers: `10:13` for layers 10, 11 and 12; a range; a (start, stop) pair; or `auto` for the paper's choice, three
            layers from floor(L/3) (arXiv 2601.13580).
        layer_count: L.

    Raises:
        UsageError: It is not written so, empty, or out of range.
    """
    if layers == "auto":
        start = min(layer_count // 3, max(layer_count - PAPER_LAYERS, 0))
        return range(start, min(start + PAPER_LAYERS, layer_count))
    if isinstance(layers, str):
        match = _RANGE.match(layers)
        if match is None:
            raise UsageError(
                f"the layer range is {layers!r}; write START:STOP (half-open, from 0), such as 10:13, or auto."
            )
        layers = (int(match[1]), int(match[2]))
    start, stop = (layers.start, layers.stop) if isinstance(layers, range) else layers
    if not 0 <= start < stop <= layer_count:
        raise UsageError(
            f"the layer range {start}:{stop} does not lie inside a model of {layer_count} layers, or is empty."
        )
    return range(start, stop)


def extract(
    model: str | Path,
    *,
    layers: str | range | tuple[int, int] = "auto",
    output: str | Path | None = None,
    name: str | None = None,
    version: str = "0.1.0",
    license: str | None = None,
    description: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Organ:
    """Take a contiguous range of decoder layers out of a model as an organ; the model is not changed.

    Args:
        model: A local transformers directory, a `.gguf` file or a Hub id.
        layers: See `parse_layers`.
        output: File to write, ending in `.safetensors`; left out, the organ is only returned.
        name: The organ's name; left out, made from the model's name and the range.
        version: The organ's semantic version.
        license: SPDX identifier or name of its licence.
        description: One line about it.
        overwrite: Whether an existing file may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        UsageError: The range is wrong, or the file exists.
        ModelError: The model can't be read or cut into layers.
        OrganFileError: The layers hold NaN or infinite values.
    """
    if output is not None:
        check_output_file(Path(output), overwrite=overwrite)
    directory = resolve(model, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    chosen = parse_layers(layers, checkpoint.layer_count)
    log.info("loading %s to ask its layers the probe questions", directory.name)
    answers, loaded = _ask(directory, trust_remote_code)
    organ = organ_from_checkpoint(
        checkpoint,
        chosen,
        answers,
        dtype=loaded,
        name=clean_name(name or f"{directory.name.rpartition('/')[2]}-{chosen.start}-{chosen.stop}"),
        version=version,
        license=license,
        description=description,
        trust_remote_code=trust_remote_code,
    )
    return organ if output is None else organ.save(output, overwrite=overwrite)


def _ask(directory: ModelDirectory, trust_remote_code: bool) -> tuple[torch.Tensor, str]:
    """Return a causal model's answers to the probe, (L, T, S), and the dtype they were computed in."""
    loaded = load_model(directory, trust_remote_code=trust_remote_code)
    probe.refuse_future_leak(loaded, directory.name)
    return probe.probe_layers(loaded, describe(loaded).layers_path), str(loaded.dtype).removeprefix("torch.")


def organ_from_checkpoint(
    checkpoint: Checkpoint,
    layers: range,
    answers: torch.Tensor,
    *,
    dtype: str,
    name: str,
    version: str = "0.1.0",
    license: str | None = None,
    description: str | None = None,
    kind: Any = "organ",
    trust_remote_code: bool = False,
) -> Organ:
    """Build an organ from layers on disk; `answers`, (L, T, S), are those of all the model's layers to the probe."""
    tensors = _canonical_tensors(checkpoint, layers)
    tokenizer = load_tokenizer_if_any(checkpoint.directory, trust_remote_code=trust_remote_code)
    manifest = Manifest(
        name=name,
        version=version,
        license=license,
        description=description,
        created=now(),
        kind=kind,
        anatomy=LayerAnatomy(
            model_type=checkpoint.config.model_type,
            config=config_to_json(checkpoint.config),
            first_layer=layers.start,
            layer_values=[checkpoint.rows[layer] for layer in layers],
            dtype=dtype_name(tensors),
        ),
        tokenizer=fingerprint_tokenizer(tokenizer) if tokenizer is not None else None,
        source=Source(
            model=checkpoint.directory.name,
            revision=checkpoint.directory.revision,
            layer_start=layers.start,
            layer_stop=layers.stop,
            layer_count=checkpoint.layer_count,
            layer_digests=[checkpoint.layer_digest(layer) for layer in layers],
        ),
        recommended_mode="replace",
        recommended_position=layers.start,
        probe=probe.to_manifest(answers[layers.start : layers.stop], dtype),
        tensors_digest=UNSEALED,
        file_digest=UNSEALED,
    )
    return Organ(manifest, tensors)


def _canonical_tensors(checkpoint: Checkpoint, layers: range) -> dict[str, torch.Tensor]:
    """Read layers from disk, under the names that transformers writes today.

    An old checkpoint may spell them otherwise; then transformers reads it and says how it would write it.
    """
    names = {
        f"layers.{layer - layers.start}.{inner}": name
        for layer in layers
        for inner, name in checkpoint.layer_names(layer).items()
    }
    expected = expected_tensors(checkpoint.config, layers)
    if set(names) == set(expected):
        tensors = checkpoint.load(list(names.values()))
        return {inner: tensors[name] for inner, name in names.items()}
    loaded = load_model(checkpoint.directory)
    return {name: tensor.clone() for name, tensor in to_disk(loaded, layers).items()}


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
        record = _make_record(organ, checkpoint, plan, at, mode, tensors, temporary, explant)
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


def planned_tensors(
    checkpoint: Checkpoint, steps: Sequence[Step], organ: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a planned model under the names that they have on disk there.

    Args:
        checkpoint: The recipient.
        steps: Where each layer of the new model comes from.
        organ: `layers.{i}.{name}` -> tensor.
    """
    prefix = checkpoint.layer_prefix
    positions = {step.layer: position for position, step in enumerate(steps) if step.source == "recipient"}
    grown = len(steps) - checkpoint.layer_count
    names: dict[str, str] = {}
    for name in checkpoint.files:
        place = checkpoint.layer_of(name)
        if place is None:
            names[name] = name
        elif (
            place[0] >= checkpoint.layer_count
        ):  # extra blocks behind the decoder layers, such as those that predict further tokens
            names[name] = f"{prefix}{place[0] + grown}.{place[1]}"
        elif place[0] in positions:
            names[name] = f"{prefix}{positions[place[0]]}.{place[1]}"
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors(list(names))}
    for position, step in enumerate(steps):
        if step.source == "organ":
            start = f"layers.{step.layer}."
            tensors.update(
                {f"{prefix}{position}.{n.removeprefix(start)}": t for n, t in organ.items() if n.startswith(start)}
            )
    return tensors


def write_model(checkpoint: Checkpoint, plan: Plan, tensors: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write weights, configuration and the recipient's other files into the folder `target`."""
    config = dict(checkpoint.raw_config)
    values = changed_values(checkpoint.config, list(describe(plan.skeleton).rows))
    config.update(json.loads(json.dumps(values)))
    if "num_hidden_layers" in config:
        config["num_hidden_layers"] = len(plan.steps)
    _write_files(checkpoint, tensors, json.dumps(config, indent=2) + "\n", target)
    written = load_config(ModelDirectory(target, target.name))
    if list(describe(build_skeleton(written)).rows) != list(describe(plan.skeleton).rows):
        raise VerificationError(
            f"the configuration written for {target.name} would be read back with other layers than planned."
        )


def _write_files(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], config: str, target: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    require_space(target.parent, sum(tensor.nbytes for tensor in tensors.values()))
    (target / "config.json").write_text(config, encoding="utf-8")
    for file in sorted(checkpoint.directory.path.iterdir()):
        if (
            file.is_file()
            and not _NOT_COPIED.search(file.name)
            and not file.name.startswith(".")
            and file.name != RECORD_FILE
        ):
            shutil.copyfile(file, target / file.name)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(contiguous, target, max_shard_size="5GB", metadata={"format": "pt"})


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
    name = _unique_name(organ.name, checkpoint)
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


def _unique_name(name: str, checkpoint: Checkpoint) -> str:
    """Return the organ's name, numbered if one of that name is in the recipient already."""
    record = read_record(checkpoint.directory.path)
    taken = {operation.organ for operation in record.operations} if record else set()
    candidates = [name, *(f"{name[:90]}-{number}" for number in range(2, len(taken) + 2))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _make_record(
    organ: Organ,
    checkpoint: Checkpoint,
    plan: Plan,
    at: int,
    mode: Mode,
    tensors: Mapping[str, torch.Tensor],
    target: Path,
    explant: str | None,
) -> SurgicalRecord:
    previous = read_record(checkpoint.directory.path)
    digests = checkpoint.digests()
    before = list(previous.layers) if previous else _original_layers(checkpoint, digests)
    name = _unique_name(organ.name, checkpoint)
    new = {key: tensor_digest(tensor) for key, tensor in tensors.items()}
    layers = [
        before[step.layer]
        if step.source == "recipient"
        else Origin(organ=name, layer=step.layer, digest=_layer_digest(new, checkpoint.layer_prefix, position))
        for position, step in enumerate(plan.steps)
    ]
    operation = Operation(
        organ=name,
        organ_version=organ.manifest.version,
        organ_file_digest=organ.manifest.file_digest,
        mode=mode,
        position=at,
        explant=explant,
        explant_origins=before[at : at + organ.layer_count] if explant else [],
        when=now(),
    )
    return SurgicalRecord(
        neurograft_version=__version__,
        recipient=previous.recipient if previous else checkpoint.directory.name,
        original_config=previous.original_config
        if previous
        else (checkpoint.directory.path / "config.json").read_text(encoding="utf-8"),
        original_tensors_digest=previous.original_tensors_digest if previous else combine_digests(digests),
        original_config_digest=previous.original_config_digest if previous else checkpoint.config_digest(),
        tensors_digest=combine_digests(new),
        config_digest=file_sha256(target / "config.json"),
        layers=layers,
        operations=[*(previous.operations if previous else []), operation],
    )


def _original_layers(checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[Origin]:
    return [
        Origin(organ=None, layer=layer, digest=_layer_digest(digests, checkpoint.layer_prefix, layer))
        for layer in range(checkpoint.layer_count)
    ]


def _layer_digest(digests: Mapping[str, str], prefix: str, layer: int) -> str:
    """Combine the digests of one layer's tensors, by their names inside the layer."""
    start = f"{prefix}{layer}."
    return combine_digests(
        {name.removeprefix(start): digest for name, digest in digests.items() if name.startswith(start)}
    )


def read_record(directory: Path) -> SurgicalRecord | None:
    """Read the surgical record beside a model; `None` if there is none.

    Raises:
        ModelError: It is there, and not as its schema says, or from a newer neurograft.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
        if version > SCHEMA_VERSION:
            raise ModelError(
                f"{path} has schema {version}, and this neurograft reads up to {SCHEMA_VERSION}; install a newer one."
            )
        return SurgicalRecord.model_validate(data)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{path} is no surgical record: {reason}.") from error


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
        if _layer_digest(digests, prefix, position) != origin.digest:
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
        _write_files(checkpoint, tensors, record.original_config, target)
        return
    rows: dict[str, list[Row]] = {
        "recipient": checkpoint.rows,
        "organ": explant.manifest.anatomy.layer_values if explant else [],
    }
    known = {"recipient": layer_origins(checkpoint.skeleton, "the model"), "organ": _explant_origins(explant)}
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


def _explant_origins(explant: Organ | None) -> list[Any]:
    from neurograft.planning import organ_origins

    return organ_origins(explant) if explant else []


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
