"""What `check` finds: each incompatibility by name and values, the matching position, and nothing that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import check, extract, transplant
from neurograft.compat import CheckReport
from neurograft.errors import IncompatibleError, OrganFileError
from neurograft.identity import as_identity
from neurograft.organ import Organ
from tiny import LAYERS, load, make_model, make_tokenizer


def _blocking(report: CheckReport) -> str:
    return "; ".join(finding.sentence() for finding in report.findings if finding.severity == "blocks")


INCOMPATIBLE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 64}, "hidden_size is 32 in the organ and 64 in the recipient"),
    ({"num_attention_heads": 2}, "num_attention_heads is 4 in the organ and 2 in the recipient"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 2 in the organ and 4 in the recipient"),
    ({"intermediate_size": 48}, "intermediate_size is 64 in the organ and 48 in the recipient"),
    ({"hidden_act": "gelu"}, "hidden_act is silu in the organ and gelu in the recipient"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06 in the organ and 1e-05 in the recipient"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        r"rope_theta is 10000.0 in the organ and 500.0 in",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type is default in the organ and linear",
    ),
    ({"attention_bias": True}, "attention_bias is False in the organ and True in the recipient"),
]


@pytest.mark.parametrize(
    ("changes", "sentence"), INCOMPATIBLE, ids=[next(iter(changes)) for changes, _ in INCOMPATIBLE]
)
def test_what_does_not_fit_is_named_with_its_values(
    changes: dict[str, Any], sentence: str, organ: Organ, model_directory: Factory, tmp_path: Path
) -> None:
    recipient = model_directory("llama", seed=1, **changes)
    report = check(organ, recipient)
    assert report.blocked and sentence in _blocking(report)
    with pytest.raises(IncompatibleError, match="does not fit"):
        transplant(organ, recipient, at=0, mode="insert", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_that_differ_are_one_sentence_beside_their_cause(organ: Organ, model_directory: Factory) -> None:
    report = check(organ, model_directory("llama", seed=1, hidden_size=64))
    blocking = [finding for finding in report.findings if finding.severity == "blocks"]
    assert [finding.subject for finding in blocking] == ["head_dim", "hidden_size", "input_layernorm.weight"]
    assert blocking[-1].why == "the tensor has another shape, as have 8 more of a layer's tensors"


def test_sliding_window(model_directory: Factory) -> None:
    organ = extract(model_directory("mistral"), layers=(0, 2))
    assert "sliding_window is 8 in the organ and 4 in the recipient" in _blocking(
        check(organ, model_directory("mistral", sliding_window=4))
    )


def test_another_architecture(organ: Organ, model_directory: Factory) -> None:
    assert "model_type is llama in the organ and mistral in the recipient" in _blocking(
        check(organ, model_directory("mistral"))
    )


def test_what_does_not_matter_to_a_layer_does_not_block(organ: Organ, model_directory: Factory) -> None:
    recipient = model_directory("llama", seed=1, layers=9, tie_word_embeddings=True, attention_dropout=0.1)
    report = check(organ, recipient)
    assert not report.blocked
    assert [finding.severity for finding in report.findings if finding.subject == "attention_dropout"] == ["notes"]


def test_longer_sequences_are_a_risk(organ: Organ, model_directory: Factory) -> None:
    report = check(organ, model_directory("llama", seed=1, max_position_embeddings=99))
    assert [f.severity for f in report.findings if f.subject == "max_position_embeddings"] == ["risks"]


def test_a_vocabulary_of_another_size_alone_does_not_block(organ: Organ, model_directory: Factory) -> None:
    assert not check(organ, model_directory("llama", seed=1, vocab_size=100)).blocked


def _with_tokenizer(folder: Path, letters: str) -> Path:
    make_model("llama", seed=1).save_pretrained(folder)
    make_tokenizer(letters).save_pretrained(folder)
    return folder


def test_a_tokenizer_that_cuts_text_otherwise_blocks(organ: Organ, tmp_path: Path) -> None:
    report = check(organ, _with_tokenizer(tmp_path / "other", "zyxwvutsrqponmlkjihgfedcba"))
    assert "tokenizer is" in _blocking(report) and "28 tokens" in _blocking(report)


def test_a_tokenizer_with_more_tokens_is_a_note(organ: Organ, tmp_path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path / "more")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|chat|>"])
    tokenizer.save_pretrained(tmp_path / "more")
    report = check(organ, tmp_path / "more")
    assert not report.blocked
    assert [f.severity for f in report.findings if f.subject == "tokenizer"] == ["notes"]


def test_a_missing_tokenizer_is_a_note(organ: Organ, tmp_path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path / "bare")
    report = check(organ, tmp_path / "bare")
    assert not report.blocked
    assert any("tokenizers could not be compared" in finding.why for finding in report.findings)


@pytest.mark.parametrize(("at", "mode"), [(LAYERS + 1, "insert"), (LAYERS - 1, "replace"), (-1, "insert")])
def test_a_position_out_of_range_blocks(at: int, mode: Any, organ: Organ, recipient: Path) -> None:
    assert f"position {at} is out of range" in _blocking(check(organ, recipient, at=at, mode=mode))


def test_a_kind_that_was_not_trained_there_is_a_risk(model_directory: Factory) -> None:
    donor = model_directory("gemma2")
    organ = extract(donor, layers=(0, 1))
    same, other = check(organ, donor, at=2, mode="replace"), check(organ, donor, at=1, mode="replace")
    assert [f for f in same.findings if f.subject == "layer_types"] == []
    [finding] = [f for f in other.findings if f.subject == "layer_types"]
    assert (finding.severity, finding.organ, finding.recipient) == ("risks", "sliding_attention", "full_attention")


def _perturbed(folder: Path, source: Path, size: float) -> Path:
    """A model of the same descent: every weight moved a little."""
    model = load(source)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(0.1) * size)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("grown_at", "expected"), [(0, 4), (1, 4), (5, 2)])
def test_the_matching_position_in_a_grown_relative(
    grown_at: int, expected: int, donor: Path, organ: Organ, tmp_path: Path
) -> None:
    growth = as_identity(extract(donor, layers=(0, 2)))
    transplant(growth, donor, at=grown_at, mode="insert", output=tmp_path / "grown")
    relative = _perturbed(tmp_path / "relative", tmp_path / "grown", 0.2)
    report = check(organ, relative)
    assert report.matching_position == report.position == expected
    assert report.similarity is not None and 0.9 < report.similarity < 1
    elsewhere = check(organ, relative, at=expected - 1)
    assert [f.severity for f in elsewhere.findings if f.subject == "matching position"] == ["risks"]


def test_an_identity_organ_goes_where_it_was_copied_from(donor: Path, organ: Organ, tmp_path: Path) -> None:
    transplant(as_identity(extract(donor, layers=(0, 1))), donor, at=0, mode="insert", output=tmp_path / "grown")
    inserted = as_identity(organ)
    manifest = inserted.manifest.model_copy(update={"recommended_mode": "insert"})
    report = check(Organ(manifest, inserted.tensors), tmp_path / "grown")
    assert (report.mode, report.position) == ("insert", organ.manifest.recommended_position + 1)


def test_unrelated_weights_match_nowhere(organ: Organ, recipient: Path) -> None:
    report = check(organ, recipient)
    assert report.matching_position is None
    assert any("none of the recipient's layers resemble" in finding.why for finding in report.findings)


def test_checking_writes_nothing(organ_file: Path, recipient: Path, tmp_path: Path) -> None:
    check(organ_file, recipient)
    assert [path.name for path in tmp_path.iterdir()] == [organ_file.name]


def test_tensors_of_other_dtypes(organ: Organ, recipient: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    whole = Organ(organ.manifest, {**organ.tensors, name: organ.tensors[name].long()})
    with pytest.raises(OrganFileError, match=f"holds {name} as int64 where its configuration calls for float32"):
        check(whole, recipient)
    mixed = Organ(organ.manifest, {**organ.tensors, name: organ.tensors[name].bfloat16()})
    [finding] = [finding for finding in check(mixed, recipient).findings if finding.subject == "dtype"]
    assert finding.severity == "notes" and "bfloat16, float32" in finding.why
