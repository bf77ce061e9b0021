"""Memory of training an organ in a large host, whole in memory and with its lower layers on the disk.

Run it with `python benchmarks/training_memory.py`; it writes a random bfloat16 llama of some two billion parameters
into a temporary folder, trains an organ of two layers late, in the middle and early in it, a process for each run, and
writes benchmarks/results/training_memory.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from disk import LAYERS, SIZES, VOCABULARY, make_model
from render import describe_run

RESULT = Path(__file__).parent / "results" / "training_memory.json"
ORGAN = 2
POSITIONS = {"late": LAYERS - ORGAN, "middle": LAYERS // 2, "early": ORGAN}
OPTIONS: dict[str, Any] = {
    "steps": 2, "batch_size": 2, "sequence_length": 32, "eval_tokens": 64, "evaluations": 1, "lr": 1e-4,
    "host_precision": "stored",
}  # fmt: skip


def main() -> None:
    """Measure every place, with and without `--offload`, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the model is written, 4 GB [default: a temporary folder]")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "ORGAN", "OFFLOAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        model, organ, offload = arguments.one
        print(json.dumps(measure(Path(model), Path(organ), offload == "yes")))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="neurograft-memory-") as folder:
        rows = measure_all(Path(folder))
    settings = {"layers": LAYERS, "organ": ORGAN, **OPTIONS}
    run = describe_run("python benchmarks/training_memory.py")
    RESULT.write_text(json.dumps({"run": run, "settings": settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def measure_all(folder: Path) -> list[dict[str, Any]]:
    """Measure every place, each run in a process of its own and with nothing cached."""
    from neurograft import extract

    model, rows = make_model(folder / "model", *SIZES[4]), []
    save_tokenizer(model)
    for place, position in POSITIONS.items():
        organ = folder / f"{place}.safetensors"
        extract(model, layers=(position, position + ORGAN), output=organ, verify="bytes")
        for offload in ("no", "yes"):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                command = [sys.executable, __file__, "--one", str(model), str(organ), offload]
                environment = {**os.environ, "NEUROGRAFT_CACHE": cache}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            rows.append({"place": place, "position": position, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def measure(model: Path, organ: Path, offload: bool) -> dict[str, Any]:
    """Train; return this process's peak memory, and what it is made of."""
    from neurograft import train
    from neurograft.checkpoint import open_checkpoint
    from neurograft.models import ModelDirectory
    from neurograft.tensor_files import bytes_of

    documents = model.parent / "text.txt"
    documents.write_text("\n\n".join(f"Report {number}: the finding was {number * 37 % 101}." for number in range(40)))
    imported = resident()
    started = time.monotonic()
    trained = train(organ, host=model, data=documents, offload=offload, **OPTIONS)
    seconds, training = time.monotonic() - started, trained.manifest.training
    if training is None:
        raise RuntimeError("an organ that was trained says nothing of it")
    position, checkpoint = training.position or 0, open_checkpoint(ModelDirectory(model, model.name))
    layers = [bytes_of(checkpoint.layer_pieces(number).values()) for number in range(LAYERS)]
    everything = bytes_of(checkpoint.pieces.values())
    return {
        "offload": offload,
        "model_bytes": everything,
        "organ_bytes": 2 * sum(layers[position : position + ORGAN]),  # float32
        # Gradients, two moments of AdamW, the best weights so far: as many float32 numbers each.
        "optimizer_bytes": 8 * sum(layers[position : position + ORGAN]),
        "suffix_bytes": sum(layers[position + ORGAN :]),
        "outside_bytes": everything - sum(layers),
        "program_bytes": imported,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(seconds, 1),
        "perplexity": trained.manifest.evaluations[0].after,
    }


def resident() -> int:
    """Return what this process holds once everything that it needs is imported, in bytes."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token for each printable character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {"<unk>": 0, "<eos>": 1, **{letter: number + 2 for number, letter in enumerate(letters)}}
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


if __name__ == "__main__":
    main()
