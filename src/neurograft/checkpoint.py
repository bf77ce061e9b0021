"""A model directory as tensors on disk: which file holds what, and which tensors belong to which layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.anatomy import Anatomy, build_skeleton, describe
from neurograft.errors import ModelError
from neurograft.files import combine_digests, file_sha256, tensor_digest
from neurograft.layer_values import Row
from neurograft.models import ModelDirectory, load_config, read_raw_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one model, seen as layers."""

    directory: ModelDirectory
    config: PreTrainedConfig
    raw_config: Mapping[str, Any]
    files: Mapping[str, Path]
    """Tensor name -> the file that holds it."""
    skeleton: PreTrainedModel = field(repr=False)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the model's parts are."""
        return describe(self.skeleton)

    @property
    def layer_count(self) -> int:
        """L."""
        return self.anatomy.layer_count

    @property
    def rows(self) -> list[Row]:
        """The per-layer configuration values of each layer."""
        return list(self.anatomy.rows)

    @cached_property
    def layer_prefix(self) -> str:
        """What stands before the layer number in tensor names on disk, such as `model.layers.`.

        Raises:
            ModelError: No prefix, or more than one, has tensors for every layer.
        """
        leaf = re.escape(self.anatomy.layers_path.rpartition(".")[2])
        pattern = re.compile(rf"^((?:.*?\.)?{leaf}\.)(\d+)\.")
        numbers: dict[str, set[int]] = {}
        for match in filter(None, map(pattern.match, self.files)):
            numbers.setdefault(match[1], set()).add(int(match[2]))
        whole = [prefix for prefix, found in numbers.items() if found >= set(range(self.layer_count))]
        if len(whole) != 1:
            raise ModelError(
                f"the tensors of {self.layer_count} layers were looked for in {self.directory.name} under names like "
                f"{self.anatomy.layers_path}.0.*, and {len(whole) or 'no'} complete sets were found."
            )
        return whole[0]

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """Split a tensor name into layer number and name inside the layer; `None` if it is outside the layers."""
        if not name.startswith(self.layer_prefix):
            return None
        number, _, inner = name.removeprefix(self.layer_prefix).partition(".")
        return (int(number), inner) if number.isdigit() and inner else None

    def layer_names(self, layer: int) -> dict[str, str]:
        """Return name inside the layer -> tensor name on disk, for one layer."""
        found = ((name, self.layer_of(name)) for name in self.files)
        return {place[1]: name for name, place in found if place is not None and place[0] == layer}

    def load(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read tensors by name, with the bytes and the dtype that they have on disk."""
        return dict(self.tensors(names))

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read tensors one by one, each file opened once."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as stream:
                for name in wanted:
                    yield name, stream.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the file's header alone."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as stream:
            return tuple(stream.get_slice(name).get_shape())

    def layer_digest(self, layer: int) -> str:
        """Return one digest over a layer's tensors: names inside the layer, dtypes, shapes and bytes."""
        names = self.layer_names(layer)
        tensors = self.load(list(names.values()))
        return combine_digests({inner: tensor_digest(tensors[name]) for inner, name in names.items()})

    def digests(self) -> dict[str, str]:
        """Return tensor name -> digest, for every tensor of the model."""
        return {name: tensor_digest(tensor) for name, tensor in self.tensors(list(self.files))}

    def config_digest(self) -> str:
        """Return the SHA-256 of `config.json`."""
        return file_sha256(self.directory.path / "config.json")


def open_checkpoint(directory: ModelDirectory, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model directory as tensors on disk.

    Raises:
        ModelError: It has no safetensors weights, is quantised, or is no model that can be cut into layers.
    """
    raw = read_raw_config(directory.path)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(
            f"{directory.name} is quantised ({method}); neurograft works on plain weights: dequantise it first."
        )
    skeleton = build_skeleton(config, raw)
    return Checkpoint(directory, config, raw, _find_files(directory), skeleton)


def _find_files(directory: ModelDirectory) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    paths = _weight_files(directory)
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as stream:
                files.update({name: path for name in stream.keys()})  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} can't be read as a safetensors file: {error}.") from error
    return files


def _weight_files(directory: ModelDirectory) -> list[Path]:
    index, single = directory.path / _INDEX_FILE, directory.path / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is no shard index: {error}.") from error
        for name in names:
            if Path(name).name != name or not (directory.path / name).is_file():
                raise ModelError(f"{index} names the shard {name}, which is not there.")
        return [directory.path / name for name in names]
    if single.is_file():
        return [single]
    if any(directory.path.glob("*.bin")) or any(directory.path.glob("*.pt*")):
        raise ModelError(
            f"{directory.name} has only pickled weights, which neurograft never loads; save it as safetensors first."
        )
    raise ModelError(f"{directory.path} has no model.safetensors and no {_INDEX_FILE}.")
