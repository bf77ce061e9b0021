"""The way out to llama.cpp: a transplanted directory as GGUF holds the same numbers and gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gguf_writer import convert
from neurograft import extract, transplant
from neurograft.files import file_sha256
from neurograft.organ import Organ
from tiny import load, logits


def test_a_transplanted_model_as_gguf(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    transplant(organ, recipient, at=3, mode="insert", output=tmp_path / "out")
    expected = convert(tmp_path / "out", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["llama.block_count"].contents() == 8
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name].data, tensor.numpy()), name
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", attn_implementation="eager").eval()
    assert torch.equal(logits(back), logits(load(tmp_path / "out")))


def test_only_the_wanted_layers_of_a_gguf_file_are_dequantised(
    recipient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "cache"))
    convert(recipient, tmp_path / "packed.gguf", packed=True)
    read: list[str] = []
    dequantize = gguf.dequantize

    def note(data: Any, kind: Any) -> Any:
        read.append(kind.name)
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", note)
    organ = extract(tmp_path / "packed.gguf", layers="2:4", verify="bytes")
    assert read.count("Q8_0") == 2 * 7 and read.count("F32") == 2 * 2
    source = organ.manifest.source
    assert source.dequantised_from == "GGUF F32, Q8_0"
    assert (source.model, source.revision) == ("packed", file_sha256(tmp_path / "packed.gguf"))
    assert organ.manifest.anatomy.dtype == "float32" and organ.manifest.probe is None
    assert list((tmp_path / "cache").glob("gguf*")) == []
    whole = extract(tmp_path / "packed.gguf", layers="2:4", verify="layers")
    assert whole.manifest.source == source and whole.manifest.tokenizer == organ.manifest.tokenizer
    assert whole.manifest.anatomy == organ.manifest.anatomy
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1
    rounded = load(recipient).get_parameter("model.layers.2.mlp.up_proj.weight")
    error = (organ.tensors["layers.0.mlp.up_proj.weight"] - rounded).abs().max() / rounded.abs().max()
    assert 0 < error < 0.01


def test_a_plain_model_was_dequantised_from_nothing(recipient: Path) -> None:
    assert extract(recipient, layers="0:1").manifest.source.dequantised_from is None
