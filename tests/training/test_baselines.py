"""LoRA, DoRA and full fine-tuning through the same loop as organs: what trains, what stays, what ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from neurograft.errors import NeurograftError, UsageError
from neurograft.organ import Organ, read_organ
from neurograft.training.baselines import METHODS, OrganSettings, Prepared, find_methods, prepare
from neurograft.training.loop import Batches, Texts, TrainingRun
from neurograft.training.options import parse_options
from neurograft.training.search import Choice, Range, Settings, Space, read_spaces, settings_to_try
from tiny import logits, make_model, make_tokenizer

TEXTS = Texts([f"report {n}: nothing seen in the left lung, grade {n % 4}" for n in range(20)], ["report 99: all well"])
OPTIONS = parse_options(steps=4, sequence_length=16, batch_size=2, lr=1e-2, evaluations=1)
LAYERS_TRAINED = ("model.layers.2.", "model.layers.3.")  # those of the fixture's organ


def adapt(model: Any, name: str, settings: Settings, organ: Path | None = None) -> Prepared:
    """Train a model for four steps by a method."""
    own, _ = METHODS[name].parse(settings)
    prepared = prepare(model, METHODS[name], own, organ=organ)
    TrainingRun(model, prepared.trainee, Batches.build(TEXTS, make_tokenizer(), OPTIONS), OPTIONS).train()
    return prepared


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "kind"), [("lora", "llama"), ("dora", "llama"), ("lora", "gpt2"), ("dora", "gpt2"), ("lora", "qwen3_moe")]
)
def test_an_adapter_leaves_the_base_weights_as_they_are(name: str, kind: str) -> None:
    model = make_model(kind)
    before, answers = values(model), logits(model)
    adapt(model, name, {"rank": 4})
    after = {key.replace(".base_layer", ""): tensor for key, tensor in values(model).items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert len(after) > len(before) and not torch.allclose(logits(model), answers, atol=1e-3)


def test_a_model_that_peft_can_not_adapt_is_refused() -> None:
    own, _ = METHODS["dora"].parse({})
    with pytest.raises(NeurograftError, match="peft can't put DoRA on this qwen3_moe model: "):
        prepare(make_model("qwen3_moe"), METHODS["dora"], own)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_starts_as_the_model(name: str) -> None:
    model = make_model("llama")
    answers = logits(model)
    own, _ = METHODS[name].parse({})
    prepare(model, METHODS[name], own)
    # DoRA divides by the norm of each column and multiplies by it again.
    assert torch.allclose(logits(model), answers, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_merging_an_adapter_gives_the_same_logits(name: str) -> None:
    model = make_model("llama")
    adapt(model, name, {"rank": 4})
    answers, bare = logits(model), logits(make_model("llama"))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.merge()  # type: ignore[operator]
    # Merged weights are rounded sums: the order of the additions differs.
    assert torch.allclose(logits(model), answers, atol=1e-5)
    assert not torch.allclose(bare, answers, atol=1e-3)


def test_an_adapter_is_on_every_linear_layer_but_the_head() -> None:
    model = make_model("llama")
    own, _ = METHODS["lora"].parse({"rank": 4, "scale": 1.5})
    prepared = prepare(model, METHODS["lora"], own)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 6 * 7 and not any("head" in name or "embed" in name for name in adapted)
    assert len(prepared.trainee.parameters) == 2 * len(adapted)
    module: Any = model.get_submodule(next(iter(sorted(adapted))))
    assert module.r["default"] == 4 and module.scaling["default"] == 1.5


def test_an_adapter_starts_by_its_seed() -> None:
    own, _ = METHODS["lora"].parse({})
    starts = []
    for seed in (0, 0, 1):
        prepared = prepare(make_model("llama"), METHODS["lora"], own, seed=seed)
        starts.append(prepared.trainee.parameters[0].detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the second one's embedding is its head
def test_full_fine_tuning_trains_everything(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepared = adapt(model, "full", {})
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert prepared.ship(tmp_path) == sum(tensor.nbytes for tensor in before.values())


def test_a_fully_tuned_model_ships_in_the_dtype_it_is_stored_in(tmp_path: Path) -> None:
    model = make_model("llama")
    own, _ = METHODS["full"].parse({})
    prepared = prepare(model, METHODS["full"], own, stored=torch.bfloat16)
    prepared.deploy()
    assert prepared.ship(tmp_path) == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


@pytest.mark.parametrize(("name", "layers"), [("organ", 6), ("insert", 8), ("standalone", 2)])
def test_an_organ_is_what_train_would_train(name: str, layers: int, organ_file: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    before = values(model)
    prepared = adapt(model, name, {}, organ_file)
    container: Any = model.get_submodule("model.layers")
    assert len(container) == layers
    prepared.deploy()
    assert len(container) == (8 if name == "insert" else 6)
    after = values(model)
    changed = {key for key in after if key not in before or not torch.equal(after[key], before[key])}
    if name == "insert":
        assert not any(f"layers.{number}." in key for key in changed for number in range(2))
    else:
        assert changed and all(key.startswith(("model.layers.2.", "model.layers.3.")) for key in changed)
    (tmp_path / "ship").mkdir()
    size = prepared.ship(tmp_path / "ship")
    assert size == (tmp_path / "ship" / "organ.safetensors").stat().st_size
    shipped: Organ = read_organ(tmp_path / "ship" / "organ.safetensors")
    assert torch.equal(shipped.layer(0)["self_attn.q_proj.weight"], after["model.layers.2.self_attn.q_proj.weight"])


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_part_of_an_organ_trains_alone(part: str, organ_file: Path) -> None:
    model = make_model("llama")
    whole = prepare(model, METHODS["organ"], METHODS["organ"].parse({})[0], organ=organ_file)
    before = [tensor.detach().clone() for tensor in whole.trainee.parameters]
    model = make_model("llama")
    prepared = adapt(model, "organ", {"train": part}, organ_file)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    after = {name: tensor for name, tensor in model.named_parameters() if name.startswith(LAYERS_TRAINED)}
    changed = {name for name, old in zip(after, before, strict=True) if not torch.equal(after[name], old)}
    assert changed == {name for name in after if (".self_attn." in name) == (part == "attention")}
    assert {names[id(parameter)] for parameter in prepared.trainee.parameters} == changed


def test_places_of_an_organ() -> None:
    def place(**settings: Any) -> tuple[int, int]:
        chosen = OrganSettings(**settings).range_in(30)
        return chosen.start, chosen.stop

    assert place() == (9, 12)
    assert place(layers=6, position=1) == (24, 30)
    assert place(layers=6, position=0) == (0, 6)
    assert place(layers="12:20") == (12, 20)
    with pytest.raises(UsageError, match="organ of 31 layers, and the model has 30"):
        place(layers=31)


def test_every_usual_space_is_valid_and_large_enough() -> None:
    for method in METHODS.values():
        method.check_space(dict(method.space))
        tried = settings_to_try(method.space, 16, method.name)
        assert len(tried) == 16 and all(tried.count(settings) == 1 for settings in tried)
        for settings in tried:
            method.parse(settings)


def test_few_trials_are_spread_over_the_space() -> None:
    space: Space = {"lr": Range(low=1e-4, high=1e-2), "rank": [8, 64]}
    tried = settings_to_try(space, 4, "lora")
    assert tried[0] == {"lr": 1e-3, "rank": 64}  # the middle
    assert tried == settings_to_try(space, 9, "lora")[:4]
    quarters = {round(float(settings["lr"]) / 1e-4) for settings in tried}
    assert len(quarters) == 4 and {settings["rank"] for settings in tried} == {8, 64}


def test_a_space_smaller_than_the_search_is_refused() -> None:
    with pytest.raises(UsageError, match="of full has fewer than 3 combinations"):
        settings_to_try({"lr": [1e-3, 1e-4]}, 3, "full")
    assert len(settings_to_try({"lr": [1e-3, 1e-4]}, 2, "full")) == 2
    one: list[Choice] = [[1e-3, 1e-3], [1, 1.0], Range(low=1e-3, high=1.0001e-3)]
    for choice in one:
        with pytest.raises(UsageError, match="of full has fewer than 2 combinations"):
            settings_to_try({"lr": choice}, 2, "full")
    with pytest.raises(UsageError, match="of full has fewer than 100,000,000 combinations"):  # at once
        settings_to_try({"lr": Range(low=1e-5, high=1e-3)}, 10**8, "full")
    every = settings_to_try({"lr": [1e-3, 1e-4, 1e-5], "layers": list(range(1, 14))}, 39, "full")
    assert len(every) == 39


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- lora", "no mapping of methods"),
        ("lora: {lr: [0.1], rank: [8], lr: [0.2]}", "lr stands there twice, in what begins in line 1"),
        ("lora: {lr: [0.1]}\ndora: {lr: [0.1]}\nlora: {lr: [0.2]}", "lora stands there twice"),
        ("lora: 3", "no mapping of methods"),
        ("lora: {lr: 0.1}", "lora: lr is 0.1"),
        ("lora: {lr: []}", r"lora: lr is \[\]"),
        ("lora: {lr: {low: 1, high: 0.1}}", "lora: lr: low is 1 and high is 0.1"),
        ("lora: {lr: {low: 1e-4}}", "lora: lr: high: Field required"),
        ("lora: {lr: {low: -1, high: 1}}", "lora: lr: low: Input should be greater than 0"),
        ("lora: [", "can't be read"),
    ],
)
def test_search_files_that_are_wrong(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_spaces(path)


def test_a_search_file_may_be_yaml_or_json(tmp_path: Path) -> None:
    wanted = {"lora": {"lr": Range(low=1e-4, high=1e-3), "rank": [8, 16]}, "organ": {"layers": ["10:13"], "lr": [3e-3]}}
    (tmp_path / "a.yaml").write_text(
        "lora:\n  lr: {low: 1e-4, high: 1e-3}\n  rank: [8, 16]\norgan:\n  layers: ['10:13']\n  lr: [3e-3]\n"
    )
    (tmp_path / "a.json").write_text(
        '{"lora": {"lr": {"low": 0.0001, "high": 0.001}, "rank": [8, 16]}, '
        '"organ": {"layers": ["10:13"], "lr": [3e-3]}}'
    )
    assert read_spaces(tmp_path / "a.yaml") == read_spaces(tmp_path / "a.json") == wanted
    with pytest.raises(UsageError, match="can't be read"):
        read_spaces(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        (
            "lora",
            {"wings": 2},
            "wings is no setting that can be searched for lora; there are rank, scale, optimizer",
        ),
        ("full", {"rank": 2}, "rank is no setting"),
        ("lora", {"batch_size": 2}, "batch_size is no setting"),
        ("lora", {"rank": 0}, "lora: rank: Input should be greater than or equal to 1"),
        ("organ", {"lr": 7.0}, "organ: lr: "),
        ("organ", {"position": 1.5}, "organ: position: "),
    ],
)
def test_settings_that_are_wrong(name: str, settings: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        METHODS[name].parse(settings)


def test_methods_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [method.name for method in find_methods(" full , organ ")] == ["full", "organ"]
    for names, reason in (
        ("organ,prefix", "no method prefix; there are organ, "),
        ("organ,organ", "organ is given twice"),
        ("", "no method was given"),
    ):
        with pytest.raises(UsageError, match=reason):
            find_methods(names)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert find_methods(["organ", "full"])
    with pytest.raises(NeurograftError, match=r"lora needs peft, .* pip install 'neurograft\[compare\]'"):
        find_methods(["organ", "lora"])
