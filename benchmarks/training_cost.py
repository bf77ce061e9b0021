"""What an optimizer step of an organ costs: seconds and memory, with and without what the training loop saves.

Run it with `python benchmarks/training_cost.py`; about 10 minutes on two cores. It needs the demo's packaged model and
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

from neurograft import extraction, surgery
from neurograft.demonstration import find_ontology, find_packaged_model, read_definitions
from neurograft.models import load_model, load_tokenizer
from neurograft.training import loop
from neurograft.training.options import TrainingOptions
from render import describe_run

RESULT = Path(__file__).parent / "results" / "training_cost.json"
STEPS, BATCH_SIZE, SEQUENCE_LENGTH, ROUNDS = 8, 8, 128, 3
POSITIONS = (10, 20, 27)
WAYS = ("all logits", "without the logits", "without the logits, cached below")


def main() -> None:
    """Measure every way at every position, in turns, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("POSITION", "WAY"), help="measure one, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(int(arguments.one[0]), arguments.one[1])))
        return
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for position in POSITIONS:
            for way in WAYS:
                command = [sys.executable, __file__, "--one", str(position), way]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.setdefault((position, way), []).append(json.loads(output.splitlines()[-1]))
                print(position, way, found[position, way][-1], flush=True)
    rows = [
        {
            "layers": f"{position}:{position + 3}",
            "way": way,
            "seconds": [round(run["seconds"], 3) for run in runs],
            "megabytes": round(statistics.median(run["megabytes"] for run in runs)),
        }
        for (position, way), runs in found.items()
    ]
    settings = {"rounds": ROUNDS, "steps": STEPS, "batch_size": BATCH_SIZE, "sequence_length": SEQUENCE_LENGTH}
    result = {"run": describe_run("python benchmarks/training_cost.py"), "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(position: int, way: str) -> dict[str, float]:
    """Train an organ for a few steps; return seconds a step, and how much memory that took beyond the loaded model."""
    host = find_packaged_model()
    model, tokenizer = load_model(host, dtype=torch.float32), load_tokenizer(host)
    attachment = surgery.attach(model, extraction.extract(host, layers=(position, position + 3)), at=position)
    options = TrainingOptions(
        steps=2 * STEPS,
        batch_size=BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        eval_tokens=SEQUENCE_LENGTH,
        evaluations=1,
        cache_prefix="always" if way == WAYS[2] else "never",
    )
    documents = read_definitions(find_ontology())
    texts = loop.Texts(documents[: STEPS * BATCH_SIZE * 8], documents[-4:])
    batches = loop.Batches.build(texts, tokenizer, options)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROGRAFT_CACHE"] = folder
        run: Any = loop.TrainingRun(model, loop.Trainee.of_layers(attachment.layers, position), batches, options)
        if way == WAYS[0]:
            run.loss.head = None
        rows = [list(range(n * BATCH_SIZE, (n + 1) * BATCH_SIZE)) for n in range(STEPS)]
        run._started, run._before = time.monotonic(), 0.0
        # The first pass warms up and, in the last way, fills the cache; the second one is measured.
        for chosen in rows:
            run._step(chosen)
        before = peak_megabytes(reset=True)
        started = time.monotonic()
        for chosen in rows:
            run._step(chosen)
        seconds = (time.monotonic() - started) / len(rows)
    return {"seconds": seconds, "megabytes": peak_megabytes() - before}


def peak_megabytes(*, reset: bool = False) -> float:
    """Return the largest resident size of this process since the last reset, in MB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
