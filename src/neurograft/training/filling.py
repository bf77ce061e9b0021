"""Fill the cache of what enters an organ with the layers below it read from the disk, each once for all of the text."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neurograft.arithmetic import Arithmetic
from neurograft.errors import NeurograftError
from neurograft.files import explained_os_errors, human_bytes
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

    def missing(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the batches with something that is not in the cache, and which sequences they are to give."""
        seen: set[int] = set()
        for rows in self.batches:
            own = [row for row in self.cache.lacking(rows) if row not in seen]
            if own:
                seen.update(own)
                yield list(rows), own


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
    climbs = [_Climb.begin(text) for text in texts if any(True for _ in text.missing())]
    if not climbs:
        return
    _require_room(climbs)
    try:
        _climb(prefix, layers, climbs)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            "the text was passing through the layers below the organ; the same command goes on from there"
        ) from interrupt
    for climb in climbs:
        climb.end()


def _climb(prefix: Prefix, layers: OffloadedLayers, climbs: Sequence[_Climb]) -> None:
    below = len(prefix.below)
    for number in range(below):
        if all(climb.is_above(number) for climb in climbs):
            continue
        log.info("hidden states below the organ: layer %d of %d", number + 1, below)
        with layers.held(number):
            for climb in climbs:
                climb.pass_layer(prefix, number)


@dataclass
class _Climb:
    """One text on its way up through the layers."""

    text: Passages
    jobs: list[tuple[list[int], list[int]]]
    stage: _Stage
    folder: Path
    dtypes: dict[int, torch.dtype]
    """Number of layers passed -> dtype of the hidden states after them, where it was seen."""

    @classmethod
    def begin(cls, text: Passages) -> _Climb:
        folder = text.cache.folder.with_name(f"{text.cache.folder.name}.below")
        return cls(text, list(text.missing()), _Stage(folder, text.cache), folder, {})

    def is_above(self, number: int) -> bool:
        return all(self.stage.passed(own) > number for _, own in self.jobs)

    def pass_layer(self, prefix: Prefix, number: int) -> None:
        """Let every batch pass a layer; above the last one, its states go into the cache."""
        model, last = prefix.model, number + 1 == len(prefix.below)
        below, above = prefix.up_to(number), prefix.up_to(number + 1)
        for rows, own in self.jobs:
            if self.stage.passed(own) > number:
                continue
            ids = self.text.input_ids[rows]
            with self.text.arithmetic.active(model.device):
                if number == 0:
                    states = above.entering(ids)
                else:
                    given = self.stage.read(rows, number).to(model.device, self.dtypes.get(number, model.dtype))
                    with below.given(given):
                        states = above.entering(ids)
            self.dtypes[number + 1] = states.dtype
            chosen = states[[rows.index(row) for row in own]]
            if last:
                self.text.cache.write(own, chosen)
            else:
                self.stage.write(own, number + 1, chosen)
        self.stage.flush()

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _require_room(climbs: Sequence[_Climb]) -> None:
    """Check that the disk has room for both files of every climb."""
    size = sum(
        2 * 4 * len(own) * climb.text.cache.shape[1] * climb.text.cache.shape[2]
        for climb in climbs
        for _, own in climb.jobs
        if climb.stage.passed(own) == 0
    )
    folder = climbs[0].folder
    free = shutil.disk_usage(folder).free
    if size > free:
        for climb in climbs:
            climb.end()
        raise NeurograftError(
            f"the hidden states on their way through the layers below the organ take {human_bytes(size)}, and "
            f"{folder.parent} has {human_bytes(free)} free; train on fewer tokens, or without --offload."
        )
