"""Deploys or rolls back in a child process again and again, and kills it; run by test_killed.py, prints JSON."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments import go_back, one_more
from killing import Work, fork
from neurograft import deploy, history
from neurograft.deployment import folder as folders
from neurograft.deployment import history as histories
from neurograft.organ import open_organ


def dying(work: Work, step: int) -> Work:
    """Return the work, killed before its `step`th change of the deployment folder, and after half of each line."""

    def doomed(place: Path) -> None:
        left = step

        def counted(function: Any, before: Callable[..., Any] | None = None) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    if before is not None:
                        before(*arguments)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        write = os.write
        folders.fsync = histories.fsync = counted(folders.fsync)  # type: ignore[attr-defined]
        switch = folders.DeploymentFolder.switch

        def switching(*arguments: Any) -> Any:
            kept = os.symlink, os.rename, os.replace, os.write
            os.symlink, os.rename, os.replace = counted(os.symlink), counted(os.rename), counted(os.replace)
            os.write = counted(write, lambda descriptor, line: write(descriptor, line[: len(line) // 2]))
            try:
                return switch(*arguments)
            finally:
                os.symlink, os.rename, os.replace, os.write = kept

        folders.DeploymentFolder.switch = switching  # type: ignore[method-assign, assignment]
        work(place)

    return doomed


def trial(work: Work, again: Work, pristine: Path, place: Path, seconds: float | None) -> dict[str, Any]:
    """Kill the work once; say what is there afterwards, and after the same work was done again by who comes next."""
    shutil.copytree(pristine, place, symlinks=True)
    killed, took = fork(work, place, seconds)
    target = (place / "current").readlink()
    found = history(place, verify="full")
    result = {
        "killed": killed,
        "seconds": took,
        "points_to": target.name,
        "whole": target.name in found.verified,
        "torn": found.torn_bytes,
        "unfinished": found.unfinished,
    }
    fork(again, place, None)
    after = history(place, verify="full")
    left = {path.name for path in place.iterdir()} - {"current", "versions", "history.jsonl"}
    result |= {
        "then": after.current,
        "left": sorted(name for name in left if not name.endswith(".lock") and name != ".staging"),
        "dropped": sum(entry.dropped is not None for entry in after.entries),
    }
    shutil.rmtree(place)
    return result


def main() -> None:
    """Run the trials of one kind of work."""
    kind, pristine, organ, gates, scratch, count = sys.argv[1:]
    opened = open_organ(organ)

    works: dict[str, Work] = {
        "deploy": lambda place: deploy(one_more(opened, place), to=place, gates=gates, mode="insert", at=1),
        "rollback": go_back,
    }
    work, place = works[kind], Path(scratch) / "place"
    shutil.copytree(pristine, place, symlinks=True)
    works["deploy"](place)  # loads everything that children then need not load
    shutil.rmtree(place)
    shutil.copytree(pristine, place, symlinks=True)
    whole = min(fork(works[kind], place, None)[1] for _ in range(3))
    shutil.rmtree(place)
    chance, random_moments = random.Random(0), list[dict[str, Any]]()
    for _ in range(20 * int(count)):  # some moments come after the end of the work
        random_moments.append(trial(work, work, Path(pristine), place, chance.uniform(0, whole)))
        if sum(moment["killed"] for moment in random_moments) == int(count):
            break
    steps: list[dict[str, Any]] = []
    while not steps or steps[-1]["killed"]:
        steps.append(trial(dying(work, len(steps) + 1), go_back, Path(pristine), place, None))
    json.dump({"whole": whole, "random": random_moments, "steps": steps}, sys.stdout)


if __name__ == "__main__":
    main()
