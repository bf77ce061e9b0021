"""Tasks of lm-evaluation-harness, by the harness itself, with a score for each question."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from neurograft.deployment.deciding import Answers
from neurograft.deployment.gates import Gates, TaskGate
from neurograft.errors import GateError

if TYPE_CHECKING:
    from neurograft.evaluation import LoadedModel


log = logging.getLogger("neurograft")

_STDERR = 2


def task_gates(gates: Gates) -> dict[str, TaskGate]:
    """Return the gates that need the harness."""
    return {name: gate for name, gate in gates.gates.items() if isinstance(gate, TaskGate)}


def check_tasks(gates: Gates) -> None:
    """Find the tasks before anything is written.

    Raises:
        GateError: The harness is not installed, or has no such task.
    """
    _managers.clear()
    for name, gate in task_gates(gates).items():
        manager = _manager(gates, name, gate)
        if not manager.match_tasks([gate.task]):
            where = f" or in {gates.folder / gate.tasks_from}" if gate.tasks_from else ""
            raise GateError(
                f"the gate {name} names the task {gate.task!r}, which is not in lm-evaluation-harness{where}; "
                "`lm-eval ls tasks` lists what there is."
            )


def answer_tasks(loaded: LoadedModel, gates: Gates) -> dict[str, Answers]:
    """Let one model answer every task.

    Args:
        loaded: Model and tokenizer.
        gates: The gates file.

    Returns:
        Gate -> answers.

    Raises:
        GateError: A task can't be run, or has no such score for single questions.
    """
    return {name: _answer(loaded, gates, name, gate) for name, gate in task_gates(gates).items()}


_managers: dict[Path | None, Any] = {}


def _manager(gates: Gates, name: str, gate: TaskGate) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise GateError(
            f"the gate {name} needs lm-evaluation-harness; install it with: pip install 'neurograft[gates]'."
        ) from error
    folder = gates.folder / gate.tasks_from if gate.tasks_from else None
    if folder is not None and not folder.is_dir():
        raise GateError(f"the gate {name} takes tasks from {folder}, which is no folder.")
    if folder not in _managers:
        with _quiet():  # it reads thousands of task files, which takes seconds
            _managers[folder] = TaskManager(include_path=str(folder) if folder else None)
    return _managers[folder]


def _answer(loaded: LoadedModel, gates: Gates, name: str, gate: TaskGate) -> Answers:
    manager = _manager(gates, name, gate)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = loaded
    log.info("asking the questions of %s", gate.task)
    try:
        with _quiet():
            results = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=gates.settings.batch_size),
                tasks=[gate.task],
                task_manager=manager,
                num_fewshot=gate.shots,
                limit=gate.questions,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=gates.settings.seed,
                numpy_random_seed=gates.settings.seed,
                torch_random_seed=gates.settings.seed,
                fewshot_random_seed=gates.settings.seed,
            )
    except Exception as error:  # what a task raises is the task's own
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise GateError(f"the task {gate.task} of the gate {name} can't be run: {first}.") from error
    return _answers(name, gate, results or {})


def _answers(name: str, gate: TaskGate, results: Mapping[str, Any]) -> Answers:
    """Take the score of each question out of what the harness returns; those of a group's tasks are put together."""
    samples = {task: found for task, found in results.get("samples", {}).items() if found}
    if not samples:
        raise GateError(f"the task {gate.task} of the gate {name} asked no question.")
    first = next(iter(samples.values()))[0]
    known = [key for key in first["metrics"] if isinstance(first.get(key), int | float)]
    score = gate.score or (known[0] if known else "")
    if score not in known:
        raise GateError(
            f"the task {gate.task} of the gate {name} has no score {score!r} for single questions; known are "
            f"{', '.join(known) or 'none'}."
        )
    values, questions = [], []
    for task, found in sorted(samples.items()):
        chosen = found[0]["filter"]
        for sample in sorted((item for item in found if item["filter"] == chosen), key=lambda item: item["doc_id"]):
            if not isinstance(sample.get(score), int | float):
                raise GateError(f"the task {task} of the gate {name} has no score {score!r} for single questions.")
            values.append(float(sample[score]))
            questions.append(f"{task}/{sample['doc_id']}/{sample['doc_hash']}")
    higher = all(_higher_is_better(results, task, score) for task in samples)
    if gate.at_least is not None and not higher:
        raise GateError(f"the gate {name} has at_least, and of {score} less is better.")
    return Answers(score, numpy.array(values), tuple(questions), higher)


def _higher_is_better(results: Mapping[str, Any], task: str, score: str) -> bool:
    return bool(results.get("higher_is_better", {}).get(task, {}).get(score, True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from logging about each task it finds, and its bars, which it and git draw, off files."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if os.isatty(_STDERR) else _silent():
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what this process and those that it starts write to standard error."""
    kept = os.dup(_STDERR)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), _STDERR)
            yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
