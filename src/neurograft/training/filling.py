"""Fill the cache of what enters an organ with the layers below it read from the disk, each once for all of the text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from neurograft.arithmetic import Arithmetic
from neurograft.errors import NeurograftError
from neurograft.files import explained_os_errors, human_bytes, locked
from neurograft.training.offloading import OffloadedLayers
from neurograft.training.prefix import Prefix, PrefixCache, make_files

log = logging.getLogger("neurograft")


@dataclass(frozen=True)
class Passages:
    """Sequences that a run will ask for, in the batches in which it asks first, so that they come to the same bits."""

    input_ids: torch.Tensor
    """(N, T)"""
    cache: PrefixCache
    arithmetic: Arithmetic
    batches: Sequence[Sequence[int]]
    """Numbers of the sequences in each."""

    def needed(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the batches with something that is not in the cache, and which sequences each is the first to hold."""
        seen: set[int] = set()
        for rows in self.batches:
            if any(row not in seen for row in self.cache.lacking(rows)):
                own = [row for row in dict.fromkeys(rows) if row not in seen]
                seen.update(own)
                yield list(rows), own

    def digest(self) -> str:
        """Return a digest of the batches."""
        return hashlib.sha256(json.dumps([list(rows) for rows in self.batches]).encode()).hexdigest()


class _Stage:
    """Hidden states on their way up through the layers, (N, T, C) float32 on disk, so that all text climbs together.

    Those that enter a layer and those that leave it lie in two files, and each row's count of layers is written after
    the states: whatever interrupts, what is there is right, and the next run goes on from it.
    """

    def __init__(self, folder: Path, cache: PrefixCache) -> None:
        import numpy

        rows, tokens, width = cache.shape
        size = tokens * width * 4
        with explained_os_errors(folder):
            make_files(folder, {"even.bin": rows * size, "odd.bin": rows * size, "passed.bin": rows * 4})
            self._states = [
                numpy.memmap(folder / name, dtype=numpy.float32, mode="r+", shape=(rows, tokens, width))
                for name in ("even.bin", "odd.bin")
            ]
            self._passed = numpy.memmap(folder / "passed.bin", dtype=numpy.uint32, mode="r+", shape=(rows,))

    @property
    def is_new(self) -> bool:
        """Whether nothing has passed a layer."""
        return not self._passed.any()

    def passed(self, rows: Sequence[int]) -> int:
        """Return how many layers all these rows have passed."""
        return int(self._passed[list(rows)].min())

    def read(self, rows: Sequence[int], layers: int) -> torch.Tensor:
        """Return the states of some rows after a number of layers, (len(rows), T, C)."""
        return torch.from_numpy(self._states[layers % 2][list(rows)])

    def write(self, rows: Sequence[int], layers: int, states: torch.Tensor) -> None:
        """Store the states of some rows after a number of layers."""
        self._states[layers % 2][list(rows)] = states.float().cpu().numpy()
        self._passed[list(rows)] = layers

    def flush(self) -> None:
        """Bring everything to the disk."""
        for file in (*self._states, self._passed):
            file.flush()


def fill(prefix: Prefix, layers: OffloadedLayers, texts: Sequence[Passages]) -> None:
    """Compute what is missing in some caches.

    Args:
        prefix: The model, from the organ on; it was asked whether it works.
        layers: The layers below.
        texts: What is wanted, each with a cache of its own.

    Raises:
        NeurograftError: The disk has no room for the hidden states on their way.
    """
    with contextlib.ExitStack() as stack:
        climbs = [stack.enter_context(_climbing(text)) for text in texts if any(text.needed())]
        _require_room(climbs)
        try:
            _climb(prefix, layers, climbs)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                "the text was passing through the layers below the organ; the same command goes on from there"
            ) from interrupt


def _climb(prefix: Prefix, layers: OffloadedLayers, climbs: Sequence[_Climb]) -> None:
    below = len(prefix.below)
    for number in range(below):
        if all(climb.is_above(number) for climb in climbs):
            continue
        log.info("hidden states below the organ: layer %d of %d", number + 1, below)
        with layers.held(number):
            for climb in climbs:
                climb.pass_layer(prefix, number)


@contextmanager
def _climbing(text: Passages) -> Iterator[_Climb]:
    """Yield a text with the place where its hidden states lie until it is done; what interrupts leaves them there."""
    cache = text.cache
    # States are of use only to a run with the same batches, and to one at a time.
    folder = cache.folder.with_name(f"{cache.folder.name}.{text.digest()[:16]}.below")
    with contextlib.ExitStack() as stack:
        stage = _Stage(folder, cache)
        if not stack.enter_context(locked(folder)):
            own = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, suffix=".below"))
            folder = Path(own) / "states"
            stage = _Stage(folder, cache)
        climb = _Climb(text, list(text.needed()), stage, {})
        try:
            yield climb
        finally:
            if stage.is_new or not any(text.needed()):
                shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Climb:
    """One text on its way up through the layers."""

    text: Passages
    jobs: list[tuple[list[int], list[int]]]
    stage: _Stage
    dtypes: dict[int, torch.dtype]
    """Number of layers passed -> dtype of the hidden states after them, where it was seen."""

    def is_above(self, number: int) -> bool:
        return all(self.stage.passed(own) > number for _, own in self.jobs)

    def pass_layer(self, prefix: Prefix, number: int) -> None:
        """Let every batch pass a layer; above the last one, its states go into the cache."""
        is_last = number + 1 == len(prefix.below)
        for rows, own in self.jobs:
            if self.stage.passed(own) > number:
                continue
            states = self._compute(prefix, number, rows)
            chosen = states[[rows.index(row) for row in own]]
            if is_last:
                self.text.cache.settle(own, chosen)
            else:
                self.stage.write(own, number + 1, chosen)
        self.stage.flush()

    def _compute(self, prefix: Prefix, number: int, rows: list[int]) -> torch.Tensor:
        """Return what leaves a layer, (len(rows), T, C)."""
        model, ids = prefix.model, self.text.input_ids[rows]
        given: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if number > 0:
            dtype = self.dtypes.get(number, model.dtype)
            given = prefix.up_to(number).given(self.stage.read(rows, number).to(model.device, dtype))
        with self.text.arithmetic.active(model.device), given:
            states = prefix.up_to(number + 1).entering(ids)
        self.dtypes[number + 1] = states.dtype
        return states


def _require_room(climbs: Sequence[_Climb]) -> None:
    """Check that the disk has room for both files of every climb that begins.

    Raises:
        NeurograftError: It has not.
    """
    rows = [(len(own), climb.text.cache) for climb in climbs for _, own in climb.jobs if climb.stage.passed(own) == 0]
    size = sum(2 * 4 * count * cache.shape[1] * cache.shape[2] for count, cache in rows)
    if not rows or size <= (free := shutil.disk_usage(rows[0][1].folder).free):
        return
    raise NeurograftError(
        f"the hidden states on their way through the layers below the organ take {human_bytes(size)}, and "
        f"{rows[0][1].folder.parent} has {human_bytes(free)} free; train on fewer tokens, or without --offload."
    )
