"""Optimizers, learning rates and averages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from neurograft.training.optimizers import Average, Optimizers, pull_back
from neurograft.training.schedules import learning_rate_share


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 6), (6,), (2, 3, 4), (5, 3))]


def _descend(parameters: list[torch.nn.Parameter], optimizers: Optimizers, steps: int) -> float:
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = sum((parameter.square().sum() for parameter in parameters), torch.tensor(0.0))
        loss.backward()
        optimizers.step(1.0)
    return float(loss.detach())


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_every_parameter_is_trained_by_one_optimizer(name: Any) -> None:
    parameters = _parameters()
    start = [parameter.detach().clone() for parameter in parameters]
    optimizers = Optimizers(parameters, name=name, lr=0.05, weight_decay=0.0)
    owned = [id(p) for each in optimizers.each for group in each.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, parameters))
    first = _descend(parameters, optimizers, 1)
    assert _descend(parameters, optimizers, 30) < 0.5 * first
    assert all(not torch.equal(p, s) for p, s in zip(parameters, start, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_going_on_from_a_state_is_going_on(name: Any) -> None:
    whole = _parameters()
    optimizers = Optimizers(whole, name=name, lr=0.05, weight_decay=0.01)
    _descend(whole, optimizers, 3)
    state = {key: tensor.clone() for key, tensor in optimizers.state()}
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    _descend(whole, optimizers, 2)
    restored = Optimizers(again, name=name, lr=0.05, weight_decay=0.01)
    restored.load_state(state)
    _descend(again, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_learning_rate_rises_and_falls_to_a_tenth(schedule: Any) -> None:
    shares = [learning_rate_share(step, 100, warmup=0.1, schedule=schedule) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[9] == 1.0 and shares[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(shares[9:]))
    assert (shares[60] == 1.0) == (schedule == "wsd")


def test_an_average_lags_and_can_be_swapped_in_and_out() -> None:
    weights = [torch.zeros(3)]
    average = Average(weights, 0.9)
    for step in range(1, 201):
        weights[0] += 1.0
        average.update(step)
    assert 185 < float(average.values[0][0]) < 195
    now = weights[0].clone()
    average.swap()
    assert torch.equal(average.values[0], now) and not torch.equal(weights[0], now)
    average.swap()
    assert torch.equal(weights[0], now)


def test_pulling_back_goes_part_of_the_way() -> None:
    weights, start = [torch.tensor([2.0, 4.0])], [torch.tensor([1.0, 0.0])]
    pull_back(weights, start, 0.25)
    assert torch.allclose(weights[0], torch.tensor([1.75, 3.0]))
