"""Where the layers of a decoder-only model live, found by looking at what transformers builds, not by model names.

A model is built on the meta device (no weights, milliseconds), its layer list is found, and after any change of order
the rebuilt model is compared with where each layer came from: class names, shapes and every scalar attribute. A change
that would make a layer compute something else is refused here, before weights are touched.
"""

from __future__ import annotations

import copy
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from neurograft.errors import ModelError
from neurograft.layer_values import Row, count_name, read_rows

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_LARGEST_FLOAT32 = 3e38
Facts = dict[str, Any]

_MOST_LAYERS = 2048  # building more, even without weights, takes minutes and memory, and no model has as many

_LAYER_CLASS = re.compile(r"Layer|Block")
# State of a running model, not of its arithmetic.
_RUNTIME_ATTRIBUTES = frozenset({"training", "gradient_checkpointing"})
# Dropout acts only while training, and how long sequences may become is no arithmetic; `check` reports both.
_NO_ARITHMETIC = re.compile(r"dropout|_drop$|pdrop$|^max_position_embeddings$|^max_seq")
_SUPPORTED = "neurograft cuts decoder-only language models, such as llama, qwen, gemma, mistral or gpt2"
# Arithmetic that depends on a layer's number only inside `forward`, where nothing built shows it.
_UNSAFE_TYPES = {"rwkv": "it rescales hidden states and weights by layer number while it runs"}


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are."""

    model_type: str
    layers_path: str
    """Dotted path of the `ModuleList` of decoder layers, such as `model.layers`."""
    layer_count: int
    """L."""
    count_name: str
    """Name of the configuration value that holds L."""
    embedding_path: str
    norm_path: str | None
    """The final norm; `None` where the architecture has none."""
    head_path: str | None
    hidden_size: int
    index_names: tuple[str, ...]
    """Attributes, relative to a layer, that hold the layer's own number, such as `self_attn.layer_idx`."""
    config: PreTrainedConfig = field(repr=False)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The per-layer configuration values of each layer.

        Raises:
            ModelError: See `layer_values.read_rows`.
        """
        return tuple(read_rows(self.config))


def read_anatomy(config: PreTrainedConfig, raw: Mapping[str, Any] | None = None) -> Anatomy:
    """Find the parts of the model that `config` describes.

    Args:
        config: The configuration as transformers loads it.
        raw: The configuration as it stands in `config.json`; transformers rewrites some telling values on load.

    Raises:
        ModelError: The model is not decoder-only, or can't be cut into layers safely; one sentence says why.
    """
    return describe(build_skeleton(config, raw))


def describe(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a model, on the meta device or loaded.

    Raises:
        ModelError: There is not exactly one list of decoder layers, or layers share tensors.
    """
    config = model.config
    layers_path = _find_layers(model, int(getattr(config, count_name(config))))
    layers = model.get_submodule(layers_path)
    _refuse_shared_tensors(layers, config.model_type)
    return Anatomy(
        model_type=config.model_type,
        layers_path=layers_path,
        layer_count=len(layers),  # type: ignore[arg-type]
        count_name=count_name(config),
        embedding_path=_path_of(model, model.get_input_embeddings()) or "",
        norm_path=_find_final_norm(model, layers_path),
        head_path=_path_of(model, model.get_output_embeddings()),
        hidden_size=int(config.hidden_size),
        index_names=_find_index_names(layers),
        config=config,
    )


