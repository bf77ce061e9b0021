"""Models that are asked without being loaded: their layers come from the disk one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import checkpoint, extract, probe, transplant
from neurograft.anatomy import describe
from neurograft.models import resolve
from neurograft.organ import Organ, open_organ
from neurograft.streaming import loaded_to_ask

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3_next", "mamba", "deepseek_v3"])
def test_layers_that_stay_on_the_disk_answer_alike(kind: str, model_directory: Factory) -> None:
    directory = resolve(model_directory(kind, seed=0))
    answers = []
    for whole in (True, False):
        with loaded_to_ask(directory, whole=whole) as (model, unused):
            path = describe(model).layers_path
            assert unused == set()
            assert all(tensor.is_meta != whole for tensor in model.get_submodule(path).parameters())
            answers.append((probe.probe_layers(model, path), probe.cache_gap(model), probe.future_leak(model)))
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1:] == answers[1][1:]


def test_one_layer_is_in_memory_at_a_time(recipient: Path) -> None:
    here: list[list[int]] = []
    with loaded_to_ask(resolve(recipient), whole=False) as (model, _):
        layers = model.get_submodule("model.layers")

        def note(*_: Any) -> None:
            parts = [next(layer.get_submodule("input_layernorm").parameters()) for layer in layers.children()]
            here.append([number for number, part in enumerate(parts) if not part.is_meta])

        for layer in layers.children():
            layer.get_submodule("input_layernorm").register_forward_hook(note)
        probe.probe_layers(model, "model.layers")
    assert len(here) == 6 and all(len(numbers) <= 1 for numbers in here)


def test_a_transplant_too_large_to_load_is_verified_alike(
    donor: Path, recipient: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    easily = transplant(extract(donor, layers="2:4"), recipient, at=2, mode="replace", output=tmp_path / "easily")
    monkeypatch.setattr(checkpoint, "EASY_SHARE", 0.0)
    organ: Organ = extract(donor, layers="2:4", verify="layers")
    assert organ.manifest.probe is not None
    record = transplant(organ, recipient, at=2, mode="replace", verify="layers", output=tmp_path / "out")
    assert record.operations[0].verified == easily.operations[0].verified == "layers"
    explants = [open_organ(tmp_path / name / str(record.operations[0].explant)) for name in ("easily", "out")]
    assert explants[0].manifest.probe == explants[1].manifest.probe is not None
