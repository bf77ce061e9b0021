"""safetensors files as named byte ranges: read from the header alone, written by copying, without torch.

A transplant moves bytes. Files here are lists of `Piece`s: a tensor's dtype and shape, and where its bytes come from.
Writing copies them inside the kernel where it can, and digests each tensor on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.byte_moves import Bytes, FileRange, NewFile, Progress, write_files
from neurograft.errors import ModelError
from neurograft.files import distinct, tensor_hash

if TYPE_CHECKING:
    import hashlib

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
# safetensors' name -> torch's name, bits of an element. A file may hold others: then the name on disk counts.
_DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
}
_DISK_NAMES = {name: disk for disk, (name, _) in _DTYPES.items()}
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Plain floating-point dtypes, which can be checked for NaN and converted, and their sizes in bytes."""


def torch_name(dtype: str) -> str:
    """Return torch's name of a dtype as digests use it: `BF16` is `bfloat16`."""
    return _DTYPES[dtype][0] if dtype in _DTYPES else dtype.lower()


def disk_name(dtype: Any) -> str:
    """Return safetensors' name of a torch dtype: `torch.bfloat16` is `BF16`."""
    return _DISK_NAMES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class Piece:
    """One tensor: what it is, and where its bytes come from."""

    dtype: str
    """safetensors' name, such as `BF16`."""
    shape: tuple[int, ...]
    source: Bytes

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape, to compare."""
        return self.dtype, self.shape

    @property
    def is_float(self) -> bool:
        """Whether the bytes are plain floating-point numbers."""
        return self.dtype in FLOATS

    def digest_start(self) -> hashlib._Hash:
        """Begin the tensor's digest: dtype and shape are in it, the bytes are to follow."""
        return tensor_hash(torch_name(self.dtype), self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, known from its header."""

    path: Path
    pieces: Mapping[str, Piece]
    """Tensor name -> where its bytes are, in the order in which they lie in the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_tensor_file(path: Path) -> TensorFile:
    """Read the header of a safetensors file; sizes are checked before memory is taken.

    Raises:
        ModelError: It is no whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{path} can't be read as a safetensors file: its header is longer than the file.")
        text = stream.read(length)
    return TensorFile(path, *read_header(text, path, 8 + length, size))


def read_header(
    text: bytes, path: Path, data_start: int, size: int | None = None
) -> tuple[dict[str, Piece], dict[str, str]]:
    """Return the tensors that the text of a header describes, in file order, and its metadata.

    Args:
        text: JSON.
        path: The file, for messages and as the source of the tensors' bytes.
        data_start: Where in the file the tensors begin.
        size: Bytes of the file, if they are known.

    Raises:
        ModelError: It is no header, tensors overlap or leave gaps, or they do not end where the file does.
    """
    try:
        return parse_header(load_header(text), path, data_start, size)
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise ModelError(f"{path} can't be read as a safetensors file: {type(error).__name__}: {error}.") from error


def load_header(text: bytes) -> dict[str, Any]:
    """Parse the text of a header.

    Raises:
        ValueError: It is no JSON object, or two tensors have one name.
    """
    header = json.loads(text, object_pairs_hook=distinct)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header


def parse_header(
    header: dict[str, Any], path: Path, data_start: int, size: int | None
) -> tuple[dict[str, Piece], dict[str, str]]:
    """Return the tensors that a header describes, in file order, and its metadata.

    Raises:
        ModelError: Tensors overlap, leave gaps, or do not end where the file does.
        ValueError: A value is of another kind than it should be; so with KeyError, TypeError and the like.
    """
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ModelError(f"{path} can't be read as a safetensors file: its metadata are not all text.")
    entries = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    position, pieces = 0, {}
    for name, entry in entries:
        start, stop = (_count(offset) for offset in entry["data_offsets"])
        shape = tuple(map(_count, entry["shape"]))
        dtype = str(entry["dtype"])
        f"{name} {dtype}".encode()  # lone surrogates, which JSON can hold, can't be digested: a ValueError
        expected = _bytes_of(dtype, shape)
        if start != position or stop < start or expected not in (None, stop - start):
            raise ModelError(f"{path} can't be read as a safetensors file: the place of the tensor {name} is wrong.")
        pieces[name] = Piece(dtype, shape, FileRange(path, data_start + start, stop - start))
        position = stop
    if size not in (None, data_start + position):
        raise ModelError(
            f"{path} can't be read as a safetensors file: it has {size} bytes and its header describes "
            f"{data_start + position}."
        )
    return pieces, metadata


def _count(value: Any) -> int:
    """Return a number of elements or bytes as it stands in a header.

    Raises:
        ValueError: It is no integer from 0 on.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no size")
    return value


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return how many bytes a tensor takes; `None` for a dtype that is not known here."""
    return math.prod(shape) * _DTYPES[dtype][1] // 8 if dtype in _DTYPES else None


def in_file_order(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Order tensors as safetensors does, the widest elements first, so that each lies at a multiple of its width."""
    width = {name: _DTYPES.get(piece.dtype, ("", 0))[1] for name, piece in pieces.items()}
    return dict(sorted(pieces.items(), key=lambda item: -width[item[0]]))


def header_of(pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds `pieces` in their order, with its length in front."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, piece in pieces.items():
        stop = position + piece.source.size
        header[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(pieces: Iterable[Piece]) -> int:
    """Return how many bytes tensors take."""
    return sum(piece.source.size for piece in pieces)


@dataclass(frozen=True)
class NewTensorFile:
    """A safetensors file to be written: what is in it, and where the bytes come from."""

    path: Path
    """Does not exist yet."""
    pieces: Mapping[str, Piece]
    metadata: Mapping[str, str]


def write_tensor_files(files: Sequence[NewTensorFile], *, progress: Progress | None = None) -> dict[str, str]:
    """Write safetensors files and return the digest of each tensor, made from the bytes as they were copied.

    Args:
        files: No tensor occurs in two of them.
        progress: Called with the number of bytes that were written since the last call.
    """
    hashes: dict[str, hashlib._Hash] = {}
    new = []
    for file in files:
        ordered = in_file_order(file.pieces)
        hashes.update({name: piece.digest_start() for name, piece in ordered.items()})
        parts = [(piece.source, hashes[name]) for name, piece in ordered.items()]
        new.append(NewFile(file.path, header_of(ordered, file.metadata), parts))
    write_files(new, progress)
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def prefixed(pieces: Mapping[str, Piece], prefix: str) -> dict[str, Piece]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): piece for name, piece in pieces.items() if name.startswith(prefix)}


def same_kinds(ours: Mapping[str, Piece], theirs: Mapping[str, Piece]) -> bool:
    """Whether two sets of tensors agree in names, dtypes and shapes."""
    return {name: piece.kind for name, piece in ours.items()} == {name: piece.kind for name, piece in theirs.items()}
