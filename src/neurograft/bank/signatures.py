"""Signatures on their way into a bank and out of it: the file beside an organ travels with it."""

from __future__ import annotations

import logging
from pathlib import Path

from neurograft.bank.entries import Entry
from neurograft.bank.stores import Store
from neurograft.errors import BankDigestError, TrustError
from neurograft.files import atomic_file
from neurograft.trust.signature_files import (
    Signature,
    parse_signature,
    parse_signatures,
    read_signatures,
    signature_path,
)

log = logging.getLogger("neurograft")


def decode(content: bytes, where: str) -> str:
    """Return what a bank gave as text.

    Raises:
        BankDigestError: It is none.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BankDigestError(f"{where} is no text, and so no signatures; it was altered.") from error


def push_signatures(store: Store, entry: Entry, organ: Path) -> None:
    """Add the signatures beside an organ file to those that a bank has of this version.

    Raises:
        TrustError: They can't be read, or one is of other bytes.
        BankError: The bank refuses.
    """
    own = {signature.text: None for signature in _of(entry, organ)}
    if not own:
        return
    known, dropped = _readable(store, entry)
    merged = [*own, *(line for line in known if line not in own)]
    if dropped or set(merged) != set(known):
        text = "".join(f"{line}\n" for line in merged)
        parse_signatures(text, f"{store.root}, with the new signatures,")
        store.set_signatures(entry, text)


def _readable(store: Store, entry: Entry) -> tuple[list[str], bool]:
    """Return the signatures that a bank has of a version without what can't be read as one, and whether there was "
    "some.
    """
    lines = []
    try:
        lines = [line for line in (store.signatures(entry) or "").split("\n") if line.strip()]
    except BankDigestError as error:
        log.warning("the signatures that were there are dropped: %s", str(error).rstrip("."))
        return [], True
    good = []
    for line in lines:
        try:
            good.append(parse_signature(line, store.root).text)
        except TrustError:
            log.warning(
                "%s had something among the signatures of %s that is none; it is dropped", store.root, entry.name
            )
    return good, len(good) < len(lines)


def _of(entry: Entry, organ: Path) -> list[Signature]:
    signatures = read_signatures(organ)
    for signature in signatures:
        if signature.digest != entry.sha256:
            raise TrustError(
                f"{signature_path(organ)} holds a signature of other bytes than {organ} has; sign "
                "it anew (`neurograft sign --overwrite`), or take the .sig away."
            )
    return signatures


def pull_signatures(store: Store, entry: Entry, organ: Path) -> None:
    """Let the signatures beside an organ file be those that a bank has; none if it has none.

    Raises:
        BankError: The bank refuses, or gives something else.
    """
    text, path = store.signatures(entry), signature_path(organ)
    if text is None:
        path.unlink(missing_ok=True)
    elif not (path.is_file() and path.read_bytes() == text.encode()):
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_bytes(text.encode())
