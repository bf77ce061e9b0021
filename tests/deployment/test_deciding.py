"""Tests and intervals of gates: against numbers worked out by hand, and where unpaired ones would miss a difference."""

from __future__ import annotations

import math

import numpy
import pytest

from neurograft.deployment.deciding import (
    Answers,
    judge_perplexity,
    judge_retention,
    judge_task,
    mcnemar,
    paired_difference,
    share,
)
from neurograft.deployment.gates import GateSettings, PerplexityGate, RetentionGate, TaskGate
from neurograft.errors import DataError
from neurograft.evaluation import Scores

SETTINGS = GateSettings()


def _scores(losses: list[float], tokens: int = 10) -> Scores:
    count = numpy.full(len(losses), tokens)
    return Scores(numpy.array(losses), count, count)


def _answers(values: list[float], *, higher: bool = True, prefix: str = "q") -> Answers:
    return Answers("acc", numpy.array(values), tuple(f"{prefix}{n}" for n in range(len(values))), higher)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (5, 5, 1.0),  # the middle term would be counted twice
        (10, 1, 2 * (1 + 11) / 2048),
    ],
)
def test_mcnemar_is_the_binomial_written_out(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == p


def test_mcnemar_takes_many_questions() -> None:
    assert mcnemar(20_000, 20_000) == 1.0
    assert 0 < mcnemar(10_300, 10_000) < 0.05
    assert mcnemar(5_000, 0) < 1e-300


def test_paired_difference_by_hand() -> None:
    found = paired_difference(8, 2, 98, 0.95)
    middle, apart = 6 / 100, 11 / 100
    reach = 1.959963984540054 * math.sqrt((apart - middle**2) / 100)
    assert found.value == 6 / 98
    assert found.low == pytest.approx(middle - reach, rel=1e-12) and found.high == pytest.approx(middle + reach)
    # Where nothing differs, few questions still prove little.
    assert paired_difference(0, 0, 10, 0.95).low < -0.1 < -0.01 < paired_difference(0, 0, 1000, 0.95).low


def test_share_by_hand() -> None:
    found = share(8, 10, 0.95)  # Wilson's interval of 8 in 10: 0.4902 to 0.9433
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.8, 0.4902, 0.9433)


def test_ratio_by_hand() -> None:
    """Where every document differs by as much, the ratio is known without doubt: exp(-1/10) of all draws."""
    other = _scores([20.0, 30.0, 25.0, 40.0])
    own = Scores(other.losses - 1, other.tokens, other.size)
    gate = PerplexityGate(metric="perplexity", data="x", limit="<=0.91*baseline")
    verdict = judge_perplexity("domain", gate, own, other, "0001-base", SETTINGS)
    assert verdict.passed and verdict.effect == pytest.approx(math.exp(-0.1))
    assert verdict.low == pytest.approx(verdict.high) == pytest.approx(math.exp(-0.1))
    assert verdict.value == pytest.approx(math.exp(111 / 40)) and verdict.baseline == pytest.approx(math.exp(115 / 40))


def test_paired_intervals_see_what_unpaired_ones_miss() -> None:
    """Documents differ far more than models do, so that intervals of each alone overlap almost wholly."""
    generator = numpy.random.default_rng(0)
    other = _scores(list(generator.normal(30, 8, 60)))
    own = Scores(other.losses - 0.5 + generator.normal(0, 0.3, 60), other.tokens, other.size)
    gate = PerplexityGate(metric="perplexity", data="x", limit="<1*baseline")
    verdict = judge_perplexity("domain", gate, own, other, "0001-base", SETTINGS)
    assert verdict.passed and verdict.high < 0.97
    alone = PerplexityGate(metric="perplexity", data="x", limit="<1000")
    limits = [judge_perplexity("domain", alone, scores, scores, "", SETTINGS) for scores in (own, other)]
    assert limits[0].low < limits[1].low < limits[0].high < limits[1].high  # either could be the better one


