"""An organ that stands at many places of one loaded model, one after another, without being made anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neurograft.anatomy import describe, layer_origins
from neurograft.compat import refuse_unfit_config, verify_tensors
from neurograft.errors import IncompatibleError, VerificationError
from neurograft.placement.candidates import Candidate
from neurograft.planning import Plan, make_plan, organ_origins
from neurograft.steps import order_layers
from neurograft.surgery import Undo, make_layers, put_layers, set_layers, skeleton_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from neurograft.organ import Organ

Weights = Mapping[str, "torch.Tensor"]
"""`{i}.{name}` -> parameter of the organ's layer i, from 0, as its module holds it."""


def plan_places(
    skeleton: PreTrainedModel, organ: Organ, candidates: Sequence[Candidate]
) -> tuple[dict[Candidate, Plan], dict[Candidate, str]]:
    """Plan an organ's way to each of many places in a model.

    Args:
        skeleton: The model on the meta device.
        organ: The organ.
        candidates: The places.

    Returns:
        The plans, and for the places where some layer would compute something else, the reason.
    """
    recipient, plans, blocked = describe(skeleton), dict[Candidate, Plan](), dict[Candidate, str]()
    origins = {"recipient": layer_origins(skeleton, "the recipient"), "organ": organ_origins(organ)}
    rows = {"recipient": list(recipient.rows), "organ": organ.manifest.anatomy.layer_values}
    for candidate in candidates:
        steps = order_layers(recipient.layer_count, organ.layer_count, at=candidate.position, mode=candidate.mode)
        try:
            plans[candidate] = make_plan(skeleton, steps, rows, origins)
        except IncompatibleError as error:
            blocked[candidate] = str(error)
    return plans, blocked


@dataclass(frozen=True)
class _Place:
    """What has to be set for the organ to stand at one place."""

    layers: list[nn.Module]
    """All decoder layers of the model that results."""
    changes: list[tuple[dict[str, Any], str, Any]]
    """An object's own attributes, the name of one, and its value there."""


class Grafts:
    """An organ that can be held at any of several places of a loaded model.

    Everything that a graft does is worked out once for each place; holding the organ there afterwards takes
    microseconds.

    Args:
        model: A loaded causal language model.
        organ: The organ.
        candidates: The places; those where it can't stand, with the reasons, are then in `blocked`.

    Raises:
        IncompatibleError: The organ does not fit the model anywhere.
        ModelError: The model is spread over devices, or of an unsupported kind.
    """

    def __init__(self, model: PreTrainedModel, organ: Organ, candidates: Sequence[Candidate]) -> None:
        self.model, skeleton = model, skeleton_of(model)
        refuse_unfit_config(organ, model)
        verify_tensors(organ)
        plans, self.blocked = plan_places(skeleton, organ, candidates)
        if not plans:
            raise IncompatibleError(next(iter(self.blocked.values())))
        path = describe(skeleton).layers_path
        self._container = model.get_submodule(path)
        self.own: list[nn.Module] = list(self._container.children())
        """The model's own layers."""
        self.layers = make_layers(model, organ, next(iter(plans.values())), self.own[0])
        """The organ's."""
        self._places: dict[Candidate, _Place] = {}
        for candidate, plan in plans.items():
            try:
                self._places[candidate] = self._place(skeleton, plan, path)
            except VerificationError as error:
                self.blocked[candidate] = str(error)
        if not self._places:
            raise IncompatibleError(next(iter(self.blocked.values())))

    def _place(self, skeleton: PreTrainedModel, plan: Plan, path: str) -> _Place:
        undo = put_layers(self.model, skeleton, plan, self.layers, path)
        changes = [(attributes, name, attributes[name]) for attributes, name, _ in undo.saved]
        layers = list(self._container.children())
        undo.restore()
        set_layers(self._container, self.own)
        return _Place(layers, changes)

    def length(self, candidate: Candidate) -> int:
        """Return how many layers the model has with the organ there."""
        return len(self._places[candidate].layers)

    @contextmanager
    def held(self, candidate: Candidate, weights: Weights | None = None) -> Iterator[None]:
        """Hold the organ at a place.

        Args:
            candidate: The place.
            weights: Parameters that the organ has there; left out, its own.
        """
        place, undo = self._places[candidate], Undo()
        before = self._lend(weights) if weights is not None else []
        try:
            set_layers(self._container, place.layers)
            for attributes, name, value in place.changes:
                undo.set(attributes, name, value)
            yield
        finally:
            undo.restore()
            set_layers(self._container, self.own)
            for parameter, data in before:
                parameter.data = data

    def _lend(self, weights: Weights) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Give the organ's parameters other values; return those that they had."""
        named = {
            f"{number}.{name}": parameter
            for number, layer in enumerate(self.layers)
            for name, parameter in layer.named_parameters()
        }
        before = [(parameter, parameter.data) for parameter in named.values()]
        for name, parameter in named.items():
            parameter.data = weights[name].to(parameter.device, parameter.dtype)
        return before
