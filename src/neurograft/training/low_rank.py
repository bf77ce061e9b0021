"""Train an organ's matrices by low-rank changes, which are added to them afterwards: the organ is an ordinary one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neurograft.errors import ModelError
from neurograft.surgery import Undo

_SCALE = 2.0  # how much the product counts; with A of unit scale and B from zero, the usual alpha = 2 r


class LowRankChanges:
    """Low-rank changes to every linear map in some layers: W x + 2 B A x, with B zero at first (arXiv 2106.09685).

    Args:
        layers: The layers; their own parameters are left as they are until `merge`.
        rank: Rows of A and columns of B.
        seed: Seed of A.

    Raises:
        ModelError: The layers have no linear map of a known kind.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._undo = Undo()
        self._changed: list[tuple[Any, torch.nn.Parameter, torch.nn.Parameter]] = []
        for layer in layers:
            for module in list(layer.modules()):
                sizes = _sizes(module)
                if sizes is not None:
                    self._change(module, *sizes, rank, generator)
        if not self._changed:
            raise ModelError(
                "the organ's layers have no linear maps that could be changed by low rank; leave --rank out."
            )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains, float32."""
        return [factor for _, a, b in self._changed for factor in (a, b)]

    def _change(self, module: Any, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        device = module.weight.device
        # Uniform with the variance that torch's own linear layers start with.
        a = torch.nn.Parameter((torch.rand(rank, inputs, generator=generator) * 2 - 1).div_(inputs**0.5).to(device))
        b = torch.nn.Parameter(torch.zeros(outputs, rank, device=device))
        original = module.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            low = torch.nn.functional.linear(hidden.to(a.dtype), a)  # (..., rank)
            changed = original(hidden)
            return changed + torch.nn.functional.linear(low, b).to(changed.dtype) * _SCALE

        self._undo.set(vars(module), "forward", forward)
        # Where gradients are exchanged between processes, all that trains must be found in the model.
        self._undo.set(module._parameters, "low_rank_a", a)
        self._undo.set(module._parameters, "low_rank_b", b)
        self._changed.append((module, a, b))

    def merge(self) -> None:
        """Add the changes to the layers' weights, and leave the layers as ordinary ones."""
        self._undo.restore()
        with torch.no_grad():
            for module, a, b in self._changed:
                change = _SCALE * (b @ a)  # (outputs, inputs)
                module.weight += change if isinstance(module, torch.nn.Linear) else change.T
        self._changed.clear()


def _sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    """Return how many features a linear map takes and gives, or `None` for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None
