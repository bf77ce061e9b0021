"""Transplants and removals on disk: the recipient is never touched, the result is whole or absent, the way back is
exact."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import Factory
from neurograft import extract, remove, transplant
from neurograft.checkpoint import open_checkpoint
from neurograft.disk import parse_layers, read_record
from neurograft.errors import ModelError, NeurograftError, UsageError, VerificationError
from neurograft.files import file_sha256
from neurograft.models import resolve
from neurograft.organ import Organ, read_organ
from tiny import LAYERS, load, logits, make_model, save_model

Listing = Callable[[], list[str]]
Patch = pytest.MonkeyPatch


def _contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of the last change of every file."""
    return {path.name: (file_sha256(path), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10:13", range(10, 13)),
        (" 0 : 30 ", range(30)),
        ("auto", range(10, 13)),
        (range(2, 4), range(2, 4)),
        ((0, 1), range(1)),
    ],
)
def test_layer_ranges(text: Any, expected: range) -> None:
    assert parse_layers(text, 30) == expected


@pytest.mark.parametrize(("layers", "start"), [(12, 4), (6, 2), (4, 1), (3, 0), (2, 0), (1, 0)])
def test_auto_is_three_layers_from_a_third(layers: int, start: int) -> None:
    assert parse_layers("auto", layers) == range(start, min(start + 3, layers))


@pytest.mark.parametrize("text", ["3", "5:5", "6:4", "4:31", "-1:3", "a:b", "", "1:2:3", (3, 31)])
def test_wrong_layer_ranges_are_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="the layer range"):
        parse_layers(text, 30)


@pytest.mark.parametrize("mode", ["replace", "insert"])
def test_the_recipient_is_not_touched(mode: Any, organ_file: Path, recipient: Path, tmp_path: Path) -> None:
    before, organ_before = _contents(recipient), file_sha256(organ_file)
    transplant(organ_file, recipient, at=1, mode=mode, output=tmp_path / "out")
    grafted = _contents(tmp_path / "out")
    remove(tmp_path / "out", output=tmp_path / "back")
    assert _contents(recipient) == before and file_sha256(organ_file) == organ_before
    assert _contents(tmp_path / "out") == grafted


def test_sharded_recipient(organ: Organ, tmp_path: Path) -> None:
    model = make_model("llama", seed=1)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "whole")
    for name in ("sharded", "whole"):
        record = transplant(organ, tmp_path / name, at=2, mode="insert", output=tmp_path / f"{name}-out")
        assert (
            remove(tmp_path / f"{name}-out", output=tmp_path / f"{name}-back").tensors_digest
            == record.original_tensors_digest
        )
    assert torch.equal(logits(load(tmp_path / "sharded-out")), logits(load(tmp_path / "whole-out")))


def test_tied_embeddings(model_directory: Factory, tmp_path: Path) -> None:
    recipient = model_directory("llama", seed=1, tie_word_embeddings=True)
    organ = extract(model_directory("llama", seed=0, tie_word_embeddings=True), layers=(0, 2))
    transplant(organ, recipient, at=3, mode="insert", output=tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as stream:
        assert "lm_head.weight" not in set(stream.keys())
    remove(tmp_path / "out", output=tmp_path / "back")
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(recipient)))


