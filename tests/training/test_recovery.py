"""Recovery: it helps, only what was named trains, the result is plain, and the original comes back to the bit."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Factory
from neurograft import extract, recover, remove, transplant
from neurograft.data import pack, tokenize_documents
from neurograft.errors import DataError, ModelError, NeurograftError, UsageError, VerificationError
from neurograft.files import combine_digests, tensor_digest
from neurograft.loss import NextTokenLoss
from neurograft.manifest import SurgicalRecord
from neurograft.organ import Organ, read_organ
from neurograft.record import read_record
from neurograft.training.loop import TrainingProgress, TrainingRun
from neurograft.training.recovery import plan_recovery, share_steps
from neurograft.undoing import refuse_blocked_removal, refuse_entangled
from tiny import load, logits, make_tokenizer

Listing = Callable[[], list[str]]
QUICK: dict[str, Any] = {"steps": 4, "sequence_length": 16, "batch_size": 2, "lr": 3e-3, "evaluations": 2}
SCOPES: list[dict[str, Any]] = [
    {"scope": "organ"},
    {"scope": "neighbours", "neighbours": 2},
    {"scope": "neighbours", "unfreeze": "gradual"},
    {"scope": "seams"},
]
KINDS = {
    **dict.fromkeys(("llama", "gpt2", "gemma2", "mixtral"), SCOPES),
    **{key: [SCOPES[1], SCOPES[3]] for key in ("qwen3", "qwen3_moe", "gpt_neox", "olmo2", "gpt_oss")},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = (" ".join(generator.choices(["liver", "kidney", "heart", "lung"], k=12)) for _ in range(16))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def one(organ: Organ, recipient: Path, tmp_path: Path) -> Path:
    """A recipient of six layers with `tiny`, two layers of another model, inserted at 2."""
    transplant(organ, recipient, at=2, mode="insert", output=tmp_path / "one")
    return tmp_path / "one"


def _changed_tensors(before: Path, after: Path) -> set[str]:
    old, new = load(before).state_dict(), load(after).state_dict()
    assert set(old) == set(new)
    return {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}


def _layer_numbers(names: set[str]) -> set[int]:
    return {int(next(part for part in name.split(".") if part.isdigit())) for name in names}


def _assert_original(folder: Path, recipient: Path) -> None:
    assert (folder / "config.json").read_bytes() == (recipient / "config.json").read_bytes()
    old, new = (load_file(path / "model.safetensors") for path in (recipient, folder))
    assert {n: tensor_digest(t) for n, t in old.items()} == {n: tensor_digest(t) for n, t in new.items()}
    assert not (folder / "neurograft.json").exists() and not (folder / "explants").exists()


@pytest.mark.parametrize(
    ("kind", "choice"),
    [(kind, choice) for kind, choices in KINDS.items() for choice in choices],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_recovered_plain_and_removable(
    kind: str, choice: dict[str, Any], model_directory: Factory, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    recipient = model_directory(kind, seed=1)
    mode: Any = "replace" if kind in ("gemma2", "qwen3_moe", "gpt_oss") else "insert"
    transplant(
        extract(model_directory(kind), layers=(2, 4), name="tiny"), recipient, at=2, mode=mode, output=tmp_path / "one"
    )
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    models: list[Any] = []
    original = TrainingRun.train

    def remembered(run: TrainingRun) -> None:
        models.append(run.model)
        original(run)

    monkeypatch.setattr(TrainingRun, "train", remembered)
    record = recover(tmp_path / "one", data=text, output=tmp_path / "two", **choice, **QUICK)
    assert {path: path.read_bytes() for path in before} == before

    done = record.recoveries[-1]
    assert done.evaluations[0].after < done.evaluations[0].before
    trained = models[-1]
    trained.set_attn_implementation("eager")
    assert torch.equal(logits(load(tmp_path / "two")), logits(trained))
    layers = set(done.stages[-1].layers)
    changed = _changed_tensors(tmp_path / "one", tmp_path / "two")
    assert _layer_numbers(changed) == layers == {
        "organ": {2, 3}, "neighbours": {0, 1, 2, 3, 4, 5} if choice.get("neighbours") else {1, 2, 3, 4}, "seams": {2, 4}
    }[choice["scope"]]  # fmt: skip
    if choice["scope"] == "seams":
        state = load(tmp_path / "two").state_dict()
        assert {name for name in changed if state[name].dim() > 1} == set()
    assert (tmp_path / "two" / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()

    result = remove(tmp_path / "two", output=tmp_path / "back")
    assert result.original_restored and result.tensors_digest == record.original_tensors_digest
    _assert_original(tmp_path / "back", recipient)


@pytest.mark.parametrize("at", [0, 6])
@pytest.mark.parametrize("choice", SCOPES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_at_either_end(
    at: int, choice: dict[str, Any], organ: Organ, recipient: Path, text: Path, tmp_path: Path
) -> None:
    transplant(organ, recipient, at=at, mode="insert", output=tmp_path / "one")
    record = recover(tmp_path / "one", data=text, output=tmp_path / "two", **choice, **QUICK)
    if choice["scope"] == "seams":
        assert record.recoveries[0].stages[0].layers == ([0, 2] if at == 0 else [6])
    remove(tmp_path / "two", output=tmp_path / "back")
    _assert_original(tmp_path / "back", recipient)


def test_the_record_says_what_was_done(one: Path, text: Path, tmp_path: Path) -> None:
    record = recover(
        one, data=text, eval_data=text, general=text, output=tmp_path / "two", scope="neighbours", seed=5, **QUICK
    )
    read = read_record(tmp_path / "two")
    assert read == record and read is not None and read.schema_version == 2
    done = read.recoveries[0]
    assert (done.organ, done.scope, done.neighbours, done.unfreeze) == ("tiny", "neighbours", 1, "at_once")
    assert [layer.origin.organ for layer in done.changed] == [None, "tiny", "tiny", None]
    assert [layer.origin.layer for layer in done.changed] == [1, 0, 1, 2]
    assert [(layer.explant is None) for layer in done.changed] == [False, True, True, False]
    old, checkpoint = read_record(one), load_file(tmp_path / "two" / "model.safetensors")
    assert old is not None
    for layer, number in zip(done.changed, done.stages[0].layers, strict=True):
        assert layer.origin == old.layers[number] and layer.digest == read.layers[number].digest != layer.origin.digest
        prefix = f"model.layers.{number}."
        own = {n.removeprefix(prefix): tensor_digest(t) for n, t in checkpoint.items() if n.startswith(prefix)}
        assert combine_digests(own) == layer.digest and set(layer.tensors) <= set(own)
        if layer.explant is not None:
            explant = read_organ(tmp_path / "two" / layer.explant)
            assert explant.manifest.kind == "explant"
            assert explant.layer_digest(layer.explant_layer) == layer.origin.digest
    assert combine_digests({n: tensor_digest(t) for n, t in checkpoint.items()}) == read.tensors_digest
    assert done.training.protocol == "recovery" and done.training.seed == 5 and done.training.steps == 4
    held_out, general = done.evaluations
    assert (held_out.data, general.data) == ("held-out text", "general text")
    assert general.after < general.before
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    packed = pack(tokenize_documents(documents, make_tokenizer()), sequence_length=16, separator_id=1)
    for folder, claim in ((one, held_out.before), (tmp_path / "two", held_out.after)):
        with torch.no_grad():
            losses = NextTokenLoss(load(folder))(packed.input_ids, packed.labels)
        assert math.exp(float(losses.sum()) / int((packed.labels[:, 1:] >= 0).sum())) == pytest.approx(claim, rel=1e-5)
    assert "kidney" not in (tmp_path / "two" / "neurograft.json").read_text()
    assert str(tmp_path) not in (tmp_path / "two" / "neurograft.json").read_text()


def test_a_record_of_schema_1_is_read_recovered_and_removed(
    one: Path, recipient: Path, text: Path, tmp_path: Path
) -> None:
    path = one / "neurograft.json"
    data = json.loads(path.read_text())
    data["schema_version"] = 1
    del data["recoveries"], data["operations"][0]["manifest"]
    path.write_text(json.dumps(data))
    record = recover(one, data=text, output=tmp_path / "two", save_organ=tmp_path / "o.safetensors", **QUICK)
    assert record.schema_version == 2
    assert read_organ(tmp_path / "o.safetensors").manifest.training_history == []
    remove(tmp_path / "two", output=tmp_path / "back")
    _assert_original(tmp_path / "back", recipient)


def test_a_half_precision_model_stays_one(model_directory: Factory, text: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        shutil.copytree(model_directory("llama", seed=seed), tmp_path / f"half{seed}")
        load(tmp_path / f"half{seed}").bfloat16().save_pretrained(tmp_path / f"half{seed}")
    organ = extract(tmp_path / "half0", layers=(2, 4), name="tiny")
    transplant(organ, tmp_path / "half1", at=2, mode="insert", output=tmp_path / "one")
    record = recover(tmp_path / "one", data=text, eval_data=text, output=tmp_path / "two", scope="neighbours", **QUICK)
    assert {tensor.dtype for tensor in load_file(tmp_path / "two" / "model.safetensors").values()} == {torch.bfloat16}
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    packed = pack(tokenize_documents(documents, make_tokenizer()), sequence_length=16, separator_id=1)
    with torch.no_grad():  # what is claimed is what the rounded file does
        losses = NextTokenLoss(load(tmp_path / "two").float())(packed.input_ids, packed.labels)
    claim = record.recoveries[0].evaluations[0].after
    assert math.exp(float(losses.sum()) / int((packed.labels[:, 1:] >= 0).sum())) == pytest.approx(claim, rel=1e-5)
    remove(tmp_path / "two", output=tmp_path / "back")
    _assert_original(tmp_path / "back", tmp_path / "half1")


def test_gradual_unfreezing_goes_outward(
    one: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, set[int], dict[int, bool]]] = []
    original = TrainingRun.train

    def spied(run: TrainingRun) -> None:
        layers = list(run.model.get_submodule("model.layers").children())
        trains = {n for n, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())}
        before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
        original(run)
        now = {
            n: any(not torch.equal(a, b) for a, b in zip(old, layer.parameters(), strict=True))
            for n, (old, layer) in enumerate(zip(before, layers, strict=True))
        }
        seen.append((run.batches.steps, trains, now))

    monkeypatch.setattr(TrainingRun, "train", spied)
    steps: list[tuple[int, int]] = []
    record = recover(
        one, data=text, output=tmp_path / "two", scope="neighbours", neighbours=2, unfreeze="gradual",
        progress=lambda p: steps.append((p.step, p.steps)), **{**QUICK, "steps": 10},
    )  # fmt: skip
    expected = [{2, 3}, {1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}]
    assert [trains for _, trains, _ in seen] == expected
    assert [{n for n, changed in now.items() if changed} for _, _, now in seen] == expected
    assert [count for count, _, _ in seen] == [3, 3, 4]
    assert [stage.layers for stage in record.recoveries[0].stages] == [sorted(layers) for layers in expected]
    assert [stage.steps for stage in record.recoveries[0].stages] == [3, 3, 4]
    assert steps == [(step, 10) for step in range(1, 11)]
    assert record.recoveries[0].training.steps == 10


@pytest.mark.parametrize("choice", [{"scope": "neighbours"}, {"scope": "neighbours", "unfreeze": "gradual"}])
def test_strength_goes_part_of_the_way(choice: dict[str, Any], one: Path, text: Path, tmp_path: Path) -> None:
    for name, strength in (("whole", 1.0), ("half", 0.5)):
        recover(one, data=text, output=tmp_path / name, strength=strength, **choice, **QUICK)
    start, whole, half = (load(path).state_dict() for path in (one, tmp_path / "whole", tmp_path / "half"))
    for name, tensor in half.items():
        assert torch.allclose(tensor, torch.lerp(start[name], whole[name], 0.5), atol=1e-6), name


def _stop_at(step: int) -> Any:
    def stop(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("choice", SCOPES[1:], ids=lambda choice: "-".join(map(str, choice.values())))
@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_and_gone_on_is_uninterrupted(
    step: int, choice: dict[str, Any], model_directory: Factory, text: Path, tmp_path: Path
) -> None:
    host = model_directory("gpt2", resid_pdrop=0.3)
    transplant(extract(host, layers=(2, 4), name="tiny"), host, at=3, mode="insert", output=tmp_path / "one")
    options = {**QUICK, "steps": 6, **choice}
    whole = recover(tmp_path / "one", data=text, output=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+ of \d+; the same command goes on"):
        recover(tmp_path / "one", data=text, output=tmp_path / "two", progress=_stop_at(step), **options)
    assert list(tmp_path.glob("two.*resume")) and not (tmp_path / "two").exists()
    with pytest.raises(UsageError, match="is what an interrupted run with other options"):
        recover(tmp_path / "one", data=text, output=tmp_path / "two", **{**options, "lr": 2e-2})
    again = recover(tmp_path / "one", data=text, output=tmp_path / "two", **options)
    assert again.tensors_digest == whole.tensors_digest
    assert again.recoveries[0].evaluations == whole.recoveries[0].evaluations
    assert again.recoveries[0].changed == whole.recoveries[0].changed
    assert again.recoveries[0].training.loss_history == whole.recoveries[0].training.loss_history
    assert not list(tmp_path.glob("*resume"))


def test_the_learning_rate_of_seams_is_that_of_vectors(one: Path, text: Path, tmp_path: Path) -> None:
    rates = {}
    for scope in ("seams", "organ"):
        record = recover(one, data=text, output=tmp_path / scope, scope=scope, **{**QUICK, "lr": "auto"})
        rates[scope] = record.recoveries[0].training.hyperparameters["lr"]
    assert rates["seams"] == 1e-2 > rates["organ"]


def test_the_recovered_organ_travels(one: Path, organ: Organ, recipient: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    recover(one, data=text, output=tmp_path / "two", scope="seams", **QUICK)
    recover(tmp_path / "two", data=text, output=tmp_path / "three", save_organ=path, **QUICK)
    saved = read_organ(path)
    assert saved.name == "tiny-recovered" and saved.manifest.kind == "organ"
    assert saved.manifest.training is not None and saved.manifest.training.protocol == "recovery"
    assert [training.protocol for training in saved.manifest.trainings] == ["recovery", "recovery"]
    assert saved.manifest.source == organ.manifest.source
    assert (saved.manifest.recommended_mode, saved.manifest.recommended_position) == ("insert", 2)
    transplant(saved, recipient, output=tmp_path / "four")
    mine, there = load(tmp_path / "three").state_dict(), load(tmp_path / "four").state_dict()
    own = [name for name in mine if name.startswith(("model.layers.2.", "model.layers.3."))]
    assert own and all(torch.equal(mine[name], there[name]) for name in own)


@pytest.fixture
def two(one: Path, model_directory: Factory, tmp_path: Path) -> Path:
    """`tiny` at layers 2 and 3, `second` at 4, right behind it; six layers of the recipient around them."""
    second = extract(model_directory("llama", seed=3), layers=(0, 1), name="second")
    transplant(second, one, at=4, mode="insert", output=tmp_path / "two")
    return tmp_path / "two"


def _recovered(two: Path, text: Path, tmp_path: Path, *around: tuple[str, str]) -> Path:
    folder = two
    for number, (organ, scope) in enumerate(around):
        recover(folder, data=text, output=tmp_path / f"r{number}", organ=organ, scope=scope, **QUICK)  # type: ignore[arg-type]
        folder = tmp_path / f"r{number}"
    return folder


def test_which_organ_must_be_said(two: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"several organs \(tiny, second\); say which one with --organ"):
        recover(two, data=text, output=tmp_path / "x", **QUICK)
    with pytest.raises(UsageError, match="no organ named 'third'; it holds tiny, second"):
        recover(two, data=text, output=tmp_path / "x", organ="third", **QUICK)


@pytest.mark.parametrize(
    ("around", "order", "blocked"),
    [
        ([("tiny", "organ"), ("second", "organ")], ("tiny", "second"), None),
        ([("tiny", "organ"), ("second", "organ")], ("second", "tiny"), None),
        ([("tiny", "neighbours")], ("tiny", "second"), None),
        ([("tiny", "neighbours")], ("second", "tiny"), None),
        ([("second", "neighbours")], ("tiny", "second"), None),
        # second was trained after the recovery around tiny had trained it: tiny's can only be undone after second's
        ([("tiny", "neighbours"), ("second", "organ")], ("second", "tiny"), "second"),
        ([("tiny", "seams"), ("tiny", "neighbours"), ("tiny", "organ")], ("second", "tiny"), None),
        ([("tiny", "seams"), ("second", "seams")], ("second", "tiny"), "second"),
    ],
)
def test_two_organs_leave_as_far_as_that_can_be_exact(
    around: list[tuple[str, str]], order: tuple[str, str], blocked: str | None,
    two: Path, recipient: Path, text: Path, tmp_path: Path,
) -> None:  # fmt: skip
    folder = _recovered(two, text, tmp_path, *around)
    if blocked is not None:
        last = next(name for name in order if name != blocked)
        reason = f"the recovery around {blocked} trained layer .* after that around {last}; remove {blocked} first"
        with pytest.raises(UsageError, match=reason):
            remove(folder, organ=last, output=tmp_path / "x")
    remove(folder, organ=order[0], output=tmp_path / "half")
    half = read_record(tmp_path / "half")
    assert half is not None and all(done.organ == order[1] for done in half.recoveries)
    assert all(layer.origin.organ != order[0] for done in half.recoveries for layer in done.changed)
    if len({name for name, _ in around} | {order[0]}) == 1:  # all that was trained was trained around what has left
        transplanted = read_record(two)
        assert transplanted is not None
        assert [o for o in half.layers if o.organ != order[0]] == [
            o for o in transplanted.layers if o.organ != order[0]
        ]
    load(tmp_path / "half")
    remove(tmp_path / "half", output=tmp_path / "back")
    _assert_original(tmp_path / "back", recipient)


def test_a_recovery_that_would_bind_two_organs_together_is_refused(two: Path, text: Path, tmp_path: Path) -> None:
    folder = _recovered(two, text, tmp_path, ("tiny", "neighbours"), ("second", "neighbours"))
    with pytest.raises(UsageError, match="none of second, tiny could be removed before the others"):
        recover(folder, data=text, output=tmp_path / "x", organ="tiny", **QUICK)


@pytest.mark.parametrize("first", ["tiny", "second"])
def test_an_organ_put_over_what_recovery_trained(
    first: str, one: Path, model_directory: Factory, recipient: Path, text: Path, tmp_path: Path
) -> None:
    recover(one, data=text, output=tmp_path / "r", scope="neighbours", **QUICK)
    second = extract(model_directory("llama", seed=3), layers=(0, 1), name="second")
    transplant(second, tmp_path / "r", at=4, mode="replace", output=tmp_path / "two")
    recover(tmp_path / "two", data=text, output=tmp_path / "three", organ="second", scope="seams", **QUICK)
    remove(tmp_path / "three", organ=first, output=tmp_path / "four")
    if first == "second":
        assert torch.equal(logits(load(tmp_path / "four")), logits(load(tmp_path / "r")))
    else:  # what second replaced is now kept as it was before the recovery around tiny
        operation = (read_record(tmp_path / "four") or pytest.fail()).operations[0]
        original = read_record(one)
        assert original is not None and operation.explant_origins == [original.layers[4]]
        assert operation.explant is None and "-beside-" in next(p for p in operation.explant_places if p).path
    remove(tmp_path / "four", output=tmp_path / "back")
    _assert_original(tmp_path / "back", recipient)


def test_an_organ_under_another_is_not_recovered(one: Path, organ: Organ, text: Path, tmp_path: Path) -> None:
    transplant(organ, one, at=3, mode="replace", output=tmp_path / "two")
    with pytest.raises(UsageError, match="tiny-2 replaced layers of tiny; recover around tiny-2, or remove it first"):
        recover(tmp_path / "two", data=text, output=tmp_path / "x", organ="tiny", **QUICK)


def test_an_organ_with_another_inside(
    one: Path, model_directory: Factory, recipient: Path, text: Path, tmp_path: Path
) -> None:
    second = extract(model_directory("llama", seed=3), layers=(0, 1), name="second")
    transplant(second, one, at=3, mode="insert", output=tmp_path / "two")
    with pytest.raises(UsageError, match="other layers stand between those of tiny, so it has more than two sides"):
        recover(tmp_path / "two", data=text, output=tmp_path / "x", organ="tiny", scope="seams", **QUICK)
    with pytest.raises(UsageError, match="so it can't be saved as one organ"):
        recover(tmp_path / "two", data=text, output=tmp_path / "x", organ="tiny", save_organ=tmp_path / "x.safetensors")
    record = recover(tmp_path / "two", data=text, output=tmp_path / "three", organ="tiny", **QUICK)
    assert record.recoveries[0].stages[0].layers == [2, 4]
    remove(tmp_path / "three", organ="tiny", output=tmp_path / "four")
    remove(tmp_path / "four", output=tmp_path / "back")
    _assert_original(tmp_path / "back", recipient)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"at": 3}, "--at has no meaning here"),
        ({"protocol": "insert"}, "--protocol has no meaning here"),
        ({"neighbours": 1}, "--neighbours goes with --scope neighbours, and the scope is organ"),
        ({"scope": "neighbours", "neighbours": 0}, "--neighbours is 0; it counts the layers on each side"),
        ({"unfreeze": "gradual"}, "nothing outside it trains with the scope organ"),
        ({"scope": "seams", "unfreeze": "gradual"}, "nothing outside it trains with the scope seams"),
        ({"scope": "neighbours", "unfreeze": "gradual", "steps": 1}, "budget is 1 optimizer steps, and there are 2 st"),
        ({"save_organ": "organ.pt"}, r"organ file's name ends in \.safetensors, and organ\.pt does not"),
        ({"lr": 7}, "--lr"),
    ],
)
def test_wrong_choices(options: dict[str, Any], reason: str, one: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        recover(one, data=text, output=tmp_path / "x", **{**QUICK, **options})
    assert not (tmp_path / "x").exists()


def test_wrong_places(one: Path, recipient: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no neurograft\.json"):
        recover(recipient, data=text, output=tmp_path / "x")
    with pytest.raises(UsageError, match="overlaps the input"):
        recover(one, data=text, output=one)
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        recover(one, data=text, output=tmp_path / "x")
    with pytest.raises(DataError, match=r"no file or folder nowhere\.txt"):
        recover(one, data="nowhere.txt", output=tmp_path / "y")


def test_a_model_that_was_changed_since_is_refused(one: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(one / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"was changed since its neurograft\.json was written"):
        recover(one, data=text, output=tmp_path / "x", **QUICK)


def test_layers_without_vectors_have_no_seams(model_directory: Factory, text: Path, tmp_path: Path) -> None:
    host = model_directory("olmo")
    transplant(extract(host, layers=(2, 4), name="tiny"), host, at=2, mode="insert", output=tmp_path / "one")
    with pytest.raises(ModelError, match="the layers at the seams of tiny have no vectors"):
        recover(tmp_path / "one", data=text, output=tmp_path / "x", scope="seams", **QUICK)


def test_nothing_is_written_when_it_fails(
    one: Path, text: Path, tmp_path: Path, listing: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing()

    def diverged(*_: Any, **__: Any) -> Any:
        return torch.tensor([[float("nan")]], requires_grad=True)

    with monkeypatch.context() as patch:
        patch.setattr(NextTokenLoss, "__call__", diverged)
        with pytest.raises(NeurograftError):
            recover(one, data=text, output=tmp_path / "x", **QUICK)
    assert listing() == before
    original = TrainingRun.train

    def careless(run: TrainingRun) -> None:
        original(run)
        with torch.no_grad():
            run.model.get_parameter("model.norm.weight").mul_(2)

    monkeypatch.setattr(TrainingRun, "train", careless)
    with pytest.raises(VerificationError, match=r"other values in model\.norm\.weight than were trained"):
        recover(one, data=text, output=tmp_path / "x", **QUICK)
    assert listing() == before


def test_an_explant_outside_its_folder_is_refused(one: Path, text: Path, tmp_path: Path) -> None:
    recover(one, data=text, output=tmp_path / "two", scope="neighbours", **QUICK)
    path = tmp_path / "two" / "neurograft.json"
    data = json.loads(path.read_text())
    data["recoveries"][0]["changed"][0]["explant"] = "explants/../../organ.safetensors"
    path.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"neurograft\.json is no surgical record"):
        remove(tmp_path / "two", output=tmp_path / "x")


def test_a_missing_explant_is_named(one: Path, text: Path, tmp_path: Path, listing: Listing) -> None:
    record = recover(one, data=text, output=tmp_path / "two", scope="neighbours", **QUICK)
    explant = record.recoveries[0].changed[0].explant
    assert explant is not None
    (tmp_path / "two" / explant).unlink()
    with pytest.raises(NeurograftError, match=r"there is no organ file .*beside"):
        remove(tmp_path / "two", output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_steps_are_shared_equally() -> None:
    assert share_steps(10, 3) == [3, 3, 4] and share_steps(3, 3) == [1, 1, 1] and share_steps(5, 3) == [1, 2, 2]


def test_neighbours_stop_at_the_ends_of_the_model() -> None:
    plan = plan_recovery([1, 2], 4, organ="x", scope="neighbours", neighbours=5, unfreeze="gradual")
    assert plan.stages[:2] == [[1, 2], [0, 1, 2, 3]]


def test_what_must_go_first_is_read_off_the_record_alone(two: Path) -> None:
    record = read_record(two)
    assert isinstance(record, SurgicalRecord)
    refuse_blocked_removal(record, "tiny")
    refuse_entangled(record, "tiny", record.layers)


def test_sequences_are_no_longer_than_the_recipient_takes(text: Path, model_directory: Factory, tmp_path: Path) -> None:
    model = model_directory("gpt2")
    transplant(extract(model, layers=(2, 3)), model, at=2, mode="replace", output=tmp_path / "one")
    record = recover(tmp_path / "one", data=text, general=text, output=tmp_path / "new", steps=1, batch_size=1)
    assert record.recoveries[-1].training.hyperparameters["sequence_length"] == 64
    with pytest.raises(UsageError, match="takes at most 64 positions; give --sequence-length 64 or less"):
        recover(tmp_path / "one", data=text, output=tmp_path / "other", steps=1, sequence_length=65)
