"""What a study found: its schema, and runs reduced to means and spreads over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from neurograft.training.comparison_results import Spread, spread_of

SCHEMA_VERSION = 1
UNTRAINED, NO_ORGAN = "untrained insert", "no organ"
CONTROLS = (UNTRAINED, NO_ORGAN)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GapPoint(_Part):
    """One evaluation while a model trains on the target text."""

    step: int
    training: float
    """Perplexity on a sample of the text that it trains on."""
    held_out: float
    """Perplexity on text of the same domain that it does not train on."""

    @property
    def gap(self) -> float:
        """How much more the held-out text costs, in nats per token."""
        return math.log(self.held_out / self.training)


class ArmRun(_Part):
    """One arm with one seed."""

    arm: str
    seed: int
    points: list[GapPoint]
    best: float | None
    """Held-out perplexity of the best weights on the way; `None` where the run failed."""
    error: str | None = None


class ArmSummary(_Part):
    """What one arm came to, over its seeds."""

    arm: str
    runs: int
    start: Spread | None
    """Held-out perplexity before the first step."""
    end: Spread | None
    """Held-out perplexity after the last one."""
    best: Spread | None
    """Held-out perplexity of the best weights on the way."""
    gap: Spread | None
    """After the last step: held-out loss less training loss, nats per token."""
    against: dict[str, Spread] = {}
    """Control -> this arm's best held-out loss less the control's with the same seed, nats per token."""
    lower: dict[str, int] = {}
    """Control -> in how many seeds it is lower."""


class CrossDomainReport(_Part):
    """Everything that `study cross-domain` found."""

    schema_version: int = SCHEMA_VERSION
    study: Literal["cross-domain"] = "cross-domain"
    model: str
    layer_count: int
    layers: int
    """How many an organ has."""
    position: int
    """Where organs are inserted; without an organ, as many of the model's own layers from there train."""
    domains: list[str]
    """What organs were trained on before."""
    organ_tokens: int
    """Training tokens of each organ, on its own domain."""
    target_tokens: int
    """How many different tokens of the target text there are to train on."""
    tokens: int
    """Training tokens of each run on the target text, repeats counted again."""
    steps: int
    seeds: list[int]
    options: dict[str, Any]
    arms: list[ArmSummary]
    runs: list[ArmRun]
    versions: dict[str, str]
    machine: str

    def regularises(self, arm: str) -> bool:
        """Say whether an organ's best held-out loss is lower than both controls' with every seed."""
        (found,) = (each for each in self.arms if each.arm == arm)
        return bool(found.runs) and all(found.lower.get(control) == len(self.seeds) for control in CONTROLS)


def summarise(arms: Sequence[str], runs: Sequence[ArmRun]) -> list[ArmSummary]:
    """Reduce runs to what each arm came to.

    Args:
        arms: Names, in order.
        runs: One for each arm and seed; those that failed count as not there.
    """
    best = {arm: {run.seed: run.best for run in runs if run.arm == arm and run.best is not None} for arm in arms}
    return [_summary(arm, best, [run for run in runs if run.arm == arm and run.points]) for arm in arms]


def _summary(arm: str, best: dict[str, dict[int, float]], runs: Sequence[ArmRun]) -> ArmSummary:
    mine = best[arm]
    against: dict[str, list[float]] = {}
    for control in CONTROLS:
        both = sorted(mine.keys() & best[control].keys()) if control != arm else []
        if both:
            against[control] = [math.log(mine[seed] / best[control][seed]) for seed in both]
    last = [run.points[-1] for run in runs]
    return ArmSummary(
        arm=arm,
        runs=len(mine),
        start=_spread([run.points[0].held_out for run in runs]),
        end=_spread([point.held_out for point in last]),
        best=_spread(list(mine.values())),
        gap=_spread([point.gap for point in last]),
        against={control: spread_of(values) for control, values in against.items()},
        lower={control: sum(value < 0 for value in values) for control, values in against.items()},
    )


def _spread(values: Sequence[float]) -> Spread | None:
    return spread_of(values) if values else None
