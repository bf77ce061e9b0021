"""The way out to llama.cpp: a transplanted directory as a GGUF file holds the same numbers and gives the same logits.

llama.cpp's own converter is no package, so the llama part of it stands here: the names of the `gguf` package, and the
order of rotary rows that llama.cpp wants.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from neurograft import extract, transplant
from neurograft.organ import Organ
from tiny import load, logits


def _rotary_order(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a query or key projection as llama.cpp does: pairs next to each other, not halves."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _convert(folder: Path, target: Path) -> dict[str, torch.Tensor]:
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    written = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        key = names.get_name(name, try_suffixes=(".weight",)) or ""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        written[key] = tensor if heads is None else _rotary_order(tensor, heads)
        writer.add_tensor(key, written[key].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_a_transplanted_model_as_gguf(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    transplant(organ, recipient, at=3, mode="insert", output=tmp_path / "out")
    expected = _convert(tmp_path / "out", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["llama.block_count"].contents() == 8
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name].data, tensor.numpy()), name
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", attn_implementation="eager").eval()
    assert torch.equal(logits(back), logits(load(tmp_path / "out")))


def test_layers_of_a_gguf_file_say_that_they_were_dequantised(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    from neurograft.models import _packing_of

    _convert(recipient, tmp_path / "plain.gguf")
    assert _packing_of(tmp_path / "plain.gguf") == "GGUF F32"
    assert extract(recipient, layers="0:1").manifest.source.dequantised_from is None
