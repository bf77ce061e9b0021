"""Measure what recovery does to an organ that was trained alone: at an early, a middle, a late and the last position.

Run it with `python benchmarks/recovery.py`; about 25 minutes on two cores. It needs the demo's packaged model and
ontology (`make venv` installs both) and writes benchmarks/results/recovery.json. With `--smoke` it does one step at one
position and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from neurograft import evaluation, extraction, recovery, removal, transplantation
from neurograft.demonstration import find_packaged_model
from neurograft.models import load_model, load_tokenizer
from neurograft.training import protocols
from protocols import BATCH_SIZE, LAYERS, SEED, SEQUENCE_LENGTH, write_texts
from protocols import LEARNING_RATE as ORGAN_LEARNING_RATE
from protocols import STEPS as ORGAN_STEPS
from render import describe_run

RESULT = Path(__file__).parent / "results" / "recovery.json"
POSITIONS = {"early": 1, "middle": 10, "late": 20, "end": 30}
RECOVERY_STEPS, RECOVERY_BATCH = 30, 4
EVALUATED_TOKENS = 4096
# Vectors are few and far from what they can do at a rate that suits matrices.
CHOICES: dict[str, dict[str, Any]] = {
    "organ": {"scope": "organ", "lr": 1e-3},
    "neighbours": {"scope": "neighbours", "neighbours": 2, "lr": 1e-3},
    "neighbours, gradual": {"scope": "neighbours", "neighbours": 2, "unfreeze": "gradual", "lr": 1e-3},
    "seams": {"scope": "seams", "lr": 1e-2},
}


def main() -> None:
    """Train one organ alone, put it in at each position, recover by each choice, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one step at one position; writes nothing")
    smoke = parser.parse_args().smoke
    with tempfile.TemporaryDirectory() as name:
        rows = run(Path(name), smoke)
    if smoke:
        return
    result = {"run": describe_run("python benchmarks/recovery.py"), "settings": settings(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(folder: Path, smoke: bool) -> list[dict[str, Any]]:
    """Return a row for the model as it is, and for each position one without recovery and one for each choice."""
    host, texts = find_packaged_model(), write_texts(folder)
    organ = protocols.train(
        extraction.extract(host, layers=LAYERS),
        host=host,
        data=texts["training"],
        eval_data=texts["selection"],
        protocol="standalone",
        steps=1 if smoke else ORGAN_STEPS,
        batch_size=BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        lr=ORGAN_LEARNING_RATE,
        seed=SEED,
        eval_tokens=1024,
        evaluations=1,
    )
    rows = [measure(host, texts, smoke, position=None, recovery="the model as it is")]
    for at in [30] if smoke else POSITIONS.values():
        transplanted = folder / "transplanted"
        transplantation.transplant(organ, host, at=at, mode="insert", output=transplanted, overwrite=True)
        rows.append(measure(transplanted, texts, smoke, position=at, recovery="none"))
        for choice in ["seams"] if smoke else CHOICES:
            rows.append(recover(transplanted, folder, texts, at, choice, smoke))
    return rows


def recover(
    transplanted: Path, folder: Path, texts: dict[str, Path], at: int, choice: str, smoke: bool
) -> dict[str, Any]:
    """Recover one transplanted model, measure it, and take the organ out again."""
    recovered, restored = folder / "recovered", folder / "restored"
    started = time.monotonic()
    record = recovery.recover(
        transplanted,
        data=texts["training"],
        eval_data=texts["selection"],
        output=recovered,
        steps=1 if smoke else RECOVERY_STEPS,
        batch_size=RECOVERY_BATCH,
        sequence_length=SEQUENCE_LENGTH,
        seed=SEED,
        eval_tokens=1024,
        evaluations=1,
        **CHOICES[choice],
    )
    seconds = time.monotonic() - started
    done = record.recoveries[-1]
    row = measure(recovered, texts, smoke, position=at, recovery=choice)
    row |= {
        "parameters": done.stages[-1].parameters,
        "training_tokens": done.training.tokens_seen,
        "training_seconds": done.training.seconds,
        "seconds": round(seconds, 1),
        "restored": removal.remove(recovered, output=restored).original_restored,
    }
    for path in (recovered, restored):
        shutil.rmtree(path)
    return row


def measure(model: Path, texts: dict[str, Path], smoke: bool, **about: Any) -> dict[str, Any]:
    """Measure perplexity on clinical and general text."""
    report = evaluation.evaluate(
        (load_model(model), load_tokenizer(model)),
        data={key: texts[key] for key in ("clinical", "general")},
        sequence_length=256,
        max_tokens=128 if smoke else EVALUATED_TOKENS,
    )
    row: dict[str, Any] = dict(about)
    row |= {key: round(result.perplexity, 2) for key, result in report.data.items()}
    row |= {f"{key}_interval": [round(r.low, 2), round(r.high, 2)] for key, r in report.data.items()}
    print(row, flush=True)
    return row


def settings() -> dict[str, Any]:
    """Return what the measurement depends on."""
    return {
        "model": "SmolLM2-135M-Instruct (dequantised from Q4_1)",
        "layers": f"{LAYERS[0]}:{LAYERS[1]}",
        "positions": POSITIONS,
        "organ": {"steps": ORGAN_STEPS, "batch_size": BATCH_SIZE, "lr": ORGAN_LEARNING_RATE},
        "recovery": {"steps": RECOVERY_STEPS, "batch_size": RECOVERY_BATCH},
        "sequence_length": SEQUENCE_LENGTH,
        "choices": CHOICES,
        "seed": SEED,
        "evaluated_tokens": EVALUATED_TOKENS,
    }


if __name__ == "__main__":
    main()