def refuse_unsupported(config: PreTrainedConfig, raw: Mapping[str, Any] | None = None) -> None:
    """Refuse, from the configuration alone, models that are not decoder-only language models.

    Raises:
        ModelError: One sentence says why, and what is supported.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.model_type
    if (raw or {}).get("is_encoder_decoder") or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model; {_SUPPORTED}.")
    if config.get_text_config(decoder=True) is not config:
        raise ModelError(f"{kind} is a composite model with a language model inside; {_SUPPORTED} on their own.")
    if kind not in CAUSAL:
        raise ModelError(f"{kind} is no causal language model that transformers knows; {_SUPPORTED}.")
    # Some decoders carry is_decoder=False although they are causal; the masked-LM mapping tells them apart.
    if kind in MASKED and not getattr(config, "is_decoder", True):
        raise ModelError(f"{kind} with is_decoder=False is an encoder: its tokens see the future; {_SUPPORTED}.")
    if kind in _UNSAFE_TYPES:
        raise ModelError(f"the layers of {kind} can't be moved: {_UNSAFE_TYPES[kind]}; {_SUPPORTED}.")
    count = getattr(config, count_name(config), None)
    if isinstance(count, int) and count > _MOST_LAYERS:
        raise ModelError(
            f"the {kind} configuration says that there are {count} layers; more than {_MOST_LAYERS} are refused."
        )
    if count is None:
        raise ModelError(f"the {kind} configuration has no {count_name(config)}, so its layers can't be counted.")


def build_skeleton(
    config: PreTrainedConfig, raw: Mapping[str, Any] | None = None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model that `config` describes on the meta device: modules and shapes, no weights.

    Args:
        config: The configuration as transformers loads it.
        raw: See `read_anatomy`.
        dtype: Of the parameters; left out, torch's default one, whatever the checkpoint's: dtypes are compared
            elsewhere.

    Raises:
        ModelError: The model is not supported, or transformers can't build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_unsupported(config, raw)
    own = copy.deepcopy(config)
    own.dtype = dtype
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(own, attn_implementation=config._attn_implementation)
    except Exception as error:
        raise ModelError(f"transformers can't build this {config.model_type} model: {error}") from error


def _find_layers(model: PreTrainedModel, count: int) -> str:
    from torch import nn

    lists = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    outer = [(path, part) for path, part in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    named = [path for path, part in outer if all(_LAYER_CLASS.search(type(child).__name__) for child in part)]
    fitting = [path for path in named if len(model.get_submodule(path)) == count]  # type: ignore[arg-type]
    if len(fitting) == 1 and len(named) == 1:
        return fitting[0]
    seen = ", ".join(f"{path} ({len(part)})" for path, part in outer) or "none"
    raise ModelError(
        f"{model.config.model_type} has not exactly one list of {count} decoder layers (lists found: {seen}), "
        f"so it can't be cut safely; {_SUPPORTED}."
    )


def _refuse_shared_tensors(layers: nn.Module, kind: str) -> None:
    owners: dict[int, str] = {}
    for number, layer in layers.named_children():
        for name, parameter in layer.named_parameters():
            other = owners.setdefault(id(parameter), number)
            if other != number:
                raise ModelError(
                    f"layers {other} and {number} of this {kind} model share the tensor {name}, so they can't be "
                    f"cut apart."
                )


def _path_of(model: nn.Module, part: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is part), None)


def _find_final_norm(model: nn.Module, layers_path: str) -> str | None:
    parent_path, _, leaf = layers_path.rpartition(".")
    names = [name for name, _ in model.get_submodule(parent_path).named_children()]
    after = names[names.index(leaf) + 1 :]
    norms = [name for name in after if "Norm" in type(model.get_submodule(f"{parent_path}.{name}")).__name__]
    if not norms:  # a few architectures define the norm before the layers
        norms = [name for name in names if re.search(r"^(final|ln_f|norm)", name)]
    return f"{parent_path}.{norms[0]}" if norms else None


def _find_index_names(layers: nn.Module) -> tuple[str, ...]:
    """Names of integer attributes that equal the layer's number in every layer."""
    facts = [layer_facts(layer) for layer in layers.children()]
    return tuple(
        name
        for name, value in facts[0].items()
        if type(value) is int and all(type(f.get(name)) is int and f[name] == i for i, f in enumerate(facts))
    )


def layer_facts(layer: nn.Module) -> Facts:
    """Return what can be seen of one layer's arithmetic: class names, tensor shapes, scalar attributes.

    Keys are `path` for a module's class, `path.attribute` for scalars and tensors.
    """
    facts: Facts = {}
    for path, module in layer.named_modules():
        facts[f"class of {path or 'the layer'}"] = type(module).__name__
        facts.update({_join(path, name): value for name, value in _scalars(module).items()})
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            facts[f"shape of {_join(path, name)}"] = tuple(tensor.shape)
    return facts


