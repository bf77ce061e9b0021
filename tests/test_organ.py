"""The organ file: what goes in comes out, and nothing that was altered is believed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from neurograft import extract, inspect
from neurograft.errors import OrganFileError, UsageError
from neurograft.number_formats import digest_pieces
from neurograft.organ import METADATA_KEY, Organ, read_organ

Listing = Callable[[], list[str]]
Patch = pytest.MonkeyPatch


def test_round_trip(organ: Organ, organ_file: Path) -> None:
    again = read_organ(organ_file)
    assert again.tensors.keys() == organ.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in organ.tensors.items())
    assert again.manifest.source == organ.manifest.source
    assert inspect(organ_file) == again.manifest


def test_one_organ_always_gives_the_same_bytes(organ: Organ, tmp_path: Path) -> None:
    for name in ("a", "b"):
        organ.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    name=st.from_regex(r"\Alayers\.0\.[a-z_.]{1,20}\Z"),
    description=st.text(max_size=200),
)
@settings(max_examples=40, deadline=None)
def test_any_tensor_survives(organ: Organ, dtype: Any, shape: list[int], name: str, description: str) -> None:
    tensor = (torch.arange(64)[: int(torch.tensor(shape).prod())].reshape(shape) % 100).to(dtype)
    manifest = organ.manifest.model_copy(update={"description": description})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.safetensors"
        Organ(manifest, {name: tensor}).save(path)
        again = read_organ(path)
    assert again.tensors[name].dtype == dtype and torch.equal(again.tensors[name], tensor)
    assert again.manifest.description == description


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_altered_byte_is_refused(organ: Organ, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "organ.safetensors"
        organ.save(path)
        content = bytearray(path.read_bytes())
        header = struct.unpack("<Q", content[:8])[0] + 8
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(OrganFileError, match=r"organ\.safetensors"):
            read_organ(path)


@given(length=st.integers(0, 2000))
@settings(max_examples=40, deadline=None)
def test_a_truncated_file_is_refused(organ: Organ, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "organ.safetensors"
        organ.save(path)
        content = path.read_bytes()
        path.write_bytes(content[: length if length % 2 else len(content) - 1 - length])
        with pytest.raises(OrganFileError, match=r"truncated|no safetensors"):
            read_organ(path)


def test_bytes_behind_the_end_are_refused(organ_file: Path) -> None:
    with organ_file.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(OrganFileError, match="too long"):
        read_organ(organ_file)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest in a file and seal it again, as someone could who knows the format."""
    with safe_open(path, framework="pt") as stream:
        manifest = json.loads(stream.metadata()[METADATA_KEY])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    change(manifest)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(manifest)})


def test_a_schema_from_the_future_is_refused_by_its_number(organ_file: Path) -> None:
    _rewrite(organ_file, lambda manifest: manifest.update(schema_version=3))
    with pytest.raises(OrganFileError, match="manifest schema 3, and this neurograft reads schemas up to 2"):
        read_organ(organ_file)


def test_an_unknown_key_is_refused(organ_file: Path) -> None:
    _rewrite(organ_file, lambda manifest: manifest.update(surprise=1))
    with pytest.raises(OrganFileError, match="surprise"):
        read_organ(organ_file)


def test_a_manifest_that_was_changed_but_not_sealed_is_refused(organ_file: Path) -> None:
    _rewrite(organ_file, lambda manifest: manifest.update(license="free for all"))
    with pytest.raises(OrganFileError, match="altered"):
        read_organ(organ_file)


def test_other_safetensors_files_are_no_organs(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(OrganFileError, match="no neurograft manifest"):
        read_organ(tmp_path / "model.safetensors")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.ones(2)}, tmp_path / "zipped.pt")
    torch.save({"layers.0.weight": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "organ.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x")
    for name in ("zipped.pt", "old.pt", "organ.safetensors"):
        with pytest.raises(OrganFileError, match=f"{name} is a pickle"):
            read_organ(tmp_path / name)


def test_header_lengths_that_look_like_a_pickle_are_read(organ: Organ, tmp_path: Path) -> None:
    starts = set()
    for length in range(0, 300, 8):
        path = tmp_path / f"{length}.safetensors"
        Organ(organ.manifest.model_copy(update={"description": "x" * length}), organ.tensors).save(path)
        starts.add(path.read_bytes()[:1])
        read_organ(path)
    assert b"\x80" in starts


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "truncated"), (b"abc", "truncated"), (b"\x10" + bytes(7) + b"not json at all!", "altered")],
)
def test_nonsense_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(OrganFileError, match=reason):
        read_organ(tmp_path / "x.safetensors")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(OrganFileError, match=r"there is no organ file .*nowhere\.safetensors"):
        read_organ(tmp_path / "nowhere.safetensors")
    with pytest.raises(OrganFileError, match="is a directory"):
        read_organ(tmp_path)


