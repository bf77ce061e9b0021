"""From the losses of a scan to its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from neurograft.organ import Organ
from neurograft.placement.candidates import Candidate
from neurograft.placement.results import Place, PlaceScore, ScannedText, ScanReport
from neurograft.placement.rounds import Rounds
from neurograft.placement.statistics import ERROR, Intervals, among, ratio_intervals
from neurograft.training.protocols import versions

_DOMAIN, _GENERAL = 0, 1


def build_report(
    rounds: Rounds,
    blocked: Mapping[Candidate, str],
    *,
    organ: Organ,
    recipient: str,
    layer_count: int,
    fingerprints: Mapping[str, str],
) -> ScanReport:
    """Reduce what was measured to perplexities, ratios, intervals and a best place.

    Args:
        rounds: The rounds, run.
        blocked: Places where the organ can't stand, with reasons.
        organ: The organ.
        recipient: The recipient's name.
        layer_count: L.
        fingerprints: Name of a text -> digest of its documents.
    """
    table = _Table(rounds)
    best = table.best
    measured = {candidate: table.place(candidate) for candidate in rounds.candidates}
    stuck = [Place(mode=c.mode, position=c.position, stopped="blocked", why=why) for c, why in blocked.items()]
    places = sorted([*measured.values(), *stuck], key=lambda place: (place.position, place.mode))
    own = measured[best].domain
    assert own is not None
    texts = [
        _scanned(rounds, number, fingerprints[sample.name], table.windows(number, best))
        for number, sample in enumerate(rounds.samples)
    ]
    return ScanReport(
        organ=organ.name,
        recipient=recipient,
        layer_count=layer_count,
        organ_layers=organ.layer_count,
        mode=best.mode,
        position=best.position,
        tied=[c.label for c, place in sorted(measured.items()) if place.apart is False and c != best],
        helps=own.high < 1,
        domain=texts[_DOMAIN],
        general=texts[_GENERAL] if len(texts) > 1 else None,
        places=places,
        complete=all(len(done) == len(s.windows) for done, s in zip(rounds.done, rounds.samples, strict=True)),
        units="documents" if rounds.samples[_DOMAIN].by_document else "windows",
        layer_passes=rounds.state.passes,
        layer_passes_from_scratch=_from_scratch(rounds, organ.layer_count, layer_count),
        tokens_run=rounds.state.tokens + rounds.state.recovered,
        seconds=round(rounds.state.seconds, 2),
        versions=versions(),
        prune=rounds.settings.prune,
        recover_tokens=rounds.settings.recover_tokens,
        sequence_length=rounds.settings.sequence_length,
        max_tokens=rounds.settings.max_tokens,
        seed=rounds.settings.seed,
    )


def _scanned(rounds: Rounds, text: int, fingerprint: str, windows: Sequence[int]) -> ScannedText:
    scored = rounds.unit_tokens(text, windows).sum()
    return ScannedText(
        documents=len({rounds.samples[text].windows[number].document for number in windows}),
        tokens=int(scored),
        fingerprint=fingerprint,
        perplexity=_exp(rounds.losses(text, None, windows).sum() / scored),
    )


def _from_scratch(rounds: Rounds, organ_layers: int, layer_count: int) -> int:
    """Return what running every place, and the recipient, alone over the text that was used would have taken."""
    tokens = sum(
        len(sample.windows[number].ids)
        for sample, done in zip(rounds.samples, rounds.done, strict=True)
        for number in done
    )
    layers = sum(layer_count + (organ_layers if c.mode == "insert" else 0) for c in rounds.candidates)
    return tokens * (layers + layer_count)


class _Table:
    """Scores of places; those that saw the same text are compared together, over the same draws."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._measured = [candidate for candidate in rounds.candidates if self._took_part(candidate) > 0]
        self.best = min(rounds.live, key=lambda c: float(rounds.losses(_DOMAIN, c, rounds.done[_DOMAIN]).sum()))
        """The best of the places that went furthest."""
        self._ratios = [self._compare(text, alone=True, error=ERROR) for text in range(len(rounds.samples))]
        self._behind = self._compare(_DOMAIN, alone=False, error=among(len(self._measured) - 1))

    def _took_part(self, candidate: Candidate) -> int:
        """Return in how many rounds a place took part."""
        rounds = len(self._rounds.seen[_DOMAIN])
        return self._rounds.dropped.get(candidate, (rounds, ""))[0]

    def windows(self, text: int, candidate: Candidate) -> list[int]:
        """Return the numbers of the windows that a place has seen."""
        count = self._took_part(candidate)
        return self._rounds.done[text][: self._rounds.seen[text][count - 1]] if count else []

    def _compare(self, text: int, *, alone: bool, error: float) -> dict[Candidate, tuple[float, float, float]]:
        """Return for each place ratio, low, high: to the recipient alone, or to the best place."""
        found: dict[Candidate, tuple[float, float, float]] = {}
        for count in {self._took_part(candidate) for candidate in self._measured}:
            group = [candidate for candidate in self._measured if self._took_part(candidate) == count]
            windows = self.windows(text, group[0])
            limits: Intervals = ratio_intervals(
                numpy.stack([self._rounds.by_unit(text, candidate, windows) for candidate in group]),
                self._rounds.by_unit(text, None if alone else self.best, windows),
                self._rounds.unit_tokens(text, windows),
                error=error,
                seed=self._rounds.settings.seed,
            )
            for candidate, *values in zip(group, limits.ratio, limits.low, limits.high, strict=True):
                found[candidate] = (float(values[0]), float(values[1]), float(values[2]))
        return found

    def place(self, candidate: Candidate) -> Place:
        """Return everything that is known of a place."""
        rounds, why = self._rounds.dropped.get(candidate, (len(self._rounds.seen[_DOMAIN]), None))
        shared: dict[str, Any] = {"mode": candidate.mode, "position": candidate.position, "stopped": why}
        if not rounds:
            return Place(**shared)
        behind, low, high = self._behind[candidate]
        return Place(
            **shared,
            domain=self._score(_DOMAIN, candidate),
            general=self._score(_GENERAL, candidate) if len(self._ratios) > 1 else None,
            behind=behind,
            behind_low=low,
            behind_high=high,
            apart=low > 1,
            rounds=rounds,
        )

    def _score(self, text: int, candidate: Candidate) -> PlaceScore:
        windows = self.windows(text, candidate)
        tokens = self._rounds.unit_tokens(text, windows).sum()
        ratio, low, high = self._ratios[text][candidate]
        return PlaceScore(
            documents=len({self._rounds.samples[text].windows[number].document for number in windows}),
            tokens=int(tokens),
            perplexity=_exp(self._rounds.losses(text, candidate, windows).sum() / tokens),
            recipient=_exp(self._rounds.losses(text, None, windows).sum() / tokens),
            ratio=ratio,
            low=low,
            high=high,
        )


def _exp(value: float) -> float:
    return math.exp(min(float(value), 700))
