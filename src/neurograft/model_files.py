"""The files of a model whose layers come from several places: planned, then written by copying bytes or by linking."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neurograft.byte_moves import Link, Progress, link_file
from neurograft.checkpoint import INDEX_FILE, Checkpoint
from neurograft.errors import VerificationError
from neurograft.files import human_bytes, require_space
from neurograft.manifest import RECORD_FILE, LinkedFile
from neurograft.number_formats import digest_pieces
from neurograft.steps import Step
from neurograft.tensor_files import (
    NewTensorFile,
    Piece,
    TensorFile,
    bytes_of,
    header_of,
    in_file_order,
    read_tensor_file,
    same_kinds,
    write_tensor_files,
)

log = logging.getLogger("neurograft")

SINGLE_FILE = "model.safetensors"
ORGAN_FILE = "model-organ-{number:05d}.safetensors"
_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$|^config\.json$|^model\.safetensors\.index\.json$"
)


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file of a planned model."""

    name: str
    pieces: Mapping[str, Piece]
    metadata: Mapping[str, str]
    same_as: TensorFile | None
    """The recipient's file that has the very same content, and so can be linked."""


@dataclass
class Written:
    """What is known of a model's files after they were written."""

    digests: dict[str, str | None] = field(default_factory=dict)
    """Tensor name -> digest; `None` for what was linked and not read."""
    linked: dict[str, LinkedFile] = field(default_factory=dict)
    """Files that were linked and not read."""


def new_names(checkpoint: Checkpoint, steps: Sequence[Step]) -> dict[str, str]:
    """Return the recipient's tensors that a planned model keeps, name there -> name in the planned model."""
    prefix = checkpoint.layer_prefix
    positions = {step.layer: position for position, step in enumerate(steps) if step.source == "recipient"}
    grown = len(steps) - checkpoint.layer_count
    names: dict[str, str] = {}
    for name in checkpoint.pieces:
        place = checkpoint.layer_of(name)
        if place is None:
            names[name] = name
        elif place[0] >= checkpoint.layer_count:  # blocks behind the layers, such as those that predict further tokens
            names[name] = f"{prefix}{place[0] + grown}.{place[1]}"
        elif place[0] in positions:
            names[name] = f"{prefix}{positions[place[0]]}.{place[1]}"
    return names


def plan_files(checkpoint: Checkpoint, steps: Sequence[Step], organ: Mapping[str, Piece]) -> list[PlannedFile]:
    """Plan the files of a model: those of the recipient, with the organ's layers where there is room for them.

    What replaces a tensor lies in the file where that lay. What is new goes into the only file there is, or into one of
    its own, so that the others can stay as they are.

    Args:
        checkpoint: The recipient.
        steps: Where each layer of the new model comes from.
        organ: `layers.{i}.{name}` -> tensor, in the dtypes of the recipient.
    """
    names = new_names(checkpoint, steps)
    arriving = _arriving(checkpoint.layer_prefix, steps, organ)
    planned = []
    for file in checkpoint.files:
        pieces: dict[str, Piece] = {}
        for name, piece in file.pieces.items():
            if name in names:
                pieces[names[name]] = piece
            elif name in arriving:
                pieces[name] = arriving.pop(name)
        planned.append((file.path.name, pieces, file.metadata, file if _is_same(pieces, file) else None))
    if arriving and len(planned) == 1:
        name, pieces, metadata, _ = planned[0]
        planned = [(name, pieces | arriving, metadata, None)]
    elif arriving:
        planned.append((_free_name(checkpoint), arriving, {"format": "pt"}, None))
    return [PlannedFile(*entry) for entry in planned if entry[1]]


def _arriving(prefix: str, steps: Sequence[Step], organ: Mapping[str, Piece]) -> dict[str, Piece]:
    """Return the organ's tensors under the names that they get in the new model."""
    arriving = {}
    for position, step in enumerate(steps):
        if step.source == "organ":
            start = f"layers.{step.layer}."
            arriving.update(
                {f"{prefix}{position}.{n.removeprefix(start)}": p for n, p in organ.items() if n.startswith(start)}
            )
    return arriving


def _is_same(pieces: Mapping[str, Piece], file: TensorFile) -> bool:
    return list(pieces.items()) == list(file.pieces.items())


