"""What a scan found, as it is printed and written."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from neurograft.manifest import Mode

Stopped = Literal["worse", "halved", "budget", "blocked"]


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PlaceScore(_Result):
    """Perplexity at one place on one text, beside the recipient alone on the very same part of it."""

    documents: int
    tokens: int
    """Tokens scored there; fewer than of the whole sample where the place was dropped on the way."""
    perplexity: float
    recipient: float
    """The recipient's alone, on the same tokens."""
    ratio: float
    """Perplexity over the recipient's."""
    low: float
    """95 % interval of the ratio, by bootstrap over documents."""
    high: float


class Place(_Result):
    """One mode and position."""

    mode: Mode
    position: int
    domain: PlaceScore | None = None
    """`None` where it could not be measured."""
    general: PlaceScore | None = None
    behind: float | None = None
    """Perplexity over that of the best place on the same text, 1 for the best itself."""
    behind_low: float | None = None
    """Limits of an interval for it. They hold for all places of the scan together, 95 times in 100."""
    behind_high: float | None = None
    apart: bool | None = None
    """Whether it can be told apart from the best place: the interval is above 1."""
    rounds: int = 0
    """Rounds in which it took part."""
    stopped: Stopped | None = None
    """Why it did not see the whole sample. `worse`: it was told apart from the best; `halved`: only the better half of
    the places goes on from round to round; `budget`: there was not enough time or tokens; `blocked`: the organ can't
    stand there."""
    why: str | None = None
    """Why it is blocked."""


class ScannedText(_Result):
    """A text of a scan."""

    documents: int
    tokens: int
    """Tokens scored at the best place."""
    fingerprint: str
    """SHA-256 over all documents that the sample was drawn from."""
    perplexity: float
    """The recipient's alone, on the same tokens."""


class ScanReport(_Result):
    """Everything that `scan` found."""

    organ: str
    recipient: str
    layer_count: int
    """L of the recipient."""
    organ_layers: int
    """k."""
    mode: Mode
    """The best place's: the one with the lowest perplexity on the domain text among those that went furthest."""
    position: int
    tied: list[str]
    """Places that can't be told apart from it, such as `replace at 10`."""
    helps: bool
    """Whether the best place's perplexity is below that of the recipient alone, its whole interval included."""
    domain: ScannedText
    general: ScannedText | None
    places: list[Place]
    """Every place that was asked for, by position."""
    complete: bool
    """Whether the whole sample was used; not so where the budget ended before."""
    units: Literal["documents", "windows"]
    """What is drawn anew in the bootstrap: windows where there are fewer than 8 documents."""
    prune: Literal["halving", "evidence", "never"]
    recover_tokens: int | None
    """Tokens that the organ was trained on at each place before it was measured there."""
    sequence_length: int
    max_tokens: int
    seed: int
    layer_passes: int
    """How many tokens passed how many layers, each once for each layer that ran; recovery not counted."""
    layer_passes_from_scratch: int
    """How many it would have been with every place evaluated by itself on the text that the best one saw."""
    tokens_run: int
    """Tokens run through the rest of the model, each once for each place; recovery included."""
    seconds: float
    """Without reading and loading; interruptions not counted."""
    versions: dict[str, str]

    @property
    def unmeasured(self) -> int:
        """Places that the budget left out before anything was known of them."""
        return sum(place.domain is None and place.stopped == "budget" for place in self.places)
