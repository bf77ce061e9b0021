"""A host of which some layers stay on the disk: each is read when it has to compute, and dropped afterwards.

The model is built without weights, as always; then what is to be in memory gets its tensors, a layer at a time, through
transformers' own loading, so that they are what they would be in a model that was loaded whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from neurograft.anatomy import build_skeleton, describe
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import ModelError
from neurograft.layer_values import with_rows
from neurograft.layer_weights import carrier_config, quiet_transformers
from neurograft.models import ModelDirectory, load_config
from neurograft.number_formats import load_piece
from neurograft.surgery import Undo
from neurograft.tensor_files import torch_name
from neurograft.training.prefix import UnusualOutputError, behind_states, hand_on, stored_digest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("neurograft")

Finish = Callable[["nn.Module", Undo], None]


class OffloadedLayers:
    """The layers of a model that are not in memory; any pass through one reads it, computes, and drops it.

    Args:
        model: The model; what is not in memory of it is on the meta device.
        layers: Number -> module of each such layer.
        read: Gives a model whose only layer holds the tensors of the layer with a number.
    """

    def __init__(
        self, model: PreTrainedModel, layers: dict[int, nn.Module], read: Callable[[int], PreTrainedModel]
    ) -> None:
        self.digests: dict[str, str] = {}
        """Name in the model -> digest, of every tensor that was read, as it is in memory."""
        self.finish: Finish = lambda layer, undo: None
        """Called with each layer that was read, before it computes."""
        self._model, self._layers, self._read = model, layers, read
        self._path = describe(model).layers_path
        self._held: set[int] = set()
        self._skipping = False
        self._returns: dict[type, tuple[Any, ...] | None] = {}
        for number, layer in layers.items():
            vars(layer)["forward"] = self._forward_of(number, layer)

    def _forward_of(self, number: int, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._skipping and type(layer) in self._returns:
                return hand_on(self._returns[type(layer)])(*args, **kwargs)
            with self.held(number):
                output = type(layer).forward(layer, *args, **kwargs)
            if not self._skipping:
                return output
            self._returns[type(layer)] = behind_states(output)
            return hand_on(self._returns[type(layer)])(*args, **kwargs)

        return forward

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Hold a layer in memory."""
        if number in self._held:
            yield
            return
        layer, undo = self._layers[number], Undo()
        try:
            source = self._read(number)
            _give(source.get_submodule(f"{describe(source).layers_path}.0"), layer, self._model.device, undo)
            del source
            self.finish(layer, undo)
            self._note_digests(number, layer)
            self._held.add(number)
            yield
        finally:
            self._held.discard(number)
            undo.restore()

    def _note_digests(self, number: int, layer: nn.Module) -> None:
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            key = f"{self._path}.{number}.{name}"
            if key not in self.digests:
                self.digests[key] = stored_digest(tensor)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Let these layers hand on what they are given, for passes in which it does not matter what they compute.

        Raises:
            ModelError: A layer returns more than its hidden states, inside the block.
        """
        self._skipping = True
        try:
            yield
        except UnusualOutputError as error:
            raise ModelError(
                f"the layers of this {self._model.config.model_type} model return more than hidden states, so none of "
                "them can stay on the disk; train without --offload."
            ) from error
        finally:
            self._skipping = False


def skipping(layers: OffloadedLayers | None) -> contextlib.AbstractContextManager[None]:
    """Do what `OffloadedLayers.skipped` does, or nothing where a model has none."""
    return contextlib.nullcontext() if layers is None else layers.skipped()


def load_offloaded(
    directory: ModelDirectory,
    absent: range,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, OffloadedLayers]:
    """Load a causal language model in evaluation mode, with some of its layers left on the disk.

    Args:
        directory: The model.
        absent: Numbers of these layers, half-open and zero-based.
        dtype: Of its parameters; `None` for the one that it is stored in.
        device: Where the others are put, and these while they compute.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        ModelError: It can't be read, is packed, or can't be loaded in parts; then it is to be loaded whole.
    """
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    if checkpoint.packing is not None:
        raise ModelError(
            f"{directory.name} is quantised ({checkpoint.packing}); train without --offload, or give its plain weights."
        )
    config = load_config(directory, trust_remote_code=trust_remote_code)
    config.dtype = dtype or _stored_dtype(checkpoint, config)
    model = build_skeleton(config, checkpoint.raw_config, dtype=config.dtype).eval()
    source = _Source(checkpoint, config, type(model))
    container = model.get_submodule(describe(model).layers_path)
    _fill_present(model, container, source, absent, device)
    _refuse_unfilled(model, {id(container.get_submodule(str(number))) for number in absent}, directory.name)
    layers = {number: container.get_submodule(str(number)) for number in absent}
    return model, OffloadedLayers(model, layers, lambda number: source.read([number]))


def _stored_dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    piece = next((piece for piece in checkpoint.pieces.values() if piece.is_float), None)
    dtype: torch.dtype = torch.float32 if piece is None else getattr(torch, torch_name(piece.dtype))
    return dtype


@dataclass(frozen=True)
class _Source:
    """A model on the disk, of which parts are loaded as models of their own."""

    checkpoint: Checkpoint
    config: PreTrainedConfig
    kind: type[PreTrainedModel]

    def one_of_each_kind(self) -> list[int]:
        """Return the numbers of layers that differ in what the configuration says of them, the last of each kind.

        What lies outside the layers, such as rotary embeddings, may be there only if some layer is of a kind.
        """
        return sorted(
            {json.dumps(row, sort_keys=True): number for number, row in enumerate(self.checkpoint.rows)}.values()
        )

    def read(self, layers: Sequence[int], *, outside: bool = False) -> PreTrainedModel:
        """Load some layers, in a model with these alone; what lies outside the layers is tiny and random unless asked.

        Raises:
            ModelError: These layers need other tensors where they are than in a model of their own.
        """
        name = self.checkpoint.directory.name
        try:
            with quiet_transformers():
                model, report = self._load(layers, outside)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"{name} can't be loaded in parts ({reason}); train without --offload.") from error
        path = describe(model).layers_path
        missing = [
            str(key)
            for kind in ("missing_keys", "mismatched_keys")
            for key in report[kind]
            if outside or f"{path}." in str(key)
        ]
        if missing:
            raise ModelError(
                f"a part of {name} has {len(missing)} tensors that its files give no values, such as "
                f"{min(missing)}; train without --offload."
            )
        return model.requires_grad_(False)

    def _load(self, layers: Sequence[int], outside: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        checkpoint = self.checkpoint
        rows = [checkpoint.rows[layer] for layer in layers]
        config = with_rows(self.config, rows) if outside else carrier_config(self.config, rows)
        state = {
            f"{checkpoint.layer_prefix}{place}.{inner}": load_piece(piece)
            for place, layer in enumerate(layers)
            for inner, piece in checkpoint.layer_pieces(layer).items()
        }
        if outside:
            state |= {n: load_piece(p) for n, p in checkpoint.pieces.items() if checkpoint.layer_of(n) is None}
        loaded: Any = self.kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=self.config.dtype,
            output_loading_info=True,
            attn_implementation=self.config._attn_implementation,
        )
        return loaded


def _fill_present(
    model: PreTrainedModel, container: nn.Module, source: _Source, absent: range, device: torch.device
) -> None:
    """Give tensors to everything in a model but the absent layers; few layers more than that are read at a time."""
    kinds = source.one_of_each_kind()
    others = (number for number in range(source.checkpoint.layer_count) if number not in absent and number not in kinds)
    for layers in (kinds, *([number] for number in others)):
        log.info("loading layer %s", ", ".join(map(str, layers)))
        part = source.read(layers, outside=layers is kinds)
        read = part.get_submodule(describe(part).layers_path)
        for place, number in enumerate(layers):
            if number not in absent:
                _give(read.get_submodule(str(place)), container.get_submodule(str(number)), device, Undo())
        if layers is kinds:
            read._modules.clear()
            _give(part, model, device, Undo())


def _give(source: nn.Module, target: nn.Module, device: torch.device, undo: Undo) -> None:
    """Let a module have the parameters and buffers of another one, which may have fewer parts.

    Raises:
        ModelError: It has no place for one of them.
    """
    torch.nn.Module.to(source, device)
    for path, module in source.named_modules():
        own = target.get_submodule(path)
        for tensors, places in ((module._parameters, own._parameters), (module._buffers, own._buffers)):
            for name, tensor in tensors.items():
                old = places.get(name)
                if _shape(tensor) != _shape(old):
                    raise ModelError(
                        f"{path}.{name} is of shape {_shape(tensor)} in a part of this model and {_shape(old)} in all "
                        "of it, so it can't be loaded in parts; train without --offload."
                    )
                undo.set(places, name, tensor)


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))


def _refuse_unfilled(model: PreTrainedModel, absent: set[int], name: str) -> None:
    """Refuse a model in which something outside the absent layers has no values."""
    skipped: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in absent or id(module) in skipped:
            skipped |= {id(child) for child in module.children()}
            continue
        held = {**module._parameters, **module._buffers, **vars(module)}
        empty = [key for key, value in held.items() if isinstance(value, torch.Tensor) and value.is_meta]
        if empty:
            raise ModelError(
                f"{path}.{empty[0]} of {name} depends on layers that were to stay on the disk; train without --offload."
            )


def bytes_in_memory(model: nn.Module) -> int:
    """Return how many bytes the parameters of a model take that are in memory."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
