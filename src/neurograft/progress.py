"""One line that says how far long work has come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurograft.placement.rounds import ScanProgress
    from neurograft.training.loop import TrainingProgress


def training_line(progress: TrainingProgress) -> str:
    """Say where a training run is: step, loss, held-out perplexity, speed, time left."""
    left = seconds_left(progress.step, progress.steps, progress.seconds)
    held_out = progress.held_out_perplexity
    return (
        f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f} (perplexity "
        f"{math.exp(min(progress.loss, 700)):.2f})  "
        f"{'' if held_out is None else f'held-out perplexity {held_out:.2f}  '}"
        f"{progress.tokens_per_second:,.0f} tokens/s  {left} left"
    )


def evaluation_line(done: int, total: int) -> str:
    """Say how many tokens have been evaluated."""
    return f"evaluating: {done:,} of {total:,} tokens ({done / max(total, 1):.0%})"


def scan_line(progress: ScanProgress) -> str:
    """Say where a scan is: round, places that are still in, the best so far."""
    if not progress.round:
        return f"recovering: {progress.done} of {progress.total} places, {progress.seconds:.0f} s"
    best = f", best so far: {progress.best}" if progress.best else ""
    return (
        f"round {progress.round} of {progress.rounds}: {progress.done}/{progress.total} batches, "
        f"{progress.places} places{best}, {progress.seconds:.0f} s"
    )


def seconds_left(done: int, total: int, elapsed: float) -> str:
    """Say how long the rest takes if it goes on as before: `2 min 05 s`."""
    seconds = round(elapsed / max(done, 1) * (total - done))
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
