"""Deploy an organ, or a model without one, once its gates hold; if they don't, nothing changes."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from neurograft.byte_moves import Link
from neurograft.checkpoint import open_checkpoint
from neurograft.deployment.entries import NO_DIGEST, Entry, GateVerdict, OrganInEntry
from neurograft.deployment.folder import DeploymentFolder, operator
from neurograft.deployment.gates import Gates, read_gates
from neurograft.deployment.history import History
from neurograft.deployment.measuring import judge, measure, needed, read_texts
from neurograft.deployment.seals import check_files, seal_files
from neurograft.errors import DeploymentError, UsageError
from neurograft.files import atomic_directory, refuse_overlap
from neurograft.manifest import RECORD_FILE, Mode, Operation
from neurograft.model_files import plan_files, write_model
from neurograft.models import resolve
from neurograft.organ import Organ, clean_name, now, open_organ
from neurograft.record import EXPLANT_FOLDER, read_record
from neurograft.removal import remove as remove_organ
from neurograft.steps import Step
from neurograft.studies import studying
from neurograft.transplantation import transplant

log = logging.getLogger("neurograft")

Progress = Callable[[int, int], None]


class DeploymentReport(BaseModel):
    """What `deploy` found and did."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    directory: str
    deployed: bool
    version: str
    """The version that was deployed, or would have been."""
    current: str | None
    """What `current` points to now; `None` if nothing was ever deployed."""
    before: str | None
    """What it pointed to before."""
    gates: list[GateVerdict]
    head: str | None
    """Digest of the history's last entry, to be kept elsewhere; `None` if there is none."""


@dataclass(frozen=True)
class _Staged:
    """A version that is whole, and not deployed yet."""

    path: Path
    entry: Entry


