"""The history of a deployment: JSON Lines that are only ever appended to, chained by digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from neurograft.deployment.entries import NO_DIGEST, SCHEMA_VERSION, Dropped, Entry
from neurograft.errors import HistoryError
from neurograft.files import atomic_file, explained_os_errors, fsync, read_bounded

MAX_BYTES = 1 << 28  # far more than anybody deploys


@dataclass(frozen=True)
class History:
    """The entries of a history, checked, and what a killed process left behind them."""

    path: Path
    entries: Sequence[Entry] = ()
    torn: bytes = b""
    """A last line without its end: no entry."""

    @property
    def last(self) -> Entry | None:
        """The entry that says what is deployed; `None` in a folder where nothing ever was."""
        return self.entries[-1] if self.entries else None

    @property
    def head(self) -> str:
        """Digest of the last entry."""
        return self.last.digest if self.last else NO_DIGEST

    @property
    def next_number(self) -> int:
        """The number that the next version gets."""
        return 1 + max((version_number(entry.version) for entry in self.entries), default=0)

    def maker(self, version: str) -> Entry:
        """Return the entry that made a version.

        Raises:
            HistoryError: There is none.
        """
        for entry in self.entries:
            if entry.version == version and entry.action != "rollback":
                return entry
        raise HistoryError(f"{self.path} has no entry that made the version {version}.")

    def append(self, entry: Entry) -> History:
        """Write one more entry; a torn last line goes first, and the entry says so."""
        if self.torn:
            entry = entry.model_copy(
                update={"dropped": Dropped(bytes=len(self.torn), sha256=hashlib.sha256(self.torn).hexdigest())}
            )
        entry = entry.model_copy(update={"number": len(self.entries) + 1, "previous": self.head}).sealed()
        line = entry.line().encode() + b"\n"
        if self.torn:
            kept = self.path.read_bytes()[: -len(self.torn)]
            with atomic_file(self.path, overwrite=True) as temporary:
                temporary.write_bytes(kept + line)
        else:
            _append_line(self.path, line)
        return History(self.path, [*self.entries, entry])


def _append_line(path: Path, line: bytes) -> None:
    """Append a line and force it to the disk; what a full disk took only half of is taken back."""
    with explained_os_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        before = os.fstat(descriptor).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(descriptor, line[done:])
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, before)
            raise
        finally:
            os.close(descriptor)
        fsync(path.parent)


def version_number(version: str) -> int:
    """Return the number that a version's name begins with."""
    return int(version.partition("-")[0])


def read_history(path: Path) -> History:
    """Read a history and check every entry: its form, its own digest, and that of the one before.

    Raises:
        HistoryError: Names the first entry that is not as it was written.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        return History(path)
    except OSError as error:
        raise HistoryError(f"{path} can't be read: {error.strerror or error}.") from error
    *lines, torn = data.split(b"\n")
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        entries.append(_check_entry(path, number, line, entries[-1] if entries else None))
    return History(path, entries, torn)


def _check_entry(path: Path, number: int, line: bytes, before: Entry | None) -> Entry:
    place = f"entry {number} of {path}"
    try:
        entry = Entry.model_validate_json(line)
    except (ValidationError, ValueError, RecursionError) as error:
        _refuse_newer(place, _schema_of(line))
        raise HistoryError(f"{place} is no entry as neurograft writes them; restore the file from a backup.") from error
    _refuse_newer(place, entry.schema_version)
    if entry.line().encode() != line or entry.digest != entry.expected_digest():
        raise HistoryError(f"{place} was altered: its digest is not that of what it says; restore it from a backup.")
    if entry.number != number or entry.previous != (before.digest if before else NO_DIGEST):
        raise HistoryError(
            f"{place} does not follow the entry before it: entries were altered, taken out or moved; restore the file "
            "from a backup."
        )
    if entry.before != (before.version if before else None):
        raise HistoryError(f"{place} says that {entry.before} was deployed before it, and the entry before does not.")
    return entry


def _refuse_newer(place: str, schema: int) -> None:
    if schema > SCHEMA_VERSION:
        raise HistoryError(
            f"{place} has schema {schema}, and this neurograft reads up to {SCHEMA_VERSION}; install a newer one."
        )


def _schema_of(line: bytes) -> int:
    """Return the schema version of an entry that can't be read, 0 if that can't be read either."""
    import json

    try:
        found = json.loads(line)["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return found if isinstance(found, int) else 0
