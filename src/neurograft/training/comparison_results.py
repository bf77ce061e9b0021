"""What a comparison found: its schema, and runs reduced to means and spreads over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from neurograft.training.baselines import Method
from neurograft.training.measuring import Measured
from neurograft.training.search import Settings

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trial(_Part):
    """One try of the search: a shorter run, judged on the validation text."""

    method: str
    settings: Settings
    perplexity: float | None
    """On the validation text; `None` where the try failed."""
    seconds: float | None
    """Of training; `None` where the try failed."""
    error: str | None = None
    chosen: bool = False


class Run(_Part):
    """One measured run, with the settings that the search chose."""

    method: str
    seed: int
    measured: Measured | None
    """`None` where the run failed."""
    error: str | None = None


class Spread(_Part):
    """One figure over the runs with different seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; `None` for a single run."""
    low: float
    high: float


class Reached(_Part):
    """How long one method took to another one's final quality."""

    runs: int
    """How many of the method's runs came there at all."""
    seconds: Spread | None
    """Of training until the first held-out evaluation that was as good; `None` if no run came there."""


class MethodReport(_Part):
    """What one method came to, over its seeds."""

    method: str
    settings: Settings
    """What the search chose."""
    runs: int
    failed: int
    perplexity: dict[str, Spread]
    """On `validation` (which chose the settings and the best weights), `domain` and, where given, `general` text."""
    seconds: Spread | None
    """Of training: caching of hidden states included, held-out evaluations and loading of the model not."""
    seconds_with_evaluations: Spread | None
    seconds_to: dict[str, Reached]
    """Method -> how long this one took to that one's mean final perplexity, on the validation text."""
    memory_beyond_model: Spread | None
    """Bytes: the peak while training, less what the process held once the model was loaded."""
    memory_with_model: Spread | None
    """Bytes: the peak of the whole process (on GPUs: of what torch allocated)."""
    trainable_parameters: int
    trainable_bytes: int
    shipped_bytes: int
    """The organ's file, the adapter's two files, or all weights of a fully tuned model."""
    tokens_seen: int
    """Tokens with a loss, repeats counted again; the same for every method."""


class Comparison(_Part):
    """Everything that `compare` found."""

    schema_version: int = SCHEMA_VERSION
    model: str
    tokens: int
    """The budget of each measured run."""
    search_tokens: int
    """The budget of each trial."""
    trials_each: int
    seeds: list[int]
    steps: int
    """Optimizer steps of each measured run."""
    passes: float
    """Through the training text, in each measured run."""
    options: dict[str, Any]
    """Training options, the same for all methods."""
    documents: dict[str, int]
    """How many there are to train on, of validation, of domain (test) and of general text."""
    trained_on: dict[str, int] = {}
    """Text that is evaluated -> how many of its documents are in the training text too, where that is any."""
    evaluated_tokens: dict[str, int] = {}
    """Text that is evaluated -> how many tokens its perplexities are over."""
    fingerprints: dict[str, str]
    """SHA-256 of each of these texts."""
    untrained: dict[str, float]
    """Perplexities of the model as it is."""
    methods: list[MethodReport]
    trials: list[Trial]
    runs: list[Run]
    versions: dict[str, str]
    machine: str


def summaries(methods: list[Method], trials: list[Trial], runs: list[Run]) -> list[MethodReport]:
    """Reduce runs to what each method came to, over its seeds.

    Args:
        methods: The methods, in order.
        trials: Every try of the search, one of each method chosen.
        runs: Every measured run.
    """
    worked = {m.name: [r.measured for r in runs if r.method == m.name and r.measured is not None] for m in methods}
    targets = {
        name: statistics.fmean(run.perplexity["validation"] for run in done) for name, done in worked.items() if done
    }
    return [
        _summary(
            method.name,
            next(trial.settings for trial in trials if trial.method == method.name and trial.chosen),
            worked[method.name],
            sum(run.method == method.name for run in runs),
            targets,
        )
        for method in methods
    ]


def _summary(
    name: str, settings: Settings, done: list[Measured], asked: int, targets: dict[str, float]
) -> MethodReport:
    first = done[0] if done else Measured(perplexity={})
    return MethodReport(
        method=name,
        settings=settings,
        runs=len(done),
        failed=asked - len(done),
        perplexity={text: spread_of([run.perplexity[text] for run in done]) for text in first.perplexity},
        seconds=_spread([run.seconds for run in done]),
        seconds_with_evaluations=_spread([run.seconds_with_evaluations for run in done]),
        seconds_to={other: _reached(done, target) for other, target in targets.items()},
        memory_beyond_model=_spread([run.memory_beyond_model for run in done]),
        memory_with_model=_spread([run.memory_with_model for run in done]),
        trainable_parameters=first.trainable_parameters,
        trainable_bytes=first.trainable_bytes,
        shipped_bytes=first.shipped_bytes,
        tokens_seen=first.tokens_seen,
    )


def spread_of(values: Sequence[float]) -> Spread:
    """Reduce one figure of several runs, at least one."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, low=min(values), high=max(values))


def _spread(values: Sequence[float]) -> Spread | None:
    return spread_of(values) if values else None


def _reached(runs: list[Measured], target: float) -> Reached:
    """Say when runs first were as good as `target`, a perplexity on the validation text."""
    seconds = []
    for run in runs:
        times = [point.seconds for point in run.curve if point.perplexity <= target] if run.curve_counts else []
        if not run.curve_counts and run.perplexity["validation"] <= target:
            times = [run.seconds]
        if times:
            seconds.append(min(times))
    return Reached(runs=len(seconds), seconds=_spread(seconds))
