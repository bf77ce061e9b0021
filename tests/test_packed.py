"""Quantised layers travel as the bytes that they are, and only to where they are packed in the same way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neurograft import check, extract, graft, remove, transplant
from neurograft.errors import IncompatibleError
from neurograft.files import tensor_digest
from neurograft.organ import Organ, read_organ
from packed import save_gpt_oss, save_opaque
from tiny import load, logits, make_config

PLACES: list[tuple[Any, int]] = [("insert", 0), ("insert", 3), ("insert", 6), ("replace", 2), ("replace", 1)]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _digests(tensors: Any) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tuple(save_gpt_oss(tmp_path_factory.mktemp("gpt-oss") / "model", seed=seed) for seed in (0, 1))  # type: ignore[return-value]


def _joined(donor: Any, recipient: Any, mode: Any, at: int) -> Any:
    """Build, from two models that transformers unpacked, what a transplant of layers 2 and 3 should give."""
    order: list[tuple[Any, int]] = [(recipient, layer) for layer in range(6)]
    order[at : at + 2 if mode == "replace" else at] = [(donor, 2), (donor, 3)]
    config = make_config("gpt_oss", layers=len(order))
    config.layer_types = [source.config.layer_types[layer] for source, layer in order]
    joined = type(recipient)._from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in recipient.state_dict().items() if ".layers." not in name}
    for place, (source, layer) in enumerate(order):
        for name, tensor in source.get_submodule(f"model.layers.{layer}").state_dict().items():
            state[f"model.layers.{place}.{name}"] = tensor
    joined.load_state_dict(state, strict=True)
    return joined.eval()


@pytest.mark.parametrize(("mode", "at"), PLACES)
def test_gpt_oss_as_it_is_on_disk(mode: Any, at: int, gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    donor, recipient = gpt_oss
    organ = extract(donor, layers="2:4", output=tmp_path / "organ.safetensors")
    assert organ.manifest.is_packed and "layers.0.mlp.experts.down_proj_blocks" in organ.tensors
    record = transplant(tmp_path / "organ.safetensors", recipient, at=at, mode=mode, output=tmp_path / "out")
    written = load(tmp_path / "out")
    assert torch.equal(logits(written), logits(_joined(load(donor), load(recipient), mode, at)))
    assert not torch.equal(logits(written), logits(load(recipient)))
    packed = {name for name in _tensors(tmp_path / "out") if name.endswith(("_blocks", "_scales"))}
    assert len(packed) == 4 * len(record.layers)
    removal = remove(tmp_path / "out", output=tmp_path / "back")
    assert removal.tensors_digest == record.original_tensors_digest
    assert _digests(_tensors(tmp_path / "back")) == _digests(_tensors(recipient))
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(recipient)))


def test_layers_of_gpt_oss_can_be_asked(gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    donor, recipient = gpt_oss
    organ = extract(donor, layers="2:4", verify="layers")
    record = transplant(organ, recipient, at=1, mode="insert", verify="layers", output=tmp_path / "out")
    assert record.operations[0].verified == "layers"


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes"])
@pytest.mark.parametrize(("mode", "at"), [("insert", 1), ("replace", 3)])
def test_opaque_tensors_travel_with_their_layer(method: str, mode: Any, at: int, tmp_path: Path) -> None:
    donor, recipient = (
        save_opaque(tmp_path / name, method, seed=seed) for seed, name in enumerate(("donor", "recipient"))
    )
    organ = extract(donor, layers="0:2", output=tmp_path / "organ.safetensors")
    theirs = _digests(_tensors(donor))
    assert _digests(read_organ(tmp_path / "organ.safetensors").tensors) == {
        name.removeprefix("model."): digest
        for name, digest in theirs.items()
        if name.startswith(("model.layers.0.", "model.layers.1."))
    }
    record = transplant(organ, recipient, at=at, mode=mode, output=tmp_path / "out")
    found = _digests(_tensors(tmp_path / "out"))
    for layer in (0, 1):
        start, place = f"model.layers.{layer}.", f"model.layers.{at + layer}."
        assert {n.removeprefix(place): d for n, d in found.items() if n.startswith(place)} == {
            n.removeprefix(start): d for n, d in theirs.items() if n.startswith(start)
        }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert remove(tmp_path / "out", output=tmp_path / "back").tensors_digest == record.original_tensors_digest
    assert _digests(_tensors(tmp_path / "back")) == _digests(_tensors(recipient))


def test_packed_and_plain_layers_do_not_mix(
    gpt_oss: tuple[Path, Path], model_directory: Any, tmp_path: Path, organ: Organ
) -> None:
    plain = extract(model_directory("gpt_oss"), layers="2:4")
    packed = extract(gpt_oss[0], layers="2:4")
    for part, target in ((plain, gpt_oss[1]), (packed, model_directory("gpt_oss"))):
        with pytest.raises(IncompatibleError, match="packed and plain layers can't stand in one model"):
            transplant(part, target, at=1, mode="insert", output=tmp_path / "out")
    model = load(model_directory("gpt_oss"))
    with (
        pytest.raises(IncompatibleError, match=r"packed \(quantised\) tensors|quantization_config"),
        graft(model, packed, at=1),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_another_packing_of_the_same_method_is_refused(tmp_path: Path) -> None:
    donor, recipient = (
        save_opaque(tmp_path / name, "fp8", seed=seed) for seed, name in enumerate(("donor", "recipient"))
    )
    organ = extract(donor, layers="0:2")
    shutil.copytree(recipient, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8", "bits": 8}}))
    report = check(organ, tmp_path / "other", at=1, mode="insert")
    assert any("quantization_config.bits is 4 in the organ and 8" in finding.sentence() for finding in report.findings)
    assert report.blocked
