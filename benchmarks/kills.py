"""Kill -9 at random moments: what train, transplant, push, pull, deploy and rollback leave, and whether they go again.

Run it with `python benchmarks/kills.py`; some 20 minutes on one core. Every trial runs in a child that is forked from a
process that has loaded everything, starts on an empty folder or one that holds an older result (a rollback: on a
deployment of one version or the other), is killed at a moment that is drawn from the time that the work takes, and is
then done again. It writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from deployments import go_back, one_more, write_gates
from killing import Work, fork
from neurograft import deploy, extract, history, pull, push, remove, train, transplant
from neurograft.bank.cataloguing import versions
from neurograft.files import file_sha256
from neurograft.organ import open_organ, read_organ
from render import describe_run
from tiny import save_model

RESULT = Path(__file__).parent / "results" / "kills.json"
MOMENTS = 200


@dataclass(frozen=True)
class Case:
    """One kind of work."""

    name: str
    work: Work
    """Does it in a folder."""
    starts: tuple[Path, ...]
    """Such folders before it, by turns."""
    is_whole: Callable[[Path], bool]
    """Whether its output is there; raises where that is not whole."""


def main() -> None:
    """Kill, look, do it again; exit with 1 if anything was half-written or could not be done again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=MOMENTS, help="kills of each kind of work")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROGRAFT_CACHE"] = f"{folder}/cache"
        rows = [measure(case, Path(folder), arguments.moments) for case in make_cases(Path(folder))]
    result = {"run": describe_run("python benchmarks/kills.py"), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["broken"] or row["not_done_again"] for row in rows))


def make_cases(folder: Path) -> list[Case]:
    """Return the kinds of work, on tiny models in a folder."""
    donor, recipient = (save_model(folder / f"model-{seed}", "llama", seed=seed) for seed in (0, 1))
    organ, older, text = folder / "organ.safetensors", folder / "older.safetensors", folder / "text.txt"
    extract(donor, layers=(2, 4), output=organ, name="tiny")
    extract(donor, layers=(1, 3), output=older, name="tiny", version="0.0.9")
    text.write_text("\n\n".join(f"a shadow of grade {n % 7} in the left lung" for n in range(60)), encoding="utf-8")
    push(organ, folder / "bank")
    gates, opened = write_gates(folder), open_organ(organ)
    options: dict[str, Any] = {"steps": 12, "sequence_length": 16, "checkpoint_every": 4, "overwrite": True}

    def pull_anew(place: Path) -> None:
        with patch.dict(os.environ, NEUROGRAFT_CACHE=str(place / "cache")):
            pull(f"{folder}/bank/:tiny@0.1.0", output=place / "organ.safetensors", overwrite=True)

    def deploy_next(place: Path) -> None:
        start = None if (place / "current").is_symlink() or _decided(place) else recipient
        deploy(one_more(opened, place), to=place, recipient=start, gates=gates, mode="insert", at=1)

    def is_model(place: Path) -> bool:
        if not (place / "model").exists():
            return False
        with tempfile.TemporaryDirectory(dir=folder) as back:
            remove(place / "model", output=Path(back) / "original")
            for file in recipient.glob("*.safetensors"):
                if file_sha256(Path(back) / "original" / file.name) != file_sha256(file):
                    raise ValueError(f"{file.name} did not come back")
        return True

    def is_bank(place: Path) -> bool:
        if not list(place.rglob("versions/*.json")):
            return False
        known = [each.version for each in versions(f"{place}/bank/:tiny").versions]
        with tempfile.TemporaryDirectory(dir=folder) as out:
            for version in known:
                pull(f"{place}/bank/:tiny@{version}", output=Path(out) / f"{version}.safetensors")
        return "0.1.0" in known

    works: dict[str, tuple[Work, Callable[[Path], bool]]] = {
        "train": (
            lambda f: train(organ, host=donor, data=text, output=f / "organ.safetensors", **options),
            _is_organ,
        ),
        "transplant": (
            lambda f: transplant(organ, recipient, output=f / "model", mode="replace", at=1, overwrite=True),
            is_model,
        ),
        "push": (lambda f: push(organ, f / "bank"), is_bank),
        "pull": (pull_anew, _is_organ),
        "deploy": (deploy_next, _is_deployment),
        "rollback": (go_back, _is_deployment),
    }
    for name, (work, _) in works.items():
        for start in ("empty", "used"):
            (folder / name / start).mkdir(parents=True)
        if name == "push":
            push(older, folder / name / "used" / "bank")
        elif name == "rollback":
            for start in ("empty", "used"):
                deploy_next(folder / name / start)
            work(folder / name / "used")
        else:
            work(folder / name / "used")
    return [
        Case(name, work, (folder / name / "empty", folder / name / "used"), is_whole)
        for name, (work, is_whole) in works.items()
    ]


def _decided(place: Path) -> bool:
    return (place / "history.jsonl").is_file() and b"\n" in (place / "history.jsonl").read_bytes()


def _is_organ(place: Path) -> bool:
    path = place / "organ.safetensors"
    return path.exists() and bool(read_organ(path))


def _is_deployment(place: Path) -> bool:
    link = place / "current"
    if not link.is_symlink() and not _decided(place):
        return False
    if link.is_symlink() and link.resolve().name not in history(place, verify="full").verified:
        raise ValueError(f"{link.resolve()} was not verified")
    return True


def measure(case: Case, folder: Path, moments: int) -> dict[str, Any]:
    """Kill one kind of work so often."""
    chance, place = random.Random(0), folder / "place"
    whole = {start: min(fork(case.work, _fresh(place, start), None)[1] for _ in range(3)) for start in case.starts}
    found = {"absent": 0, "old_or_new": 0, "broken": 0, "not_done_again": 0}
    killed, tried = 0, 0
    while killed < moments and tried < 20 * moments:
        start = case.starts[tried % 2]
        tried += 1
        was_killed, _ = fork(case.work, _fresh(place, start), chance.uniform(0, whole[start]))
        killed += was_killed
        if was_killed:
            found[_state(case, place)] += 1
            found["not_done_again"] += not _done_again(case, place)
    shutil.rmtree(place)
    seconds = round(max(whole.values()), 3)
    row = {"verb": case.name, "killed": killed, "seconds_undisturbed": seconds, **found}
    print(row, flush=True)
    return row


def _fresh(place: Path, start: Path) -> Path:
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(start, place, symlinks=True)
    return place


def _state(case: Case, place: Path) -> str:
    try:
        return "old_or_new" if case.is_whole(place) else "absent"
    except Exception as error:
        sys.stderr.write(f"{case.name}: {type(error).__name__}: {error}\n")
        return "broken"


def _done_again(case: Case, place: Path) -> bool:
    try:
        fork(case.work, place, None)
        return case.is_whole(place)
    except Exception as error:
        sys.stderr.write(f"{case.name} again: {type(error).__name__}: {error}\n")
        return False


if __name__ == "__main__":
    main()
