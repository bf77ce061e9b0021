"""What new users met: caches that can't be written, files that contradict each other, two processes at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurograft import check, extract, train, transplant
from neurograft.errors import IncompatibleError, ModelError, UsageError
from neurograft.files import atomic_directory, atomic_file


@pytest.fixture
def model(donor: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(donor, tmp_path / "model"))


def test_numbers_that_float32_can_not_tell_apart_are_the_same(model: Path, organ_file: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rounded = float(torch.tensor(config["rms_norm_eps"], dtype=torch.float32))
    assert rounded != config["rms_norm_eps"]
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": rounded}))
    assert not check(organ_file, model, alignment="skip").blocked
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2 * rounded}))
    assert check(organ_file, model, alignment="skip").blocked


def test_a_cache_that_can_not_be_written_is_done_without(
    model: Path, organ_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "file" / "cache"))
    record = transplant(organ_file, model, output=tmp_path / "out", at=2, mode="replace", verify="bytes")
    assert record.operations[0].position == 2


def test_weights_twice_are_refused(model: Path, tmp_path: Path) -> None:
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model-00001-of-00001.safetensors")
    shutil.copy(model / "model.safetensors", model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ModelError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        extract(model, layers="2:4", output=tmp_path / "organ.safetensors")
    assert not (tmp_path / "organ.safetensors").exists()


def test_a_recipient_whose_shapes_contradict_its_configuration_is_refused(
    model: Path, organ_file: Path, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.5.mlp.gate_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        IncompatibleError, match=r"layer 5: the recipient's model\.layers\.5\.mlp\.gate_proj\.weight has"
    ):
        transplant(organ_file, model, output=tmp_path / "out", at=2, mode="insert", verify="bytes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_of_two_at_once_the_second_is_told(write: Any, tmp_path: Path) -> None:
    target = tmp_path / "out.bin"

    def fill(place: Path, content: str) -> None:
        (place if write is atomic_file else place / "config.json").write_text(content)

    with pytest.raises(UsageError, match="exists already"), write(target, overwrite=False) as late:
        fill(late, "late")
        with write(target, overwrite=False) as early:
            fill(early, "early")
    assert (target if write is atomic_file else target / "config.json").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


def test_a_quantised_organ_is_not_trained(organ_file: Path, donor: Path, tmp_path: Path) -> None:
    from neurograft.organ import Organ, read_organ

    organ = read_organ(organ_file)
    config = {**organ.manifest.anatomy.config, "quantization_config": {"quant_method": "mxfp4"}}
    anatomy = organ.manifest.anatomy.model_copy(update={"config": config})
    packed = Organ(organ.manifest.model_copy(update={"anatomy": anatomy}), organ.tensors)
    (tmp_path / "text.txt").write_text("a\n\nb\n\nc")
    with pytest.raises(
        UsageError, match="is quantised, and quantised layers can't be trained; extract it from a model"
    ):
        train(packed, host=donor, data=tmp_path / "text.txt", steps=1)
