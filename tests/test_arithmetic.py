"""How matrices are multiplied: float32 stays float32, and nothing stays changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import neurograft
from neurograft import arithmetic
from neurograft.arithmetic import Arithmetic, choose_arithmetic

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_times(**seconds: float) -> None:
        found = {name.replace("_", "-"): taken for name, taken in seconds.items()}
        monkeypatch.setattr(arithmetic, "_measured", lambda _: found)

    return set_times


def test_float32_is_as_exact_whichever_library_computes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 300, generator=generator), torch.randn(80, 300, generator=generator)
    exact = a.double() @ b.double().T
    with choose_arithmetic("float32", CPU).active(CPU):
        product = torch.nn.functional.linear(a, b)
    assert product.dtype == torch.float32
    assert (product.double() - exact).norm() / exact.norm() < 1e-6
    with Arithmetic("bfloat16").active(CPU):
        rounded = torch.nn.functional.linear(a, b)
    assert rounded.dtype == torch.bfloat16
    assert 1e-4 < (rounded.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(
    ("seconds", "automatic", "exact"),
    [
        ({"float32": 1.0, "float32_onednn": 0.5, "bfloat16": 0.2}, "bfloat16", "float32-onednn"),
        ({"float32": 1.0, "float32_onednn": 0.5, "bfloat16": 0.45}, "float32-onednn", "float32-onednn"),
        ({"float32": 1.0, "float32_onednn": 0.95, "bfloat16": 2.0}, "float32", "float32"),
        ({"float32": 1.0, "bfloat16": 0.5}, "bfloat16", "float32"),
    ],
)
def test_the_fastest_is_chosen_where_it_is_worth_it(
    seconds: dict[str, float], automatic: str, exact: str, timed: Any
) -> None:
    timed(**seconds)
    assert choose_arithmetic("auto", CPU).kernels == automatic
    assert choose_arithmetic("float32", CPU).kernels == exact
    assert choose_arithmetic("bfloat16", CPU).kernels == "bfloat16"


@pytest.mark.parametrize("kernels", ["float32", "float32-onednn", "bfloat16"])
def test_nothing_stays_changed(kernels: Any) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), Arithmetic(kernels).active(CPU):
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    assert not torch.is_autocast_enabled("cpu")


def test_what_is_measured_is_what_can_be_chosen() -> None:
    found = arithmetic._measured("cpu")
    assert {"float32", "bfloat16"} <= set(found) <= {"float32", "float32-onednn", "bfloat16"}
    assert all(0 < taken < 60 for taken in found.values())


def test_what_was_measured_once_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path))
    times: list[dict[Any, float]] = [{"float32": 1.0, "bfloat16": 0.1}, {"float32": 0.1, "bfloat16": 1.0}]
    monkeypatch.setattr(arithmetic, "_measure", lambda _: times.pop(0))
    for _ in range(2):  # as two processes do
        arithmetic._measured.cache_clear()
        assert choose_arithmetic("auto", CPU).kernels == "bfloat16"
    (note,) = (tmp_path / "arithmetic").iterdir()
    assert [entry.name for entry in neurograft.cache().entries] == [note.name]
    note.write_text('{"float32": "soon"}')  # what can't be read is measured anew
    arithmetic._measured.cache_clear()
    assert choose_arithmetic("auto", CPU).kernels == "float32"
    arithmetic._measured.cache_clear()


def test_a_cache_that_can_not_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arithmetic").write_text("a file in its place")
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path))
    arithmetic._measured.cache_clear()
    assert choose_arithmetic("float32", CPU).kernels in ("float32", "float32-onednn")
    arithmetic._measured.cache_clear()
