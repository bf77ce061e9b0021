"""How well an organ's surroundings in a recipient resemble those that it was trained in, at every position.

Two measures, on the same public text (`neurograft.sketch`): *linear CKA* (Kornblith et al., arXiv 1905.00414) says
whether two sets of states tell the same tokens apart, whatever their axes are; a *Fréchet distance* (Heusel et al.,
arXiv 1706.08500, there between pictures) says whether they lie in the same place, with the same axes. An organ needs
the latter: it was made for these axes. So the verdict follows the distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from neurograft.errors import ModelError, UsageError
from neurograft.findings import Finding
from neurograft.manifest import Mode, Sketch
from neurograft.sketch import States, boundary_states, encode_probe, text_digest, unpack_states, window_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neurograft.organ import Organ

Verdict = Literal["fits", "needs recovery", "does not fit"]
# Measured: see "Alignment and perplexity" in docs/results.md, which benchmarks/alignment.py writes.
FITS_BELOW = 0.07
RECOVERS_BELOW = 0.2
MOST_BY_MOVING = 1.5


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PositionAlignment(_Part):
    """How alike the states are at one position; CKA is from 0 to 1 (alike), distances from 0 (the same) to 1."""

    position: int
    cka_entering: float
    """Of what enters the organ: in its host, and here."""
    cka_leaving: float
    """Of what left it in its host, and what the next layer is used to here."""
    distance_entering: float
    distance_leaving: float
    """For `replace` that of what left the organ; for `insert` how far it would move what passes here, if it changed it
    by as much as in its host."""
    distance: float
    """The mean of the two distances; for `insert` at most one and a half times the second, since an inserted organ that
    moves little does little harm wherever it stands."""
    verdict: Verdict


class AlignmentCurve(_Part):
    """An organ's alignment with a recipient, at every position."""

    mode: Mode
    position: int
    """The position asked for."""
    best: int
    """The position with the least distance."""
    tokens: int
    """Of the public text, that were compared."""
    curve: list[PositionAlignment]

    @property
    def here(self) -> PositionAlignment:
        """The alignment at the position asked for."""
        return next(entry for entry in self.curve if entry.position == self.position)


def measure_alignment(
    organ: Organ, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, at: int, mode: Mode, name: str
) -> AlignmentCurve:
    """Compare the states around an organ in training with those at every position of a recipient.

    Args:
        organ: An organ with a sketch.
        model: The recipient, loaded; it is as before afterwards.
        tokenizer: Its tokenizer.
        at: The position asked for.
        mode: `replace` or `insert`.
        name: The recipient's name, for messages.

    Raises:
        UsageError: The organ has no sketch.
        ModelError: The sketch is of another text, or the recipient cuts the text otherwise or can't be run.
        OrganFileError: The sketch is damaged.
    """
    sketch = organ.manifest.sketch
    if sketch is None:
        raise UsageError(f"the organ {organ.name} carries no sketch of the hidden states around it; train it first.")
    if (sketch.text, window_of(model) >= sketch.window) != (text_digest(), True):
        raise ModelError(
            f"the sketch in {organ.name} is of another text than this neurograft's, or of longer pieces of it than "
            f"{name} takes, so alignment can't be measured."
        )
    states = boundary_states(model, encode_probe(tokenizer, sketch.window, name))
    if len(states[0]) != sketch.tokens:
        raise ModelError(
            f"{name} cuts the probe text into {len(states[0])} counted tokens and the organ's host into "
            f"{sketch.tokens}, so alignment can't be measured."
        )
    return compare_states(sketch, states, organ.layer_count, at=at, mode=mode, name=organ.name)


def compare_states(
    sketch: Sketch, states: Sequence[States], layer_count: int, *, at: int, mode: Mode, name: str
) -> AlignmentCurve:
    """Compare a sketch with the states at every boundary of a recipient.

    Args:
        sketch: The organ's.
        states: L + 1 arrays, (N, r) each; see `neurograft.sketch.boundary_states`.
        layer_count: k.
        at: The position asked for.
        mode: `replace` or `insert`.
        name: The organ's name, for messages.

    Raises:
        OrganFileError: The sketch is damaged.
    """
    entering, leaving = unpack_states(sketch, name)
    replaced = layer_count if mode == "replace" else 0
    curve = []
    for position in range(len(states) - replaced):
        here, behind = states[position], states[position + replaced]
        distance_in = frechet_distance(entering, here)
        if mode == "replace":
            distance_out = frechet_distance(leaving, behind)
            distance = (distance_in + distance_out) / 2
        else:
            distance_out = frechet_distance(here + leaving - entering, here)
            distance = min((distance_in + distance_out) / 2, MOST_BY_MOVING * distance_out)
        curve.append(
            PositionAlignment(
                position=position,
                cka_entering=round(linear_cka(entering, here), 5),
                cka_leaving=round(linear_cka(leaving, behind), 5),
                distance_entering=round(distance_in, 5),
                distance_leaving=round(distance_out, 5),
                distance=round(distance, 5),
                verdict=verdict_of(distance),
            )
        )
    best = min(curve, key=lambda entry: entry.distance).position
    return AlignmentCurve(mode=mode, position=at, best=best, tokens=sketch.tokens, curve=curve)


def verdict_of(distance: float) -> Verdict:
    """Say what a distance comes to, by thresholds that were measured."""
    return "fits" if distance < FITS_BELOW else "needs recovery" if distance < RECOVERS_BELOW else "does not fit"


def linear_cka(first: States, second: States) -> float:
    """Return linear CKA of two sets of states, (N, r) each, on the same tokens: 1 if one is the other, turned."""
    import numpy as np

    x, y = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0


def frechet_distance(first: States, second: States) -> float:
    """Return the Fréchet distance of two sets of states, (N, r) each, taken as normal distributions, from 0 to 1.

    The square of the distance, |m - n|^2 + tr(C + D - 2 (C D)^(1/2)), is divided by what it would be if means and axes
    had nothing in common, |m|^2 + |n|^2 + tr(C) + tr(D).
    """
    import numpy as np

    means = first.mean(axis=0), second.mean(axis=0)
    spreads = [np.cov(states, rowvar=False, bias=True) for states in (first, second)]
    root = _square_root(spreads[0])
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ spreads[1] @ root), 0, None)).sum()
    whole = sum(float(mean @ mean) for mean in means) + sum(float(np.trace(spread)) for spread in spreads)
    square = whole - 2 * float(means[0] @ means[1]) - 2 * float(shared)
    return float(np.sqrt(np.clip(square / max(whole, 1e-12), 0, 1)))


def _square_root(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the symmetric square root of a covariance."""
    import numpy as np

    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray[Any, Any] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def alignment_findings(alignment: AlignmentCurve) -> list[Finding]:
    """Say what the alignment at the position asked for comes to."""
    here = alignment.here
    why = (
        f"{here.verdict} at position {here.position}, going by the hidden states on a public text (distance "
        f"{here.distance:.3f}, CKA {here.cka_entering:.3f} entering and {here.cka_leaving:.3f} leaving)"
    )
    best = next(entry for entry in alignment.curve if entry.position == alignment.best)
    if best.position != here.position:
        why += f"; they are most alike at position {best.position} (distance {best.distance:.3f})"
    if here.verdict != "fits":
        why += "; thresholds were measured on a model of 135 million parameters, so let `scan` or `evaluate` decide"
    return [Finding(severity="notes" if here.verdict == "fits" else "risks", subject="alignment", why=why)]