def test_an_interval_that_holds_the_limit_does_not_pass() -> None:
    other = _scores([20.0, 30.0, 25.0, 40.0, 22.0, 31.0])
    own = Scores(other.losses + numpy.array([-4.0, 3, -4, 3, -4, 3]), other.tokens, other.size)
    gate = PerplexityGate(metric="perplexity", data="x", limit="<=1*baseline")
    verdict = judge_perplexity("domain", gate, own, other, "0001-base", SETTINGS)
    assert not verdict.passed and verdict.effect < 1 < verdict.high and "more documents may show it" in verdict.reason


def test_retention_allows_its_tolerance_and_no_more() -> None:
    other = _scores([20.0, 30.0, 25.0, 40.0])
    own = Scores(other.losses + 0.1, other.tokens, other.size)  # a ratio of exp(0.01) = 1.01005
    for tolerance, passed in ((0.011, True), (0.009, False)):
        gate = RetentionGate(metric="retention", data="x", tolerance=tolerance)
        assert judge_retention("general", gate, own, other, "0001-base", SETTINGS).passed is passed


def test_texts_that_prove_nothing_are_refused() -> None:
    gate = PerplexityGate(metric="perplexity", data="x", limit="<20")
    with pytest.raises(DataError, match="the gate domain is one document, and intervals need at least 2"):
        judge_perplexity("domain", gate, _scores([20.0]), _scores([20.0]), "", SETTINGS)
    relative = PerplexityGate(metric="perplexity", data="x", limit="<1*baseline")
    with pytest.raises(DataError, match="into different tokens"):
        judge_perplexity("domain", relative, _scores([20.0, 1], 9), _scores([20.0, 1], 10), "", SETTINGS)


@pytest.mark.parametrize(
    ("require", "gained", "lost", "passed"),
    [("better", 6, 0, True), ("better", 5, 0, False), ("not_worse", 0, 5, True), ("not_worse", 0, 6, False)],
)
def test_right_and_wrong_answers_are_held_against_mcnemar(require: str, gained: int, lost: int, passed: bool) -> None:
    """Six of six one way is p = 0.031, five of five is p = 0.0625, however many questions both answer alike."""
    other = [1.0] * 50 + [0.0] * gained + [1.0] * lost
    own = [1.0] * 50 + [1.0] * gained + [0.0] * lost
    gate = TaskGate.model_validate({"metric": "task", "task": "t", "require": require})
    verdict = judge_task("qa", gate, _answers(own), _answers(other), "0001-base", SETTINGS)
    assert (verdict.passed, verdict.better, verdict.worse) == (passed, gained, lost)
    assert verdict.p_value == mcnemar(gained, lost) and "exact McNemar" in verdict.reason


def test_tolerance_and_level_of_a_task() -> None:
    own, other = _answers([1.0] * 95 + [0.0] * 5), _answers([1.0] * 97 + [0.0] * 3)
    for changes, passed in (
        ({"tolerance": 0.1}, True),
        ({"tolerance": 0.02}, False),
        ({"at_least": 0.88}, True),
        ({"at_least": 0.94}, False),  # 0.95 as measured, and not shown
    ):
        gate = TaskGate.model_validate({"metric": "task", "task": "t", **changes})
        assert judge_task("qa", gate, own, other, "0001-base", SETTINGS).passed is passed, changes


def test_other_scores_are_compared_by_bootstrap_and_turned_where_less_is_better() -> None:
    generator = numpy.random.default_rng(1)
    other = list(generator.uniform(0.2, 0.8, 40))
    own = [value + 0.1 for value in other]
    gate = TaskGate(metric="task", task="t", require="better")
    verdict = judge_task("f1", gate, _answers(own), _answers(other), "0001-base", SETTINGS)
    assert verdict.passed and verdict.low == pytest.approx(0.1) and verdict.p_value is None
    turned = judge_task("loss", gate, _answers(own, higher=False), _answers(other, higher=False), "", SETTINGS)
    assert not turned.passed and turned.effect == pytest.approx(-0.1)


def test_other_questions_are_refused() -> None:
    gate = TaskGate(metric="task", task="t")
    with pytest.raises(DataError, match="not asked the same questions of the gate qa"):
        judge_task("qa", gate, _answers([1.0]), _answers([1.0], prefix="z"), "", SETTINGS)
