"""Killed at any moment, a deployment or rollback leaves `current` at a whole, verified model; the next one works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import OFFLINE
from deployments import write_gates
from neurograft.organ import Organ

HERE = Path(__file__).resolve().parent
MOMENTS = 8


@pytest.fixture(params=["deploy", "rollback"])
def trials(request: pytest.FixtureRequest, hospital: Path, tmp_path: Path, organ: Organ) -> dict[str, Any]:
    organ.save(tmp_path / "organ.safetensors")
    words = [request.param, hospital, tmp_path / "organ.safetensors", write_gates(tmp_path), tmp_path, MOMENTS]
    ran = subprocess.run(
        [sys.executable, str(HERE / "killed.py"), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{OFFLINE}"},
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found | {"kind": request.param}


def test_current_is_whole_whenever_it_is_killed(trials: dict[str, Any]) -> None:
    deploying = trials["kind"] == "deploy"
    before, after = ("0002-tiny", "0003-tiny-2") if deploying else ("0002-tiny", "0001-")
    assert sum(trial["killed"] for trial in trials["random"]) == MOMENTS
    for trial in [*trials["random"], *trials["steps"]]:
        assert trial["whole"] and trial["points_to"].startswith((before, after)), trial
        assert not trial["left"], trial
        assert trial["dropped"] == (trial["torn"] > 0), trial
    killed = [trial for trial in trials["steps"] if trial["killed"]]
    assert len(killed) >= (7 if deploying else 5)
    # Each of the states in between was met: nothing decided, half a line, decided but not switched, switched.
    assert killed[0]["points_to"] == before and not killed[0]["unfinished"]
    assert any(trial["torn"] for trial in killed)
    assert any(trial["unfinished"] and trial["points_to"] == before for trial in killed)
    assert any(trial["points_to"].startswith(after) and not trial["unfinished"] for trial in killed)
