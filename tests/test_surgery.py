"""The graft in memory: exact while it lasts, exactly undone, and at home in everything that a model can do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import attach, detach, extract, graft, surgery
from neurograft.anatomy import describe
from neurograft.errors import IncompatibleError, NeurograftError, UsageError, VerificationError
from neurograft.files import tensors_digest
from neurograft.organ import Organ
from tiny import LAYERS, generate, load, logits, make_model, token_ids

SCALARS = (int, float, str, list, type(None))


def _state(model: Any) -> dict[str, Any]:
    """Everything that must be the same after an organ is out again: objects, attributes, tensors, configuration."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": {
            f"{name}.{key}": copy.deepcopy(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, SCALARS) and key != "_weight_conversions"
        },
        "digest": tensors_digest(model.state_dict()),
        "config": model.config.to_dict(),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def test_everything_is_as_it_was(kind: str, model_directory: Factory) -> None:
    organ, model = extract(model_directory(kind, seed=0), layers=(1, 3)), load(model_directory(kind, seed=1))
    before, state = logits(model), _state(model)
    with pytest.raises(ZeroDivisionError), graft(model, organ, at=4, mode="insert"):
        assert len(describe(model).rows) == LAYERS + 2
        raise ZeroDivisionError
    assert _state(model) == state
    assert torch.equal(logits(model), before)


def test_the_organ_that_is_given_stays_as_it_is(organ: Organ, recipient: Path) -> None:
    digest, model = tensors_digest(organ.tensors), load(recipient)
    attachment = attach(model, organ, at=1, mode="replace")
    with torch.no_grad():
        for parameter in attachment.layers[0].parameters():
            parameter.add_(1)
    detach(model)
    assert tensors_digest(organ.tensors) == digest


def test_two_organs_come_off_in_reverse(organ: Organ, model_directory: Factory, recipient: Path) -> None:
    model, other = load(recipient), extract(model_directory("llama", seed=3), layers=(0, 1))
    states = [logits(model)]
    attach(model, organ, at=0, mode="insert")
    states.append(logits(model))
    attach(model, other, at=5, mode="replace")
    assert not torch.equal(logits(model), states[1])
    assert detach(model) is other
    assert torch.equal(logits(model), states[1])
    detach(model)
    assert torch.equal(logits(model), states[0])
    with pytest.raises(UsageError, match="no organ is attached"):
        detach(model)


def test_inner_graft_left_open_is_an_error(organ: Organ, recipient: Path) -> None:
    model = load(recipient)
    with pytest.raises(UsageError, match="must be detached before"), graft(model, organ, at=0, mode="insert"):
        attach(model, organ, at=0, mode="insert")


