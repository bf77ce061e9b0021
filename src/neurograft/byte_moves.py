"""Bytes from one file to another: inside the kernel where it can, digested on the way, with flat memory.

Several threads move ranges at the same time: digests take as long as copies, and Python lets go of its lock for both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

from neurograft.errors import UsageError

if TYPE_CHECKING:
    import hashlib

Progress = Callable[[int], None]
Link = Literal["auto", "copy", "hard"]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

CHUNK = 1 << 20  # fits a core's cache, so that what is digested is not fetched from memory a second time
_TASK = 32 << 20  # bytes that one thread moves before it looks for more
_THREADS = 4  # half of them wait for the disk
_ALONE = 4 << 20  # less than this is moved before threads would have started
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


@runtime_checkable
class Cuttable(Bytes, Protocol):
    """Bytes of which no more need be read than is wanted."""

    def beginning(self, size: int) -> Bytes:
        """Return the first bytes."""
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

    def beginning(self, size: int) -> FileRange:
        """Return the first bytes of the range."""
        return FileRange(self.path, self.start, min(size, self.size))


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


@dataclass(frozen=True)
class NewFile:
    """A file to be written: its first bytes, then ranges from elsewhere, each with the digest that it goes into."""

    path: Path
    header: bytes
    parts: Sequence[tuple[Bytes, hashlib._Hash]]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(source.size for source, _ in self.parts)


@dataclass(frozen=True)
class _Task:
    """Parts that follow each other in one new file, for one thread."""

    path: Path
    position: int
    """Where in the new file the first of them begins."""
    parts: list[tuple[Bytes, hashlib._Hash]] = field(default_factory=list)


class _Moves:
    """What the threads of one run share: how far they are, and whether they are to stop."""

    def __init__(self, progress: Progress | None) -> None:
        self.stop = Event()
        self._progress = progress
        self._lock = Lock()
        self._moved = 0

    def advance(self, count: int) -> None:
        """Note that bytes were moved.

        Raises:
            InterruptedError: Another thread failed, or the run was interrupted.
        """
        if self.stop.is_set():
            raise InterruptedError(errno.EINTR, "stopped")
        with self._lock:
            self._moved += count

    def report(self) -> None:
        """Tell whoever shows progress what was moved since; in the thread that waits."""
        with self._lock:
            count, self._moved = self._moved, 0
        if self._progress is not None and count:
            self._progress(count)


def write_files(files: Sequence[NewFile], progress: Progress | None = None) -> None:
    """Write new files and force them to the disk; every byte goes into its digest in the thread that copies it.

    Parts are digested in their order where they share a digest, and are copied in any order.

    Args:
        files: None of them exists yet.
        progress: Called with the number of bytes that were written since the last call.

    Raises:
        OSError: The disk is full or a source became shorter; what was begun is left as it is.
    """
    moves = _Moves(progress)
    with ExitStack() as stack:
        movers = stack.enter_context(ThreadPoolExecutor(_THREADS, "move"))
        syncers = stack.enter_context(ThreadPoolExecutor(_THREADS, "sync"))
        stack.callback(moves.stop.set)
        try:
            # Files go to the disk while others are still copied, so that it is never idle.
            synced = [syncers.submit(_sync_after, file.path, _begin(file, movers, moves)) for file in files]
            _wait(synced, moves)
        except BaseException:
            moves.stop.set()
            movers.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(file: NewFile, movers: Executor, moves: _Moves) -> list[Future[None]]:
    """Make a file, write its header, and set threads to the rest."""
    descriptor = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _reserve(descriptor, file.size)
        _write_at(descriptor, memoryview(file.header), 0)
    finally:
        os.close(descriptor)
    moves.advance(len(file.header))
    return [movers.submit(_run, task, moves) for task in _tasks(file)]


def _tasks(file: NewFile) -> list[_Task]:
    """Cut a file into tasks; what goes into one digest stays together."""
    tasks: list[_Task] = []
    position, size = len(file.header), 0
    for source, digest in file.parts:
        if not tasks or (size >= _TASK and tasks[-1].parts[-1][1] is not digest):
            tasks.append(_Task(file.path, position))
            size = 0
        tasks[-1].parts.append((source, digest))
        position += source.size
        size += source.size
    return tasks


def _sync_after(path: Path, copies: Sequence[Future[None]]) -> None:
    for copy in copies:
        copy.result()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wait(futures: Sequence[Future[None]], moves: _Moves) -> None:
    """Wait for all, or raise what the first of them raised."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
        moves.report()
        for future in done:
            future.result()


