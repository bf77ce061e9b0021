"""What the history of a deployment says: entries, each carrying the digest of the one before."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from neurograft.manifest import Count, Digest, Name

SCHEMA_VERSION = 1
NO_DIGEST = "0" * 64
VERSION_PATTERN = r"^\d{4,}-[A-Za-z0-9][A-Za-z0-9._-]*$"

VersionName = Annotated[str, Field(pattern=VERSION_PATTERN, max_length=120)]
# A history may come from anywhere, and the files that it names are read: nothing outside the version's folder.
FilePath = Annotated[str, Field(pattern=r"^[^/\\]+(/[^/\\]+)*$", max_length=500)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class FileSeal(_Part):
    """One file of a deployed version as it was when its gates held."""

    size: Count
    mtime_ns: int
    """Time of the last change, nanoseconds since 1970."""
    inode: Count
    sha256: Digest


class GateVerdict(_Part):
    """What one gate found."""

    name: str
    metric: str
    passed: bool
    reason: str
    """One sentence."""
    against: str | None
    """The version that it was compared with; `None` for an absolute limit."""
    items: Count
    """Documents or questions, the same for both."""
    value: float
    """Perplexity, or mean score."""
    baseline: float | None
    """The same of what it was compared with."""
    effect: float
    """What is held against the limit: a ratio of perplexities, a difference of scores, or the value itself."""
    low: float
    high: float
    better: Count | None = None
    """Questions that only the new model answers rightly; `None` where answers are not right or wrong."""
    worse: Count | None = None
    """Questions that only the other answers rightly."""
    p_value: float | None = None
    """Two-sided, of the exact McNemar test."""


class OrganInEntry(_Part):
    """The organ that was put in or taken out."""

    name: Name
    """Its name in the model, which has a number where another of that name was there."""
    version: str
    file_digest: Digest | None


class Dropped(_Part):
    """A last line that a killed process left unfinished; it was taken off before this entry was written."""

    bytes: Count
    sha256: Digest


class Entry(_Part):
    """One line of the history."""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    number: Annotated[int, Field(ge=1)]
    """Place in the history, from 1."""
    when: str
    """UTC, ISO 8601."""
    operator: str
    action: Literal["start", "deploy", "remove", "rollback"]
    version: VersionName
    """What `current` points to from here on."""
    before: VersionName | None
    """What it pointed to until then."""
    organ: OrganInEntry | None = None
    gates_digest: Digest | None = None
    """SHA-256 of the gates file."""
    gates: list[GateVerdict] = []
    files: dict[FilePath, FileSeal] = {}
    """The version's files; left empty by a rollback, whose version has them in the entry that made it."""
    dropped: Dropped | None = None
    previous: Digest
    """Digest of the entry before; zeros in the first."""
    digest: Digest = NO_DIGEST
    """SHA-256 of this line with the 64 digits of this field written as zeros."""

    def sealed(self) -> Entry:
        """Return the entry with its own digest."""
        return self.model_copy(update={"digest": self.expected_digest()})

    def expected_digest(self) -> str:
        """Return the digest that the entry should carry."""
        blank = self.model_copy(update={"digest": NO_DIGEST})
        return hashlib.sha256(blank.line().encode()).hexdigest()

    def line(self) -> str:
        """Return the entry as it stands in the file, without the end of the line."""
        return self.model_dump_json()
