"""From what a verb was given as ORGAN to the path of a file on this machine."""

from __future__ import annotations

from pathlib import Path

from neurograft.bank.downloads import fetch
from neurograft.bank.entries import Entry
from neurograft.bank.references import Reference, parse_organ
from neurograft.bank.signatures import pull_signatures
from neurograft.bank.stores import Store, known_versions, open_store
from neurograft.bank.versions import choose


def find(reference: Reference, *, allow_yanked: bool = False) -> tuple[Store, Entry, str | None]:
    """Find the version that a reference to an organ means.

    Returns:
        The bank, what it says of the version, and the reason if it was yanked.

    Raises:
        BankError: The bank can't be reached or refuses, or has no such organ, version or tag, or it was yanked.
        UsageError: There is no such kind of bank.
    """
    store, name = open_store(reference.root), str(reference.name)
    versions = known_versions(store, reference)
    version = choose(reference, versions, store.tags(name), allow_yanked=allow_yanked)
    return store, store.entry(name, version), versions[version]


def download_organ(reference: str) -> Path:
    """Return the path of the organ file that a reference names, downloaded into the cache if it is not there.

    The signatures that the bank has of it lie beside it.

    Raises:
        BankError, UsageError: See `find`.
    """
    store, entry, _ = find(parse_organ(reference))
    path = fetch(store, entry)
    pull_signatures(store, entry, path)
    return path
