"""What a layer answers to a fixed random hidden state, so that a layer that computes something else is caught.

Configurations and module attributes show most of what a layer's arithmetic depends on, but not all: an index used only
inside `forward`, the value of a buffer, a mask chosen by the parent. So every organ carries the answers that its layers
gave where they came from, and they are asked again wherever the organ is put.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.errors import ModelError, VerificationError, first_line
from neurograft.manifest import Probe
from neurograft.models import find_not_finite

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

SEED = 20260113
TOKENS = 16
SIGNED_SUMS = 4
# The largest relative difference, in the median over positions, that is still the same arithmetic. Kernels of other
# machines differ by rounding; a cast to a narrower dtype by that dtype's precision, which mixtures of experts amplify.
TOLERANCE_SAME_DTYPE = 2e-3
TOLERANCE_OTHER_DTYPE = 0.15
# What models raise whose code and configuration do not go together.
_MODEL_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def probe_layers(model: PreTrainedModel, layers_path: str) -> torch.Tensor:
    """Ask every layer of a model the same question.

    Each layer is given the same fixed random hidden state, (1, T, hidden), whatever the layers before it returned,
    with the masks, positions and caches that the model's own forward gives it.

    Args:
        model: A loaded model; its mode and weights are as before afterwards.
        layers_path: Dotted path of its layer list.

    Returns:
        (L, T, S) float64 tensor on the CPU: S signed sums over the features of each layer's output.
    """
    import torch

    layers = list(model.get_submodule(layers_path).children())
    question, signs = _question(int(model.config.hidden_size))
    answers: dict[int, torch.Tensor] = {}
    try:
        with _hooks(layers, question, signs, answers), eval_mode(model), torch.no_grad():
            model(input_ids=_tokens(model), use_cache=False)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the layers of this {model.config.model_type} model can't be asked the probe questions "
            f"({type(error).__name__}: {first_line(error)}), so it can't be shown that they work."
        ) from error
    if len(answers) != len(layers):
        raise ModelError(
            f"only {len(answers)} of {len(layers)} layers took part in a forward pass of this "
            f"{model.config.model_type} model."
        )
    return torch.stack([answers[index] for index in range(len(layers))])  # (L, T, S)


def _question(hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what every layer is given, (1, T, hidden), and the signs that sum up its answer, (hidden, S)."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    question = torch.randn(1, TOKENS, hidden_size, generator=generator)
    signs = torch.randint(0, 2, (hidden_size, SIGNED_SUMS), generator=generator, dtype=torch.float64) * 2 - 1
    return question, signs


def identity_answer(hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what a layer that changes nothing answers, (T, S)."""
    question, signs = _question(hidden_size)
    return question[0].to(dtype).double() @ signs


def future_leak(model: PreTrainedModel) -> float:
    """Return how much a change of the last token moves the logits of earlier positions; 0 for a causal model."""
    import torch

    tokens = _tokens(model)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % int(model.config.vocab_size)
    with eval_mode(model), torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() for ids in (tokens, changed))
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-6))


