"""What the study of the paper's questions found: its schema, and how tokens are divided among its runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from neurograft.composition_report import CompositionReport, Score
from neurograft.errors import UsageError
from neurograft.placement.results import Place, ScanReport
from neurograft.study.results import CrossDomainReport, _Part
from neurograft.training.comparison_results import Comparison

SCHEMA_VERSION = 1
METHODS = ("organ", "standalone", "lora", "full")
"""What is compared: an organ trained in place, the paper's own protocol, LoRA and all weights."""
# Fewer steps than this in the shortest runs say nothing.
_FEWEST_STEPS = 2


@dataclass(frozen=True)
class Shares:
    """How many training tokens each run gets."""

    run: int
    """An organ, a sibling, a measured run of a comparison or of the cross-domain question."""

    @property
    def recovery(self) -> int:
        """At one position."""
        return self.run // 2

    @property
    def trial(self) -> int:
        """Of a search; there is as much text in the small domain of the cross-domain question."""
        return self.run // 4


class PositionStudy(_Part):
    """One domain's organ, trained standalone, at positions all over the model."""

    domain: str
    as_it_comes: ScanReport
    recovered: ScanReport
    """After a short recovery at each position."""
    control: ScanReport
    """Layers that do nothing yet in the organ's place, after the same recovery."""

    def pairs(self) -> list[tuple[Place, Place]]:
        """Return each position's organ and control, both after recovery, where both could be measured."""
        controls = {place.position: place for place in self.control.places if place.domain is not None}
        return [
            (place, controls[place.position])
            for place in self.recovered.places
            if place.domain is not None and place.position in controls
        ]


class Transfer(_Part):
    """One domain's organ, trained in place, in its own host and in a sibling."""

    domain: str
    tuned_on: str
    """What all layers of the sibling were trained on."""
    home: CompositionReport
    away: CompositionReport

    def scores(self) -> tuple[Score, Score]:
        """Return the organ's score on its domain at home, and away."""
        home, away = (
            next(row.scores[self.domain] for row in report.rows if row.organs) for report in (self.home, self.away)
        )
        return home, away

    @property
    def kept(self) -> float | None:
        """Share of the gain at home, in nats, that is also had away; `None` where there is no gain at home."""
        home, away = self.scores()
        return math.log(away.ratio) / math.log(home.ratio) if home.ratio < 1 else None


class PaperReport(_Part):
    """Everything that `study paper` found."""

    schema_version: int = SCHEMA_VERSION
    study: Literal["paper"] = "paper"
    model: str
    layer_count: int
    layers: int
    """How many an organ has."""
    domains: list[str]
    tokens: int
    """The budget of all training together."""
    run_tokens: int
    """What an organ, or a measured run, got of it."""
    recovery_tokens: int
    """What a recovery at one position got of it."""
    seeds: list[int]
    """Of the comparison and the cross-domain question; everything else ran once."""
    options: dict[str, Any]
    positions: list[PositionStudy]
    transfers: list[Transfer]
    together: CompositionReport
    comparisons: dict[str, Comparison]
    cross_domain: CrossDomainReport
    date: str
    """When it was finished, YYYY-MM-DD."""
    seconds: float
    """Since the command was started, what earlier ones of it had done not counted."""
    versions: dict[str, str]
    machine: str


def divide(tokens: int, *, domains: int, crossed: int, positions: int, seeds: int, trials: int, step: int) -> Shares:
    """Divide a budget among all runs.

    Args:
        tokens: The budget.
        domains: How many there are.
        crossed: How many have an organ in the cross-domain question.
        positions: How many are tried.
        seeds: Runs of each method and arm.
        trials: Settings tried for each method; 1 is not tried but taken.
        step: Tokens of an optimizer step.

    Raises:
        UsageError: It is too small.
    """
    organs, siblings, compared = 2 * domains, domains, domains * len(METHODS) * seeds
    whole = organs + siblings + compared + seeds * (2 * crossed + 2)  # an organ and an arm of each, and two controls
    recoveries, searched = 2 * domains * positions, domains * len(METHODS) * (trials if trials > 1 else 0)
    runs = whole + recoveries / 2 + searched / 4
    shares = Shares(int(tokens / runs) // step * step)
    least = 4 * _FEWEST_STEPS * step
    if shares.run < least:
        raise UsageError(
            f"{tokens:,} tokens are too few: they are divided among {whole} runs, {recoveries} recoveries and "
            f"{searched} trials, and a run would have {shares.run}; give at least {math.ceil(runs * least):,}, or "
            "fewer seeds, trials or positions."
        )
    return shares
