"""Training changes the organ and nothing else, keeps the best weights, and says truly what it did."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import check, evaluate, extract, graft, train, transplant
from neurograft.data import pack, tokenize_documents
from neurograft.errors import DataError, IncompatibleError, NeurograftError, UsageError
from neurograft.files import tensors_digest
from neurograft.identity import as_identity
from neurograft.loss import NextTokenLoss
from neurograft.models import load_model
from neurograft.organ import Organ, read_organ
from tiny import load, logits, make_model, make_tokenizer

Listing = Callable[[], list[str]]
QUICK: dict[str, Any] = {"steps": 6, "sequence_length": 16, "batch_size": 2, "lr": 1e-2, "evaluations": 2, "seed": 3}
SECRET = "Zaphodxylitis"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = [f"report {number}: {SECRET} of grade {number % 4}, seen in the left lung" for number in range(40)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.mark.parametrize("protocol", ["in_place", "insert", "standalone"])
def test_nothing_but_the_organ_changes(
    protocol: Any, donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = []
    original = load_model

    def remembered(*args: Any, **kwargs: Any) -> Any:
        hosts.append(original(*args, **kwargs))
        return hosts[-1]

    monkeypatch.setattr("neurograft.training.host.load_model", remembered)
    before = {name: tensor.clone() for name, tensor in load(donor).state_dict().items()}
    digest = tensors_digest(organ.tensors)
    trained = train(organ, host=donor, data=text, protocol=protocol, **QUICK)
    assert tensors_digest(organ.tensors) == digest != tensors_digest(trained.tensors)
    after = hosts[0].state_dict()
    position = trained.manifest.training.position if trained.manifest.training else -1
    outside = {name: tensor for name, tensor in after.items() if ".layers." not in name}
    assert outside and all(torch.equal(tensor, before[name]) for name, tensor in outside.items())
    if protocol != "standalone":
        grown = 2 if protocol == "insert" else 0
        for layer in range(6):
            if protocol == "in_place" and layer in (2, 3):
                continue
            now = layer + grown if layer >= position else layer
            for name in before:
                if name.startswith(f"model.layers.{layer}."):
                    moved = name.replace(f".{layer}.", f".{now}.", 1)
                    assert torch.equal(after[moved], before[name]), name


def test_sequences_are_no_longer_than_the_host_takes(text: Path, model_directory: Factory) -> None:
    for host in (model_directory("gpt2"), model_directory("llama", max_position_embeddings=64)):
        organ = extract(host, layers=(2, 3))
        trained = train(organ, host=host, data=text, steps=1, batch_size=1)
        assert trained.manifest.training is not None
        assert trained.manifest.training.hyperparameters["sequence_length"] == 64
        with pytest.raises(UsageError, match="takes at most 64 positions; give --sequence-length 64 or less"):
            train(organ, host=host, data=text, steps=1, sequence_length=65)


@pytest.mark.parametrize(("protocol", "mode"), [("in_place", "replace"), ("insert", "insert")])
def test_the_manifest_claims_what_the_file_does(
    protocol: Any, mode: Any, donor: Path, organ: Organ, text: Path, tmp_path: Path
) -> None:
    trained = train(
        organ, host=donor, data=text, eval_data=text, protocol=protocol, output=tmp_path / "o.safetensors", **QUICK
    )
    claim = trained.manifest.evaluations[0]
    assert claim.after < claim.before
    assert (trained.manifest.recommended_mode, trained.manifest.recommended_position) == (mode, 2)
    model, packed = (
        load(donor),
        pack(tokenize_documents(_documents(text), make_tokenizer()), sequence_length=16, separator_id=1),
    )
    with torch.no_grad(), graft(model, read_organ(tmp_path / "o.safetensors")):
        losses = NextTokenLoss(model)(packed.input_ids, packed.labels)
    assert math.exp(float(losses.sum()) / int((packed.labels[:, 1:] >= 0).sum())) == pytest.approx(
        claim.after, rel=1e-5
    )


def _documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_insert_starts_as_the_host(donor: Path, organ: Organ, text: Path) -> None:
    trained = train(organ, host=donor, data=text, protocol="insert", **{**QUICK, "steps": 1, "lr": 1e-12})
    host, model = load(donor), load(donor)
    with graft(model, trained):
        assert torch.allclose(logits(model), logits(host), atol=1e-6)
    with graft(model, as_identity(organ), mode="insert"):
        assert torch.equal(logits(model), logits(host))


def test_standalone_is_said_to_need_recovery(donor: Path, organ: Organ, text: Path, recipient: Path) -> None:
    trained = train(organ, host=donor, data=text, protocol="standalone", **QUICK)
    assert trained.manifest.anatomy.config["num_hidden_layers"] == 2
    assert any("fits nowhere without recovery" in finding.why for finding in check(trained, recipient).findings)
    with graft(load(recipient), trained, at=0, mode="insert"):
        pass


def test_the_trained_organ_helps_where_it_goes(donor: Path, organ: Organ, text: Path, tmp_path: Path) -> None:
    train(organ, host=donor, data=text, output=tmp_path / "o.safetensors", **{**QUICK, "steps": 30})
    transplant(tmp_path / "o.safetensors", donor, output=tmp_path / "out")
    report = evaluate(
        tmp_path / "out", data={"domain": text}, baseline=donor, gates=["domain<=0.9*baseline"], sequence_length=64
    )
    assert report.passed


def test_best_weights_are_kept_and_training_stops_early(donor: Path, organ: Organ, text: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("XKCD (QED) = 100%!\n\nZYX * WVU / TSR; 73 + 12?")
    options = {**QUICK, "steps": 200, "evaluations": 40, "patience": 2}
    trained = train(organ, host=donor, data=text, eval_data=tmp_path / "other.txt", **options)
    claim = trained.manifest.evaluations[0]
    assert trained.manifest.training is not None and trained.manifest.training.steps < 200
    assert claim.after <= claim.before


def test_strength_goes_part_of_the_way(donor: Path, organ: Organ, text: Path) -> None:
    options = {**QUICK, "evaluations": 1}
    whole, half = (train(organ, host=donor, data=text, strength=s, **options) for s in (1.0, 0.5))
    for name, start in organ.tensors.items():
        assert torch.allclose(half.tensors[name], (start + whole.tensors[name]) / 2, atol=1e-6)


def test_one_seed_one_organ(donor: Path, organ: Organ, text: Path) -> None:
    digests = [
        tensors_digest(train(organ, host=donor, data=text, **{**QUICK, "seed": seed}).tensors) for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_how_long_to_train(donor: Path, organ: Organ, text: Path) -> None:
    options = {key: value for key, value in QUICK.items() if key != "steps"}

    def done(**limit: Any) -> Any:
        trained = train(organ, host=donor, data=text, eval_data=text, **options, **limit).manifest.training
        assert trained is not None
        return trained

    epoch = done()
    assert done(epochs=1).steps == epoch.steps
    # Every sequence has T - 1 targets: its first token has nothing before it.
    assert epoch.tokens_seen == pytest.approx(sum(len(d) + 1 for d in _documents(text)) * 15 / 16, rel=0.02)
    assert abs(done(epochs=2).steps - 2 * epoch.steps) <= 1  # the last step of an epoch may be a part of one
    assert done(steps=3).steps == 3
    assert done(max_tokens=100).steps == math.ceil(100 / 32)
    with pytest.raises(UsageError, match="--epochs and --steps say when to stop"):
        done(epochs=1, steps=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lr": 0}, r"--lr: .*greater than 0.* \(it is 0\)"),
        ({"batch_size": 0}, "--batch-size"),
        ({"held_out": 1.5}, "--held-out"),
        ({"strength": 0}, "--strength"),
        ({"protocol": "sideways"}, "--protocol"),
        ({"stepps": 3}, "--stepps"),
        ({"at": 7}, "position 7 is out of range"),
    ],
)
def test_wrong_options(options: dict[str, Any], reason: str, donor: Path, organ: Organ, text: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        train(organ, host=donor, data=text, **options)


def test_no_share_is_held_out_beside_evaluation_data(donor: Path, organ: Organ, text: Path) -> None:
    with pytest.raises(UsageError, match="leave --held-out out"):
        train(organ, host=donor, data=text, eval_data=text, held_out=0.2)


def test_the_file_holds_no_text_and_no_path(donor: Path, organ: Organ, text: Path, tmp_path: Path) -> None:
    train(organ, host=donor, data=text, output=tmp_path / "o.safetensors", **QUICK)
    content = (tmp_path / "o.safetensors").read_bytes()
    assert SECRET.encode() not in content
    assert str(text.parent).encode() not in content and str(donor.parent).encode() not in content


def test_a_half_precision_donor_stays_one(text: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    organ = extract(tmp_path / "half", layers=(2, 4))
    trained = train(organ, host=tmp_path / "half", data=text, **QUICK)
    assert organ.manifest.anatomy.dtype == trained.manifest.anatomy.dtype == "bfloat16"
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.bfloat16}
    transplant(trained, tmp_path / "half", output=tmp_path / "out")


def test_dropout_acts_in_the_organ_alone(model_directory: Factory, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = model_directory("gpt2")
    modes: list[dict[str, bool]] = []
    original = NextTokenLoss.__call__

    def spied(loss: NextTokenLoss, *args: Any, **more: Any) -> Any:
        modules = loss.model.named_modules()
        modes.append({name: module.training for name, module in modules if name.endswith("attn_dropout")})
        return original(loss, *args, **more)

    monkeypatch.setattr(NextTokenLoss, "__call__", spied)
    train(extract(donor, layers=(2, 4)), host=donor, data=text, **{**QUICK, "steps": 1})
    trained_on = {name for mode in modes for name, training_mode in mode.items() if training_mode}
    assert trained_on == {"transformer.h.2.attn.attn_dropout", "transformer.h.3.attn.attn_dropout"}


def test_a_host_with_another_tokenizer(organ: Organ, text: Path, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "other")
    make_tokenizer("zyxwvutsrqponmlkjihgfedcba ").save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleError, match="they cut the same text into other tokens"):
        train(organ, host=tmp_path / "other", data=text, **QUICK)


def test_nothing_is_written_when_training_fails(
    donor: Path, organ: Organ, text: Path, tmp_path: Path, listing: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o.safetensors"
    with pytest.raises(DataError, match="there is no file or folder"):
        train(organ, host=donor, data="no.txt", output=output)

    def diverged(*_: Any, **__: Any) -> Any:
        return torch.tensor([[float("nan")]], requires_grad=True)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for fault, error in ((diverged, NeurograftError), (interrupted, KeyboardInterrupt)):
        monkeypatch.setattr(NextTokenLoss, "__call__", fault)
        with pytest.raises(error):
            train(organ, host=donor, data=text, output=output, **QUICK)
    assert listing() == []


def test_an_existing_output_is_refused_before_training(donor: Path, organ: Organ, organ_file: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        train(organ, host=donor, data=text, output=organ_file)


def test_the_learning_rate_is_chosen_by_how_many_layers_train(model_directory: Factory, text: Path) -> None:
    donor = model_directory("llama")
    rates = []
    for layers, changes in (((2, 3), {}), ((0, 6), {}), ((0, 6), {"rank": 2}), ((0, 6), {"lr": 5e-4})):
        options: dict[str, Any] = {**QUICK, "lr": "auto", **changes}
        trained = train(extract(donor, layers=layers), host=donor, data=text, **options).manifest.training
        assert trained is not None
        rates.append(trained.hyperparameters["lr"])
        assert trained.hyperparameters["kernels"] in ("float32", "float32-onednn", "bfloat16")
    one, six, low_rank, given = rates
    assert 0 < six < one <= 1e-2 and six < low_rank <= 1e-2 and given == 5e-4


def test_low_rank_changes_become_part_of_an_ordinary_organ(model_directory: Factory, text: Path) -> None:
    donor = model_directory("llama")
    organ = extract(donor, layers=(2, 4))
    trained = train(organ, host=donor, data=text, rank=2, **{**QUICK, "lr": 3e-2})
    assert set(trained.tensors) == set(organ.tensors)
    for name, tensor in trained.tensors.items():
        change = tensor - organ.tensors[name]
        assert change.any() == (tensor.ndim == 2), name
        if tensor.ndim == 2:
            assert torch.linalg.matrix_rank(change, atol=1e-5) <= 2
    (claim,) = trained.manifest.evaluations
    assert claim.after < claim.before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "strength": 0.5}, "give one of them"),
        ({"lr": "fast"}, "--lr: "),
        ({"lr": 2.0}, "--lr: .*less than 1"),
        ({"precision": "float8"}, "--precision: "),
        ({"rank": 0}, "--rank: "),
    ],
)
def test_wrong_ways_to_train_are_refused(
    options: dict[str, Any], message: str, model_directory: Factory, text: Path
) -> None:
    donor = model_directory("llama")
    with pytest.raises(UsageError, match=message):
        train(extract(donor, layers=(2, 4)), host=donor, data=text, **{**QUICK, **options})


def test_an_insert_goes_on_from_what_it_has_learned(
    organ: Organ, donor: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(organ, host=donor, data=text, protocol="insert", **QUICK)
    again = train(first, host=donor, data=text, protocol="insert", **QUICK)
    assert f"{first.name} was trained as an insert, and goes on from there" in caplog.text
    ((before, after),) = ((e.after, again.manifest.evaluations[-1].before) for e in first.manifest.evaluations)
    assert after == pytest.approx(before, rel=1e-5)
    assert again.manifest.evaluations[-1].after < after
    train(first, host=donor, data=text, **QUICK)
    assert f"{first.name} was trained to stand between layers, and in_place lets it replace some" in caplog.text


def test_what_is_odd_about_the_text_is_said(
    organ: Organ, donor: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(text.read_text().splitlines(keepends=True)[:3]))
    train(organ, host=donor, data=text, eval_data=few, max_tokens=20, sequence_length=16, batch_size=2)
    assert "3 documents of the evaluation text are in the training text too" in caplog.text
    assert "a step takes 32 tokens, more than the 20 that were asked for" in caplog.text
    with pytest.raises(UsageError, match="an optimizer step would take 1 x 5000 sequences, and the text fills"):
        train(organ, host=donor, data=text, batch_size=5000)


@pytest.mark.parametrize(
    ("changes", "suspect"),
    [({"anchor": 1e9}, "--anchor than 1e\\+09"), ({"weight_decay": 1e6}, "--weight-decay than 1e\\+06")],
)
def test_what_likely_made_it_diverge_is_named(
    changes: dict[str, Any], suspect: str, organ: Organ, donor: Path, text: Path
) -> None:
    with pytest.raises(NeurograftError, match=f"training diverged: the loss at step .* try a lower {suspect}"):
        train(organ, host=donor, data=text, **{**QUICK, "steps": 60, "patience": 99, **changes})
