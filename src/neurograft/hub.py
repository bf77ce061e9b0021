"""Layers of a model on the Hub: only what holds them is downloaded, by range requests where the server allows those."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurograft.byte_moves import FileRange
from neurograft.checkpoint import INDEX_FILE, Checkpoint, read_index, refuse_doubles, refuse_numbered_packing
from neurograft.errors import ModelError
from neurograft.files import human_bytes, require_space
from neurograft.models import HUB_FILES, ModelDirectory, cache_directory, read_raw_config, refuse_foreign
from neurograft.studies import ModelStudy, study_all
from neurograft.tensor_files import MAX_HEADER_BYTES, Piece, TensorFile, bytes_of, read_header, read_tensor_file

log = logging.getLogger("neurograft")

_FIRST_BYTES = 1 << 17
_CONNECTIONS = 8
_GAP = 1 << 20  # ranges that are closer than this are asked for in one request
_SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class _Remote:
    """One model on the Hub, at one commit."""

    name: str
    commit: str

    def url(self, file: str) -> str:
        """Return where a file is."""
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.name, file, revision=self.commit))

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes] | None:
        """Return a range of a file, in pieces; `None` if the server gives whole files only."""
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import http_stream_backoff

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        stream = http_stream_backoff("GET", self.url(file), headers=headers, follow_redirects=True)
        response = stream.__enter__()
        if response.status_code != 206:
            stream.__exit__(None, None, None)
            return None

        def pieces() -> Iterator[bytes]:
            try:
                yield from response.iter_bytes()
            finally:
                stream.__exit__(None, None, None)

        return pieces()

    def download(self, file: str) -> Path:
        """Download a whole file into the Hub's own cache."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.name, file, revision=self.commit))


@dataclass(frozen=True)
class RemoteRange:
    """A range of a file on the Hub, fetched when it is read."""

    remote: _Remote
    file: str
    start: int
    size: int

    def chunks(self) -> Iterator[memoryview]:
        """Fetch the range in pieces.

        Raises:
            ModelError: The Hub gave less.
        """
        got = 0
        for piece in self.remote.read(self.file, self.start, self.start + self.size) or ():
            got += len(piece)
            yield memoryview(piece)
        if got != self.size:
            raise ModelError(f"the Hub gave {got} of the {self.size} bytes asked of {self.file}.")

    def beginning(self, size: int) -> RemoteRange:
        """Return the first bytes of the range."""
        return replace(self, size=min(size, self.size))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence."""
    try:
        yield
    except OSError as error:  # the Hub's own errors are among these
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{name} is no local directory, and the Hub did not give it: {reason}") from error


def _looked_into(name: str, revision: str | None, trust_remote_code: bool) -> tuple[ModelDirectory, dict[str, Any]]:
    """Fetch a model's small files; return where they are and its configuration, if its layers can be moved."""
    directory = _small_files(name, revision)
    refuse_foreign(directory.path, trust_remote_code=trust_remote_code)
    raw = read_raw_config(directory.path)
    refuse_numbered_packing(raw, directory.name)
    return directory, raw


def hub_headers(reference: str, *, trust_remote_code: bool = False) -> Checkpoint | None:
    """Open a model on the Hub of which nothing is here but the small files and the headers of the others.

    Args:
        reference: `org/name` or `org/name@revision`.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        A checkpoint whose tensors are fetched as far as they are read; `None` if the server gives whole files only.

    Raises:
        ModelError: The Hub does not give the model, or it is none that can be cut into layers.
    """
    name, _, revision = reference.partition("@")
    with _explained(name):
        directory, raw = _looked_into(name, revision or None, trust_remote_code)
        remote = _Remote(name, str(directory.revision))
        shards = sorted(set(_weight_map(remote, directory.path).values())) or [_SINGLE_FILE]
        log.info("reading the headers of %d files of %s", len(shards), name)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            files = list(pool.map(lambda shard: _remote_file(remote, directory.path / shard), shards))
        if None in files:
            return None
        whole = tuple(file for file in files if file is not None)
        refuse_doubles(whole, name)
        study, tokenizer = study_all(directory, trust_remote_code=trust_remote_code)
        return Checkpoint(directory, raw, whole, study, tokenizer)


def _remote_file(remote: _Remote, local: Path) -> TensorFile | None:
    """Return a file that is known from its header; `None` if the server gives whole files only."""
    if local.is_file():
        return read_tensor_file(local)
    front = _fetch_front(remote, local.name)
    if front is None:
        return None
    pieces, metadata = read_header(front[8:], local, len(front))
    places = {name: piece.source.start for name, piece in pieces.items() if isinstance(piece.source, FileRange)}
    return TensorFile(
        local,
        {
            name: replace(piece, source=RemoteRange(remote, local.name, places[name], piece.source.size))
            for name, piece in pieces.items()
        },
        metadata,
    )


