"""Which layers a text asks to change: cheap measurements, one number for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from neurograft.arithmetic import Arithmetic
from neurograft.loss import NextTokenLoss
from neurograft.surgery import Undo
from neurograft.training.prefix import Prefix, UnusualOutputError, behind_states, hand_on

if TYPE_CHECKING:
    from torch import nn

    from neurograft.training.loop import Batches

_BATCHES = 4
# The head is most of what the logit lens costs, and it is run once for each boundary.
_LENS_TOKENS = 512


def layer_signals(
    model: Any, layers: Sequence[nn.Module], batches: Batches, arithmetic: Arithmetic
) -> tuple[list[float], list[float]]:
    """Return what a few batches of text say of each layer.

    Args:
        model: The host, in evaluation mode; it is not changed.
        layers: Its decoder layers.
        batches: The text.
        arithmetic: How matrices are multiplied.

    Returns:
        For each layer the mean squared norm of the gradient of its parameters (the trace of an empirical Fisher
        information), in nats squared, and its influence: 1 less the mean cosine between what enters and what leaves it.
    """
    squares, influence = [0.0] * len(layers), [0.0] * len(layers)
    rows = batches.training.input_ids.shape[0]
    count = max(1, min(_BATCHES, rows // batches.batch_size))
    model.requires_grad_(False)
    loss = NextTokenLoss(model)
    handles = [
        *(handle for number, layer in enumerate(layers) for handle in _watch_gradients(layer, number, squares)),
        *(_watch_output(layer, number, influence) for number, layer in enumerate(layers)),
    ]
    try:
        for number in range(count):
            chosen = slice(number * batches.batch_size, (number + 1) * batches.batch_size)
            with arithmetic.active(model.device):
                losses = loss(batches.training.input_ids[chosen], batches.training.labels[chosen])
            with arithmetic.active(model.device, backward=True):
                losses.sum().div(max(int((losses != 0).sum()), 1)).backward()
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    return [value / count for value in squares], [value / count for value in influence]


def logit_lens(model: Any, layers: Sequence[nn.Module], batches: Batches) -> list[float]:
    """Return how well the text can be read off the hidden state at each boundary of a model.

    What has passed the first b layers goes straight to whatever follows the last one: the final norm and the head
    (the logit lens; arXiv 2303.08112 says where it misleads).

    Args:
        model: The host, in evaluation mode; it is not changed.
        layers: Its L decoder layers.
        batches: The text.

    Returns:
        L + 1 mean losses in nats per token, after 0 to L layers; none where layers hand on more than hidden states, so
        that they can't be passed over.
    """
    sequences = max(1, min(batches.batch_size, _LENS_TOKENS // batches.training.input_ids.shape[1]))
    ids, labels = batches.training.input_ids[:sequences], batches.training.labels[:sequences]
    prefix, boundaries = Prefix(model, len(layers) - 1), _Boundaries()
    if not prefix.works():
        return []
    handles = [layer.register_forward_hook(boundaries.note, with_kwargs=True) for layer in layers]
    loss = NextTokenLoss(model)
    try:
        with torch.no_grad():
            boundaries.clear()
            whole = _mean(loss(ids, labels))
    finally:
        for handle in handles:
            handle.remove()
    try:
        rest = behind_states(boundaries.last)
    except UnusualOutputError:
        return []
    undo, read = Undo(), []
    undo.set(vars(layers[-1]), "forward", hand_on(rest))
    try:
        with torch.no_grad():
            for states in boundaries.entering:
                with prefix.given(states):
                    read.append(_mean(loss(ids, labels)))
    finally:
        undo.restore()
    return [*read, whole]


class _Boundaries:
    """What enters each layer of one forward pass, (B, T, C) each, and what the last one returns."""

    def __init__(self) -> None:
        self.entering: list[torch.Tensor] = []
        self.last: Any = None

    def clear(self) -> None:
        """Forget earlier passes."""
        self.entering.clear()

    def note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep what entered a layer, and what it returned."""
        self.entering.append((args[0] if args else kwargs["hidden_states"]).detach())
        self.last = output


def _mean(losses: torch.Tensor) -> float:
    return float(losses.sum() / max(int((losses != 0).sum()), 1))


def _watch_gradients(layer: nn.Module, number: int, squares: list[float]) -> list[Any]:
    """Add up a layer's squared gradients as they come, and let go of them at once."""

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        squares[number] += float(parameter.grad.double().square().sum())
        parameter.grad = None

    handles = []
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(note))
    return handles


def _watch_output(layer: nn.Module, number: int, influence: list[float]) -> Any:
    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        left = output if isinstance(output, torch.Tensor) else output[0]
        cosine = torch.nn.functional.cosine_similarity(entered.detach().float(), left.detach().float(), dim=-1)
        influence[number] += float(1 - cosine.mean())

    return layer.register_forward_hook(note, with_kwargs=True)
