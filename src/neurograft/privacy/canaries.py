"""Canaries: sentences that nobody could guess, half of which are trained on, and what they tell of an organ afterwards.

Each canary is included or not by the toss of a coin of its own. Whoever can tell from the organ which were included,
better than differential privacy of some epsilon allows, has shown that the training was not private to that epsilon:
one training run is enough (Steinke, Nasr, Jagielski, arXiv 2305.08846).
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neurograft.errors import DataError, UsageError
from neurograft.files import atomic_file, check_output_file, file_sha256, read_bounded
from neurograft.manifest import CanaryFigures, Digest

if TYPE_CHECKING:
    import numpy

TEMPLATE = "The reference number of this file is {}."
FEWEST = 10
CONFIDENCE = 0.95
# Shares of the canaries that are guessed at; the rest is passed over. Fixed before anything is seen, so that trying all
# of them costs no more than dividing what the bound may err by their number.
GUESSED = (0.05, 0.1, 0.25, 0.5, 1.0)
_GROUPS, _DIGITS = 6, 4  # 24 random digits: 80 bits
_MOST_EPSILON = 64.0


class Canary(BaseModel):
    """One canary, and which way its coin fell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(min_length=1)]
    included: bool
    """Whether it is in the file that is trained on."""


class Canaries(BaseModel):
    """The secret file: what only the auditor may know until the organ is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[str, Field(pattern="^neurograft canaries$")] = "neurograft canaries"
    repeats: Annotated[int, Field(ge=1)]
    """How many times each included canary is in the training file."""
    training_file: Digest
    """SHA-256 of the file to be trained on."""
    canaries: Annotated[list[Canary], Field(min_length=FEWEST)]

    @property
    def included(self) -> list[str]:
        """The texts of those that were trained on."""
        return [canary.text for canary in self.canaries if canary.included]

    @property
    def left_out(self) -> list[str]:
        """The texts of those that were not."""
        return [canary.text for canary in self.canaries if not canary.included]


def plant(
    output: str | Path,
    *,
    canaries: str | Path,
    count: int = 1000,
    template: str = TEMPLATE,
    repeats: int = 1,
    seed: int | None = None,
    overwrite: bool = False,
) -> Canaries:
    """Make canaries to be trained on together with domain text, and a secret file that `audit` reads afterwards.

    Args:
        output: File of the included ones to write, ending in `.jsonl`: one more `data` argument of `train`.
        canaries: Secret file to write, ending in `.json`: all of them, and which were included.
        count: How many there are, of which about half are included: a coin is tossed for each.
        template: What they look like; `{}` stands for 24 random digits. Such as are like the domain's text are learnt
            best, and so show most.
        repeats: How many times each included one is in the training file.
        seed: Seed of digits and coins, for tests; left out, the system's randomness, which nobody can repeat.
        overwrite: Whether existing files may be replaced.

    Returns:
        What is in the secret file.

    Raises:
        UsageError: There are too few, the template has no place for the digits, a name ends otherwise, or a file
            exists.
    """
    output, canaries = Path(output), Path(canaries)
    _check_arguments(output, canaries, count, template, repeats, seed)
    for path in (output, canaries):
        check_output_file(path, overwrite=overwrite)
    chosen = _toss(count, template, secrets.randbits(128) if seed is None else seed)
    lines = [canary.text for canary in chosen if canary.included] * repeats
    with atomic_file(output, overwrite=overwrite) as temporary:
        temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines), encoding="utf-8")
    found = Canaries(repeats=repeats, training_file=file_sha256(output), canaries=chosen)
    with atomic_file(canaries, overwrite=overwrite) as temporary:
        temporary.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    canaries.chmod(0o600)  # whoever trains must not see it
    return found


def _check_arguments(output: Path, canaries: Path, count: int, template: str, repeats: int, seed: int | None) -> None:
    if output.suffix != ".jsonl":
        raise UsageError(f"the file of canaries to train on is called {output}; its name must end in .jsonl.")
    if canaries.suffix != ".json":
        raise UsageError(f"the secret file of canaries is called {canaries}; its name must end in .json.")
    if count < FEWEST:
        raise UsageError(f"{count} canaries tell nothing; plant at least {FEWEST}, better a thousand.")
    if template.count("{}") != 1:
        raise UsageError(f"the template {template!r} must have one {{}}, in place of which random digits stand.")
    if repeats < 1:
        raise UsageError(f"canaries can't be repeated {repeats} times; once is the least.")
    if seed is not None and seed < 0:
        raise UsageError(f"the seed is {seed}; it must not be negative.")


def _toss(count: int, template: str, seed: int) -> list[Canary]:
    """Return canaries, each included by a fair coin of its own."""
    import numpy

    generator = numpy.random.default_rng(seed)
    digits = generator.integers(10**_DIGITS, size=(count, _GROUPS))
    coins = generator.integers(2, size=count)
    texts = (" ".join(f"{group:0{_DIGITS}}" for group in row) for row in digits.tolist())
    return [
        Canary(text=template.replace("{}", text), included=bool(coin)) for text, coin in zip(texts, coins, strict=True)
    ]


def read_canaries(path: str | Path) -> Canaries:
    """Read a secret file.

    Raises:
        DataError: It is missing, no such file, or its coins all fell alike.
    """
    path = Path(path)
    try:
        found = Canaries.model_validate_json(read_bounded(path))
    except OSError as error:
        raise DataError(f"the canaries can't be read from {path}: {error.strerror or error}.") from error
    except ValidationError as error:
        raise DataError(f"{path} is no secret file of canaries; `neurograft plant` writes one.") from error
    if not found.included or not found.left_out:
        raise DataError(f"in {path} the coins of all canaries fell alike, so nothing can be told apart; plant more.")
    return found


def exposures(included: numpy.ndarray, left_out: numpy.ndarray) -> numpy.ndarray:
    """Return the exposure of each included canary, in bits (Carlini et al., arXiv 1802.08232).

    It is log2 of how many canaries there are to rank it among, itself and those left out, less log2 of its rank. The
    mean is about 1.4 where nothing was remembered; the most that can be seen grows with the number left out.

    Args:
        included: (I,) scores of canaries that were trained on, the larger the better remembered.
        left_out: (O,) scores of those that were not.
    """
    import numpy

    above = len(left_out) - numpy.searchsorted(numpy.sort(left_out), included, side="left")
    return numpy.asarray(math.log2(len(left_out) + 1) - numpy.log2(1 + above))


def correct_guesses(scores: numpy.ndarray, included: numpy.ndarray, guesses: int) -> int:
    """Return how many guesses are right where the top half is guessed to be included, the bottom half left out.

    Args:
        scores: (N,) of all canaries.
        included: (N,) whether each was trained on.
        guesses: How many are made; the canaries in the middle are passed over.
    """
    import numpy

    order = numpy.argsort(scores, kind="stable")
    top = guesses // 2
    bottom = guesses - top
    right = int((~included[order[:bottom]]).sum())
    return right + (int(included[order[len(order) - top :]].sum()) if top else 0)


def epsilon_bound(
    canaries: int, guesses: int, correct: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return an epsilon that the training was at least as bad as (arXiv 2305.08846, appendix D).

    It holds for differential privacy under adding or removing one record.

    Args:
        canaries: m: how many there are, each included by a fair coin of its own.
        guesses: r: on how many of them a guess was made.
        correct: v: how many guesses were right.
        delta: The delta of the differential privacy that is refuted.
        confidence: 1 less the chance to name a larger epsilon than the training has.
    """
    risk = 1 - confidence
    if guesses == 0 or _chance(canaries, guesses, correct, 0.0, delta) >= risk:
        return 0.0
    low, high = 0.0, _MOST_EPSILON
    for _ in range(40):
        middle = (low + high) / 2
        if _chance(canaries, guesses, correct, middle, delta) < risk:
            low = middle
        else:
            high = middle
    return low


