"""Membership inference: can a document that was trained on be told from one that was not, by what a model says of it?

Every attack gives each document a number, the larger the more it looks like a member. How well members stand out is
measured as attacks are (arXiv 2112.03570): by the area under the ROC curve, and by how many members are found while
hardly any document is taken for one by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from neurograft.manifest import MembershipFigures

if TYPE_CHECKING:
    import numpy

    from neurograft.privacy.scoring import ScoredDocument

LOWEST_SHARE = 0.2  # Min-K%++ looks at this share of a document's tokens, as its authors do (arXiv 2404.02936)
FALSE_POSITIVES = 0.01


def loss_scores(documents: Sequence[ScoredDocument]) -> numpy.ndarray:
    """Return minus the mean loss of each document, (D,), in nats per token."""
    import numpy

    return numpy.array([-document.losses.mean() for document in documents])


def least_likely_scores(documents: Sequence[ScoredDocument]) -> numpy.ndarray:
    """Return Min-K%++ of each document, (D,): the mean over the tokens that the model finds least likely for where they
    stand, each log-probability in standard deviations from the mean of the model's own choices there.
    """
    import numpy

    return numpy.array([_mean_of_lowest(document.normalised) for document in documents])


def _mean_of_lowest(values: numpy.ndarray) -> float:
    import numpy

    count = max(1, int(len(values) * LOWEST_SHARE))
    return float(numpy.partition(values, count - 1)[:count].mean())


def reference_scores(documents: Sequence[ScoredDocument], reference: Sequence[ScoredDocument]) -> numpy.ndarray:
    """Return by how much each document's mean loss is lower than under a reference model, (D,), in nats per token."""
    return loss_scores(documents) - loss_scores(reference)


def area_under_curve(members: numpy.ndarray, others: numpy.ndarray) -> float:
    """Return how often a member's score is above another document's; ties count half."""
    import numpy

    ordered = numpy.sort(others)
    below, upto = (numpy.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    return float((below + upto).sum() / (2 * len(members) * len(others)))


def found_members(members: numpy.ndarray, others: numpy.ndarray) -> float:
    """Return the share of members above the lowest limit that at most 1 % of the other documents are above."""
    import numpy

    allowed = int(len(others) * FALSE_POSITIVES)
    limit = numpy.partition(others, len(others) - 1 - allowed)[len(others) - 1 - allowed]
    return float((members > limit).mean())


def measure(
    attack: str,
    members: numpy.ndarray,
    others: numpy.ndarray,
    control: tuple[numpy.ndarray, numpy.ndarray] | None,
    *,
    samples: int,
    seed: int,
) -> MembershipFigures:
    """Measure one attack, with 95 % intervals by bootstrap over members and, apart from them, over other documents.

    Args:
        attack: Its name.
        members: (D,) scores of documents that were trained on.
        others: (E,) scores of documents that were not.
        control: What the same attack gives them in the host without the organ; `None` where there is no such thing.
        samples: How often documents are drawn anew.
        seed: Seed of the draws.
    """
    import numpy

    generator = numpy.random.default_rng(seed)
    areas, found = [], []
    for _ in range(samples):
        drawn = members[generator.integers(len(members), size=len(members))]
        against = others[generator.integers(len(others), size=len(others))]
        areas.append(area_under_curve(drawn, against))
        found.append(found_members(drawn, against))
    (auc_low, auc_high), (found_low, found_high) = _interval(areas), _interval(found)
    return MembershipFigures(
        attack=attack,
        auc=area_under_curve(members, others),
        auc_low=auc_low,
        auc_high=auc_high,
        true_positives=found_members(members, others),
        true_positives_low=found_low,
        true_positives_high=found_high,
        host_auc=None if control is None else area_under_curve(*control),
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    import numpy

    low, high = numpy.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def measure_all(
    with_organ: tuple[Sequence[ScoredDocument], Sequence[ScoredDocument]],
    host_alone: tuple[Sequence[ScoredDocument], Sequence[ScoredDocument]],
    *,
    samples: int,
    seed: int,
) -> list[MembershipFigures]:
    """Measure all attacks.

    Args:
        with_organ: Members and non-members as the host with the organ sees them.
        host_alone: The same as it sees them without.
        samples: How often documents are drawn anew.
        seed: Seed of the draws.
    """
    (members, others), (members_before, others_before) = with_organ, host_alone
    plain: dict[str, Callable[[Sequence[ScoredDocument]], numpy.ndarray]] = {
        "loss": loss_scores,
        "min-k%++": least_likely_scores,
    }
    figures = [
        measure(
            name,
            score(members),
            score(others),
            (score(members_before), score(others_before)),
            samples=samples,
            seed=seed,
        )
        for name, score in plain.items()
    ]
    return [
        *figures,
        measure(
            "reference",
            reference_scores(members, members_before),
            reference_scores(others, others_before),
            None,
            samples=samples,
            seed=seed,
        ),
    ]


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share that was seen `count` times in `total` (Wilson)."""
    z = 1.959964
    share, scale = count / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
