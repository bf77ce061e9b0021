"""Floating-point numbers as bytes: checked and converted with numpy, a chunk at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neurograft.byte_moves import Bytes, Cuttable, Held, at_once
from neurograft.errors import OrganFileError
from neurograft.tensor_files import FLOATS, Piece, bytes_of, torch_name

# numpy is imported where it is used: a tenth of a second counts where a transplant takes half of one.
if TYPE_CHECKING:
    import numpy as np

# dtype -> the unsigned integer of its width, and the bits of its exponent, all set in NaN and infinity
_EXPONENTS = {
    "F64": ("uint64", 0x7FF0_0000_0000_0000),
    "F32": ("uint32", 0x7F80_0000),
    "F16": ("uint16", 0x7C00),
    "BF16": ("uint16", 0x7F80),
}
_WORTH_NUMPY = 256 << 20  # bytes
_NUMPY = {"F64": "float64", "F32": "float32", "F16": "float16"}


def count_wild_values(chunk: memoryview, dtype: str) -> int:
    """Return how many values of a plain floating-point dtype are NaN or infinite."""
    # Where it is not there yet: for a small organ, importing numpy would take longer than all of this.
    if "numpy" not in sys.modules and _is_tame(chunk, dtype):
        return 0
    import numpy as np

    integer, bits = _EXPONENTS[dtype]
    values, exponent = np.frombuffer(chunk, integer), np.dtype(integer).type(bits)
    return int(np.count_nonzero((values & exponent) == exponent))


def _is_tame(chunk: memoryview, dtype: str) -> bool:
    """Whether no value is near the end of the dtype's range, going by each one's last byte: the upper exponent bits."""
    width, bits = FLOATS[dtype], _EXPONENTS[dtype][1]
    upper = bits >> (8 * width - 8)
    ends = bytes(chunk)[width - 1 :: width]
    return not any(end & upper == upper and end in ends for end in range(256))


def to_float32(chunk: memoryview | bytes, dtype: str) -> np.ndarray[Any, Any]:
    """Return the values of a chunk as float32."""
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(chunk, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(chunk, _NUMPY[dtype]).astype(np.float32)


def _from_float32(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Round float32 values to a dtype, ties to even, as torch does."""
    import numpy as np

    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(_NUMPY[dtype])


@dataclass(frozen=True)
class Converted:
    """Numbers in another floating-point dtype than they are stored in."""

    stored: Bytes
    dtype: str
    """As stored."""
    wanted: str

    @property
    def size(self) -> int:
        """How many bytes they take once converted."""
        return self.stored.size // FLOATS[self.dtype] * FLOATS[self.wanted]

    def chunks(self) -> Iterator[memoryview]:
        """Convert a chunk at a time."""
        for chunk in self.stored.chunks():
            if self.dtype == "F64" and self.wanted == "F64":
                yield chunk
                continue
            values = _from_float32(to_float32(chunk, self.dtype), self.wanted)
            yield memoryview(values.tobytes())


def converted(piece: Piece, dtype: str) -> Piece:
    """Return a tensor in another plain floating-point dtype; anything but such numbers stays as it is."""
    if piece.dtype == dtype or not piece.is_float or dtype not in FLOATS:
        return piece
    return Piece(dtype, piece.shape, Converted(piece.source, piece.dtype, dtype))


def held(tensor: Any) -> Piece:
    """Return a torch tensor as a piece, without a copy where it lies contiguous on the CPU."""
    import torch

    from neurograft.tensor_files import disk_name

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy()).cast("B") if flat.numel() else memoryview(b"")
    return Piece(disk_name(tensor.dtype), tuple(tensor.shape), Held(data))


def first_rows(piece: Piece, rows: int, values: int) -> np.ndarray[Any, Any]:
    """Return the first rows of a matrix of plain numbers, at most so many numbers, flat, as float32."""
    row = piece.source.size // max(piece.shape[0], 1)
    wanted = min(rows * row, values * FLOATS[piece.dtype], piece.source.size)
    source = piece.source.beginning(wanted) if isinstance(piece.source, Cuttable) else piece.source
    data = bytearray()
    for chunk in source.chunks():
        data += chunk
        if len(data) >= wanted:
            break
    return to_float32(memoryview(data)[:wanted], piece.dtype)


def load_piece(piece: Piece) -> Any:
    """Return a piece as a torch tensor, in memory of its own."""
    import torch

    data = bytearray(piece.source.size)
    position = 0
    for chunk in piece.source.chunks():
        data[position : position + len(chunk)] = chunk
        position += len(chunk)
    dtype = getattr(torch, torch_name(piece.dtype))
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(piece.shape)


def digest_pieces(pieces: Mapping[str, Piece], *, finite_in: str | None = None) -> dict[str, str]:
    """Return the digest of each tensor, read once.

    Args:
        pieces: The tensors.
        finite_in: What they belong to; given, NaN and infinite values are refused on the way.

    Raises:
        OrganFileError: Names the first such tensor and how many of its values are not finite.
    """
    if finite_in is not None and bytes_of(pieces.values()) >= _WORTH_NUMPY:
        import numpy as np  # noqa: F401 (`count_wild_values` takes it where it is there)
    found = at_once(
        lambda piece: _digest(piece, finite_in is not None),
        [(piece, piece.source.size) for piece in pieces.values()],
    )
    for name, (_, wild) in zip(pieces, found, strict=True):
        if wild:
            raise OrganFileError(f"{finite_in}: the tensor {name} has {wild} values that are NaN or infinite.")
    return {name: digest for name, (digest, _) in zip(pieces, found, strict=True)}


def _digest(piece: Piece, look: bool) -> tuple[str, int]:
    """Return a tensor's digest and, if they are looked for, how many of its values are NaN or infinite."""
    digest, wild = piece.digest_start(), 0
    for chunk in piece.source.chunks():
        digest.update(chunk)
        if look and piece.is_float:
            wild += count_wild_values(chunk, piece.dtype)
    return digest.hexdigest(), wild
