"""A model directory as tensors on disk: which file holds what, and which tensors belong to which layer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from neurograft.errors import ModelError
from neurograft.files import combine_digests, file_sha256, read_bounded
from neurograft.layer_values import LAYER_NUMBER, Row
from neurograft.manifest import TokenizerFingerprint
from neurograft.models import ModelDirectory, read_raw_config
from neurograft.number_formats import digest_pieces
from neurograft.studies import ModelStudy, study_all
from neurograft.tensor_files import Piece, TensorFile, bytes_of, read_tensor_file

INDEX_FILE = "model.safetensors.index.json"
EASY_SHARE = 0.25
"""The share of the machine's memory that a model may take which is loaded although nobody asked for it."""


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one model, seen as layers; nothing of them is read but the headers."""

    directory: ModelDirectory
    raw_config: Mapping[str, Any]
    files: tuple[TensorFile, ...]
    study: ModelStudy = field(repr=False)
    tokenizer: TokenizerFingerprint | None = None
    all_names: frozenset[str] | None = field(default=None, repr=False)
    """Names of all tensors, where only some of the files are here."""
    _digests: dict[str, str] = field(default_factory=dict, repr=False)
    """Tensor name -> digest, of those that were read."""

    @property
    def layer_count(self) -> int:
        """L."""
        return self.study.layer_count

    @property
    def rows(self) -> list[Row]:
        """The per-layer configuration values of each layer."""
        return self.study.rows

    @property
    def packing(self) -> str | None:
        """The method by which the weights are quantised, such as `mxfp4`; `None` for plain weights."""
        packed = self.raw_config.get("quantization_config")
        return str(packed.get("quant_method", "unnamed")) if packed else None

    @property
    def runs_easily(self) -> bool:
        """Whether nobody minds that the model is loaded and run: it is here, plain, and small for the machine."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        here = self.packing is None and self.all_names is None
        return here and bytes_of(self.pieces.values()) <= EASY_SHARE * memory

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """Tensor name -> what it is and where its bytes are."""
        return {name: piece for file in self.files for name, piece in file.pieces.items()}

    @cached_property
    def layer_prefix(self) -> str:
        """What stands before the layer number in tensor names on disk, such as `model.layers.`.

        Raises:
            ModelError: No prefix, or more than one, has tensors for every layer.
        """
        leaf = re.escape(self.study.layers_path.rpartition(".")[2])
        pattern = re.compile(rf"^((?:.*?\.)?{leaf}\.)({LAYER_NUMBER})\.")
        numbers: dict[str, set[int]] = {}
        for match in filter(None, map(pattern.match, self.all_names or self.pieces)):
            numbers.setdefault(match[1], set()).add(int(match[2]))
        whole = [prefix for prefix, found in numbers.items() if found >= set(range(self.layer_count))]
        if len(whole) != 1:
            raise ModelError(
                f"the tensors of {self.layer_count} layers were looked for in {self.directory.name} under names like "
                f"{self.study.layers_path}.0.*, and {len(whole) or 'no'} complete sets were found."
            )
        return whole[0]

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """Split a tensor name into layer number and name inside the layer; `None` if it is outside the layers."""
        if not name.startswith(self.layer_prefix):
            return None
        number, _, inner = name.removeprefix(self.layer_prefix).partition(".")
        return (int(number), inner) if re.fullmatch(LAYER_NUMBER, number) and inner else None

    @cached_property
    def _layers(self) -> dict[int, dict[str, str]]:
        layers: dict[int, dict[str, str]] = {}
        for name in self.pieces:
            if (place := self.layer_of(name)) is not None:
                layers.setdefault(place[0], {})[place[1]] = name
        return layers

    def layer_names(self, layer: int) -> dict[str, str]:
        """Return name inside the layer -> tensor name on disk, for one layer."""
        return self._layers.get(layer, {})

    def lacking(self, layer: int) -> list[str]:
        """Return names inside a layer that its kind calls for and its files lack.

        Empty also where the files hold others instead: an old checkpoint may spell them otherwise.
        """
        expected, found = self.study.layout(layer) or {}, self.layer_names(layer)
        return [] if found.keys() - expected.keys() else sorted(expected.keys() - found.keys())

    def misshapen(self, layer: int) -> str | None:
        """Say of the first tensor of a layer that has not the shape that the configuration calls for what it has."""
        pieces = self.layer_pieces(layer)
        for inner, shape in (self.study.layout(layer) or {}).items():
            if inner in pieces and pieces[inner].shape != shape:
                name, found = self.layer_names(layer)[inner], list(pieces[inner].shape)
                return f"{name} has the shape {found}, and the configuration calls for {list(shape)}"
        return None

    def layer_pieces(self, layer: int) -> dict[str, Piece]:
        """Return name inside the layer -> the tensor, for one layer."""
        return {inner: self.pieces[name] for inner, name in self.layer_names(layer).items()}

    def layer_digest(self, layer: int) -> str:
        """Return one digest over a layer's tensors: names inside the layer, dtypes, shapes and bytes."""
        names = self.layer_names(layer)
        digests = self.digests_of(names.values())
        return combine_digests({inner: digests[name] for inner, name in names.items()})

    def digests_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return tensor name -> digest for some tensors; each is read once, however often it is asked for."""
        wanted = list(names)
        self._digests.update(digest_pieces({name: self.pieces[name] for name in wanted if name not in self._digests}))
        return {name: self._digests[name] for name in wanted}

    def digests(self) -> dict[str, str]:
        """Return tensor name -> digest, for every tensor of the model."""
        return self.digests_of(self.pieces)

    def config_digest(self) -> str:
        """Return the SHA-256 of `config.json`."""
        return file_sha256(self.directory.path / "config.json")


def open_checkpoint(directory: ModelDirectory, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model directory as tensors on disk.

    Raises:
        ModelError: It has no safetensors weights, or is no model that can be cut into layers.
    """
    raw = read_raw_config(directory.path)
    refuse_numbered_packing(raw, directory.name)
    files = tuple(map(read_tensor_file, _weight_files(directory)))
    refuse_doubles(files, directory.name)
    study, tokenizer = study_all(directory, trust_remote_code=trust_remote_code)
    return Checkpoint(directory, raw, files, study, tokenizer)


