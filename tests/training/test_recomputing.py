"""Layers that compute again what their backward pass needs come to the same bits, and leave the model as it was."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import extract, recover, train, transplant
from neurograft.anatomy import describe
from neurograft.errors import UsageError
from neurograft.files import tensors_digest
from neurograft.models import load_model
from neurograft.organ import Organ
from neurograft.training.recomputing import recomputing

OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "sequence_length": 16,
    "batch_size": 2,
    "evaluations": 2,
    "patience": 9,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = (" ".join(generator.choices(["liver", "kidney", "heart", "lung"], k=12)) for _ in range(8))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def _both(organ: Organ, host: Path, text: Path, **changes: Any) -> tuple[Organ, Organ]:
    options = {**OPTIONS, **changes}
    plain = train(organ, host=host, data=text, **options)
    return plain, train(organ, host=host, data=text, gradient_checkpointing=True, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_prefix": "never"},
        {"cache_prefix": "always"},
        {"protocol": "insert"},
        {"protocol": "standalone"},
        {"rank": 2, "vocabulary": "sampled"},
        {"accumulate": 2},
        {"precision": "bfloat16"},
    ],
)
def test_the_same_bits(model_directory: Factory, text: Path, changes: dict[str, Any]) -> None:
    host = model_directory("llama")
    plain, again = _both(extract(host, layers=(1, 3), name="tiny"), host, text, **changes)
    assert tensors_digest(again.tensors) == tensors_digest(plain.tensors)
    assert again.manifest.training is not None and plain.manifest.training is not None
    assert again.manifest.training.loss_history == plain.manifest.training.loss_history


def test_dropout_is_drawn_once(model_directory: Factory, text: Path) -> None:
    host = model_directory("gpt2", resid_pdrop=0.5)
    plain, again = _both(extract(host, layers=(0, 2), name="tiny"), host, text)
    assert tensors_digest(again.tensors) == tensors_digest(plain.tensors)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with a C++ compiler")
def test_with_compiled_layers(
    model_directory: Factory, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    host = model_directory("llama")
    plain, again = _both(extract(host, layers=(1, 3), name="tiny"), host, text, compile="always")
    assert tensors_digest(again.tensors) == tensors_digest(plain.tensors)


def test_recovery(model_directory: Factory, text: Path, tmp_path: Path) -> None:
    host = model_directory("llama")
    digests = []
    for given in (False, True):
        output = tmp_path / str(given)
        transplant(extract(host, layers=(1, 2), name="tiny"), host, output=output, mode="insert")
        done = recover(
            output, data=text, scope="neighbours", output=tmp_path / f"{given}-recovered",
            gradient_checkpointing=given, **OPTIONS,
        )  # fmt: skip
        digests.append(done.tensors_digest)
    assert digests[0] == digests[1]


def test_what_is_kept(model_directory: Factory) -> None:
    """Each layer but the last keeps what enters it alone, and is itself again afterwards."""
    model = load_model(model_directory("llama"))
    layers = list(model.get_submodule(describe(model).layers_path).children())
    ids = torch.arange(24)[None]

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            held = model(input_ids=ids, use_cache=False).logits
        del held
        return sum(sizes.values())

    plain = kept()
    with recomputing(layers):
        assert kept() < plain / 2
        assert all("forward" in vars(layer) for layer in layers[:-1])
    assert not any("forward" in vars(layer) for layer in layers)
    assert kept() == plain


def test_private_training_has_none(model_directory: Factory, text: Path) -> None:
    host = model_directory("llama")
    with pytest.raises(UsageError, match=r"with --gradient-checkpointing layers would show it twice; leave one"):
        train(extract(host, layers=(1, 3)), host=host, data=text, dp_epsilon=8.0, gradient_checkpointing=True)
