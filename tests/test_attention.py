"""Attention as plain products: the same values and gradients as the fused kernels', wherever it steps in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neurograft import attention
from neurograft.arithmetic import Arithmetic
from neurograft.attention import LONGEST, attending, causal_attention, choose_attention
from tiny import CONFIGS, make_model, token_ids

CPU = torch.device("cpu")


def random_heads(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_values_and_gradients_are_those_of_torch(groups: int, window: int | None) -> None:
    query, key, value = (random_heads(2, heads, 7, 5, seed=n) for n, heads in enumerate((6, groups, groups)))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    if window is not None:
        mask &= torch.ones(7, 7, dtype=torch.bool).triu(1 - window)
    ours = causal_attention(query, key, value, scale=0.3, mask=None if window is None else mask[None, None])
    torchs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(ours, torchs, atol=1e-12)
    direction = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (query, key, value), direction),
        torch.autograd.grad(torchs, (query, key, value), direction),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def losses_and_gradients(model: Any, ids: torch.Tensor, how: Any, **arguments: Any) -> list[torch.Tensor]:
    model.zero_grad()
    with attending(how):
        loss = model(input_ids=ids, labels=ids, use_cache=False, **arguments).loss
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_architecture_computes_the_same(kind: str) -> None:
    model = make_model(kind)
    if not model._supports_sdpa:
        pytest.skip("it does not use the fused kernel")
    model.set_attn_implementation("sdpa")
    ids = token_ids(24)
    fused, products = (losses_and_gradients(model, ids, how) for how in ("fused", "products"))
    for one, other in zip(fused, products, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


def test_padded_sequences_compute_the_same() -> None:
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    ids = token_ids(12)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    fused, products = (losses_and_gradients(model, ids, how, attention_mask=mask) for how in ("fused", "products"))
    for one, other in zip(fused, products, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


def test_it_steps_in_where_it_can_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def noting(*arguments: Any, **others: Any) -> torch.Tensor:
        calls.append(arguments)
        return causal_attention(*arguments, **others)

    monkeypatch.setattr(attention, "causal_attention", noting)
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attending("products"):
        model(input_ids=token_ids(8), use_cache=False)
        assert len(calls) == model.config.num_hidden_layers
        cached = model(input_ids=token_ids(8), use_cache=True).past_key_values
        calls.clear()
        model(input_ids=token_ids(1), past_key_values=cached)  # one query, nine keys
        assert not calls
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    with pytest.raises(ZeroDivisionError), Arithmetic("float32", "products").active(CPU):
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_long_sequences_and_other_devices_keep_the_fused_kernel() -> None:
    assert choose_attention(LONGEST + 1, CPU, torch.float32) == "fused"
    assert choose_attention(64, torch.device("meta"), torch.float32) == "fused"
    assert choose_attention(64, CPU, torch.float32) in ("fused", "products")
