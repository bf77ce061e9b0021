"""Measure two organs alone and together, and what is left of both after merging two organs of the same layers.

Run it with `python benchmarks/several.py`; about 10 minutes on one core. Organs are kept in the cache, so that the same
command goes on after an interruption. It needs the demo's packaged model and ontology (`make venv` installs both) and
apt for the dictionary, and writes benchmarks/results/several.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neurograft import data
from neurograft.composition import compose
from neurograft.composition_report import CompositionReport
from neurograft.demonstration import find_packaged_model
from neurograft.extraction import extract
from neurograft.merging import merge
from neurograft.models import cache_directory
from neurograft.organ import Organ, read_organ
from neurograft.training import protocols
from render import describe_run
from texts import read_domain, read_general

RESULT = Path(__file__).parent / "results" / "several.json"
FOLDER = cache_directory() / "benchmarks" / "several"
SEED, EVALUATED_TOKENS = 0, 1024
# Name, domain, layers, steps of 4 x 128 tokens.
ORGANS = (
    ("clinical", "clinical", (10, 13), 12),
    ("dictionary", "dictionary", (20, 23), 16),
    ("early-dictionary", "dictionary", (10, 13), 16),
)
MERGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("average", {"method": "average"}),
    ("TIES, density 0.2", {"method": "ties"}),
    ("TIES, density 0.5", {"method": "ties", "density": 0.5}),
    ("DARE, density 0.5", {"method": "dare"}),
    ("DARE, density 0.5, scale 2", {"method": "dare", "scale": 2.0}),
)


def main() -> None:
    """Train what is missing, measure, and write what was found."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts = write_texts()
    organs = {name: train(name, domain, layers, steps) for name, domain, layers, steps in ORGANS}
    together = measure(texts, organs["clinical"], organs["dictionary"])
    rows = [row.model_dump() for row in together.rows]
    alone = measure(texts, organs["early-dictionary"])
    rows += [row.model_dump() for row in alone.rows if row.organs]
    base = find_packaged_model()
    for name, options in MERGES:
        given = [organs["clinical"], organs["early-dictionary"]]
        merged = merge(given, base=None if options["method"] == "average" else base, name="merged", **options)
        found = measure(texts, merged)
        rows += [row.model_dump() | {"name": f"merged, {name}"} for row in found.rows if row.organs]
        print(rows[-1], flush=True)
    settings = {
        "texts": list(texts),
        "tokens": EVALUATED_TOKENS,
        "steps": "; ".join(f"{o[0]}: layers {o[2][0]}:{o[2][1]}, {o[3]} steps of 4 x 128 tokens" for o in ORGANS),
    }
    result = {"run": describe_run("python benchmarks/several.py"), "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_texts() -> dict[str, Path]:
    """Write held-out text of both domains, and general text."""
    documents = {
        "clinical": data.split_documents(read_domain("clinical"), held_out=0.1, seed=SEED)[1][400:],
        "dictionary": data.split_documents(read_domain("dictionary"), held_out=0.1, seed=SEED)[1],
        "general": data.split_documents(read_general(), seed=SEED)[1],
    }
    return {name: write(name, texts[:200]) for name, texts in documents.items()}


def write(name: str, documents: list[str]) -> Path:
    """Write documents as JSON Lines."""
    path = FOLDER / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def train(name: str, domain: str, layers: tuple[int, int], steps: int) -> Organ:
    """Train one organ in place, once."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        host = find_packaged_model()
        training = data.split_documents(read_domain(domain), held_out=0.1, seed=SEED)[0][:4000]
        protocols.train(
            extract(host, layers=layers, verify="bytes"), host=host, data=write(f"{domain}-training", training),
            output=path, name=name, steps=steps, batch_size=4, sequence_length=128,
            lr=1e-3, seed=SEED, eval_tokens=512, evaluations=1,
        )  # fmt: skip
        print("trained", name, flush=True)
    return read_organ(path)


def measure(texts: dict[str, Path], *organs: Organ) -> CompositionReport:
    """Measure organs where they were trained."""
    domains = {name: path for name, path in texts.items() if name != "general"}
    return compose(
        organs, find_packaged_model(), data=domains, general=texts["general"], sequence_length=256,
        max_tokens=EVALUATED_TOKENS, batch_size=4,
    )  # fmt: skip


if __name__ == "__main__":
    main()
