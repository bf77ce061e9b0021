"""Identity layers: unchanged logits, output projections at zero, and gradients that arrive."""

from __future__ import annotations

import pytest
import torch

from conftest import Factory
from neurograft import attach, extract, graft
from neurograft.errors import ModelError
from neurograft.files import tensors_digest
from neurograft.identity import as_identity
from tiny import CONFIGS, load, logits, token_ids

WRITERS = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2", "w2")


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_output_projections_are_zeroed(kind: str, model_directory: Factory) -> None:
    directory = model_directory(kind)
    organ = extract(directory, layers=(2, 4))
    digest = tensors_digest(organ.tensors)
    identity = as_identity(organ)
    assert tensors_digest(organ.tensors) == digest
    zeroed = {name for name, tensor in identity.tensors.items() if not tensor.any() and organ.tensors[name].any()}
    assert zeroed
    for name in zeroed:
        assert any(writer in name.split(".") or f"{writer}_bias" in name for writer in WRITERS), name
    kept = set(identity.tensors) - zeroed
    assert all(torch.equal(identity.tensors[name], organ.tensors[name]) for name in kept)
    model = load(directory)
    before = logits(model)
    for at in (0, 3, 6):
        with graft(model, identity, at=at, mode="insert"):
            assert torch.equal(logits(model), before)


def test_gradients_reach_the_output_projections_at_once(model_directory: Factory) -> None:
    directory = model_directory("llama")
    model = load(directory)
    attachment = attach(model, as_identity(extract(directory, layers=(2, 4))), at=2, mode="insert")
    model(token_ids(), labels=token_ids()).loss.backward()
    for layer in attachment.layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            gradient = layer.get_submodule(name).weight.grad
            assert isinstance(gradient, torch.Tensor) and float(gradient.abs().sum()) > 0


def test_layers_that_normalise_their_sum_are_refused(model_directory: Factory) -> None:
    directory = model_directory("opt", seed=0, do_layer_norm_before=False)
    with pytest.raises(ModelError, match="can't be made an identity by zeroing tensors"):
        as_identity(extract(directory, layers=(0, 1)))
