"""Search spaces as data, and the settings that a search tries in them: as many for each method."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neurograft.errors import UsageError
from neurograft.files import read_bounded
from neurograft.wording import counted

Value = bool | int | float | str
Settings = dict[str, Value]

_LARGEST = 1 << 20  # bytes
_DRAWN, _DRAWN_FOR_EACH = 1024, 64  # points of a search space, for the distinct ones among them
# Options of `train` that `compare` decides itself, or that have no meaning for it.
DECIDED_BY_COMPARE = frozenset(
    {
        "protocol",
        "at",
        "max_tokens",
        "epochs",
        "steps",
        "lr",
        "rank",
        "seed",
        "evaluations",
        "patience",
        "checkpoint_every",
        "host_precision",
        "offload",
        "log_to",
        "log_dir",
        "dp_epsilon",
        "dp_delta",
    }
)
# Options of `train` that `plan` decides, or that have no meaning for it.
DECIDED_BY_PLAN = frozenset(
    {
        "protocol",
        "at",
        "rank",
        "max_tokens",
        "epochs",
        "steps",
        "log_to",
        "log_dir",
        "checkpoint_every",
        "dp_epsilon",
        "dp_delta",
    }
)
# Options of `train` that a study decides, or that have no meaning for it.
DECIDED_BY_STUDY = frozenset(
    {
        "protocol",
        "at",
        "max_tokens",
        "epochs",
        "steps",
        "seed",
        "evaluations",
        "patience",
        "checkpoint_every",
        "rank",
        "host_precision",
        "offload",
        "log_to",
        "log_dir",
        "dp_epsilon",
        "dp_delta",
    }
)
# The same for the study of the paper's questions, whose comparison also searches the learning rate.
DECIDED_BY_PAPER = DECIDED_BY_STUDY | {"lr"}
# Options of `train` that have no meaning for `recover`.
NO_MEANING_FOR_RECOVERY = ("protocol", "at", "rank", "host_precision", "offload", "dp_epsilon", "dp_delta")
# Options that are the same for every method, so that all see the same text in the same batches and are evaluated alike.
SHARED_OPTIONS = (DECIDED_BY_COMPARE - {"lr", "rank"}) | {
    "sequence_length",
    "batch_size",
    "accumulate",
    "held_out",
    "eval_tokens",
}


class Range(BaseModel):
    """Numbers between two limits, spread evenly on a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}")
        return self

    def at(self, share: float) -> float:
        """Return the number that lies this share of the way up, to three digits: nobody wants 0.00173205."""
        return float(f"{self.low * (self.high / self.low) ** share:.3g}")


Choice = list[Value] | Range
Space = dict[str, Choice]


def settings_to_try(space: Mapping[str, Choice], trials: int, method: str) -> list[Settings]:
    """Return the settings that a search tries, all different.

    They are a Sobol sequence from its middle on, which spreads few points over several settings better than a grid or
    chance does. It needs no seed, and the first few points of a longer search are those of a shorter one.

    Args:
        space: For each setting, the values to choose from.
        trials: How many settings to return.
        method: What they are for, in messages.

    Raises:
        UsageError: The space has fewer combinations, so that this method would be searched less than the others.
    """
    tried: dict[tuple[Value, ...], Settings] = {}
    if math.prod(map(_most_values, space.values())) >= trials:
        # A small space is exhausted long before so many points are drawn.
        for point in itertools.islice(_points_of_the_unit_cube(len(space)), _DRAWN + _DRAWN_FOR_EACH * trials):
            settings = {name: _pick(choice, share) for (name, choice), share in zip(space.items(), point, strict=True)}
            tried.setdefault(tuple(settings.values()), settings)
            if len(tried) == trials:
                return list(tried.values())
    raise UsageError(
        f"the search space of {method} has fewer than {counted(trials, 'combination')}, and as many are tried for each "
        "method; widen it or ask for fewer trials."
    )


def _most_values(choice: Choice) -> int:
    """Return how many different values there are at most: of a range, those of three digits."""
    if isinstance(choice, list):
        return len(set(choice))
    return 1 + math.ceil(900 * (math.log10(choice.high) - math.log10(choice.low)))


def _points_of_the_unit_cube(dimensions: int) -> Iterator[list[float]]:
    import torch

    if dimensions == 0:
        return itertools.repeat([])
    engine = torch.quasirandom.SobolEngine(dimensions)
    engine.fast_forward(1)  # its first point is a corner, its second the middle
    return (engine.draw(1, dtype=torch.float64)[0].tolist() for _ in itertools.count())


def _pick(choice: Choice, share: float) -> Value:
    if isinstance(choice, Range):
        return choice.at(share)
    return choice[int(share * len(choice))]


def read_spaces(path: Path) -> dict[str, Space]:
    """Read search spaces from a YAML or JSON file: method -> setting -> list of values, or `{low: ..., high: ...}`.

    Raises:
        UsageError: It can't be read or is not of that form; one sentence names the place.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what stands under one name twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} stands there twice, in what begins in line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        raw = yaml.load(read_bounded(path, _LARGEST).decode(), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).replace('in "<unicode string>", ', "").split())
        raise UsageError(f"the search file {path} can't be read: {reason}.") from error
    form = "write METHOD: {SETTING: [VALUE, ...]} or METHOD: {SETTING: {low: NUMBER, high: NUMBER}}"
    if not isinstance(raw, dict) or not all(isinstance(space, dict) for space in raw.values()):
        raise UsageError(f"the search file {path} is no mapping of methods to settings; {form}.")
    return {
        str(method): {
            str(name): _read_choice(choice, f"{path}: {method}: {name}", form) for name, choice in space.items()
        }
        for method, space in raw.items()
    }


def _read_choice(raw: Any, place: str, form: str) -> Choice:
    if isinstance(raw, dict):
        try:
            return Range.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            inner = "".join(f" {part}:" for part in first["loc"])
            raise UsageError(f"{place}:{inner} {first['msg'].removeprefix('Value error, ')}; {form}.") from error
    if not isinstance(raw, list) or not raw or not all(isinstance(value, Value) for value in raw):
        raise UsageError(f"{place} is {reprlib.repr(raw)}; {form}.")
    return [_number_if_one(value) for value in raw]


def _number_if_one(value: Value) -> Value:
    """Return `1e-3` as a number: to YAML, which wants a point in it, it is a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
