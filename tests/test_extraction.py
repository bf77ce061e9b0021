"""Layer ranges, and extraction from directories, old ones included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from neurograft import extract
from neurograft.checkpoint import open_checkpoint
from neurograft.errors import UsageError
from neurograft.extraction import parse_layers
from neurograft.models import resolve
from neurograft.organ import Organ, read_organ
from tiny import contents, save_model

Listing = Callable[[], list[str]]
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10:13", range(10, 13)),
        (" 0 : 30 ", range(30)),
        ("auto", range(10, 13)),
        (range(2, 4), range(2, 4)),
        ((0, 1), range(1)),
    ],
)
def test_layer_ranges(text: Any, expected: range) -> None:
    assert parse_layers(text, 30) == expected


@pytest.mark.parametrize(("layers", "start"), [(12, 4), (6, 2), (4, 1), (3, 0), (2, 0), (1, 0)])
def test_auto_is_three_layers_from_a_third(layers: int, start: int) -> None:
    assert parse_layers("auto", layers) == range(start, min(start + 3, layers))


@pytest.mark.parametrize("text", ["3", "5:5", "6:4", "4:31", "-1:3", "a:b", "", "1:2:3", (3, 31)])
def test_wrong_layer_ranges_are_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="the layer range"):
        parse_layers(text, 30)


def test_manifest_names_no_path_and_knows_its_source(donor: Path, organ: Organ) -> None:
    assert str(donor.parent) not in organ.manifest.model_dump_json()
    checkpoint = open_checkpoint(resolve(donor))
    assert organ.manifest.source.layer_digests == [checkpoint.layer_digest(layer) for layer in (2, 3)]
    assert organ.manifest.source.layer_digests == [organ.layer_digest(layer) for layer in (0, 1)]


def test_extracting_writes_only_the_organ(donor: Path, tmp_path: Path) -> None:
    before = contents(donor)
    extract(
        donor,
        layers="0:2",
        output=tmp_path / "organ.safetensors",
        name="my-organ",
        license="MIT",
        description="two layers",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["organ.safetensors"]
    assert contents(donor) == before
    manifest = read_organ(tmp_path / "organ.safetensors").manifest
    assert (manifest.name, manifest.license, manifest.description) == ("my-organ", "MIT", "two layers")


@pytest.mark.parametrize("name", ["my organ!", "../organ", "", "x" * 97, "-a", "größe"])
def test_names_that_a_manifest_does_not_hold_are_refused(name: str, donor: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the organ's name is .*; write up to 96 of the characters"):
        extract(donor, layers="0:2", output=tmp_path / "organ.safetensors", name=name)
    assert not list(tmp_path.iterdir())


def test_old_spellings_of_tensor_names_are_understood(tmp_path: Path) -> None:
    save_model(tmp_path / "new", "mixtral")
    shutil.copytree(tmp_path / "new", tmp_path / "prefixed")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(
        bare | {"lm_head.weight": tensors["lm_head.weight"]},
        tmp_path / "prefixed" / "model.safetensors",
        metadata={"format": "pt"},
    )
    organs = [extract(tmp_path / name, layers=(1, 3)) for name in ("new", "prefixed")]
    assert organs[0].tensors.keys() == organs[1].tensors.keys()
    assert organs[0].manifest.source.layer_digests == organs[1].manifest.source.layer_digests
