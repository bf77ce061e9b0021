"""Kill -9 at random moments: what train, transplant, push and pull leave, and whether the same again works.

Run it with `python benchmarks/kills.py`; some 20 minutes on one core. Every trial runs in a child that is forked from a
process that has loaded everything, starts on an empty folder or one that holds an older result, is killed at a moment
that is drawn from the time that the work takes, and is then done again. It writes benchmarks/results/kills.json.
Deployments have such trials in tests/deployment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from neurograft import extract, pull, push, remove, train, transplant
from neurograft.files import file_sha256
from neurograft.organ import read_organ
from render import describe_run
from tiny import save_model

RESULT = Path(__file__).parent / "results" / "kills.json"
MOMENTS = 200


@dataclass(frozen=True)
class Case:
    """One kind of work."""

    name: str
    work: Callable[[Path], Any]
    """Does it in a folder."""
    output: str
    """What it writes there."""
    verify: Callable[[Path], Any]
    """Raises where that is not whole."""


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
    organ, text = folder / "organ.safetensors", folder / "text.txt"
    extract(donor, layers=(2, 4), output=organ, name="tiny")
    text.write_text("\n\n".join(f"a shadow of grade {n % 7} in the left lung" for n in range(60)), encoding="utf-8")
    push(organ, folder / "bank")
    options: dict[str, Any] = {"steps": 12, "sequence_length": 16, "checkpoint_every": 0, "overwrite": True}

    def verify_model(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as back:
            remove(path, output=Path(back) / "original")
            for file in recipient.glob("*.safetensors"):
                if file_sha256(Path(back) / "original" / file.name) != file_sha256(file):
                    raise ValueError(f"{file.name} did not come back")

    def verify_bank(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            pull(f"{path}/:tiny@0.1.0", output=Path(out) / "organ.safetensors")

    return [
        Case(
            "train",
            lambda f: train(organ, host=donor, data=text, output=f / "new.safetensors", **options),
            "new.safetensors",
            read_organ,
        ),
        Case(
            "transplant",
            lambda f: transplant(organ, recipient, output=f / "model", mode="replace", at=1, overwrite=True),
            "model",
            verify_model,
        ),
        Case("push", lambda f: push(organ, f / "bank"), "bank", verify_bank),
        Case(
            "pull",
            lambda f: pull(f"{folder}/bank/:tiny@0.1.0", output=f / "pulled.safetensors", overwrite=True),
            "pulled.safetensors",
            read_organ,
        ),
    ]


def measure(case: Case, folder: Path, moments: int) -> dict[str, Any]:
    """Kill one kind of work so often."""
    chance, place = random.Random(0), folder / "place"
    place.mkdir()
    case.work(place)  # in this process, so that children have everything loaded
    shutil.copytree(place, folder / "old")
    whole = min(_fork(case.work, _fresh(place, None), None)[1] for _ in range(3))
    found = {"absent": 0, "old_or_new": 0, "broken": 0, "not_done_again": 0}
    killed, tried = 0, 0
    while killed < moments and tried < 20 * moments:
        tried += 1
        _fresh(place, folder / "old" if tried % 2 and case.name != "push" else None)
        was_killed, _ = _fork(case.work, place, chance.uniform(0, whole))
        killed += was_killed
        if was_killed:
            found[_state(case, place)] += 1
            found["not_done_again"] += not _done_again(case, place)
    shutil.rmtree(place)
    shutil.rmtree(folder / "old")
    row = {"verb": case.name, "killed": killed, "seconds_undisturbed": round(whole, 3), **found}
    print(row, flush=True)
    return row


def _fresh(place: Path, old: Path | None) -> Path:
    shutil.rmtree(place)
    if old is None:
        place.mkdir()
    else:
        shutil.copytree(old, place)
    return place


def _fork(work: Callable[[Path], Any], place: Path, seconds: float | None) -> tuple[bool, float]:
    """Do the work in a child, kill it after so many seconds; return whether it was killed, and how long it took."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work(place)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(3)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError("the work failed by itself")
    return os.WIFSIGNALED(status), time.monotonic() - start


def _state(case: Case, place: Path) -> str:
    """Say whether what is there under the output's name is whole; a bank without the version counts as absent."""
    path = place / case.output
    if not path.exists() or (case.name == "push" and not list(path.rglob("versions/*.json"))):
        return "absent"
    try:
        case.verify(path)
    except Exception as error:
        sys.stderr.write(f"{case.name}: {type(error).__name__}: {error}\n")
        return "broken"
    return "old_or_new"


def _done_again(case: Case, place: Path) -> bool:
    try:
        _fork(case.work, place, None)
        case.verify(place / case.output)
    except Exception as error:
        sys.stderr.write(f"{case.name} again: {type(error).__name__}: {error}\n")
        return False
    return True


if __name__ == "__main__":
    main()
