"""Layers of a GGUF file: only those that are wanted are dequantised, one after the other."""

from __future__ import annotations

import importlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.checkpoint import EASY_SHARE, Checkpoint
from neurograft.files import file_sha256, require_space
from neurograft.gguf_header import GGUFHeader, read_gguf_header
from neurograft.models import ModelDirectory, cache_directory, read_gguf_config, read_raw_config, reading_gguf
from neurograft.number_formats import held
from neurograft.studies import study_all
from neurograft.tensor_files import NewTensorFile, TensorFile, read_tensor_file, write_tensor_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")

_FLOAT32_BYTES = 4


def is_gguf(path: Path) -> bool:
    """Whether there is a file that begins like a GGUF file."""
    if path.suffix != ".gguf" or not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def dequantises_easily(path: Path) -> bool:
    """Whether nobody minds that the whole file is dequantised: its numbers as float32 are small for the machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return read_gguf_header(path).elements * _FLOAT32_BYTES <= EASY_SHARE * memory


@contextmanager
def gguf_layers(path: Path, choose: Callable[[int], range]) -> Iterator[tuple[Checkpoint, range] | None]:
    """Open some layers of a GGUF file, dequantised to float32; the others are not read.

    Args:
        path: The file.
        choose: Gives the wanted layers of a model of L layers.

    Yields:
        The checkpoint and the layers; `None` for an architecture whose layers transformers reads only all together.

    Raises:
        ModelError: It can't be read, or is no model that can be cut into layers.
    """
    cache_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=cache_directory()) as folder:
        yield _open(path, choose, Path(folder))


def _open(path: Path, choose: Callable[[int], range], folder: Path) -> tuple[Checkpoint, range] | None:
    header = read_gguf_header(path)
    skeleton = _write_small_files(path, header, folder)
    directory = ModelDirectory(
        folder,
        path.stem,
        file_sha256(path),
        (f"dequantised from {path.name} to float32",),
        f"GGUF {header.kinds}",
    )
    study, tokenizer = study_all(directory)
    chosen = choose(study.layer_count)
    files = []
    for layer in chosen:
        log.info("dequantising layer %d of %s", layer, path.name)
        tensors = _dequantise(path, skeleton, study.layers_path, layer)
        if tensors is None:
            return None
        files.append(_write_layer(folder, f"{study.layers_path}.{layer}.", tensors))
    names = frozenset(f"{study.layers_path}.{layer}.weight" for layer in range(study.layer_count))
    return Checkpoint(directory, read_raw_config(folder), tuple(files), study, tokenizer, names), chosen


def _write_small_files(path: Path, header: GGUFHeader, folder: Path) -> PreTrainedModel:
    """Write the configuration and the tokenizer that a GGUF file holds, and return its model without weights."""
    from transformers import AutoTokenizer

    from neurograft.anatomy import build_skeleton

    config = read_gguf_config(path, header)
    with reading_gguf(path):
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    vars(config).pop("quantization_config", None)
    skeleton = build_skeleton(config)
    config.architectures, config.dtype, config._name_or_path = [type(skeleton).__name__], "float32", path.stem
    config.save_pretrained(folder)
    return skeleton


def _dequantise(path: Path, skeleton: PreTrainedModel, layers_path: str, layer: int) -> dict[str, torch.Tensor] | None:
    """Return one layer's tensors in disk form, by their names inside the layer.

    transformers knows how each architecture's tensors are named and turned in a GGUF file, and reads all there are, so
    it is shown a file that holds no others.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from neurograft.layer_weights import to_disk

    with reading_gguf(path), _only(re.compile(rf"blk\.{layer}\.")):
        found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    start = f"{layers_path}.{layer}."
    module = skeleton.get_submodule(f"{layers_path}.{layer}")
    empty = {name: tensor for name, tensor in module.state_dict().items()}
    inner = {name.removeprefix(start): tensor for name, tensor in found.items()}
    if inner.keys() != empty.keys() or any(inner[name].shape != empty[name].shape for name in empty):
        return None
    module.load_state_dict(inner, assign=True)
    try:
        return {
            name.removeprefix("layers.0."): tensor.clone()
            for name, tensor in to_disk(skeleton, range(layer, layer + 1)).items()
        }
    finally:
        module.load_state_dict(empty, assign=True)  # memory for one layer at a time


@contextmanager
def _only(pattern: re.Pattern[str]) -> Iterator[None]:
    """Let GGUF files show only tensors whose names begin with a pattern."""
    gguf: Any = importlib.import_module("gguf")

    whole = gguf.GGUFReader

    def some(*arguments: Any, **named: Any) -> Any:
        reader = whole(*arguments, **named)
        reader.tensors = [tensor for tensor in reader.tensors if pattern.match(tensor.name)]
        return reader

    gguf.GGUFReader = some
    try:
        yield
    finally:
        gguf.GGUFReader = whole


def _write_layer(folder: Path, prefix: str, tensors: dict[str, torch.Tensor]) -> TensorFile:
    file = folder / f"{prefix}safetensors"
    pieces = {f"{prefix}{name}": held(tensor) for name, tensor in tensors.items()}
    require_space(folder, sum(piece.source.size for piece in pieces.values()))
    write_tensor_files([NewTensorFile(file, pieces, {"format": "pt"})])
    return read_tensor_file(file)