def _chance(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the most likely that so many right guesses are, if the training is (epsilon, delta)-private."""
    import numpy

    probabilities = _binomial(guesses, epsilon)  # (guesses + 1,)
    tail = float(probabilities[correct:].sum())
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    nearly = numpy.cumsum(probabilities[:correct][::-1])  # chance to be right on correct - i to correct - 1, i = 1...
    steepest = float((nearly / numpy.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def _binomial(trials: int, epsilon: float) -> numpy.ndarray:
    """Return the chance of each number of successes, of which each has the odds e^epsilon."""
    import numpy

    factorials = numpy.array([math.lgamma(number + 1) for number in range(trials + 1)])
    ways = factorials[trials] - factorials - factorials[::-1]
    numbers = numpy.arange(trials + 1)
    logs = (
        ways
        - numbers * numpy.log1p(math.exp(-epsilon))
        - (trials - numbers) * (epsilon + math.log1p(math.exp(-epsilon)))
    )
    return numpy.asarray(numpy.exp(logs))


def measure(
    scores: numpy.ndarray, included: numpy.ndarray, *, repeats: int, tokens: int, delta: float
) -> CanaryFigures:
    """Say how well an organ remembers canaries, and what that refutes.

    Args:
        scores: (N,) of all canaries, the larger the better remembered.
        included: (N,) whether each was trained on.
        repeats: How many times each included one was in the training file.
        tokens: Tokens of all canaries.
        delta: See `epsilon_bound`.
    """
    count = len(scores)
    confidence = 1 - (1 - CONFIDENCE) / len(GUESSED)
    tried = []
    for share in GUESSED:
        guesses = max(2, round(share * count))
        correct = correct_guesses(scores, included, guesses)
        tried.append((epsilon_bound(count, guesses, correct, delta=delta, confidence=confidence), correct, guesses))
    epsilon, correct, guesses = max(tried, key=lambda found: (found[0], found[1] / found[2]))
    bits = exposures(scores[included], scores[~included])
    return CanaryFigures(
        canaries=count,
        included=int(included.sum()),
        repeats=repeats,
        tokens=tokens,
        exposure_mean=float(bits.mean()),
        exposure_median=_median(bits.tolist()),
        exposure_most=float(bits.max()),
        exposure_limit=math.log2(int((~included).sum()) + 1),
        guesses=guesses,
        correct=correct,
        epsilon=epsilon,
        delta=delta,
        confidence=CONFIDENCE,
    )


def _median(values: Sequence[float]) -> float:
    import statistics

    return float(statistics.median(values))
