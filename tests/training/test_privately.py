"""Private training: the manifest holds its promise and nothing else of the text, and it goes on to the bit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import extract, ranks, train
from neurograft.bank.card import model_card
from neurograft.data import fingerprint
from neurograft.errors import NeurograftError, UsageError
from neurograft.files import tensors_digest
from neurograft.manifest import Manifest
from neurograft.organ import Organ, read_organ
from neurograft.privacy.rendering import privacy_line
from neurograft.training import privately
from neurograft.training.loop import Texts, Trainee, TrainingProgress
from neurograft.training.options import parse_options
from neurograft.training.privately import PrivateBatches, PrivateRun
from neurograft.training.protocols import tune_layers
from neurograft.training.run_state import state_path

DOCUMENTS = 40
# The same everywhere: the noise for a budget is found once.
PRIVATE: dict[str, Any] = {
    "dp_epsilon": 4.0, "steps": 6, "batch_size": 4, "accumulate": 2, "sequence_length": 16, "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> list[str]:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=5)) for _ in range(200)]
    return [" ".join(generator.choices(words, k=generator.randint(1, 5))) for _ in range(DOCUMENTS)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("private") / "reports.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("public") / "public.txt"
    path.write_text("a public text\n\nand another one")
    return path


@pytest.fixture(scope="module")
def trained(organ: Organ, donor: Path, text: Path) -> Organ:
    return train(organ, host=donor, data=text, **PRIVATE)


@pytest.fixture
def known_secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(privately, "draw_secret", lambda: b"nobody knows it, of course, yet.")
    yield


def _stop_at(step: int) -> Any:
    def stop(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


def test_the_budget_is_in_the_manifest_and_is_what_another_accountant_says(trained: Organ) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    training = trained.manifest.training
    assert training is not None and training.privacy is not None
    spent = training.privacy
    assert (spent.unit, spent.units, spent.steps, spent.clip) == ("document", DOCUMENTS, 6, 1.0)
    assert spent.sample_rate == 8 / DOCUMENTS and spent.delta == pytest.approx(DOCUMENTS**-1.1)
    assert 0.98 * 4 <= spent.epsilon <= 4
    orders = [1 + number / 10 for number in range(1, 100)] + list(range(12, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rdp = compute_rdp(
            q=spent.sample_rate, noise_multiplier=spent.noise_multiplier, steps=spent.steps, orders=orders
        )
        bound, _ = get_privacy_spent(orders=orders, rdp=rdp, delta=spent.delta)
    assert spent.epsilon <= bound <= 1.6 * spent.epsilon  # Renyi divergences tell less
    assert "opacus" in training.versions and training.hyperparameters["dp_epsilon"] == 4.0


def test_the_manifest_says_nothing_else_of_the_text(trained: Organ, documents: list[str], organ: Organ) -> None:
    manifest, training = trained.manifest, trained.manifest.training
    assert training is not None
    assert training.data_fingerprint is None and training.loss_history == [] and manifest.evaluations == []
    assert training.tokens_seen == 6 * 8 * 16 and training.documents == DOCUMENTS
    assert not {"held_out", "patience"} & set(training.hyperparameters)
    shown = manifest.model_dump_json()
    assert fingerprint(documents) not in shown and not any(document in shown for document in documents)
    assert tensors_digest(trained.tensors) != tensors_digest(organ.tensors)


def test_card_and_inspect_show_it(trained: Organ) -> None:
    line = privacy_line(trained.manifest)
    assert line is not None and f"for each of {DOCUMENTS} documents" in line and line.startswith("epsilon 3.9")
    assert f"Trained with differential privacy: {line}." in model_card(trained.manifest, "bank:tiny@0.1.0")
    assert "promise" not in line
    training = trained.manifest.training
    assert training is not None
    before = training.model_copy(update={"privacy": None})
    twice = trained.manifest.model_copy(update={"training_history": [before]})
    assert "1 of the trainings before it had no such promise" in (privacy_line(twice) or "")
    assert privacy_line(Manifest.model_validate_json(twice.model_dump_json())) == privacy_line(twice)


def test_what_is_drawn_is_a_secret_and_not_the_seed(organ: Organ, donor: Path, text: Path, trained: Organ) -> None:
    again = train(organ, host=donor, data=text, **PRIVATE)
    assert tensors_digest(again.tensors) != tensors_digest(trained.tensors)


@pytest.mark.usefixtures("known_secret")
@pytest.mark.parametrize(
    ("step", "changes"),
    [(1, {}), (4, {"optimizer": "muon", "average": 0.9, "anchor": 3.0}), (4, {"rank": 2}), (2, {"protocol": "insert"})],
)
def test_interrupted_and_gone_on_is_uninterrupted(
    step: int, changes: dict[str, Any], organ: Organ, donor: Path, text: Path, tmp_path: Path
) -> None:
    options = {**PRIVATE, **changes}
    whole = train(organ, host=donor, data=text, **options)
    output = tmp_path / "o.safetensors"
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 6; the same command goes on"):
        train(organ, host=donor, data=text, output=output, progress=_stop_at(step), **options)
    again = train(organ, host=donor, data=text, output=output, **options)
    assert tensors_digest(again.tensors) == tensors_digest(whole.tensors) and not state_path(output).exists()
    assert again.manifest.training and whole.manifest.training
    assert again.manifest.training.privacy == whole.manifest.training.privacy


def test_a_run_goes_on_with_the_secret_it_drew(organ: Organ, donor: Path, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(organ, host=donor, data=text, output=first, progress=_stop_at(2), **PRIVATE)
    shutil.copy(state_path(first), state_path(second))
    whole = train(organ, host=donor, data=text, output=first, **PRIVATE)
    with pytest.raises(KeyboardInterrupt):
        train(organ, host=donor, data=text, output=second, progress=_stop_at(4), **PRIVATE)
    again = train(organ, host=donor, data=text, output=second, **PRIVATE)
    assert tensors_digest(again.tensors) == tensors_digest(whole.tensors)
    assert "secret" not in read_organ(second).manifest.model_dump_json()


def test_parts_of_a_step_are_only_parts(organ: Organ, donor: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x 2 and 2 x 4 draw the same documents, and cut each alike."""
    monkeypatch.setattr(privately, "draw_secret", lambda: b"0" * 32)
    options = {**PRIVATE, "optimizer": "adamw", "steps": 6}
    one = train(organ, host=donor, data=text, **options)
    two = train(organ, host=donor, data=text, **{**options, "batch_size": 2, "accumulate": 4})
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{"protocol": "standalone"}, {"cache_prefix": "always"}, {"offload": True}])
def test_the_other_ways_to_train(changes: dict[str, Any], organ: Organ, donor: Path, text: Path) -> None:
    done = train(organ, host=donor, data=text, **{**PRIVATE, **changes}).manifest.training
    assert done is not None and done.privacy is not None and done.steps == 6


