"""Each document's gradient is what a backward pass of it alone gives, in every architecture, however it is taken."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from neurograft.anatomy import describe
from neurograft.errors import NeurograftError
from neurograft.loss import NextTokenLoss
from neurograft.training.low_rank import LowRankChanges
from neurograft.training.per_document import DocumentGradients, add_clipped, norms
from tiny import CONFIGS, make_model

ONE_AT_A_TIME = {"opt", "mixtral", "qwen3_moe", "gpt_oss"}
"""Architectures whose layers throw the tokens of all documents together."""
LENGTHS = (12, 5, 9)


class Case:
    """A tiny model, two layers of it that train, and three documents."""

    def __init__(self, kind: str, rank: int | None = None) -> None:
        self.model: Any = make_model(kind).requires_grad_(False)
        self.layers = list(self.model.get_submodule(describe(self.model).layers_path).children())[2:4]
        if rank is None:
            self.parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        else:
            self.parameters = LowRankChanges(self.layers, rank, seed=0).parameters
            with torch.no_grad():  # the second factors start at zero, where the first ones have no gradients
                for factor in self.parameters:
                    factor.add_(torch.randn_like(factor), alpha=0.1)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.loss = NextTokenLoss(self.model)
        self.ids = torch.arange(36).view(3, 12) * 37 % 90
        self.labels = self.ids.clone()
        for row, length in enumerate(LENGTHS):
            self.labels[row, length:] = -100
        self.documents = DocumentGradients(self.layers, self.parameters)

    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        return self.loss(self.ids[rows], self.labels[rows]).sum(1)

    def one_by_one(self) -> list[list[torch.Tensor]]:
        """Return each document's gradients by plain torch."""
        found = []
        for row in range(3):
            gradients = torch.autograd.grad(
                self.losses(torch.tensor([row])).sum(), self.parameters, allow_unused=True, materialize_grads=True
            )
            found.append(list(gradients))
        return found

    def taken(self) -> list[torch.Tensor]:
        """Return what is taken for all documents, (3, ...) for each parameter, without dropout."""
        with self.documents._training_alone(), self.documents.hooked():
            if self.documents.together:
                return self.documents.take(self.losses(torch.arange(3)))
            each = [self.documents.take(self.losses(torch.tensor([row]))) for row in range(3)]
        return [torch.cat(parts) for parts in zip(*each, strict=True)]


def _compare(case: Case) -> None:
    taken = case.taken()
    for number, gradients in enumerate(case.one_by_one()):
        scale = max(float(gradient.abs().max()) for gradient in gradients)
        assert scale > 0
        for found, wanted in zip(taken, gradients, strict=True):
            torch.testing.assert_close(found[number], wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_each_document_alone(kind: str) -> None:
    case = Case(kind)
    before = [parameter.detach().clone() for parameter in case.parameters]
    assert case.documents.try_together(case.losses, 3) == (kind not in ONE_AT_A_TIME)
    assert all(torch.equal(a, b) for a, b in zip(before, case.parameters, strict=True))
    _compare(case)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_of_low_rank_changes(kind: str) -> None:
    case = Case(kind, rank=2)
    assert case.documents.try_together(case.losses, 3)
    _compare(case)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_layers_are_left_as_they_were(kind: str) -> None:
    """One kind goes through opacus, the other is refused by it half-way."""
    case, handlers = Case(kind), list(logging.getLogger().handlers)
    case.documents.try_together(case.losses, 3)
    assert not any(module.training for module in case.model.modules())
    assert not any("grad_sample" in vars(p) or p.grad is not None for p in case.model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in case.model.modules())
    assert not any("activations" in vars(module) for module in case.model.modules())
    assert logging.getLogger().handlers == handlers


def test_what_is_cut_and_added() -> None:
    case = Case("llama")
    assert case.documents.try_together(case.losses, 3)
    gradients = case.taken()
    found = norms(gradients)
    for number, own in enumerate(case.one_by_one()):
        assert float(found[number]) == pytest.approx(float(torch.cat([g.flatten() for g in own]).norm()), rel=1e-4)
    clip = float(found.sort().values[1])  # one document is cut, one is just not
    sums = [torch.zeros_like(parameter) for parameter in case.parameters]
    torch.testing.assert_close(add_clipped(sums, gradients, clip), found)
    for total, part in zip(sums, gradients, strict=True):
        shares = (clip / found).clamp(max=1).view(-1, *[1] * (part.ndim - 1))
        torch.testing.assert_close(total, (part * shares).sum(0), rtol=1e-4, atol=1e-6)


def test_with_a_huge_norm_the_sum_is_the_plain_gradient() -> None:
    case = Case("qwen3")
    assert case.documents.try_together(case.losses, 3)
    sums = [torch.zeros_like(parameter) for parameter in case.parameters]
    add_clipped(sums, case.taken(), 1e9)
    plain = torch.autograd.grad(case.losses(torch.arange(3)).sum(), case.parameters)
    for total, wanted in zip(sums, plain, strict=True):
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1])
def test_gradients_that_are_lost_on_the_way_are_noticed(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sampler gives too few gradients, opacus fills up with zeros, and trains on nothing without a word."""
    from neurograft.training import per_document

    case = Case("llama")
    assert case.documents.try_together(case.losses, 3)
    hooks = per_document._hooks_class(frozenset({type(case.layers[0].input_layernorm)}))
    whole = hooks.GRAD_SAMPLERS[torch.nn.Linear]

    def lose(*arguments: Any) -> Any:
        return {parameter: samples[:kept] for parameter, samples in whole(*arguments).items()}

    monkeypatch.setitem(hooks.GRAD_SAMPLERS, torch.nn.Linear, lose)
    assert not case.documents.try_together(case.losses, 3)
    _compare(case)


def test_a_parameter_that_nobody_watches_is_noticed() -> None:
    case = Case("llama")
    documents = DocumentGradients(case.layers[:1], case.parameters)
    assert not documents.try_together(case.losses, 3)
    documents.together = True
    with (
        documents.hooked(),
        documents._training_alone(),
        pytest.raises(NeurograftError, match=r"each of 3 documents, and opacus gave NoneType; nothing private"),
    ):
        documents.take(case.losses(torch.arange(3)))
