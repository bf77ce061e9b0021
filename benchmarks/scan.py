"""What a scan of all places costs, beside evaluating each place by itself, and what it finds.

Run it with `python benchmarks/scan.py`; some ten minutes on one core. It needs the demo's packaged model and ontology
(`make venv` installs both) and writes benchmarks/results/scan.json. Of the places, every sixth is also evaluated by
itself, by `graft` and `evaluate`, on the same text; for all, that time is scaled by how many layers they run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import neurograft
from neurograft.data import read_documents
from neurograft.demonstration import find_ontology, find_packaged_model, read_definitions
from neurograft.evaluation import evaluate
from neurograft.models import load_model, load_tokenizer
from neurograft.organ import Organ
from neurograft.placement.results import ScanReport
from render import describe_run

RESULT = Path(__file__).parent / "results" / "scan.json"
LAYERS, TRAINING_TOKENS, SCANNED_TOKENS, EVERY = "10:13", 15_360, 8192, 6
HELD_OUT = 800  # documents, more than the sample needs


def main() -> None:
    """Train an organ, scan it, and evaluate some places by themselves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    documents = read_definitions(find_ontology())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, texts in (("training", documents[HELD_OUT:]), ("held-out", documents[:HELD_OUT])):
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        model = find_packaged_model()
        neurograft.extract(model, layers=LAYERS, output=folder / "organ.safetensors", name="clinical")
        organ = neurograft.train(
            folder / "organ.safetensors", host=model, data=folder / "training.jsonl", max_tokens=TRAINING_TOKENS,
            sequence_length=128, batch_size=4, eval_tokens=1024, evaluations=1,
        )  # fmt: skip
        started = time.monotonic()
        report = neurograft.scan(organ, model, data=folder / "held-out.jsonl", max_tokens=SCANNED_TOKENS)
        seconds = time.monotonic() - started
        print(report.model_dump_json(), flush=True)
        alone = evaluate_alone(organ, model, report, folder)
    result = {
        "run": describe_run("python benchmarks/scan.py"),
        "settings": {"layers": LAYERS, "training_tokens": TRAINING_TOKENS, "scanned_tokens": SCANNED_TOKENS},
        "seconds": {"scan": round(report.seconds, 1), "scan_with_loading": round(seconds, 1)},
        "report": report.model_dump(mode="json"),
        "alone": alone,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def evaluate_alone(organ: Organ, reference: Path, report: ScanReport, folder: Path) -> list[dict[str, Any]]:
    """Evaluate every sixth place, and those that the scan kept to the end, by itself on all of the sample."""
    from neurograft.placement.sampling import draw_sample

    model, tokenizer = load_model(reference), load_tokenizer(reference)
    texts = read_documents(folder / "held-out.jsonl")
    sample = draw_sample(
        "domain", texts, tokenizer, max_tokens=SCANNED_TOKENS, sequence_length=report.sequence_length, seed=0
    )
    # The sample's windows are whole documents here: none is as long as a window.
    lines = [json.dumps({"text": tokenizer.decode(window.ids[1:])}) + "\n" for window in sample.windows]
    (folder / "sample.jsonl").write_text("".join(lines), encoding="utf-8")
    found = []
    for number, place in enumerate(report.places):
        kept = place.stopped is None
        if number % EVERY and not kept:
            continue
        with neurograft.graft(model, organ, at=place.position, mode=place.mode):
            started = time.monotonic()
            measured = evaluate((model, tokenizer), data={"domain": folder / "sample.jsonl"}, bootstrap_samples=2)
            seconds = time.monotonic() - started
        domain = measured.data["domain"]
        row = {
            "mode": place.mode, "position": place.position, "seconds": round(seconds, 2), "tokens": domain.tokens,
            "perplexity": domain.perplexity, "sixth": number % EVERY == 0,
            "scanned": None if not kept or place.domain is None else place.domain.perplexity,
        }  # fmt: skip
        print(row, flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