def refuse_future_leak(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose earlier positions see later tokens.

    Raises:
        ModelError: The model is not causal, or its logits are not finite.
    """
    leak = future_leak(model)
    if not math.isfinite(leak):
        raise ModelError(_explain_not_finite(model, name))
    if not leak < 1e-3:
        raise ModelError(
            f"{name} is not causal: changing the last token moves earlier logits by {leak:.2g} of their size."
        )


def _explain_not_finite(model: PreTrainedModel, name: str) -> str:
    """Say which tensor in a model's files is behind logits that are NaN or infinite."""
    found = find_not_finite(Path(model.config.name_or_path or "nowhere"))
    if found is None:
        return f"the logits of {name} are NaN or infinite, although its weights are finite."
    file, key, count = found
    return f"{file}: the tensor {key} of {name} has {count} values that are NaN or infinite."


def to_manifest(answers: torch.Tensor, dtype: str) -> Probe:
    """Pack the answers of an organ's k layers, (k, T, S), for its manifest."""
    return Probe(
        seed=SEED,
        tokens=TOKENS,
        values=[[[float(f"{v:.8g}") for v in t] for t in a] for a in answers.tolist()],
        dtype=dtype,
    )


def verify_answers(expected: Probe, answers: torch.Tensor, dtype: str, name: str) -> None:
    """Check that an organ's layers answer as they did where they came from.

    Args:
        expected: The manifest's probe.
        answers: (k, T, S), from `probe_layers` on the model that holds the organ now.
        dtype: In which dtype they were computed.
        name: The organ's name, for the message.

    Raises:
        VerificationError: Some layer computes something else here.
    """
    import torch

    tolerance = TOLERANCE_SAME_DTYPE if dtype == expected.dtype == "float32" else TOLERANCE_OTHER_DTYPE
    for layer, (old, new) in enumerate(zip(torch.tensor(expected.values, dtype=torch.float64), answers, strict=True)):
        error = relative_error(old, new)
        if not error <= tolerance:
            raise VerificationError(
                f"layer {layer} of the organ {name} does not compute here what it computed in its donor "
                f"(answers to the probe differ by {error:.2g} of their size; {tolerance:g} is allowed), so it was "
                f"not put in."
            )


def relative_error(old: torch.Tensor, new: torch.Tensor) -> float:
    """Return the median over T of the relative distance between two sets of answers, (T, S) each."""
    distance = (old - new).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-12)  # (T,)
    return float(distance.median())


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    import torch

    device = next(model.get_input_embeddings().parameters()).device
    return (torch.arange(TOKENS, device=device) % int(model.config.vocab_size))[None]  # (1, T)


@contextmanager
def _hooks(
    layers: Sequence[nn.Module], question: torch.Tensor, signs: torch.Tensor, answers: dict[int, torch.Tensor]
) -> Iterator[None]:
    """Replace the hidden state that enters each layer, and note what leaves it."""
    handles = []
    for index, layer in enumerate(layers):

        def ask(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (_shaped(question, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": _shaped(question, kwargs["hidden_states"])}

        def note(_module: nn.Module, _args: Any, output: Any, index: int = index) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # (1, T, hidden)
            summed = hidden.double().cpu().reshape(-1, *question.shape[1:]).sum(dim=0)  # (T, hidden)
            answers[index] = summed @ signs  # (T, S)

        handles += [layer.register_forward_pre_hook(ask, with_kwargs=True), layer.register_forward_hook(note)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shaped(question: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Shape the question like the hidden state that it replaces, (..., T, hidden): some models carry several."""
    return question.to(present).expand_as(present)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation and each back to the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def cache_gap(model: PreTrainedModel) -> float:
    """Return how far logits computed with the KV cache are from those of one pass, relative to their size.

    For models that keep another kind of state and do not return it, or whose cache can't be used step by step, the
    share of greedily generated tokens that differ.

    Raises:
        ModelError: transformers can't generate with this model's cache.
    """
    import torch

    tokens = _tokens(model)
    half = TOKENS // 2
    with eval_mode(model), torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits[0, half:].float()  # (T/2, vocabulary)
        try:
            steps = _cached_logits(model, tokens, half)
        except _MODEL_ERRORS:
            steps = None
        if steps is None:
            return _generation_gap(model, tokens)
    return float((steps.float() - whole).abs().max() / whole.abs().max().clamp_min(1e-6))


def _cached_logits(model: Any, tokens: torch.Tensor, half: int) -> torch.Tensor | None:
    """Return the logits from position `half` on, a step each with the KV cache; `None` if the model returns none."""
    import torch

    output = model(input_ids=tokens[:, : half + 1], use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        return None
    steps = [output.logits[0, -1]]
    for position in range(half + 1, TOKENS):
        step = tokens[:, position : position + 1]
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits[0, -1])
    return torch.stack(steps)  # (T/2, vocabulary)


def _generation_gap(model: Any, tokens: torch.Tensor) -> float:
    import torch

    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    try:
        cached, uncached = (
            model.generate(tokens, attention_mask=mask, use_cache=use_cache, **settings)[0]
            for use_cache in (True, False)
        )
    except _MODEL_ERRORS as error:
        raise ModelError(
            f"transformers can't generate with the cache of this {model.config.model_type} model "
            f"({type(error).__name__}: {first_line(error)}), so no transplant in it can be verified."
        ) from error
    return float((cached != uncached).float().mean())
