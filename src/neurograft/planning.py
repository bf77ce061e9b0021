"""A planned model: which layer comes from where, and the configuration that keeps each one's arithmetic.

The same plan serves the graft in memory and the transplant on disk, so that both make the same model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neurograft.anatomy import (
    LayerOrigin,
    build_skeleton,
    describe,
    layer_origins,
    verify_layers,
    verify_outside,
)
from neurograft.errors import IncompatibleError, ModelError
from neurograft.layer_values import Row, with_rows
from neurograft.manifest import Mode
from neurograft.steps import Step, order_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from neurograft.organ import Organ


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
