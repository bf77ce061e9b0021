"""Several organs for one recipient: where each goes, and a refusal where they would stand in each other's way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neurograft.errors import IncompatibleError, UsageError
from neurograft.findings import Finding
from neurograft.manifest import Mode
from neurograft.organ import Organ, open_organ
from neurograft.steps import Step, order_several
from neurograft.tensor_files import Piece

OrganOrPath = str | Path | Organ
Organs = OrganOrPath | Sequence[OrganOrPath]
Positions = int | Sequence[int | None] | None
Modes = Mode | Sequence[Mode | None] | None


@dataclass(frozen=True)
class Placement:
    """One organ, and where it goes in the recipient as that is before any organ is put in."""

    organ: Organ
    at: int
    mode: Mode

    @property
    def stop(self) -> int:
        """Number of the first recipient layer behind the organ."""
        return self.at + self.organ.layer_count if self.mode == "replace" else self.at

    @property
    def place(self) -> tuple[int, int, Mode]:
        """What `order_several` wants to know."""
        return self.organ.layer_count, self.at, self.mode

    def sentence(self) -> str:
        """Say what the organ does to the recipient."""
        if self.mode == "insert":
            return f"{self.organ.name} is inserted at position {self.at}"
        return f"{self.organ.name} replaces layers {self.at}:{self.stop}"


@dataclass(frozen=True)
class Collision:
    """Two organs that would stand in each other's way."""

    first: Placement
    second: Placement

    def sentence(self) -> str:
        """Say what collides."""
        return f"{self.first.sentence()} and {self.second.sentence()} of the same recipient"


def list_organs(organs: Organs) -> list[OrganOrPath]:
    """Return one or several organs as a list.

    Raises:
        UsageError: There is none.
    """
    given = [organs] if isinstance(organs, str | Path | Organ) else list(organs)
    if not given:
        raise UsageError("no organ was given.")
    return given


def open_organs(organs: Organs) -> list[Organ]:
    """Open one or several organs.

    Raises:
        UsageError: There is none.
        OrganFileError: A file can't be trusted.
    """
    return [organ if isinstance(organ, Organ) else open_organ(organ) for organ in list_organs(organs)]


def each_place(at: Positions, mode: Modes, count: int) -> list[tuple[int | None, Mode | None]]:
    """Return position and mode for each organ.

    Args:
        at: One for each organ, or `None`: two organs at one position is nothing to guess.
        mode: One for all organs, one for each, or `None`.
        count: How many organs there are.

    Raises:
        UsageError: There are more or fewer than organs.
    """
    positions = [None] * count if at is None else [at] if isinstance(at, int) else list(at)
    modes = [mode] if mode is None or isinstance(mode, str) else list(mode)
    modes = modes * count if len(modes) == 1 else modes
    for given, what in ((positions, "position"), (modes, "mode")):
        if len(given) != count:
            were = f"{what} was" if len(given) == 1 else f"{what}s were"
            organs = "1 organ" if count == 1 else f"{count} organs"
            raise UsageError(f"{len(given)} {were} given for {organs}; give one for each, in their order.")
    return list(zip(positions, modes, strict=True))


def in_order(placements: Sequence[Placement]) -> list[Placement]:
    """Order organs as they come to stand; what is inserted at one position stands in the order in which it came."""
    return sorted(placements, key=lambda placement: (placement.at, placement.mode == "replace"))


def steps_of(placements: Sequence[Placement], layer_count: int) -> tuple[Step, ...]:
    """Return where each layer comes from; the organs' layers are numbered through, in the order of `placements`."""
    return order_several(layer_count, [placement.place for placement in placements])


def numbers_of(placements: Sequence[Placement]) -> Iterator[tuple[Placement, range]]:
    """Yield each organ with the numbers that its layers have in `steps_of`."""
    start = 0
    for placement in placements:
        yield placement, range(start, start + placement.organ.layer_count)
        start += placement.organ.layer_count


def pieces_of_all(placements: Sequence[Placement]) -> dict[str, Piece]:
    """Return the tensors of several organs as bytes, their layers numbered through."""
    return {
        f"layers.{number}.{name}": piece
        for placement, numbers in numbers_of(placements)
        for layer, number in enumerate(numbers)
        for name, piece in placement.organ.layer_pieces(layer).items()
    }


def collisions(placements: Sequence[Placement]) -> list[Collision]:
    """Return every pair of organs that replace the same layers, or of which one would stand inside another."""
    ordered = in_order(placements)
    return [
        Collision(first, second)
        for number, first in enumerate(ordered)
        for second in ordered[number + 1 :]
        if second.at < first.stop
    ]


def collision_findings(placements: Sequence[Placement], layer_count: int) -> list[Finding]:
    """Return a finding that blocks for each collision, with what is known to work instead."""
    return [
        Finding(
            severity="blocks",
            subject="overlap",
            why=f"{collision.sentence()}; {_way_out(collision, placements, layer_count)}",
        )
        for collision in collisions(placements)
    ]


def refuse_collisions(placements: Sequence[Placement], layer_count: int) -> None:
    """Refuse organs that would stand in each other's way.

    Raises:
        IncompatibleError: One sentence for each collision.
    """
    if found := collision_findings(placements, layer_count):
        raise IncompatibleError(f"{'. '.join(finding.why for finding in found)}.")


def _way_out(collision: Collision, placements: Sequence[Placement], layer_count: int) -> str:
    """Say what works in place of a collision: another position, an insertion, or a merge of what has one origin."""
    first, second = collision.first, collision.second
    ways = []
    for mover in (second, first):
        others = [placement for placement in placements if placement is not mover]
        if free := free_positions(mover, others, layer_count):
            ways.append(
                f"put {mover.organ.name} at another position (free for its {mover.organ.layer_count} layers: "
                f"{_spans(free)})"
            )
            break
    if first.mode == second.mode == "replace":
        ways.append(f"insert {second.organ.name} before or behind {first.organ.name} (--mode insert)")
        if _mergeable(collision):
            ways.append("merge the two into one organ (neurograft merge)")
    return ", or ".join(ways) or "leave one of them out"


def _mergeable(collision: Collision) -> bool:
    """Whether both organs were made from the very same layers, without which merging means nothing."""
    first, second = collision.first.organ.manifest, collision.second.organ.manifest
    return first.source.layer_digests == second.source.layer_digests


def free_positions(placement: Placement, others: Sequence[Placement], layer_count: int) -> list[int]:
    """Return the positions at which an organ, in its mode, collides with none of some others."""
    last = layer_count - placement.organ.layer_count if placement.mode == "replace" else layer_count
    candidates = (Placement(placement.organ, at, placement.mode) for at in range(last + 1))
    return [candidate.at for candidate in candidates if not any(_collide(candidate, other) for other in others)]


def _collide(first: Placement, second: Placement) -> bool:
    return bool(collisions([first, second]))


def _spans(numbers: Sequence[int]) -> str:
    """Write numbers in short: 0, 1, 2, 7 become `0 to 2, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
