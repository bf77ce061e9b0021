"""Removal: exact, in any order, and refused where the original can not come back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Factory
from neurograft import extract, remove, transplant
from neurograft.errors import ModelError, NeurograftError, UsageError, VerificationError
from neurograft.organ import Organ
from tiny import load, logits

Listing = Callable[[], list[str]]
Patch = pytest.MonkeyPatch


@pytest.fixture
def twice(organ: Organ, model_directory: Factory, recipient: Path, tmp_path: Path) -> Path:
    """A recipient with two organs: `tiny` replaces layers 1 and 2, `second` stands before them."""
    second = extract(model_directory("llama", seed=3), layers=(0, 1), name="second")
    transplant(organ, recipient, at=1, mode="replace", output=tmp_path / "one")
    transplant(second, tmp_path / "one", at=0, mode="insert", output=tmp_path / "two")
    return tmp_path / "two"


@pytest.mark.parametrize("order", [("tiny", "second"), ("second", "tiny")])
def test_two_organs_leave_in_any_order(order: tuple[str, str], twice: Path, recipient: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"several organs \(tiny, second\)"):
        remove(twice, output=tmp_path / "x")
    first = remove(twice, organ=order[0], output=tmp_path / "first")
    assert not first.original_restored and first.organs_left == [order[1]]
    load(tmp_path / "first")
    last = remove(tmp_path / "first", output=tmp_path / "last")
    assert last.original_restored
    assert torch.equal(logits(load(tmp_path / "last")), logits(load(recipient)))
    assert (tmp_path / "last" / "config.json").read_bytes() == (recipient / "config.json").read_bytes()
    assert not (tmp_path / "last" / "neurograft.json").exists()


def test_an_organ_over_another_is_removed_before_it(twice: Path, organ: Organ, tmp_path: Path) -> None:
    transplant(organ, twice, at=2, mode="replace", output=tmp_path / "three")
    remove(tmp_path / "three", organ="tiny-2", output=tmp_path / "back")
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(twice)))


def test_unknown_organ(twice: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no organ named 'third'; it holds tiny, second"):
        remove(twice, organ="third", output=tmp_path / "x")


def test_a_model_without_organs(recipient: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no neurograft\.json"):
        remove(recipient, output=tmp_path / "x")


@pytest.mark.parametrize("name", ["model.layers.5.mlp.up_proj.weight", "model.norm.weight"])
def test_a_model_that_was_changed_since_is_not_called_the_original(
    name: str, organ: Organ, recipient: Path, tmp_path: Path
) -> None:
    transplant(organ, recipient, at=1, mode="replace", output=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[name][0] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="nothing was written"):
        remove(tmp_path / "out", output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_altered_explant_is_refused(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    transplant(organ, recipient, at=1, mode="replace", output=tmp_path / "out")
    explant = tmp_path / "out" / "explants" / "tiny.safetensors"
    content = bytearray(explant.read_bytes())
    content[-1] ^= 1
    explant.write_bytes(content)
    with pytest.raises(NeurograftError, match="altered or damaged"):
        remove(tmp_path / "out", output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 3}', '{"schema_version": "x"}']
)
def test_a_broken_record(content: str, recipient: Path, tmp_path: Path) -> None:
    shutil.copytree(recipient, tmp_path / "model")
    (tmp_path / "model" / "neurograft.json").write_text(content)
    with pytest.raises(ModelError, match=r"neurograft\.json"):
        remove(tmp_path / "model", output=tmp_path / "x")
