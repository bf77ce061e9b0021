"""What names a model and what does not: each wrong reference gets one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurograft.checkpoint import open_checkpoint
from neurograft.errors import ModelError, UsageError
from neurograft.models import cache_directory, load_model, load_tokenizer, resolve
from tiny import make_model


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copy(recipient: Path, tmp_path: Path) -> Path:
    shutil.copytree(recipient, tmp_path / "model")
    return tmp_path / "model"


def test_references_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"not gguf")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "nowhere", "there is no model at"),
        (tmp_path / "nowhere.gguf", "there is no file"),
        (tmp_path / "fake.gguf", "does not begin like a GGUF file"),
        (tmp_path / "notes.txt", "is a file; a model is a transformers directory"),
        (tmp_path / "empty", "has no config.json"),
        ("some-org/some-model", "the Hub did not give it"),
    ]
    for reference, reason in cases:
        with pytest.raises(ModelError, match=reason) as caught:
            resolve(reference)
        assert str(reference) in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT adapter"):
        resolve(tmp_path)


def test_broken_configurations(copy: Path) -> None:
    for content, reason in [
        ("{", "can't be read as JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "elephant"}', "elephant"),
    ]:
        (copy / "config.json").write_text(content)
        with pytest.raises(ModelError, match=reason):
            load_model(copy)


def test_remote_code_is_never_run_unasked(copy: Path) -> None:
    (copy / "modeling_own.py").write_text("raise SystemExit('remote code was run')")
    _edit_config(
        copy, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Own"}
    )
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(copy)


def test_pickled_weights_are_never_loaded(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="only pickled weights"):
        open_checkpoint(resolve(copy))
    with pytest.raises(ModelError, match="model"):
        load_model(copy)


def test_quantisation_by_layer_numbers_is_refused(copy: Path) -> None:
    _edit_config(copy, quantization_config={"quant_method": "gptq", "dynamic": {"model.layers.3.mlp.up_proj": {}}})
    with pytest.raises(ModelError, match=r"quantised layer by layer \(its quantization_config names model\.layers\.3"):
        open_checkpoint(resolve(copy))


def test_missing_tensors_are_said(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing tensors, such as model\.layers\.3\.mlp\.up_proj\.weight"):
        load_model(copy)


def test_a_whole_layer_missing(copy: Path) -> None:
    tensors = {name: t for name, t in load_file(copy / "model.safetensors").items() if ".layers.3." not in name}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no complete sets were found"):
        _ = open_checkpoint(resolve(copy)).layer_prefix


def test_shards(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40kB")
    shard = next((tmp_path / "sharded").glob("model-*.safetensors"))
    shard.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"names the shard {shard.name}, which is not there"):
        open_checkpoint(resolve(tmp_path / "sharded"))
    shard.write_bytes((tmp_path / "moved").read_bytes()[:100])
    with pytest.raises(ModelError, match="can't be read as a safetensors file"):
        open_checkpoint(resolve(tmp_path / "sharded"))


def test_a_shard_index_may_not_lead_elsewhere(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="names the shard"):
        open_checkpoint(resolve(copy))


def test_tokenizers(copy: Path, tmp_path: Path) -> None:
    assert load_tokenizer(copy).eos_token == "<eos>"
    make_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="has no tokenizer, and text is to be read"):
        load_tokenizer(tmp_path / "bare")


def test_names_that_travel_hold_no_path(copy: Path) -> None:
    assert resolve(copy).name == "model"


def test_a_cache_that_can_be_no_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("NEUROGRAFT_CACHE", str(place))
        with pytest.raises(UsageError, match="file is a file; set NEUROGRAFT_CACHE to a folder"):
            cache_directory()
