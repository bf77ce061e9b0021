"""Perplexity as it is defined, intervals that mean something, and gates that are checked before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import evaluate
from neurograft.errors import DataError, GateError, ModelError, UsageError
from neurograft.evaluation import EvaluationReport, document_losses, parse_data_arguments, parse_gate
from tiny import VOCABULARY, load, make_model, make_tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "a",
    "numbers: 0 1 2 3 4 5 6 7 8 9, and some more words behind them",
    "Patients with this finding are rare.",
]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    for name, documents in (("domain", TEXT), ("general", [*TEXT[::-1], "more text"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return {name: tmp_path / f"{name}.jsonl" for name in ("domain", "general")}


def _naive(model: Any, tokens: list[int]) -> float:
    """The loss of one document by the definition: one forward pass a token, end-of-text before the first."""
    total = 0.0
    for place in range(len(tokens)):
        with torch.no_grad():
            scores = model(torch.tensor([[1, *tokens[:place]]])).logits[0, -1]
        total -= float(torch.log_softmax(scores.double(), dim=0)[tokens[place]])
    return total


def test_against_the_definition(tokenizer: Any) -> None:
    model = make_model("llama")
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    measured = document_losses(model, tokens, sequence_length=128, batch_size=3, separator_id=1)
    for (loss, count), document in zip(measured, tokens, strict=True):
        assert count == len(document)
        assert loss == pytest.approx(_naive(model, document), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_batch_size_does_not_matter(kind: str, tokenizer: Any) -> None:
    model = make_model(kind)
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    losses = [
        [loss for loss, _ in document_losses(model, tokens, sequence_length=48, batch_size=size, separator_id=1)]
        for size in (1, 2, 7)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 63])
def test_long_documents_are_scored_once_with_half_a_window_of_context(length: int) -> None:
    model = make_model("llama")
    tokens = [(7 * place) % (VOCABULARY - 2) + 2 for place in range(length)]
    [(loss, count)] = document_losses(model, [tokens], sequence_length=8, batch_size=4, separator_id=1)
    assert count == length
    stream, expected, done = [1, *tokens], 0.0, 1
    while done < len(stream):
        start = 0 if done == 1 else done - 4
        stop = min(start + 8, len(stream))
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([stream[start:stop]])).logits[0].double(), dim=-1)
        expected -= sum(float(scores[place - start - 1, stream[place]]) for place in range(done, stop))
        done = stop
    assert loss == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_weighted_by_tokens(tokenizer: Any, texts: dict[str, Path]) -> None:
    model = make_model("llama")
    result = evaluate((model, tokenizer), data={"domain": texts["domain"]}, sequence_length=128).data["domain"]
    pairs = document_losses(
        model, tokenizer(TEXT, add_special_tokens=False)["input_ids"], sequence_length=128, batch_size=1, separator_id=1
    )
    assert result.tokens == sum(count for _, count in pairs)
    assert result.perplexity == pytest.approx(math.exp(sum(loss for loss, _ in pairs) / result.tokens), rel=1e-5)
    assert result.low < result.perplexity < result.high
    again = evaluate((model, tokenizer), data={"domain": texts["domain"]}, sequence_length=128).data["domain"]
    assert again == result


def test_a_model_beside_itself(tokenizer: Any, texts: dict[str, Path]) -> None:
    model = make_model("llama")
    report = evaluate((model, tokenizer), data=texts, baseline=(model, tokenizer), sequence_length=64)
    for result in report.data.values():
        assert result.comparable_tokens
        assert (result.ratio, result.ratio_low, result.ratio_high) == (1.0, 1.0, 1.0)


def test_directories_and_their_names(donor: Path, recipient: Path, texts: dict[str, Path]) -> None:
    report = evaluate(
        donor, data=texts, baseline=recipient, gates=["domain<=2*baseline", "general<1"], sequence_length=64
    )
    assert (report.model, report.baseline) == (donor.name, recipient.name)
    result = report.data["domain"]
    assert result.ratio == pytest.approx(result.perplexity / (result.baseline_perplexity or 0))
    assert [gate.passed for gate in report.gates] == [True, False] and report.passed is False
    text = report.model_dump_json()
    assert EvaluationReport.model_validate_json(text) == report
    assert "NaN" not in text and "Infinity" not in text


def test_another_tokenizer_is_compared_by_the_byte(texts: dict[str, Path], tokenizer: Any) -> None:
    model = make_model("llama")
    shorter = make_tokenizer("abcdefghijklmnopqrstuvwxyz")
    shorter.add_tokens(["the ", "and "])
    result = evaluate((model, tokenizer), data=texts, baseline=(model, shorter), sequence_length=64).data["domain"]
    assert result.comparable_tokens is False
    assert result.tokens != result.baseline_tokens
    assert result.ratio is not None and result.ratio != pytest.approx(
        result.perplexity / (result.baseline_perplexity or 1)
    )


def test_max_tokens_takes_whole_documents(tokenizer: Any, texts: dict[str, Path]) -> None:
    model = make_model("llama")
    result = evaluate((model, tokenizer), data={"domain": texts["domain"]}, max_tokens=44, sequence_length=64).data[
        "domain"
    ]
    assert (result.documents, result.tokens) == (2, len(TEXT[0]) + 1)


def test_progress_ends_at_its_total(tokenizer: Any, texts: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    model = (make_model("llama"), tokenizer)
    evaluate(
        model, data=texts, baseline=model, sequence_length=32, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_the_mode_of_the_model_is_kept(tokenizer: Any, texts: dict[str, Path]) -> None:
    model = make_model("llama")
    model.train()
    evaluate((model, tokenizer), data=texts, sequence_length=64)
    assert model.training


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("domain<=0.9*baseline", ("domain", "<=", 0.9, True)),
        (" general < baseline ", ("general", "<", 1.0, True)),
        ("a.b-c >= 20", ("a.b-c", ">=", 20.0, False)),
        ("x>1.5 * baseline", ("x", ">", 1.5, True)),
    ],
)
def test_gates(text: str, expected: tuple[Any, ...]) -> None:
    gate = parse_gate(text)
    assert (gate.name, gate.comparison, gate.factor, gate.of_baseline) == expected


@pytest.mark.parametrize(
    "text", ["", "domain", "domain<=", "domain==3", "domain<=2*3", "domain<=x*baseline", "<=3", "a b<3"]
)
def test_gates_that_can_not_be_read(text: str) -> None:
    with pytest.raises(GateError, match="can't be read; write NAME<=FACTOR"):
        parse_gate(text)


def test_gates_are_checked_before_anything_is_loaded(texts: dict[str, Path]) -> None:
    for gate, reason in [
        ("medicine<3", "names the data set medicine; there are domain, general"),
        ("domain<baseline", "speaks of a baseline, and none was given"),
        ("domain<", "can't be read"),
    ]:
        with pytest.raises(GateError, match=reason):
            evaluate("nowhere/at-all", data=texts, gates=[gate])


def test_data_arguments() -> None:
    assert parse_data_arguments(["a=x.txt", "b=y", "a=z=1.txt"]) == {
        "a": ["x.txt", "z=1.txt"],
        "b": ["y"],
    }  # the help says so
    assert parse_data_arguments(["folder/reports.jsonl.gz"]) == {"reports": ["folder/reports.jsonl.gz"]}
    for wrong in ([], ["=x"], ["a="], [""]):
        with pytest.raises(UsageError):
            parse_data_arguments(wrong)


def test_windows_are_no_longer_than_the_models_take(
    texts: dict[str, Path], model_directory: Factory, recipient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = model_directory("gpt2")
    assert evaluate(recipient, data=texts).sequence_length == 512
    assert evaluate(short, data=texts).sequence_length == 64
    assert evaluate(recipient, data=texts, baseline=short).sequence_length == 64

    def load_nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("neurograft.evaluation.load_model", load_nothing)
    with pytest.raises(UsageError, match="takes at most 64 positions; give --sequence-length 64 or less"):
        evaluate(recipient, data=texts, baseline=short, sequence_length=65)


def test_what_can_not_be_evaluated(tokenizer: Any, texts: dict[str, Path], recipient: Path) -> None:
    with pytest.raises(UsageError, match="the sequence length is 65, and gpt2 takes at most 64 positions"):
        evaluate((make_model("gpt2"), tokenizer), data=texts, sequence_length=65)
    broken = load(recipient)
    with torch.no_grad():
        next(broken.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match="on domain is not finite in 4 documents"):
        evaluate((broken, tokenizer), data=texts, sequence_length=64)
    with pytest.raises(DataError, match="there is no file or folder"):
        evaluate(recipient, data={"domain": "no.txt"})
