"""Models that are run a few times and need not be in memory for it: layers come from the disk when their turn comes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neurograft.models import ModelDirectory, cache_directory, load_config, load_model_and_unused, read_raw_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def loaded_to_ask(
    directory: ModelDirectory, *, whole: bool, trust_remote_code: bool = False
) -> Iterator[tuple[PreTrainedModel, set[str]]]:
    """Load a model to ask its layers questions, and yield it with the kinds of tensors that it has no place for.

    Args:
        directory: The model.
        whole: Whether all of it is loaded. Otherwise its layers stay in its files, and accelerate reads each before it
            runs and forgets it after: memory for the embedding, the head and a layer, and as many readings as passes.
            Only tensors that transformers converts on loading (the experts of a mixture) are written to the cache
            meanwhile.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        ModelError: See `neurograft.models.load_model`.
    """
    if whole:
        yield load_model_and_unused(directory, trust_remote_code=trust_remote_code)
        return
    cache_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="layers-", dir=cache_directory()) as folder:
        placement = {"device_map": _places(directory, trust_remote_code), "offload_folder": folder}
        yield load_model_and_unused(directory, trust_remote_code=trust_remote_code, placement=placement)


def _places(directory: ModelDirectory, trust_remote_code: bool) -> dict[str, str]:
    """Say of each module where it is kept: layers on the disk, all others in memory."""
    from neurograft.anatomy import build_skeleton, describe

    config = load_config(directory, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, read_raw_config(directory.path))
    return _places_below(skeleton, "", describe(skeleton).layers_path)


def _places_below(module: nn.Module, prefix: str, layers_path: str) -> dict[str, str]:
    places: dict[str, str] = {}
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path == layers_path:
            places.update({f"{path}.{number}": "disk" for number, _ in child.named_children()})
        elif layers_path.startswith(f"{path}."):
            places.update(_places_below(child, f"{path}.", layers_path))
        else:
            places[path] = "cpu"
    return places
