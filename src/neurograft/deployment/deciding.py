"""Whether a gate holds, from what two models did with the same documents or questions."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy

from neurograft.deployment.entries import GateVerdict
from neurograft.deployment.gates import GateSettings, PerplexityGate, RetentionGate, TaskGate
from neurograft.errors import DataError
from neurograft.placement.statistics import mean_intervals, ratio_intervals

if TYPE_CHECKING:
    from neurograft.evaluation import Scores

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Limits:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def text(self, form: str = ".4g") -> str:
        """Render it for people."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Answers:
    """One model's scores on the questions of a task."""

    score: str
    """What the numbers are, such as `acc`."""
    values: numpy.ndarray
    """(N,) one a question."""
    questions: tuple[str, ...]
    """What tells the questions apart."""
    higher_is_better: bool

    @property
    def right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1."""
        return bool(numpy.isin(self.values, (0.0, 1.0)).all())


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Questions on which both models do the same say nothing; if the models were as good, either would be as likely to be
    the better one on each of the others.

    Args:
        better: Questions that only the first answers rightly.
        worse: Questions that only the second answers rightly.
    """
    count, fewer = better + worse, min(better, worse)
    ways = term = 1
    for number in range(fewer):
        term = term * (count - number) // (number + 1)
        ways += term
    return min(1.0, 2 * ways / 2**count)


def paired_difference(better: int, worse: int, questions: int, confidence: float) -> Limits:
    """Return the difference of two shares of right answers to the same questions, with its interval.

    The interval is that of Agresti and Min (2005): half a question is added to each of the four kinds of outcome, which
    keeps it honest where few questions differ or none.
    """
    total = questions + 2
    middle, apart = (better - worse) / total, (better + worse + 1) / total
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(max(apart - middle**2, 0) / total)
    return Limits((better - worse) / questions, max(middle - reach, -1), min(middle + reach, 1))


