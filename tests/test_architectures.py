"""Every architecture: what leaves one model arrives in another, exactly, on disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import extract, graft, remove, transplant
from neurograft.anatomy import read_anatomy
from neurograft.errors import ModelError, NeurograftError
from neurograft.manifest import Mode
from neurograft.models import load_config, resolve
from tiny import CONFIGS, FURTHER, LAYERS, generate, load, logits, make_config, make_model

START, STOP = 2, 4
PLACES: list[tuple[Mode, int]] = [
    ("insert", 0),
    ("insert", 3),
    ("insert", LAYERS),
    ("replace", START),
    ("replace", 1),
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_disk_and_memory_make_the_same_model(kind: str, model_directory: Factory, tmp_path: Path) -> None:
    donor, recipient = model_directory(kind, seed=0), model_directory(kind, seed=1)
    organ = extract(donor, layers=(START, STOP))
    model = load(recipient)
    before, tokens_before = logits(model), generate(model)
    for mode, at in PLACES:
        target = tmp_path / f"{mode}-{at}"
        record = transplant(organ, recipient, at=at, mode=mode, output=target)
        written = load(target)
        grown = STOP - START if mode == "insert" else 0
        assert len(record.layers) == LAYERS + grown
        with graft(model, organ, at=at, mode=mode):
            assert torch.equal(logits(model), logits(written)), (mode, at)
            assert torch.equal(logits(model, use_cache=False), logits(written)), (mode, at)
            cached = generate(model)
            assert cached == generate(model, use_cache=False) == generate(written) == generate(written, use_cache=False)
        assert not torch.equal(logits(written), before), (mode, at)
        assert torch.equal(logits(model), before)
        assert generate(model) == tokens_before
        restored = remove(target, output=tmp_path / f"restored-{mode}-{at}")
        assert restored.tensors_digest == record.original_tensors_digest
        assert restored.config_digest == record.original_config_digest
        assert torch.equal(logits(load(tmp_path / f"restored-{mode}-{at}")), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_put_back_where_they_came_from_change_nothing(
    kind: str, model_directory: Factory, tmp_path: Path
) -> None:
    donor = model_directory(kind, seed=0)
    transplant(extract(donor, layers=(START, STOP)), donor, at=START, mode="replace", output=tmp_path / "same")
    assert torch.equal(logits(load(tmp_path / "same")), logits(load(donor)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_organ_from_a_deeper_donor(kind: str, model_directory: Factory, tmp_path: Path) -> None:
    donor, recipient = model_directory(kind, seed=2, layers=8), model_directory(kind, seed=1)
    organ = extract(donor, layers=(4, 6))
    transplant(organ, recipient, at=1, mode="insert", output=tmp_path / "grafted")
    model = load(recipient)
    with graft(model, organ, at=1, mode="insert"):
        assert torch.equal(logits(model), logits(load(tmp_path / "grafted")))


def _moved_by_hand(kind: str, order: list[int]) -> Any:
    """Build a model from the layers of `make_model(kind)` in another order, its configuration written by hand."""
    source = make_model(kind)
    config = make_config(kind, layers=len(order))
    for name in ("layer_types",):
        if hasattr(source.config, name):
            setattr(config, name, [getattr(source.config, name)[index] for index in order])
    if kind == "qwen3_moe":
        dense = [index in source.config.mlp_only_layers or (index + 1) % 2 != 0 for index in order]
        config.decoder_sparse_step, config.mlp_only_layers = 1, [place for place, value in enumerate(dense) if value]
    target = type(source)._from_config(config, attn_implementation="eager")
    path = read_anatomy(source.config).layers_path
    state = {}
    for name, tensor in source.state_dict().items():
        if not name.startswith(f"{path}."):
            state[name] = tensor
    for place, index in enumerate(order):
        for name, tensor in source.get_submodule(f"{path}.{index}").state_dict().items():
            state[f"{path}.{place}.{name}"] = tensor
    target.load_state_dict(state, strict=True)
    return target.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_an_order_of_layers_made_by_hand(kind: str, model_directory: Factory, tmp_path: Path) -> None:
    donor = model_directory(kind, seed=0)
    organ = extract(donor, layers=(4, 6))
    transplant(organ, donor, at=1, mode="insert", output=tmp_path / "grafted")
    expected = logits(_moved_by_hand(kind, [0, 4, 5, 1, 2, 3, 4, 5]))
    assert torch.equal(logits(load(tmp_path / "grafted")), expected)


@pytest.mark.parametrize("kind", FURTHER)
def test_any_other_architecture_works_exactly_or_is_refused(
    kind: str, model_directory: Factory, tmp_path: Path
) -> None:
    try:
        donor = model_directory(kind, seed=0)
    except (ImportError, KeyError, ValueError) as error:
        pytest.fail(f"the test's own configuration of {kind} is wrong: {error}")
    try:
        organ = extract(donor, layers=(START, STOP))
    except NeurograftError as error:
        assert str(error).count(". ") == 0, error
        return
    expected = logits(load(donor))
    done = 0
    for mode, at in PLACES:
        target = tmp_path / f"{mode}-{at}"
        try:
            transplant(organ, donor, at=at, mode=mode, output=target)
        except NeurograftError as error:
            assert not target.exists() and str(error).count(". ") == 0, error
            continue
        done += 1
        written = load(target)
        if (mode, at) == ("replace", START):
            assert torch.equal(logits(written), expected)
        model = load(donor)
        try:
            with graft(model, organ, at=at, mode=mode):
                assert torch.equal(logits(model, use_cache=False), logits(written, use_cache=False)), (mode, at)
        except NeurograftError:
            pass
        assert torch.equal(logits(model), expected)
        remove(target, output=tmp_path / f"restored-{mode}-{at}")
        assert torch.equal(logits(load(tmp_path / f"restored-{mode}-{at}")), expected)
    assert done > 0


def test_kinds_of_layers_travel(model_directory: Factory, tmp_path: Path) -> None:
    donor = model_directory("gemma2", seed=0)
    kinds = load_config(resolve(donor)).layer_types
    transplant(extract(donor, layers=(0, 1)), donor, at=1, mode="insert", output=tmp_path / "grafted")
    assert load_config(resolve(tmp_path / "grafted")).layer_types == [kinds[0], kinds[0], *kinds[1:]]


def test_dense_layers_and_mixtures_travel(model_directory: Factory, tmp_path: Path) -> None:
    donor = model_directory("qwen3_moe", seed=0)
    transplant(extract(donor, layers=(0, 2)), donor, at=LAYERS, mode="insert", output=tmp_path / "grafted")
    config = load_config(resolve(tmp_path / "grafted"))
    # Layers 1, 3 and 5 would be mixtures by the step of two, but 1 is listed as dense.
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [0, 1, 2, 4, 6, 7])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (dict(is_decoder=False), "encoder"),
    "roberta": (dict(is_decoder=False), "encoder"),
    "t5": (dict(d_model=32, num_layers=2, num_heads=2, d_ff=32), "encoder-decoder"),
    "bart": (dict(d_model=32, encoder_layers=2, decoder_layers=2), "encoder-decoder"),
    "zamba2": (dict(layers=54, hidden_size=64), "share|can't build|not exactly one"),
    "rwkv": (dict(attention_hidden_size=32), "rescales"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_cut_is_refused_in_one_sentence(kind: str) -> None:
    changes, reason = REFUSED[kind]
    config = make_config(kind, **changes)
    with pytest.raises(ModelError, match=reason) as caught:
        read_anatomy(config, config.to_dict())
    assert "\n" not in str(caught.value)


def test_composite_models_are_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(ModelError, match="composite"):
        read_anatomy(AutoConfig.for_model("llava"))


def test_arithmetic_that_depends_on_the_place_is_refused_elsewhere(model_directory: Factory, tmp_path: Path) -> None:
    donor = model_directory("gpt2", seed=0, scale_attn_by_inverse_layer_idx=True)
    organ = extract(donor, layers=(START, STOP))
    transplant(organ, donor, at=START, mode="replace", output=tmp_path / "in-place")
    assert torch.equal(logits(load(tmp_path / "in-place")), logits(load(donor)))
    with pytest.raises(NeurograftError, match="would not compute the same"):
        transplant(organ, donor, at=0, mode="insert", output=tmp_path / "moved")


def test_a_pattern_that_can_not_be_expressed_is_refused(model_directory: Factory, tmp_path: Path) -> None:
    donor = model_directory("deepseek_v3", seed=0)
    organ = extract(donor, layers=(0, 1))
    with pytest.raises(NeurograftError, match=r"cannot be expressed with first_k_dense_replace|would not compute"):
        transplant(organ, donor, at=4, mode="insert", output=tmp_path / "moved")
