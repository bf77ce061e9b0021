"""The frozen host around an organ: how its weights are held, and what of it is in memory."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from neurograft.anatomy import describe
from neurograft.errors import UsageError
from neurograft.models import ModelDirectory, load_model
from neurograft.surgery import Attachment, Undo
from neurograft.training.offloading import OffloadedLayers, load_offloaded
from neurograft.training.options import HostPrecision
from neurograft.training.processes import spreads, starting_device

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def check_precision(precision: HostPrecision) -> None:
    """Refuse four-bit weights where they can't be computed with.

    Raises:
        UsageError: There is no GPU, bitsandbytes is not installed, or the host is to be spread over processes.
    """
    if precision != "nf4":
        return
    if spreads():
        raise UsageError("--host-precision nf4 goes with DDP; FSDP2 spreads a host that is `float32` or as `stored`.")
    if starting_device().type not in ("cuda", "xpu"):
        raise UsageError("--host-precision nf4 needs a GPU, and there is none; hold the host as `stored`.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--host-precision nf4 needs bitsandbytes; install neurograft[nf4].")


def load_host(
    directory: ModelDirectory,
    absent: range | None,
    precision: HostPrecision,
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, OffloadedLayers | None]:
    """Load a host; one whose weights are to be packed is on the CPU, until `pack` was called.

    Args:
        directory: The model.
        absent: Numbers of layers that stay on the disk, half-open and zero-based; `None` to load all of it.
        precision: How its weights are held.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        ModelError: It can't be read, or not in parts.
    """
    dtype = torch.float32 if precision == "float32" else None
    device = torch.device("cpu") if precision == "nf4" else starting_device()
    if absent is not None:
        return load_offloaded(directory, absent, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    model = load_model(directory, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    torch.nn.Module.to(model, device)
    return model, None


def pack(model: PreTrainedModel, attachment: Attachment, below: OffloadedLayers | None) -> None:
    """Pack the matrices of a host's layers into four bits a weight (NF4), and put the model where it computes.

    Args:
        model: The host, with an organ in it, which stays as it is.
        attachment: The organ.
        below: Layers that are not in memory; each is packed when it is read.
    """
    device, organ = starting_device(), set(map(id, attachment.layers))
    for layer in model.get_submodule(describe(model).layers_path).children():
        if id(layer) not in organ and not any(parameter.is_meta for parameter in layer.parameters()):
            _pack_layer(layer, device, Undo())
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    if below is not None:
        below.finish = lambda layer, undo: _pack_layer(layer, device, undo)


def _pack_layer(layer: nn.Module, device: torch.device, undo: Undo) -> None:
    """Replace a layer's plain linear modules by packed ones, on a device."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear:
                continue
            packed: Any = Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=child.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            # Scales that are packed once more would hide from the digest that a cache of hidden states goes by.
            packed.weight = Params4bit(
                child.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            packed.bias = child.bias
            undo.set(module._modules, name, packed.to(device).eval())  # moving it packs it