def _free_name(checkpoint: Checkpoint) -> str:
    taken = {file.path.name for file in checkpoint.files}
    candidates = (ORGAN_FILE.format(number=number) for number in range(1, len(taken) + 2))
    return next(name for name in candidates if name not in taken)


def bytes_to_write(files: Sequence[PlannedFile], link: Link) -> int:
    """Return how many bytes a planned model needs on the disk at most; hard links need none."""
    return sum(
        len(header_of(file.pieces, file.metadata)) + bytes_of(file.pieces.values())
        for file in files
        if not (link == "hard" and file.same_as is not None)
    )


def write_model(
    checkpoint: Checkpoint,
    files: Sequence[PlannedFile],
    config: str,
    target: Path,
    *,
    link: Link = "auto",
    read_linked: bool = True,
    further_bytes: int = 0,
) -> Written:
    """Write weights, `config.json` word for word and the recipient's other files into the folder `target`.

    Args:
        checkpoint: The recipient.
        files: See `plan_files`.
        config: The text of `config.json`.
        target: An empty folder.
        link: See `byte_moves.link_file`.
        read_linked: Whether to digest also what is linked and so need not be read.
        further_bytes: What will be written beside the model, for the check that there is room.

    Raises:
        NeurograftError: There is not enough room; nothing was written.
        VerificationError: What was written is not what was planned.
    """
    total = bytes_to_write(files, link)
    require_space(target.parent, total + further_bytes)
    (target / "config.json").write_text(config, encoding="utf-8")
    _copy_other_files(checkpoint.directory.path, target)
    written = Written()
    show = _progress(target.name.split(".")[1] or target.name, total)
    linked, copied = _linked_and_not(files, target, link)
    if read_linked:
        written.digests.update(digest_pieces({name: piece for file in linked for name, piece in file.pieces.items()}))
    else:
        written.digests.update(dict.fromkeys(name for file in linked for name in file.pieces))
        written.linked.update({file.name: seal_of(target / file.name) for file in linked})
    new = [NewTensorFile(target / file.name, file.pieces, file.metadata) for file in copied]
    written.digests.update(write_tensor_files(new, progress=show))
    _write_index(files, target)
    _verify_files(files, target)
    return written


def _linked_and_not(
    files: Sequence[PlannedFile], target: Path, link: Link
) -> tuple[list[PlannedFile], list[PlannedFile]]:
    """Link the files that can be linked, and return them and the others."""
    linked: list[PlannedFile] = []
    others: list[PlannedFile] = []
    for file in files:
        done = file.same_as is not None and link_file(file.same_as.path.resolve(), target / file.name, link)
        (linked if done else others).append(file)
    return linked, others


def seal_of(path: Path) -> LinkedFile:
    """Return what shows that a file was not written to: its size and the time of its last change."""
    status = path.stat()
    return LinkedFile(size=status.st_size, mtime_ns=status.st_mtime_ns)


def _progress(name: str, total: int) -> Progress:
    """Return a function that logs how far a copy has come, twice a second."""
    done, shown = 0, time.monotonic()

    def show(count: int) -> None:
        nonlocal done, shown
        done += count
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            log.info("writing %s: %s of %s", name, human_bytes(done), human_bytes(total))

    return show


def _copy_other_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and not _NOT_COPIED.search(file.name)
            and not file.name.startswith(".")
            and file.name != RECORD_FILE
        ):
            shutil.copyfile(file, target / file.name)


def _write_index(files: Sequence[PlannedFile], target: Path) -> None:
    """Write the index that says which file holds what, unless there is only the one that needs none."""
    if [file.name for file in files] == [SINGLE_FILE]:
        return
    index = {
        "metadata": {"total_size": sum(bytes_of(file.pieces.values()) for file in files)},
        "weight_map": {name: file.name for file in files for name in file.pieces},
    }
    (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _verify_files(files: Sequence[PlannedFile], target: Path) -> None:
    for file in files:
        if not same_kinds(read_tensor_file(target / file.name).pieces, in_file_order(file.pieces)):
            raise VerificationError(f"the file {file.name} was not written as planned; the result was not kept.")
