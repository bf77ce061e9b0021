"""Take layers out of a model directory as an organ."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import ModelError, UsageError
from neurograft.gguf_files import dequantises_easily, gguf_layers, is_gguf
from neurograft.hub import hub_layers
from neurograft.manifest import (
    UNSEALED,
    LayerAnatomy,
    Manifest,
    Probe,
    Source,
)
from neurograft.models import (
    is_hub_id,
    load_model,
    resolve,
)
from neurograft.number_formats import digest_pieces
from neurograft.organ import (
    LazyTensors,
    Organ,
    check_name,
    check_organ_output,
    check_version,
    clean_name,
    now,
    pieces_dtype,
    pieces_of,
)
from neurograft.streaming import loaded_to_ask
from neurograft.studies import studying

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
    verify: Literal["auto", "bytes", "layers"] = "auto",
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
        verify: `bytes`: the layers are copied as bytes; `layers`: they are also run, and their answers to the probe
            questions put into the manifest, for which transformers runs the model; `auto`: `layers` where the
            weights are plain, all here, and take at most a quarter of this machine's memory, else `bytes`.
        overwrite: Whether an existing file may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        UsageError: The range is wrong, or the file exists or lies in the model's directory.
        ModelError: The model can't be read or cut into layers.
        OrganFileError: The layers hold NaN or infinite values.
    """
    check_name(name)
    check_version(version)
    if output is not None:
        check_organ_output(Path(output), overwrite=overwrite, inputs=[Path(model)])
    with (
        studying(),
        _opened(model, layers, whole=_wants_whole(model, verify), trust_remote_code=trust_remote_code) as (
            checkpoint,
            chosen,
        ),
    ):
        directory = checkpoint.directory
        asked = verify == "layers" or (verify == "auto" and checkpoint.runs_easily)
        answers, dtype = _ask(checkpoint, trust_remote_code) if asked else (None, "")
        organ = organ_from_checkpoint(
            checkpoint,
            chosen,
            answers=answers,
            dtype=dtype,
            name=clean_name(name or f"{directory.name.rpartition('/')[2]}-{chosen.start}-{chosen.stop}"),
            version=version,
            license=license,
            description=description,
        )
        if output is not None:
            return organ.save(output, overwrite=overwrite)
        digest_pieces(organ.pieces, finite_in=organ.name)
        return Organ(organ.manifest, {name: organ.tensors[name] for name in organ.tensors})


def _wants_whole(model: str | Path, verify: str) -> bool:
    """Whether layers are to be run, for which a model is needed whole."""
    return verify == "layers" or (verify == "auto" and is_gguf(Path(model)) and dequantises_easily(Path(model)))


@contextmanager
def _opened(
    model: str | Path, layers: str | range | tuple[int, int], *, whole: bool, trust_remote_code: bool
) -> Iterator[tuple[Checkpoint, range]]:
    """Open a model to take layers out of it; of one on the Hub or in a GGUF file, only these layers unless `whole`."""
    if is_hub_id(model) and not whole:
        with hub_layers(
            str(model), lambda count: parse_layers(layers, count), trust_remote_code=trust_remote_code
        ) as opened:
            yield opened
        return
    path = Path(model)
    if is_gguf(path) and not whole:
        with gguf_layers(path, lambda count: parse_layers(layers, count)) as found:
            if found is not None:
                yield found
                return
    directory = resolve(model, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    yield checkpoint, parse_layers(layers, checkpoint.layer_count)


def _ask(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[torch.Tensor, str]:
    """Return a causal model's answers to the probe, (L, T, S), and the dtype they were computed in."""
    from neurograft import probe
    from neurograft.anatomy import describe

    directory = checkpoint.directory
    whole = checkpoint.runs_easily or checkpoint.packing is not None
    log.info("loading %s to ask its layers the probe questions", directory.name)
    with loaded_to_ask(directory, whole=whole, trust_remote_code=trust_remote_code) as (loaded, _):
        probe.refuse_future_leak(loaded, directory.name)
        return probe.probe_layers(loaded, describe(loaded).layers_path), str(loaded.dtype).removeprefix("torch.")


def organ_from_checkpoint(
    checkpoint: Checkpoint,
    layers: range,
    *,
    answers: torch.Tensor | None = None,
    dtype: str = "",
    name: str,
    version: str = "0.1.0",
    license: str | None = None,
    description: str | None = None,
    kind: Any = "organ",
) -> Organ:
    """Build an organ from layers on disk, whose bytes stay there until it is written.

    Args:
        checkpoint: The model.
        layers: Which, half-open and zero-based.
        answers: (L, T, S), those of all the model's layers to the probe, if they were asked.
        dtype: In which the answers were computed.
        name: The organ's name, and so on, as in `extract`.
        version: See `extract`.
        license: See `extract`.
        description: See `extract`.
        kind: `organ` or `explant`.
    """
    tensors = _canonical_tensors(checkpoint, layers)
    study = checkpoint.study
    manifest = Manifest(
        name=name,
        version=version,
        license=license,
        description=description,
        created=now(),
        kind=kind,
        anatomy=LayerAnatomy(
            model_type=study.model_type,
            config=study.config,
            first_layer=layers.start,
            layer_values=[checkpoint.rows[layer] for layer in layers],
            dtype=pieces_dtype(pieces_of(tensors)),
        ),
        tokenizer=checkpoint.tokenizer,
        source=Source(
            model=checkpoint.directory.name,
            revision=checkpoint.directory.revision,
            layer_start=layers.start,
            layer_stop=layers.stop,
            layer_count=checkpoint.layer_count,
            layer_digests=[checkpoint.layer_digest(layer) for layer in layers],
            dequantised_from=checkpoint.directory.dequantised_from,
        ),
        recommended_mode="replace",
        recommended_position=layers.start,
        probe=_to_manifest(answers, layers, dtype),
        tensors_digest=UNSEALED,
        file_digest=UNSEALED,
    )
    return Organ(manifest, tensors)


def _to_manifest(answers: torch.Tensor | None, layers: range, dtype: str) -> Probe | None:
    if answers is None:
        return None
    from neurograft import probe

    return probe.to_manifest(answers[layers.start : layers.stop], dtype)


def _canonical_tensors(checkpoint: Checkpoint, layers: range) -> Mapping[str, torch.Tensor]:
    """Return layers on disk under the names that transformers writes today, packed ones under those that they have.

    An old checkpoint may spell them otherwise; then transformers reads it and says how it would write it.
    """
    known = all(
        (layout := checkpoint.study.layout(layer)) is None or set(layout) == set(checkpoint.layer_names(layer))
        for layer in layers
    )
    if not known:
        from neurograft.layer_weights import to_disk

        loaded = load_model(checkpoint.directory)
        return {name: tensor.clone() for name, tensor in to_disk(loaded, layers).items()}
    _refuse_wrong_shapes(checkpoint, layers)
    return LazyTensors(
        {
            f"layers.{layer - layers.start}.{inner}": piece
            for layer in layers
            for inner, piece in checkpoint.layer_pieces(layer).items()
        }
    )


def _refuse_wrong_shapes(checkpoint: Checkpoint, layers: range) -> None:
    """Refuse layers whose tensors are not as the model's own configuration says.

    Raises:
        ModelError: Names the first such tensor.
    """
    for layer in layers:
        if wrong := checkpoint.misshapen(layer):
            raise ModelError(f"in {checkpoint.directory.name}, {wrong}.")
