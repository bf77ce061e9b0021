"""Keeping freed memory in the process while it computes the same things over and over, and keeping it in one piece."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

# Parameters of the GNU C library's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT, _PAD = 1 << 30, 1 << 26
# What the library itself goes up to where nobody sets anything; once set, it does not go there by itself any more.
_USUAL_TRIM, _USUAL_PAD, _USUAL_MMAP = 1 << 26, 1 << 17, 1 << 25

# Tunables of the GNU C library: small blocks that are freed are merged with what is free beside them, not set aside.
_MERGING = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}
_MERGES_BY_ITSELF = (2, 39)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let freed memory stay with the process inside the block, where the GNU C library manages it.

    By default it gives large blocks back to the operating system as soon as they are freed, which then has to clear
    every page of the next one. With attention by plain products this saves a fifth to a quarter of a training step, and
    the peak is 3 to 13 % higher (benchmarks/training_cost.py measures both together).
    """
    library = _gnu_library()
    if library is None:
        yield
        return
    for parameter, value in ((_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _PAD)):
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in (
            (_MMAP_THRESHOLD, _USUAL_MMAP),
            (_TRIM_THRESHOLD, _USUAL_TRIM),
            (_TOP_PAD, _USUAL_PAD),
        ):
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, where the GNU C library manages it."""
    library = _gnu_library()
    if library is not None:
        library.malloc_trim(0)


def give_back_mapped(tensors: Iterable[torch.Tensor]) -> None:
    """Let the system drop the pages of tensors that lie in mapped files and are not needed any more.

    Freeing them does not: a model's file stays mapped, with all that was read of it, as long as any tensor lies there.
    Should something else still look at them, it finds what is in the file.

    Args:
        tensors: Changes that were made to them in memory may be lost.
    """
    library, mapped = _gnu_library(), _mapped_files()
    for tensor in tensors if library is not None else ():
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        if not any(first <= begin and end <= last for first, last in mapped):
            continue
        # Pages at its ends are its neighbours' too.
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _mapped_files() -> list[tuple[int, int]]:
    """Return the addresses at which files are mapped into this process, each as the first and one after the last."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    # Address range, access, offset, device, inode (0 where it is no file), path.
    ranges = [fields[0].split("-") for fields in lines if len(fields) > 5 and fields[4] != "0"]
    return [(int(first, 16), int(last, 16)) for first, last in ranges]


def merging_environment() -> dict[str, str]:
    """Return what a process that trains needs in its environment, so that the memory it frees stays in one piece.

    torch aligns its tensors, which leaves small remainders around each. Before 2.39 the GNU C library sets those aside,
    where they keep what is freed around them from being merged, so that no tensor of the same size fits there again
    (its bug 30723), and memory grows far beyond what the tensors take (benchmarks/training_cost.py). This has to be
    said before the process starts.

    Returns:
        Empty where there is nothing to say: with another C library, or where the environment already sets these.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if _gnu_version() >= _MERGES_BY_ITSELF or any(name in given for name in _MERGING):
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, [given, *(f"{name}={value}" for name, value in _MERGING.items())]))}


def start_again_merging() -> None:
    """Start this program anew, with the same arguments, where its environment lacks what `merging_environment` says."""
    addition = merging_environment()
    if not addition or not sys.executable:
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **addition})
    except OSError as error:
        log.debug("this program can't be started anew: %s", error)


def _gnu_version() -> tuple[int, ...]:
    """Return the version of this process's GNU C library; one that is later than all where it is another library."""
    try:
        return tuple(int(part) for part in (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[1].split(".")[:2])
    except (AttributeError, IndexError, OSError, ValueError):
        return (sys.maxsize,)


def _gnu_library() -> Any:
    """Return the C library of this process if it is GNU's, else `None`."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except OSError as error:
        log.debug("the C library can't be called: %s", error)
        return None
