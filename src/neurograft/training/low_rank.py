"""Train an organ's matrices by low-rank changes, which are added to them afterwards: the organ is an ordinary one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neurograft.errors import ModelError, UsageError
from neurograft.sharding import fill, whole
from neurograft.surgery import Undo

SCALE = 2.0  # how much the product counts; with A of unit scale and B from zero, the usual alpha = 2 r


class LowRankChanges:
    """Low-rank changes to every linear map in some layers: W x + 2 B A x, with B zero at first (arXiv 2106.09685).

    Args:
        layers: The layers; their own parameters are left as they are until `merge`.
        rank: Rows of A and columns of B.
        seed: Seed of A.

    Raises:
        ModelError: The layers have no linear map of a known kind.
        UsageError: The rank is more than that of any of them.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], rank: int, seed: int) -> None:
        maps = [(module, _sizes(module)) for layer in layers for module in layer.modules()]
        known = [(module, sizes) for module, sizes in maps if sizes is not None]
        if not known:
            raise ModelError(
                "the organ's layers have no linear maps that could be changed by low rank; leave --rank out."
            )
        largest = max(min(sizes) for _, sizes in known)
        if rank > largest:
            raise UsageError(
                f"rank {rank} is more than any matrix of the organ has, which is {largest} at most; give a lower "
                "--rank, or leave it out, which trains all of it."
            )
        generator = torch.Generator().manual_seed(seed)
        self._undo = Undo()
        self._changed: list[Any] = []
        for module, sizes in known:
            self._change(module, *sizes, rank, generator)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains, float32."""
        return [factor for module in self._changed for factor in (module.low_rank_a, module.low_rank_b)]

    def _change(self, module: Any, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        device = module.weight.device
        # Uniform with the variance that torch's own linear layers start with.
        a = torch.nn.Parameter((torch.rand(rank, inputs, generator=generator) * 2 - 1).div_(inputs**0.5).to(device))
        b = torch.nn.Parameter(torch.zeros(outputs, rank, device=device))

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            # Asked for anew each time: where the model is spread over processes, they are whole only while it runs.
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T  # (outputs, inputs)
            result: torch.Tensor = _Changed.apply(hidden, module.low_rank_a, module.low_rank_b, weight, module.bias)
            return result

        self._undo.set(vars(module), "forward", forward)
        # Where gradients are exchanged between processes, all that trains must be found in the model.
        self._undo.set(module._parameters, "low_rank_a", a)
        self._undo.set(module._parameters, "low_rank_b", b)
        self._changed.append(module)

    def merge(self) -> None:
        """Add the changes to the layers' weights, and leave the layers as ordinary ones."""
        factors = [(whole(module.low_rank_a.detach()), whole(module.low_rank_b.detach())) for module in self._changed]
        self._undo.restore()
        with torch.no_grad():
            for module, (a, b) in zip(self._changed, factors, strict=True):
                change = SCALE * (b @ a)  # (outputs, inputs)
                fill(
                    module.weight, whole(module.weight) + (change if isinstance(module, torch.nn.Linear) else change.T)
                )
        self._changed.clear()


class _Changed(torch.autograd.Function):
    """A linear map whose change is added to its weight before it runs, so that the text passes one matrix, not three.

    Only the factors get gradients, each through the low rank; the whole matrix never does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        kind = hidden.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        entering, bias = hidden.to(narrow), None if bias is None else bias.to(narrow)
        with torch.autocast(kind, enabled=False):
            merged = (
                torch.empty_like(weight, dtype=narrow).copy_(weight).addmm_(b.to(narrow), a.to(narrow), alpha=SCALE)
            )  # (outputs, inputs)
            # A merged matrix for each map is as much memory as the layers; the weight itself is there anyway.
            ctx.merged = narrow != weight.dtype
            ctx.save_for_backward(entering, a, b, merged if ctx.merged else weight)
            ctx.dtype = hidden.dtype
            return torch.nn.functional.linear(entering, merged, bias)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None, None]:
        entering, a, b, matrix = ctx.saved_tensors
        gradient = outer[0].to(matrix.dtype)  # (..., outputs)
        flat, given = gradient.flatten(0, -2), entering.flatten(0, -2)  # (N, outputs), (N, inputs)
        narrow_a = a.to(matrix.dtype)
        low_given, low = given @ narrow_a.T, flat @ b.to(matrix.dtype)  # (N, rank) each
        of_hidden = None
        if ctx.needs_input_grad[0]:
            passed = flat @ matrix
            of_hidden = (passed if ctx.merged else passed.addmm_(low, narrow_a, alpha=SCALE)).view_as(entering)
            of_hidden = of_hidden.to(ctx.dtype)
        of_a, of_b = low.T @ given, flat.T @ low_given
        return of_hidden, of_a.to(a.dtype).mul_(SCALE), of_b.to(b.dtype).mul_(SCALE), None, None


def _sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    """Return how many features a linear map takes and gives, or `None` for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None