def deploy(
    organ: str | Path | Organ | None = None,
    *,
    to: str | Path,
    gates: str | Path | None = None,
    recipient: str | Path | None = None,
    remove: str | None = None,
    at: int | None = None,
    mode: Mode | None = None,
    link: Link = "auto",
    wait: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> DeploymentReport:
    """Put an organ into what is deployed, or take one out, and deploy the result if it passes its gates.

    The result is prepared beside what is deployed, measured against it on the same documents and questions, and only
    then `current` is switched to it in one step. If a gate fails, nothing is left of it.

    Args:
        organ: An organ, the path of its file or a reference into a bank.
        to: The deployment folder, see `neurograft.deployment.folder`; made at the first deployment.
        gates: The gates file, see `neurograft.deployment.gates`. May be left out only where there is neither `organ`
            nor `remove`: then `recipient` is deployed as it is.
        recipient: At the first deployment, and only there: the model to start from, which is kept as the first version.
        remove: Name of an organ to take out, instead of putting one in.
        at: Position; see `transplant`.
        mode: `replace` or `insert`; see `transplant`.
        link: See `transplant`.
        wait: Whether to wait for another operator who is deploying to the same folder.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all) while texts are measured.

    Raises:
        UsageError: The arguments don't go together, or the folder lies in the recipient.
        GateError, DataError: The gates file or its data can't be used. Checked before anything is written.
        DeploymentBusyError: Another operator is deploying, and `wait` is false.
        DeploymentError: The folder holds no deployment, or another operator switched it meanwhile.
        HistoryError, VerificationError: The history or what is deployed was altered.
        NeurograftError: What `transplant` or `remove` raise.
    """
    _check_arguments(organ, gates, recipient, remove)
    read = read_gates(gates) if gates is not None else None
    texts = read_texts(read) if read is not None else {}
    opened = organ if isinstance(organ, Organ) or organ is None else open_organ(organ)
    folder = DeploymentFolder(Path(to))
    if recipient is not None:
        refuse_overlap(folder.path, [Path(recipient)])
    _check_folder(folder, recipient)
    with folder.deploying(wait=wait) as staging:
        with folder.switching():
            state = folder.settle()
        history = state.history
        staged: list[_Staged] = []
        if recipient is not None:
            if history.last is not None:
                raise UsageError(_started(folder))
            staged.append(_stage_start(recipient, staging, link, trust_remote_code))
        current = _Current.of(folder, history, staged)
        if opened is not None:
            _refuse_second(opened, current)
        verdicts: list[GateVerdict] = []
        if read is not None:
            new = _stage_change(current, opened, remove, staging, (at, mode, link, trust_remote_code))
            wanted = current.needed(read)
            _refuse_altered(folder, history, wanted)
            paths = {new.entry.version: new.path, **{name: current.paths[name] for name in wanted}}
            measured = measure(paths, read, texts, trust_remote_code=trust_remote_code, progress=progress)
            verdicts = judge(new.entry.version, current.version, current.base, measured, read)
            update = {"gates": verdicts, "gates_digest": read.digest}
            staged.append(_Staged(new.path, new.entry.model_copy(update=update)))
        passed = all(verdict.passed for verdict in verdicts)
        if passed:
            history = _commit(folder, history, staged)
    return DeploymentReport(
        directory=str(to),
        deployed=passed,
        version=staged[-1].entry.version,
        current=history.last.version if history.last else None,
        before=state.current,
        gates=verdicts,
        head=history.head if history.last else None,
    )


def _check_arguments(organ: object, gates: object, recipient: object, remove: str | None) -> None:
    if organ is not None and remove is not None:
        raise UsageError("an organ is either put in or taken out; give ORGAN or --remove NAME.")
    if remove is not None and recipient is not None:
        raise UsageError("--recipient is the model that a deployment starts from, and holds no organ to remove yet.")
    changes = organ is not None or remove is not None
    if not changes and recipient is None:
        raise UsageError("nothing to deploy was given; give ORGAN, --remove NAME or --recipient MODEL.")
    if changes and gates is None:
        raise UsageError("no gates were given; write --gate GATES.yaml.")
    if not changes and gates is not None:
        raise UsageError(
            "gates compare with what is deployed, and --recipient alone is deployed as it is; omit --gate."
        )


def _refuse_second(organ: Organ, current: _Current) -> None:
    """Refuse an organ that is deployed already: it would stand inside itself, and taking one out would leave the other.

    Raises:
        UsageError: One of this name is.
    """
    record = read_record(current.path)
    if record is not None and organ.name in {operation.organ for operation in record.operations}:
        raise UsageError(
            f"{organ.name} is in {current.version} already; to deploy another version of it, go back to a version "
            f"without it (`neurograft rollback`), or take it out first (--remove {organ.name})."
        )


def _refuse_altered(folder: DeploymentFolder, history: History, wanted: list[str]) -> None:
    """Refuse to compare with a version that is not what it was.

    Raises:
        DeploymentError: It was deleted.
        VerificationError: It was altered.
    """
    for version in wanted if history.last is not None else ():
        if not folder.version(version).is_dir():
            raise DeploymentError(
                f"the gates compare with {version}, and {folder.version(version)} is not there any more; restore it, "
                "or write against: current in the gates file."
            )
        check_files(folder.version(version), history.maker(version).files, full=False)


def _check_folder(folder: DeploymentFolder, recipient: object) -> None:
    """Refuse a folder that holds no deployment where none is started, and make it where one is."""
    if recipient is None:
        folder.require()
    elif os.path.lexists(folder.current):
        raise UsageError(_started(folder))
    else:
        folder.create()


def _started(folder: DeploymentFolder) -> str:
    return f"{folder.path} holds a deployment already, and organs go into what is deployed there; omit --recipient."


@dataclass(frozen=True)
class _Current:
    """What a deployment builds on."""

    version: str
    base: str
    number: int
    """Of the version to come."""
    paths: dict[str, Path]

    @classmethod
    def of(cls, folder: DeploymentFolder, history: History, staged: list[_Staged]) -> _Current:
        """Take what is deployed, once it is found to be what passed its gates, or what is about to be."""
        if history.last is None:
            entry = staged[0].entry
            return cls(entry.version, entry.version, 2, {entry.version: staged[0].path})
        version, base = history.last.version, history.entries[0].version
        check_files(folder.version(version), history.maker(version).files, full=False)
        return cls(version, base, history.next_number, {name: folder.version(name) for name in (version, base)})

    def needed(self, gates: Gates) -> list[str]:
        """Return the versions that the gates compare with."""
        return list(needed(self.version, self.base, gates))

    @property
    def path(self) -> Path:
        """Folder of the version that is deployed."""
        return self.paths[self.version]


def _stage_start(recipient: str | Path, staging: Path, link: Link, trust_remote_code: bool) -> _Staged:
    """Copy the model that a deployment starts from, with its record and explants if it has some."""
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    version = f"0001-{clean_name(directory.name)}"
    log.info("copying %s", directory.name)
    with studying():
        checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
        files = plan_files(checkpoint, [Step("recipient", layer) for layer in range(checkpoint.layer_count)], {})
        config = (directory.path / "config.json").read_text(encoding="utf-8")
        with atomic_directory(staging / version, overwrite=False) as temporary:
            write_model(checkpoint, files, config, temporary, link=link)
            if read_record(directory.path) is not None:
                shutil.copyfile(directory.path / RECORD_FILE, temporary / RECORD_FILE)
                if (directory.path / EXPLANT_FOLDER).is_dir():
                    shutil.copytree(directory.path / EXPLANT_FOLDER, temporary / EXPLANT_FOLDER)
    return _sealed(staging / version, "start", None)


def _stage_change(
    current: _Current,
    organ: Organ | None,
    remove: str | None,
    staging: Path,
    options: tuple[int | None, Mode | None, Link, bool],
) -> _Staged:
    """Write what is deployed with one organ more, or one less."""
    at, mode, link, trust_remote_code = options
    if organ is not None:
        path = staging / f"{current.number:04d}-{clean_name(organ.name)}"
        record = transplant(
            organ, current.path, at=at, mode=mode, output=path, link=link, trust_remote_code=trust_remote_code
        )
        return _sealed(path, "deploy", current.version, record.operations[-1])
    path = staging / f"{current.number:04d}-{clean_name(f'without-{remove}')}"
    remove_organ(current.path, organ=remove, output=path, link=link, trust_remote_code=trust_remote_code)
    before = read_record(current.path)
    assert before is not None  # else the removal raised
    return _sealed(path, "remove", current.version, next(op for op in before.operations if op.organ == remove))


def _sealed(path: Path, action: str, before: str | None, operation: Operation | None = None) -> _Staged:
    """Digest a version before it is measured, so that what is deployed is what passed."""
    log.info("digesting %s", path.name)
    organ = operation and OrganInEntry(
        name=operation.organ, version=operation.organ_version, file_digest=operation.organ_file_digest
    )
    return _Staged(
        path,
        Entry.model_validate(
            {
                "number": 1,
                "when": now(),
                "operator": operator(),
                "action": action,
                "version": path.name,
                "before": before,
                "organ": organ,
                "files": seal_files(path),
                "previous": NO_DIGEST,
            }
        ),
    )


def _commit(folder: DeploymentFolder, expected: History, staged: list[_Staged]) -> History:
    """Switch to what was measured, if what it was measured against still is what is deployed.

    Raises:
        DeploymentError: Another operator switched meanwhile.
    """
    with folder.switching():
        history = folder.settle().history
        if history.head != expected.head:
            assert history.last is not None
            raise DeploymentError(
                f"{folder.path} was switched to {history.last.version} while this was measured against something else; "
                "nothing was changed, deploy again."
            )
        for version in staged:
            check_files(version.path, version.entry.files, full=False)
            entry = version.entry.model_copy(update={"when": now()})
            history = folder.switch(history, entry, version.path)
        return history
