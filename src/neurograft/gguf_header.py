"""The header of a GGUF file, checked before the package `gguf` reads it, which believes every number that stands there.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neurograft.errors import ModelError

_VERSIONS = (2, 3)
_MOST_VALUES = 1 << 22  # in arrays; `gguf` makes an object of each, and vocabularies of 262,144 tokens have 1.3 million
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = "general.alignment"
# What says how large something in a model is, and takes as much memory where it is built.
_SIZE = re.compile(r"(_length|_count)$")
_POSITIONS = re.compile(r"(^|[._])context_length$")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor, as the header describes it."""

    kind: str
    """Type of its numbers, such as `Q4_1`."""
    elements: int
    start: int
    """Byte in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the tensors of a GGUF file."""

    values: dict[str, int | float | bool | str]
    """Metadata that are no arrays."""
    tensors: dict[str, GGUFTensor]

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def kinds(self) -> str:
        """Types of the tensors' numbers, such as `F32, Q4_1`."""
        return ", ".join(sorted({tensor.kind for tensor in self.tensors.values()}))


class _WrongError(Exception):
    """Says what is wrong, without the file's name."""


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file; every size in it is checked against the file's before memory is taken.

    Raises:
        ModelError: It is none, sizes in it are not those of the file, tensors overlap, or it says of the model's shape
            what its tensors can't fill.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Reader(content).header()
            _check_places(header.tensors.items(), len(content))
            _check_shape(header)
            return header
    except (_WrongError, UnicodeDecodeError, OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as a GGUF file: {error}.") from error


class _Reader:
    """Goes through a header from its start."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place, self._values_left = content, 8, _MOST_VALUES
        if content[:4] != b"GGUF":
            raise _WrongError("it does not begin like one")
        version = content[4:8]
        self._order = "<" if version[:2] != b"\0\0" else ">"
        found = int.from_bytes(version, "little" if self._order == "<" else "big")
        if found not in _VERSIONS:
            raise _WrongError(f"its version is {found}, and versions {_VERSIONS[0]} and {_VERSIONS[1]} are read")

    def header(self) -> GGUFHeader:
        """Return what stands there."""
        from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

        kinds = {int(kind): kind for kind in GGMLQuantizationType}
        tensor_count, value_count = self._number("Q"), self._number("Q")
        values: dict[str, int | float | bool | str] = {}
        keys: set[str] = set()
        for _ in range(value_count):
            key = self._name(keys)
            value = self._value(self._number("I"))
            if value is not None:
                values[key] = value
        described: dict[str, tuple[str, int, int, int]] = {}
        names: set[str] = set()
        for _ in range(tensor_count):
            name = self._name(names)
            shape = self._shape(name)
            kind = kinds.get(self._number("I"))
            if kind is None:
                raise _WrongError(f"the tensor {name} has numbers of an unknown type")
            block, size = GGML_QUANT_SIZES[kind]
            if shape and shape[0] % block:
                raise _WrongError(f"the rows of the tensor {name} are no whole blocks of {kind.name}")
            elements = math.prod(shape)
            described[name] = (kind.name, elements, self._number("Q"), elements // block * size)
        alignment = values.get(_ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _WrongError(f"{_ALIGNMENT} is {alignment}, and should be a power of two")
        start = -(-self._place // alignment) * alignment
        tensors = {
            name: GGUFTensor(kind, elements, start + offset, size)
            for name, (kind, elements, offset, size) in described.items()
        }
        return GGUFHeader(values, tensors)

    def _take(self, count: int) -> int:
        """Go on by so many bytes, and return where they begin."""
        start = self._place
        if count > len(self._content) - start:
            raise _WrongError(f"it ends within its header, at byte {len(self._content):,}")
        self._place = start + count
        return start

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(self._order + form, self._content, self._take(struct.calcsize("<" + form)))
        return int(value)

    def _text(self) -> bytes:
        count = self._number("Q")
        start = self._take(count)
        return self._content[start : start + count]

    def _name(self, known: set[str]) -> str:
        name = self._text().decode()
        if name in known:
            raise _WrongError(f"{name} stands twice in it")
        known.add(name)
        return name

    def _value(self, kind: int) -> int | float | bool | str | None:
        """Return a value, or `None` for an array, which is passed over."""
        if kind == _STRING:
            return self._text().decode(errors="replace")
        if kind == _ARRAY:
            self._pass_array()
            return None
        form = self._order + self._form(kind)
        (value,) = struct.unpack_from(form, self._content, self._take(struct.calcsize(form)))
        return value

    def _form(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise _WrongError(f"a value in it has the unknown type {kind}")
        return _FORMATS[kind]

    def _pass_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._values_left -= count
        if self._values_left < 0:
            raise _WrongError(f"its arrays have more than {_MOST_VALUES:,} values, which no vocabulary needs")
        if kind == _ARRAY:
            raise _WrongError("an array in it holds arrays")
        if kind == _STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            self._take(count * struct.calcsize("<" + self._form(kind)))

    def _shape(self, name: str) -> list[int]:
        dimensions = self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _WrongError(f"the tensor {name} has {dimensions} dimensions, and {_MOST_DIMENSIONS} are the most")
        return [self._number("Q") for _ in range(dimensions)]


def _check_places(tensors: Iterable[tuple[str, GGUFTensor]], size: int) -> None:
    """Refuse tensors that lie in one another, or beyond the end: in memory they would be more than the file holds."""
    before = 0
    for name, tensor in sorted(tensors, key=lambda item: (item[1].start, item[1].size)):
        if tensor.start < before:
            raise _WrongError(f"the tensor {name} begins within another")
        before = tensor.start + tensor.size
        if before > size:
            raise _WrongError(f"the tensor {name} should end at byte {before:,} of {size:,}")


def _check_shape(header: GGUFHeader) -> None:
    """Refuse more layers than there are tensors of, and sizes that no tensor has."""
    architecture = header.values.get("general.architecture")
    largest = max((tensor.elements for tensor in header.tensors.values()), default=0)
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    for key, value in header.values.items():
        if not isinstance(value, int) or not key.startswith(f"{architecture}.") or _POSITIONS.search(key):
            continue
        if key.endswith(".block_count") and not 0 <= value <= len(layers):
            raise _WrongError(f"{key} is {value:,}, and it holds tensors of {len(layers)} layers")
        if _SIZE.search(key) and not 0 <= value <= largest:
            raise _WrongError(f"{key} is {value:,}, and its largest tensor has {largest:,} numbers")
