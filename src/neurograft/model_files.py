"""Write a model directory whose layers come from several places: tensors move as bytes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neurograft.anatomy import build_skeleton, describe
from neurograft.checkpoint import Checkpoint
from neurograft.errors import VerificationError
from neurograft.files import (
    require_space,
)
from neurograft.layer_values import changed_values
from neurograft.manifest import (
    RECORD_FILE,
)
from neurograft.models import (
    ModelDirectory,
    load_config,
)
from neurograft.planning import Plan, Step

if TYPE_CHECKING:
    import torch

_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$|^config\.json$|^model\.safetensors\.index\.json$"
)


def planned_tensors(
    checkpoint: Checkpoint, steps: Sequence[Step], organ: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a planned model under the names that they have on disk there.

    Args:
        checkpoint: The recipient.
        steps: Where each layer of the new model comes from.
        organ: `layers.{i}.{name}` -> tensor.
    """
    prefix = checkpoint.layer_prefix
    positions = {step.layer: position for position, step in enumerate(steps) if step.source == "recipient"}
    grown = len(steps) - checkpoint.layer_count
    names: dict[str, str] = {}
    for name in checkpoint.files:
        place = checkpoint.layer_of(name)
        if place is None:
            names[name] = name
        elif (
            place[0] >= checkpoint.layer_count
        ):  # extra blocks behind the decoder layers, such as those that predict further tokens
            names[name] = f"{prefix}{place[0] + grown}.{place[1]}"
        elif place[0] in positions:
            names[name] = f"{prefix}{positions[place[0]]}.{place[1]}"
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors(list(names))}
    for position, step in enumerate(steps):
        if step.source == "organ":
            start = f"layers.{step.layer}."
            tensors.update(
                {f"{prefix}{position}.{n.removeprefix(start)}": t for n, t in organ.items() if n.startswith(start)}
            )
    return tensors


def write_model(checkpoint: Checkpoint, plan: Plan, tensors: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write weights, configuration and the recipient's other files into the folder `target`."""
    config = dict(checkpoint.raw_config)
    values = changed_values(checkpoint.config, list(describe(plan.skeleton).rows))
    config.update(json.loads(json.dumps(values)))
    if "num_hidden_layers" in config:
        config["num_hidden_layers"] = len(plan.steps)
    write_files(checkpoint, tensors, json.dumps(config, indent=2) + "\n", target)
    written = load_config(ModelDirectory(target, target.name))
    if list(describe(build_skeleton(written)).rows) != list(describe(plan.skeleton).rows):
        raise VerificationError(
            f"the configuration written for {target.name} would be read back with other layers than planned."
        )


def write_files(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], config: str, target: Path) -> None:
    """Write tensors, `config.json` word for word, and copies of the checkpoint's other files."""
    from huggingface_hub import save_torch_state_dict

    require_space(target.parent, sum(tensor.nbytes for tensor in tensors.values()))
    (target / "config.json").write_text(config, encoding="utf-8")
    for file in sorted(checkpoint.directory.path.iterdir()):
        if (
            file.is_file()
            and not _NOT_COPIED.search(file.name)
            and not file.name.startswith(".")
            and file.name != RECORD_FILE
        ):
            shutil.copyfile(file, target / file.name)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(contiguous, target, max_shard_size="5GB", metadata={"format": "pt"})