def test_a_mixture_of_experts_goes_one_document_at_a_time(model_directory: Factory, text: Path) -> None:
    host = model_directory("mixtral")
    organ = extract(host, layers=(2, 4), name="mixture")
    seen: list[float] = []
    done = train(organ, host=host, data=text, progress=lambda p: seen.append(p.loss), **PRIVATE)
    assert done.manifest.training and done.manifest.training.privacy and len(seen) == 6
    assert tensors_digest(done.tensors) != tensors_digest(organ.tensors)


def test_with_public_text_the_best_weights_are_taken(organ: Organ, donor: Path, text: Path, public: Path) -> None:
    """No run stops early, whatever it shows: its noise was chosen for all steps."""
    done = train(organ, host=donor, data=text, eval_data=public, evaluations=6, **{**PRIVATE, "lr": 0.5})
    (found,) = done.manifest.evaluations
    assert found.documents == 2 and found.after <= found.before
    assert done.manifest.training is not None and done.manifest.training.steps == 6


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_without_noise_and_cuts_steps_go_along_the_plain_gradient(
    kind: str, documents: list[str], tokenizer: Any
) -> None:
    from neurograft.loss import NextTokenLoss
    from tiny import make_model

    options, model = parse_options(**{**PRIVATE, "clip": 1e6}), make_model(kind)
    built = PrivateBatches.build(Texts(documents, []), tokenizer, options)
    batches = dataclasses.replace(built, noise_multiplier=0.0, secret=b"secret")
    layers = list(model.get_submodule("model.layers").children())[2:4]
    run = PrivateRun(model, Trainee.of_layers(layers, 2), batches, options)
    assert run._documents.try_together(run._tried_losses, 3) == (kind == "llama")
    with run._documents.hooked():
        run._training_mode(True)
        loss = run._passes(list(range(DOCUMENTS)), 0)
        found = [parameter.grad for parameter in run.parameters]
    packed, losses = batches.training, NextTokenLoss(model)
    own = losses(packed.input_ids, packed.labels).sum(1) / (packed.labels[:, 1:] != -100).sum(1)
    assert loss == pytest.approx(float(own.detach().mean()), rel=1e-5)
    wanted = torch.autograd.grad(own.sum() / batches.step_size, run.parameters)
    for gradient, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-5)


def test_an_empty_step_is_noise_alone(organ: Organ, donor: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateBatches, "training_rows", lambda self: iter([[]] * self.steps))
    done = train(organ, host=donor, data=text, **PRIVATE)
    assert tensors_digest(done.tensors) != tensors_digest(organ.tensors)


