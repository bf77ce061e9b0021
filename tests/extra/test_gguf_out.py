"""The way out to llama.cpp: a transplanted directory as a GGUF file holds the same numbers and gives the same logits.

llama.cpp's own converter is no package, so the llama part of it stands here: the names of the `gguf` package, and the
order of rotary rows that llama.cpp wants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from neurograft import extract, transplant
from neurograft.files import file_sha256
from neurograft.organ import Organ
from tiny import load, logits


def _rotary_order(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a query or key projection as llama.cpp does: pairs next to each other, not halves."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def token_texts(size: int) -> list[str]:
    """Return the tokens of a vocabulary of single letters, one pair and numbers."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + number) for number in range(26)), "ab"]
    return tokens + [f"<{number}>" for number in range(size - len(tokens))]


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(token_texts(size))
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def convert(folder: Path, target: Path, *, packed: bool = False) -> dict[str, torch.Tensor]:
    """Write a directory as a GGUF file; with `packed`, matrices of layers as 8-bit blocks."""
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    written = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        key = names.get_name(name, try_suffixes=(".weight",)) or ""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        written[key] = tensor if heads is None else _rotary_order(tensor, heads)
        data = written[key].contiguous().numpy()
        if packed and ".layers." in name and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


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
