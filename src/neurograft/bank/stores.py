"""What every kind of bank can do, and which kind a root is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Protocol

from neurograft.bank.entries import Entry
from neurograft.bank.references import Reference
from neurograft.errors import BankDigestError, BankError, NeurograftError, NoBankError, NotInBankError
from neurograft.files import LARGEST_TEXT, human_bytes

_SHOWN = 8
LONGEST_REASON = 500  # characters


class Store(Protocol):
    """A bank. What fails raises a `BankError`: unreachable, access denied, not there, version exists."""

    root: str

    def names(self) -> list[str]:
        """Return what the organs in it are called."""

    def versions(self, name: str) -> dict[str, str | None]:
        """Return every version of an organ, with the reason if it was yanked; none if there is no such organ."""

    def tags(self, name: str) -> dict[str, str]:
        """Return tag -> version."""

    def entry(self, name: str, version: str) -> Entry:
        """Return what the bank says of a version that it has."""

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Return the bytes of an organ file from `start`, in pieces."""

    def add(self, entry: Entry, file: Path) -> None:
        """Add a version; one that another process added meanwhile, with other bytes, is refused."""

    def restore(self, entry: Entry, file: Path) -> bool:
        """Send the file of a version that is there anew, if it was lost or damaged; return whether it was."""

    def signatures(self, entry: Entry) -> str | None:
        """Return the signatures of a version, as they lie beside an organ file; `None` if there are none."""

    def set_signatures(self, entry: Entry, text: str) -> None:
        """Keep the signatures of a version, in place of those that were kept; they may grow, and bind nobody here."""

    def set_tag(self, name: str, tag: str, version: str) -> None:
        """Let a tag stand for a version, whatever it stood for before."""

    def yank(self, name: str, version: str, reason: str | None) -> None:
        """Mark a version as yanked; no reason takes the mark away."""


def open_store(root: str) -> Store:
    """Open the bank at a root.

    Raises:
        UsageError: There is no such kind of bank here.
    """
    if root.startswith("hf://"):
        from neurograft.bank.hugging_face import HubStore

        return HubStore(root)
    if root.startswith("oci://"):
        from neurograft.bank.registries import RegistryStore

        return RegistryStore(root)
    from neurograft.bank.folders import FolderStore

    return FolderStore(root)


def known_versions(store: Store, reference: Reference) -> dict[str, str | None]:
    """Return the versions of an organ that must be there; see `Store.versions`.

    Args:
        store: The bank.
        reference: What names the organ in it.

    Raises:
        NotInBankError: There is no such organ; it says which there are, where the bank lists them.
    """
    name = str(reference.name)
    if versions := store.versions(name):
        return {version: reason and shorten(reason, LONGEST_REASON) for version, reason in versions.items()}
    try:
        names = store.names()
    except NoBankError:
        raise
    except BankError:  # many registries list nothing
        names = []
    if name in names:  # whose push was interrupted, or that is something else
        raise NotInBankError(f"{store.root} has no whole version of an organ {name}; push one, or push it again.")
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    instead = f"; it has {', '.join([*names[:_SHOWN], *more])}" if names else ""
    raise NotInBankError(f"{store.root} has no organ {name}{instead}{_meant(reference)}.")


def _meant(reference: Reference) -> str:
    """Return what may have been meant by a tag in a registry, where other banks have the organ's name."""
    tag = reference.selector
    if not reference.root.startswith("oci://") or tag is None or tag[0].isdigit():
        return ""
    path = f"{reference.root}/{reference.name}"
    return f"; in a registry :{tag} is a tag of {path}, and an organ {tag} below it would be {path}/{tag}"


def gather(pieces: Iterable[bytes], where: str, most: int = LARGEST_TEXT) -> bytes:
    """Return what a bank gives in pieces and that should be small; a bank may be anyone's.

    Raises:
        BankDigestError: It has more bytes than `most`.
    """
    content = bytearray()
    for piece in pieces:
        content += piece
        if len(content) > most:
            raise BankDigestError(f"{where} has more than {human_bytes(most)}, which is too large; it was altered.")
    return bytes(content)


@contextmanager
def explaining(explain: Callable[[Exception], Exception]) -> Iterator[None]:
    """Let `explain` turn what a library raises into one sentence; errors of neurograft's own pass as they are.

    Args:
        explain: Gives the error to raise in the place of another, which may be that other itself.
    """
    try:
        yield
    except NeurograftError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is error:
            raise
        raise explained from error
