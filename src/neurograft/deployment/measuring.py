"""What the new model and those that it is compared with do on the gates' data, one model in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neurograft import data as text_data
from neurograft.deployment.deciding import Answers, judge_perplexity, judge_retention, judge_task
from neurograft.deployment.entries import GateVerdict
from neurograft.deployment.gates import Gates, PerplexityGate, RetentionGate, TaskGate
from neurograft.deployment.harness import answer_tasks, check_tasks
from neurograft.errors import DataError
from neurograft.evaluation import DEFAULT_LENGTH, Progress, Scores, first_documents, load_to_score, score_documents
from neurograft.evaluation import token_counter as counter_of
from neurograft.models import ModelDirectory, fit_sequence_length, load_config, load_tokenizer, resolve

log = logging.getLogger("neurograft")


@dataclass(frozen=True)
class Measured:
    """What one model did."""

    scores: Mapping[str, Scores]
    """Gate -> losses of its documents."""
    answers: Mapping[str, Answers]
    """Gate -> scores of its questions."""


def read_texts(gates: Gates) -> dict[str, list[str]]:
    """Read the documents of every gate that has some, and find the tasks of the others.

    Raises:
        GateError, DataError: Something that a gate needs is missing.
    """
    check_tasks(gates)
    return {name: _read_text(name, gate, gates) for name, gate in gates.gates.items() if not isinstance(gate, TaskGate)}


def _read_text(name: str, gate: PerplexityGate | RetentionGate, gates: Gates) -> list[str]:
    try:
        return text_data.read_documents(
            gates.paths(gate),
            text_column=gate.text_column,
            document_separator=gate.document_separator,
            encoding=gate.encoding,
        )
    except DataError as error:
        raise DataError(f"the gate {name} can't be measured: {error}") from error


def measure(
    versions: Mapping[str, Path],
    gates: Gates,
    texts: Mapping[str, list[str]],
    *,
    trust_remote_code: bool,
    progress: Progress | None,
) -> dict[str, Measured]:
    """Measure models on the data of all gates.

    Args:
        versions: Name -> folder; the first is the new one.
        gates: The gates file.
        texts: See `read_texts`.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all).

    Raises:
        ModelError, DataError, GateError: Something can't be measured.
    """
    directories = {name: resolve(path, trust_remote_code=trust_remote_code) for name, path in versions.items()}
    length = min(
        fit_sequence_length(
            gates.settings.sequence_length,
            DEFAULT_LENGTH,
            load_config(directory, trust_remote_code=trust_remote_code),
            name,
        )
        for name, directory in directories.items()
    )
    chosen = _first(next(iter(directories.values())), gates, texts, trust_remote_code)
    found = {}
    for number, (name, directory) in enumerate(directories.items()):
        log.info("measuring %s", name)
        model, tokenizer = loaded = load_to_score(directory, trust_remote_code)
        settings = {
            "sequence_length": length,
            "batch_size": gates.settings.batch_size,
            "progress": counter_of(progress, chosen, tokenizer, number, len(directories)),
        }
        scores = {
            gate: score_documents(model, tokenizer, gate, documents, name, settings)
            for gate, documents in chosen.items()
        }
        found[name] = Measured(scores, answer_tasks(loaded, gates))
        del model, loaded
    return found


def _first(
    directory: ModelDirectory, gates: Gates, texts: Mapping[str, list[str]], trust_remote_code: bool
) -> dict[str, list[str]]:
    """Return as much of the texts as the gates allow."""
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    limits = {name: getattr(gates.gates[name], "max_tokens", None) for name in texts}
    return {name: first_documents(documents, tokenizer, limits[name]) for name, documents in texts.items()}


def judge(new: str, current: str, base: str, measured: Mapping[str, Measured], gates: Gates) -> list[GateVerdict]:
    """Hold what was measured against every gate.

    Args:
        new: Name of the new version in `measured`.
        current: Name of what is deployed.
        base: Name of what the deployment started from.
        measured: See `measure`.
        gates: The gates file.
    """
    verdicts: list[GateVerdict] = []
    for name, gate in gates.gates.items():
        against = current if gate.against == "current" else base
        own, other = measured[new], measured[against]
        if isinstance(gate, PerplexityGate):
            verdict = judge_perplexity(name, gate, own.scores[name], other.scores[name], against, gates.settings)
        elif isinstance(gate, RetentionGate):
            verdict = judge_retention(name, gate, own.scores[name], other.scores[name], against, gates.settings)
        else:
            verdict = judge_task(name, gate, own.answers[name], other.answers[name], against, gates.settings)
        verdicts.append(verdict)
    return verdicts


def needed(current: str, base: str, gates: Gates) -> Sequence[str]:
    """Return the versions that the gates compare with."""
    return list(dict.fromkeys(current if gate.against == "current" else base for gate in gates.gates.values()))
