"""A bank in a folder, or behind any URL that fsspec opens: plain files, of which each is written once.

`<root>/<name>/versions/<version>.json` says what a version is; written last, it makes the version be there.
`<root>/<name>/files/<sha256>.safetensors` is an organ file, under the digest of its bytes.
`<root>/<name>/signatures/<sha256>.sig` is its signatures, as JSON Lines; the only one that may be written again.
`<root>/<name>/tags/<tag>.json` is `{"version": ...}`, `<root>/<name>/yanked/<version>.json` is `{"reason": ...}`.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from neurograft.bank.entries import Entry, parse_entry
from neurograft.bank.signatures import decode
from neurograft.bank.stores import explaining, gather
from neurograft.bank.versions import is_version
from neurograft.errors import (
    BankAccessError,
    BankDigestError,
    BankError,
    BankUnreachableError,
    NoBankError,
    NotInBankError,
    UsageError,
    VersionExistsError,
)
from neurograft.files import (
    CHUNK_BYTES,
    LARGEST_TEXT,
    atomic_file,
    explained_os_errors,
    file_sha256,
    fsync,
    read_bounded,
    require_space,
)
from neurograft.trust.signature_files import LARGEST_FILE

log = logging.getLogger("neurograft")

_VERSIONS, _FILES, _SIGNATURES, _TAGS, _YANKED = "versions", "files", "signatures", "tags", "yanked"
# Libraries below fsspec have errors of their own, which are told by name so that none of them need be installed.
_NO_ACCESS = ("NoCredentialsError", "AuthenticationException", "ClientAuthenticationError", "LoginError")
_NO_NETWORK = ("EndpointConnectionError", "ClientConnectorError", "ConnectTimeoutError", "ServerDisconnectedError")
_NO_ACCESS_STATUS = (401, 403)


class FolderStore:
    """A bank in a folder or behind an fsspec URL; see `stores.Store`."""

    def __init__(self, root: str) -> None:
        import fsspec
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.root = root
        try:
            self.fs, path = url_to_fs(root, use_listings_cache=False)
        except ImportError as error:
            raise UsageError(f"{root} needs a package that is not installed: {error}.") from error
        except (ValueError, LookupError) as error:
            raise UsageError(
                f"fsspec {fsspec.__version__} opens no {root} ({error}); write it as fsspec does."
            ) from error
        except Exception as error:  # some ask a server at once
            raise self._explain(error) from error
        self.path = str(path).rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def names(self) -> list[str]:
        """See `Store`."""
        with explaining(self._explain):
            if not self.fs.isdir(self.path):
                raise NoBankError(f"there is no bank at {self.root}; push an organ to it first.")
            children = [self._last(child) for child in self.fs.ls(self.path, detail=False)]
            return sorted(name for name in children if self.fs.isdir(f"{self.path}/{name}/{_VERSIONS}"))

    def versions(self, name: str) -> dict[str, str | None]:
        """See `Store`."""
        yanked = set(self._stems(name, _YANKED))
        known = [version for version in self._stems(name, _VERSIONS) if is_version(version)]
        return {version: self._reason(name, version) if version in yanked else None for version in known}

    def _reason(self, name: str, version: str) -> str:
        try:
            return str(self._json(name, _YANKED, version).get("reason") or "no reason given")
        except BankDigestError:  # a mark that can't be read is a mark all the same
            return "the reason can't be read"

    def tags(self, name: str) -> dict[str, str]:
        """See `Store`."""
        found = {}
        for tag in self._stems(name, _TAGS):
            try:
                found[tag] = str(self._json(name, _TAGS, tag).get("version"))
            except BankDigestError as error:  # which must not keep anybody from the versions
                log.warning(
                    "the tag %s of %s is left out (set it anew with `neurograft tag`): %s",
                    tag,
                    name,
                    str(error).rstrip("."),
                )
        return found

    def entry(self, name: str, version: str) -> Entry:
        """See `Store`."""
        path = self._place(name, _VERSIONS, version)
        with explaining(self._explain):
            return parse_entry(self._read_small(path), path, name=name, version=version)

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See `Store`."""
        with explaining(self._explain), self.fs.open(self._file(entry), "rb") as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def add(self, entry: Entry, file: Path) -> None:
        """See `Store`. The organ file goes first, and the version is there once it is whole."""
        place = self._place(entry.name, _VERSIONS, entry.version)
        if self.is_local:
            self._make_root()
            require_space(Path(self.path), entry.size)
        with explaining(self._explain), self._locked(entry.name):
            if not (self.is_local and Path(place).exists()):  # else another process was first
                self._send(entry, file)
                self._write(place, entry.model_dump_json(), exclusive=True)
        # Where a store has no way to say "only if it is not there", the last of two writers is the one to be believed.
        if self.entry(entry.name, entry.version).sha256 != entry.sha256:
            raise VersionExistsError(
                f"{place} was written by someone else at the same time, with other bytes; give the organ a new version."
            )

    def restore(self, entry: Entry, file: Path) -> bool:
        """See `Store`. In a folder the file is read; elsewhere its size is looked at."""
        place = self._file(entry)
        with explaining(self._explain), self._locked(entry.name):
            whole = self._has(place, entry.size) and (not self.is_local or file_sha256(Path(place)) == entry.sha256)
            if not whole:
                self._send(entry, file)
            return not whole

    def _send(self, entry: Entry, file: Path) -> None:
        self.fs.makedirs(f"{self.path}/{entry.name}/{_FILES}", exist_ok=True)
        if self.is_local:
            _copy(file, Path(self._file(entry)), entry.sha256)
        elif not self._has(self._file(entry), entry.size):
            log.info("sending %s to %s", file.name, self.root)
            self.fs.put_file(str(file), self._file(entry))

    def signatures(self, entry: Entry) -> str | None:
        """See `Store`."""
        place = self._signed(entry)
        with explaining(self._explain):
            if not self.fs.exists(place):
                return None
            return decode(self._read_small(place, LARGEST_FILE), place)

    def set_signatures(self, entry: Entry, text: str) -> None:
        """See `Store`."""
        with explaining(self._explain), self._locked(entry.name):
            self._write(self._signed(entry), text)

    def set_tag(self, name: str, tag: str, version: str) -> None:
        """See `Store`."""
        with explaining(self._explain), self._locked(name):
            self._write(self._place(name, _TAGS, tag), json.dumps({"version": version}))

    def yank(self, name: str, version: str, reason: str | None) -> None:
        """See `Store`."""
        place = self._place(name, _YANKED, version)
        with explaining(self._explain), self._locked(name):
            if reason is not None:
                self._write(place, json.dumps({"reason": reason}))
            elif self.fs.exists(place):
                self.fs.rm_file(place)

    def _place(self, name: str, kind: str, stem: str) -> str:
        return f"{self.path}/{name}/{kind}/{stem}.json"

    def _file(self, entry: Entry) -> str:
        return f"{self.path}/{entry.name}/{_FILES}/{entry.sha256}.safetensors"

    def _signed(self, entry: Entry) -> str:
        return f"{self.path}/{entry.name}/{_SIGNATURES}/{entry.sha256}.sig"

    def _stems(self, name: str, kind: str) -> list[str]:
        folder = f"{self.path}/{name}/{kind}"
        with explaining(self._explain):
            if not self.fs.isdir(folder):
                return []
            names = [self._last(path) for path in self.fs.ls(folder, detail=False)]
        return sorted(n.removesuffix(".json") for n in names if n.endswith(".json") and not n.startswith("."))

    @staticmethod
    def _last(path: str) -> str:
        return path.rstrip("/").rpartition("/")[2]

    def _json(self, name: str, kind: str, stem: str) -> dict[str, Any]:
        path = self._place(name, kind, stem)
        with explaining(self._explain):
            content = self._read_small(path)
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError, RecursionError) as error:
            raise BankDigestError(f"{path} is no JSON object; it was altered or damaged.") from error

    def _read_small(self, path: str, most: int = LARGEST_TEXT) -> bytes:
        """Return the bytes of a file that has few, if the bank is what it should be."""
        if self.is_local:
            try:
                return read_bounded(Path(path), most)
            except OSError as error:
                if error.errno not in (errno.EFBIG, errno.EINVAL):
                    raise
                raise BankDigestError(f"{path} can't be read: {error.strerror}; it was altered.") from error
        with self.fs.open(path, "rb") as stream:
            return gather(iter(partial(stream.read, CHUNK_BYTES), b""), path, most)

    def _has(self, path: str, size: int) -> bool:
        return bool(self.fs.exists(path)) and self.fs.size(path) == size

    def _write(self, path: str, text: str, *, exclusive: bool = False) -> None:
        """Write a small file, atomically in a folder; an object store's writes are."""
        if self.is_local:
            Path(path).parent.mkdir(exist_ok=True)
            if exclusive and Path(path).exists():
                return
            with atomic_file(Path(path), overwrite=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self.fs.pipe_file(path, text.encode(), mode="create" if exclusive else "overwrite")
        except FileExistsError:
            return

    def _make_root(self) -> None:
        """Make the folder of the bank, but not those above it, so that a typo is no new tree of folders."""
        folder = Path(self.path)
        if not folder.parent.is_dir():
            raise UsageError(f"the folder {folder.parent} does not exist; create it first.")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give a folder, in which the bank shall be.")
        with explained_os_errors(folder):
            folder.mkdir(exist_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Let one process after the other write about an organ, where the bank is a folder."""
        if not self.is_local:
            yield
            return
        folder = Path(self.path, name)
        lock = FileLock(folder / ".lock")
        with explained_os_errors(folder):
            folder.mkdir(exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _explain(self, error: Exception) -> BankError:
        if isinstance(error, FileNotFoundError):
            return NotInBankError(
                f"{self.root} lacks a file that it should have: {error.filename or error}; if it is an organ's, push "
                "the organ again."
            )
        kind, text = type(error).__name__, next(iter(str(error).splitlines()), "no message").rstrip(".")
        if isinstance(error, PermissionError) or kind in _NO_ACCESS or getattr(error, "status", 0) in _NO_ACCESS_STATUS:
            return BankAccessError(
                f"{self.root} refuses access ({text}); check the rights, or the user and password that its fsspec "
                f"file system takes."
            )
        if isinstance(error, NotImplementedError):
            return BankAccessError(f"{self.root} can't be written to by way of {type(self.fs).__name__}.")
        if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError | TimeoutError):
            where = f" ({error.filename})" if error.filename else ""
            return BankError(f"{self.root} can't be used: {error.strerror}{where}.")
        if isinstance(error, ConnectionError | TimeoutError) or kind in _NO_NETWORK:
            return BankUnreachableError(f"{self.root} can't be reached ({kind}: {text}); is there a network?")
        return BankError(f"{self.root} can't be used: {kind}: {text}.")


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Copy an organ file into a folder under its digest; what an interrupted copy left is gone on with."""
    if target.is_file() and file_sha256(target) == sha256:
        return
    part = target.with_suffix(".part")
    with explained_os_errors(target):
        done = part.stat().st_size if part.is_file() else 0
        require_space(target.parent, max(0, source.stat().st_size - done))
        with source.open("rb") as reading, part.open("ab") as writing:
            reading.seek(done)
            shutil.copyfileobj(reading, writing, CHUNK_BYTES)
        if file_sha256(part) != sha256:
            part.unlink()
            raise BankDigestError(f"{source} was changed while it was copied, or an earlier copy of it; push it again.")
        part.chmod(source.stat().st_mode & 0o666 | 0o400)
        fsync(part)
        part.replace(target)
        fsync(target.parent)
