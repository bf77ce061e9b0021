"""Attention over short sequences as plain matrix products, which on CPUs is faster to train through than fused kernels.

A fused kernel never holds the (T, T) probabilities. Over short sequences they are small, and keeping them saves the
backward pass from computing them again: at 128 tokens, in bfloat16, it takes a third of the time
(benchmarks/attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from neurograft.arithmetic import Attention, Kernels

# Beyond it the fused kernel is the faster one, and the probabilities, (B, H, T, T), take more memory than all else that
# a layer keeps for its backward pass.
LONGEST = 512


def choose_attention(tokens: int, kernels: Kernels, device: torch.device) -> Attention:
    """Return the faster way through a forward and a backward pass of causal attention.

    By a rule and not by a measurement at every start, which other work on the machine could turn: the same command
    should come to the same bits. The rule rests on benchmarks/attention.py: in bfloat16 products win up to 512 tokens,
    in float32 never by more than a few hundredths.

    Args:
        tokens: Length of the sequences.
        kernels: How matrices are multiplied.
        device: Where the model is; the fused kernels of other devices than CPUs are the faster ones.
    """
    return "products" if device.type == "cpu" and kernels == "bfloat16" and tokens <= LONGEST else "fused"


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """Let models that call torch's fused attention attend this way inside the block."""
    if attention == "fused":
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = own.get("sdpa")
    own["sdpa"] = _in_place_of(ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        own.pop("sdpa")
        if before is not None:
            own["sdpa"] = before


def _in_place_of(fused: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for transformers' attention interface, which leaves to `fused` whatever is not plain."""

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        masked = isinstance(attention_mask, torch.Tensor) and _is_plain_mask(attention_mask, query)
        plain = (
            (causal or masked)
            and dropout == 0
            and query.shape[2] == key.shape[2] <= LONGEST
            and query.shape[1] % key.shape[1] == 0
            and all(others.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux"))
        )
        if not plain:
            return fused(
                module, query, key, value, attention_mask,
                dropout=dropout, scaling=scaling, is_causal=is_causal, **others,
            )  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = causal_attention(query, key, value, scale=scale, mask=attention_mask)
        return attended.transpose(1, 2).contiguous(), None

    return attend


def _is_plain_mask(mask: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether a mask says which tokens are seen, alike for all heads."""
    return mask.dtype == torch.bool and mask.shape in {
        (batch, 1, query.shape[2], query.shape[2]) for batch in (1, query.shape[0])
    }


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend, and keep the probabilities for the backward pass.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D); H a multiple of G, each key serves H / G neighbouring heads.
        value: (B, G, T, E).
        scale: What the products of queries and keys are multiplied by.
        mask: (B or 1, 1, T, T), true where a token (row) sees another (column); left out, each sees itself and those
            before it.

    Returns:
        (B, H, T, E), in the dtype that products are computed in.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    hidden = ~mask.repeat(1, 1, shared, 1)  # (B or 1, 1, shared T, T)
    # The heads that share a key stand below one another, as if they were more tokens.
    query = query.reshape(batch, heads // shared, shared * tokens, width)
    attended: torch.Tensor = _Attend.apply(query, key, value, hidden, scale)
    return attended.reshape(batch, heads, tokens, value.shape[-1])


class _Attend(torch.autograd.Function):
    """Softmax attention whose backward pass starts from the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scale: float
    ) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query, key.transpose(-1, -2)).mul_(scale)  # (B, G, shared T, T)
            probabilities = torch.softmax(scores.masked_fill_(hidden, torch.finfo(scores.dtype).min), dim=-1)
            ctx.save_for_backward(query, key, value, probabilities)
            ctx.scale = scale
            return torch.matmul(probabilities, value)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, probabilities = ctx.saved_tensors
        (gradient,) = outer
        of_value = torch.matmul(probabilities.transpose(-1, -2), gradient)
        of_probabilities = torch.matmul(gradient, value.transpose(-1, -2))
        dtype = probabilities.dtype
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, dtype).mul_(ctx.scale)
        return torch.matmul(of_scores, key), torch.matmul(of_scores.transpose(-1, -2), query), of_value, None, None
