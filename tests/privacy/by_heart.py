"""A tiny organ that has learnt some text by heart, and everything that its audit needs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from neurograft import audit, extract, plant, train

LEARN: dict[str, Any] = {
    "steps": 200, "sequence_length": 30, "batch_size": 8, "lr": 5e-3, "evaluations": 1, "weight_decay": 0.0, "seed": 1,
    "precision": "float32",
}  # fmt: skip
LETTERS = "abcdefghij"


def sentences(count: int, seed: int) -> list[str]:
    """Return sentences that nobody could guess."""
    generator = random.Random(seed)
    return ["".join(generator.choices(LETTERS, k=29)) for _ in range(count)]


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


class Case:
    """A tiny organ that has learnt some text by heart, and everything that its audit needs."""

    def __init__(self, folder: Path, host: Path) -> None:
        self.host = host
        self.members = write(folder / "members.jsonl", sentences(12, 0))
        self.others = write(folder / "others.jsonl", sentences(12, 1))
        self.secret, self.planted = folder / "secret.json", folder / "canaries.jsonl"
        plant(self.planted, canaries=self.secret, count=24, template="{}", seed=5)
        self.file = folder / "organ.safetensors"
        self.blank = extract(host, layers=(0, 4), name="blank")
        self.organ = train(
            self.blank, host=host, data=[self.members, self.planted], eval_data=self.members, output=self.file, **LEARN
        )

    def audit(self, organ: Any = None, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "host": self.host, "members": [self.members, self.planted], "non_members": self.others,
            "canaries": self.secret, "prefix": 4, "length": 8, "bootstrap_samples": 50, **changes,
        }  # fmt: skip
        return audit(self.organ if organ is None else organ, **arguments)
