"""The places where an organ could go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from neurograft.errors import UsageError
from neurograft.manifest import Mode

_RANGE = re.compile(r"^(\d+):(\d+)(?::(\d+))?$")


@dataclass(frozen=True, order=True)
class Candidate:
    """One place: a position and a mode."""

    position: int
    mode: Mode

    @property
    def label(self) -> str:
        """Return the place as text, such as `replace at 10`."""
        return f"{self.mode} at {self.position}"


def parse_modes(modes: str | Sequence[str]) -> list[Mode]:
    """Return modes, given as a list or separated by commas.

    Raises:
        UsageError: One has another name, is given twice, or there is none.
    """
    names = [name.strip() for name in (modes.split(",") if isinstance(modes, str) else modes)]
    for name in names:
        if name not in get_args(Mode):
            raise UsageError(f"the mode is {name!r}; it can be replace, insert, or both, separated by a comma.")
        if names.count(name) > 1:
            raise UsageError(f"the mode {name} is given twice.")
    if not names:
        raise UsageError("no mode was given; it can be replace, insert, or both, separated by a comma.")
    return [mode for mode in get_args(Mode) if mode in names]


def parse_positions(positions: str | Iterable[int], layer_count: int) -> list[int]:
    """Return positions, given as `START:STOP`, `START:STOP:STEP` (half-open from 0), numbers with commas, or a list.

    Args:
        positions: What was asked for.
        layer_count: L; positions go from 0 to L.

    Raises:
        UsageError: It is written otherwise, or a position is out of range.
    """
    if not isinstance(positions, str):
        numbers = list(positions)
    elif (match := _RANGE.match(positions.strip())) and match[3] != "0":
        numbers = list(range(int(match[1]), int(match[2]), int(match[3] or 1)))
    elif re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", positions):
        numbers = [int(part) for part in positions.split(",")]
    else:
        raise UsageError(f"the positions {positions!r} can't be read; write START:STOP, START:STOP:STEP or 3,5,8.")
    if not numbers:
        raise UsageError(f"the positions {positions!r} are none; the stop of a range is not part of it.")
    for number in numbers:
        if not 0 <= number <= layer_count:
            raise UsageError(
                f"position {number} is out of range: in a model of {layer_count} layers, it can be 0 to {layer_count}."
            )
    return sorted(set(numbers))


def list_candidates(
    layer_count: int, organ_layers: int, *, modes: Sequence[Mode], positions: Sequence[int] | None = None
) -> list[Candidate]:
    """Return every place of an organ of k layers in a model of L, by position.

    Args:
        layer_count: L.
        organ_layers: k.
        modes: Which modes.
        positions: Which positions; left out, all that the mode allows.

    Raises:
        UsageError: There is no such place.
    """
    last = {"replace": layer_count - organ_layers, "insert": layer_count}
    wanted = range(layer_count + 1) if positions is None else positions
    found = [Candidate(number, mode) for number in wanted for mode in modes if number <= last[mode]]
    if not found:
        raise UsageError(
            f"none of these positions allows to {' or '.join(modes)} {organ_layers} layers in a model of "
            f"{layer_count}: replace goes up to {last['replace']}, insert up to {last['insert']}."
        )
    return sorted(found)


def spread_out(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return places in an order whose beginnings are spread over all positions, so that one may stop anywhere."""
    places = sorted({candidate.position for candidate in candidates})
    width = max(len(places) - 1, 1).bit_length()
    turn = {place: int(f"{number:0{width}b}"[::-1], 2) for number, place in enumerate(places)}
    return sorted(candidates, key=lambda candidate: (turn[candidate.position], candidate.mode))
