"""The cache can be seen and cleared, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

import neurograft


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "cache"))
    for name in ("gguf/abc/model.safetensors", "prefix/def/states.bin", "something/else.bin"):
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1000)
    return tmp_path / "cache"


def test_listing_changes_nothing(folder: Path) -> None:
    report = neurograft.cache()
    assert [(entry.kind, entry.name, entry.bytes) for entry in report.entries] == [
        ("gguf", "abc", 1000),
        ("prefix", "def", 1000),
    ]
    assert len(list(folder.rglob("*.*"))) == 3 and not report.cleared


@pytest.mark.parametrize(("clear", "left"), [("prefix", ["else.bin", "model.safetensors"]), ("all", ["else.bin"])])
def test_clearing_deletes_only_what_is_asked_for(clear: str, left: list[str], folder: Path) -> None:
    assert neurograft.cache(clear=clear).cleared  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.rglob("*.*")) == left


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "none"))
    assert neurograft.cache(clear="all").entries == []
    assert not (tmp_path / "none").exists()