def _with_tensors(organ: Organ, **tensors: torch.Tensor | None) -> Organ:
    changed = {**organ.tensors, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return Organ(organ.manifest, {name: tensor for name, tensor in changed.items() if tensor is not None})


NORM = "layers__1__input_layernorm__weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({NORM: None}, r"lacks 1 tensors .* layers\.1\.input_layernorm\.weight"),
        (
            {"layers__0__extra": torch.ones(1)},
            r"1 tensors that its configuration has no place for, .* layers\.0\.extra",
        ),
        ({NORM: torch.ones(7)}, r"layers\.1\.input_layernorm\.weight with shape \[7\] where .* \[32\]"),
    ],
)
def test_missing_extra_and_misshapen_tensors(
    change: dict[str, Any], reason: str, organ: Organ, recipient: Path, tmp_path: Path
) -> None:
    from neurograft import transplant

    path = tmp_path / "wrong.safetensors"
    _with_tensors(organ, **change).save(path)
    with pytest.raises(OrganFileError, match=reason):
        transplant(path, recipient, at=0, mode="insert", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, organ: Organ, tmp_path: Path, listing: Listing, monkeypatch: Patch) -> None:
    bad = _with_tensors(organ, **{NORM: torch.full((32,), value)})
    with pytest.raises(OrganFileError, match="weight has 32 values that are NaN or infinite"):
        bad.save(tmp_path / "bad.safetensors")
    assert listing() == []
    with monkeypatch.context() as patch:
        patch.setattr("neurograft.organ.digest_pieces", lambda pieces, **_: digest_pieces(pieces))
        bad.save(tmp_path / "bad.safetensors")
    with pytest.raises(OrganFileError, match="NaN or infinite"):
        read_organ(tmp_path / "bad.safetensors")


_READ_WITHOUT_NUMPY = """
import sys
from neurograft.errors import OrganFileError
from neurograft.organ import open_organ
for path in sys.argv[1:]:
    try:
        open_organ(path)
        print("fine", "numpy" in sys.modules)
    except OrganFileError as error:
        print(error)
"""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_also_found_where_numpy_is_not_loaded_yet(
    dtype: torch.dtype, organ: Organ, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("neurograft.organ.digest_pieces", lambda pieces, **_: digest_pieces(pieces))
    largest = torch.finfo(dtype).max
    paths = list[Path]()
    for value in (1.5, -torch.finfo(dtype).tiny, -largest, largest, float("-inf"), float("nan")):
        tensor = torch.ones(300_001, dtype=dtype)
        tensor[-1] = value
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        Organ(organ.manifest, {"layers.0.weight": tensor}).save(paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", _READ_WITHOUT_NUMPY, *paths], capture_output=True, text=True, check=True
    )
    ordinary, tiny, *extremes, infinite, nan = done.stdout.splitlines()
    assert (ordinary, tiny) == ("fine False", "fine False")
    assert all(line.startswith("fine") for line in extremes)
    assert all("weight has 1 values that are NaN or infinite" in line for line in (infinite, nan))


def test_output_is_never_overwritten_unasked(organ: Organ, organ_file: Path) -> None:
    content = organ_file.read_bytes()
    with pytest.raises(UsageError, match="exists already; choose another name or pass --overwrite"):
        organ.save(organ_file)
    assert organ_file.read_bytes() == content
    organ.save(organ_file, overwrite=True)


def test_names_of_organ_files(organ: Organ, donor: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        organ.save(tmp_path / "organ.pt")
    with pytest.raises(UsageError, match="does not exist"):
        extract(donor, layers=(0, 1), output=tmp_path / "nowhere" / "organ.safetensors")


def test_a_full_disk_leaves_nothing(organ: Organ, tmp_path: Path, listing: Listing, monkeypatch: Patch) -> None:
    def full(*_: Any, **__: Any) -> None:
        (tmp_path / "half").touch()
        (tmp_path / "half").unlink()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neurograft.byte_moves._run", full)
    with pytest.raises(Exception, match=r"the disk is full: .*organ\.safetensors"):
        organ.save(tmp_path / "organ.safetensors")
    assert listing() == []


def test_an_interruption_leaves_nothing(organ: Organ, tmp_path: Path, listing: Listing, monkeypatch: Patch) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("neurograft.organ._seal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        organ.save(tmp_path / "organ.safetensors")
    assert listing() == []
