"""Put an organ into a loaded model and take it out again, exactly, without a copy of the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft import probe
from neurograft.allocator import give_back_mapped
from neurograft.anatomy import build_skeleton, describe, differences, layer_facts, outside_facts
from neurograft.compat import check_loaded, refuse_unfit_config
from neurograft.errors import IncompatibleError, ModelError, UsageError, VerificationError
from neurograft.layer_values import changed_values
from neurograft.layer_weights import load_layers
from neurograft.manifest import Mode
from neurograft.mixed_dtypes import convert_at_borders
from neurograft.organ import Organ, read_organ
from neurograft.planning import Plan, make_plan, organ_origins, plan_graft
from neurograft.several import Modes, Organs, Placement, Positions, each_place, in_order, list_organs, refuse_collisions
from neurograft.steps import Step, recommended_place

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_MISSING = object()
_attached: weakref.WeakKeyDictionary[PreTrainedModel, list[Attachment]] = weakref.WeakKeyDictionary()


@dataclass
class Undo:
    """Attributes that were overwritten, in order, with the very objects that stood there."""

    saved: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def set(self, attributes: dict[str, Any], name: str, value: Any) -> None:
        """Overwrite one of an object's own attributes, given as its `vars()`."""
        self.saved.append((attributes, name, attributes.get(name, _MISSING)))
        attributes[name] = value

    def restore(self) -> None:
        """Put back what stood there, last first."""
        while self.saved:
            attributes, name, value = self.saved.pop()
            if value is _MISSING:
                attributes.pop(name, None)
            else:
                attributes[name] = value


@dataclass
class Attachment:
    """An organ inside a loaded model.

    Attributes:
        organ: The organ.
        positions: Numbers of its layers in the model as it is now.
        layers: Its modules, in order; what a training loop trains.
    """

    organ: Organ
    positions: list[int]
    layers: list[nn.Module]
    removed: list[nn.Module]
    _original: list[nn.Module]
    _undo: Undo


def attach(
    model: PreTrainedModel,
    organ: Organ | str | Path,
    *,
    at: int | None = None,
    mode: Mode | None = None,
    verify: bool = True,
    dtype: torch.dtype | None = None,
) -> Attachment:
    """Put an organ into a loaded model, in place; `detach` takes it out again.

    The organ's layers are made in the model's dtype, if no other is asked for, and on its device; the model's own
    layers stay the objects that they are. Where the organ can't work as it did in its donor, the model is left as it
    was.

    Args:
        model: A loaded transformers causal language model.
        organ: The organ, or the path of its file.
        at: Position, 0 to L; left out, what the organ recommends.
        mode: `replace` or `insert`; left out, what the organ recommends.
        verify: Ask the layers the probe questions before and after (two short forward passes).
        dtype: In which the organ's layers are held and compute; left out, the model's.

    Raises:
        UsageError: The position is out of range, or what was given is no loaded transformers model.
        IncompatibleError: The organ does not fit.
        VerificationError: A layer computed something else after the change, which was undone.
        ModelError: The model is spread over devices, or of an unsupported kind.
    """
    _require_model(model)
    organ = organ if isinstance(organ, Organ) else read_organ(organ)
    position, chosen = recommended_place(organ.manifest, at=at, mode=mode)
    skeleton = skeleton_of(model)
    check_loaded(organ, model, skeleton, at=position, mode=chosen)
    plan = plan_graft(skeleton, organ, at=position, mode=chosen)
    path = describe(skeleton).layers_path
    before = probe.probe_layers(model, path) if verify else None
    attachment = _swap(model, skeleton, plan, organ, path, dtype)
    _attached.setdefault(model, []).append(attachment)
    if before is not None:
        _verify_or_undo(model, attachment, plan, before, path)
    return attachment


def attach_alone(model: PreTrainedModel, organ: Organ, *, dtype: torch.dtype | None = None) -> Attachment:
    """Let an organ stand alone between a loaded model's embedding and head: the paper's wrapper (arXiv 2601.13580).

    Args:
        model: A loaded model.
        organ: The organ.
        dtype: See `attach`.

    Raises:
        IncompatibleError: The organ does not fit, or its layers would compute something else there.
    """
    skeleton = skeleton_of(model)
    refuse_unfit_config(organ, model)
    steps = tuple(Step("organ", layer) for layer in range(organ.layer_count))
    rows = {"organ": organ.manifest.anatomy.layer_values}
    plan = make_plan(skeleton, steps, rows, {"organ": organ_origins(organ)})
    attachment = _swap(model, skeleton, plan, organ, describe(skeleton).layers_path, dtype)
    _attached.setdefault(model, []).append(attachment)
    return attachment


