"""An organ in memory, and its file: one safetensors file that nothing needs to be trusted to read."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.byte_moves import NewFile, at_once, write_files
from neurograft.errors import ModelError, OrganFileError, UsageError
from neurograft.files import (
    CHUNK_BYTES,
    atomic_file,
    check_output_file,
    combine_digests,
    distinct,
    require_space,
)
from neurograft.manifest import SCHEMA_VERSION, UNSEALED, VERSION_PATTERN, Manifest
from neurograft.number_formats import digest_pieces, held, load_piece
from neurograft.tensor_files import (
    MAX_HEADER_BYTES,
    Piece,
    bytes_of,
    header_of,
    in_file_order,
    load_header,
    parse_header,
    prefixed,
    torch_name,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

METADATA_KEY = "neurograft"
# Digests of the files that this process wrote, which `trust.toml` need not let it use: they are its own.
_written: set[str] = set()
_DIGEST_FIELD = re.compile(rb'\\"file_digest\\":\\"([0-9a-f]{64})\\"')


@dataclass(frozen=True)
class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Tensors that stay where they are; each is read when it is asked for."""

    pieces: Mapping[str, Piece]

    def __getitem__(self, name: str) -> torch.Tensor:
        return load_piece(self.pieces[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True)
class Organ:
    """A contiguous range of decoder layers with its manifest.

    Attributes:
        manifest: What the organ says of itself.
        tensors: `layers.{i}.{name}` -> tensor, i from 0 to k-1, in the form in which transformers writes them to disk.
        path: The file that it was read from, if any.
    """

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    path: Path | None = None

    @property
    def name(self) -> str:
        """The name in the manifest."""
        return self.manifest.name

    @property
    def layer_count(self) -> int:
        """K."""
        return self.manifest.layer_count

    def without_values(self) -> Organ:
        """Return the same organ without the memory of its tensors, of which only names, shapes and dtypes are left."""
        return Organ(self.manifest, {name: tensor.to("meta") for name, tensor in self.tensors.items()}, self.path)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of layer `index`, by their names inside the layer."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """The tensors as bytes: what each is, and where its bytes are."""
        return pieces_of(self.tensors)

    def layer_pieces(self, index: int) -> dict[str, Piece]:
        """Return the tensors of layer `index` as bytes, by their names inside the layer."""
        return prefixed(self.pieces, f"layers.{index}.")

    def layer_digest(self, index: int) -> str:
        """Return one digest over the tensors of layer `index`, comparable with `Checkpoint.layer_digest`."""
        return combine_digests(digest_pieces(self.layer_pieces(index)))

    def config(self) -> PreTrainedConfig:
        """Return the donor's configuration as transformers loads it.

        Raises:
            OrganFileError: transformers does not know the model type, or refuses the configuration.
        """
        return _load_config(self.manifest.anatomy.config, self.name)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Organ:
        """Write the organ to `path`, atomically, and return it as written.

        Raises:
            UsageError: `path` exists and `overwrite` is false.
            NeurograftError: The disk is full.
        """
        return write_organ(self, Path(path), overwrite=overwrite)


def config_to_json(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a configuration as the JSON object that transformers would write, without where it was loaded from."""
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    data.pop("_name_or_path", None)
    return data


def _load_config(data: Mapping[str, Any], name: str) -> PreTrainedConfig:
    import tempfile

    from transformers import AutoConfig

    from neurograft.layer_weights import quiet_transformers

    # transformers decodes infinities and old spellings only when it reads a file
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(data), encoding="utf-8")
        try:
            with quiet_transformers():
                return AutoConfig.from_pretrained(folder)
        except Exception as error:
            raise OrganFileError(f"transformers can't use the configuration in the organ {name}: {error}") from error


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def clean_name(text: str) -> str:
    """Turn any text into a name that a manifest accepts."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:96] or "organ"


def check_name(name: str | None) -> None:
    """Refuse a name for an organ that a manifest does not accept; `None` leaves it to be made up.

    Raises:
        UsageError: It has other characters, or is too long.
    """
    if name is not None and clean_name(name) != name:
        raise UsageError(
            f"the organ's name is {name!r}; write up to 96 of the characters A-Z, a-z, 0-9, '.', '_' and '-', the "
            f"first and the last a letter or a digit, such as {clean_name(name)}."
        )


def check_version(version: str) -> None:
    """Refuse a version that a manifest does not accept.

    Raises:
        UsageError: It is no semantic version.
    """
    if not re.match(VERSION_PATTERN, version):
        raise UsageError(f"the organ's version is {version!r}; write a semantic version, such as 1.0.2.")


def dtype_name(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the floating-point dtype of some tensors, such as `float32`; `mixed` if they differ."""
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    return names.pop() if len(names) == 1 else "mixed"


