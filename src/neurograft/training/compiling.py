"""Compile the layers that train with `torch.compile`, where that pays."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from neurograft.errors import NeurograftError
from neurograft.surgery import Undo
from neurograft.training.options import Compile

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("neurograft")

# Compiling takes half a minute and saves an eighth of every step where many layers train (benchmarks/training_cost.py):
# from four minutes on it is earned back, and from this many seconds more than twice over.
_WORTH_SECONDS = 600.0
_TIMED = 3  # steps by the shortest of which it is judged how long the others will take


class LayerCompiler:
    """Decoder layers that run compiled in training steps, and as they are outside of them.

    What a layer computes is compiled and not its call: hooks, such as those that give it what is cached, stay outside.

    Args:
        layers: The layers that a step runs.
        wanted: `always`, `never`, or `auto`: on one CPU process, if by the first steps the others will take ten minutes
            or more.
        steps: Steps of the whole run.
        eligible: Whether `auto` may choose it.
    """

    def __init__(self, layers: Sequence[nn.Module], wanted: Compile, *, steps: int, eligible: bool) -> None:
        self._layers, self._wanted, self._steps = layers, wanted, steps
        self.chosen: bool | None = None if wanted == "auto" and eligible else wanted == "always"
        """Whether they are compiled; `None` while that is open."""
        self._forwards = list[Callable[..., object]]()
        self._shortest = math.inf

    def recall(self, chosen: bool | None) -> None:
        """Keep to what was chosen before an interruption, or the run would not come to the same bits."""
        if chosen is not None:
            self.chosen = chosen

    def run(self, step: int, passes: Callable[[], float], clear: Callable[[], None]) -> float:
        """Take the forward and backward passes of a step, and return what they return.

        Args:
            step: Number of steps done before it.
            passes: Takes the passes.
            clear: Takes back what passes that failed have left.

        Raises:
            NeurograftError: The layers can't be compiled, and `always` asked for it.
        """
        if not self.chosen:
            return self._plainly(step, passes)
        first = not self._forwards
        if first:
            log.info("compiling the layers that train; the first step takes longer")
        try:
            with self._compiled():
                result = passes()
        except _failures() as error:
            if not first:
                raise
            if self._wanted == "always":
                raise NeurograftError(
                    f"the layers can't be compiled ({_first_line(error)}); leave --compile at auto, or give never."
                ) from error
            log.warning("the layers can't be compiled (%s); they train as they are", _first_line(error))
            self.chosen = False
            clear()
            return passes()
        return result

    def _plainly(self, step: int, passes: Callable[[], float]) -> float:
        started = time.monotonic()
        result = passes()
        self._shortest = min(self._shortest, time.monotonic() - started)
        # Always after the same step, or a run that goes on could compile later than one that was not interrupted.
        if self.chosen is None and step + 1 >= _TIMED:
            self.chosen = self._shortest * (self._steps - step - 1) >= _WORTH_SECONDS
        return result

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Let the layers compute compiled inside the block."""
        if not self._forwards:
            self._forwards = [torch.compile(layer.forward, dynamic=False) for layer in self._layers]
        undo = Undo()
        try:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                undo.set(vars(layer), "forward", forward)
            yield
        finally:
            undo.restore()


def _failures() -> tuple[type[Exception], ...]:
    """Return what torch raises where it can't compile something; asked for late, since it takes long to import."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
