"""An interrupted training run goes on where it stood, and ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import Factory
from neurograft import extract, train
from neurograft.errors import UsageError
from neurograft.files import tensors_digest
from neurograft.organ import Organ, read_organ
from neurograft.training.loop import TrainingProgress
from neurograft.training.run_state import state_path

OPTIONS: dict[str, Any] = {"epochs": 3, "sequence_length": 16, "batch_size": 2, "evaluations": 3, "patience": 9}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = (" ".join(generator.choices(["liver", "kidney", "heart", "lung"], k=12)) for _ in range(12))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def host(model_directory: Factory) -> Path:
    """A model with dropout, so that the state of the random generator counts."""
    return model_directory("gpt2", resid_pdrop=0.3)


@pytest.fixture(scope="module")
def organ(host: Path) -> Organ:
    return extract(host, layers=(2, 4), name="tiny")


def _stop_at(step: int) -> Any:
    def stop(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (1, {}),
        (5, {}),
        (13, {}),
        (5, {"optimizer": "muon", "average": 0.9, "anchor": 3.0}),
        (5, {"rank": 2, "vocabulary": "sampled"}),
    ],
)
def test_interrupted_and_gone_on_is_uninterrupted(
    step: int, changes: dict[str, Any], organ: Organ, host: Path, text: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, **changes}
    whole = train(organ, host=host, data=text, **options)
    output = tmp_path / "o.safetensors"
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {step} of \d+; the same command goes on"):
        train(organ, host=host, data=text, output=output, progress=_stop_at(step), **options)
    assert state_path(output).is_file() and not output.exists()
    left = tmp_path / f".{state_path(output).name}.0a1b2c3d.tmp"  # by a process that was killed while it wrote a state
    left.mkdir()
    (left / state_path(output).name).write_bytes(b"half of it")
    steps: list[int] = []
    again = train(organ, host=host, data=text, output=output, progress=lambda p: steps.append(p.step), **options)
    assert steps[0] == step + 1 and [path.name for path in tmp_path.iterdir()] == [output.name]
    assert tensors_digest(again.tensors) == tensors_digest(whole.tensors)
    assert again.manifest.training is not None and whole.manifest.training is not None
    assert again.manifest.training.loss_history == whole.manifest.training.loss_history
    assert again.manifest.evaluations == whole.manifest.evaluations


def test_killed_at_any_moment(organ: Organ, host: Path, text: Path, tmp_path: Path) -> None:
    whole = train(organ, host=host, data=text, **{**OPTIONS, "epochs": 4})
    organ.save(tmp_path / "organ.safetensors")
    output = tmp_path / "o.safetensors"
    command = [sys.executable, "-m", "neurograft", "train", str(tmp_path / "organ.safetensors"), "--host", str(host)]
    command += ["--data", str(text), "-o", str(output), "--checkpoint-every", "0.1", "--json"]
    options = {**OPTIONS, "epochs": 4}
    command += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state_path(output).exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state_path(output).is_file() and not output.exists()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["tensors_digest"] == read_organ(output).manifest.tensors_digest
    assert tensors_digest(read_organ(output).tensors) == tensors_digest(whole.tensors)
    assert not state_path(output).exists()


def test_a_state_of_another_run_is_refused(organ: Organ, host: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(organ, host=host, data=text, output=output, progress=_stop_at(2), **OPTIONS)
    with pytest.raises(UsageError, match=r"o\.safetensors\.resume is what an interrupted run with other options"):
        train(organ, host=host, data=text, output=output, **{**OPTIONS, "lr": 2e-3})
    assert state_path(output).is_file()
    state_path(output).write_bytes(b"something else")
    with pytest.raises(UsageError, match="is not what an interrupted training run leaves; delete it"):
        train(organ, host=host, data=text, output=output, **OPTIONS)


@pytest.mark.parametrize("cache", ["always", "auto"])
def test_with_and_without_cached_hidden_states_the_organ_is_the_same(
    cache: str, organ: Organ, host: Path, text: Path
) -> None:
    plain = train(organ, host=host, data=text, **{**OPTIONS, "cache_prefix": "never"})
    for _ in range(2):  # the second run reads what the first one wrote
        cached = train(organ, host=host, data=text, **{**OPTIONS, "cache_prefix": cache})
        assert _distance(plain, cached) < 1e-5
    rounded = train(organ, host=host, data=text, **{**OPTIONS, "cache_prefix": cache, "cache_dtype": "bfloat16"})
    assert 0 < _distance(plain, rounded) < 2e-2


def _distance(a: Organ, b: Organ) -> float:
    """Return the largest difference between two organs' perplexities, as a share."""
    pairs = zip(a.manifest.evaluations, b.manifest.evaluations, strict=True)
    return max(abs(x.after / y.after - 1) for x, y in pairs)
