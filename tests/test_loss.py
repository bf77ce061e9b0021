"""The loss without the logits is the loss with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurograft.data import IGNORED_LABEL
from neurograft.loss import CHUNK, NextTokenLoss, frozen_head_losses
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
