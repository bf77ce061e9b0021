"""Layers of one dtype in a model of another, such as float32 layers that train in a bfloat16 model that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def convert_at_borders(layer: nn.Module, *, inside: torch.dtype, outside: torch.dtype) -> None:
    """Let a layer take and give tensors of the dtype outside it, and compute in its own.

    Hidden states, masks and rotary embeddings are converted on the way in, what the layer returns on the way out.

    Args:
        layer: The layer.
        inside: The dtype of its parameters.
        outside: The dtype of the model around it.
    """
    compute = layer.forward

    # In `forward`, not in hooks: what hooks on the layer see and set is then of the dtype outside.
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = compute(*_convert(args, outside, inside), **_convert(kwargs, outside, inside))
        return _convert(output, inside, outside)

    vars(layer)["forward"] = forward


def _convert(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Convert the tensors of one dtype in a value; other values, such as caches and masks of truths, stay."""
    if getattr(value, "dtype", None) is before:
        return value.to(after)
    if type(value) in (tuple, list):
        return type(value)(_convert(entry, before, after) for entry in value)
    if type(value) is dict:
        return {name: _convert(entry, before, after) for name, entry in value.items()}
    return value
