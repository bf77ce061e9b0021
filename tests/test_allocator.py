"""Freed memory stays with the process only while it is asked to."""

from __future__ import annotations

import sys

import pytest
import torch

from neurograft.allocator import keeping_freed_memory
from neurograft.training.measuring import _resident_peak


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_memory_goes_back_afterwards() -> None:
    before = resident()
    with keeping_freed_memory():
        block = torch.ones(64 << 20)  # 256 MiB
        assert resident() - before > 200 << 20
        del block
    assert resident() - before < 100 << 20
    assert _resident_peak() >= before


def test_it_ends_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), keeping_freed_memory():
        raise ZeroDivisionError
