"""Losses of a recipient and of an organ at many places in it, with everything below a place computed once.

The recipient runs once over some text. Whenever it reaches a position, the organ is held there and runs with what
follows it; then the recipient goes on from that position. Nothing is stored but the hidden state that it stands at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from neurograft.arithmetic import Arithmetic, Kernels, choose_arithmetic
from neurograft.evaluation import Window, batch_tensors
from neurograft.loss import NextTokenLoss
from neurograft.placement.candidates import Candidate
from neurograft.placement.grafts import Grafts, Weights
from neurograft.surgery import Undo
from neurograft.training.prefix import Rest, hand_on, learn_outputs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from neurograft.organ import Organ

log = logging.getLogger("neurograft")

_TRIED_TOKENS = 12


@dataclass
class Outcome:
    """What came of one batch."""

    recipient: list[float] | None
    """For each window the sum of its tokens' losses in the recipient alone, in nats; `None` if it was not asked for."""
    places: dict[Candidate, list[float]] = field(default_factory=dict)
    """The same with the organ at each place."""
    passes: int = 0
    """How many tokens passed how many layers: each token once for each layer that ran."""


class Runner:
    """Runs text through a recipient and through the recipient with an organ at many places.

    Args:
        model: The recipient, loaded.
        organ: The organ.
        candidates: The places.
        padding: Token that pads windows: end-of-text.
        kernels: How matrices are multiplied; left out, the fastest way that is as exact as float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        organ: Organ,
        candidates: Sequence[Candidate],
        *,
        padding: int,
        kernels: Kernels | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.grafts = Grafts(model, organ, candidates)
        self.kernels = kernels or choose_arithmetic("float32", model.device).kernels
        self._padding, self._loss = padding, NextTokenLoss(model)
        self._stream = Stream(model, self.grafts.own)
        self._shared = self._stream.usable({candidate.position for candidate in candidates})

    def run(
        self,
        windows: Sequence[Window],
        candidates: Sequence[Candidate],
        *,
        recipient: bool = True,
        weights: Mapping[Candidate, Weights] | None = None,
    ) -> Outcome:
        """Return the losses of one batch at some places.

        Args:
            windows: The text, run together.
            candidates: The places.
            recipient: Whether the recipient's own losses are wanted too.
            weights: The organ's parameters at places where they are not its own.
        """
        tokens = sum(len(window.ids) for window in windows)
        tensors = batch_tensors(windows, self._padding)
        outcome, state, reached = Outcome(None), None, 0
        with torch.no_grad(), Arithmetic(self.kernels).active(self.model.device):
            for candidate in sorted(candidates):
                shared = candidate.position in self._shared
                if shared and candidate.position > reached:
                    state = self._stream.advance(tensors, state, reached, candidate.position)
                    outcome.passes += tokens * (candidate.position - reached)
                    reached = candidate.position
                below = reached if shared else 0
                own = None if weights is None else weights.get(candidate)
                with self.grafts.held(candidate, own), self._stream.given(state if below else None, below):
                    outcome.places[candidate] = self._losses(tensors)
                outcome.passes += tokens * (self.grafts.length(candidate) - below)
            if recipient:
                with self._stream.given(state, reached):
                    outcome.recipient = self._losses(tensors)
                outcome.passes += tokens * (len(self.grafts.own) - reached)
        return outcome

    def _losses(self, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[float]:
        return [float(value) for value in self._loss(*tensors).double().sum(dim=1)]


class Stream:
    """A model's residual stream, which can be left and entered at any position.

    The layers stay where they are, so masks, positions, kinds and numbers are the model's own. Those below the position
    only hand on what they are given, and the last of them returns the hidden state that is given.

    Args:
        model: A causal language model.
        layers: Its decoder layers, in order.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self._rests: list[Rest] = []

    def usable(self, positions: set[int]) -> set[int]:
        """Return those positions, from 1, at which given hidden states lead to the same logits to the bit.

        It is tried out, since nothing else shows whether later layers take more from earlier ones than that.
        """
        ids = (torch.arange(_TRIED_TOKENS, device=self.model.device) % int(self.model.config.vocab_size))[
            None
        ]  # (1, T)
        tensors = (ids, ids, torch.ones_like(ids))
        found = set[int]()
        try:
            with torch.no_grad():
                logits, states = self._watch(ids)
                if not states:
                    return found
                for position in positions - {0}:
                    with self.given(states[position], position):
                        same = torch.equal(self._logits(ids), logits)
                    with self.given(states[position].roll(1, dims=1), position):
                        other = not torch.equal(self._logits(ids), logits)
                    reached = torch.equal(self.advance(tensors, None, 0, position), states[position])
                    if same and other and reached:
                        found.add(position)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            log.info("hidden states of this model can't be shared (%s)", error)
            return set()
        return found

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids)
        result: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return result

    def _watch(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the logits and the hidden state at every position, none of them if layers return more than that."""
        outputs: list[Any] = []
        entered: list[torch.Tensor] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        handles = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in self.layers]
        handles.append(self.layers[0].register_forward_pre_hook(note, with_kwargs=True))
        try:
            logits = self._logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        rests = learn_outputs(outputs, ids)
        if rests is None or len(rests) != len(self.layers) or entered[0].dim() != 3:
            return logits, []
        self._rests = rests
        return logits, [entered[0], *(output if isinstance(output, torch.Tensor) else output[0] for output in outputs)]

    def advance(
        self,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        state: torch.Tensor | None,
        reached: int,
        position: int,
    ) -> torch.Tensor:
        """Run the layers between two positions; return the hidden state, (B, T, C), at the second.

        Args:
            tensors: Token ids, labels and attention mask, (B, T) each.
            state: The hidden state at the first; `None` at the start.
            reached: The first.
            position: The second, above it.
        """
        ids, _, mask = (tensor.to(self.model.device) for tensor in tensors)

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _ReachedError(output if isinstance(output, torch.Tensor) else output[0])

        handle = self.layers[position - 1].register_forward_hook(stop)
        try:
            with self.given(state, reached):
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _ReachedError as found:
            return found.state
        finally:
            handle.remove()
        raise RuntimeError(f"layer {position - 1} was not reached")

    @contextmanager
    def given(self, state: torch.Tensor | None, position: int) -> Iterator[None]:
        """Let nothing be computed below a position, (B, T, C) stand there instead; `None`, and all is computed."""
        undo = Undo()
        try:
            if state is not None:
                for layer, rest in zip(self.layers[: position - 1], self._rests, strict=False):
                    undo.set(vars(layer), "forward", hand_on(rest))
                undo.set(vars(self.layers[position - 1]), "forward", _returning(state, self._rests[position - 1]))
            yield
        finally:
            undo.restore()


class _ReachedError(Exception):
    """Ends a forward pass where the rest of it is not needed."""

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()
        self.state = state


def _returning(state: torch.Tensor, rest: Rest) -> Any:
    return lambda *args, **kwargs: state if rest is None else (state, *rest)
