"""What makes an organ learn faster, and what does not: each choice of the training engine, tried beside the others.

Run it with `python benchmarks/engine.py`; some 40 minutes on one core. It needs the demo's packaged model and
ontology (`make venv` installs both), keeps what is finished in benchmarks/results/engine.json, and goes on from there.
Every run has a process of its own. LoRA runs through the same loop, on the same batches and in the same arithmetic.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from neurograft import data, extraction
from neurograft.demonstration import find_packaged_model
from neurograft.models import load_config, resolve
from neurograft.training.baselines import METHODS, OrganSettings
from neurograft.training.measuring import Job, measure_apart, own_cache
from render import describe_run
from texts import read_domain, read_general

RESULT = Path(__file__).parent / "results" / "engine.json"
TOKENS, BATCH_SIZE, SEQUENCE_LENGTH, EVALUATED_TOKENS, SEED = 30_720, 4, 128, 8_192, 0
LATE, TOP_TEN, TOP_FIFTEEN, TOP_TWENTY = "27:30", "20:30", "15:30", "10:30"
# Group -> (name, method, settings). Those of each group are held against one another and against the first group's.
TRIED: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "where and how many layers": [
        ("10:13", "organ", {"layers": "10:13"}),
        ("27:30", "organ", {"layers": LATE}),
        ("20:30", "organ", {"layers": TOP_TEN}),
        ("15:30", "organ", {"layers": TOP_FIFTEEN}),
        ("10:30", "organ", {"layers": TOP_TWENTY}),
    ],
    "LoRA": [
        ("rank 16, lr 0.002", "lora", {"rank": 16, "lr": 2e-3}),
        ("rank 16, lr 0.004", "lora", {"rank": 16, "lr": 4e-3}),
        ("rank 64, lr 0.002", "lora", {"rank": 64, "lr": 2e-3}),
    ],
    "learning rate": [
        ("10:30, lr 0.0003", "organ", {"layers": TOP_TWENTY, "lr": 3e-4}),
        ("10:30, lr 0.0008", "organ", {"layers": TOP_TWENTY, "lr": 8e-4}),
        ("20:30, lr 0.0005", "organ", {"layers": TOP_TEN, "lr": 5e-4}),
    ],
    "what of the layers trains": [
        ("10:30, attention", "organ", {"layers": TOP_TWENTY, "train": "attention"}),
        ("10:30, MLP", "organ", {"layers": TOP_TWENTY, "train": "mlp"}),
        ("10:30, rank 16, merged", "organ", {"layers": TOP_TWENTY, "rank": 16}),
        ("10:30, rank 64, merged", "organ", {"layers": TOP_TWENTY, "rank": 64, "lr": 2e-3}),
    ],
    "vocabulary": [
        ("10:30, sampled", "organ", {"layers": TOP_TWENTY, "vocabulary": "sampled"}),
        ("LoRA, sampled", "lora", {"rank": 16, "lr": 2e-3, "vocabulary": "sampled"}),
    ],
    "size of a step": [
        ("10:30, 2 sequences", "organ", {"layers": TOP_TWENTY, "batch_size": 2}),
        ("LoRA, 2 sequences", "lora", {"rank": 16, "lr": 2e-3, "batch_size": 2}),
    ],
    "optimizer, schedule, average": [
        ("20:30, Muon", "organ", {"layers": TOP_TEN, "optimizer": "muon"}),
        ("20:30, Adafactor, lr 0.01", "organ", {"layers": TOP_TEN, "optimizer": "adafactor", "lr": 1e-2}),
        ("20:30, anchor 30", "organ", {"layers": TOP_TEN, "anchor": 30.0}),
        ("20:30, average 0.98", "organ", {"layers": TOP_TEN, "average": 0.98}),
        ("20:30, WSD", "organ", {"layers": TOP_TEN, "schedule": "wsd"}),
    ],
}


def main() -> None:
    """Measure what is not yet measured, and write it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="groups to measure now")
    arguments = parser.parse_args()
    found = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []
    done = {(row["group"], row["name"]) for row in found}
    directory = resolve(find_packaged_model())
    texts = read_texts()
    with tempfile.TemporaryDirectory() as folder:
        for group, rows in TRIED.items():
            for name, method, settings in rows:
                if (group, name) in done or (arguments.only and group not in arguments.only):
                    continue
                measured = measure_one(directory.path, method, settings, texts, Path(folder))
                found.append({"group": group, "name": name, "method": method, "settings": settings, **measured})
                print(group, name, measured, flush=True)
                result = {"run": describe_run("python benchmarks/engine.py"), "settings": shared(), "rows": found}
                RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def shared() -> dict[str, Any]:
    """Return the options that all runs share."""
    return {
        "max_tokens": TOKENS,
        "batch_size": BATCH_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
        "eval_tokens": EVALUATED_TOKENS,
        "evaluations": 1,
        "patience": 9,
        "seed": SEED,
    }


def read_texts() -> dict[str, list[str]]:
    """Return training, validation, domain and general documents."""
    training, rest = data.split_documents(read_domain("clinical"), held_out=0.1, seed=1)
    general = data.split_documents(read_general(), held_out=0.3, seed=1)[1]
    return {"training": training, "validation": rest[:60], "domain": rest[60:], "general": general}


def measure_one(
    model: Path, method: str, settings: dict[str, Any], texts: dict[str, list[str]], folder: Path
) -> dict[str, Any]:
    """Train once; return perplexities, seconds, and megabytes beyond the loaded model."""
    organ = None
    if METHODS[method].protocol is not None:
        count = int(load_config(resolve(model)).num_hidden_layers)
        layers = OrganSettings(layers=settings["layers"]).range_in(count)
        organ = folder / f"organ-{layers.start}-{layers.stop}.safetensors"
        if not organ.is_file():
            extraction.extract(model, layers=layers, output=organ)
    job = Job(
        model=str(model),
        method=method,
        settings={name: value for name, value in settings.items() if name != "batch_size"},
        options={**shared(), "batch_size": settings.get("batch_size", BATCH_SIZE)},
        organ=None if organ is None else str(organ),
        training=texts["training"],
        validation=texts["validation"],
        evaluated={name: texts[name] for name in ("domain", "general")},
    )
    with own_cache(folder) as cache:
        measured = measure_apart(job, cache, lambda _: None)
    return {
        "perplexity": {name: round(value, 3) for name, value in measured.perplexity.items()},
        "seconds": round(measured.seconds, 1),
        "tokens": measured.tokens_seen,
        "megabytes_beyond_model": round(measured.memory_beyond_model / 1e6),
        "megabytes_with_model": round(measured.memory_with_model / 1e6),
        "shipped_megabytes": round(measured.shipped_bytes / 1e6, 1),
    }


if __name__ == "__main__":
    main()
