"""The course of the learning rate, and how large it is where nobody says; no torch, since the command line reads it."""

from __future__ import annotations

import math
from typing import Literal

OptimizerName = Literal["adamw", "muon", "adafactor"]
Schedule = Literal["cosine", "linear", "wsd"]

_LAST_SHARE = 0.1
_STABLE = 0.7  # share of the steps after warm-up over which `wsd` holds the learning rate
# Measured on seams in the middle, one seed, else as in benchmarks/recovery.py: 0.003 brings 40 % of what this does, and
# 0.03 little more, but costs general text.
_LR_OF_VECTORS = 1e-2
# Measured (benchmarks/engine.py): what is best falls with the number of layers that train, and hardly with their place.
_LR_OF_A_LAYER, _LARGEST_LR, _WIDTH, _LOW_RANK = 9e-3, 3e-3, 576, 10.0


def automatic_lr(layers: int, width: int, *, low_rank: bool = False, vectors: bool = False) -> float:
    """Return a peak learning rate for AdamW and for `muon`, whose steps have the same size.

    Args:
        layers: How many decoder layers train.
        width: The hidden size.
        low_rank: Whether they train by low-rank changes.
        vectors: Whether only vectors train: weights of norms, which are about 1, and biases.
    """
    if vectors:
        return _LR_OF_VECTORS
    lr = min(_LR_OF_A_LAYER / max(layers, 1), _LARGEST_LR) * min(1.0, _WIDTH / width)
    return min(lr * _LOW_RANK if low_rank else lr, 1e-2)


def learning_rate_share(step: int, steps: int, *, warmup: float, schedule: Schedule) -> float:
    """Return the share of the peak learning rate at a step.

    Args:
        step: Number of steps done before it.
        steps: Steps in all.
        warmup: Share of the steps over which it rises linearly.
        schedule: How it falls to a tenth after that: along half a `cosine`, `linear`ly, or (`wsd`) not before 70 % of
            what is left is done, then linearly (warm-up, stable, decay; arXiv 2404.06395).
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = min((step - rising) / max(1, steps - rising), 1.0)
    if schedule == "cosine":
        return _LAST_SHARE + (1 - _LAST_SHARE) / 2 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        done = max(0.0, (done - _STABLE) / (1 - _STABLE))
    return 1 - (1 - _LAST_SHARE) * done
