"""Freed memory stays with the process only while it is asked to, and what the C library needs for that is said once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neurograft import allocator
from neurograft.allocator import give_back_mapped, keeping_freed_memory, merging_environment
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_pages_of_a_mapped_file_go_back_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * (1 << 18))  # 64 MiB
    mapped = torch.from_file(str(path), size=1 << 26, dtype=torch.uint8)
    given_up, kept, own = mapped[1000 : 1 << 25], mapped[1 << 25 :], torch.ones(1 << 20)
    total, before = int(mapped.sum(dtype=torch.int64)), resident()
    give_back_mapped([given_up, own])
    assert 24 << 20 < before - resident() < 40 << 20
    assert int(mapped.sum(dtype=torch.int64)) == total
    assert int(own.sum()) == 1 << 20 and int(kept[0]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_what_was_changed_in_memory_stays(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(1 << 24))
    mapped = torch.from_file(str(path), size=1 << 24, dtype=torch.uint8)
    mapped[1 << 23] = 3
    give_back_mapped([mapped])
    assert int(mapped.sum()) == 3


def test_nothing_is_given_back_of_other_tensors() -> None:
    give_back_mapped([torch.ones(3, device="meta"), torch.ones(1 << 16).view(256, 256).T, torch.ones(0)])


TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("glibc 2.36", None, TUNABLES),
        ("glibc 2.36", "glibc.malloc.check=1", f"glibc.malloc.check=1:{TUNABLES}"),
        ("glibc 2.36", "glibc.malloc.tcache_count=3", None),
        ("glibc 2.39", None, None),
        ("glibc 2.100", None, None),
        ("", None, None),
        ("musl", None, None),
    ],
)
def test_only_where_it_is_needed_and_not_said(
    version: str, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: version, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert merging_environment() == ({} if expected is None else {"GLIBC_TUNABLES": expected})


def test_elsewhere_there_is_no_such_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown, raising=False)
    assert merging_environment() == {}


def test_a_program_starts_anew_once_with_the_same_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\nfrom neurograft.allocator import start_again_merging\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\nstart_again_merging()\n"
    )
    command = [sys.executable, "-X", "utf8", str(script), "a b", "--c"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == (2 if merging_environment() else 1)
    if len(lines) == 2:
        assert lines[1] == lines[0].replace("None", TUNABLES)


@pytest.mark.skipif(not merging_environment(), reason="this C library merges what is freed by itself")
def test_the_command_that_trains_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from what the process that refuses the arguments was started with."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    seen = tmp_path / "seen.txt"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nopen({str(seen)!r}, 'a').write(os.environ.get('GLIBC_TUNABLES', 'none') + '\\n')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    for arguments, expected in ((["inspect", "nowhere"], ["none"]), (["train", "nowhere"], ["none", TUNABLES])):
        seen.write_text("")
        command = [sys.executable, "-m", "neurograft", *arguments]
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 2
        assert seen.read_text().splitlines() == expected


def test_a_program_that_cannot_start_anew_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(os, "execve", fail)
    monkeypatch.setattr(allocator, "merging_environment", lambda: {"GLIBC_TUNABLES": TUNABLES})
    allocator.start_again_merging()