def detach(model: PreTrainedModel) -> Organ:
    """Take out the organ that was attached last; the model is then exactly what it was before.

    Returns:
        The organ as it was attached; for weights that were trained since, see `neurograft.training`.

    Raises:
        UsageError: No organ is attached, or what was given is no loaded transformers model.
    """
    _require_model(model)
    stack = _attached.get(model, [])
    if not stack:
        raise UsageError("no organ is attached to this model.")
    attachment = stack.pop()
    attachment._undo.restore()
    set_layers(model.get_submodule(describe(skeleton_of(model)).layers_path), attachment._original)
    return attachment.organ


def give_up_originals(model: PreTrainedModel, attachment: Attachment) -> None:
    """Free what only undoing needs: the layers that an organ took the place of, and its tensors as they were read.

    The organ can't be detached from the model any more, and the attachment's organ has no values.

    Args:
        model: The model.
        attachment: What was attached to it last.

    Raises:
        UsageError: Another organ was attached since.
    """
    stack = _attached.get(model, [])
    if not stack or stack[-1] is not attachment:
        raise UsageError(f"{attachment.organ.name} is not what was attached to this model last.")
    stack.pop()
    attachment.organ = attachment.organ.without_values()
    for layer in attachment.removed:
        give_back_mapped(layer.parameters())
        layer.to("meta")
    attachment.removed.clear()
    attachment._original.clear()


@contextmanager
def graft(
    model: PreTrainedModel,
    organ: Organs,
    *,
    at: Positions = None,
    mode: Modes = None,
    verify: bool = True,
) -> Iterator[PreTrainedModel]:
    """Hold one or several organs in a loaded model for the length of a `with` block.

    Yields `model` itself; on exit, also by an exception, it is exactly what it was. Arguments, errors: as in `attach`;
    for several organs, positions and modes as in `transplant`.

    Raises:
        IncompatibleError: Two organs would stand in each other's way.
    """
    _require_model(model)
    with ExitStack() as blocks:
        # From the last to the first, so that each position is still the one that was meant.
        for placement in reversed(_placements(model, organ, at, mode)):
            attachment = attach(model, placement.organ, at=placement.at, mode=placement.mode, verify=verify)
            blocks.callback(_detach_own, model, attachment)
        yield model


def _placements(model: PreTrainedModel, organs: Organs, at: Positions, mode: Modes) -> list[Placement]:
    """Decide where organs go in a loaded model, in the order in which they come to stand."""
    opened = [organ if isinstance(organ, Organ) else read_organ(organ) for organ in list_organs(organs)]
    placements = [
        Placement(organ, *recommended_place(organ.manifest, at=position, mode=chosen))
        for organ, (position, chosen) in zip(opened, each_place(at, mode, len(opened)), strict=True)
    ]
    refuse_collisions(placements, len(describe(skeleton_of(model)).rows))
    return in_order(placements)


def _detach_own(model: PreTrainedModel, attachment: Attachment) -> None:
    """Detach what a block attached, unless that was done inside the block.

    Raises:
        UsageError: Others were attached after it.
    """
    stack = _attached.get(model, [])
    if any(other is attachment for other in stack[:-1]):
        raise UsageError(f"organs attached after {attachment.organ.name} must be detached before its block ends.")
    if stack and stack[-1] is attachment:
        detach(model)


def _require_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if isinstance(model, Attachment):
        raise UsageError("this is what attach returned; give the model itself, as in detach(model).")
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"an organ is put into a loaded transformers model, and this is a {type(model).__name__}; load one with "
            "AutoModelForCausalLM."
        )


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Build the meta-device twin of a loaded model."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ModelError(
            f"the model is spread over {', '.join(sorted(devices))}; load it on one device to put an organ in."
        )
    skeleton = build_skeleton(model.config)
    if type(skeleton) is not type(model):
        raise ModelError(
            f"the model is a {type(model).__name__}; load it with AutoModelForCausalLM, which gives a "
            f"{type(skeleton).__name__}."
        )
    return skeleton


