"""What each of several processes does in `test_distributed.py`: it trains, is interrupted, and goes on.

Started as `torchrun --nproc-per-node 2 together.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from neurograft import ranks, recover, train
from neurograft.errors import UsageError
from neurograft.files import tensors_digest
from neurograft.models import load_model, load_tokenizer
from neurograft.sharding import is_sharded, whole
from neurograft.training.loop import Batches, Texts, Trainee, TrainingProgress, TrainingRun
from neurograft.training.options import parse_options
from neurograft.training.processes import Processes

OPTIONS: dict[str, Any] = {
    "epochs": 3, "sequence_length": 16, "batch_size": 5, "accumulate": 2, "evaluations": 3, "patience": 9,
    "cache_prefix": "always", "precision": "float32", "lr": 1e-3,
}  # fmt: skip
RECOVERY: dict[str, Any] = {
    "scope": "neighbours", "unfreeze": "gradual", "steps": 7, "sequence_length": 16, "batch_size": 5, "evaluations": 2,
    "precision": "float32", "lr": 1e-3, "cache_prefix": "always",
}  # fmt: skip
KINDS = ("llama", "gpt2", "qwen3_moe")


def main(folder: Path) -> None:
    """Do everything; write `found.json`."""
    processes = Processes()
    found: dict[str, Any] = {"count": processes.count}
    for kind in KINDS:
        found[kind] = _train(folder, kind, f"{kind}.safetensors")
    found["recomputed"] = _train(folder, "llama", "recomputed.safetensors", gradient_checkpointing=True)
    found["insert"] = _train(folder, "llama", "insert.safetensors", protocol="insert", cache_prefix="never")
    found["half"] = _train(folder, "half", "half.safetensors", host_precision="stored")
    found["dropout"] = _train(folder, "dropout", "dropout.safetensors")
    found["interrupted"] = _interrupted(folder, "again.safetensors")
    found["gone_on"] = _train(folder, "dropout", "again.safetensors")
    found["interrupted_again"] = _interrupted(folder, "later.safetensors")  # left for one process to go on from
    found["recovered"] = _recover(folder, "recovered")
    found["recovery_interrupted"] = _interrupt_recovery(folder, "recovered-again")
    found["recovery_gone_on"] = _recover(folder, "recovered-again")
    found["early"] = _train(
        folder, "llama", "early.safetensors", eval_data=folder / "other.txt", steps=60, epochs=None, evaluations=30,
        patience=1,
    )  # fmt: skip
    found["errors"] = _errors(processes, folder)
    found["inside"] = _inside(folder, processes)
    everywhere: list[Any] = [None] * processes.count
    torch.distributed.all_gather_object(everywhere, found)
    if processes.first:
        (folder / "found.json").write_text(json.dumps(everywhere))
    ranks.leave(0)


def _train(folder: Path, kind: str, output: str, progress: Any = None, **changes: Any) -> dict[str, Any]:
    losses: list[float] = []
    options = {**OPTIONS, **changes}
    eval_data = options.pop("eval_data", folder / "held-out.jsonl")
    organ = train(
        folder / f"{kind}-organ.safetensors", host=folder / kind, data=folder / "text.jsonl", eval_data=eval_data,
        output=folder / output, progress=progress or (lambda p: losses.append(p.loss)), **options,
    )  # fmt: skip
    training = organ.manifest.training
    assert training is not None
    return {
        "losses": losses, "digest": tensors_digest(organ.tensors), "file_digest": organ.manifest.file_digest,
        "steps": training.steps, "tokens": training.tokens_seen, "after": organ.manifest.evaluations[0].after,
    }  # fmt: skip


def _interrupted(folder: Path, output: str) -> str:
    """Interrupt one process at its third step; all must end there, with the state saved."""

    def interrupt(progress: TrainingProgress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        _train(folder, "dropout", output, interrupt)
    except KeyboardInterrupt as error:
        return str(error)
    return "not interrupted"


def _recover(folder: Path, output: str, progress: Any = None) -> dict[str, Any]:
    losses: list[float] = []
    record = recover(
        folder / "transplanted", data=folder / "text.jsonl", eval_data=folder / "held-out.jsonl",
        general=folder / "general.jsonl", output=folder / output, save_organ=folder / f"{output}.safetensors",
        progress=progress or (lambda p: losses.append(p.loss)), **RECOVERY,
    )  # fmt: skip
    done = record.recoveries[-1]
    return {
        "losses": losses, "evaluations": [each.model_dump() for each in done.evaluations],
        "stages": [stage.model_dump() for stage in done.stages], "digest": record.tensors_digest,
    }  # fmt: skip


def _interrupt_recovery(folder: Path, output: str) -> str:
    """Interrupt the first process in the second stage."""

    def interrupt(progress: TrainingProgress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        _recover(folder, output, interrupt)
    except KeyboardInterrupt as error:
        return str(error)
    return "not interrupted"


def _errors(processes: Processes, folder: Path) -> list[str]:
    """Return what the processes raise where the first finds something wrong, and at options that don't go together."""
    said = []
    for options in ({}, {"batch_size": 1}, {"offload": True}):
        try:
            _train(folder, "llama", "llama.safetensors" if not options else "x.safetensors", **options)
        except UsageError as error:
            said.append(str(error))
    return said


def _inside(folder: Path, processes: Processes) -> dict[str, Any]:
    """Look at how parameters lie, and train something that stands outside the decoder layers."""
    model: Any = load_model(folder / "llama", dtype=torch.float32)
    options = parse_options(**{**OPTIONS, "cache_prefix": "never"})
    documents = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    batches = Batches.build(Texts(documents[2:], documents[:2]), load_tokenizer(folder / "llama"), options)
    chosen = [model.model.norm.weight, *model.model.layers[2].mlp.parameters()]
    run = TrainingRun(model, Trainee(chosen, [model.model.norm, model.model.layers[2]], 0), batches, options)
    run.train()
    frozen = model.model.layers[0].mlp.up_proj.weight
    everything: Any = run.parameters
    answer = {
        "sharded": [is_sharded(parameter) for parameter in (*run.parameters, frozen)],
        "held": sum((p.to_local() if is_sharded(p) else p).numel() for p in everything),
        "whole": sum(p.numel() for p in everything),
        "digest": tensors_digest({str(number): whole(p.detach()) for number, p in enumerate(run.parameters)}),
        "loss": run.held_out_loss(),
    }
    try:
        TrainingRun(model, Trainee([torch.nn.Parameter(torch.zeros(2))], [], 0), batches, options)
    except UsageError as error:
        answer["foreign"] = str(error)
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
