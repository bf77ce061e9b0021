"""Files altered at random: each reader takes them or refuses them in one sentence, and writes nothing anywhere.

`make fuzz` alters many more of them.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mutations import alter
from readers import Reader, make_readers, read

MOST_MEMORY = 64 << 20


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    readers, folder = make_readers(tmp_path_factory.mktemp("examples")), tmp_path_factory.mktemp("warm")
    for reader in readers:  # what they import is no memory that a file takes
        read(reader, reader.seed, folder)
    return {reader.name: reader for reader in readers}


NAMES = [
    "manifest of an organ", "organ", "header of a model file", "surgical record", "what a verb measured",
    "index of a model", "entry of a bank", "state of an interrupted run", "history of a deployment", "signatures",
    "public key", "trust.toml", "gates", "search spaces", "canaries", "tag in a bank", "header of a GGUF file",
]  # fmt: skip
SLOW = ["model in a GGUF file"]


def test_each_reader_is_fuzzed(all_readers: dict[str, Reader]) -> None:
    assert list(all_readers) == [*NAMES, *SLOW]


@pytest.mark.parametrize("name", [*NAMES, *SLOW])
def test_whole_files_are_taken(name: str, all_readers: dict[str, Reader], tmp_path: Path) -> None:
    assert read(all_readers[name], all_readers[name].seed, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@given(number=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_altered_files_are_taken_or_refused(
    name: str, number: int, all_readers: dict[str, Reader], tmp_path: Path, listing: Callable[[], list[str]]
) -> None:
    reader, before = all_readers[name], listing()
    tracemalloc.start()
    read(reader, alter(reader.seed, number), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_MEMORY
    assert listing() == before


@pytest.mark.parametrize(
    ("name", "number"),
    [("organ", 2130), ("index of a model", 11013), ("public key", 197), ("public key", 303), ("gates", 65)],
)
def test_what_was_found_before(name: str, number: int, all_readers: dict[str, Reader], tmp_path: Path) -> None:
    assert not read(all_readers[name], alter(all_readers[name].seed, number), tmp_path)
