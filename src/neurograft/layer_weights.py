"""The tensors of layers in two forms: as transformers writes them to disk, and as its modules hold them.

The forms differ where transformers fuses tensors on load (the experts of a mixture, for one). Organ files hold the disk
form, which is what other programs read and what stays the same between versions of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neurograft.allocator import give_back_mapped
from neurograft.anatomy import build_skeleton, describe
from neurograft.errors import ModelError, OrganFileError
from neurograft.layer_values import Row, with_rows
from neurograft.sharding import whole

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

Tensors = dict[str, "torch.Tensor"]

# Layers do not depend on the vocabulary, so a model that only carries them can do with a tiny one.
_CARRIER_VOCABULARY = 8
_ORGAN_KEY = re.compile(r"^layers\.(\d+)\.(.+)$")


def carrier_config(config: PreTrainedConfig, rows: Sequence[Row]) -> PreTrainedConfig:
    """Return the configuration of a model that consists of the given layers and a tiny embedding and head."""
    carrier = with_rows(config, list(rows))
    carrier.vocab_size = _CARRIER_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(carrier, name, None), int | list):
            setattr(carrier, name, 0)  # some configurations refuse None, and larger ids are outside the vocabulary
    return carrier


def expected_tensors(config: PreTrainedConfig, layers: range) -> dict[str, tuple[int, ...]]:
    """Return the names, `layers.{i}.{name}`, and shapes that an organ file of some layers of a model holds."""
    return _shapes(to_disk(build_skeleton(config), layers))


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def to_disk(model: PreTrainedModel, layers: range) -> Tensors:
    """Return the tensors of some layers of a model in disk form, named `layers.{i}.{name}` with i from 0."""
    from transformers.core_model_loading import revert_weight_conversion

    path = describe(model).layers_path
    chosen = {
        f"{path}.{number}.{name}": whole(tensor.detach())
        for number in layers
        for name, tensor in model.get_submodule(f"{path}.{number}").state_dict().items()
    }
    prefix = re.compile(r"^(?:.*?\.)?" + re.escape(path.rpartition(".")[2]) + r"\.(\d+)\.(.+)$")
    renamed = {}
    for name, tensor in revert_weight_conversion(model, chosen).items():
        match = prefix.match(name)
        if match is None:
            raise ModelError(f"transformers writes the layer tensor {name} under a name without a layer number.")
        renamed[f"layers.{int(match[1]) - layers.start}.{match[2]}"] = tensor.contiguous()
    return renamed


def load_layers(
    config: PreTrainedConfig,
    rows: Sequence[Row],
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    name: str,
) -> PreTrainedModel:
    """Build a model that carries the given layers, with a tiny random embedding and head around them.

    Args:
        config: The configuration of the model that the layers come from.
        rows: The per-layer values of the k layers.
        tensors: Their tensors in disk form, `layers.{i}.{name}`.
        dtype: The floating-point dtype to hold them in.
        name: What the tensors belong to, for messages.

    Raises:
        ModelError: These layers need other tensors where they were than in a model of their own.
        OrganFileError: transformers could not load a tensor.
    """
    carrier = carrier_config(config, rows)
    skeleton = build_skeleton(carrier)
    path = describe(skeleton).layers_path
    if _shapes(tensors) != _shapes(to_disk(skeleton, range(len(rows)))):
        raise ModelError(
            f"the tensors of layers in this {config.model_type} model depend on their numbers, so {name} can't be "
            "held apart from its model in memory; transplant on disk instead."
        )
    prefix = _disk_prefix(skeleton, path)
    state = {_disk_key(key, prefix): tensor for key, tensor in tensors.items()}
    with quiet_transformers():
        loaded: Any = type(skeleton).from_pretrained(
            None,
            config=carrier,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation=config._attn_implementation,
        )
    model: PreTrainedModel = loaded[0]
    report = loaded[1]
    wrong = [
        key
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
        for key in report[kind]
        if f"{path}." in str(key)
    ]
    if wrong:
        raise OrganFileError(f"transformers could not load {len(wrong)} tensors of {name}, such as {wrong[0]}.")
    _copy_shared(model, tensors)
    return model


def _copy_shared(model: nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    """Give a model tensors of its own where it holds the given ones: transformers copies only what it converts."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().data_ptr() in storages:
            source = tensor.data
            tensor.data = source.clone()
            give_back_mapped([source])  # one by one, or all would be in memory twice
    give_back_mapped(given.values())


def verify_names(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Check an organ's tensor names and shapes against those that its configuration calls for.

    Raises:
        OrganFileError: Names the first missing, unexpected or misshapen tensor, and how many there are.
    """
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing:
        raise OrganFileError(
            f"{name} lacks {len(missing)} tensors that its configuration calls for, such as {missing[0]}."
        )
    if extra:
        raise OrganFileError(
            f"{name} holds {len(extra)} tensors that its configuration has no place for, such as {extra[0]}."
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise OrganFileError(
                f"{name} holds {key} with shape {list(found[key])} where its configuration calls for {list(shape)}."
            )


def _disk_prefix(skeleton: PreTrainedModel, path: str) -> str:
    """Return what stands before a layer's number on disk: `model.layers.` or the like."""
    from transformers.core_model_loading import revert_weight_conversion

    leaf = re.escape(path.rpartition(".")[2])
    layer = skeleton.get_submodule(f"{path}.0").state_dict()
    names = revert_weight_conversion(skeleton, {f"{path}.0.{name}": tensor for name, tensor in layer.items()})
    match = re.match(rf"^((?:.*?\.)?{leaf}\.)0\.", next(iter(names)))
    if match is None:
        raise ModelError(
            f"transformers writes layer tensors of this {skeleton.config.model_type} model without a layer number."
        )
    return match[1]


def _disk_key(key: str, prefix: str) -> str:
    match = _ORGAN_KEY.match(key)
    if match is None:
        raise OrganFileError(f"the tensor name {key} is not of the form layers.NUMBER.NAME.")
    return f"{prefix}{match[1]}.{match[2]}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports; neurograft does its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
