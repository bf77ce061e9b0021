"""Hidden states below the organ: the same whether computed or read, and only what they depend on makes them stale."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from neurograft.arithmetic import Arithmetic
from neurograft.errors import NeurograftError
from neurograft.training.prefix import Prefix, PrefixCache, below_digest, cache_for
from tiny import CONFIGS, LAYERS, make_model, token_ids


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("position", [1, 3, LAYERS - 1])
def test_given_states_lead_to_the_same_logits_and_gradients(kind: str, position: int) -> None:
    model: Any = make_model(kind)
    prefix = Prefix(model, position)
    assert prefix.works()
    ids = token_ids(20).view(2, 10)
    states = prefix.entering(ids)
    assert states.shape[:2] == ids.shape
    model.requires_grad_(False)
    prefix.first.requires_grad_(True)
    computed = model(input_ids=ids, use_cache=False).logits
    expected = torch.autograd.grad(computed.logsumexp(-1).sum(), list(prefix.first.parameters()), allow_unused=True)
    with prefix.given(states):
        given = model(input_ids=ids, use_cache=False).logits
    found = torch.autograd.grad(given.logsumexp(-1).sum(), list(prefix.first.parameters()), allow_unused=True)
    assert torch.equal(given, computed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, computed)


def test_the_layers_below_do_not_run() -> None:
    model: Any = make_model("llama")
    prefix, ids = Prefix(model, 3), token_ids(10)
    assert prefix.works()
    states = prefix.entering(ids)
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    prefix.entering(ids)
    assert ran == [0, 1, 2]
    ran.clear()
    with prefix.given(states):
        model(input_ids=ids)
    assert ran == [3, 4, 5]


def test_a_model_that_carries_more_than_hidden_states_is_not_cached() -> None:
    model: Any = make_model("llama")
    below, above = model.model.layers[0], model.model.layers[3]
    seen: list[torch.Tensor] = []
    below.register_forward_hook(lambda _m, _a, output: seen.append(output.sum()))
    above.register_forward_hook(lambda _m, _a, output: output + seen[-1])
    assert not Prefix(model, 2).works()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_states_come_back(dtype: Any, tmp_path: Path) -> None:
    states = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    cache = PrefixCache(tmp_path / "c", rows=6, tokens=4, width=5, dtype=dtype)
    cache.write([4, 0, 2], states)
    again = PrefixCache(tmp_path / "c", rows=6, tokens=4, width=5, dtype=dtype)
    assert again.has([0, 2, 4]) and not again.has([0, 1])
    assert torch.equal(again.read([2, 4]), states[[2, 0]].to(getattr(torch, dtype)))


def test_several_make_one_cache_at_once_and_no_row_is_lost(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def fill(folder: Path, row: int) -> None:
        together.wait()
        cache = PrefixCache(folder, rows=8, tokens=4, width=5, dtype="float32")
        cache.write([row], torch.full((1, 4, 5), row + 1.0))

    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            folder = tmp_path / str(number)
            list(pool.map(fill, [folder] * 8, range(8)))
            cache = PrefixCache(folder, rows=8, tokens=4, width=5, dtype="float32")
            assert cache.has(range(8))
            assert cache.read(range(8))[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_states_are_noted_on_the_way_and_rounded_there(kind: str) -> None:
    model: Any = make_model(kind)
    prefix, ids = Prefix(model, 3), token_ids(10)
    assert prefix.works()
    seen: list[torch.Tensor] = []

    def keep(states: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        seen.append(states.to(dtype))
        return seen[-1]

    with torch.no_grad(), prefix.noted(keep):
        computed = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(seen[0], prefix.entering(ids))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, computed)
        with prefix.noted(lambda states: keep(states, torch.bfloat16)):
            narrow = model(input_ids=ids, use_cache=False).logits
        with prefix.given(seen[1].float()):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, narrow)
    assert seen[1].dtype == torch.bfloat16 and not torch.equal(narrow, computed)


def test_a_row_has_one_state_whatever_batch_it_comes_in_later(tmp_path: Path) -> None:
    states = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    cache = PrefixCache(tmp_path / "c", rows=6, tokens=4, width=5, dtype="float32")
    assert torch.equal(cache.settle([4, 0, 4], states), states[[0, 1, 0]])
    assert cache.lacking([0, 1, 1, 4]) == [1]
    assert torch.equal(cache.settle([1, 4, 0], -states), torch.stack([-states[0], states[0], states[1]]))


def test_a_cache_is_found_again_only_for_the_same_prefix_and_text(tmp_path: Path) -> None:
    model: Any = make_model("llama")
    digest = below_digest(model, 2)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(1.0)
        model.lm_head.weight.add_(1.0)
        assert below_digest(model, 2) == digest != below_digest(model, 3)
        model.model.layers[1].mlp.up_proj.weight.add_(1e-6)
    assert below_digest(model, 2) != digest
    for ids in (token_ids(20).view(2, 10), token_ids(20).view(2, 10).flip(0)):
        cache_for(tmp_path, model, 2, ids, dtype="float32", arithmetic=Arithmetic("float32"), needed=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    model, ids = make_model("llama"), token_ids(20).view(2, 10)
    assert cache_for(tmp_path, model, 2, ids, dtype="float32", arithmetic=Arithmetic("float32"), needed=False) is None
    with pytest.raises(NeurograftError, match=r"take 2\.6 kB, and .* has 1\.0 kB free; use a narrower --cache-dtype"):
        cache_for(tmp_path, model, 2, ids, dtype="float32", arithmetic=Arithmetic("float32"), needed=True)
    assert list(tmp_path.iterdir()) == []
