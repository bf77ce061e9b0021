"""Organ files from a bank on this machine: a cache that processes share, in which an interrupted download goes on."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from neurograft.bank.entries import Entry
from neurograft.bank.stores import Store
from neurograft.errors import BankDigestError, BankUnreachableError
from neurograft.files import explained_os_errors, file_sha256, fsync, human_bytes, require_space
from neurograft.models import cache_directory

log = logging.getLogger("neurograft")

_TRIES = 3  # in a row that bring nothing
_PAUSE_SECONDS = 1.0


def fetch(store: Store, entry: Entry) -> Path:
    """Return the path of an organ file in the cache, after downloading it if it is not there.

    Args:
        store: The bank.
        entry: The version.

    Returns:
        A file whose bytes have the digest of `entry`.

    Raises:
        BankError: The bank does not give the file, or gives other bytes.
        NeurograftError: The disk is full.
    """
    folder = cache_directory() / "organs" / f"{entry.name}-{entry.version}.{entry.sha256}"
    path = folder / f"{entry.name}-{entry.version}.safetensors"
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, entry):
        if not (path.is_file() and file_sha256(path) == entry.sha256):
            _download(store, entry, path)
    return path


@contextmanager
def _alone(folder: Path, entry: Entry) -> Iterator[None]:
    """Let one process after the other download a version."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that downloads %s %s", entry.name, entry.version)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(store: Store, entry: Entry, path: Path) -> None:
    """Download a file beside its name, and give it its name once its digest is right."""
    part = path.with_suffix(".part")
    resumed = part.is_file() and part.stat().st_size > 0
    _fill(store, entry, part)
    if resumed and file_sha256(part) != entry.sha256:  # what lay there may have been the damage
        part.unlink()
        _fill(store, entry, part)
    digest = file_sha256(part)
    if digest != entry.sha256:
        part.unlink()
        raise BankDigestError(
            f"the file of {entry.name} {entry.version} in {store.root} was altered: its SHA-256 is {digest}, and "
            f"{entry.sha256} was pushed; nothing was kept. Push it again from where it is whole; in a registry, which "
            "keeps what it has, as a new version."
        )
    with explained_os_errors(path):
        fsync(part)
        part.replace(path)
        fsync(path.parent)


def _fill(store: Store, entry: Entry, part: Path) -> None:
    """Append to a part until it is whole, by new requests where the connection breaks."""
    tries, done = 0, part.stat().st_size if part.is_file() else 0
    if done > entry.size:
        part.unlink()
        done = 0
    require_space(part.parent, entry.size - done)
    while done < entry.size:
        reason: Exception | None = None
        try:
            _append(store, entry, part, done)
        except BankUnreachableError as error:
            reason = error
        before, done = done, part.stat().st_size if part.is_file() else 0
        tries = tries + 1 if done == before else 0
        if tries == _TRIES and reason is None:  # it answered each time, and has no more
            raise BankDigestError(
                f"the file of {entry.name} {entry.version} in {store.root} was cut off: it has {done:,} of its "
                f"{entry.size:,} bytes; push the organ again from where it is whole."
            )
        if tries == _TRIES or (reason is not None and not done):
            raise BankUnreachableError(
                f"{store.root} gave {done:,} of the {entry.size:,} bytes of {entry.name} {entry.version}"
                f"{f' ({reason})' if reason else ''}; the same command goes on from there, unless the file was cut off "
                "in the bank: then push the organ again from where it is whole."
            ) from reason
        if done < entry.size:
            time.sleep(_PAUSE_SECONDS)
    if done > entry.size:
        part.unlink()
        raise BankDigestError(
            f"{store.root} gives more than the {entry.size:,} bytes of {entry.name} {entry.version}; nothing was kept."
        )


def _append(store: Store, entry: Entry, part: Path, done: int) -> None:
    told = 0.0
    with part.open("ab") as stream:
        for piece in store.read(entry, done):
            with explained_os_errors(part):
                stream.write(piece)
            done += len(piece)
            if done > entry.size:
                return
            if time.monotonic() - told > 1:
                told = time.monotonic()
                log.info(
                    "downloading %s %s: %s of %s", entry.name, entry.version, human_bytes(done), human_bytes(entry.size)
                )


def copy_out(source: Path, temporary: Path, entry: Entry) -> None:
    """Copy a file out of the cache, where others may delete or alter it, and check the copy's digest.

    Raises:
        BankDigestError: It was altered in between.
    """
    shutil.copyfile(source, temporary)
    if file_sha256(temporary) != entry.sha256:
        raise BankDigestError(f"{source} was altered while it was copied; pull {entry.name} {entry.version} again.")