def test_documents_are_drawn_by_chances_of_their_own(documents: list[str], tokenizer: Any) -> None:
    batches = PrivateBatches.build(Texts(documents, []), tokenizer, parse_options(**PRIVATE))
    rows = batches.training_rows()
    drawn = [next(rows) for _ in range(500)]
    sizes = torch.tensor([float(len(step)) for step in drawn])
    assert abs(float(sizes.mean()) - 8) < 0.5 and abs(float(sizes.var()) - 8 * 0.8) < 1.5
    counts = torch.bincount(torch.tensor([row for step in drawn for row in step]), minlength=DOCUMENTS)
    assert int(counts.min()) > 60 and int(counts.max()) < 145
    assert all(len(set(step)) == len(step) for step in drawn)


def test_each_document_is_a_sequence_of_its_own(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = Texts(["abc", "a" * 40, "b" * 16, *["more"] * 37], [])
    with caplog.at_level("INFO", "neurograft"):
        packed = PrivateBatches.build(texts, tokenizer, parse_options(**PRIVATE)).training
    assert "1 of 40 documents are longer than 16 tokens; 24 tokens of theirs are left out" in caplog.text
    end = tokenizer.eos_token_id
    assert packed.input_ids.shape == (40, 16)
    assert packed.labels[0, :5].tolist() == [*tokenizer("abc")["input_ids"], end, -100]
    assert packed.input_ids[0, 3:].unique().tolist() == [end]
    assert packed.labels[1].tolist() == tokenizer("a" * 16)["input_ids"]


def test_what_stands_still_is_noticed(
    organ: Organ, donor: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from neurograft.training.optimizers import Optimizers

    monkeypatch.setattr(Optimizers, "step", lambda self, share: None)
    output = tmp_path / "o.safetensors"
    with pytest.raises(NeurograftError, match=r"stopped after 3 steps: a parameter of shape .* is still where it was"):
        train(organ, host=donor, data=text, output=output, **PRIVATE)
    assert not output.exists()


def test_a_document_without_a_gradient_is_noticed(
    organ: Organ, donor: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neurograft.training.per_document import Gradients, Stacked

    whole = Gradients.add_clipped

    def lose_last(self: Gradients, sums: Any, clip: float) -> torch.Tensor:
        left = [Stacked(torch.cat([piece.stacked()[:-1], 0 * piece.stacked()[-1:]])) for piece in self.pieces]
        return whole(Gradients(left), sums, clip)

    monkeypatch.setattr(Gradients, "add_clipped", lose_last)
    with pytest.raises(NeurograftError, match="stopped at step 1: a document gives what trains no gradient"):
        train(organ, host=donor, data=text, **PRIVATE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dp_epsilon": None, "dp_delta": 1e-3}, "--dp-delta says how private --dp-epsilon is"),
        ({"dp_epsilon": 0.0}, "--dp-epsilon: .* greater than 0"),
        ({"dp_epsilon": 1e9}, "--dp-epsilon: .* less than or equal to 100"),
        ({"vocabulary": "sampled"}, "a sampled vocabulary is that of the private text"),
        ({"patience": 3}, "takes all the steps that its noise was chosen for; leave patience out"),
        ({"held_out": 0.2}, "measures nothing on its own text; give evaluation data instead; leave held_out out"),
        ({"dp_delta": 1 / DOCUMENTS}, "--dp-delta 0.025 is no less than 1 in 40 documents"),
        ({"batch_size": 41, "accumulate": 1}, "draws 41 documents on average, and there are 40"),
        ({"dp_epsilon": 1e-9, "dp_delta": 1e-9}, "no noise keeps 6 steps to an epsilon of 1e-09 at a delta of 1e-09"),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any], reason: str, organ: Organ, donor: Path, text: Path, tmp_path: Path
) -> None:
    options = {name: value for name, value in {**PRIVATE, **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=reason):
        train(organ, host=donor, data=text, output=tmp_path / "o.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(organ: Organ, donor: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "several", lambda: True)
    with pytest.raises(UsageError, match="--dp-epsilon is for one process; start it without torchrun"):
        privately.check_private()


def test_the_extra_is_asked_for(organ: Organ, donor: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "opacus" else known(name))
    with pytest.raises(NeurograftError, match=r"--dp-epsilon needs opacus, .* pip install 'neurograft\[dp\]'"):
        train(organ, host=donor, data=text, **PRIVATE)


def test_what_does_not_train_privately_says_so(tokenizer: Any, documents: list[str]) -> None:
    from tiny import make_model

    model: Any = make_model("llama")
    with pytest.raises(UsageError, match="--dp-epsilon is for train; nothing else trains with differential privacy"):
        tune_layers(model, tokenizer, documents, layers=list(model.model.layers)[2:4], **PRIVATE)


def test_what_was_masked_is_not_counted(organ: Organ, donor: Path, text: Path) -> None:
    from neurograft.privacy.rendering import redaction_line

    training = train(organ, host=donor, data=text, redact=True, **PRIVATE).manifest.training
    assert training is not None and training.redaction is not None and training.redaction.counts is None
    assert "what was found is not said, since the training is private" in redaction_line(training.redaction)
