"""Tiny random models of many architectures, and a tiny tokenizer: what the tests cut and join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from neurograft.files import file_sha256

VOCABULARY = 96
LAYERS = 6
_GROUPED = {"num_key_value_heads": 2}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_BASE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, **_NO_TOKENS}
_WINDOW = {"sliding_window": 8}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# What every release must handle: issue by issue the list grows, it never shrinks.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, **_NO_TOKENS},
    "llama": {**_BASE, **_GROUPED},
    "mistral": {**_BASE, **_GROUPED, **_WINDOW, "head_dim": 8},
    "qwen2": {**_BASE, **_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {**_BASE, **_GROUPED, "head_dim": 8},
    "gemma2": {**_BASE, **_GROUPED, **_WINDOW, "head_dim": 8},
    "gemma3_text": {**_BASE, **_GROUPED, **_WINDOW, "head_dim": 8},
    "phi3": {**_BASE, **_GROUPED, "pad_token_id": 0},
    "gpt_neox": {**_BASE},
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64, **_NO_TOKENS, "pad_token_id": 1,
    },
    "olmo2": {**_BASE, **_GROUPED},
    "starcoder2": {**_BASE, **_GROUPED, **_WINDOW},
    "mixtral": {**_BASE, **_GROUPED, "num_local_experts": 4, "head_dim": 8},
    "qwen3_moe": {**_BASE, **_GROUPED, **_MIXTURE, "head_dim": 8, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "gpt_oss": {
        **_BASE, **_GROUPED, **_WINDOW, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip

# Tried as well: each must work exactly or be refused in one sentence.
FURTHER: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "window_size": 8, **_NO_TOKENS,
        "max_position_embeddings": 64, "attention_types": [[["global", "local"], 3]],
    },
    "gptj": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "rotary_dim": 4, "n_positions": 64, **_NO_TOKENS},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": LAYERS, **_NO_TOKENS},
    "falcon": {**_BASE},
    "phi": {**_BASE},
    "stablelm": {**_BASE, **_GROUPED},
    "granite": {**_BASE, **_GROUPED},
    "gemma": {**_BASE, **_GROUPED, "head_dim": 8},
    "cohere": {**_BASE, **_GROUPED},
    "cohere2": {**_BASE, **_GROUPED, **_WINDOW},
    "olmo3": {**_BASE, **_GROUPED, **_WINDOW},
    "smollm3": {**_BASE, **_GROUPED},
    "exaone4": {**_BASE, **_GROUPED, **_WINDOW},
    "qwen2_moe": {**_BASE, **_GROUPED, **_MIXTURE, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "deepseek_v3": {
        **_BASE, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 2,
        "n_group": 1, "topk_group": 1,
    },
    "llama4_text": {
        **_BASE, **_GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64},
    "codegen": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "rotary_dim": 4, "n_positions": 64, **_NO_TOKENS},
    "gpt_bigcode": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, **_NO_TOKENS},
    "glm4": {**_BASE, **_GROUPED, "head_dim": 8, "pad_token_id": 0},
    "nemotron": {**_BASE, **_GROUPED},
    "minicpm3": {**_BASE, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "diffllama": {**_BASE, **_GROUPED},
    "gemma3n_text": {
        **_BASE, **_GROUPED, **_WINDOW, "head_dim": 8, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "lfm2": {**_BASE, **_GROUPED, "full_attn_idxs": [2, 4]},
    "jamba": {**_BASE, **_GROUPED, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bamba": {**_BASE, **_GROUPED, "attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "gpt_neox_japanese": {**_BASE, "intermediate_multiple_size": 2},
    "modernbert-decoder": {**_BASE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 0, "local_attention": 8},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "time_step_rank": 4, **_NO_TOKENS},
    "recurrent_gemma": {**_BASE, "num_attention_heads": 4, "lru_width": 32, "attention_window_size": 8},
    "nemotron_h": {**_BASE, **_GROUPED, "head_dim": 8, "hybrid_override_pattern": "M-M*-M", "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
    "qwen3_next": {
        **_BASE, **_GROUPED, **_MIXTURE, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "glm4_moe": {
        **_BASE, **_GROUPED, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "ernie4_5_moe": {**_BASE, **_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "xglm": {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 64, "attention_heads": 4, "num_layers": LAYERS, "max_position_embeddings": 64},
}  # fmt: skip


def make_config(kind: str, **changes: Any) -> Any:
    """Return a tiny configuration; `layers` changes the number of layers, whatever it is called."""
    values = {**{**CONFIGS, **FURTHER}.get(kind, _BASE), **changes}
    own_name = next((name for name in ("n_layer", "n_layers", "num_layers") if name in values), "num_hidden_layers")
    values[own_name] = values.pop("layers", values.get(own_name, LAYERS))
    return AutoConfig.for_model(kind, **values)


def make_model(kind: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode; its parameters are all different from zero and one."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(kind, **changes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def save_model(folder: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model, with a tokenizer, as a model directory."""
    make_model(kind, seed=seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(
    letters: str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?'-()%/*=\n\t",
) -> Any:
    """Return a tokenizer with a token for each letter, an unknown token and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<eos>": 1, **{letter: number + 2 for number, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def token_ids(length: int = 20) -> torch.Tensor:
    """Return (1, T) token ids without a pattern."""
    return (torch.arange(length)[None] * 37 + 11) % (VOCABULARY - 4) + 2


def logits(model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
    """Return a model's logits, (1, T, vocabulary), on `token_ids`."""
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=token_ids(), **arguments).logits
    return output


def load(folder: Path) -> PreTrainedModel:
    """Load a model directory with plain transformers, as any user would."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def generate(model: Any, **arguments: Any) -> list[int]:
    """Return twelve greedily generated tokens."""
    start = token_ids(8)
    tokens = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **arguments,
    )
    return [int(token) for token in tokens[0, 8:]]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of the last change of every file."""
    return {path.name: (file_sha256(path), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}
