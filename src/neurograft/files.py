"""Writes that never leave a half, and digests of what was written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.errors import DiskError, UsageError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 22
LARGEST_TEXT = 64 << 20  # bytes; configurations, records and keys have far fewer
_PIECE_BYTES = 1 << 16
_OWN_PIPES = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
_NEW_SECONDS = 10
_SYNCING = 8


def human_bytes(count: int) -> str:
    """Render a number of bytes for people: `42.5 MB` (decimal units)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@contextmanager
def atomic_file(path: Path, *, overwrite: bool, private: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on success it becomes `path`, otherwise nothing is left.

    Args:
        path: Where the finished file goes.
        overwrite: Whether an existing file may be replaced.
        private: Whether nobody but the user may read it.

    Raises:
        UsageError: `path` exists and `overwrite` is false, or its folder is missing.
        DiskError: The disk is full or the folder can't be written to.
    """
    check_output_file(path, overwrite=overwrite)
    with explained_os_errors(path), _folder_beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        temporary.chmod(0o600 if private else _usual_mode(path.parent))
        fsync(temporary)
        check_output_file(path, overwrite=overwrite)  # another process may have written it meanwhile
        os.replace(temporary, path)
        fsync(path.parent)


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling directory to fill; on success it becomes `path`, otherwise nothing is left.

    Raises:
        UsageError: See `check_output_directory`.
        DiskError: The disk is full or the folder can't be written to.
    """
    check_output_directory(path, overwrite=overwrite)
    with explained_os_errors(path), _folder_beside(path) as temporary:
        mode = _usual_mode(temporary)
        yield temporary
        _force_tree(temporary, mode)
        check_output_directory(path, overwrite=overwrite)  # another process may have written it meanwhile
        _swap_in(temporary, path)
        fsync(path.parent)


def _force_tree(folder: Path, mode: int) -> None:
    """Give the files of a folder the usual permissions, and force everything in it to the disk.

    What is forced by several threads at once costs the file system's journal one commit, not one for each file.
    """
    paths = [folder]
    for path in folder.rglob("*"):
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            if status.st_nlink > 1:  # a hard link is someone else's file too
                continue
            if stat.S_IMODE(status.st_mode) != mode:
                path.chmod(mode)
        paths.append(path)
    with ThreadPoolExecutor(_SYNCING, "sync") as syncers:
        list(syncers.map(fsync, paths))


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, locked while it is in use and gone afterwards, whatever happens.

    Only a process that is killed outright leaves one; the next that writes the same path clears it.
    """
    clear_left(path)
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which the system releases when the process ends; yield whether it was free."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process holds it, or the file system has no locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def clear_left(path: Path, *, new: bool = False) -> None:
    """Delete what killed processes left of writing `path`.

    Args:
        path: What they were to write.
        new: Whether also what is new: it may be about to be locked, if another process can be writing the same.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for left in path.parent.iterdir():
        if not name.fullmatch(left.name):
            continue
        with suppress(OSError):  # another process may clear it at the same time
            if new or time.time() - left.stat().st_mtime > _NEW_SECONDS:
                with locked(left) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)


def _usual_mode(folder: Path) -> int:
    """Return the permissions that a new file gets here: safetensors gives its files to their owner alone."""
    sample = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        sample.touch(exist_ok=False)
        return sample.stat().st_mode & 0o777
    finally:
        sample.unlink(missing_ok=True)


def _swap_in(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a directory that stood there goes only once the new one is in place."""
    if not path.exists():
        os.rename(temporary, path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _explain_no_folder(folder: Path) -> str:
    if folder.exists():
        return f"{folder} is a file, so nothing can be written into it; give a folder."
    return f"the folder {folder} does not exist; create it first."


def check_output_file(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output file that exists (unless `overwrite`) or whose folder does not.

    Args:
        path: The file to be written.
        overwrite: Whether an existing file may be replaced.
        inputs: Files and directories that are read: the output may be none of them, and lie in none.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give the name of a file to write.")
    refuse_overlap(path, inputs)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name or pass --overwrite.")
    if not path.parent.is_dir():
        raise UsageError(_explain_no_folder(path.parent))


def check_output_directory(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output directory that would overwrite what must not be overwritten.

    Args:
        path: The directory to be written.
        overwrite: Whether an existing model directory may be replaced.
        inputs: Files and directories that are read: the output may be none of them, hold none of them, and lie in none.
    """
    refuse_overlap(path, inputs)
    if path.is_file():
        raise UsageError(f"{path} is a file; give the name of a directory to write.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name or pass --overwrite.")
    if path.exists() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise UsageError(f"{path} exists and is no model directory (no config.json), so it is not overwritten.")
    if not path.parent.is_dir():
        raise UsageError(_explain_no_folder(path.parent))


def refuse_overlap(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, holds one or lies in one; inputs that do not exist overlap nothing."""
    resolved = path.resolve()
    for source in (item.resolve() for item in inputs if os.path.exists(item)):
        if resolved == source or resolved in source.parents or source in resolved.parents:
            raise UsageError(
                f"the output {path} overlaps the input {source}, which must stay as it is; choose another."
            )


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start a write of `needed` bytes that the disk of `folder` has no room for."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"the disk of {folder} has {human_bytes(free)} free and {human_bytes(needed)} are needed; nothing was "
            f"written."
        )


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and the like while writing `path` into one sentence.

    safetensors reports operating-system errors under its own exception type, with the reason in the text.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskError(f"the disk is full: {path} was not written and nothing is left of it.") from error
        raise DiskError(f"{path} could not be written: {error.strerror or error}.") from error
    except SafetensorError as error:
        if "No space left" in str(error):
            raise DiskError(f"the disk is full: {path} was not written and nothing is left of it.") from error
        raise


def fsync(path: Path) -> None:
    """Force a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """Return the bytes of a file that is small, if it is what it should be: it may be anyone's, and a device.

    Raises:
        OSError: It can't be read, is a pipe or a device, or has more bytes than `most`.
    """
    content = bytearray()
    with open(str(path), "rb", opener=_open_file) as stream:
        while piece := stream.read(_PIECE_BYTES):  # for a single large read, memory would be taken before it is filled
            content += piece
            if len(content) > most:
                raise OSError(errno.EFBIG, f"it has more than {human_bytes(most)}", str(path))
    return bytes(content)


def _open_file(path: str, flags: int) -> int:
    """Open a file, but neither wait for whoever might write to a pipe nor read a device.

    What the shell made of `<(command)` is the user's own pipe, and lies in /dev/fd.
    """
    if path.startswith(_OWN_PIPES):
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no ordinary file", path)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, for `json.loads`, of which by itself the last of two values of one name would count.

    Raises:
        ValueError: A name stands in it twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"{name} stands twice in one object")
    return found


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let nobody else work in a folder inside the block.

    Raises:
        UsageError: Somebody does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(
            f"another run is at work in {folder}; wait until it is done, or give another folder."
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_hash(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """Begin a tensor's digest with its dtype, in torch's words, and its shape; its bytes are to follow."""
    return hashlib.sha256(f"{dtype} {list(shape)}\n".encode())


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 over dtype, shape and bytes of one tensor, as 64 hex digits."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = tensor_hash(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 for named digests, independent of their order."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one SHA-256 for named tensors: names, dtypes, shapes and bytes, independent of their order."""
    return combine_digests({name: tensor_digest(tensor) for name, tensor in tensors.items()})