def share(right: int, questions: int, confidence: float) -> Limits:
    """Return a share with its interval, by Wilson (1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    value, scale = right / questions, 1 + z**2 / questions
    middle = (value + z**2 / (2 * questions)) / scale
    reach = z / scale * math.sqrt(value * (1 - value) / questions + z**2 / (4 * questions**2))
    return Limits(value, middle - reach, middle + reach)


def judge_perplexity(
    name: str, gate: PerplexityGate, own: Scores, other: Scores, against: str, settings: GateSettings
) -> GateVerdict:
    """Decide on a limit of perplexity: the whole interval has to keep it."""
    limit = gate.parsed(name)
    measured = _ratio(name, own, other if limit.of_baseline else None, settings)
    keeps = _OPERATORS[limit.comparison]
    passed = keeps(measured.low, limit.factor) and keeps(measured.high, limit.factor)
    what = f"times that of {against}" if limit.of_baseline else "as such"
    reason = (
        f"the perplexity, {what}, is {measured.text()} and has to be {limit.comparison} {limit.factor:g}"
        f"{_doubt(passed, keeps(measured.value, limit.factor))}"
    )
    return _of_text(name, gate, own, other, against if limit.of_baseline else None, measured, passed, reason)


def judge_retention(
    name: str, gate: RetentionGate, own: Scores, other: Scores, against: str, settings: GateSettings
) -> GateVerdict:
    """Decide on what was forgotten: the whole interval of the ratio has to be below 1 + tolerance."""
    measured, limit = _ratio(name, own, other, settings), 1 + gate.tolerance
    passed = measured.high <= limit
    reason = (
        f"general perplexity is {measured.text()} times that of {against} and may be up to {limit:g} times"
        f"{_doubt(passed, measured.value <= limit)}"
    )
    return _of_text(name, gate, own, other, against, measured, passed, reason)


def _ratio(name: str, own: Scores, other: Scores | None, settings: GateSettings) -> Limits:
    """Return the ratio of two perplexities on the same documents, or one perplexity, with its interval.

    Raises:
        DataError: There are too few documents for an interval, or the models don't score the same tokens.
    """
    if len(own.losses) < 2:
        raise DataError(f"the data of the gate {name} is one document, and intervals need at least 2; add more.")
    if other is not None and (own.tokens != other.tokens).any():
        raise DataError(f"the two models cut the data of the gate {name} into different tokens.")
    reference = numpy.zeros(len(own.losses)) if other is None else other.losses
    found = ratio_intervals(own.losses[None], reference, own.tokens, error=1 - settings.confidence, seed=settings.seed)
    return Limits(float(found.ratio[0]), float(found.low[0]), float(found.high[0]))


def _of_text(
    name: str, gate: Any, own: Scores, other: Scores, against: str | None, measured: Limits, passed: bool, reason: str
) -> GateVerdict:
    return GateVerdict(
        name=name, metric=gate.metric, passed=passed, reason=reason + ".", against=against, items=len(own.losses),
        value=own.perplexity, baseline=other.perplexity if against else None, effect=measured.value, low=measured.low,
        high=measured.high,
    )  # fmt: skip


def _doubt(passed: bool, value_keeps: bool) -> str:
    return "" if passed or not value_keeps else ", which the interval leaves open: more documents may show it"


def judge_task(
    name: str, gate: TaskGate, own: Answers, other: Answers, against: str, settings: GateSettings
) -> GateVerdict:
    """Decide on a task: by McNemar's test where answers are right or wrong, by a paired bootstrap where they are not.

    Raises:
        DataError: The two models were not asked the same questions.
    """
    if own.questions != other.questions:
        raise DataError(f"the two models were not asked the same questions of the gate {name}.")
    sign = 1 if own.higher_is_better else -1
    counts: dict[str, Any] = {}
    if own.right_or_wrong and other.right_or_wrong:
        gained = sign * (own.values - other.values)
        better, worse = int((gained > 0).sum()), int((gained < 0).sum())
        p = mcnemar(better, worse)
        counts = {"better": better, "worse": worse, "p_value": p}
        difference = paired_difference(better, worse, len(gained), settings.confidence)
        shown = p < 1 - settings.confidence and better != worse
        evidence = f"{better} better and {worse} worse of {len(gained)} questions, exact McNemar p = {p:.3g}"
    else:
        difference = _mean(sign * (own.values - other.values), settings)
        shown = not difference.low <= 0 <= difference.high
        evidence = f"{len(own.values)} questions, paired bootstrap"
    passed, reason = _require(gate, difference, shown, evidence, against)
    if gate.at_least is not None:
        level = _level(own, settings)
        keeps = level.low >= gate.at_least
        reason += f"; {own.score} is {level.text()} and has to be at least {gate.at_least:g}" + _open(
            keeps, level.value >= gate.at_least
        )
        passed &= keeps
    return GateVerdict(
        name=name, metric=gate.metric, passed=passed, reason=reason + ".", against=against, items=len(own.values),
        value=float(own.values.mean()), baseline=float(other.values.mean()), effect=difference.value,
        low=difference.low, high=difference.high, **counts,
    )  # fmt: skip


def _require(gate: TaskGate, difference: Limits, shown: bool, evidence: str, against: str) -> tuple[bool, str]:
    """Return whether a comparison with another model is as it has to be, and why."""
    start = f"the score differs by {difference.text('+.4f')} from that of {against} ({evidence})"
    if gate.tolerance is not None:
        passed = difference.low >= -gate.tolerance
        return passed, f"{start} and may be lower by {gate.tolerance:g}" + _open(
            passed, difference.value >= -gate.tolerance
        )
    if gate.require == "better":
        passed = shown and difference.value > 0
        return passed, f"{start} and has to be better" + _open(passed, difference.value > 0)
    passed = not (shown and difference.value < 0)
    return passed, f"{start} and must not be worse"


def _open(passed: bool, value_keeps: bool) -> str:
    return "" if passed or not value_keeps else ", which is not shown: more questions may show it"


def _level(own: Answers, settings: GateSettings) -> Limits:
    if own.right_or_wrong:
        return share(int(own.values.sum()), len(own.values), settings.confidence)
    return _mean(own.values, settings)


def _mean(values: numpy.ndarray, settings: GateSettings) -> Limits:
    found = mean_intervals(values[None], numpy.ones(len(values)), 1 - settings.confidence, settings.seed)
    return Limits(*(float(limit[0]) for limit in found))
