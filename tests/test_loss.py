"""The loss without the logits is the loss with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurograft.data import IGNORED_LABEL
from neurograft.loss import CHUNK, NextTokenLoss, VocabularySample, frozen_head_losses
from tiny import CONFIGS, make_model, token_ids


@pytest.mark.parametrize("rows", [1, CHUNK, CHUNK + 3])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_losses_and_gradient_are_those_of_the_plain_computation(rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 8), (50, 8), (50,)))
    targets = torch.randint(50, (rows,), generator=generator)
    outer = torch.rand(rows, generator=generator)
    own, plain = (hidden.clone().mul_(scale).requires_grad_() for _ in range(2))
    losses = frozen_head_losses(own, weight, bias, targets)
    expected = torch.nn.functional.cross_entropy(plain @ weight.T + bias, targets, reduction="none")
    (losses * outer).sum().backward()
    (expected * outer).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(frozen_head_losses(own, weight, bias, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted({*CONFIGS, "cohere", "granite", "gptj"}))
def test_every_model_gives_the_loss_of_its_logits(kind: str) -> None:
    model: Any = make_model(kind).requires_grad_(False)
    ids = token_ids(24).view(2, 12)
    labels = ids.clone()
    labels[0, 7:] = IGNORED_LABEL
    labels[1, :3] = IGNORED_LABEL
    losses = NextTokenLoss(model)(ids, labels)
    logits = model(input_ids=ids).logits
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (losses == 0).equal(targets == IGNORED_LABEL)


@pytest.mark.parametrize(("kind", "plain"), [("llama", True), ("gptj", True), ("gemma2", False), ("cohere", False)])
def test_heads_with_something_behind_them_are_left_alone(kind: str, plain: bool) -> None:
    changes: dict[str, Any] = {"logit_scale": 0.5} if kind == "cohere" else {}
    assert (NextTokenLoss(make_model(kind, **changes)).head is not None) == plain


def test_a_head_that_trains_gets_its_gradient() -> None:
    model: Any = make_model("llama")
    NextTokenLoss(model)(token_ids(12), token_ids(12)).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def _head(*, bias: bool) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 60, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_a_sampled_vocabulary_estimates_the_sum_over_the_whole_one_without_bias(bias: bool) -> None:
    head, text = _head(bias=bias), torch.tensor([3, 7, 7, 50])
    hidden, sample = torch.randn(1, 8), VocabularySample(head, text, others=5)
    assert sample.size == 3 + 5
    sums = []
    for seed in range(4000):
        sample.draw(seed)
        weight, correction = sample.head()
        sums.append(torch.nn.functional.linear(hidden, weight, correction).exp().sum())
    expected = head(hidden).exp().sum()
    assert float(torch.stack(sums).mean() / expected) == pytest.approx(1.0, abs=0.02)


def test_a_sampled_loss_is_that_of_the_sampled_logits() -> None:
    model: Any = make_model("llama").requires_grad_(False)
    ids = token_ids(24).view(2, 12)
    loss = NextTokenLoss(model)
    assert loss.head is not None
    exact = loss(ids, ids)
    sample = VocabularySample(loss.head, ids, others=0)
    left_out = loss(ids, ids, vocabulary=sample)
    # Tokens that are left out take no probability away, so every loss is smaller, and no label was lost.
    assert (left_out[:, :-1] < exact[:, :-1]).all() and left_out[:, :-1].min() >= 0
    sample = VocabularySample(loss.head, ids, others=40)
    means = []
    for seed in range(40):
        sample.draw(seed)
        means.append(loss(ids, ids, vocabulary=sample)[:, :-1].mean())
    assert float(torch.stack(means).mean()) == pytest.approx(float(exact[:, :-1].mean()), rel=0.02)
    sample.draw(5)
    again = loss(ids, ids, vocabulary=sample)
    sample.draw(5)
    assert torch.equal(loss(ids, ids, vocabulary=sample), again)
