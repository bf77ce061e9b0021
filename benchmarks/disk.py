"""Transplants on disk beside `cp` and mergekit: seconds and peak memory, on models of 1, 4 and 10 GB.

Run it with `python benchmarks/disk.py --mergekit ENVIRONMENT/bin/mergekit-yaml`; it takes some 20 minutes and 30 GB of
disk, and writes benchmarks/results/disk.json. mergekit belongs into an environment of its own
(`pip install mergekit==0.1.5`). Models are random; before each run the pages of the files that
it reads are dropped from memory and the disk is idle, and after it everything is on the disk: `sync` counts for all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurograft.byte_moves import Held
from neurograft.number_formats import _from_float32
from neurograft.tensor_files import NewTensorFile, Piece, write_tensor_files
from render import describe_run

RESULT = Path(__file__).parent / "results" / "disk.json"
LAYERS, ORGAN, MIDDLE, VOCABULARY = 48, (10, 13), 24, 8192
# Gigabytes -> hidden and intermediate size of a llama of 48 layers.
SIZES = {1: (896, 2432), 4: (1792, 4864), 10: (2816, 7744)}

# Linux counts a process from its parent's size on, so the command starts from a process that is small.
_WATCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss)
"""

# A program that has imported the library already, as a server would; it transplants when it is told to.
_SERVE = """
import json, sys
from neurograft.transplantation import transplant
arguments = json.loads(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
transplant(**arguments)
"""
IN_PYTHON = ", from Python"


@dataclass(frozen=True)
class Run:
    """One measured command."""

    seconds: float
    megabytes: float
    """Largest resident size of one process, its children included."""


def main() -> None:
    """Measure every way on every size, in turns, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, help="the command mergekit-yaml of an environment of its own")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/neurograft-disk"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []
    for size in arguments.sizes:
        folder = arguments.folder / str(size)
        try:
            row = measure(size, folder, arguments.mergekit, arguments.rounds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows = sorted([*(old for old in rows if old["gigabytes"] != size), row], key=lambda row: row["gigabytes"])
        settings = {"layers": LAYERS, "organ": list(ORGAN), "rounds": arguments.rounds}
        result = {"run": describe_run("python benchmarks/disk.py"), "settings": settings, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(size: int, folder: Path, mergekit: Path | None, rounds: int) -> dict[str, Any]:
    """Measure every way on one size."""
    folder.mkdir(parents=True)
    os.environ["NEUROGRAFT_CACHE"] = str(folder / "cache")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is not compiled anew for each command
    model = make_model(folder / "model", *SIZES[size])
    organ = folder / "organ.safetensors"
    neurograft = [str(Path(sys.executable).parent / "neurograft")]
    extract = [*neurograft, "extract", str(model), "--verify", "bytes", "--overwrite", "-o"]
    transplant = [*neurograft, "transplant", str(organ), str(model), "-o", str(folder / "out")]
    ways: dict[str, list[str]] = {
        # the bytes that an insertion writes: the model's and the organ's
        "cp": ["sh", "-c", f"cp -r {model} {folder / 'out'} && cp {organ} {folder / 'out'}"],
        "insert, copied": [
            *(*transplant, "--mode", "insert", "--at", str(MIDDLE)),
            *("--link", "copy", "--verify", "bytes"),
        ],
        "insert at the end, hard links": [
            *(*transplant, "--mode", "insert", "--at", str(LAYERS)),
            *("--link", "hard", "--verify", "written"),
        ],
        "insert in the middle, hard links": [
            *(*transplant, "--mode", "insert", "--at", str(MIDDLE)),
            *("--link", "hard", "--verify", "written"),
        ],
        "replace, hard links": [
            *(*transplant, "--mode", "replace", "--at", str(ORGAN[0])),
            *("--link", "hard", "--verify", "written"),
        ],
        "replace, hard links, all digested": [
            *(*transplant, "--mode", "replace", "--at", str(ORGAN[0])),
            *("--link", "hard", "--verify", "bytes"),
        ],
    }
    for name in ("insert, copied", "insert at the end, hard links", "replace, hard links"):
        ways[name + IN_PYTHON] = serving(ways[name])
    for count in (3, 6, 12):
        ways[f"extract {count} layers"] = [
            *extract,
            str(folder / f"{count}.safetensors"),
            "--layers",
            f"10:{10 + count}",
        ]
    if mergekit is not None:
        (folder / "slices.yml").write_text(slices(model), encoding="utf-8")
        ways["mergekit"] = [str(mergekit), str(folder / "slices.yml"), str(folder / "out")]
    first = {"extract": run([*extract, str(organ), "--layers", f"{ORGAN[0]}:{ORGAN[1]}"], model, folder)}
    first["insert"] = run(ways["insert, copied"], model, folder)
    for name, command in ways.items():  # what building models without weights shows is known from here on
        if "links" in name and IN_PYTHON not in name:
            run(command, model, folder)
    found: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for name, command in ways.items():
            found.setdefault(name, []).append(run(command, model, folder))
            print(size, name, found[name][-1], flush=True)
    return {
        "gigabytes": size,
        "model_bytes": tree_bytes(model),
        "organ_bytes": organ.stat().st_size,
        "shards": len(list(model.glob("*.safetensors"))),
        "first": {name: vars(result) for name, result in first.items()},
        "ways": {name: [vars(result) for result in results] for name, results in found.items()},
    }


def serving(command: list[str]) -> list[str]:
    """Return the command of a program that does by a call what a command of neurograft does."""
    organ, recipient = command[2:4]
    given = dict(zip(command[4::2], command[5::2], strict=True))
    arguments = {
        "organ": organ, "recipient": recipient, "output": given["-o"], "mode": given["--mode"],
        "at": int(given["--at"]), "link": given["--link"], "verify": given["--verify"],
    }  # fmt: skip
    return [sys.executable, "-c", _SERVE, json.dumps(arguments)]


def run(command: list[str], model: Path, folder: Path) -> Run:
    """Run a command with nothing of its input in memory, until what it wrote is on the disk; then delete that."""
    if _SERVE in command:
        return call(command, model, folder)
    forget_input(model, folder)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-IS", "-c", _WATCH, *command], capture_output=True, text=True)
    os.sync()
    seconds = time.monotonic() - started
    status, kilobytes = map(int, done.stdout.split())
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return Run(round(seconds, 2), round(kilobytes / 1000, 1))


def call(command: list[str], model: Path, folder: Path) -> Run:
    """Let a program that has started already do its work; its start is not measured."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        forget_input(model, folder)
        started = time.monotonic()
        process.stdin.write(b"\n")
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {process.stderr.read().decode()[-2000:]}")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return Run(round(seconds, 3), round(usage.ru_maxrss / 1000, 1))


