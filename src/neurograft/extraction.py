"""Take layers out of a model directory as an organ."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft import probe
from neurograft.anatomy import describe
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import UsageError
from neurograft.layer_weights import expected_tensors, to_disk
from neurograft.manifest import (
    LayerAnatomy,
    Manifest,
    Source,
)
from neurograft.models import (
    ModelDirectory,
    fingerprint_tokenizer,
    load_model,
    load_tokenizer_if_any,
    resolve,
)
from neurograft.organ import (
    UNSEALED,
    Organ,
    check_organ_output,
    check_version,
    clean_name,
    config_to_json,
    dtype_name,
    now,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

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
        UsageError: The range is wrong, or the file exists or lies in the model's directory.
        ModelError: The model can't be read or cut into layers.
        OrganFileError: The layers hold NaN or infinite values.
    """
    check_version(version)
    if output is not None:
        check_organ_output(Path(output), overwrite=overwrite, inputs=[Path(model)])
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
