"""Alignment: what is sketched in training is found again, and told from what is elsewhere, turned or unrelated."""

from __future__ import annotations

import base64
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Factory
from neurograft import check, compose, extract, merge, train, transplant
from neurograft.alignment import compare_states, frechet_distance, linear_cka, measure_alignment, verdict_of
from neurograft.errors import ModelError, OrganFileError, UsageError
from neurograft.organ import Organ, read_organ
from neurograft.record import read_record
from neurograft.sketch import SKIPPED, WIDTH, boundary_states, encode_probe, probe_text, unpack_states
from tiny import LAYERS, load, logits, make_model, make_tokenizer, save_model

QUICK: dict[str, Any] = {"steps": 2, "batch_size": 2, "sequence_length": 16, "lr": 1e-5}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"report {number}: kidney well, patient at home" for number in range(12)))
    return path


@pytest.fixture(scope="module")
def trained(model_directory: Factory, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    donor = model_directory("llama", seed=0)
    path = tmp_path_factory.mktemp("organ") / "trained.safetensors"
    train(extract(donor, layers=(2, 4), name="tiny"), host=donor, data=text, output=path, **QUICK)
    return path


def _states(seed: int, tokens: int = 300, width: int = 8) -> Any:
    return np.random.default_rng(seed).normal(size=(tokens, width)) * np.arange(1, width + 1) + 0.5


def test_cka_sees_no_axes_and_the_distance_does() -> None:
    states = _states(0)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    assert linear_cka(states, states) == pytest.approx(1) and frechet_distance(states, states) == pytest.approx(
        0, abs=1e-6
    )
    assert linear_cka(states, 3 * states @ axes + 7) == pytest.approx(1)
    assert frechet_distance(states, states @ axes) > 0.2
    assert linear_cka(states, _states(2)) < 0.1
    shuffled = states[np.random.default_rng(3).permutation(len(states))]
    assert linear_cka(states, shuffled) < 0.1 and frechet_distance(states, shuffled) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_normal_distributions_by_formula() -> None:
    # On one axis: (m - n)^2 + (s - t)^2 over m^2 + n^2 + s^2 + t^2.
    first, second = np.array([[1.0], [5.0]]), np.array([[-1.0], [0.0]])  # means 3, -0.5; deviations 2, 0.5
    first, second = np.hstack([first, 0 * first]), np.hstack([second, 0 * second])
    expected = (3.5**2 + 1.5**2) / (3**2 + 0.5**2 + 2**2 + 0.5**2)
    assert frechet_distance(first, second) == pytest.approx(min(expected, 1) ** 0.5)
    second = np.array([[2.0, 0.0], [4.0, 0.0]])  # mean 3, deviation 1
    assert frechet_distance(first, second) == pytest.approx((1 / (9 + 9 + 4 + 1)) ** 0.5)


def test_an_organ_is_at_home_where_it_was_trained(trained: Path, model_directory: Factory) -> None:
    report = check(trained, model_directory("llama", seed=0))
    found = report.alignment
    assert found is not None and (found.position, found.best, found.mode) == (2, 2, "replace")
    assert [entry.position for entry in found.curve] == list(range(LAYERS - 1))
    assert found.here.distance_entering < 1e-3 and found.here.cka_entering > 0.999 and found.here.verdict == "fits"
    others = [entry.distance for entry in found.curve if entry.position != 2]
    assert min(others) > 2 * found.here.distance
    finding = next(finding for finding in report.findings if finding.subject == "alignment")
    assert finding.severity == "notes" and finding.why.startswith("fits at position 2, going by the hidden states")
    elsewhere = check(trained, model_directory("llama", seed=0), at=0)
    assert elsewhere.alignment is not None and elsewhere.alignment.curve == found.curve
    finding = next(finding for finding in elsewhere.findings if finding.subject == "alignment")
    assert "they are most alike at position 2" in finding.why


def test_what_is_inserted_and_moves_nothing_fits_anywhere(trained: Path) -> None:
    sketch = read_organ(trained).manifest.sketch
    assert sketch is not None
    generator = np.random.default_rng(0)
    states = [generator.normal(size=(sketch.tokens, WIDTH)) + boundary for boundary in range(LAYERS + 1)]
    still = sketch.model_copy(update={"leaving": sketch.entering})
    found = compare_states(still, states, 2, at=0, mode="insert", name="x")
    assert [entry.position for entry in found.curve] == list(range(LAYERS + 1))
    assert all(entry.distance == 0 < entry.distance_entering for entry in found.curve)
    assert min(entry.distance for entry in compare_states(still, states, 2, at=0, mode="replace", name="x").curve) > 0.1
    entering, leaving = unpack_states(sketch, "x")
    moving = compare_states(sketch, [entering] * 3, 2, at=0, mode="insert", name="x").here
    assert moving.distance_leaving == pytest.approx(frechet_distance(leaving, entering), abs=1e-5)
    assert moving.distance == pytest.approx(moving.distance_leaving / 2, abs=1e-5)  # it reads what it is used to
    astray = compare_states(sketch, states, 2, at=0, mode="insert", name="x").here
    assert astray.distance == pytest.approx(1.5 * astray.distance_leaving, abs=1e-5)  # not at all, and moves little


def test_unrelated_weights_are_far_everywhere(trained: Path, model_directory: Factory) -> None:
    home, far = (check(trained, model_directory("llama", seed=seed)).alignment for seed in (0, 1))
    assert home is not None and far is not None
    assert min(entry.distance for entry in far.curve) > 5 * home.here.distance
    assert far.here.verdict != "fits"


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [("gpt2", "standalone"), ("gemma3_text", "in_place"), ("opt", "in_place"), ("llama", "insert")],
)
def test_what_enters_and_leaves_is_sketched(kind: str, protocol: Any, model_directory: Factory, text: Path) -> None:
    host = model_directory(kind)
    options = {**QUICK, "lr": 1e-2}
    organ = train(extract(host, layers=(2, 4)), host=host, data=text, protocol=protocol, **options)
    assert organ.manifest.sketch is not None and organ.manifest.sketch.width == WIDTH
    entering, leaving = unpack_states(organ.manifest.sketch, organ.name)
    model = load(host)
    windows = encode_probe(make_tokenizer(), organ.manifest.sketch.window, kind)
    states = boundary_states(model, windows)
    assert len(states) == LAYERS + 1 and organ.manifest.sketch.tokens == sum(len(w) - SKIPPED for w in windows)
    home = 0 if protocol == "standalone" else 2
    assert frechet_distance(entering, states[home]) < 1e-3 < frechet_distance(leaving, states[home])
    found = measure_alignment(organ, model, make_tokenizer(), at=2, mode="insert", name=kind)
    assert len(found.curve) == LAYERS + 1


