"""With layers left on the disk, training comes to the same bits, and never holds more than one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import extract, train
from neurograft.errors import IncompatibleError, ModelError, NeurograftError, UsageError
from neurograft.files import tensors_digest
from neurograft.models import load_model, resolve
from neurograft.organ import Organ, read_organ
from neurograft.training.offloading import OffloadedLayers, bytes_in_memory, load_offloaded
from tiny import CONFIGS, FURTHER, LAYERS, logits, make_model, make_tokenizer, save_model

QUICK: dict[str, Any] = {
    "epochs": 3, "sequence_length": 16, "batch_size": 3, "lr": 1e-2, "evaluations": 3, "patience": 9, "seed": 3,
    "precision": "float32",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = [f"report {number}: grade {number % 4}, seen in the left lung" for number in range(12)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(autouse=True)
def _no_cache_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "own-cache"))


def _both(organ: Organ, host: Path, text: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, **options: Any) -> Any:
    """Train with the host whole and with its lower layers on the disk, each with a cache of its own."""
    trained = []
    for offload in (False, True):
        monkeypatch.setenv("NEUROGRAFT_CACHE", str(cache / str(offload)))
        trained.append(train(organ, host=host, data=text, offload=offload, **{**QUICK, **options}))
    return trained


def _same(whole: Organ, parts: Organ) -> None:
    assert tensors_digest(whole.tensors) == tensors_digest(parts.tensors)
    first, second = (one.manifest.model_dump() for one in (whole, parts))
    for one in (first, second):
        one.pop("created"), one["training"].pop("seconds")
    assert first == second


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_same_bits(
    kind: str, model_directory: Factory, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = model_directory(kind)
    organ = extract(host, layers=(3, 5))
    whole, parts = _both(organ, host, text, monkeypatch, tmp_path)
    _same(whole, parts)
    assert tensors_digest(parts.tensors) != tensors_digest(organ.tensors)
