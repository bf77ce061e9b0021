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
from neurograft.training.per_document import DocumentGradients, Factored, Gradients, Stacked
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

    def taken(self) -> list[Gradients]:
        """Return what is taken, of all documents at once or of one at a time, without dropout."""
        with self.documents._training_alone(), self.documents.hooked():
            if self.documents.together:
                return [self.documents.take(self.losses(torch.arange(3)))]
            return [self.documents.take(self.losses(torch.tensor([row]))) for row in range(3)]


def _compare(case: Case) -> None:
    """Compare norms, gradients, and weighted sums that leave all others out."""
    alone, number = case.one_by_one(), 0
    for gradients in case.taken():
        found = gradients.norms()
        for place, norm in enumerate(found):
            wanted = alone[number]
            scale = max(float(gradient.abs().max()) for gradient in wanted)
            assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in wanted]).norm()), rel=1e-4)
            shares = torch.nn.functional.one_hot(torch.tensor(place), len(found)).float()
            for piece, own, right in zip(gradients.pieces, gradients.of(place), wanted, strict=True):
                torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5 * scale)
                torch.testing.assert_close(piece.weighted(shares), right, rtol=1e-4, atol=1e-5 * scale)
            number += 1
    assert number == 3


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


@pytest.mark.parametrize("tokens", [2, 40])
def test_norms_of_short_and_long_documents(tokens: int) -> None:
    """They are computed in two ways, by what costs less."""
    left, right = torch.randn(3, tokens, 8), torch.randn(3, tokens, 12)
    made = torch.einsum("nti,ntj->nij", left, right)
    torch.testing.assert_close(Factored(left, right).square_norms(), made.square().sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_what_is_cut_and_added() -> None:
    case = Case("llama")
    assert case.documents.try_together(case.losses, 3)
    (gradients,) = case.taken()
    found = gradients.norms()
    clip = float(found.sort().values[1])  # one document is cut, one is just not
    sums = [torch.zeros_like(parameter) for parameter in case.parameters]
    torch.testing.assert_close(gradients.add_clipped(sums, clip), found)
    shares = (clip / found).clamp(max=1).tolist()
    assert sorted(share < 1 for share in shares) == [False, False, True]
    for number, total in enumerate(sums):
        wanted = sum(share * own[number] for share, own in zip(shares, case.one_by_one(), strict=True))
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)


def test_with_a_huge_norm_the_sum_is_the_plain_gradient() -> None:
    case = Case("qwen3")
    assert case.documents.try_together(case.losses, 3)
    sums = [torch.zeros_like(parameter) for parameter in case.parameters]
    case.taken()[0].add_clipped(sums, 1e9)
    plain = torch.autograd.grad(case.losses(torch.arange(3)).sum(), case.parameters)
    for total, wanted in zip(sums, plain, strict=True):
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_lost_on_the_way_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler of zeros for all documents but the first would train on that alone, without a word."""
    from neurograft.training import per_document

    case = Case("llama")
    assert case.documents.try_together(case.losses, 3)
    hooks = per_document._hooks_class(frozenset({type(case.layers[0].input_layernorm)}))
    whole = hooks.GRAD_SAMPLERS[torch.nn.Linear]

    def lose(*arguments: Any) -> Any:
        first = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
        return {parameter: Stacked(piece.stacked() * first) for parameter, piece in whole(*arguments).items()}

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
        pytest.raises(NeurograftError, match=r"each of 3 documents, and there are none; nothing private"),
    ):
        documents.take(case.losses(torch.arange(3)))
