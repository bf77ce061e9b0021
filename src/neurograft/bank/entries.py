"""What a bank says of the organs in it: the JSON schemas."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from neurograft.errors import BankDigestError, first_line
from neurograft.files import distinct
from neurograft.manifest import Count, Digest, Manifest, Name

ENTRY_SCHEMA = 1
_LARGEST_ENTRY = 64 << 20  # bytes; what is written here is some kilobytes, and a bank may be anyone's


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Part):
    """One version of an organ in a bank."""

    schema_version: int = ENTRY_SCHEMA
    name: Name
    """What the organ is called in the bank; its manifest may call it otherwise."""
    version: str
    sha256: Digest
    """Of the whole organ file."""
    size: Count
    """Bytes."""
    pushed: str
    """UTC, ISO 8601."""
    manifest: Manifest


class BankedVersion(_Part):
    """One version, as `versions` lists it."""

    version: str
    sha256: Digest
    size: Count
    pushed: str
    tags: list[str]
    yanked: str | None
    """The reason, if it was yanked."""


class Versions(_Part):
    """Every version of one organ in a bank, from the oldest to the newest."""

    bank: str
    name: str
    versions: list[BankedVersion]
    newest: str | None
    """What the organ's name alone stands for."""


class BankedOrgan(_Part):
    """One organ, as `list` lists it."""

    name: str
    newest: str | None
    """`None` if every version was yanked."""
    versions: Count
    """How many there are, yanked ones included."""
    tags: dict[str, str]
    """Tag -> version."""


class BankList(_Part):
    """Every organ in a bank."""

    bank: str
    organs: list[BankedOrgan]


class Pushed(_Part):
    """What `push` did."""

    bank: str
    entry: Entry
    already_there: bool
    """Whether the bank had the same version with the same bytes."""
    restored: bool
    """Whether it had lost or damaged the file, which was sent again."""
    tags: list[str]
    """Tags that now stand for it."""


class Pulled(_Part):
    """What `pull` did."""

    bank: str
    entry: Entry
    path: str
    yanked: str | None


class Changed(_Part):
    """What `tag` or `yank` did."""

    bank: str
    name: str
    version: str
    tag: str | None = None
    yanked: str | None = None


def parse_entry(text: str | bytes, where: str, *, name: str, version: str) -> Entry:
    """Parse what a bank says of one version, trusting nothing.

    Raises:
        BankDigestError: It is not as the schema says, or is about something else.
    """
    if len(text) > _LARGEST_ENTRY:
        raise BankDigestError(f"{where} is too large to be what a bank says of a version; it was altered.")
    try:
        parsed = json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise BankDigestError(
            f"{where} is no JSON ({first_line(error)}); it was altered or damaged: take it away, and push the "
            "organ again."
        ) from error
    try:
        entry = Entry.model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise BankDigestError(
            f"{where} is not as the schema of a bank says ({place}: {first['msg']}); it was altered (take "
            "it away, and push the organ again), or a newer neurograft wrote it."
        ) from error
    if (entry.name, entry.version) != (name, version):
        raise BankDigestError(f"{where} is about {entry.name} {entry.version}, not {name} {version}; it was altered.")
    return entry
