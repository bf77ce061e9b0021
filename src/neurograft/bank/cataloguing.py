"""The verbs about what is in a bank: list its organs, an organ's versions, tag and yank them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from neurograft.bank.entries import BankedOrgan, BankedVersion, BankList, Changed, Versions
from neurograft.bank.references import check_tag, parse_organ, parse_root
from neurograft.bank.stores import LONGEST_REASON, known_versions, open_store
from neurograft.bank.versions import choose, in_order, newest
from neurograft.errors import BankDigestError, UsageError

log = logging.getLogger("neurograft")


def list_organs(target: str | Path) -> BankList:
    """List the organs in a bank.

    Args:
        target: A folder, an fsspec URL, `hf://org` or `oci://registry` with perhaps a path.

    Raises:
        UsageError: It is none of these.
        BankError: The bank can't be reached or refuses, or there is none.
    """
    root = parse_root(target)
    store, organs = open_store(root), []
    for name in store.names():
        versions = store.versions(name)
        if not versions:  # a registry holds more than organs
            continue
        good = [version for version, reason in versions.items() if reason is None]
        organs.append(BankedOrgan(name=name, newest=newest(good), versions=len(versions), tags=store.tags(name)))
    return BankList(bank=root, organs=organs)


def versions(organ: str) -> Versions:
    """List every version of an organ in a bank, from the oldest to the newest.

    Args:
        organ: `BANK:NAME`, `hf://org/repo` or `oci://registry/name`.

    Raises:
        UsageError: It names no organ in a bank.
        BankError: The bank can't be reached or refuses, or has no such organ.
    """
    reference = parse_organ(organ)
    store, name = open_store(reference.root), str(reference.name)
    known, tags = known_versions(store, reference), store.tags(name)
    found = []
    for version in in_order(known):
        try:
            entry = store.entry(name, version)
        except BankDigestError as error:
            if len(known) == 1:
                raise
            log.warning("%s %s is left out: %s", name, version, str(error).rstrip("."))
            continue
        standing = sorted(tag for tag, other in tags.items() if other == version)
        found.append(
            BankedVersion(
                version=version,
                sha256=entry.sha256,
                size=entry.size,
                pushed=entry.pushed,
                tags=standing,
                yanked=known[version],
            )
        )
    good = [version for version, reason in known.items() if reason is None]
    return Versions(bank=reference.root, name=name, versions=found, newest=newest(good))


def tag(organ: str, name: str) -> Changed:
    """Let a tag, such as `stable`, stand for a version of an organ, whatever it stood for before.

    Args:
        organ: A reference to a version in a bank.
        name: The tag.

    Raises:
        UsageError: The reference or the tag is not written as it should be.
        BankError: The bank can't be reached or refuses, has no such version, or it was yanked.
    """
    reference, wanted = parse_organ(organ), check_tag(name)
    store, called = open_store(reference.root), str(reference.name)
    version = choose(reference, known_versions(store, reference), store.tags(called))
    store.set_tag(called, wanted, version)
    return Changed(bank=reference.root, name=called, version=version, tag=wanted)


def yank(organ: str, *, reason: str = "no reason given", undo: bool = False) -> Changed:
    """Take a version back: it stays where it is, but nothing takes it any more unless told to.

    Args:
        organ: A reference that names a version in full, or by a tag.
        reason: Why, in a line; everyone who asks for the version reads it.
        undo: Whether the version shall be taken again instead.

    Raises:
        UsageError: The reference does not say which version, or what should be undone never was done.
        BankError: The bank can't be reached or refuses, or has no such version.
    """
    reference, reason = parse_organ(organ), " ".join(reason.split()) or "no reason given"
    if len(reason) > LONGEST_REASON:
        raise UsageError(f"the reason has {len(reason):,} characters, and everybody reads it; give {LONGEST_REASON}.")
    if reference.selector is None:
        raise UsageError(f"{organ} does not say which version to yank; write {organ}@VERSION.")
    store, called = open_store(reference.root), str(reference.name)
    known = known_versions(store, reference)
    if reference.selector not in known:
        tags = store.tags(called)
        version = choose(reference, known, tags, allow_yanked=True)
        if reference.selector not in tags:
            raise UsageError(f"{reference.selector} is no whole version; write {replace(reference, selector=version)}.")
    else:
        version = reference.selector
    if undo and known[version] is None:
        raise UsageError(f"{replace(reference, selector=version)} is not yanked, so there is nothing to undo.")
    store.yank(called, version, None if undo else reason)
    return Changed(bank=reference.root, name=called, version=version, yanked=None if undo else reason)
