"""Reading, splitting and packing text: nothing is dropped, nothing is kept that should not be, and errors name the
file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from neurograft.data import fingerprint, pack, read_documents, separator_token, split_documents, tokenize_documents
from neurograft.errors import DataError
from tiny import make_tokenizer


def _write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


LINES = '{"text": "one"}\n{"text": "two\\n\\nstill two"}\n{"text": " "}\n'
DOCUMENTS = ["one", "two\n\nstill two"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\nline two\n\n \t\nthree\r\n\r\nfour\n\n\n", ["one\nline two", "three", "four"]),
        ("bom.txt", "\ufeffone\n\ntwo", ["one", "two"]),
        ("a.txt.gz", gzip.compress(b"one\n\ntwo", mtime=0), ["one", "two"]),
        ("a.txt.zst", zstandard.compress(b"one\n\ntwo"), ["one", "two"]),
        ("a.jsonl", LINES, DOCUMENTS),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), DOCUMENTS),
        ("a.jsonl.zst", zstandard.compress(LINES.encode()), DOCUMENTS),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]), ["one", "two"]),
        ("lines.json", LINES, DOCUMENTS),
        ("A.JSONL", LINES, DOCUMENTS),
    ],
)
def test_files(name: str, content: Any, expected: list[str], tmp_path: Path) -> None:
    assert read_documents(_write(tmp_path / name, content)) == expected


def test_tables(tmp_path: Path) -> None:
    pandas.DataFrame({"id": [1, 2], "report": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet", text_column="report") == ["one", "two"]
    with pytest.raises(DataError, match=r"a\.parquet has no column text; it has id, report"):
        read_documents(tmp_path / "a.parquet")


def test_folders_are_read_in_order_and_hidden_files_passed_over(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", ".hidden/x.txt", ".x.txt", "notes.md"):
        _write(tmp_path / name, '{"text": "c"}' if name.endswith("jsonl") else name)
    assert read_documents(tmp_path) == ["c", "a/z.txt", "b.txt"]
    assert read_documents([tmp_path / "b.txt", tmp_path / "a"]) == ["b.txt", "c", "a/z.txt"]


def test_separator_and_encoding(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "Käse\n\nBrot\n---\nWein".encode("latin-1"))
    assert read_documents(path, document_separator="---", encoding="latin-1") == ["Käse\n\nBrot", "Wein"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "Käse".encode("latin-1"), r"is not encoded as utf-8 \(byte 0xe4 at offset 1\)"),
        ("a.jsonl", '{"text": "Käse"}'.encode("latin-1"), "is not encoded as utf-8"),
        ("a.txt", b" \n\n\t", "there is no text in"),
        ("a.txt", b"", "there is no text in"),
        ("a.jsonl", b"", "there is no text in"),
        ("a.jsonl", b"{nope", "can't be read"),
        ("a.jsonl", b'{"body": "x"}', "has no column text; it has body"),
        ("a.jsonl", b'{"text": 3}', "holds int values, not text"),
        ("a.parquet", b"no parquet", "can't be read"),
        ("a.jsonl.gz", b"no gzip", "can't be read"),
        ("a.csv", b"text", "is of an unknown kind; the known are .txt"),
    ],
)
def test_unreadable_files_are_named(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(DataError, match=reason) as caught:
        read_documents(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "no.txt", "there is no file or folder"),
        ("/dev/null", "/dev/null is a pipe or a device; text is read from files and folders"),
        (tmp_path / "empty", "holds no .txt"),
        ("org/data", "the Hub did not give it"),
    ]
    for path, reason in cases:
        with pytest.raises(DataError, match=reason):
            read_documents(path)
    with pytest.raises(DataError, match="LATIN-99 is no encoding"):
        read_documents(_write(tmp_path / "a.txt", "x"), encoding="LATIN-99")


def test_private_text_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    _write(tmp_path / "data" / "a.jsonl", '{"text": "Patientin Müller"}')
    _write(tmp_path / "data" / "b.txt", "Patientin Müller")
    assert len(read_documents(tmp_path / "data")) == 2
    copies = [path for path in cache.rglob("*") if path.is_file() and b"Patientin" in path.read_bytes()]
    assert copies == []


@given(st.lists(st.text(min_size=1), min_size=2, max_size=50), st.floats(0.01, 0.99), st.integers(0, 5))
def test_splitting_loses_and_doubles_nothing(documents: list[str], held_out: float, seed: int) -> None:
    training, evaluation = split_documents(documents, held_out=held_out, seed=seed)
    assert training and evaluation
    assert sorted(training + evaluation) == sorted(documents)
    assert (training, evaluation) == split_documents(documents, held_out=held_out, seed=seed)


def test_what_can_not_be_split() -> None:
    with pytest.raises(DataError, match="1 document can't be split"):
        split_documents(["one"])
    with pytest.raises(DataError, match=r"the held-out share is 1\.0"):
        split_documents(["one", "two"], held_out=1.0)


@given(st.lists(st.lists(st.integers(2, 90), max_size=30), min_size=1, max_size=12), st.integers(2, 17))
def test_packing_keeps_every_token_and_every_boundary(documents: list[list[int]], length: int) -> None:
    if not any(documents):
        with pytest.raises(DataError, match="no tokens"):
            pack(documents, sequence_length=length, separator_id=1)
        return
    packed = pack(documents, sequence_length=length, separator_id=1)
    expected = [token for document in documents for token in (*document, 1)]
    rows = packed.input_ids[packed.labels != -100].tolist()
    assert rows == expected == packed.labels[packed.labels != -100].tolist()
    assert packed.tokens == len(expected)
    assert packed.input_ids.shape == (-(-len(expected) // length), length)
    assert (packed.labels != -100).flatten().tolist() == [True] * len(expected) + [False] * (-len(expected) % length)


def test_tokens(tokenizer: Any) -> None:
    assert tokenize_documents(["ab", "c"], tokenizer) == [[2, 3], [4]]
    assert tokenize_documents([], tokenizer) == []


def test_text_that_the_tokenizer_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer("abc")
    with pytest.raises(DataError, match="knows nothing of the text: each of its 5 tokens is <unk>"):
        tokenize_documents(["xyz", "zz"], tokenizer)
    assert tokenize_documents(["abzz"], tokenizer) == [[2, 3, 0, 0]] and not caplog.records
    tokenize_documents(["azz"], tokenizer)
    assert caplog.messages == ["67 % of the text's tokens are unknown to the tokenizer"]
    assert separator_token(tokenizer) == tokenizer.eos_token_id
    tokenizer_without = type("None", (), {})()
    with pytest.raises(DataError, match="no end-of-text token"):
        separator_token(tokenizer_without)


def test_fingerprint_knows_order_and_boundaries() -> None:
    prints = {fingerprint(documents) for documents in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a"])}
    assert len(prints) == 5


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo")
    with pytest.raises(DataError, match="separator is empty"):
        read_documents(tmp_path / "text.txt", document_separator="")