def test_reading_states_leaves_the_model_alone(model_directory: Factory) -> None:
    model = load(model_directory("llama"))
    model.train()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    boundary_states(model, [[1, 2, 3, 4, 5, 6, 7]])
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_states_are_those_that_transformers_returns(model_directory: Factory) -> None:
    from neurograft.sketch import _projection

    model, ids = load(model_directory("llama")), torch.arange(2, 30)[None]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    states = boundary_states(model, ids.tolist())
    for boundary in range(LAYERS):  # the last one is behind the final norm there
        own = hidden[boundary][0, SKIPPED:].double()
        expected = own / own.square().mean(-1, keepdim=True).sqrt() @ _projection(own.shape[-1])
        np.testing.assert_allclose(states[boundary], expected.numpy(), rtol=1e-6, atol=1e-9)


def test_the_sketch_is_small_and_the_same_every_time(
    trained: Path, model_directory: Factory, text: Path, tmp_path: Path
) -> None:
    donor = model_directory("llama", seed=0)
    again = train(extract(donor, layers=(2, 4), name="tiny"), host=donor, data=text, **QUICK)
    manifest = read_organ(trained).manifest
    assert manifest.sketch == again.manifest.sketch and manifest.sketch is not None
    assert len(manifest.sketch.entering) + len(manifest.sketch.leaving) < 200_000
    transplant(trained, donor, output=tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record is not None and record.operations[0].manifest is not None
    assert record.operations[0].manifest == manifest.model_copy(update={"sketch": None})


def test_only_what_was_trained_has_a_sketch(trained: Path, model_directory: Factory) -> None:
    donor = model_directory("llama", seed=0)
    organ = extract(donor, layers=(2, 4))
    assert organ.manifest.sketch is None and check(organ, donor).alignment is None
    with pytest.raises(UsageError, match="carries no sketch of the hidden states around it; train it first"):
        check(organ, donor, alignment="measure")
    assert merge([trained, trained]).manifest.sketch is None
    assert check(trained, donor, alignment="skip").alignment is None
    assert compose([trained], donor).blocked is False


def test_a_large_model_is_not_loaded_unasked(
    trained: Path, model_directory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = model_directory("llama", seed=0)
    monkeypatch.setattr("neurograft.checkpoint.EASY_SHARE", 0.0)
    assert check(trained, donor).alignment is None
    assert check(trained, donor, alignment="measure").alignment is not None


def test_a_tokenizer_that_can_not_encode_the_text(
    trained: Path, model_directory: Factory, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for letters, reason in (("e t", "of them unknown"), ("0", "at most 20% may be unknown")):
        with pytest.raises(ModelError, match=reason):
            encode_probe(make_tokenizer(letters), 128, "x")
    poor = save_model(tmp_path / "poor", "llama")
    make_tokenizer("kidney").save_pretrained(poor)
    organ = train(extract(poor, layers=(2, 4)), host=poor, data=text, **QUICK)
    assert organ.manifest.sketch is None and "can't encode the probe text" in caplog.text
    bare = tmp_path / "bare"
    make_model("llama").save_pretrained(bare)
    report = check(trained, bare)
    assert report.alignment is None and not report.blocked
    assert "bare has no tokenizer" in next(f.why for f in report.findings if f.subject == "alignment")
    with pytest.raises(ModelError, match="bare has no tokenizer"):
        check(trained, bare, alignment="measure")


def test_a_sketch_of_something_else(trained: Path, model_directory: Factory) -> None:
    organ, donor = read_organ(trained), model_directory("llama", seed=0)
    sketch = organ.manifest.sketch
    assert sketch is not None

    def changed(**update: Any) -> Organ:
        return Organ(organ.manifest.model_copy(update={"sketch": sketch.model_copy(update=update)}), organ.tensors)

    zeros = base64.b64encode(np.zeros((3, WIDTH), "<f2").tobytes()).decode()
    wild = base64.b64encode(np.full((sketch.tokens, WIDTH), np.nan, "<f2").tobytes()).decode()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"text": "0" * 64}, ModelError, "is of another text than this neurograft's"),
        ({"window": 100_000}, ModelError, "or of longer pieces of it than"),
        ({"window": 64}, ModelError, "cuts the probe text into"),
        ({"leaving": zeros}, OrganFileError, "holds .* and 3 tokens where it says"),
        ({"entering": "?"}, OrganFileError, "can't be read"),
        ({"leaving": wild}, OrganFileError, "holds values that are not finite"),
    ]
    for update, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            check(changed(**update), donor, alignment="measure")


def test_the_text_is_public_and_long_enough() -> None:
    assert 2500 < len(probe_text()) < 10_000 and probe_text().isascii()


def test_verdicts_are_in_order() -> None:
    verdicts = [verdict_of(distance / 100) for distance in range(101)]
    assert list(dict.fromkeys(verdicts)) == ["fits", "needs recovery", "does not fit"]
