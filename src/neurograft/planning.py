"""A planned model: which layer comes from where, and the configuration that keeps each one's arithmetic.

The same plan serves the graft in memory and the transplant on disk, so that both make the same model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from neurograft.anatomy import (
    LayerOrigin,
    build_skeleton,
    describe,
    layer_origins,
    verify_layers,
    verify_outside,
)
from neurograft.errors import IncompatibleError, ModelError, UsageError
from neurograft.layer_values import Row, with_rows
from neurograft.manifest import Manifest, Mode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from neurograft.organ import Organ


@dataclass(frozen=True)
class Step:
    """Where one layer of the planned model comes from."""

    source: Literal["recipient", "organ"]
    layer: int
    """Zero-based number of the layer in its source."""


@dataclass(frozen=True)
class Plan:
    """A model to be made, verified on the meta device."""

    steps: tuple[Step, ...]
    """One entry for each layer of the new model, in order."""
    config: PreTrainedConfig
    skeleton: PreTrainedModel = field(repr=False)

    @property
    def organ_positions(self) -> list[int]:
        """Numbers, in the new model, of the layers that come from the organ."""
        return [position for position, step in enumerate(self.steps) if step.source == "organ"]


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


def plan_graft(skeleton: PreTrainedModel, organ: Organ, *, at: int, mode: Mode) -> Plan:
    """Plan an organ's way into a model.

    Args:
        skeleton: The recipient on the meta device (`anatomy.build_skeleton`).
        organ: The organ.
        at: Position.
        mode: `replace` or `insert`.

    Raises:
        UsageError: The position is out of range.
        IncompatibleError: Some layer would compute something else than where it comes from.
    """
    recipient = describe(skeleton)
    steps = order_layers(recipient.layer_count, organ.layer_count, at=at, mode=mode)
    origins = {"recipient": layer_origins(skeleton, "the recipient"), "organ": organ_origins(organ)}
    rows = {"recipient": list(recipient.rows), "organ": organ.manifest.anatomy.layer_values}
    return make_plan(skeleton, steps, rows, origins)


def organ_origins(organ: Organ) -> list[LayerOrigin]:
    """Describe an organ's layers as they were in the model that they stood in."""
    donor = layer_origins(build_skeleton(organ.config()), "the organ's donor")
    first = organ.manifest.anatomy.first_layer
    if first + organ.layer_count > len(donor):
        raise IncompatibleError(
            f"the organ {organ.name} says that it stood at layer {first} of a model with {len(donor)} layers."
        )
    return donor[first : first + organ.layer_count]


def make_plan(
    skeleton: PreTrainedModel,
    steps: tuple[Step, ...],
    rows: dict[str, list[Row]],
    origins: dict[str, list[LayerOrigin]],
) -> Plan:
    """Build and verify the model that `steps` describe.

    Raises:
        IncompatibleError: It can't be expressed, or some layer would compute something else.
    """
    try:
        config = with_rows(skeleton.config, [rows[step.source][step.layer] for step in steps])
        planned = build_skeleton(config)
        verify_outside(planned, skeleton, describe(skeleton).layers_path)
        verify_layers(planned, [origins[step.source][step.layer] for step in steps])
    except ModelError as error:
        raise IncompatibleError(str(error)) from error
    return Plan(steps, config, planned)


def recommended_place(manifest: Manifest, *, at: int | None, mode: Mode | None) -> tuple[int, Mode]:
    """Fill in what the caller left open with what the organ's manifest recommends."""
    return (manifest.recommended_position if at is None else at, mode or manifest.recommended_mode)
