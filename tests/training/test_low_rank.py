"""Low-rank changes: nothing at first, and part of ordinary weights at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurograft.errors import ModelError, UsageError
from neurograft.training.low_rank import LowRankChanges
from tiny import make_model, token_ids


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_is_what_was_trained(kind: str) -> None:
    model: Any = make_model(kind).requires_grad_(False)
    layers = list(model.model.layers if kind == "llama" else model.transformer.h)[2:4]
    ids = token_ids(12)
    before, weights = model(input_ids=ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    changes = LowRankChanges(layers, 2, seed=0)
    assert torch.equal(model(input_ids=ids).logits, before)
    optimizer = torch.optim.SGD(changes.parameters, lr=1.0)
    for _ in range(2):
        model(input_ids=ids).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(input_ids=ids).logits
    assert not torch.allclose(trained, before, atol=1e-4)
    changes.merge()
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        changed = parameter - weights[name]
        inside = (".2." in name or ".3." in name) and parameter.ndim == 2
        assert changed.any() == inside, name
        if inside:
            assert torch.linalg.matrix_rank(changed, atol=1e-5) <= 2


def test_the_same_seed_starts_the_same() -> None:
    layers = [list(make_model("llama").model.layers)[:2] for _ in range(3)]
    first, second, other = (LowRankChanges(own, 2, seed=s).parameters for own, s in zip(layers, (1, 1, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_layers_without_linear_maps_are_refused() -> None:
    with pytest.raises(ModelError, match="no linear maps"):
        LowRankChanges([torch.nn.LayerNorm(3)], 2, seed=0)


def test_a_rank_beyond_every_matrix_is_refused_and_nothing_is_changed() -> None:
    model: Any = make_model("llama")
    layers = list(model.model.layers)
    with pytest.raises(UsageError, match="rank 4096 is more than any matrix of the organ has"):
        LowRankChanges(layers, 4096, seed=0)
    assert all("forward" not in vars(module) for layer in layers for module in layer.modules())
