"""What stood before and behind an organ while it was trained, in a few numbers: the states on a public text, projected.

The text lies beside this file and is the same for everyone, so a sketch says nothing of the text that an organ was
trained on but what its weights say. Layers read the residual stream through a norm, so each state is scaled to a root
mean square of 1; then it is projected on a few fixed random directions. The mean and covariance of a set of states
follow from their projections, and so does, token by token, how alike two sets are.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from neurograft.anatomy import describe
from neurograft.errors import ModelError, OrganFileError
from neurograft.manifest import Sketch
from neurograft.models import position_limit

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("neurograft")

States: TypeAlias = "np.ndarray[Any, Any]"
"""(N, r) float64: projected hidden states, a row a token."""

SEED = 20260114
WIDTH = 64  # r
WINDOWS, WINDOW = 4, 128  # tokens
SKIPPED = 4
"""First tokens of each window that do not count: many models give the first one a state a thousand times as large."""
_LEAST_TOKENS = 64
_MOST_UNKNOWN = 0.2


@cache
def probe_text() -> str:
    """Return the public text that comes with neurograft."""
    return (Path(__file__).parent / "probe_text.txt").read_text(encoding="utf-8")


def text_digest() -> str:
    """Return the SHA-256 of the public text."""
    return hashlib.sha256(probe_text().encode()).hexdigest()


def encode_probe(tokenizer: PreTrainedTokenizerBase, window: int, name: str) -> list[list[int]]:
    """Cut the public text into windows of tokens; the last one may be shorter.

    Args:
        tokenizer: The tokenizer.
        window: Tokens in a window.
        name: What the tokenizer belongs to, for the message.

    Raises:
        ModelError: The tokenizer can't encode the text.
    """
    try:
        ids = list(tokenizer(probe_text(), add_special_tokens=False)["input_ids"])
    except Exception as error:  # tokenizers raise nothing more special where a word has no token
        raise ModelError(f"the tokenizer of {name} can't encode the probe text: {error}.") from error
    unknown = sum(token == tokenizer.unk_token_id for token in ids) if tokenizer.unk_token_id is not None else 0
    if len(ids) < _LEAST_TOKENS or unknown > _MOST_UNKNOWN * len(ids):
        raise ModelError(
            f"the tokenizer of {name} can't encode the probe text: it makes {len(ids)} tokens of it, {unknown} of them "
            f"unknown; at least {_LEAST_TOKENS} are needed, and at most {_MOST_UNKNOWN:.0%} may be unknown."
        )
    ids = ids[: WINDOWS * window]
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    return [window for window in windows if len(window) > SKIPPED]


def window_of(model: PreTrainedModel) -> int:
    """Return how many tokens of the public text a model takes at once."""
    return min(WINDOW, position_limit(model.config) or WINDOW)


def boundary_states(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[States]:
    """Return the projected states at every boundary of a model: before layer 0, and behind each layer.

    Args:
        model: A loaded model; its mode and weights are as before afterwards.
        windows: Token ids.

    Returns:
        L + 1 arrays, (N, r) each; N does not count the first tokens of each window.

    Raises:
        ModelError: The model can't be run, or a state is not finite.
    """
    import numpy as np
    import torch

    from neurograft.probe import eval_mode

    layers = list(model.get_submodule(describe(model).layers_path).children())
    projection = _projection(int(model.config.hidden_size))
    found: list[list[torch.Tensor]] = [[] for _ in range(len(layers) + 1)]
    device = next(model.get_input_embeddings().parameters()).device
    try:
        with _hooks(layers, found, projection), eval_mode(model), torch.no_grad():
            # Together where they are as long: layers that are read from the disk are read once for all of them.
            for _, alike in itertools.groupby(windows, key=len):
                model(input_ids=torch.tensor(list(alike), device=device), use_cache=False)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the hidden states of this {model.config.model_type} model can't be read on the probe text "
            f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')})."
        ) from error
    states = [torch.cat(parts).numpy() if parts else np.zeros((0, WIDTH)) for parts in found]
    if len({state.shape for state in states}) != 1 or not all(np.isfinite(state).all() for state in states):
        raise ModelError(
            f"the hidden states of this {model.config.model_type} model on the probe text are not finite, or not all "
            "layers took part."
        )
    return states


@contextmanager
def _hooks(layers: Sequence[nn.Module], found: list[list[torch.Tensor]], projection: torch.Tensor) -> Iterator[None]:
    """Note what enters each layer, and what leaves the last one."""

    def note(boundary: int, hidden: torch.Tensor) -> None:
        # Some models carry several streams, (..., B, T, hidden).
        streams = hidden.detach().double().cpu().reshape(-1, *hidden.shape[-3:])
        summed = streams.sum(dim=0)[:, SKIPPED:].flatten(0, 1)  # (B T, hidden)
        scale = summed.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)  # (B T, 1)
        found[boundary].append(summed / scale @ projection)  # (B T, r)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], boundary: int) -> None:
        note(boundary, args[0] if args else kwargs["hidden_states"])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        note(len(layers), output[0] if isinstance(output, tuple) else output)

    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, boundary=number: before(module, args, kwargs, boundary), with_kwargs=True
        )
        for number, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projection(hidden_size: int) -> torch.Tensor:
    """Return the fixed random directions, (hidden, r); lengths are kept in expectation, up to the root of hidden."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (hidden_size, WIDTH), generator=generator, dtype=torch.float64) * 2 - 1
    return signs / (hidden_size * WIDTH) ** 0.5


def make_sketch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, positions: Sequence[int], name: str
) -> Sketch | None:
    """Sketch what enters and leaves some layers of a model; `None` where the public text can't be used with it.

    Args:
        model: The model with the organ in it.
        tokenizer: Its tokenizer.
        positions: Numbers of the organ's layers in the model.
        name: The model's name, for messages.
    """
    window = window_of(model)
    try:
        states = boundary_states(model, encode_probe(tokenizer, window, name))
    except ModelError as error:
        log.warning("no sketch of the hidden states is stored: %s", error)
        return None
    entering, leaving = states[positions[0]], states[positions[-1] + 1]
    return Sketch(
        text=text_digest(),
        seed=SEED,
        window=window,
        tokens=len(entering),
        width=WIDTH,
        entering=_pack(entering),
        leaving=_pack(leaving),
    )


def _pack(states: States) -> str:
    return base64.b64encode(states.astype("<f2").tobytes()).decode()


def unpack_states(sketch: Sketch, name: str) -> tuple[States, States]:
    """Return the states that entered and left an organ, (N, r) each.

    Raises:
        OrganFileError: The sketch is not as it says.
    """
    import numpy as np

    try:
        entering, leaving = (
            np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float64).reshape(-1, sketch.width)
            for text in (sketch.entering, sketch.leaving)
        )
    except ValueError as error:
        raise OrganFileError(f"the sketch of hidden states in {name} can't be read: {error}.") from error
    if not entering.shape == leaving.shape == (sketch.tokens, sketch.width):
        raise OrganFileError(
            f"the sketch of hidden states in {name} holds {len(entering)} and {len(leaving)} tokens where it says "
            f"{sketch.tokens}."
        )
    if not (np.isfinite(entering).all() and np.isfinite(leaving).all()):
        raise OrganFileError(f"the sketch of hidden states in {name} holds values that are not finite.")
    return entering, leaving
