"""What processes that import little of torch answer, beside what everything answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Factory
from neurograft import studies
from neurograft.errors import ModelError
from neurograft.models import resolve
from tiny import CONFIGS, FURTHER

Patch = pytest.MonkeyPatch

_PROGRAM = """
import json, sys
from pathlib import Path
from neurograft import studies
from neurograft.models import ModelDirectory
kind, *folders = sys.argv[1:]
studies._IMPORTS[kind]()
status = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1000
answer = studies._ANSWERS["tokenizer" if kind == "tokenizer" else "model"]
answers = [answer(ModelDirectory(Path(folder), "m"), False) for folder in folders]
print(json.dumps([[json.loads(answer.model_dump_json()) for answer in answers], status()]))
"""


def _answers(kind: str, folders: list[Path]) -> tuple[list[dict[str, Any]], int]:
    command = [sys.executable, "-c", _PROGRAM, kind, *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, megabytes = json.loads(done.stdout.splitlines()[-1])
    return answers, megabytes


def test_processes_that_import_little_answer_alike_for_every_architecture(model_directory: Factory) -> None:
    folders = [model_directory(kind, seed=0) for kind in [*CONFIGS, *FURTHER]]
    lean, _ = _answers("skeleton", folders)
    for folder, answer in zip(folders, lean, strict=True):
        here = studies._answer_model(resolve(folder), False)
        assert answer == json.loads(here.model_dump_json()), folder.name


def test_a_study_takes_less_than_300_megabytes(recipient: Path) -> None:
    (_,), megabytes = _answers("skeleton", [recipient])
    assert megabytes < 300
    (found,), megabytes = _answers("tokenizer", [recipient])
    assert found == json.loads(studies._answer_tokenizer(resolve(recipient), False).model_dump_json())
    assert megabytes < 150


@pytest.fixture
def elsewhere(monkeypatch: Patch, tmp_path: Path) -> None:
    """Questions go to other processes, although this one could answer them."""
    monkeypatch.setattr(studies, "_answers_here", lambda: False)
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("elsewhere")
def test_what_a_lean_process_can_not_answer_is_asked_again(recipient: Path, monkeypatch: Patch) -> None:
    asked: list[str] = []

    class Failing(studies._Helper):
        def __init__(self, kind: Any) -> None:
            asked.append(kind)
            super().__init__(kind if kind == "whole" else "no such kind")  # type: ignore[arg-type]

    monkeypatch.setattr(studies, "_Helper", Failing)
    with studies.studying():
        assert studies.study_model(resolve(recipient)) == studies._answer_model(resolve(recipient), False)
    assert asked == ["skeleton", "whole"]


@pytest.mark.usefixtures("elsewhere")
def test_a_model_and_its_tokenizer_are_studied_once(recipient: Path, tmp_path: Path) -> None:
    with studies.studying():
        first = studies.study_all(resolve(recipient))
        assert set(studies._helpers[-1]) == {"skeleton", "tokenizer"}
    with studies.studying():
        assert studies.study_all(resolve(recipient)) == first
        assert studies._helpers[-1] == {}
    assert len(list((tmp_path / "cache" / "studies").iterdir())) == 2


@pytest.mark.usefixtures("elsewhere")
def test_refusals_come_from_a_process_that_has_everything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with studies.studying(), pytest.raises(ModelError, match="t5 is an encoder-decoder model"):
        studies.study_model(resolve(tmp_path))
