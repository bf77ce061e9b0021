"""What reads files from elsewhere: how such a file looks, and what reads it.

Not here: data sets, and the configurations and tokenizers of models, which transformers reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments import write_gates
from gguf_writer import convert
from neurograft import deploy, evaluate, extract, history, push, transplant
from neurograft.bank.cataloguing import list_organs
from neurograft.bank.entries import parse_entry
from neurograft.checkpoint import read_index
from neurograft.deployment.gates import read_gates
from neurograft.errors import NeurograftError
from neurograft.gguf_header import read_gguf_header
from neurograft.models import reading_gguf, resolve
from neurograft.organ import read_manifest, read_organ
from neurograft.privacy.canaries import plant, read_canaries
from neurograft.record import read_record
from neurograft.reporting.sources import read_sources
from neurograft.tensor_files import read_tensor_file
from neurograft.training.run_state import RunState, load_state, save_state
from neurograft.training.search import read_spaces
from neurograft.trust.policy import judge, read_policy
from neurograft.trust.signature_files import read_signatures, signature_path
from neurograft.trust.signers import OrganBytes, Signer, examine, key_hint
from tiny import make_model, save_model

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Reader:
    """One reader of files."""

    name: str
    file: str
    """What a file for it is called."""
    seed: bytes = field(repr=False)
    """A whole one."""
    read: Callable[[Path], Any]
    slowness: int = 1
    """One of so many files is enough: YAML of thousands of brackets takes a second, a model a third."""


def make_readers(folder: Path) -> list[Reader]:
    """Return all readers, after making a whole file for each in a folder."""
    old = DATA / "organ-v2.safetensors"
    organ = old.read_bytes()
    donor = save_model(folder / "donor", "llama")
    cut = extract(donor, layers=(2, 4), output=folder / "organ.safetensors", name="tiny")
    transplant(folder / "organ.safetensors", donor, output=folder / "model", mode="replace", at=1)
    push(folder / "organ.safetensors", folder / "bank")
    entry = next((folder / "bank").rglob("versions/*.json")).read_bytes()
    text = folder / "text.txt"
    text.write_text("a shadow\n\na lung\n\na nodule", encoding="utf-8")
    measured = evaluate(donor, data={"words": text}).model_dump_json().encode()
    make_model("llama").save_pretrained(folder / "sharded", max_shard_size="40kB")
    state = RunState(key="key", held_out=[(0, 2.5)])
    save_state(folder / "state.resume", state, {name: value for name, value in cut.tensors.items() if value.ndim == 1})
    convert(donor, folder / "model.gguf")
    gguf = (folder / "model.gguf").read_bytes()
    canaries = plant(folder / "canaries.jsonl", canaries=folder / "secret.json", count=12, seed=3)
    gates, policy = write_gates(folder), write_policy(folder)
    deploy(cut, to=folder / "hospital", recipient=donor, gates=gates, mode="insert", at=1)
    tag = folder / "bank" / "tiny" / "tags" / "stable.json"
    push(folder / "organ.safetensors", folder / "bank", tags=["stable"])
    index = "model.safetensors.index.json"
    entry_of = {"name": "tiny", "version": "0.1.0"}
    dequantise(folder / "model.gguf")  # which makes the folders of the cache
    return [
        Reader("manifest of an organ", "organ.safetensors", organ, read_manifest),
        Reader("organ", "organ.safetensors", organ, read_organ),
        Reader("header of a model file", "model.safetensors", organ, read_tensor_file),
        Reader(
            "surgical record", "neurograft.json", (folder / "model" / "neurograft.json").read_bytes(),
            lambda path: read_record(path.parent),
        ),
        Reader("what a verb measured", "measured.json", measured, lambda path: read_sources([path])),
        Reader("index of a model", index, (folder / "sharded" / index).read_bytes(), lambda p: read_index(p, "model")),
        Reader("entry of a bank", "entry.json", entry, lambda p: parse_entry(p.read_bytes(), "the bank", **entry_of)),
        Reader(
            "state of an interrupted run", "organ.resume", (folder / "state.resume").read_bytes(),
            lambda path: load_state(path, "key"),
        ),
        Reader(
            "history of a deployment", "history.jsonl", (folder / "hospital" / "history.jsonl").read_bytes(),
            lambda path: history(put(path, folder / "hospital" / "history.jsonl").parent, verify="full"),
        ),
        Reader(
            "signatures", "organ.safetensors.sig", signature_path(old).read_bytes(),
            lambda path: examine(OrganBytes(old), read_signatures(path.with_suffix("")), SIGNERS),
        ),
        Reader("public key", "maker.pub", (DATA / "maker.pub").read_bytes(), key_hint),
        Reader(
            "trust.toml", "trust.toml", policy.read_bytes(),
            lambda path: judge(old, read_manifest(old), read_policy(path), path, called="organ"),
        ),
        Reader("gates", "gates.yaml", gates.read_bytes(), read_gates, slowness=4),
        Reader(
            "search spaces", "search.yaml", b"lora:\n  lr: {low: 1e-4, high: 1e-2}\n  rank: [4, 8]\n", read_spaces,
            slowness=4,
        ),
        Reader("canaries", "secret.json", canaries.model_dump_json().encode(), read_canaries),
        Reader(
            "tag in a bank", "stable.json", tag.read_bytes(),
            lambda path: list_organs(put(path, tag).parents[2]),
        ),
        Reader("header of a GGUF file", "model.gguf", gguf, read_gguf),
        Reader("model in a GGUF file", "model.gguf", gguf, dequantise, slowness=20),
    ]  # fmt: skip


SIGNERS = {
    "maker": Signer(key=DATA / "maker.pub"),
    "clinic": Signer(certificate=DATA / "authority.crt", subject="radiology"),
}


def put(path: Path, target: Path) -> Path:
    """Copy an altered file to where its reader looks for it, and return that place."""
    shutil.copyfile(path, target)
    return target


def write_policy(folder: Path) -> Path:
    """Write a trust.toml by which the signed organ in the tests' data may be used."""
    path = folder / "trust.toml"
    path.write_text(
        f'[signers.maker]\nkey = "{DATA}/maker.pub"\n\n'
        f'[signers.clinic]\ncertificate = "{DATA}/authority.crt"\nsubject = "radiology"\n\n'
        '[[allow]]\nsigners = ["maker", "clinic"]\nbase_models = ["*"]\nneeded = 2\n',
        encoding="utf-8",
    )
    return path


def read_gguf(path: Path) -> Any:
    """Read a header as neurograft does, and then as transformers does."""
    from gguf import GGUFReader

    header = read_gguf_header(path)
    with reading_gguf(path):
        GGUFReader(path)
    return header


def dequantise(path: Path) -> None:
    """Dequantise a model into the cache, and out of it again."""
    shutil.rmtree(resolve(path).path)


def read(reader: Reader, data: bytes, folder: Path) -> bool:
    """Let a reader read altered bytes; return whether it took them.

    Raises:
        Exception: Whatever else than the project's own errors the reader raised.
    """
    path = folder / reader.file
    path.write_bytes(data)
    try:
        reader.read(path)
    except NeurograftError as error:
        if "\n" in str(error).strip():
            raise AssertionError(f"{reader.name} says more than one line: {error!r}") from error
        return False
    finally:
        path.unlink()
    return True