def outside_facts(model: nn.Module, layers_path: str) -> Facts:
    """Return the same for everything in a model but its layers; `buffer` marks what is computed, not stored."""
    facts: Facts = {}
    for path, module in model.named_modules():
        if path == layers_path or path.startswith(f"{layers_path}."):
            continue
        facts.update({_join(path, name): value for name, value in _scalars(module).items()})
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            computed = name in module._non_persistent_buffers_set
            facts[f"{'buffer' if computed else 'shape of'} {_join(path, name)}"] = tuple(tensor.shape)
    return facts


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _scalars(module: nn.Module) -> Facts:
    if "Dropout" in type(module).__name__:
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in _RUNTIME_ATTRIBUTES
        and not _NO_ARITHMETIC.search(name)
        and _is_scalar(value)
    }


def _is_scalar(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_scalar(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class LayerOrigin:
    """One layer of a planned model: what it was, and where."""

    label: str
    """For messages, such as `the recipient` or `the donor`."""
    facts: Facts
    index: int
    """Its number in the model that it comes from."""
    count: int
    """How many layers that model has."""


def layer_origins(skeleton: PreTrainedModel, label: str) -> list[LayerOrigin]:
    """Describe every layer of a model as a possible origin."""
    count = int(getattr(skeleton.config, count_name(skeleton.config)))
    layers = skeleton.get_submodule(_find_layers(skeleton, count))
    return [LayerOrigin(label, layer_facts(layer), index, count) for index, layer in enumerate(layers.children())]


def verify_layers(planned: PreTrainedModel, origins: Sequence[LayerOrigin]) -> None:
    """Check that each layer of a planned model would compute what it computed where it came from.

    Args:
        planned: A skeleton built from the new configuration.
        origins: Where each of its layers comes from, in order.

    Raises:
        ModelError: Some layer would have another class, shape or scalar attribute than at its origin.
    """
    layers = list(planned.get_submodule(_find_layers(planned, len(origins))).children())
    for position, (layer, origin) in enumerate(zip(layers, origins, strict=True)):
        for name, (old, new) in differences(origin.facts, layer_facts(layer)).items():
            if not _means_the_same(old, new, origin, position, len(layers)):
                raise ModelError(
                    f"layer {origin.index} of {origin.label} would not compute the same at position {position}: "
                    f"{name} is "
                    f"{_shown(old)} there and {_shown(new)} here, and a {planned.config.model_type} configuration "
                    f"can't change that."
                )


def verify_outside(planned: PreTrainedModel, present: PreTrainedModel, layers_path: str) -> None:
    """Check that what lies outside the layers keeps its tensors and shapes.

    Raises:
        ModelError: A tensor outside the layers is sized by the number of layers.
    """
    old, new = outside_facts(present, layers_path), outside_facts(planned, layers_path)
    for name, (before, after) in differences(old, new).items():
        if name.startswith("shape of "):
            raise ModelError(
                f"the {name} outside the layers would change from {_shown(before)} to {_shown(after)}: in this "
                f"{planned.config.model_type} model it depends on the number of layers, so layers can't be inserted."
            )


def differences(old: Facts, new: Facts) -> dict[str, tuple[Any, Any]]:
    """Return the facts that differ, each as (old, new); a missing one counts as the text `absent`."""
    names = [*old, *(name for name in new if name not in old)]
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or type(pair[0]) is not type(pair[1])}


def _means_the_same(old: Any, new: Any, origin: LayerOrigin, position: int, count: int) -> bool:
    """Whether two values that differ are both the layer's own number, or say the same of the layer."""
    if same_in_float32(old, new):
        return True
    if isinstance(old, list) and isinstance(new, list) and (len(old), len(new)) == (origin.count, count):
        return bool(old[origin.index] == new[position])
    return type(old) is int and type(new) is int and old == origin.index and new == position


def same_in_float32(old: Any, new: Any) -> bool:
    """Whether two values are numbers that float32 does not tell apart, to which a layer's arithmetic rounds them.

    Files such as `.gguf` hold them so: a 1e-6 comes out of one as 9.999999974752427e-07.
    """
    if not isinstance(old, float) or not isinstance(new, float) or not abs(old) + abs(new) < _LARGEST_FLOAT32:
        return False
    return struct.pack("f", old) == struct.pack("f", new)


def _shown(value: Any) -> str:
    return value if value == "absent" else repr(value)
