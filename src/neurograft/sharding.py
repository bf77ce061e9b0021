"""Tensors that are spread over several processes, handled as if they were whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def is_spread(module: nn.Module) -> bool:
    """Whether a module was given to torch's `fully_shard`."""
    return hasattr(module, "unshard")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over several processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")  # importing DTensor takes long, and few runs have one


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as each process would hold it alone; where it is spread, all processes must ask at once."""
    spread: Any = tensor
    gathered: torch.Tensor = spread.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def spread_like(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor on the device of `target`, and spread as `target` is; all processes must do it at once."""
    placed = values.to(target.device)
    if not is_sharded(target):
        return placed
    from torch.distributed.tensor import distribute_tensor

    pattern: Any = target
    return distribute_tensor(placed, pattern.device_mesh, pattern.placements)


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be spread; all processes must do it at once."""
    target.detach().copy_(spread_like(values, target))