def forget_input(model: Path, folder: Path) -> None:
    """Leave the disk idle and nothing of the input in memory."""
    os.sync()
    for path in (*model.iterdir(), folder / "organ.safetensors"):
        if path.is_file():
            forget(path)


def forget(path: Path) -> None:
    """Drop a file's pages from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def tree_bytes(folder: Path) -> int:
    """Return how many bytes the files of a folder have."""
    return sum(path.stat().st_size for path in folder.iterdir())


def make_model(folder: Path, hidden: int, intermediate: int) -> Path:
    """Write a llama of random bfloat16 weights, a shard for each layer."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    noise = np.random.default_rng(0).standard_normal(1 << 25, dtype=np.float32) * np.float32(0.02)
    data = memoryview(_from_float32(noise, "BF16").tobytes())  # 64 MB, of which every tensor takes another part
    files = list(shards(hidden, intermediate))
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        pieces = {
            key: piece_of(data, shape, number * 7919 + place) for place, (key, shape) in enumerate(tensors.items())
        }
        write_tensor_files([NewTensorFile(folder / name, pieces, {"format": "pt"})])
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": tree_bytes(folder)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def shards(hidden: int, intermediate: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Give the names and shapes of the tensors in each file."""
    yield {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(LAYERS):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            **{f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"},
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def piece_of(data: memoryview, shape: tuple[int, ...], seed: int) -> Piece:
    """Return a tensor whose bytes are cut from `data`."""
    size = 2 * int(np.prod(shape))
    start = seed * 4096 % (len(data) - size) // 2 * 2
    return Piece("BF16", shape, Held(data[start : start + size]))


def slices(model: Path) -> str:
    """Return mergekit's recipe for the same stacking as the insertion in the middle."""
    ranges = [(0, MIDDLE), ORGAN, (MIDDLE, LAYERS)]
    parts = "".join(f"- sources:\n  - model: {model}\n    layer_range: [{start}, {stop}]\n" for start, stop in ranges)
    return f"slices:\n{parts}merge_method: passthrough\ndtype: bfloat16\n"


if __name__ == "__main__":
    main()
