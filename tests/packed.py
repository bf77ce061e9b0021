"""Tiny models in packed forms as they lie on disk: MXFP4 of GPT-OSS, and methods that nothing here can unpack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tiny import make_model, make_tokenizer

MXFP4: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def save_gpt_oss(folder: Path, *, seed: int, layers: int = 6) -> Path:
    """Write a tiny GPT-OSS as its makers do: packed experts, plain attention with sinks, several shards, an index."""
    model: Any = make_model("gpt_oss", seed=seed, layers=layers)
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 122, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = tensor
    return _write(folder, tensors, MXFP4)


def save_opaque(folder: Path, method: str, *, seed: int) -> Path:
    """Write a tiny llama whose matrices are packed in the way of a method, with bytes that stand for nothing."""
    model: Any = make_model("llama", seed=seed)
    model.to(torch.float16)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        noise = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
        stem = name.removesuffix(".weight")
        if method == "gptq":
            tensors[f"{stem}.qweight"] = noise.view(torch.int32).clone()
            tensors[f"{stem}.g_idx"] = torch.arange(columns, dtype=torch.int32)
            tensors[f"{stem}.scales"] = torch.ones(1, rows, dtype=torch.float16)
        elif method == "fp8":
            tensors[name] = noise.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            tensors[name] = noise.reshape(-1, 1)[: rows * columns // 2].clone()
            tensors[f"{name}.absmax"] = torch.ones(rows * columns // 64)
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.arange(9, dtype=torch.uint8)
    return _write(folder, tensors, {"quant_method": method, "bits": 4})


def _write(folder: Path, tensors: dict[str, torch.Tensor], packing: dict[str, Any]) -> Path:
    """Write tensors in three shards, of which none ends with a layer, an index, a configuration and a tokenizer."""
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for number in range(3):
        part = names[number * len(names) // 3 : (number + 1) * len(names) // 3]
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": packing}))
    make_tokenizer().save_pretrained(folder)
    return folder