def test_files_with_mixed_dtypes_come_back_to_the_bit(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    shutil.copytree(recipient, tmp_path / "mixed")
    tensors = load_file(recipient / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    transplant(organ, tmp_path / "mixed", at=2, mode="replace", output=tmp_path / "out")
    grafted = load_file(tmp_path / "out" / "model.safetensors")
    assert grafted["model.layers.2.input_layernorm.weight"].dtype == torch.float32
    assert grafted["model.layers.2.mlp.up_proj.weight"].dtype == torch.bfloat16
    remove(tmp_path / "out", output=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == mixed.keys() and all(torch.equal(back[name], mixed[name]) for name in mixed)
    assert all(back[name].dtype == mixed[name].dtype for name in mixed)


def test_blocks_behind_the_layers_move_with_the_count(recipient: Path, organ: Organ, tmp_path: Path) -> None:
    shutil.copytree(recipient, tmp_path / "extra")
    tensors = load_file(recipient / "model.safetensors")
    name = f"model.layers.{LAYERS}.predictor.weight"
    save_file({**tensors, name: torch.ones(2)}, tmp_path / "extra" / "model.safetensors", metadata={"format": "pt"})
    transplant(organ, tmp_path / "extra", at=0, mode="insert", output=tmp_path / "out")
    assert f"model.layers.{LAYERS + 2}.predictor.weight" in load_file(tmp_path / "out" / "model.safetensors")
    remove(tmp_path / "out", output=tmp_path / "back")
    assert name in load_file(tmp_path / "back" / "model.safetensors")


def test_other_files_come_along(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    shutil.copytree(recipient, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"old weights")
    transplant(organ, tmp_path / "model", at=0, mode="insert", output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "config.json", "neurograft.json"} <= names
    assert "pytorch_model.bin" not in names


def test_a_directory_without_tokenizer(organ: Organ, tmp_path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path / "bare")
    bare = extract(tmp_path / "bare", layers="auto")
    assert bare.manifest.tokenizer is None and bare.manifest.source.layer_start == 2
    transplant(bare, tmp_path / "bare", at=0, mode="insert", output=tmp_path / "out")
    assert remove(tmp_path / "out", output=tmp_path / "back").original_restored


def test_manifest_names_no_path_and_knows_its_source(donor: Path, organ: Organ) -> None:
    assert str(donor.parent) not in organ.manifest.model_dump_json()
    checkpoint = open_checkpoint(resolve(donor))
    assert organ.manifest.source.layer_digests == [checkpoint.layer_digest(layer) for layer in (2, 3)]
    assert organ.manifest.source.layer_digests == [organ.layer_digest(layer) for layer in (0, 1)]


def test_the_record(organ_file: Path, recipient: Path, tmp_path: Path) -> None:
    record = transplant(organ_file, recipient, at=1, mode="replace", output=tmp_path / "out")
    assert read_record(tmp_path / "out") == record
    assert [layer.organ for layer in record.layers] == [None, "tiny", "tiny", None, None, None]
    operation = record.operations[0]
    assert operation.organ_file_digest == read_organ(organ_file).manifest.file_digest
    explant = read_organ(tmp_path / "out" / str(operation.explant))
    assert explant.manifest.kind == "explant"
    assert [explant.layer_digest(layer) for layer in (0, 1)] == [layer.digest for layer in operation.explant_origins]
    assert record.original_config == (recipient / "config.json").read_text()


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


def test_an_organ_under_another_is_removed_after_it(twice: Path, organ: Organ, tmp_path: Path) -> None:
    transplant(organ, twice, at=2, mode="replace", output=tmp_path / "three")
    with pytest.raises(UsageError, match="the organ tiny-2 replaced layers of tiny; remove tiny-2 first"):
        remove(tmp_path / "three", organ="tiny", output=tmp_path / "x")
    remove(tmp_path / "three", organ="tiny-2", output=tmp_path / "back")
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(twice)))


def test_unknown_organ(twice: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no organ named third; it holds tiny, second"):
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
    "content", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 2}', '{"schema_version": "x"}']
)
def test_a_broken_record(content: str, recipient: Path, tmp_path: Path) -> None:
    shutil.copytree(recipient, tmp_path / "model")
    (tmp_path / "model" / "neurograft.json").write_text(content)
    with pytest.raises(ModelError, match=r"neurograft\.json"):
        remove(tmp_path / "model", output=tmp_path / "x")


def test_outputs_that_must_not_be_written(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    shutil.copytree(recipient, tmp_path / "model")
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    cases: list[tuple[Path, bool, str]] = [
        (tmp_path / "model", True, "overlaps the input"),
        (tmp_path / "model" / "inside", False, "overlaps the input"),
        (tmp_path, True, "overlaps the input"),
        (tmp_path / "file", False, "is a file"),
        (tmp_path / "photos", False, "exists already"),
        (tmp_path / "photos", True, "is no model directory"),
        (tmp_path / "nowhere" / "out", False, "does not exist"),
    ]
    for output, overwrite, reason in cases:
        with pytest.raises(UsageError, match=reason):
            transplant(organ, tmp_path / "model", at=0, mode="insert", output=output, overwrite=overwrite)
    assert (tmp_path / "photos" / "me.jpg").exists()


def test_overwrite_replaces_the_whole_directory(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    (tmp_path / "out" / "stray.txt").touch()
    with pytest.raises(UsageError, match="exists already; choose another name or pass --overwrite"):
        transplant(organ, recipient, at=1, mode="insert", output=tmp_path / "out")
    transplant(organ, recipient, at=1, mode="insert", output=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stray.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where", ["huggingface_hub.save_torch_state_dict", "neurograft.files.fsync", "neurograft.disk._make_record"]
)
@pytest.mark.parametrize(("failure", "error"), [(_full, NeurograftError), (_interrupted, KeyboardInterrupt)])
def test_a_full_disk_and_ctrl_c_leave_nothing(
    where: str,
    failure: Any,
    error: type[BaseException],
    organ: Organ,
    recipient: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    listing: Listing,
) -> None:
    monkeypatch.setattr(where, failure)
    before = _contents(recipient)
    with pytest.raises(error) as caught:
        transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    assert listing() == [] and _contents(recipient) == before
    if failure is _full:
        assert "the disk is full" in str(caught.value)


def test_a_failed_overwrite_keeps_what_was_there(
    organ: Organ, recipient: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    before = _contents(tmp_path / "out")
    monkeypatch.setattr("neurograft.disk._make_record", _full)
    with pytest.raises(NeurograftError, match="the disk is full"):
        transplant(organ, recipient, at=1, mode="insert", output=tmp_path / "out", overwrite=True)
    assert _contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_too_little_room_is_said_before_anything_is_written(
    organ: Organ, recipient: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(NeurograftError, match="has 10 B free and"):
        transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_that_computes_something_else_is_not_kept(
    organ: Organ, recipient: Path, tmp_path: Path, monkeypatch: Patch, listing: Listing
) -> None:
    from neurograft import disk

    original = disk.planned_tensors

    def swapped(*args: Any) -> dict[str, torch.Tensor]:
        tensors = original(*args)
        a, b = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return tensors

    monkeypatch.setattr(disk, "planned_tensors", swapped)
    with pytest.raises(VerificationError, match="the recipient's layer 0 would compute something else at position 0"):
        transplant(organ, recipient, at=4, mode="insert", output=tmp_path / "out")
    assert listing() == []


def test_extracting_writes_only_the_organ(donor: Path, tmp_path: Path) -> None:
    before = _contents(donor)
    extract(
        donor,
        layers="0:2",
        output=tmp_path / "organ.safetensors",
        name="my organ!",
        license="MIT",
        description="two layers",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["organ.safetensors"]
    assert _contents(donor) == before
    manifest = read_organ(tmp_path / "organ.safetensors").manifest
    assert (manifest.name, manifest.license, manifest.description) == ("my-organ", "MIT", "two layers")


def test_old_spellings_of_tensor_names_are_understood(tmp_path: Path) -> None:
    save_model(tmp_path / "new", "mixtral")
    shutil.copytree(tmp_path / "new", tmp_path / "prefixed")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(
        bare | {"lm_head.weight": tensors["lm_head.weight"]},
        tmp_path / "prefixed" / "model.safetensors",
        metadata={"format": "pt"},
    )
    organs = [extract(tmp_path / name, layers=(1, 3)) for name in ("new", "prefixed")]
    assert organs[0].tensors.keys() == organs[1].tensors.keys()
    assert organs[0].manifest.source.layer_digests == organs[1].manifest.source.layer_digests
