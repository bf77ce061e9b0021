"""Personal data is masked before training, counted in the manifest, and nobody claims that names were looked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import spacy
from typer.testing import CliRunner

from neurograft import train
from neurograft.cli import app
from neurograft.data import fingerprint
from neurograft.errors import UsageError
from neurograft.organ import Organ, read_manifest
from neurograft.privacy.redaction import redact_documents

QUICK: dict[str, Any] = {"steps": 2, "sequence_length": 16, "batch_size": 2, "lr": 1e-3, "evaluations": 1}
PERSONAL = (
    "Mail john.doe@example.org or call +1 212-555-0123 about card 4111 1111 1111 1111, IBAN "
    "DE89 3704 0044 0532 0130 00, from 192.168.10.5."
)
HARMLESS = "HP:0001250 seizures in 45 of 1234 cases"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    def refuse(_socket: Any, address: Any) -> None:
        asked.append(address)
        raise OSError("blocked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: refuse(None, address))
    return asked


def test_patterns_are_masked_without_a_model_or_a_network(no_network: list[Any]) -> None:
    masked, redaction = redact_documents([PERSONAL, HARMLESS])
    assert masked[1] == HARMLESS
    assert masked[0] == (
        "Mail <EMAIL_ADDRESS> or call <PHONE_NUMBER> about card <CREDIT_CARD>, IBAN <IBAN_CODE>, from <IP_ADDRESS>."
    )
    kinds = ("EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS")
    assert redaction.counts == dict.fromkeys(kinds, 1) and redaction.documents == 1
    assert "EmailRecognizer" in redaction.recognizers and no_network == []


def test_names_are_claimed_only_where_a_model_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spacy.util.get_installed_models", list)
    masked, redaction = redact_documents(["John Smith came."])
    assert masked == ["John Smith came."]
    assert redaction.names_by is None and "SpacyRecognizer" not in redaction.recognizers

    def load(_name: str) -> Any:
        language = spacy.blank("en")
        ruler: Any = language.add_pipe("entity_ruler")
        ruler.add_patterns([{"label": "PERSON", "pattern": "John Smith"}])
        language.meta["version"] = "1.2.3"
        return language

    monkeypatch.setattr("spacy.util.get_installed_models", lambda: ["de_model", "en_model"])
    monkeypatch.setattr("spacy.load", load)
    masked, redaction = redact_documents(["John Smith came."])
    assert masked == ["<PERSON> came."] and redaction.names_by == "en_model 1.2.3"
    assert "SpacyRecognizer" in redaction.recognizers


def test_train_learns_from_masked_text(organ: Organ, donor: Path, tmp_path: Path) -> None:
    text, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt"
    text.write_text(f"{PERSONAL}\n\n{HARMLESS}")
    held_out.write_text(f"{HARMLESS}\n\nwrite to someone@example.org")
    output, words = tmp_path / "organ.safetensors", tmp_path / "source.safetensors"
    organ.save(words)
    arguments = ["train", words, "--host", donor, "--data", text, "--eval-data", held_out, "-o", output, "--redact"]
    arguments += ["--steps", 2, "--sequence-length", 16, "--batch-size", 2, "--evaluations", 1]
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == 0 and "EMAIL_ADDRESS 2" in " ".join(result.stdout.split())
    training = read_manifest(output).training
    assert training is not None and training.redaction is not None
    assert (
        training.redaction.counts is not None
        and training.redaction.counts["EMAIL_ADDRESS"] == 2
        and training.redaction.documents == 2
    )
    assert training.data_fingerprint == fingerprint(redact_documents([PERSONAL, HARMLESS])[0])
    plain = train(organ, host=donor, data=text, eval_data=held_out, **QUICK).manifest.training
    assert plain is not None and plain.redaction is None and plain.data_fingerprint != training.data_fingerprint
    assert "john" not in output.read_bytes().decode("latin-1")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, organ: Organ, donor: Path, tmp_path: Path) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name.startswith("presidio") else original(name, *rest)
    )
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": HARMLESS}) + "\n")
    with pytest.raises(UsageError, match=r"--redact needs presidio_analyzer; install neurograft\[redact\]"):
        train(organ, host=donor, data=text, redact=True, **QUICK)
