"""Whether a deployed version still is what passed its gates: by size, time and inode, by digest where they differ."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from neurograft.deployment.entries import FileSeal
from neurograft.errors import VerificationError
from neurograft.files import file_sha256

ALWAYS_READ = 1 << 20  # bytes; smaller files, such as config.json, cost nothing to read


def seal_files(folder: Path) -> dict[str, FileSeal]:
    """Digest every file of a version, and note what shows that nobody wrote to it since.

    Raises:
        VerificationError: Something in it is no plain file.
    """
    return {name: _seal(folder / name, file_sha256(folder / name)) for name in _files(folder)}


def check_files(folder: Path, seals: Mapping[str, FileSeal], *, full: bool) -> list[str]:
    """Check that a version has the files that it had, and the same bytes in them.

    A file whose size, time of the last change and inode are those of its seal is taken for unchanged, unless it is
    small; any other is read.

    Args:
        folder: The version.
        seals: Its files.
        full: Whether to read every file whatever its time is.

    Returns:
        Names of the files that were read.

    Raises:
        VerificationError: Names the file that is missing, new or altered.
    """
    if not folder.is_dir():
        raise VerificationError(f"{folder} is not there any more, so it can't be deployed; choose another version.")
    found = _files(folder)
    if missing := sorted(set(seals) - set(found)):
        raise VerificationError(f"{folder / missing[0]} is missing, so {folder.name} is not what passed its gates.")
    if new := sorted(set(found) - set(seals)):
        raise VerificationError(
            f"{folder / new[0]} was not there when {folder.name} passed its gates; move it elsewhere."
        )
    read = []
    for name, seal in seals.items():
        path = folder / name
        if not full and seal.size > ALWAYS_READ and _seal(path, seal.sha256) == seal:
            continue
        read.append(name)
        if path.stat().st_size != seal.size or file_sha256(path) != seal.sha256:
            raise VerificationError(
                f"{path} was altered since {folder.name} passed its gates: its SHA-256 is not {seal.sha256}."
            )
    return read


def _seal(path: Path, digest: str) -> FileSeal:
    status = path.stat()
    return FileSeal(size=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino, sha256=digest)


def _files(folder: Path) -> list[str]:
    names = []
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                names.append(str(path.relative_to(folder)))
            elif not stat.S_ISDIR(mode):
                raise VerificationError(f"{path} is no plain file, and a deployed version holds nothing else.")
    return sorted(names)
