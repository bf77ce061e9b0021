"""What reads files from elsewhere: how such a file looks, and what reads it.

Not here: GGUF files, which the package `gguf` reads, and data sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neurograft import evaluate, extract, push, transplant
from neurograft.bank.entries import parse_entry
from neurograft.checkpoint import read_index
from neurograft.errors import NeurograftError
from neurograft.organ import read_manifest, read_organ
from neurograft.record import read_record
from neurograft.reporting.sources import read_sources
from neurograft.tensor_files import read_tensor_file
from neurograft.training.run_state import RunState, load_state, save_state
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


def make_readers(folder: Path) -> list[Reader]:
    """Return all readers, after making a whole file for each in a folder."""
    organ = (DATA / "organ-v2.safetensors").read_bytes()
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
    index = "model.safetensors.index.json"
    entry_of = {"name": "tiny", "version": "0.1.0"}
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
    ]  # fmt: skip


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
