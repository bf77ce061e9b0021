"""The order of layers in a planned model: which of them comes from where."""

from __future__ import annotations

from collections.abc import Sequence
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
    return order_several(layer_count, [(organ_layers, at, mode)])


def order_several(layer_count: int, places: Sequence[tuple[int, int, Mode]]) -> tuple[Step, ...]:
    """Return the order of layers after putting several organs into a model of L layers.

    Args:
        layer_count: L.
        places: For each organ k, position and mode, in the order in which they stand; no two overlap. Positions are
            those in the model as it is before.

    Returns:
        The steps. The organs' layers are numbered through, from the first organ's first to the last one's last.

    Raises:
        UsageError: A position is out of range, or a mode has another name.
    """
    steps: list[Step] = []
    done = numbered = 0
    for organ_layers, at, mode in places:
        check_position(layer_count, organ_layers, at=at, mode=mode)
        steps += [Step("recipient", layer) for layer in range(done, at)]
        steps += [Step("organ", numbered + layer) for layer in range(organ_layers)]
        numbered += organ_layers
        done = at + organ_layers if mode == "replace" else at
    return (*steps, *(Step("recipient", layer) for layer in range(done, layer_count)))


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
