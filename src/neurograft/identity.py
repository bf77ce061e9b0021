"""Turn layers into identities that can still learn: the start of the `insert` protocol.

A layer whose output projections are zero adds nothing to the residual stream, so a model that it is inserted into is
unchanged at step 0, while gradients reach the projections at once and everything behind them after the first step.
Which tensors those projections are is found by trying, not by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurograft import probe
from neurograft.anatomy import describe
from neurograft.errors import ModelError
from neurograft.layer_weights import load_layers, to_disk
from neurograft.organ import Organ

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def as_identity(organ: Organ) -> Organ:
    """Return the organ with as few tensors zeroed as it takes to make each of its layers the identity.

    Raises:
        ModelError: No choice of zeros makes these layers an identity (layers that normalise their sum, for one).
    """
    import torch

    carrier = load_layers(
        organ.config(),
        organ.manifest.anatomy.layer_values,
        organ.tensors,
        dtype=torch.float32,
        name=organ.name,
    )
    path = describe(carrier).layers_path
    for index, layer in enumerate(carrier.get_submodule(path).children()):
        _zero_least(carrier, path, index, layer, organ.name)
    answers = probe.probe_layers(carrier, path)
    dtypes = {name: tensor.dtype for name, tensor in organ.tensors.items()}
    tensors = {
        name: tensor.clone().to(dtypes[name]) for name, tensor in to_disk(carrier, range(organ.layer_count)).items()
    }
    manifest = organ.manifest.model_copy(update={"probe": probe.to_manifest(answers, "float32")})
    return Organ(manifest, tensors)


def _zero_least(carrier: PreTrainedModel, path: str, index: int, layer: nn.Module, name: str) -> None:
    """Zero all of a layer's parameters, then give back one after the other each that the identity survives.

    Vectors (norms, biases) come first, then matrices in the order in which they are used. A layer uses what reads the
    residual stream before what writes to it, so what stays zero are the output projections.
    """
    import torch

    order = _order_of_use(carrier, path, layer)
    originals = {key: parameter.detach().clone() for key, parameter in layer.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        if not _is_identity(carrier, path, index):
            raise ModelError(
                f"layer {index} of {name} can't be made an identity by zeroing tensors, so the insert protocol does "
                f"not "
                f"work for this {carrier.config.model_type} model; use in_place."
            )
        for key in order:
            parameter = layer.get_parameter(key)
            parameter.copy_(originals[key])
            if not _is_identity(carrier, path, index):
                parameter.zero_()


def _order_of_use(carrier: PreTrainedModel, path: str, layer: nn.Module) -> list[str]:
    """Return the names of a layer's parameters: vectors, then matrices, each in the order of the modules' calls."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.append(name))
        for name, module in layer.named_modules()
    ]
    try:
        probe.probe_layers(carrier, path)
    finally:
        for handle in handles:
            handle.remove()
    first_call = {name: place for place, name in reversed(list(enumerate(called)))}

    def place(item: tuple[str, torch.Tensor]) -> tuple[bool, int]:
        owner = item[0].rpartition(".")[0]
        return item[1].ndim > 1, first_call.get(owner, len(called))

    return [name for name, _ in sorted(layer.named_parameters(), key=place)]


def _is_identity(carrier: PreTrainedModel, path: str, index: int) -> bool:
    import torch

    unchanged = probe.identity_answer(int(carrier.config.hidden_size), carrier.dtype)
    return torch.equal(probe.probe_layers(carrier, path)[index], unchanged)
