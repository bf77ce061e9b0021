"""Keeping freed memory in the process while it computes the same things over and over, and keeping it in one piece."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import RawIOBase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

# Parameters of the GNU C library's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT, _PAD = 1 << 30, 1 << 26
# What the library itself goes up to where nobody sets anything; once set, it does not go there by itself any more.
_USUAL_TRIM, _USUAL_PAD, _USUAL_MMAP = 1 << 26, 1 << 17, 1 << 25

# Of the entries of /proc/self/pagemap, one for each page (Linux's admin-guide/mm/pagemap): the size, the bits of pages
# that are in memory or swapped out, and the bit of those that a file holds too.
_PAGE_ENTRY, _HELD, _AS_IN_FILE = 8, 0b11 << 62, 1 << 61

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
    """Let the system drop the pages of tensors that lie in mapped files and are not needed for now.

    Freeing them does not: a file stays mapped, with all that was read of it, as long as any tensor lies there. Should
    something look at them again, it finds what is in the file.

    Args:
        tensors: What was changed of them in memory, and what lies elsewhere, stays.
    """
    library = _gnu_library()
    if library is None:
        return
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            for tensor in tensors:
                if tensor.device.type == "cpu" and tensor.is_contiguous():
                    _give_back(library, pages, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    except OSError as error:
        log.debug("what is mapped can't be seen: %s", error)


def _give_back(library: Any, pages: RawIOBase, begin: int, end: int) -> None:
    """Drop the pages between two addresses if all that are in memory are as they are in a file."""
    # Pages at the ends are the neighbours' too.
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    if first >= last:
        return
    pages.seek(first * _PAGE_ENTRY)
    entries = array("Q", pages.read((last - first) * _PAGE_ENTRY) or b"")
    if len(entries) == last - first and all(entry & _AS_IN_FILE or not entry & _HELD for entry in entries):
        start, size = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


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
