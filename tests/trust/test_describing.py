"""Cards and provenance, from manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import neurograft
from neurograft.bank.card import model_card
from neurograft.cli import app
from neurograft.errors import UsageError
from neurograft.files import file_sha256
from neurograft.manifest import Merge, Parent
from neurograft.organ import Organ, read_manifest
from neurograft.trust.provenance import PREDICATE, STATEMENT


@pytest.fixture
def trained(organ_file: Path, donor: Path, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Secret sentence number {number} of the hospital." for number in range(40)))
    path = tmp_path / "trained.safetensors"
    options: dict[str, Any] = {"max_tokens": 400, "sequence_length": 32}
    neurograft.train(organ_file, host=donor, data=text, output=path, **options)
    return path


def test_the_card_is_the_one_of_the_bank(organ_file: Path) -> None:
    assert neurograft.card(organ_file).card == model_card(read_manifest(organ_file), str(organ_file))


def test_the_statement_is_as_in_toto_has_it(trained: Path) -> None:
    """https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance"""
    statement = neurograft.provenance(trained)
    assert statement["_type"] == STATEMENT and statement["predicateType"] == PREDICATE
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    [subject] = statement["subject"]
    assert subject["name"] == "trained.safetensors" and subject["digest"]["sha256"] == file_sha256(trained)
    build, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert set(build) == {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert run["builder"]["id"] and run["metadata"]["finishedOn"]


def test_the_library_of_in_toto_takes_the_statement(trained: Path) -> None:
    json_format = pytest.importorskip("google.protobuf.json_format")
    statement_pb2 = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    message = json_format.ParseDict(neurograft.provenance(trained), statement_pb2.Statement())
    statement.Statement.copy_from_pb(message).validate()


def test_what_it_was_made_from_is_named_by_digest(trained: Path) -> None:
    manifest = read_manifest(trained)
    materials = neurograft.provenance(trained)["predicate"]["buildDefinition"]["resolvedDependencies"]
    found = [(each["name"], each["digest"]) for each in materials]
    model, training = manifest.source.model, manifest.training
    assert training is not None
    assert found == [
        *((f"layer {2 + i} of {model}", {"neurograftTensors": manifest.source.layer_digests[i]}) for i in range(2)),
        ("text of training 1", {"neurograftText": training.data_fingerprint}),
    ]


def test_merged_organs_are_among_what_it_was_made_from(organ: Organ, organ_file: Path) -> None:
    parents = [
        Parent(name=name, version="1.0.0", tensors_digest="a" * 64, file_digest=file, weight=0.5)
        for name, file in (("one", None), ("two", "b" * 64))
    ]
    update = {"merged": Merge(method="average", parents=parents)}
    Organ(organ.manifest.model_copy(update=update), organ.tensors).save(organ_file, overwrite=True)
    predicate = neurograft.provenance(organ_file)["predicate"]["buildDefinition"]
    named = {each["name"]: each["digest"] for each in predicate["resolvedDependencies"]}
    assert named["organ one 1.0.0"] == {"neurograftTensors": "a" * 64}
    assert named["organ two 1.0.0"] == {"neurograftTensors": "a" * 64, "neurograftFile": "b" * 64}


def test_signers_are_named(organ_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing.signing")
    from authorities import make_keys

    neurograft.sign(organ_file, key=make_keys(tmp_path, "maker").private)
    [beside] = neurograft.provenance(organ_file)["predicate"]["runDetails"]["byproducts"]
    assert beside["name"] == "organ.safetensors.sig" and beside["annotations"]["signers"][0].startswith("key ")


def test_no_training_sentence_is_in_them(trained: Path) -> None:
    made = neurograft.card(trained, provenance=trained.parent / "p.json")
    assert "Secret sentence" not in made.model_dump_json()


def test_outputs(organ_file: Path, tmp_path: Path) -> None:
    card, statement = tmp_path / "README.md", tmp_path / "statement.json"
    made = neurograft.card(organ_file, output=card, provenance=statement)
    assert card.read_text() == made.card and json.loads(statement.read_text()) == made.provenance
    with pytest.raises(UsageError, match="exists already"):
        neurograft.card(organ_file, output=card)
    with pytest.raises(UsageError, match="overlaps the input"):
        neurograft.card(organ_file, output=organ_file, overwrite=True)
    with pytest.raises(UsageError, match="would both be"):
        neurograft.card(organ_file, output=tmp_path / "x", provenance=tmp_path / "x")


def test_the_command(organ_file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["card", str(organ_file)])
    assert done.exit_code == 0 and done.stdout == neurograft.card(organ_file).card
    statement = tmp_path / "statement.json"
    done = CliRunner().invoke(app, ["card", str(organ_file), "--provenance", str(statement), "--json"])
    assert json.loads(done.stdout)["provenance"] == json.loads(statement.read_text())
    done = CliRunner().invoke(app, ["card", str(tmp_path / "none.safetensors")])
    assert done.exit_code == 2 and "there is no organ file" in done.stderr
