"""How far perplexities of places differ, with bootstrap intervals over pieces of text that are paired."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

DRAWS = 10_000
# How often all that is said of all places together may be wrong.
ERROR = 0.05
_NUMBERS_TOGETHER = 1 << 22


@dataclass(frozen=True)
class Intervals:
    """Ratios of perplexities, one for each place, with their limits."""

    ratio: numpy.ndarray
    """(N,)"""
    low: numpy.ndarray
    high: numpy.ndarray


def ratio_intervals(
    losses: numpy.ndarray, reference: numpy.ndarray, tokens: numpy.ndarray, *, error: float, seed: int
) -> Intervals:
    """Return the ratios of perplexities to a reference's on the same text.

    Pieces of text are drawn anew for all places and the reference at once, so what they share cancels out.

    Args:
        losses: (N, U) sums of losses of each place on each piece of text, in nats.
        reference: (U,) the same of what they are compared with.
        tokens: (U,) tokens scored in each piece.
        error: How often the true ratio of a place may lie outside its interval.
        seed: Seed of the draws; the same for all places.
    """
    return Intervals(
        *(numpy.exp(numpy.clip(value, -700, 700)) for value in mean_intervals(losses - reference, tokens, error, seed))
    )


def mean_intervals(
    values: numpy.ndarray, weights: numpy.ndarray, error: float, seed: int
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Return weighted means and their limits, (N,) each, by drawing units anew.

    Args:
        values: (N, U) sums over each unit, such as a piece of text or a question.
        weights: (U,) what each unit counts, such as its tokens.
        error: How often the true mean may lie outside its interval.
        seed: Seed of the draws.
    """
    sums = values.T  # (U, N)
    drawn = numpy.concatenate([counts @ sums / (counts @ weights)[:, None] for counts in _draws(len(weights), seed)])
    # The spread among a few units is less than that of what they stand for.
    middle, wider = sums.sum(0) / weights.sum(), numpy.sqrt(len(weights) / max(len(weights) - 1, 1))
    low, high = numpy.quantile(drawn, [error / 2, 1 - error / 2], axis=0)
    return middle, middle + (low - middle) * wider, middle + (high - middle) * wider


def _draws(units: int, seed: int) -> Iterator[numpy.ndarray]:
    """Yield how often each piece of text is drawn, (S, U), until there are enough draws."""
    generator = numpy.random.default_rng(seed)
    together = max(1, min(DRAWS, _NUMBERS_TOGETHER // units))
    for start in range(0, DRAWS, together):
        size = min(together, DRAWS - start)
        places = generator.integers(units, size=(size, units)) + numpy.arange(size)[:, None] * units
        yield numpy.bincount(places.ravel(), minlength=size * units).reshape(size, units).astype(numpy.float64)


def among(count: int) -> float:
    """Return the error to allow in each of so many intervals for all of them to hold together."""
    return ERROR / max(count, 1)