def test_hidden_states_include_the_organ(organ: Organ, recipient: Path) -> None:
    model = load(recipient)
    assert len(model(token_ids(), output_hidden_states=True).hidden_states) == LAYERS + 1
    with graft(model, organ, at=2, mode="insert"):
        states = model(token_ids(), output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 3
        assert len({float(state.sum()) for state in states}) == LAYERS + 3
    assert len(model(token_ids(), output_hidden_states=True).hidden_states) == LAYERS + 1


@pytest.mark.parametrize("enabled", ["before", "after"])
def test_gradient_checkpointing(enabled: str, organ: Organ, recipient: Path) -> None:
    gradients: list[list[torch.Tensor]] = []
    for checkpointing in (False, True):
        model = load(recipient)
        model.train()
        if checkpointing and enabled == "before":
            model.gradient_checkpointing_enable()
        attachment = attach(model, organ, at=3, mode="insert")
        if checkpointing and enabled == "after":
            model.gradient_checkpointing_enable()
        assert all(layer.training for layer in attachment.layers)
        assert all(getattr(layer, "gradient_checkpointing", False) is checkpointing for layer in attachment.layers)
        model(token_ids(), labels=token_ids()).loss.backward()
        found = [parameter.grad for layer in attachment.layers for parameter in layer.parameters()]
        gradients.append([gradient for gradient in found if gradient is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients[0])


def test_train_and_eval_reach_the_organ(organ: Organ, recipient: Path) -> None:
    model = load(recipient)
    with graft(model, organ, at=3, mode="insert"):
        model.train()
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())


def test_save_pretrained_on_the_grafted_model(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    model = load(recipient)
    with graft(model, organ, at=3, mode="insert"):
        model.save_pretrained(tmp_path / "saved")
        expected, tokens = logits(model), generate(model)
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    assert generate(load(tmp_path / "saved")) == tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mixtral", "bloom"])
def test_float32_layers_in_a_bfloat16_model(kind: str, model_directory: Factory) -> None:
    folder = model_directory(kind)
    model, narrow, exact = load(folder), load(folder), logits(load(folder))
    torch.nn.Module.to(model, torch.bfloat16)
    torch.nn.Module.to(narrow, torch.bfloat16)
    before = logits(model)
    attachment = attach(model, extract(folder, layers=(2, 4)), dtype=torch.float32)
    assert {p.dtype for layer in attachment.layers for p in layer.parameters()} == {torch.float32}
    mixed = logits(model)
    assert mixed.dtype == torch.bfloat16 and not torch.equal(mixed, before)
    assert (mixed.float() - exact).abs().max() <= 0.1 * exact.abs().max()
    parameter = next(p for p in attachment.layers[0].parameters() if p.ndim == 2)
    model(input_ids=token_ids()).logits.float().logsumexp(-1).sum().backward()
    assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0
    detach(model)
    assert torch.equal(logits(model), logits(narrow))


def test_bfloat16(model_directory: Factory) -> None:
    organ = extract(model_directory("llama", seed=0), layers=(2, 4))
    model = make_model("llama", seed=1)
    torch.nn.Module.to(model, torch.bfloat16)
    with graft(model, organ, at=2, mode="replace"):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert logits(model).isfinite().all()


@pytest.mark.parametrize(("at", "mode"), [(-1, "insert"), (LAYERS + 1, "insert"), (LAYERS - 1, "replace")])
def test_position_out_of_range(at: int, mode: Any, organ: Organ, recipient: Path) -> None:
    model = load(recipient)
    with pytest.raises(UsageError, match=f"position {at} is out of range"):
        attach(model, organ, at=at, mode=mode)


def test_a_model_without_a_head_is_refused(organ: Organ, recipient: Path) -> None:
    from transformers import AutoModel

    with pytest.raises(NeurograftError, match="LlamaModel; load it with AutoModelForCausalLM"):
        attach(AutoModel.from_pretrained(recipient), organ, at=0)


def test_an_organ_that_does_not_fit_leaves_the_model_alone(organ: Organ, model_directory: Factory) -> None:
    model = load(model_directory("llama", seed=1, rope_parameters={"rope_type": "default", "rope_theta": 77.0}))
    state = _state(model)
    with pytest.raises(IncompatibleError, match=r"rope_theta is 10000\.0 in the organ and 77\.0 in the recipient"):
        attach(model, organ, at=0, mode="insert")
    assert _state(model) == state


def test_the_probe_sees_what_no_configuration_shows(
    donor: Path, recipient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organ = extract(donor, layers=(2, 4), verify="layers")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def scaled_by_number(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, hidden_states, *args, **kwargs) * (1 + 0.1 * self.self_attn.layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled_by_number)
    model = load(recipient)
    state = _state(model)
    with pytest.raises(VerificationError, match="does not compute here what it computed in its donor"):
        attach(model, organ, at=2, mode="replace")
    assert _state(model) == state


def test_shifted_layers_are_probed_too(donor: Path, recipient: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def scaled_late(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, hidden_states, *args, **kwargs) * (1.5 if self.self_attn.layer_idx > 4 else 1)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled_late)
    model = load(recipient)
    with pytest.raises(VerificationError, match="the recipient's layer 3 would compute something else at position 5"):
        attach(model, extract(donor, layers=(0, 2)), at=0, mode="insert")


def test_what_is_no_loaded_model(organ: Organ, recipient: Path) -> None:
    wrong: Any
    for wrong in (None, str(recipient), torch.nn.Linear(2, 2)):
        for use in (lambda model: attach(model, organ), detach):
            with pytest.raises(UsageError, match=f"this is a {type(wrong).__name__}; load one"):
                use(wrong)
    model = load(recipient)
    attachment: Any = attach(model, organ, at=1, mode="insert")
    with pytest.raises(UsageError, match=r"give the model itself, as in detach\(model\)"):
        detach(attachment)
    detach(model)


def test_an_organ_that_is_detached_inside_its_block(organ: Organ, recipient: Path) -> None:
    model = load(recipient)
    before = logits(model)
    with graft(model, organ, at=1, mode="insert"):
        detach(model)
    assert torch.equal(logits(model), before)


def test_what_was_replaced_can_be_given_up(model_directory: Factory) -> None:
    donor = model_directory("llama")
    model, organ = load(donor), extract(donor, layers=(2, 4))
    before = logits(model)
    replaced = list(model.model.layers)[2:4]
    attachment = attach(model, organ, at=2, mode="replace")
    surgery.give_up_originals(model, attachment)
    assert all(parameter.is_meta for layer in replaced for parameter in layer.parameters())
    assert all(tensor.is_meta for tensor in attachment.organ.tensors.values())
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="no organ is attached"):
        detach(model)
    with pytest.raises(UsageError, match="is not what was attached to this model last"):
        surgery.give_up_originals(model, attachment)
