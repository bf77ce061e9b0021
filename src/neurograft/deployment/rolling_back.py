"""The history of a deployment, and the way back to any version that passed its gates."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Literal

from pydantic import BaseModel, ConfigDict

from neurograft.deployment.entries import NO_DIGEST, Entry
from neurograft.deployment.folder import DeploymentFolder, State, operator
from neurograft.deployment.history import History, version_number
from neurograft.deployment.seals import check_files
from neurograft.errors import UsageError
from neurograft.organ import now

VerifyFiles = Literal["quick", "full"]


class DeploymentHistory(BaseModel):
    """What `history` found; every entry's digest was checked, and that of the one before."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    directory: str
    current: str
    """What `current` points to."""
    entries: list[Entry]
    head: str
    """Digest of the last entry. Who notes it elsewhere can tell later that the end was not cut off."""
    torn_bytes: int
    """Bytes of a last line that a killed process left unfinished; the next deployment or rollback takes them off."""
    unfinished: str | None
    """Version that a killed process had decided to switch to; the next deployment or rollback does so first."""
    verified: list[str]
    """Versions whose files were checked."""


class Rollback(BaseModel):
    """What `rollback` did."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    directory: str
    current: str
    before: str
    files: int
    """Files of the version that were checked."""
    read: list[str]
    """Those of them that were read; size, time and inode of the others are as when their digests were taken."""
    seconds: float
    head: str
    """Digest of the history's last entry."""


def history(directory: str | Path, *, verify: VerifyFiles | None = None) -> DeploymentHistory:
    """Read the history of a deployment and check its chain of digests; nothing is changed.

    Args:
        directory: A deployment folder.
        verify: Whether to check the files of every version that is there, too: `quick` reads those whose size, time or
            inode changed, and small ones; `full` reads all.

    Raises:
        DeploymentError: The folder holds no deployment.
        HistoryError: An entry was altered, or `current` is not where the last entry says.
        VerificationError: A version's file is missing, new or altered.
    """
    folder = DeploymentFolder(Path(directory))
    folder.require()
    state = _read(folder)
    found, verified = state.history, []
    for version in dict.fromkeys(entry.version for entry in found.entries) if verify else ():
        if folder.version(version).is_dir() or version == state.current:
            check_files(folder.version(version), found.maker(version).files, full=verify == "full")
            verified.append(version)
    return DeploymentHistory(
        directory=str(directory),
        current=str(state.current),
        entries=list(found.entries),
        head=found.head,
        torn_bytes=len(found.torn),
        unfinished=found.last.version if state.unfinished and found.last else None,
        verified=verified,
    )


def _read(folder: DeploymentFolder) -> State:
    """Read the state between two switches, not in one, where the reader may take the lock."""
    if not os.access(folder.path, os.W_OK):
        return folder.state()
    with folder.switching():
        return folder.state()


def rollback(directory: str | Path, *, to: int | None = None, verify: VerifyFiles = "quick") -> Rollback:
    """Point `current` back to an earlier version that passed its gates, once its files are found to be unaltered.

    Args:
        directory: A deployment folder.
        to: Number of the version; left out, the one that the present one was built on. A later one may be named too.
        verify: `quick`: small files are read, and of the others those whose size, time of the last change or inode
            differ from when their digests were taken; `full`: all files are read.

    Raises:
        UsageError: There is no such version, or it is deployed already, or there is none before it.
        DeploymentError, HistoryError: The folder holds no deployment, or was altered.
        VerificationError: A file of the version is missing, new or altered; nothing was changed.
    """
    start = perf_counter()
    folder = DeploymentFolder(Path(directory))
    folder.require()
    with folder.switching():
        found = folder.settle().history
        assert found.last is not None
        before = found.last.version
        version = _target(found, to)
        files = found.maker(version).files
        read = check_files(folder.version(version), files, full=verify == "full")
        found = folder.switch(found, _entry(version, before), None)
    return Rollback(
        directory=str(directory),
        current=version,
        before=before,
        files=len(files),
        read=read,
        seconds=perf_counter() - start,
        head=found.head,
    )


def _target(found: History, to: int | None) -> str:
    """Return the version to go to."""
    assert found.last is not None
    present = found.last.version
    known = list(dict.fromkeys(entry.version for entry in found.entries))
    if to is None:
        before = found.maker(present).before
        if before is None:
            raise UsageError(f"{present} is what the deployment started from; there is nothing before it.")
        return before
    version = next((name for name in known if version_number(name) == to), None)
    if version is None:
        raise UsageError(f"there is no version {to}; there are {', '.join(known)}.")
    if version == present:
        raise UsageError(f"{version} is deployed already.")
    return version


def _entry(version: str, before: str) -> Entry:
    return Entry(
        number=1, when=now(), operator=operator(), action="rollback", version=version, before=before,
        previous=NO_DIGEST,
    )  # fmt: skip
