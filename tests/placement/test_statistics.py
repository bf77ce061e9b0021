"""Intervals that hold as often as they say, and samples of which any beginning is fair."""

from __future__ import annotations

import numpy
import pytest

from neurograft.placement.candidates import Candidate, spread_out
from neurograft.placement.sampling import draw_sample
from neurograft.placement.statistics import among, ratio_intervals
from tiny import make_tokenizer


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator, held, tries = numpy.random.default_rng(0), 0, 200
    for number in range(tries):
        tokens = generator.integers(20, 60, size=24).astype(float)
        reference = tokens * (3 + generator.normal(0, 0.5, 24))
        losses = reference + tokens * (0.1 + generator.normal(0, 0.2, 24))
        limits = ratio_intervals(losses[None], reference, tokens, error=0.05, seed=number)
        held += bool(limits.low[0] <= numpy.exp(0.1) <= limits.high[0])
    assert 0.88 <= held / tries <= 0.99


def test_what_text_has_in_common_does_not_widen_them() -> None:
    generator = numpy.random.default_rng(0)
    tokens = numpy.full(50, 30.0)
    reference = tokens * generator.uniform(1, 6, 50)
    limits = ratio_intervals(reference[None] + tokens * 0.01, reference, tokens, error=among(59), seed=0)
    assert limits.low[0] == pytest.approx(limits.high[0]) == pytest.approx(numpy.exp(0.01))


def test_many_places_need_wider_ones() -> None:
    generator = numpy.random.default_rng(0)
    tokens, reference = numpy.full(40, 30.0), numpy.full(40, 90.0)
    losses = (reference + generator.normal(0, 5, 40))[None]
    one, many = (ratio_intervals(losses, reference, tokens, error=among(count), seed=0) for count in (1, 60))
    assert many.low[0] < one.low[0] < one.high[0] < many.high[0]


def test_places_in_a_spread_order() -> None:
    order = [candidate.position for candidate in spread_out([Candidate(p, "insert") for p in range(9)])]
    assert sorted(order) == list(range(9))
    for count in (2, 3, 5):
        gaps = numpy.diff(sorted(order[:count]))
        assert gaps.max() <= 8 // (count - 1) + 2


def test_a_sample_begins_with_every_document() -> None:
    documents = ["a" * 100, "b" * 10, "c" * 300, *["d" * 40] * 9]
    sample = draw_sample("domain", documents, make_tokenizer(), max_tokens=10**6, sequence_length=32, seed=0)
    assert sample.tokens == sum(map(len, documents)) and sample.documents == 12 and sample.by_document
    assert sorted(window.document for window in sample.windows[:12]) == list(range(12))
    assert sample.stops[-1] == len(sample.windows)
    assert sorted(n for r in range(len(sample.stops)) for b in sample.batches(r, 5) for n in b) == list(
        range(len(sample.windows))
    )


def test_each_round_has_about_twice_the_text() -> None:
    documents = ["x" * 30] * 200
    sample = draw_sample("domain", documents, make_tokenizer(), max_tokens=10**6, sequence_length=32, seed=0)
    assert sample.stops[0] >= 16
    assert all(2 * a <= b <= 2 * a + 1 for a, b in zip(sample.stops, sample.stops[1:], strict=False))


def test_the_sample_is_cut_and_depends_on_the_seed() -> None:
    documents = [chr(97 + number % 26) * 30 for number in range(300)]
    samples = [
        draw_sample("domain", documents, make_tokenizer(), max_tokens=900, sequence_length=64, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert all(sample.tokens == 900 for sample in samples)
    assert samples[0] == samples[1] != samples[2]
