"""Compiled layers learn what plain ones do, only where that pays, and leave the model as it was."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import extract, train
from neurograft.errors import NeurograftError, UsageError
from neurograft.files import tensors_digest
from neurograft.organ import Organ
from neurograft.training import compiling
from neurograft.training.loop import TrainingProgress
from neurograft.training.options import parse_options

OPTIONS: dict[str, Any] = {
    "epochs": 3,
    "sequence_length": 16,
    "batch_size": 2,
    "evaluations": 3,
    "patience": 9,
    "precision": "float32",
}
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with a C++ compiler"),
    pytest.mark.xdist_group("compiling"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = (" ".join(generator.choices(["liver", "kidney", "heart", "lung"], k=12)) for _ in range(12))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def host(model_directory: Factory) -> Path:
    return model_directory("llama")


@pytest.fixture(scope="module")
def organ(host: Path) -> Organ:
    return extract(host, layers=(1, 3), name="tiny")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests have compiled; kept between them, since it takes long."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def anew(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing count that was compiled for other layers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _losses(organ: Organ) -> list[float]:
    assert organ.manifest.training is not None
    return [loss for _, loss in organ.manifest.training.loss_history]


def _settings(organ: Organ) -> dict[str, Any]:
    assert organ.manifest.training is not None
    return organ.manifest.training.hyperparameters


@pytest.mark.parametrize("changes", [{"cache_prefix": "always"}, {"rank": 2, "vocabulary": "sampled"}])
def test_compiled_layers_learn_what_plain_ones_do(
    changes: dict[str, Any], organ: Organ, host: Path, text: Path
) -> None:
    plain = train(organ, host=host, data=text, **{**OPTIONS, **changes, "compile": "never"})
    compiled = train(organ, host=host, data=text, **{**OPTIONS, **changes, "compile": "always"})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert _losses(compiled) == pytest.approx(_losses(plain), rel=1e-4)
    assert _losses(compiled)[0] > _losses(compiled)[-1]
    assert (_settings(plain)["compiled"], _settings(compiled)["compiled"]) == (False, True)


def test_auto_compiles_where_the_rest_takes_long(
    organ: Organ, host: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = train(organ, host=host, data=text, **OPTIONS)
    assert _settings(short)["compiled"] is False
    monkeypatch.setattr(compiling, "_WORTH_SECONDS", 0.0)
    assert _settings(train(organ, host=host, data=text, **OPTIONS))["compiled"] is True


@pytest.mark.parametrize("step", [2, 9])
def test_a_compiled_run_that_goes_on_is_an_uninterrupted_one(
    step: int, organ: Organ, host: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_WORTH_SECONDS", 0.0)
    whole = train(organ, host=host, data=text, **OPTIONS)

    def stop(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    output = tmp_path / "o.safetensors"
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        train(organ, host=host, data=text, output=output, progress=stop, **OPTIONS)
    if step > compiling._TIMED:  # what was decided is kept to, whatever would be decided now
        monkeypatch.setattr(compiling, "_WORTH_SECONDS", 1e9)
    again = train(organ, host=host, data=text, output=output, **OPTIONS)
    assert tensors_digest(again.tensors) == tensors_digest(whole.tensors)


def test_without_a_compiler(
    organ: Organ, host: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing"))
    plain = train(organ, host=host, data=text, **{**OPTIONS, "compile": "never"})
    monkeypatch.setattr(compiling, "_WORTH_SECONDS", 0.0)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with caplog.at_level(logging.WARNING, "neurograft"):
            found = train(organ, host=host, data=text, **OPTIONS)
        assert "the layers can't be compiled (InvalidCxxCompiler" in caplog.text
        assert tensors_digest(found.tensors) == tensors_digest(plain.tensors)
        with pytest.raises(NeurograftError, match=r"can't be compiled \(InvalidCxxCompiler.*leave --compile at auto"):
            train(organ, host=host, data=text, **{**OPTIONS, "compile": "always"})


def test_private_training_does_not_compile() -> None:
    with pytest.raises(UsageError, match="compiled layers show no gradients of single documents"):
        parse_options(dp_epsilon=3.0, compile="always")
