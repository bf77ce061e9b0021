"""GGUF files that are not what they say: each is one sentence, before `gguf` or transformers takes memory for it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from gguf_writer import convert
from neurograft import extract
from neurograft.errors import ModelError
from neurograft.gguf_header import read_gguf_header
from neurograft.models import resolve

COUNTS, KEYS = 8, 24
"""Where the numbers of tensors and values stand, and where the first key begins."""


@pytest.fixture(scope="module")
def whole(recipient: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    convert(recipient, path)
    return path.read_bytes()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "altered.gguf"


def _value_at(data: bytes, key: str) -> int:
    """Return where the value of a key begins, after its type."""
    return data.index(key.encode()) + len(key) + 4


def _put(data: bytes, place: int, form: str, number: int) -> bytes:
    packed = struct.pack(f"<{form}", number)
    return data[:place] + packed + data[place + len(packed) :]


def _after_name(data: bytes, name: str) -> int:
    return data.index(name.encode()) + len(name)


def test_a_header_says_what_is_there(whole: bytes, file: Path, recipient: Path) -> None:
    import gguf

    file.write_bytes(whole)
    header, theirs = read_gguf_header(file), gguf.GGUFReader(file).tensors
    assert header.values["general.architecture"] == "llama" and header.kinds == "F32"
    assert {name: (each.elements, each.start, each.size) for name, each in header.tensors.items()} == {
        each.name: (int(each.n_elements), int(each.data_offset), int(each.n_bytes)) for each in theirs
    }


def test_bytes_in_the_other_order_are_read(file: Path) -> None:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(file, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(0)
    writer.add_tensor("some", numpy.ones((2, 3), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf_header(file).tensors["some"].elements == 6


@pytest.mark.parametrize("count", [2**31, 2**60, 2**64 - 1])
def test_counts_that_no_file_can_hold(count: int, whole: bytes, file: Path) -> None:
    tokens = _value_at(whole, "tokenizer.ggml.tokens") + 4
    for place in (COUNTS, COUNTS + 8, KEYS, tokens):
        file.write_bytes(_put(whole, place, "Q", count))
        with pytest.raises(
            ModelError, match=r"altered\.gguf can't be read as a GGUF file: (it ends|its arrays have more)"
        ):
            resolve(file)


def test_arrays_of_numbers_beyond_the_end(whole: bytes, file: Path) -> None:
    types = _value_at(whole, "tokenizer.ggml.token_type")  # of these, `gguf` reads as many as it is told
    for count, said in ((2**21, "it ends within its header"), (2**22 + 1, "its arrays have more than 4,194,304")):
        file.write_bytes(_put(whole, types + 4, "Q", count))
        with pytest.raises(ModelError, match=said):
            resolve(file)
    file.write_bytes(_put(whole, types, "I", 9))
    with pytest.raises(ModelError, match="an array in it holds arrays"):
        resolve(file)


def test_tensors_that_are_not_where_they_should_be(whole: bytes, file: Path) -> None:
    shape = _after_name(whole, "blk.2.ffn_up.weight")
    kind, offset = shape + 4 + 16, shape + 4 + 16 + 4
    cases = [
        (shape, "I", 9, "the tensor blk.2.ffn_up.weight has 9 dimensions, and 4 are the most"),
        (shape + 4, "Q", 2**62, "the tensor blk.2.ffn_up.weight should end at byte"),
        (kind, "I", 77, "has numbers of an unknown type"),
        (kind, "I", 14, "the rows of the tensor blk.2.ffn_up.weight are no whole blocks of Q6_K"),
        (offset, "Q", 0, "begins within another"),
        (offset, "Q", 2**40, "should end at byte"),
    ]
    for place, form, number, said in cases:
        file.write_bytes(_put(whole, place, form, number))
        with pytest.raises(ModelError, match=said):
            resolve(file)


def test_a_model_that_its_tensors_cannot_fill(whole: bytes, file: Path) -> None:
    cases = [
        ("llama.block_count", 7, "llama.block_count is 7, and it holds tensors of 6 layers"),
        ("llama.block_count", 2**31, "it holds tensors of 6 layers"),
        ("llama.embedding_length", 2**31, "its largest tensor has"),
        ("llama.rope.dimension_count", 2**31, "its largest tensor has"),
        ("llama.feed_forward_length", 2000, "describes a model of .* parameters, and its tensors have"),
    ]
    for key, number, said in cases:
        file.write_bytes(_put(whole, _value_at(whole, key), "I", number))
        with pytest.raises(ModelError, match=said):
            resolve(file)


@pytest.mark.parametrize("verify", ["bytes", "layers"])
def test_a_tensor_that_is_missing_is_not_made_up(verify: str, whole: bytes, file: Path, tmp_path: Path) -> None:
    file.write_bytes(whole.replace(b"blk.2.ffn_up.weight", b"blk.2.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 of its model's tensors, such as model\.layers\.2\.mlp\.up_proj"):
        extract(file, layers="2:4", verify=verify)  # type: ignore[arg-type]
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_files_that_end_early(whole: bytes, file: Path) -> None:
    for length in (4, 8, 20, 1000, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="can't be read as a GGUF file"):
            resolve(file)