def pieces_of(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Piece]:
    """Return tensors as bytes: what each is, and where its bytes are."""
    if isinstance(tensors, LazyTensors):
        return tensors.pieces
    return {name: held(tensor) for name, tensor in tensors.items()}


def pieces_dtype(pieces: Mapping[str, Piece]) -> str:
    """Return the dtype of some tensors, as `dtype_name` does; that of packed ones if all are packed."""
    names = {torch_name(piece.dtype) for piece in pieces.values() if piece.is_float}
    names = names or {torch_name(piece.dtype) for piece in pieces.values()}
    return names.pop() if len(names) == 1 else "mixed"


def check_organ_output(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work is done, a file that an organ can't be written to; see `files.check_output_file`."""
    if path.suffix != ".safetensors":
        raise UsageError(f"an organ file's name ends in .safetensors, and {path} does not.")
    check_output_file(path, overwrite=overwrite, inputs=inputs)


def write_organ(organ: Organ, path: Path, *, overwrite: bool = False) -> Organ:
    """Write an organ file; see `Organ.save`.

    The bytes are read twice: the header, which stands in front of them, holds their digests.
    """
    check_organ_output(path, overwrite=overwrite)
    pieces = in_file_order(organ.pieces)
    digests = digest_pieces(pieces, finite_in=organ.name)
    update = {
        "schema_version": SCHEMA_VERSION,  # what was read from an older file may have gained what that lacks
        "tensors_digest": combine_digests(digests),
        "file_digest": UNSEALED,
    }
    manifest = organ.manifest.model_copy(update=update)
    header = header_of(pieces, {METADATA_KEY: manifest.model_dump_json()})
    whole = hashlib.sha256(header)
    with atomic_file(path, overwrite=overwrite) as temporary:
        require_space(path.parent, len(header) + bytes_of(pieces.values()))
        write_files([NewFile(temporary, header, [(piece.source, whole) for piece in pieces.values()])])
        _seal(temporary, header, whole.hexdigest())
        written, _ = parse_header(json.loads(header[8:]), path, len(header), temporary.stat().st_size)
    manifest = manifest.model_copy(update={"file_digest": whole.hexdigest()})
    _written.add(manifest.file_digest)
    return Organ(manifest, LazyTensors(written) if isinstance(organ.tensors, LazyTensors) else organ.tensors, path)


def _seal(path: Path, header: bytes, digest: str) -> None:
    """Write the digest of the file into its own header, in place of 64 zeros."""
    found = [match for match in _DIGEST_FIELD.finditer(header) if match[1] == UNSEALED.encode()]
    with path.open("r+b") as stream:
        stream.seek(found[-1].start(1))
        stream.write(digest.encode())


def organ_path(organ: str | Path) -> Path:
    """Return the path of an organ file; a reference to one in a bank is downloaded, if it is not in the cache.

    Args:
        organ: The path of a file, or a reference such as `bank/:radiology@1.2`; see `neurograft.bank.references`.

    Raises:
        BankError: The bank can't be reached or refuses, or has no such organ, version or tag.
        UsageError: It is a reference to no organ, or to no kind of bank that there is.
    """
    from neurograft.bank.references import is_reference

    if not isinstance(organ, str) or not is_reference(organ):
        return Path(organ)
    from neurograft.bank.resolving import download_organ

    return download_organ(organ)


def read_organ(path: str | Path, *, for_use: bool = True) -> Organ:
    """Read an organ file into memory, trusting nothing: sizes, schema, digests and values are checked.

    Args:
        path: The file, or a reference to one in a bank.
        for_use: See `open_organ`.

    Raises:
        TrustError: There is a `trust.toml`, and it does not let this organ be used; see `neurograft.trust.policy`.
        OrganFileError: The file is missing, no organ, truncated, altered in any byte, from a newer schema, or holds NaN
            or infinite values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    organ = open_organ(path, for_use=for_use)
    assert organ.path is not None
    path = organ.path
    try:
        return Organ(organ.manifest, load_file(path), path)
    except (OSError, SafetensorError) as error:
        raise OrganFileError(f"{path} can't be read as a safetensors file: {error}.") from error


def open_organ(path: str | Path, *, for_use: bool = True) -> Organ:
    """Check an organ file as `read_organ` does, and leave its tensors where they are until they are asked for.

    This is the one place through which organs come to be used, so it is here that `trust.toml` is heeded.

    Args:
        path: The file, or a reference to one in a bank.
        for_use: Whether `trust.toml` must let it be used; not what is only looked at, nor what a verb
            made for itself: a model's explants, the layers that a comparison trains.

    Raises:
        OrganFileError, TrustError: See `read_organ`.
    """
    given, path = path, organ_path(path)
    manifest, pieces = _read_front(path)
    if for_use and manifest.file_digest not in _written:  # if it says so wrongly, its digest does not hold below
        from neurograft.trust.policy import require_trust

        require_trust(path, manifest, called=str(given))
    size = path.stat().st_size
    digests: dict[str, str] = {}
    at_once(
        lambda check: check(),
        [
            (lambda: _verify_file_digest(path, manifest.file_digest), size),
            (lambda: digests.update(digest_pieces(pieces, finite_in=str(path))), size),
        ],
    )
    if combine_digests(digests) != manifest.tensors_digest:
        raise OrganFileError(
            f"the tensors in {path} do not have the digest that its manifest gives; the file was altered."
        )
    return Organ(manifest, LazyTensors(pieces), path)


def read_manifest(path: str | Path) -> Manifest:
    """Read and check an organ file's manifest and the digest of the whole file, without keeping its tensors.

    Raises:
        OrganFileError: See `read_organ`.
    """
    path = organ_path(path)
    manifest, _ = _read_front(path)
    _verify_file_digest(path, manifest.file_digest)
    return manifest


def _read_front(path: Path) -> tuple[Manifest, dict[str, Piece]]:
    """Return the manifest and the places of the tensors, after checking the sizes that the header claims."""
    header, length = _read_header(path)
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise OrganFileError(f"{path} is a safetensors file but no organ: its header has no {METADATA_KEY} manifest.")
    manifest = parse_manifest(text, path)
    try:
        return manifest, parse_header(header, path, 8 + length, path.stat().st_size)[0]
    except (ModelError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise OrganFileError(f"{path} is no safetensors file, or its header was altered: {error}") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the safetensors header as JSON, and its length."""
    if path.is_dir():
        raise OrganFileError(f"{path} is a directory; an organ is one .safetensors file.")
    if not path.is_file():
        raise OrganFileError(f"there is no organ file {path}.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            _refuse_pickle(path, start)
            raise OrganFileError(
                f"{path} is truncated or no safetensors file: its header would be {length} bytes long, the file has "
                f"{size}."
            )
        text = stream.read(length)
    try:
        header = load_header(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise OrganFileError(
            f"{path} is no safetensors file, or its header was altered: {type(error).__name__}: {error}."
        ) from error
    if size != expected:
        raise OrganFileError(
            f"{path} is {'truncated' if size < expected else 'too long'}: it has {size} bytes and its header "
            f"describes {expected}."
        )
    return dict(header), length


def _refuse_pickle(path: Path, start: bytes) -> None:
    if start[:1] == b"\x80" or zipfile.is_zipfile(path):
        raise OrganFileError(
            f"{path} is a pickle (a PyTorch .pt or .bin file), which neurograft never loads; an organ is a "
            f".safetensors file."
        )


def parse_manifest(text: str, path: Path) -> Manifest:
    """Parse a manifest.

    Raises:
        OrganFileError: It is no JSON object, of a newer schema, or not as the schema says.
    """
    from pydantic import ValidationError

    try:
        data = json.loads(text, object_pairs_hook=distinct)
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OrganFileError(f"the manifest in {path} can't be read: {type(error).__name__}: {error}.") from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise OrganFileError(
            f"{path} has manifest schema {version}, and this neurograft reads schemas up to {SCHEMA_VERSION}; "
            f"install a newer neurograft."
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OrganFileError(
            f"the manifest in {path} is not as schema {SCHEMA_VERSION} says: {place}: {first['msg']}."
        ) from error


def _verify_file_digest(path: Path, digest: str) -> None:
    """Compare the digest in the header with that of the file whose digest field is written as zeros."""
    whole = hashlib.sha256()
    with path.open("rb") as stream:
        length = stream.read(8)
        header = length + stream.read(int.from_bytes(length, "little"))
        matches = [match for match in _DIGEST_FIELD.finditer(header) if match[1] == digest.encode()]
        if matches:
            start = matches[-1].start(1)
            header = header[:start] + UNSEALED.encode() + header[start + 64 :]
        whole.update(header)
        while chunk := stream.read(CHUNK_BYTES):
            whole.update(chunk)
    if not matches or whole.hexdigest() != digest:
        raise OrganFileError(
            f"{path} was altered or damaged: its bytes do not have the digest that its manifest gives."
        )
