"""Configuration values that belong to single layers: read as one row a layer, written back for another order of layers.

A configuration says per-layer things in five ways: a list with an entry a layer (`layer_types`), a list of layer
numbers (`mlp_only_layers`), a mapping keyed by layer number (`per_layer_config`), a period (`decoder_sparse_step`) and
a prefix length (`first_k_dense_replace`). All become rows here, so that a layer that moves takes its row along.
What can't be written back raises; a row that was misread is caught by `anatomy.verify_layers`, which compares the
modules that transformers builds from the result.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from neurograft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Row = dict[str, Any]

# A list of layer numbers can happen to have as many entries as there are layers, so length alone can't tell it apart.
INDEX_LISTS = frozenset({"mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs"})
_INDEX_NAME = re.compile(r"(_layers|_indices|_idxs?|_layer_ids)$")
_PER_LAYER_NAME = re.compile(r"layer|_types$|_pattern$|^intermediate_size$|^num_(attention|key_value)_heads$")
_NEVER_PER_LAYER = re.compile(
    r"token_id|^id2label$|^label2id$|^architectures$|_section$|_limit$|_range$|^model_|^torch|^dtype$"
)
_MISSING = object()
LAYER_NUMBER = r"0|[1-9][0-9]{0,8}"
"""How a layer's number is written; `int` and `str.isdigit` each take more, and not the same."""


def count_name(config: PreTrainedConfig) -> str:
    """Return the name under which this configuration keeps its number of layers."""
    return str(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def read_rows(config: PreTrainedConfig) -> list[Row]:
    """Return one row of per-layer values for each layer of the model that `config` describes.

    Args:
        config: A configuration as transformers loads it, so that patterns are expanded to lists.

    Raises:
        ModelError: A list or mapping has one entry a layer, and nothing tells what it means.
    """
    layers = int(getattr(config, count_name(config)))
    rows: list[Row] = [{} for _ in range(layers)]
    for name, value in vars(config).items():
        for row, entry in zip(rows, _per_layer(config, name, value, layers), strict=False):
            row[name] = entry
    return rows


def _per_layer(config: PreTrainedConfig, name: str, value: Any, layers: int) -> list[Any]:
    """Return the entry of each layer in the configuration value `name`; an empty list if it is not per layer."""
    if name.startswith("_") or _NEVER_PER_LAYER.search(name):
        return []
    if name == "first_k_dense_replace" and isinstance(value, int):
        return [layer < value for layer in range(layers)]
    if name == "block_types" and isinstance(value, list) and value:
        return (value * layers)[:layers]
    if isinstance(value, (list, tuple)):
        if _is_index_list(name, value, layers):
            step = getattr(config, "decoder_sparse_step", 1) if name == "mlp_only_layers" else 1
            return [layer in value or (layer + 1) % step != 0 for layer in range(layers)]
        return _list_entries(name, value, layers)
    if (
        isinstance(value, dict)
        and value
        and all(re.fullmatch(LAYER_NUMBER, str(key)) and int(key) < layers for key in value)
    ):
        keyed = {int(key): entry for key, entry in value.items()}
        return [keyed.get(layer) for layer in range(layers)]
    return []


def _is_index_list(name: str, value: Iterable[Any], layers: int) -> bool:
    numbers = [entry for entry in value if type(entry) is int]
    if name in INDEX_LISTS:
        return True
    if name == "no_rope_layers" or not _INDEX_NAME.search(name) or len(numbers) != len(list(value)) or not numbers:
        return False
    return numbers == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] < layers


def _list_entries(name: str, value: list[Any] | tuple[Any, ...], layers: int) -> list[Any]:
    if len(value) != layers:
        return []
    if _PER_LAYER_NAME.search(name):
        return list(value)
    raise ModelError(
        f"the configuration value {name} has {layers} entries, as many as there are layers, and neurograft can't tell "
        "whether they belong to the layers; models with it are not supported."
    )


def with_rows(config: PreTrainedConfig, rows: list[Row]) -> PreTrainedConfig:
    """Return a copy of `config` for a model whose layers are described by `rows`, in that order.

    Args:
        config: The configuration whose other values are kept.
        rows: One row for each layer of the new model, as `read_rows` gives them.

    Raises:
        ModelError: The rows form a pattern that this kind of configuration can't express.
    """
    values = changed_values(config, rows)
    data = copy.deepcopy(config.to_dict())
    data.update(values)
    try:
        new = type(config).from_dict(data)
    except Exception as error:
        raise ModelError(f"transformers refuses a {config.model_type} of {len(rows)} such layers: {error}") from error
    for name, value in values.items():
        if _plain(getattr(new, name, _MISSING)) != _plain(value):
            raise ModelError(
                f"a {config.model_type} configuration does not keep {name}={value!r}, which these layers need."
            )
    new._attn_implementation = config._attn_implementation
    new.dtype = config.dtype
    return new


def changed_values(config: PreTrainedConfig, rows: list[Row]) -> dict[str, Any]:
    """Return the configuration values that `rows` determine: the number of layers and every per-layer value.

    Raises:
        ModelError: Rows lack a value that this configuration has per layer, or can't be expressed by it.
    """
    values: dict[str, Any] = {count_name(config): len(rows)}
    for name in read_rows(config)[0]:
        entries = [row.get(name, _MISSING) for row in rows]
        if _MISSING in entries:
            raise ModelError(
                f"a layer brings no value for {name}, which every layer of this {config.model_type} model has."
            )
        values[name] = _express(name, vars(config)[name], entries)
        if name == "mlp_only_layers" and hasattr(config, "decoder_sparse_step"):
            values["decoder_sparse_step"] = 1
        if name == "attention_layers" and hasattr(config, "attention_types"):
            values["attention_types"] = [[[kind], 1] for kind in entries]
    return values


def _express(name: str, old: Any, entries: list[Any]) -> Any:
    """Write the entries of all layers in the way that the configuration had the value `old`."""
    if name == "first_k_dense_replace":
        prefix = entries.index(False) if False in entries else len(entries)
        if any(entries[prefix:]):
            raise ModelError(f"the pattern {entries} of dense layers cannot be expressed with {name}.")
        return prefix
    if isinstance(old, dict):
        key_type = type(next(iter(old)))
        return {key_type(layer): entry for layer, entry in enumerate(entries) if entry is not None}
    if name in INDEX_LISTS or (entries and type(entries[0]) is bool and type(old[0]) is int):
        return [layer for layer, entry in enumerate(entries) if entry]
    return list(entries)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