def _swap(
    model: PreTrainedModel,
    skeleton: PreTrainedModel,
    plan: Plan,
    organ: Organ,
    path: str,
    dtype: torch.dtype | None,
) -> Attachment:
    """Put the planned layers in place; everything that is changed is noted, and undone if anything fails."""
    original = list(model.get_submodule(path).children())
    new = make_layers(model, organ, plan, original[0], dtype)
    undo = put_layers(model, skeleton, plan, new, path)
    kept = {step.layer for step in plan.steps if step.source == "recipient"}
    removed = [layer for index, layer in enumerate(original) if index not in kept]
    return Attachment(organ, plan.organ_positions, new, removed, original, undo)


def put_layers(model: PreTrainedModel, skeleton: PreTrainedModel, plan: Plan, new: list[nn.Module], path: str) -> Undo:
    """Put an organ's layers, made by `make_layers`, where a plan says; if that fails, the model is as it was.

    Args:
        model: The model.
        skeleton: Its twin on the meta device.
        plan: Where each layer of the result comes from.
        new: The organ's layers.
        path: Dotted path of the model's layer list.

    Returns:
        What was changed beside the list of layers.
    """
    container, undo = model.get_submodule(path), Undo()
    original = list(container.children())
    source = {"recipient": original, "organ": new}
    try:
        _patch_outside(model, skeleton, plan, path, undo)
        set_layers(container, [source[step.source][step.layer] for step in plan.steps])
        _patch_numbers(container, plan, skeleton, path, undo)
        _patch_configs(model, plan, undo)
    except BaseException:
        undo.restore()
        set_layers(container, original)
        raise
    return undo


def make_layers(
    model: PreTrainedModel, organ: Organ, plan: Plan, neighbour: nn.Module, dtype: torch.dtype | None = None
) -> list[nn.Module]:
    """Make the organ's layers as modules that look like the model's own: dtype, device, mode, checkpointing, hooks."""
    outside = next(neighbour.parameters()).dtype
    carrier = load_layers(
        plan.config,
        organ.manifest.anatomy.layer_values,
        organ.tensors,
        dtype=dtype or outside,
        name=organ.name,
    )
    _install_output_hooks(model, carrier)
    layers = list(carrier.get_submodule(describe(carrier).layers_path).children())
    checkpointing = next((m for m in neighbour.modules() if getattr(m, "gradient_checkpointing", False)), None)
    for layer in layers:
        layer.to(model.device)  # a neighbour's own may be "meta", where the model's layers stay on the disk
        layer.train(model.training)
        if dtype not in (None, outside):
            convert_at_borders(layer, inside=dtype, outside=outside)
        for module in layer.modules():
            if getattr(module, "config", None) is carrier.config:
                vars(module)["config"] = model.config
            if checkpointing is not None and hasattr(module, "gradient_checkpointing"):
                vars(module)["gradient_checkpointing"] = True
                vars(module)["_gradient_checkpointing_func"] = vars(checkpointing)["_gradient_checkpointing_func"]
    return layers


def _install_output_hooks(model: nn.Module, carrier: PreTrainedModel) -> None:
    """Hook the new layers for `output_hidden_states` if the model's are hooked already.

    transformers installs these hooks once, at the first forward pass that asks for them, and misses later layers.
    """
    if any(getattr(module, "_output_capturing_hooks_installed", False) for module in model.modules()):
        from transformers.utils.output_capturing import install_all_output_capturing_hooks

        install_all_output_capturing_hooks(carrier)


def set_layers(container: nn.Module, layers: list[nn.Module]) -> None:
    """Give a ModuleList other children; the list itself stays the same object."""
    container._modules.clear()
    for index, layer in enumerate(layers):
        container._modules[str(index)] = layer


