"""Gates by lm-evaluation-harness itself, on a local task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments import one_more
from neurograft import deploy
from neurograft.deployment.gates import read_gates
from neurograft.deployment.harness import check_tasks
from neurograft.errors import GateError
from neurograft.organ import Organ

pytest.importorskip("lm_eval")

TASK = """task: local_letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [{"question": f"what is {n}", "choices": ["yes", "no", "12"], "answer": n % 3} for n in range(9)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "letters.yaml").write_text(TASK.format(questions=folder / "q.jsonl"))
    return tmp_path


def _gates(folder: Path, **values: object) -> Path:
    gate = {"metric": "task", "task": "local_letters", "tasks_from": "tasks", **values}
    (folder / "gates.yaml").write_text(json.dumps({"gates": {"letters": gate}}))
    return folder / "gates.yaml"


def test_a_local_task_is_answered_by_both_models(
    tasks: Path,
    hospital: Path,
    organ: Organ,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    report = deploy(
        one_more(organ, hospital), to=hospital, gates=_gates(tasks, score="acc", questions=6), mode="insert"
    )
    printed = capfd.readouterr()
    assert printed.out == ""  # which --json needs for itself
    assert "loglikelihood" not in printed.err and "not a git" not in printed.err
    gate = report.gates[0]
    assert report.deployed and gate.items == 6 and gate.against == "0002-tiny"
    assert gate.better is not None and gate.worse is not None and gate.baseline is not None
    assert gate.value - gate.baseline == pytest.approx((gate.better - gate.worse) / 6)
    with pytest.raises(GateError, match="letters has no score 'bleu' for single questions; known are acc, acc_norm"):
        deploy(one_more(organ, hospital), to=hospital, gates=_gates(tasks, score="bleu"), mode="insert")


def test_unknown_tasks_are_refused(tasks: Path) -> None:
    with pytest.raises(
        GateError, match=r"names the task 'no_such', which is not in lm-evaluation-harness or in .*tasks"
    ):
        check_tasks(read_gates(_gates(tasks, task="no_such")))
    with pytest.raises(GateError, match=r"takes tasks from .*absent, which is no folder"):
        check_tasks(read_gates(_gates(tasks, tasks_from="absent")))


def test_without_the_harness_the_extra_is_named(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(GateError, match=r"pip install 'neurograft\[gates\]'"):
        check_tasks(read_gates(_gates(tasks)))
