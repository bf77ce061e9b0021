"""A deployment folder: whole versions, a link to the one that is deployed, and the history.

```
MODEL_DIR/
  current -> versions/0002-radiology     replaced in one step, never absent once there
  versions/0001-base/, 0002-radiology/   plain model directories, never written to again
  history.jsonl                          see `history`
  .current.next                          the link to be, while a switch is under way
  .staging/                              what is not deployed yet
```

A switch makes `.current.next`, moves the version into `versions/`, appends to the history and renames `.current.next`
to `current`, each forced to the disk before the next. So wherever it is killed, `current` points to a whole version,
and `settle` can tell: if the history's last entry is about the version that `.current.next` points to, the switch was
decided and is finished; if not, it was not and is forgotten.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import shlex
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from neurograft.deployment.entries import VERSION_PATTERN, Entry
from neurograft.deployment.history import History, read_history
from neurograft.errors import DeploymentBusyError, DeploymentError, HistoryError
from neurograft.files import explained_os_errors, fsync

log = logging.getLogger("neurograft")

CURRENT = "current"
VERSIONS = "versions"
HISTORY = "history.jsonl"
_NEXT = ".current.next"
_STAGING = ".staging"
_DEPLOYING = ".deploying.lock"
_SWITCHING = ".switching.lock"
_PATIENCE_SECONDS = 60.0  # a switch takes a fraction of a second


@dataclass(frozen=True)
class State:
    """What a deployment folder says."""

    history: History
    current: str | None
    """The version that `current` points to."""
    unfinished: bool
    """Whether the last entry was decided and its switch is still to be done."""


@dataclass(frozen=True)
class DeploymentFolder:
    """A deployment folder."""

    path: Path

    @property
    def current(self) -> Path:
        """The link to what is deployed."""
        return self.path / CURRENT

    def version(self, name: str) -> Path:
        """Return the folder of a version."""
        return self.path / VERSIONS / name

    def create(self) -> None:
        """Make the folder, if its parent is there.

        Raises:
            DeploymentError: It is something else already.
        """
        if not self.path.parent.is_dir():
            raise DeploymentError(f"the folder {self.path.parent} does not exist; create it first.")
        if self.path.exists() and not self.path.is_dir():
            raise DeploymentError(f"{self.path} is a file; give a folder for deployments.")
        others = [item.name for item in self.path.iterdir() if item.name not in _OWN] if self.path.is_dir() else []
        if others:
            raise DeploymentError(
                f"{self.path} holds {sorted(others)[0]}, which is none of a deployment's; give an empty folder."
            )
        with explained_os_errors(self.path):
            self.path.mkdir(exist_ok=True)

    def require(self) -> None:
        """Refuse a folder in which nothing was deployed.

        Raises:
            DeploymentError: It is missing, or holds no entry of a history.
        """
        if not os.path.lexists(self.current) and not _has_entry(self.path / HISTORY):
            raise DeploymentError(
                f"{self.path} holds no deployment; start one with neurograft deploy --recipient MODEL --to {self.path}."
            )

    @contextmanager
    def deploying(self, *, wait: bool) -> Iterator[Path]:
        """Be the only one who prepares a deployment here; yield an empty folder on the same disk to prepare it in.

        Raises:
            DeploymentBusyError: Another does, and `wait` is false.
        """
        lock = FileLock(self.path / _DEPLOYING)
        with explained_os_errors(self.path):
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                if not wait:
                    raise DeploymentBusyError(
                        f"another operator is deploying to {self.path}; try again later, or wait with --wait."
                    ) from error
                log.info("waiting for another operator who deploys to %s", self.path)
                lock.acquire()
        try:
            staging = self.path / _STAGING
            shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
            with explained_os_errors(staging):
                (own := staging / uuid.uuid4().hex[:8]).mkdir(parents=True)
            try:
                yield own
            finally:
                shutil.rmtree(own, ignore_errors=True)
                with suppress(OSError):
                    staging.rmdir()
        finally:
            lock.release()

    @contextmanager
    def switching(self) -> Iterator[None]:
        """Be the only one who writes the history and the link; others take a fraction of a second.

        Raises:
            DeploymentBusyError: Another holds it for a minute.
        """
        lock = FileLock(self.path / _SWITCHING)
        with explained_os_errors(self.path):
            try:
                lock.acquire(timeout=_PATIENCE_SECONDS)
            except Timeout as error:
                raise DeploymentBusyError(
                    f"another operator is switching {self.path} for over {_PATIENCE_SECONDS:.0f} s; try again later."
                ) from error
        try:
            yield
        finally:
            lock.release()

    def state(self) -> State:
        """Read history and link, and hold one against the other; nothing is changed.

        Raises:
            HistoryError: An entry was altered, or the link is not where the last entry says.
        """
        history = read_history(self.path / HISTORY)
        self._refuse_unknown_versions(history)
        current, last = self._target(CURRENT), history.last
        expected = last.version if last else None
        if current == expected:
            return State(history, current, unfinished=False)
        if last is not None and self._target(_NEXT) == expected and current == last.before:
            return State(history, current, unfinished=True)
        raise HistoryError(
            f"{self.current} points to {current or 'nothing'}, and the last entry of {HISTORY}, entry "
            f"{len(history.entries)}, says {expected or 'nothing'}: {self._repair(current, expected)}."
        )

    def _repair(self, current: str | None, expected: str | None) -> str:
        """Say what became of the link, and how to mend it."""
        if current is None and expected is not None and self.version(expected).is_dir():
            restored = shlex.join(["ln", "-s", f"{VERSIONS}/{expected}", str(self.current)])
            return f"the link was lost; put it back with: {restored}"
        return "the link was changed by hand, or the end of the history was cut off; restore either from a backup"

    def _refuse_unknown_versions(self, history: History) -> None:
        """Refuse a version that no entry made and no switch is under way to: the entry was cut off.

        Raises:
            HistoryError: Names the version.
        """
        known = {entry.version for entry in history.entries} | {self._target(_NEXT)}
        folder = self.path / VERSIONS
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            if re.match(VERSION_PATTERN, name) and name not in known:
                raise HistoryError(
                    f"{folder / name} is in no entry of {HISTORY}: the end of the history was cut off, or the folder "
                    "was put there by hand; restore the history from a backup, or move the folder elsewhere."
                )

    def settle(self) -> State:
        """Finish or forget the switch of a process that was killed; for who holds `switching`.

        Raises:
            HistoryError: See `state`.
        """
        state = self.state()
        with explained_os_errors(self.current):
            if state.unfinished:
                log.info("finishing the switch to %s, which a killed process had decided", self._target(_NEXT))
                self._replace_link()
            elif (left := self._target(_NEXT)) is not None:
                known = {entry.version for entry in state.history.entries}
                if left not in known and self.version(left).is_dir():
                    self._discard(self.version(left))
                (self.path / _NEXT).unlink()
                fsync(self.path)
        return State(state.history, self._target(CURRENT), unfinished=False)

    def switch(self, history: History, entry: Entry, staged: Path | None) -> History:
        """Make a version the one that is deployed; for who holds `switching`.

        Args:
            history: As `settle` returned it.
            entry: What happens; its number and digests are filled in here.
            staged: The version's folder, whole and verified, still outside `versions`; `None` if it is there already.
        """
        target = self.version(entry.version)
        with explained_os_errors(self.path):
            target.parent.mkdir(exist_ok=True)
            os.symlink(f"{VERSIONS}/{entry.version}", self.path / _NEXT)
            fsync(self.path)
            if staged is not None:
                os.rename(staged, target)
                fsync(target.parent)
        history = history.append(entry)
        with explained_os_errors(self.current):
            self._replace_link()
        return history

    def _replace_link(self) -> None:
        os.replace(self.path / _NEXT, self.current)
        fsync(self.path)

    def _target(self, name: str) -> str | None:
        """Return the version that one of the links points to.

        Raises:
            HistoryError: It is no link to a version here.
        """
        link = self.path / name
        if not os.path.lexists(link):
            return None
        folder, _, version = (os.readlink(link) if link.is_symlink() else "").partition("/")
        if folder != VERSIONS or not re.match(VERSION_PATTERN, version):
            raise HistoryError(
                f"{link} is no link to a folder in {self.path / VERSIONS}; take it away, and the same command says how "
                "to put the right one in its place."
            )
        return version

    def _discard(self, folder: Path) -> None:
        """Move aside what nobody deployed, for the next deployment to delete: a rollback must not wait for that."""
        aside = self.path / _STAGING / uuid.uuid4().hex[:8]
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)


def _has_entry(history: Path) -> bool:
    """Whether a history has a line that was written to its end, and not just the first half of its first."""
    try:
        if history.is_file():
            with history.open("rb") as stream:
                return stream.readline().endswith(b"\n")
    except OSError:
        pass
    return os.path.lexists(history)  # whoever reads it says what is wrong


_OWN = {CURRENT, VERSIONS, HISTORY, _NEXT, _STAGING, _DEPLOYING, _SWITCHING}


def operator() -> str:
    """Return who is at work, for the history."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in many containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