def _patch_numbers(container: nn.Module, plan: Plan, skeleton: PreTrainedModel, path: str, undo: Undo) -> None:
    """Tell every layer its new number, wherever it keeps it.

    What differs between a layer's facts in the planned skeleton and its present ones can only be its number, or a list
    over all layers, since the plan was verified.
    """
    planned = plan.skeleton.get_submodule(path)
    old = skeleton.get_submodule(path)
    for position, step in enumerate(plan.steps):
        wanted = layer_facts(planned.get_submodule(str(position)))
        layer = container.get_submodule(str(position))
        present = layer_facts(old.get_submodule(str(step.layer)) if step.source == "recipient" else layer)
        for name, (_, value) in differences(present, wanted).items():
            module_path, _, attribute = name.rpartition(".")
            if name.startswith(("class of ", "shape of ")) or type(value) not in (int, list):
                raise VerificationError(
                    f"layer {position} can't be made what the plan says: {name} would be {value!r}."
                )
            undo.set(vars(layer.get_submodule(module_path)), attribute, value)


def _patch_outside(model: nn.Module, skeleton: nn.Module, plan: Plan, path: str, undo: Undo) -> None:
    """Update what modules outside the layers remember of the configuration since they were built."""
    changes = differences(outside_facts(skeleton, path), outside_facts(plan.skeleton, path))
    for name, (old, value) in changes.items():
        if name.startswith("buffer "):
            # One that is no longer needed does no harm; one that is missing can only be made by building anew.
            if old == "absent":
                raise IncompatibleError(
                    f"the loaded model was built without {name.removeprefix('buffer ')}, which the organ's kind of "
                    f"layer needs; "
                    "transplant on disk instead, where the model is built anew."
                )
            continue
        module_path, _, attribute = name.rpartition(".")
        undo.set(vars(model.get_submodule(module_path)), attribute, value)


def _patch_configs(model: PreTrainedModel, plan: Plan, undo: Undo) -> None:
    """Write the new per-layer values into the model's configuration, and into any copies that its modules hold."""
    rows = describe(plan.skeleton).rows
    values = changed_values(model.config, list(rows))
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    for config in configs.values():
        if type(config) is type(model.config):
            for name, value in values.items():
                undo.set(vars(config), name, value)


def _verify_or_undo(
    model: PreTrainedModel, attachment: Attachment, plan: Plan, before: torch.Tensor, path: str
) -> None:
    """Ask all layers the probe questions again, and detach if one answers otherwise."""
    try:
        after = probe.probe_layers(model, path)
        verify_graft([attachment.organ], plan.steps, before, after, str(model.dtype).removeprefix("torch."))
    except BaseException:
        detach(model)
        raise


def verify_graft(
    organs: Sequence[Organ], steps: Sequence[Step], before: torch.Tensor, after: torch.Tensor, dtype: str
) -> None:
    """Check that every layer of a grafted model answers the probe as it did where it comes from.

    The layers of an organ that was never asked, and so carries no answers, can't be compared.

    Args:
        organs: The organs, in the order in which they stand.
        steps: Where each layer comes from; the organs' layers are numbered through.
        before: (L, T, S) answers of the recipient's layers before.
        after: (L', T, S) answers of the new model's layers.
        dtype: The dtype that both were computed in.

    Raises:
        VerificationError: Names the layer.
    """
    positions = [position for position, step in enumerate(steps) if step.source == "organ"]
    for organ in organs:
        own, positions = positions[: organ.layer_count], positions[organ.layer_count :]
        if organ.manifest.probe is not None:
            probe.verify_answers(organ.manifest.probe, after[own], dtype, organ.name)
    for position, step in enumerate(steps):
        if step.source == "recipient":
            error = probe.relative_error(before[step.layer], after[position])
            if not error <= probe.TOLERANCE_SAME_DTYPE:
                raise VerificationError(
                    f"the recipient's layer {step.layer} would compute something else at position {position} "
                    f"(answers to the probe differ by {error:.2g} of their size), so the organ "
                    f"{' and '.join(organ.name for organ in organs)} was not put in."
                )


def attached(model: PreTrainedModel) -> tuple[Attachment, ...]:
    """Return what is attached to a model, first to last."""
    return tuple(_attached.get(model, ()))


def tensors_of(attachment: Attachment, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """Return an attached organ's tensors as they are now, in disk form, copied to the CPU."""
    from neurograft.layer_weights import to_disk

    positions = range(attachment.positions[0], attachment.positions[-1] + 1)
    return {name: tensor.detach().cpu().clone() for name, tensor in to_disk(model, positions).items()}