@contextmanager
def hub_layers(
    reference: str, choose: Callable[[int], range], *, trust_remote_code: bool = False
) -> Iterator[tuple[Checkpoint, range]]:
    """Open some layers of a model on the Hub; bytes of other layers are not there.

    Args:
        reference: `org/name` or `org/name@revision`.
        choose: Gives the wanted layers of a model of L layers.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        ModelError: The Hub does not give the model, or it is none that can be cut into layers.
    """
    name, _, revision = reference.partition("@")
    with _explained(name):
        directory, raw = _looked_into(name, revision or None, trust_remote_code)
        study, tokenizer = study_all(directory, trust_remote_code=trust_remote_code)
        chosen = choose(study.layer_count)
        cache_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hub-", dir=cache_directory()) as folder:
            files, names = _fetch(_Remote(name, str(directory.revision)), directory.path, study, chosen, Path(folder))
            yield Checkpoint(directory, raw, files, study, tokenizer, names), chosen


def _small_files(name: str, revision: str | None) -> ModelDirectory:
    """Download everything but the weights."""
    from huggingface_hub import snapshot_download

    small = [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]
    path = Path(snapshot_download(name, revision=revision, allow_patterns=small))
    return ModelDirectory(path, name, path.name)


def _fetch(
    remote: _Remote, snapshot: Path, study: ModelStudy, layers: range, folder: Path
) -> tuple[tuple[TensorFile, ...], frozenset[str]]:
    """Fetch the files that hold the wanted layers, or of them what holds these layers.

    Returns:
        The files, and the names of all tensors of the model.
    """
    leaf = re.escape(study.layers_path.rpartition(".")[2])
    numbers = "|".join(map(str, layers))
    wanted = re.compile(rf"^(.*?\.)?{leaf}\.({numbers})\.")
    weight_map = _weight_map(remote, snapshot)
    shards = sorted({file for name, file in weight_map.items() if wanted.match(name)}) or [_SINGLE_FILE]
    fetched = [_fetch_file(remote, snapshot / shard, wanted, folder) for shard in shards]
    names = frozenset(weight_map).union(*(known for _, known in fetched))
    return tuple(file for file, _ in fetched), names


def _weight_map(remote: _Remote, snapshot: Path) -> Mapping[str, str]:
    """Return tensor name -> file, as the model's index says; empty if there is none.

    Raises:
        ModelError: It is no index, or names files outside the model.
    """
    index = snapshot / INDEX_FILE
    return read_index(index, remote.name) if index.is_file() else {}


def _fetch_front(remote: _Remote, name: str) -> bytes | None:
    """Fetch a file's header with its length in front; `None` if the server gives whole files only.

    Raises:
        ModelError: It is no safetensors file.
    """
    first = remote.read(name, 0, _FIRST_BYTES)
    if first is None:
        return None
    start = b"".join(first)
    length = 8 + int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{name} of {remote.name} is no safetensors file: its header would have {length} bytes.")
    if length > len(start):
        start += b"".join(remote.read(name, len(start), length) or ())
    if length > len(start):
        raise ModelError(f"the Hub gave {len(start)} bytes of the header of {name}, which has {length}.")
    return start[:length]


def _fetch_file(
    remote: _Remote, local: Path, wanted: re.Pattern[str], folder: Path
) -> tuple[TensorFile, frozenset[str]]:
    """Fetch the header of one file and the ranges of the wanted tensors, into a file that is empty elsewhere.

    Returns:
        The file, and the names of all tensors in it.
    """
    if local.is_file():
        return _whole(local)
    front = _fetch_front(remote, local.name)
    if front is None:
        log.info("downloading %s", local.name)
        return _whole(remote.download(local.name))
    path = folder / local.name
    _write_at(path, 0, iter([front]))
    pieces, _ = read_header(front[8:], local, len(front))
    with path.open("r+b") as stream:
        stream.truncate(len(front) + bytes_of(pieces.values()))
    file = read_tensor_file(path)
    kept = {name: piece for name, piece in file.pieces.items() if wanted.match(name)}
    ranges = _ranges(kept)
    total = sum(stop - begin for begin, stop in ranges)
    require_space(folder, total)
    log.info("downloading %s of %s", human_bytes(total), local.name)
    for begin, stop in ranges:
        got = _write_at(path, begin, remote.read(local.name, begin, stop) or iter(()))
        if got != stop - begin:
            raise ModelError(f"the Hub gave {got} of the {stop - begin} bytes asked of {local.name}.")
    # What was not fetched must never be taken for the model's zeros, so it is not in the file that is returned.
    return TensorFile(path, kept, file.metadata), frozenset(file.pieces)


def _whole(path: Path) -> tuple[TensorFile, frozenset[str]]:
    file = read_tensor_file(path)
    return file, frozenset(file.pieces)


def _ranges(pieces: Mapping[str, Piece]) -> list[tuple[int, int]]:
    """Return the ranges of a file that hold some tensors, joined where little lies between them."""
    ranges: list[tuple[int, int]] = []
    for source in (piece.source for piece in pieces.values() if isinstance(piece.source, FileRange)):
        start = source.start
        if ranges and start - ranges[-1][1] <= _GAP:
            ranges[-1] = (ranges[-1][0], start + source.size)
        else:
            ranges.append((start, start + source.size))
    return ranges


def _write_at(path: Path, offset: int, pieces: Iterator[bytes]) -> int:
    """Write bytes to a place in a file, and return how many they were."""
    path.touch()
    with path.open("r+b") as stream:
        stream.seek(offset)
        return sum(stream.write(piece) for piece in pieces)
