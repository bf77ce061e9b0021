"""Logs hold a run's numbers and no word of its text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neurograft import train
from neurograft.errors import UsageError
from neurograft.organ import Organ

SECRET = "Zaphodxylitis"
OPTIONS: dict[str, Any] = {"steps": 4, "sequence_length": 16, "batch_size": 2, "evaluations": 2, "lr": 1e-3}
NAMES = {"loss", "learning_rate", "tokens_per_second", "held_out_perplexity"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "reports.jsonl"
    path.write_text("".join(json.dumps({"text": f"report {n}: {SECRET} of grade {n % 4}"}) + "\n" for n in range(20)))
    return path


def _refuse_text(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content and str(folder.parent).encode() not in content


def test_tensorboard(donor: Path, organ: Organ, text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "logs"
    trained = train(organ, host=donor, data=text, log_to="tensorboard", log_dir=folder, **OPTIONS)
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    assert set(events.Tags()["scalars"]) == NAMES
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    held_out = events.Scalars("held_out_perplexity")
    assert [event.step for event in held_out] == [0, 2, 4]
    assert held_out[0].value == pytest.approx(trained.manifest.evaluations[0].before)
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-3)
    _refuse_text(folder)
    assert trained.manifest.training is not None and "log_dir" not in trained.manifest.training.hyperparameters


def test_trackio_through_the_command_line(donor: Path, organ_file: Path, text: Path, tmp_path: Path) -> None:
    import sqlite3

    folder = tmp_path / "logs"
    command = [sys.executable, "-m", "neurograft", "train", str(organ_file), "--host", str(donor), "--data", str(text)]
    command += ["-o", str(tmp_path / "o.safetensors"), "--log-to", "trackio", "--log-dir", str(folder), "--json"]
    command += [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    json.loads(result.stdout)  # and nothing of trackio's beside it
    (file,) = folder.glob("*.db")
    rows = [json.loads(row) for (row,) in sqlite3.connect(file).execute("select metrics from metrics")]
    assert {name for row in rows for name in row} == NAMES
    _refuse_text(folder)


def test_what_is_not_installed(donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"needs a package that is not installed: pip install 'neurograft\[trackio\]'"):
        train(organ, host=donor, data=text, log_to="trackio", **OPTIONS)


def test_nothing_is_logged_unasked(
    donor: Path, organ: Organ, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(organ, host=donor, data=text, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["reports.jsonl"]


def test_logs_go_into_a_folder(organ: Organ, donor: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="is a file; give a folder"):
        train(organ, host=donor, data=text, log_to="tensorboard", log_dir=text, **OPTIONS)


def test_a_step_goes_over_the_text_once(organ: Organ, donor: Path, text: Path) -> None:
    with pytest.raises(UsageError, match=r"an optimizer step would take 5000 x \d+ sequences, and the text fills"):
        train(organ, host=donor, data=text, **{**OPTIONS, "accumulate": 5000})
