"""Verbs that run in one process say so where a launcher started several."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurograft.errors import UsageError
from neurograft.training.comparison import compare


def test_verbs_of_one_process_refuse_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"^compare runs in one process; start"):
        compare(tmp_path, data=tmp_path, output=tmp_path / "out", tokens=100)
    assert not list(tmp_path.iterdir())
