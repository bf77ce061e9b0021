"""Bytes from one file to another: inside the kernel where it can, digested on the way, with flat memory."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from neurograft.errors import UsageError

if TYPE_CHECKING:
    import hashlib

Progress = Callable[[int], None]
Link = Literal["auto", "copy", "hard"]

CHUNK = 8 << 20
_QUEUED_CHUNKS = 4
_FICLONE = 0x40049409  # linux/fs.h: make a file share the blocks of another one, copied when either is written to
_NOT_HERE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM})


class Bytes(Protocol):
    """Somewhere that bytes come from."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    def chunks(self) -> Iterator[memoryview]:
        """Give them in pieces, each valid until the next is asked for."""
        ...


@dataclass(frozen=True)
class FileRange:
    """A range of a file."""

    path: Path
    start: int
    size: int

    def chunks(self) -> Iterator[memoryview]:
        """Read the range in pieces."""
        buffer = memoryview(bytearray(min(CHUNK, self.size)))
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for offset in range(0, self.size, CHUNK):
                part = buffer[: min(CHUNK, self.size - offset)]
                _read_into(descriptor, part, self.start + offset)
                yield part
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Held:
    """Bytes in memory."""

    data: memoryview

    @property
    def size(self) -> int:
        """How many."""
        return self.data.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Give them in pieces."""
        for offset in range(0, self.size, CHUNK):
            yield self.data[offset : offset + CHUNK]


def _read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file.

    Raises:
        OSError: The file has become shorter than it was.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "a file that was being copied became shorter")
        done += count


class FileWriter:
    """A new file of known size, written from its start; what is copied into it is digested by a second thread."""

    def __init__(self, path: Path, size: int, progress: Progress | None = None) -> None:
        self._size = size
        self._position = 0
        self._progress = progress
        self._kernel_copies = True
        self._sources: dict[Path, int] = {}
        self._queue: deque[Future[None]] = deque()
        self._buffer = memoryview(bytearray(CHUNK))
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._digester = ThreadPoolExecutor(1, "digest")

    def __enter__(self) -> FileWriter:
        _reserve(self._descriptor, self._size)
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: Any, _trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._drain(0)  # forcing it to the disk is left to whoever gives the file its name
        finally:
            self._digester.shutdown(cancel_futures=True)
            for descriptor in (self._descriptor, *self._sources.values()):
                os.close(descriptor)

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes from memory."""
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(self._descriptor, view, self._position)
            self._advance(count)
            view = view[count:]

    def copy(self, sources: Sequence[tuple[Bytes, hashlib._Hash]]) -> None:
        """Write bytes from files and from memory, one after the other, each with the digest that they go into."""
        for run in _runs(sources):
            first = run[0][0]
            if isinstance(first, FileRange):
                self._copy_range(first.path, first.start, [(source.size, digest) for source, digest in run])
                continue
            for source, digest in run:
                for chunk in source.chunks():
                    digest.update(chunk)
                    self.write(chunk)

    def _copy_range(self, path: Path, start: int, parts: list[tuple[int, hashlib._Hash]]) -> None:
        source = self._source(path)
        todo = deque(parts)
        offset, stop = start, start + sum(size for size, _ in parts)
        while offset < stop:
            count = min(CHUNK, stop - offset)
            self._queue.append(self._digester.submit(self._digest, source, offset, _take(todo, count)))
            self._copy_chunk(source, offset, count)
            self._drain(_QUEUED_CHUNKS)
            offset += count

    def _source(self, path: Path) -> int:
        if path not in self._sources:
            self._sources[path] = os.open(path, os.O_RDONLY)
        return self._sources[path]

    def _digest(self, source: int, offset: int, parts: list[tuple[int, hashlib._Hash]]) -> None:
        """Read a chunk and digest it, while the other thread copies it."""
        for size, digest in parts:
            part = self._buffer[:size]
            _read_into(source, part, offset)
            digest.update(part)
            offset += size

    def _copy_chunk(self, source: int, offset: int, count: int) -> None:
        done = 0
        while done < count:
            copied = self._copy_some(source, offset + done, count - done)
            if copied == 0:
                raise OSError(errno.EIO, "a file that was being copied became shorter")
            done += copied
            self._advance(copied)

    def _copy_some(self, source: int, offset: int, count: int) -> int:
        """Copy up to `count` bytes, by the best way that works between these two files."""
        if self._kernel_copies and hasattr(os, "copy_file_range"):
            try:
                return os.copy_file_range(source, self._descriptor, count, offset, self._position)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._kernel_copies = False
        if hasattr(os, "copy_file_range"):  # Linux, where sendfile also writes to files
            os.lseek(self._descriptor, self._position, os.SEEK_SET)
            try:
                return os.sendfile(self._descriptor, source, offset, count)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
        return os.pwrite(self._descriptor, os.pread(source, count, offset), self._position)

    def _drain(self, left: int) -> None:
        """Wait until no more than `left` chunks wait to be digested."""
        while len(self._queue) > left:
            self._queue.popleft().result()

    def _advance(self, count: int) -> None:
        self._position += count
        if self._progress is not None:
            self._progress(count)


def _runs(sources: Sequence[tuple[Bytes, hashlib._Hash]]) -> list[list[tuple[Bytes, hashlib._Hash]]]:
    """Group ranges that follow each other in one file, so that they are copied in one go."""
    runs: list[list[tuple[Bytes, hashlib._Hash]]] = []
    for source, digest in sources:
        last = runs[-1][-1][0] if runs else None
        if (
            isinstance(source, FileRange)
            and isinstance(last, FileRange)
            and source.path == last.path
            and source.start == last.start + last.size
        ):
            runs[-1].append((source, digest))
        else:
            runs.append([(source, digest)])
    return runs


def _take(todo: deque[tuple[int, hashlib._Hash]], count: int) -> list[tuple[int, hashlib._Hash]]:
    """Take the next `count` bytes from a list of (bytes, digest that they belong to)."""
    taken = []
    while count:
        size, digest = todo.popleft()
        part = min(size, count)
        taken.append((part, digest))
        if part < size:
            todo.appendleft((size - part, digest))
        count -= part
    return taken


def _reserve(descriptor: int, size: int) -> None:
    """Take the room for a file before its first byte is written, where the file system can."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise


def link_file(source: Path, target: Path, link: Link) -> bool:
    """Let a new file share the bytes of another, and say whether that was done.

    Args:
        source: The file that is there.
        target: The name to be made.
        link: `auto` shares blocks where the file system can (a reflink: writing to one leaves the other alone);
            `hard` makes a hard link where it can't; `copy` does neither.

    Raises:
        UsageError: A hard link was asked for and can't be made.
    """
    if link == "copy":
        return False
    if _reflink(source, target):
        return True
    if link == "auto":
        return False
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError as error:
        raise UsageError(
            f"{source} can't be hard-linked to {target.parent} ({error.strerror}); leave out --link hard."
        ) from error
    return True


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    from_descriptor, to_descriptor = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        fcntl.ioctl(to_descriptor, _FICLONE, from_descriptor)
    except OSError:
        target.unlink()
        return False
    finally:
        os.close(from_descriptor)
        os.close(to_descriptor)
    return True
