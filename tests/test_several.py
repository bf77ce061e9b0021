"""Several organs in one recipient: put in at once or one after another, taken out in any order, exactly."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import Factory
from neurograft import extract, graft, remove, transplant
from neurograft.errors import IncompatibleError, UsageError
from neurograft.manifest import SurgicalRecord
from neurograft.organ import Organ
from neurograft.record import read_record
from tiny import LAYERS, load, logits

LENGTHS = {"a": 1, "b": 2, "c": 3}
Towers = list[list[tuple[str | None, int]]]
"""What stands at each place of a model, and under it what it replaced; the last of a tower is what is there now."""


@pytest.fixture(scope="session")
def organs(model_directory: Factory) -> dict[str, Organ]:
    return {
        name: extract(model_directory("llama", seed=3 + number), layers=(1, 1 + length), name=name)
        for number, (name, length) in enumerate(LENGTHS.items())
    }


def _put(towers: Towers, name: str, at: int, mode: str) -> Towers:
    layers: list[tuple[str | None, int]] = [(name, layer) for layer in range(LENGTHS[name])]
    if mode == "insert":
        return [*towers[:at], *[[layer] for layer in layers], *towers[at:]]
    covered = [[*tower, layer] for tower, layer in zip(towers[at:], layers, strict=False)]
    return [*towers[:at], *covered, *towers[at + len(layers) :]]


def _take(towers: Towers, name: str) -> Towers:
    left = [[layer for layer in tower if layer[0] != name] for tower in towers]
    return [tower for tower in left if tower]


def _check(folder: Path, towers: Towers) -> SurgicalRecord:
    record = read_record(folder)
    assert record is not None
    assert [(origin.organ, origin.layer) for origin in record.layers] == [tower[-1] for tower in towers]
    kept = {item[1].path for operation in record.operations for item in operation.replaced if item is not None}
    assert {f"explants/{path.name}" for path in (folder / "explants").glob("*")} >= kept
    return record


def _assert_same_model(folder: Path, original: Path) -> None:
    assert (folder / "config.json").read_bytes() == (original / "config.json").read_bytes()
    back, before = load_file(folder / "model.safetensors"), load_file(original / "model.safetensors")
    assert back.keys() == before.keys() and all(torch.equal(back[name], before[name]) for name in back)
    assert not (folder / "neurograft.json").exists() and not (folder / "explants").exists()


# Each example takes seconds: a failure is shown as it was found.
@settings(
    max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_any_order_of_puts_and_takes_gives_the_original_back(
    data: st.DataObject, organs: dict[str, Organ], recipient: Path
) -> None:
    towers: Towers = [[(None, layer)] for layer in range(LAYERS)]
    with tempfile.TemporaryDirectory() as folder:
        present, number = recipient, 0
        while True:
            inside = sorted({layer[0] for tower in towers for layer in tower if layer[0] is not None})
            outside = [name for name in LENGTHS if name not in inside]
            if number >= 7:
                outside = []  # from here on all leave
            choices = [*(("put", name) for name in outside), *(("take", name) for name in inside)]
            if not choices:
                break
            what, name = data.draw(st.sampled_from(choices))
            target, number = Path(folder, str(number)), number + 1
            if what == "put":
                mode = data.draw(st.sampled_from(["replace", "insert"]))
                last = len(towers) - (LENGTHS[name] if mode == "replace" else 0)
                at = data.draw(st.integers(0, last))
                transplant(organs[name], present, at=at, mode=mode, output=target, verify="bytes")  # type: ignore[arg-type]
                towers = _put(towers, name, at, mode)
            else:
                removal = remove(present, organ=name, output=target)
                towers = _take(towers, name)
                assert removal.original_restored == (inside == [name])
            if any(tower[-1][0] is not None for tower in towers):
                _check(target, towers)
            else:
                _assert_same_model(target, recipient)
            present = target
    assert towers == [[(None, layer)] for layer in range(LAYERS)]


def test_an_organ_under_another_leaves_first(organs: dict[str, Organ], recipient: Path, tmp_path: Path) -> None:
    transplant(organs["b"], recipient, at=1, mode="replace", output=tmp_path / "b")
    transplant(organs["c"], tmp_path / "b", at=2, mode="replace", output=tmp_path / "bc")
    transplant(organs["c"], recipient, at=2, mode="replace", output=tmp_path / "c")
    remove(tmp_path / "bc", organ="b", output=tmp_path / "left")
    assert torch.equal(logits(load(tmp_path / "left")), logits(load(tmp_path / "c")))
    operation = (read_record(tmp_path / "left") or pytest.fail()).operations[0]
    assert [place and (place.path, place.layer) for place in operation.explant_places] == [
        ("explants/b.safetensors", 1), ("explants/c.safetensors", 1), ("explants/c.safetensors", 2),
    ]  # fmt: skip
    # The name is free again, the file is not: it stands for a layer in another organ's place.
    transplant(organs["b"], tmp_path / "left", at=0, mode="replace", output=tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again" / "explants").iterdir()) == [
        "b-2.safetensors", "b.safetensors", "c.safetensors",
    ]  # fmt: skip
    remove(tmp_path / "again", organ="c", output=tmp_path / "last")
    remove(tmp_path / "last", organ="b", output=tmp_path / "back")
    _assert_same_model(tmp_path / "back", recipient)


def test_nothing_comes_back_for_what_was_inserted(organs: dict[str, Organ], recipient: Path, tmp_path: Path) -> None:
    transplant(organs["c"], recipient, at=2, mode="insert", output=tmp_path / "c")
    transplant(organs["b"], tmp_path / "c", at=3, mode="replace", output=tmp_path / "cb")
    remove(tmp_path / "cb", organ="c", output=tmp_path / "b")
    record = read_record(tmp_path / "b")
    assert record is not None and record.operations[0].explant is None
    assert record.operations[0].replaced == [None, None] and len(record.layers) == LAYERS + 2
    assert not (tmp_path / "b" / "explants").exists()
    load(tmp_path / "b")
    remove(tmp_path / "b", output=tmp_path / "back")
    _assert_same_model(tmp_path / "back", recipient)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
def test_several_at_once_is_one_after_the_other(kind: str, model_directory: Factory, tmp_path: Path) -> None:
    recipient = model_directory(kind, seed=1)
    first, second, third = (
        extract(model_directory(kind, seed=seed), layers=(0, 2), name=f"organ-{seed}") for seed in (3, 4, 5)
    )
    at_once = transplant(
        [third, first, second], recipient, at=[4, 0, 2], mode=["replace", "replace", "insert"],
        output=tmp_path / "at-once", verify="layers",
    )  # fmt: skip
    transplant(third, recipient, at=4, mode="replace", output=tmp_path / "1", verify="layers")
    transplant(second, tmp_path / "1", at=2, mode="insert", output=tmp_path / "2", verify="layers")
    one_by_one = transplant(first, tmp_path / "2", at=0, mode="replace", output=tmp_path / "3", verify="layers")
    assert at_once.tensors_digest == one_by_one.tensors_digest and at_once.layers == one_by_one.layers
    undated = [
        [operation.model_copy(update={"when": ""}) for operation in record.operations]
        for record in (at_once, one_by_one)
    ]
    assert undated[0] == undated[1]
    with graft(load(recipient), [third, first, second], at=[4, 0, 2], mode=["replace", "replace", "insert"]) as model:
        assert torch.equal(logits(model), logits(load(tmp_path / "at-once")))
    present = tmp_path / "at-once"
    for name in ("organ-4", "organ-3", "organ-5"):
        present = Path(remove(present, organ=name, output=tmp_path / f"without-{name}").output)
    _assert_same_model(present, recipient)


def test_one_organ_twice_and_the_order_at_one_position(
    organs: dict[str, Organ], recipient: Path, tmp_path: Path
) -> None:
    given = [organs["b"], organs["a"], organs["b"]]
    record = transplant(given, recipient, at=[3] * 3, mode="insert", output=tmp_path / "out")
    new = [(origin.organ, origin.layer) for origin in record.layers if origin.organ]
    assert new == [("b", 0), ("b", 1), ("a", 0), ("b-2", 0), ("b-2", 1)]
    model = load(recipient)
    before = logits(model)
    with graft(model, given, at=[3] * 3, mode="insert"):
        assert torch.equal(logits(model), logits(load(tmp_path / "out")))
    assert torch.equal(logits(model), before)


def test_a_failure_inside_a_graft_of_several_leaves_nothing(organs: dict[str, Organ], recipient: Path) -> None:
    model = load(recipient)
    before = logits(model)
    with pytest.raises(ZeroDivisionError), graft(model, list(organs.values()), at=[0, 1, 3], mode="replace"):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    with (
        pytest.raises(UsageError, match="position 9 is out of range"),
        graft(model, [organs["a"], organs["b"]], at=[1, 9]),
    ):
        pass
    assert torch.equal(logits(model), before)


COLLISIONS: list[tuple[list[int], Any, str]] = [
    ([1, 2], "replace", r"b replaces layers 1:3 and c replaces layers 2:5 of the same recipient; put c at another "
     r"position \(free for its 3 layers: 3\), or insert c before or behind b \(--mode insert\)\.$"),
    ([2, 3], ["replace", "insert"], r"b replaces layers 2:4 and c is inserted at position 3 of the same recipient; put "
     r"c at another position \(free for its 3 layers: 0 to 2, 4 to 6\)\.$"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "mode", "reason"), COLLISIONS)
def test_collisions_are_refused_with_what_works(
    at: list[int], mode: Any, reason: str, organs: dict[str, Organ], recipient: Path, tmp_path: Path
) -> None:
    given = [organs["b"], organs["c"]]
    with pytest.raises(IncompatibleError, match=reason):
        transplant(given, recipient, at=at, mode=mode, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = load(recipient)
    with pytest.raises(IncompatibleError, match=reason), graft(model, given, at=at, mode=mode):
        pass
    assert torch.equal(logits(model), logits(load(recipient)))


def test_organs_of_the_same_layers_may_be_merged(donor: Path, recipient: Path, tmp_path: Path) -> None:
    given = [extract(donor, layers=(2, 4), name=name) for name in ("legal", "clinical")]
    with pytest.raises(IncompatibleError, match=r"or merge the two into one organ \(neurograft merge\)"):
        transplant(given, recipient, at=[2, 2], output=tmp_path / "out")


def test_as_many_positions_as_organs(organs: dict[str, Organ], recipient: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 positions were given for 3 organs; give one for each, in their order"):
        transplant(list(organs.values()), recipient, at=[1, 2], output=tmp_path / "out")
    for one in (2, [2]):
        with pytest.raises(UsageError, match="1 position was given for 3 organs"):
            transplant(list(organs.values()), recipient, at=one, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no organ was given"):
        transplant([], recipient, output=tmp_path / "out")


def test_a_record_with_one_explant_for_all_is_read(organs: dict[str, Organ], recipient: Path, tmp_path: Path) -> None:
    transplant(organs["b"], recipient, at=1, mode="replace", output=tmp_path / "out")
    text = (tmp_path / "out" / "neurograft.json").read_text()
    assert '"explant_places": []' in text
    old = shutil.copytree(tmp_path / "out", tmp_path / "old")
    (old / "neurograft.json").write_text(text.replace('"explant_places": [],', ""))
    remove(old, output=tmp_path / "back")
    _assert_same_model(tmp_path / "back", recipient)
