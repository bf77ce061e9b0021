"""Tiny llama models as GGUF files.

llama.cpp's own converter is no package, so the llama part of it stands here: the names of the `gguf` package, and the
order of rotary rows that llama.cpp wants.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoConfig


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
