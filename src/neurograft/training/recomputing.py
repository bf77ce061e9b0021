"""Layers that keep for the backward pass only what enters them, and compute the rest anew there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from neurograft.surgery import Undo

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def recomputing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let decoder layers compute again what their backward pass needs, inside the block (arXiv 1604.06174).

    The last one keeps it: its backward pass comes first, when all that it computed would have to be there again. What a
    layer computes is wrapped and not its call, so that hooks run once, and what a layer is at the moment is what
    computes, compiled or not.

    Args:
        layers: Those that a gradient goes through, in order; the block holds both passes.
    """
    undo = Undo()
    try:
        for layer in layers[:-1]:
            undo.set(vars(layer), "forward", _again(layer.forward))
        yield
    finally:
        undo.restore()


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_and_again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return forward_and_again
