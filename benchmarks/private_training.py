"""What differential privacy costs an organ, and what it keeps from an attacker: perplexity and audits by epsilon.

Run it with `python benchmarks/private_training.py`; about 15 minutes on a core that does nothing else. It needs the
demo's packaged model and ontology (`make venv` installs both) and writes benchmarks/results/private_training.json
after each organ.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from neurograft import audit, evaluation, extraction, plant, surgery
from neurograft.demonstration import find_packaged_model
from neurograft.models import load_model, load_tokenizer
from neurograft.organ import Organ
from neurograft.training import protocols
from render import describe_run
from texts import read_domain

RESULT = Path(__file__).parent / "results" / "private_training.json"
LAYERS = (27, 30)
MEMBERS, OTHERS, EVALUATED, HELD_OUT, CANARIES = 300, 100, 100, 40, 40
LENGTH, BATCH_SIZE, ACCUMULATE, STEPS, SEED = 32, 8, 4, 30, 0
CASES: tuple[tuple[float | None, int | None, float], ...] = ((None, 8, 3e-3), (8.0, 8, 3e-3), (3.0, 8, 3e-3))
"""(epsilon, rank, learning rate)."""


def main() -> None:
    """Train an organ for each case, measure and attack it, and write what was found."""
    host = find_packaged_model()
    organ = extraction.extract(host, layers=LAYERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_texts(folder)
        model, tokenizer = load_model(host), load_tokenizer(host)
        rows: list[dict[str, Any]] = [{"name": "the model as it is", **perplexity(model, tokenizer, texts)}]
        for epsilon, rank, lr in CASES:
            started = time.monotonic()
            trained = train(organ, texts, epsilon, rank, lr)
            seconds = time.monotonic() - started
            with surgery.graft(model, trained, verify=False):
                measured = perplexity(model, tokenizer, texts)
            row = describe(trained, epsilon, rank, lr, seconds) | measured | attack(trained, texts)
            rows.append(row)
            print(json.dumps(row), flush=True)
            result = {"run": describe_run("python benchmarks/private_training.py"), "settings": settings()}
            RESULT.write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


def write_texts(folder: Path) -> dict[str, Path]:
    """Write members, non-members, text to evaluate, held-out text, and canaries with their secret."""
    counts = {"members": MEMBERS, "others": OTHERS, "evaluated": EVALUATED, "held-out": HELD_OUT}
    documents = random.Random(SEED).sample(read_domain("clinical"), sum(counts.values()))
    texts = {}
    for name, count in counts.items():
        texts[name] = folder / f"{name}.jsonl"
        texts[name].write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in documents[:count]), encoding="utf-8"
        )
        documents = documents[count:]
    texts |= {"canaries": folder / "canaries.jsonl", "secret": folder / "secret.json"}
    plant(texts["canaries"], canaries=texts["secret"], count=CANARIES, seed=SEED)
    return texts


def train(organ: Organ, texts: dict[str, Path], epsilon: float | None, rank: int | None, lr: float) -> Organ:
    """Train an organ on members and canaries; a private one without anything to measure on."""
    kind = {"eval_data": texts["held-out"]} if epsilon is None else {"dp_epsilon": epsilon}
    return protocols.train(
        organ,
        host=find_packaged_model(),
        data=[texts["members"], texts["canaries"]],
        steps=STEPS,
        batch_size=BATCH_SIZE,
        accumulate=ACCUMULATE,
        sequence_length=LENGTH,
        rank=rank,
        lr=lr,
        seed=SEED,
        evaluations=1,
        cache_prefix="always",
        **kind,
    )


def describe(trained: Organ, epsilon: float | None, rank: int | None, lr: float, seconds: float) -> dict[str, Any]:
    """Return how an organ was trained."""
    training = trained.manifest.training
    assert training is not None
    spent = training.privacy
    return {
        "name": f"{'no privacy' if epsilon is None else f'epsilon {epsilon:g}'}, {f'rank {rank}' if rank else 'all'}",
        "lr": lr,
        "training_seconds": round(seconds, 1),
        "privacy": None if spent is None else spent.model_dump(),
    }


def perplexity(model: Any, tokenizer: Any, texts: dict[str, Path]) -> dict[str, Any]:
    """Return the perplexity of text that no organ was trained on, with its interval."""
    report = evaluation.evaluate((model, tokenizer), data={"clinical": texts["evaluated"]}, sequence_length=128)
    found = report.data["clinical"]
    return {
        "perplexity": round(found.perplexity, 2),
        "interval": [round(found.low, 2), round(found.high, 2)],
        "tokens": found.tokens,
    }


def attack(trained: Organ, texts: dict[str, Path]) -> dict[str, Any]:
    """Return what an audit finds."""
    report = audit(
        trained,
        host=find_packaged_model(),
        members=[texts["members"], texts["canaries"]],
        non_members=texts["others"],
        canaries=texts["secret"],
        max_documents=OTHERS,
        sequence_length=128,
        prefix=16,
        length=16,
        delta=1e-3,
        seed=SEED,
    )
    found = report.audit
    assert found.canaries is not None
    return {
        "membership": {figures.attack: figures.model_dump() for figures in found.membership},
        "extraction": [figures.model_dump() for figures in found.extraction],
        "canaries": found.canaries.model_dump(),
        "members_verified": found.members_verified,
    }


def settings() -> dict[str, Any]:
    """Return what the measurement depends on."""
    return {
        "layers": f"{LAYERS[0]}:{LAYERS[1]}",
        "members": MEMBERS,
        "others": OTHERS,
        "canaries": CANARIES,
        "steps": STEPS,
        "step_size": BATCH_SIZE * ACCUMULATE,
        "sequence_length": LENGTH,
        "seed": SEED,
    }


if __name__ == "__main__":
    main()
