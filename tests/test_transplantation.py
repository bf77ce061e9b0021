"""Transplants on disk: the recipient is never touched, the result is whole or absent."""

from __future__ import annotations

import dataclasses
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
from neurograft.errors import ModelError, NeurograftError, UsageError, VerificationError
from neurograft.files import file_sha256
from neurograft.organ import Organ, read_organ
from neurograft.record import read_record
from tiny import LAYERS, contents, load, logits, make_model

Listing = Callable[[], list[str]]
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("mode", ["replace", "insert"])
def test_the_recipient_is_not_touched(mode: Any, organ_file: Path, recipient: Path, tmp_path: Path) -> None:
    before, organ_before = contents(recipient), file_sha256(organ_file)
    transplant(organ_file, recipient, at=1, mode=mode, output=tmp_path / "out")
    grafted = contents(tmp_path / "out")
    remove(tmp_path / "out", output=tmp_path / "back")
    assert contents(recipient) == before and file_sha256(organ_file) == organ_before
    assert contents(tmp_path / "out") == grafted


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


def test_others_may_read_what_is_written_as_far_as_the_user_says(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    (tmp_path / "sample").touch()
    organ.save(tmp_path / "organ.safetensors")
    transplant(organ, recipient, output=tmp_path / "out", at=2, mode="replace")
    for path in (tmp_path / "organ.safetensors", *(tmp_path / "out").rglob("*.*")):
        assert path.stat().st_mode == (tmp_path / "sample").stat().st_mode, path.name


def test_a_directory_without_tokenizer(organ: Organ, tmp_path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path / "bare")
    bare = extract(tmp_path / "bare", layers="auto")
    assert bare.manifest.tokenizer is None and bare.manifest.source.layer_start == 2
    transplant(bare, tmp_path / "bare", at=0, mode="insert", output=tmp_path / "out")
    assert remove(tmp_path / "out", output=tmp_path / "back").original_restored


def test_a_recipient_whose_cache_transformers_can_not_use(model_directory: Factory, tmp_path: Path) -> None:
    mamba = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
    model = model_directory(
        "granitemoehybrid", layer_types=["mamba"] * LAYERS, num_local_experts=0, shared_intermediate_size=32, **mamba
    )
    with pytest.raises(ModelError, match="can't generate with the cache of this granitemoehybrid model"):
        transplant(extract(model, layers=(1, 2)), model, at=1, mode="replace", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_nan_names_the_tensor_and_the_file(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    model = load(recipient)
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.up_proj.weight")[0, :2] = float("nan")
    model.save_pretrained(tmp_path / "model")
    reason = r"model\.safetensors: the tensor model\.layers\.3\.mlp\.up_proj\.weight of model has 2 values that are NaN"
    with pytest.raises(ModelError, match=reason):
        transplant(organ, tmp_path / "model", at=1, mode="insert", output=tmp_path / "out")
    with pytest.raises(ModelError, match=reason):
        extract(tmp_path / "model", layers=(0, 1))


def test_the_record(organ_file: Path, recipient: Path, tmp_path: Path) -> None:
    record = transplant(organ_file, recipient, at=1, mode="replace", output=tmp_path / "out")
    assert read_record(tmp_path / "out") == record
    assert [layer.organ for layer in record.layers] == [None, "tiny", "tiny", None, None, None]
    operation = record.operations[0]
    assert operation.organ_file_digest == read_organ(organ_file).manifest.file_digest
    explant = read_organ(tmp_path / "out" / str(operation.explant))
    assert explant.manifest.kind == "explant"
    kept = [layer.digest for layer in operation.explant_origins if layer is not None]
    assert [explant.layer_digest(layer) for layer in (0, 1)] == kept
    assert record.original_config == (recipient / "config.json").read_text()


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
    "where",
    ["neurograft.byte_moves._run", "neurograft.files.fsync", "neurograft.transplantation.make_record"],
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
    before = contents(recipient)
    with pytest.raises(error) as caught:
        transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    assert listing() == [] and contents(recipient) == before
    if failure is _full:
        assert "the disk is full" in str(caught.value)


def test_a_failed_overwrite_keeps_what_was_there(
    organ: Organ, recipient: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr("neurograft.transplantation.make_record", _full)
    with pytest.raises(NeurograftError, match="the disk is full"):
        transplant(organ, recipient, at=1, mode="insert", output=tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
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
    from neurograft.model_files import plan_files

    def swapped(*args: Any) -> list[Any]:
        files = plan_files(*args)
        pieces = dict(files[0].pieces)
        a, b = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"
        pieces[a], pieces[b] = pieces[b], pieces[a]
        return [dataclasses.replace(files[0], pieces=pieces)]

    monkeypatch.setattr("neurograft.transplantation.plan_files", swapped)
    with pytest.raises(VerificationError, match="the recipient's layer 0 would compute something else at position 0"):
        transplant(organ, recipient, at=4, mode="insert", output=tmp_path / "out")
    assert listing() == []
