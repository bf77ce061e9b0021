"""A place's losses are those of the transplanted model, whatever is shared to get them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import extract, graft
from neurograft.errors import IncompatibleError
from neurograft.evaluation import Window, cut_windows, document_losses
from neurograft.placement.candidates import Candidate, list_candidates
from neurograft.placement.running import Runner
from tiny import CONFIGS, LAYERS, make_model

TOKENS = [[(7 * place + 3 * number) % 80 + 2 for place in range(9 + 5 * number)] for number in range(4)]
WINDOWS = cut_windows(TOKENS, 16, 1)


def _runner(model: Any, organ: Any, **options: Any) -> tuple[Runner, list[Candidate]]:
    candidates = list_candidates(LAYERS, organ.layer_count, modes=["replace", "insert"])
    return Runner(model, organ, candidates, padding=1, **options), candidates


def _by_document(windows: list[Window], losses: list[float]) -> list[float]:
    sums = [0.0] * len(TOKENS)
    for window, loss in zip(windows, losses, strict=True):
        sums[window.document] += loss
    return sums


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_places_are_as_grafted(kind: str, model_directory: Factory) -> None:
    organ = extract(model_directory(kind, seed=3), layers=(1, 3))
    model: Any = make_model(kind)
    runner, candidates = _runner(model, organ)
    blocked = runner.grafts.blocked
    usable = [candidate for candidate in candidates if candidate not in blocked]
    assert len(usable) >= LAYERS - 1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = runner.run(WINDOWS, usable)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    settings: Any = {"sequence_length": 16, "batch_size": len(WINDOWS), "separator_id": 1}
    for candidate in usable:
        with graft(model, organ, at=candidate.position, mode=candidate.mode):
            expected = [loss for loss, _ in document_losses(model, TOKENS, **settings)]
        assert _by_document(WINDOWS, outcome.places[candidate]) == pytest.approx(expected, rel=1e-5)
    expected = [loss for loss, _ in document_losses(model, TOKENS, **settings)]
    assert outcome.recipient is not None
    assert _by_document(WINDOWS, outcome.recipient) == pytest.approx(expected, rel=1e-5)
    for candidate in blocked:
        with pytest.raises(IncompatibleError), graft(model, organ, at=candidate.position, mode=candidate.mode):
            pass


def test_only_what_follows_a_place_runs(model_directory: Factory) -> None:
    organ = extract(model_directory("llama", seed=3), layers=(1, 3))
    model: Any = make_model("llama")
    runner, candidates = _runner(model, organ)
    ran = 0

    def count(*_: Any) -> None:
        nonlocal ran
        ran += 1

    layers: list[Any] = [*runner.grafts.own, *runner.grafts.layers]
    for layer in layers:
        layer.mlp.register_forward_hook(count)
    outcome = runner.run(WINDOWS, candidates)
    tokens = sum(len(window.ids) for window in WINDOWS)
    inserted = sum(2 + LAYERS - position for position in range(LAYERS + 1))
    replaced = sum(LAYERS - position for position in range(LAYERS - 1))
    assert ran == LAYERS + inserted + replaced
    assert outcome.passes == ran * tokens


def test_a_model_whose_layers_share_more_than_hidden_states_is_run_whole(model_directory: Factory) -> None:
    organ = extract(model_directory("llama", seed=3), layers=(1, 3))
    model: Any = make_model("llama")
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output.mean()))
    model.model.layers[5].mlp.register_forward_hook(lambda _m, _a, output: output + seen[-1])
    runner, _ = _runner(model, organ)
    outcome = runner.run(WINDOWS, [Candidate(3, "insert")])
    with graft(model, organ, at=3, mode="insert", verify=False):
        pairs = document_losses(model, TOKENS, sequence_length=16, batch_size=len(WINDOWS), separator_id=1)
    found = _by_document(WINDOWS, outcome.places[Candidate(3, "insert")])
    assert found == pytest.approx([loss for loss, _ in pairs], rel=1e-5)


def test_other_weights_are_held_and_given_back(model_directory: Factory) -> None:
    organ = extract(model_directory("llama", seed=3), layers=(1, 3))
    other = extract(model_directory("llama", seed=4), layers=(1, 3))
    model: Any = make_model("llama")
    runner, _ = _runner(model, organ)
    place = Candidate(2, "replace")
    before = runner.run(WINDOWS, [place])
    weights = {name.removeprefix("layers."): tensor for name, tensor in other.tensors.items()}
    lent = runner.run(WINDOWS, [place], weights={place: weights})
    expected = Runner(model, other, [place], padding=1).run(WINDOWS, [place])
    assert lent.places == expected.places and lent.places != before.places
    assert runner.run(WINDOWS, [place]) == before