def _run(task: _Task, moves: _Moves) -> None:
    """Copy and digest what a task says."""
    position = task.position
    copier = _Copier(task.path)
    try:
        for source, digest in task.parts:
            for chunk, place in _chunks_and_places(source):
                digest.update(chunk)
                copier.copy(chunk, place, position)
                position += len(chunk)
                moves.advance(len(chunk))
    finally:
        copier.close()


def _chunks_and_places(source: Bytes) -> Iterator[tuple[memoryview, tuple[Path, int] | None]]:
    """Give bytes in pieces, each with the file and the place that it is read from, if any."""
    place = source.start if isinstance(source, FileRange) else 0
    for chunk in source.chunks():
        yield chunk, (source.path, place) if isinstance(source, FileRange) else None
        place += len(chunk)


class _Copier:
    """Writes into one file: what was read anyway, unless the kernel can make two files share the blocks."""

    def __init__(self, path: Path) -> None:
        self._target = os.open(path, os.O_WRONLY)
        self._folder = path.parent
        self._source: tuple[Path, int] | None = None
        self._shares = False

    def copy(self, chunk: memoryview, place: tuple[Path, int] | None, position: int) -> None:
        """Write a chunk, which lies at `place`, to `position`."""
        done = self._share(chunk, place, position) if place is not None else 0
        _write_at(self._target, chunk[done:], position + done)

    def _share(self, chunk: memoryview, place: tuple[Path, int], position: int) -> int:
        """Let the kernel copy a chunk where it may share blocks, and return how many bytes it copied."""
        path, offset = place
        if self._source is None or self._source[0] != path:
            self._close_source()
            self._source = path, os.open(path, os.O_RDONLY)
            self._shares = hasattr(os, "copy_file_range") and shares_blocks(path, self._folder)
        done = 0
        while self._shares and done < len(chunk):
            try:
                count = os.copy_file_range(
                    self._source[1], self._target, len(chunk) - done, offset + done, position + done
                )
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._shares = False
                break
            if count == 0:
                raise OSError(errno.EIO, "a file that was being copied became shorter")
            done += count
        return done

    def _close_source(self) -> None:
        if self._source is not None:
            os.close(self._source[1])

    def close(self) -> None:
        """Close what is open."""
        self._close_source()
        os.close(self._target)


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        position += count
        data = data[count:]


def at_once(work: Callable[[_Item], _Result], items: Iterable[tuple[_Item, int]]) -> list[_Result]:
    """Do the same work on many items, several at a time, and return the results in order.

    Args:
        work: Spends its time outside Python's lock: reading and digesting.
        items: Each with the bytes that it takes to read.
    """
    listed = list(items)
    total = sum(size for _, size in listed)
    if total < _ALONE:
        return [work(item) for item, _ in listed]
    groups: list[list[_Item]] = [[]]
    gathered = 0
    for item, size in listed:
        if gathered >= min(_TASK, total / (2 * _THREADS)):
            groups.append([])
            gathered = 0
        groups[-1].append(item)
        gathered += size
    with ThreadPoolExecutor(_THREADS, "read") as readers:
        try:
            done = list(readers.map(lambda group: [work(item) for item in group], groups))
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for group in done for result in group]


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
    if shares_blocks(source, target.parent) and _reflink(source, target):
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


_sharing: dict[tuple[int, int], bool] = {}  # whether a file on one file system can share blocks with one on another


def shares_blocks(source: Path, folder: Path) -> bool:
    """Whether new files in `folder` can share blocks with `source`; tried once for each pair of file systems."""
    systems = source.stat().st_dev, folder.stat().st_dev
    if systems not in _sharing:
        probe = folder / f".{uuid.uuid4().hex}.tmp"
        _sharing[systems] = _reflink(source, probe)
        probe.unlink(missing_ok=True)
    return _sharing[systems]


def _reflink(source: Path, target: Path) -> bool:
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