def refuse_doubles(files: Sequence[TensorFile], name: str) -> None:
    """Refuse files of which two hold a tensor of the same name: programs differ in which of them they take.

    Raises:
        ModelError: Names the tensor and both files.
    """
    homes: dict[str, Path] = {}
    for file in files:
        for tensor in file.pieces:
            if tensor in homes:
                raise ModelError(
                    f"the tensor {tensor} of {name} is in {homes[tensor].name} and in {file.path.name}; a tensor is in "
                    f"one file."
                )
            homes[tensor] = file.path


def refuse_numbered_packing(raw: Mapping[str, Any], name: str) -> None:
    """Refuse a quantisation that treats single layers by their numbers, which move."""
    packed = json.dumps(raw.get("quantization_config") or {})
    if numbered := re.search(r"[\w.]+\.\d+\.[\w.]+", packed):
        raise ModelError(
            f"{name} is quantised layer by layer (its quantization_config names {numbered[0]}), so its layers can't be "
            f"moved to other numbers; dequantise it first."
        )


def read_index(path: Path, name: str) -> dict[str, str]:
    """Return tensor name -> file, as a model's index says.

    Args:
        path: The index.
        name: The model's name, for messages.

    Raises:
        ModelError: It is no index, or names files that are no safetensors files of the model's own folder.
    """
    try:
        shards = json.loads(read_bounded(path).decode())["weight_map"]
        files = {str(tensor): str(file) for tensor, file in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is no shard index: it should be a JSON object whose weight_map says which file holds each tensor."
        ) from error
    if not files:
        raise ModelError(f"the index of {name} names no tensors.")
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"the index of {name} names the shard {file!r}; a shard is a .safetensors file beside the index."
            )
    return files


def _weight_files(directory: ModelDirectory) -> list[Path]:
    index, single = directory.path / INDEX_FILE, directory.path / "model.safetensors"
    if index.is_file() and single.is_file():
        raise ModelError(
            f"{directory.path} has both model.safetensors and {INDEX_FILE}; transformers reads the former alone, so "
            "delete what does not belong to the model."
        )
    if index.is_file():
        names = sorted(set(read_index(index, directory.name).values()))
        for name in names:
            if not (directory.path / name).is_file():
                raise ModelError(f"{index} names the shard {name}, which is not there.")
        return [directory.path / name for name in names]
    if single.is_file():
        return [single]
    if any(directory.path.glob("*.bin")) or any(directory.path.glob("*.pt*")):
        raise ModelError(
            f"{directory.name} has only pickled weights, which neurograft never loads; save it as safetensors first."
        )
    raise ModelError(f"{directory.path} has no model.safetensors and no {INDEX_FILE}.")
