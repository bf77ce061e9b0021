"""The folder of a study: what may stand in it, what is kept there between runs, and what is written at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from neurograft.errors import UsageError
from neurograft.files import alone_in, atomic_file, explained_os_errors
from neurograft.models import ModelDirectory
from neurograft.training.comparison import installed_versions, machine_name
from neurograft.training.measuring import digest_of

REPORT, PAGE = "results.json", "report.html"
_KEPT = ("runs", "organs", "parts")

Result = TypeVar("Result", bound=BaseModel)


def check_names(names: Collection[str], taken: Collection[str] = ()) -> None:
    """Refuse names of domains that could not be names of files, or that mean something else.

    Raises:
        UsageError: There is none, or one is wrong.
    """
    if not names:
        raise UsageError("a study needs at least one domain to train an organ on: --domain NAME=PATH.")
    for name in names:
        if name in taken or not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] in ".-":
            raise UsageError(
                f"{name!r} can't be a domain's name; use letters, digits, -, _ and dots, such as clinical."
            )


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a finished study, or something else.

    Raises:
        UsageError: It does, or it can't be made.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give the name of a folder to write.")
    if (folder / REPORT).exists() and not overwrite:
        raise UsageError(
            f"{folder} holds a finished study already; choose another folder or pass --overwrite, which runs only what "
            "is new in it."
        )
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_dir() for name in _KEPT):
        raise UsageError(f"{folder} exists and holds no study; choose another folder.")
    if not folder.parent.is_dir():
        raise UsageError(f"the folder {folder.parent} does not exist; create it first.")


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Make the folder, clear what a run that was killed left in it, and say how to go on after an interruption.

    Raises:
        KeyboardInterrupt: Interrupted; its message says how to go on.
        UsageError: Another run is at work in it.
        NeurograftError: The disk is full or the folder can't be written to.
    """
    with explained_os_errors(folder):
        for name in _KEPT:
            (folder / name).mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        for left in folder.glob(".cache-*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("the study was not finished; the same command goes on from there") from error


def starting_from(directory: ModelDirectory) -> dict[str, Any]:
    """Return what every part of a study of a model depends on, as JSON can hold it."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in directory.path.iterdir())
    return {"model": [str(directory.path), files], "on": [installed_versions(), machine_name()]}


def kept(folder: Path, kind: type[Result], what: Mapping[str, Any], make: Callable[[], Result]) -> Result:
    """Return a part of a study, made now or by an earlier run.

    Args:
        folder: The study's folder.
        kind: Its schema.
        what: All that it depends on, as JSON can hold it.
        make: Makes it.
    """
    path = folder / "parts" / f"{digest_of(what)[:32]}.json"
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        pass
    found = make()
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return found


def write_study(folder: Path, report: BaseModel, files: Mapping[str, str]) -> None:
    """Write a report and its renderings; results.json last, so that it is there only if all of them are."""
    for name, content in {**files, REPORT: report.model_dump_json(indent=1) + "\n"}.items():
        with atomic_file(folder / name, overwrite=True) as temporary:
            temporary.write_text(content, encoding="utf-8")
