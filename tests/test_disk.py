"""Out of core: bytes are moved as they are, whatever lies around them, and nothing is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neurograft import remove, transplant
from neurograft.byte_moves import Bytes, FileRange, Held, NewFile, _Moves, link_file, write_files
from neurograft.errors import ModelError, OrganFileError, UsageError, VerificationError
from neurograft.files import file_sha256, tensor_digest
from neurograft.number_formats import converted, digest_pieces, held, load_piece
from neurograft.organ import Organ, read_manifest
from neurograft.record import read_record
from neurograft.tensor_files import NewTensorFile, read_tensor_file, write_tensor_files
from tiny import contents, load, logits, make_model, make_tokenizer

Patch = pytest.MonkeyPatch
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The recipient, with about a layer in each file."""
    make_model("llama", seed=1).save_pretrained(tmp_path / "sharded", max_shard_size="40kB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 7
    return tmp_path / "sharded"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(tensor_digest(a[name]) == tensor_digest(b[name]) for name in a)


def _some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = {str(dtype): torch.randint(0, 2, (3, 8), generator=generator).to(dtype) for dtype in DTYPES}
    return {**raw, "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "odd": torch.ones(3, dtype=torch.uint8)}


def test_files_are_those_that_safetensors_reads_and_writes(tmp_path: Path) -> None:
    tensors = _some_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = read_tensor_file(tmp_path / "theirs.safetensors")
    digests = write_tensor_files([NewTensorFile(tmp_path / "ours.safetensors", theirs.pieces, theirs.metadata)])
    assert _same(load_file(tmp_path / "ours.safetensors"), tensors)
    assert digests == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    pieces = {n: held(t) for n, t in tensors.items()}
    write_tensor_files([NewTensorFile(tmp_path / "held.safetensors", pieces, {"format": "pt"})])
    assert _same(load_file(tmp_path / "held.safetensors"), tensors)
    assert _same({name: load_piece(piece) for name, piece in theirs.pieces.items()}, tensors)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kernel_copies", [True, False])
@pytest.mark.parametrize("one_digest", [True, False])
def test_every_way_to_copy_gives_the_same_bytes(
    shares: bool, kernel_copies: bool, one_digest: bool, tmp_path: Path, monkeypatch: Patch
) -> None:
    def no(*_: Any) -> int:
        raise OSError(18, os.strerror(18))

    if not kernel_copies:
        monkeypatch.setattr(os, "copy_file_range", no)
    monkeypatch.setattr("neurograft.byte_moves.shares_blocks", lambda *_: shares)
    monkeypatch.setattr("neurograft.byte_moves.CHUNK", 1000)
    monkeypatch.setattr("neurograft.byte_moves._TASK", 3000)
    data = np.random.default_rng(0).bytes(12_345)
    (tmp_path / "a").write_bytes(data)
    order = [(100, 5000), (5100, 45), (0, 100), (6000, 6345)]
    sources: list[Bytes] = [*(FileRange(tmp_path / "a", *place) for place in order), Held(memoryview(b"wxyz"))]
    whole = hashlib.sha256()
    digests = [whole if one_digest else hashlib.sha256() for _ in sources]
    parts = list(zip(sources, digests, strict=True))
    counts: list[int] = []
    files = [NewFile(tmp_path / "b", b"abc", parts), NewFile(tmp_path / "c", b"", [])]
    write_files(files, counts.append)
    pieces = [data[s : s + n] for s, n in order] + [b"wxyz"]
    assert (tmp_path / "b").read_bytes() == b"abc" + b"".join(pieces) and (tmp_path / "c").read_bytes() == b""
    assert sum(counts) == files[0].size == len((tmp_path / "b").read_bytes())
    if one_digest:
        assert whole.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()
    else:
        assert [digest.hexdigest() for digest in digests] == [hashlib.sha256(piece).hexdigest() for piece in pieces]


def test_many_tensors_are_digested_by_several_threads_as_by_one(tmp_path: Path, monkeypatch: Patch) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {f"t{n}": torch.randn(n + 1, 7, generator=generator) for n in range(40)}
    tensors["t7"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "t.safetensors")
    pieces = read_tensor_file(tmp_path / "t.safetensors").pieces
    monkeypatch.setattr("neurograft.byte_moves._ALONE", 0)
    monkeypatch.setattr("neurograft.byte_moves._TASK", 500)
    assert digest_pieces(pieces) == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    with pytest.raises(OrganFileError, match="the tensor t7 has 1 values that are NaN"):
        digest_pieces(pieces, finite_in="x")


def test_a_source_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="became shorter"):
        write_files([NewFile(tmp_path / "b", b"", [(FileRange(tmp_path / "a", 50, 51), hashlib.sha256())])])


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_rounded_as_torch_rounds_them(source: torch.dtype, target: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(10_000, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-6, 4, (10_000,))
    tensor = values.to(source)
    assert torch.equal(load_piece(converted(held(tensor), held(torch.empty(1, dtype=target)).dtype)), tensor.to(target))


@pytest.mark.parametrize(("mode", "at"), [("insert", 0), ("insert", 3), ("insert", 6), ("replace", 2)])
def test_sharded_files_stay_what_they_are(mode: Any, at: int, organ: Organ, sharded: Path, tmp_path: Path) -> None:
    before = _tensors(sharded)
    order = [("r", i) for i in range(6)]
    order[at : at + 2 if mode == "replace" else at] = [("o", 0), ("o", 1)]
    expected = {name: tensor for name, tensor in before.items() if ".layers." not in name}
    for place, (source, layer) in enumerate(order):
        start = f"model.layers.{layer}." if source == "r" else f"layers.{layer}."
        held_by: Any = before if source == "r" else organ.tensors
        expected.update(
            {f"model.layers.{place}.{n.removeprefix(start)}": t for n, t in held_by.items() if n.startswith(start)}
        )
    transplant(organ, sharded, at=at, mode=mode, output=tmp_path / "out")
    assert _same(_tensors(tmp_path / "out"), expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    load(tmp_path / "out")
    remove(tmp_path / "out", output=tmp_path / "back")
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "back").glob("*.safetensors")) == names
    assert _same(_tensors(tmp_path / "back"), before)


def test_replacing_with_hard_links_writes_only_what_changes(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    before = contents(sharded)
    record = transplant(organ, sharded, at=2, mode="replace", link="hard", verify="written", output=tmp_path / "out")
    linked = [path.name for path in (tmp_path / "out").glob("*.safetensors") if path.stat().st_nlink > 1]
    assert len(linked) >= 3 and sorted(record.linked) == sorted(linked)
    assert record.tensors_digest is None and record.original_tensors_digest is None
    assert all(layer.digest for layer in record.layers if layer.organ)
    assert contents(sharded) == before
    shutil.rmtree(sharded)
    removal = remove(tmp_path / "out", link="hard", output=tmp_path / "back")
    assert removal.original_restored and removal.tensors_digest is None and removal.linked == sorted(linked)
    assert {n: d for n, (d, _) in contents(tmp_path / "back").items() if n in linked} == {
        n: before[n][0] for n in linked
    }
    assert torch.equal(logits(load(tmp_path / "back")), logits(make_model("llama", seed=1)))


def test_linked_files_are_digested_unless_that_is_declined(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    record = transplant(organ, sharded, at=2, mode="replace", link="hard", output=tmp_path / "out")
    copied = transplant(organ, sharded, at=2, mode="replace", link="copy", output=tmp_path / "copied")
    assert record.tensors_digest == copied.tensors_digest is not None and record.linked == {}
    assert remove(tmp_path / "out", output=tmp_path / "back").tensors_digest == record.original_tensors_digest


def test_a_linked_file_that_was_written_to_is_noticed(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    record = transplant(organ, sharded, at=2, mode="replace", link="hard", verify="written", output=tmp_path / "out")
    path = tmp_path / "out" / sorted(record.linked)[0]
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(VerificationError, match=f"{path.name} was linked and not read"):
        remove(tmp_path / "out", output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_reflinks_are_taken_where_there_are_any(
    organ: Organ, sharded: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    def clone(source: Path, target: Path) -> bool:
        shutil.copyfile(source, target)
        return True

    monkeypatch.setattr("neurograft.byte_moves._reflink", clone)
    monkeypatch.setattr("neurograft.byte_moves._sharing", {})
    record = transplant(organ, sharded, at=2, mode="replace", verify="written", output=tmp_path / "out")
    assert len(record.linked) >= 3
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").iterdir() if path.is_file())
    assert remove(tmp_path / "out", output=tmp_path / "back").original_restored


def test_links_across_file_systems_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", no)
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(UsageError, match="can't be hard-linked"):
        link_file(tmp_path / "a", tmp_path / "b", "hard")
    assert not (tmp_path / "b").exists()


def test_an_interruption_at_any_byte_leaves_nothing(
    organ: Organ, sharded: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("neurograft.byte_moves.CHUNK", 4096)
    written = 0
    advance = _Moves.advance

    for limit in range(0, 300_000, 37_777):
        written = 0

        def stop(self: _Moves, count: int, limit: int = limit) -> None:
            nonlocal written
            written += count
            if written > limit:
                raise KeyboardInterrupt
            advance(self, count)

        monkeypatch.setattr(_Moves, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            transplant(organ, sharded, at=2, mode="replace", output=tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_an_organ_that_changes_while_it_is_copied(
    organ_file: Path, recipient: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    from neurograft import model_files

    def meddle(*args: Any, **kwargs: Any) -> Any:
        content = bytearray(organ_file.read_bytes())
        content[-1] ^= 1
        organ_file.write_bytes(content)
        return original(*args, **kwargs)

    original = model_files.write_model
    monkeypatch.setattr("neurograft.transplantation.write_model", meddle)
    with pytest.raises(VerificationError, match=r"organ\.safetensors was changed while it was copied"):
        transplant(organ_file, recipient, at=1, mode="insert", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "y": {"dtype": "U8", "shape": [1]}},
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 70]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": 1}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": ["pt"]},
        {"x": [1]},
        {"x": None},
        [],
        7,
    ],
)
def test_headers_that_lie_are_refused(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match="can't be read as a safetensors file"):
        read_tensor_file(tmp_path / "x.safetensors")


_TWICE = b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"x":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'


@pytest.mark.parametrize("text", [_TWICE, b"[" * 200_000, b'{"x":' * 100_000, b"\xff\xfe", b"", b"NaN"])
def test_headers_that_are_no_headers_are_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match="can't be read as a safetensors file"):
        read_tensor_file(path)
    with pytest.raises(OrganFileError, match="is no safetensors file"):
        read_manifest(path)


@pytest.mark.parametrize("length", [0, 3, 8, 9, 2**63, 2**64 - 1])
def test_lengths_that_lie_take_no_memory(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little")[: max(length, 3)])
    with pytest.raises(ModelError, match="can't be read as a safetensors file"):
        read_tensor_file(path)


_PROGRAM = """
import json, pathlib, sys
import neurograft
organ = neurograft.extract(sys.argv[1], layers="2:4", verify="bytes", output=sys.argv[3] + "/o.safetensors")
neurograft.inspect(organ.path)
out = sys.argv[3] + "/out"
record = neurograft.transplant(organ.path, sys.argv[2], at=3, mode="insert", verify="bytes", output=out)
neurograft.remove(sys.argv[3] + "/out", output=sys.argv[3] + "/back")
loaded = sorted({"numpy"} & sys.modules.keys())
neurograft.check(organ.path, sys.argv[2])
try:
    neurograft.transplant(organ.path, sys.argv[2], at=99, mode="insert", output=sys.argv[3] + "/no")
except neurograft.errors.IncompatibleError as error:
    refusal = str(error)
status = pathlib.Path('/proc/self/status').read_text()
size = int(status.split('VmHWM:')[1].split()[0]) // 1000
loaded += sorted({"torch", "transformers"} & sys.modules.keys())
print(json.dumps([record.tensors_digest, size, loaded, refusal]))
"""


def test_moving_bytes_loads_no_torch_and_takes_little_memory(
    donor: Path, sharded: Path, organ: Organ, tmp_path: Path
) -> None:
    here = transplant(organ, sharded, at=3, mode="insert", output=tmp_path / "here")
    (tmp_path / "there").mkdir()
    environment = {**os.environ, "NEUROGRAFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", _PROGRAM, str(donor), str(sharded), str(tmp_path / "there")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    digest, megabytes, loaded, refusal = json.loads(done.stdout.splitlines()[-1])
    assert digest == here.tensors_digest and loaded == []
    assert megabytes < 300
    assert "position 99 is out of range" in refusal
    assert len(list((tmp_path / "cache" / "studies").iterdir())) >= 3
    assert file_sha256(tmp_path / "there" / "out" / "config.json") == here.config_digest
    assert read_record(tmp_path / "there" / "out") is not None
