"""The order of layers in a planned model: which of them comes from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neurograft.errors import UsageError
from neurograft.manifest import Manifest, Mode


@dataclass(frozen=True)
class Step:
    """Where one layer of the planned model comes from."""

    source: Literal["recipient", "organ"]
    layer: int
    """Zero-based number of the layer in its source."""


def order_layers(layer_count: int, organ_layers: int, *, at: int, mode: Mode) -> tuple[Step, ...]:
    """Return the order of layers after putting k organ layers into a model of L layers.

    Args:
        layer_count: L.
        organ_layers: k.
        at: Position: how many recipient layers stand before the organ, 0 to L (replace: to L - k).
        mode: `replace` or `insert`.

    Raises:
        UsageError: The position is out of range, or the mode has another name.
    """
    check_position(layer_count, organ_layers, at=at, mode=mode)
    resume = at + organ_layers if mode == "replace" else at
    before = [Step("recipient", layer) for layer in range(at)]
    organ = [Step("organ", layer) for layer in range(organ_layers)]
    return (*before, *organ, *(Step("recipient", layer) for layer in range(resume, layer_count)))


def check_position(layer_count: int, organ_layers: int, *, at: int, mode: Mode) -> None:
    """Refuse a mode that does not exist or a position that is out of range."""
    if mode not in ("replace", "insert"):
        raise UsageError(f"the mode is {mode!r}; it can be replace or insert.")
    last = layer_count - organ_layers if mode == "replace" else layer_count
    if last < 0:
        raise UsageError(f"an organ of {organ_layers} layers can't replace layers of a model that has {layer_count}.")
    if not 0 <= at <= last:
        raise UsageError(
            f"position {at} is out of range: to {mode} {organ_layers} layers in a model of {layer_count}, it can be "
            f"0 to {last}."
        )


def recommended_place(manifest: Manifest, *, at: int | None, mode: Mode | None) -> tuple[int, Mode]:
    """Fill in what the caller left open with what the organ's manifest recommends."""
    return (manifest.recommended_position if at is None else at, mode or manifest.recommended_mode)
