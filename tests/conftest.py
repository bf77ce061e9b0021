"""Shared by all tests: no network, no cache outside the test, one thread, and tiny models that are made once."""

from __future__ import annotations

import os
import runpy
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments import write_gates
from neurograft import deploy, extract
from neurograft.organ import Organ
from tiny import make_tokenizer, save_model

Factory = Callable[..., Path]

# Here, and in every process that a test starts, connections to anything but this machine are refused.
OFFLINE = Path(__file__).parent / "offline"
runpy.run_path(str(OFFLINE / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Let no test draw numbers that depend on which tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "neurograft-cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))  # no trust.toml of the user's
    monkeypatch.delenv("NEUROGRAFT_TRUST", raising=False)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Return a function that gives the directory of a tiny model, made once for each kind, seed and change."""
    made: dict[str, Path] = {}

    def get(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
        key = f"{kind}-{seed}-{changes}"
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(kind), kind, seed=seed, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def donor(model_directory: Factory) -> Path:
    return model_directory("llama", seed=0)


@pytest.fixture(scope="session")
def recipient(model_directory: Factory) -> Path:
    return model_directory("llama", seed=1)


@pytest.fixture(scope="session")
def organ(donor: Path) -> Organ:
    return extract(donor, layers=(2, 4), name="tiny")


@pytest.fixture
def organ_file(organ: Organ, tmp_path: Path) -> Path:
    path = tmp_path / "organ.safetensors"
    organ.save(path)
    return path


@pytest.fixture(scope="session")
def _deployed(tmp_path_factory: pytest.TempPathFactory, recipient: Path, organ: Organ) -> Path:
    folder = tmp_path_factory.mktemp("deployed")
    assert deploy(organ, to=folder / "hospital", recipient=recipient, gates=write_gates(folder), at=1).deployed
    return folder / "hospital"


@pytest.fixture
def hospital(_deployed: Path, tmp_path: Path) -> Path:
    """A deployment: version 1 is the recipient, version 2 has the organ and is deployed."""
    return Path(shutil.copytree(_deployed, tmp_path / "hospital", symlinks=True))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], list[str]]:
    """Return a function that lists everything below the test's folder, hidden files too."""
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
