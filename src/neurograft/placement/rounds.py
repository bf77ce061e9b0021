"""The rounds of a scan: what is run, who drops out, when the budget ends it, and going on after an interruption."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy

from neurograft.errors import ModelError, UsageError
from neurograft.placement.candidates import Candidate, spread_out
from neurograft.placement.engines import Engine, Task
from neurograft.placement.results import Stopped
from neurograft.placement.running import Outcome
from neurograft.placement.sampling import FEWEST_UNITS, Sample
from neurograft.placement.scan_state import RECIPIENT, Losses, RoundRecord, ScanFolder, ScanState
from neurograft.placement.statistics import among, ratio_intervals

log = logging.getLogger("neurograft")

Prune = Literal["halving", "evidence", "never"]
_SAVE_EVERY = 10.0  # seconds
# Of a budget in seconds, what recovery may take: measuring needs the rest.
_RECOVERY_SHARE = 0.7
_WORST = 700.0  # nats per token that stand for losses that are not finite


@dataclass(frozen=True)
class ScanProgress:
    """What a scan reports after each piece of work."""

    round: int
    """From 1; 0 while organs recover."""
    rounds: int
    done: int
    """Batches of this round, or places that recovered."""
    total: int
    places: int
    """How many are still in."""
    best: str | None
    """The best place after the rounds before, such as `replace at 10`."""
    seconds: float


@dataclass(frozen=True)
class Budget:
    """What a scan may cost; `None` for no limit."""

    seconds: float | None
    tokens: int | None


@dataclass(frozen=True)
class Settings:
    """How a scan is made; `scan` says what each means."""

    prune: Prune
    max_tokens: int
    budget: Budget
    recover_tokens: int | None
    sequence_length: int
    batch_size: int
    seed: int


class Rounds:
    """Runs a scan's rounds.

    Args:
        engine: Runs the batches.
        candidates: The places.
        samples: The text; the first one decides what is best.
        folder: Where the state is kept.
        state: What an interrupted scan left.
        settings: How it is made.
        progress: Called after each piece of work.
    """

    def __init__(
        self,
        engine: Engine,
        candidates: Sequence[Candidate],
        samples: Sequence[Sample],
        folder: ScanFolder,
        state: ScanState,
        settings: Settings,
        *,
        progress: Callable[[ScanProgress], None] | None = None,
    ) -> None:
        self.engine, self.samples, self.folder, self.state = engine, list(samples), folder, state
        self.settings, self.budget, self.progress = settings, settings.budget, progress
        state.kernels = engine.kernels
        self.candidates = list(candidates)
        self.live = sorted(candidates)
        self.dropped: dict[Candidate, tuple[int, Stopped]] = {}
        """Place -> rounds that it took part in, and why it dropped out."""
        self.done: list[list[int]] = [[] for _ in samples]
        """For each text the numbers of the windows that were run, in rounds' order."""
        self.seen: list[list[int]] = [[] for _ in samples]
        """For each text, how many of these had been run after each round."""
        self._losses = [
            {label: numpy.full(len(sample.windows), numpy.nan) for label in self._labels()} for sample in self.samples
        ]
        self._started, self._before, self._saved = time.monotonic(), state.seconds, time.monotonic()

    def _labels(self) -> list[str]:
        return [RECIPIENT, *(candidate.label for candidate in self.candidates)]

    @property
    def count(self) -> int:
        """How many rounds there are at most."""
        return max(len(sample.stops) for sample in self.samples)

    @property
    def seconds(self) -> float:
        """Seconds since the scan began, interruptions not counted."""
        return self._before + time.monotonic() - self._started

    def losses(self, text: int, candidate: Candidate | None, windows: Sequence[int]) -> numpy.ndarray:
        """Return the summed losses of some windows of a text at a place, or of the recipient alone, in nats."""
        label = RECIPIENT if candidate is None else candidate.label
        return self._losses[text][label][list(windows)]

    def run(self) -> None:
        """Run all rounds that there are text and budget for.

        Raises:
            UsageError: The budget allows nothing at all.
            ModelError: The recipient's own loss is not finite.
            KeyboardInterrupt: Interrupted; its message says how to go on.
        """
        try:
            if self.settings.recover_tokens:
                self._recover(self.settings.recover_tokens)
            for number in range(self.count):
                if number < len(self.state.rounds):
                    self._replay(number, self.state.rounds[number])
                elif self.state.ended or not self._round(number):
                    break
            self.state.seconds = self.seconds
        except KeyboardInterrupt as interrupt:
            self._save()
            where = f"in round {len(self.state.rounds) + 1} of {self.count}"
            if self.settings.recover_tokens and self.state.unrecovered is None:
                where = "while organs recovered"
            raise KeyboardInterrupt(f"the scan stopped {where}; the same command goes on from there") from interrupt

    def _recover(self, tokens: int) -> None:
        """Train the organ at each place; where the budget does not allow all, at places spread over all positions."""
        if self.state.unrecovered is None:
            order = spread_out(self.live)
            missing = [candidate for candidate in order if not self.folder.weights_path(candidate).is_file()]
            if self.budget.tokens is not None:
                allowed = int(self.budget.tokens * _RECOVERY_SHARE) - self.state.recovered
                missing = missing[: max(allowed // tokens, 0)]
            done = len(order) - len(missing)
            for candidate, data in self.engine.recover(missing):
                self.folder.keep_weights(candidate, data)
                self.state.recovered += tokens
                done += 1
                self._report(0, done, len(order))
                if self.budget.seconds is not None and self.seconds > _RECOVERY_SHARE * self.budget.seconds:
                    break
            without = [candidate for candidate in order if not self.folder.weights_path(candidate).is_file()]
            if len(without) == len(order):
                raise UsageError(
                    "the budget allows no recovery at a single place; give a larger one, or fewer --recover-tokens."
                )
            self.state.unrecovered = {candidate.label: "budget" for candidate in without}
            self._save()
        self._drop(self.state.unrecovered, 0)

    def _replay(self, number: int, record: RoundRecord) -> None:
        """Enter what a round came to before an interruption."""
        self._drop(record.left_out, number)
        self._enter_all(number)
        self._drop(record.dropped, number + 1)

    def _round(self, number: int) -> bool:
        """Run one round; return whether there may be another."""
        if self.state.left_out is None:
            self.state.left_out = self._afford(number)
        if self.state.left_out is None:
            self.state.ended = True
            return False
        self._drop(self.state.left_out, number)
        self._run(number)
        names = self._enter_all(number)
        whole = len(names) == len(self._tasks(number))
        dropped = self._decide() if whole and number < self.count - 1 else {}
        self.state.rounds.append(RoundRecord(left_out=self.state.left_out, batches=names, dropped=dropped))
        self.state.left_out, self.state.ended = None, not whole
        self._save()  # before anything is deleted that would be needed again without it
        self._drop(dropped, number + 1)
        return whole

    def _tasks(self, number: int) -> list[tuple[Task, int, list[int]]]:
        """Return a round's batches, each with the number of its text and the numbers of its windows."""
        return [
            (
                Task(f"{sample.name} {number} {batch}", [sample.windows[place] for place in places], self.live),
                text,
                places,
            )
            for text, sample in enumerate(self.samples)
            for batch, places in enumerate(sample.batches(number, self.settings.batch_size))
        ]

    def _afford(self, number: int) -> dict[str, Stopped] | None:
        """Return which places a round has to do without to keep to the budget; `None` if not even one can take part.

        Raises:
            UsageError: That is so in the first round.
        """
        state, allowed = self.state, len(self.live)
        each = sum(len(window.ids) for task, _, _ in self._tasks(number) for window in task.windows)
        if self.budget.tokens is not None:
            allowed = min(allowed, (self.budget.tokens - state.tokens - state.recovered) // each - 1)
        if self.budget.seconds is not None and state.tokens:
            rate = state.running_seconds / state.tokens  # seconds for a token at a place
            allowed = min(allowed, int((self.budget.seconds - self.seconds) / max(rate * each, 1e-9)) - 1)
        if allowed >= len(self.live):
            return {}
        if number == 0 and allowed < 1:
            raise UsageError(
                f"the budget allows nothing: the first round runs {each:,} tokens for each place and for the "
                "recipient; give a larger one, or fewer --max-tokens."
            )
        order = spread_out(self.live) if number == 0 else self._ranked()
        return {candidate.label: "budget" for candidate in order[allowed:]} if allowed >= 1 else None

    def _run(self, number: int) -> None:
        """Run a round's batches that are not there yet, as long as there is time."""
        tasks = self._tasks(number)
        missing = [task for task, _, _ in tasks if task.name not in self.state.batches]
        done, last = len(tasks) - len(missing), time.monotonic()
        for task, outcome in self.engine.run(missing):
            self._keep(task, outcome)
            self.state.running_seconds += time.monotonic() - last
            done, last = done + 1, time.monotonic()
            self._report(number + 1, done, len(tasks))
            if last - self._saved > _SAVE_EVERY:
                self._save()
            if self._time_is_up(number):
                break

    def _enter_all(self, number: int) -> list[str]:
        """Take over the losses of a round's batches that were run; return their names."""
        names = []
        for task, text, windows in self._tasks(number):
            if (losses := self.state.batches.get(task.name)) is not None:
                for label, values in losses.items():
                    self._losses[text][label][windows] = values
                self.done[text] += windows
                names.append(task.name)
        for text in range(len(self.samples)):
            self.seen[text].append(len(self.done[text]))
        return names

    def _time_is_up(self, number: int) -> bool:
        if self.budget.seconds is None or self.seconds < self.budget.seconds:
            return False
        if number > 0:
            return True
        # Without a few windows of each text there would be nothing to say.
        counts = [0] * len(self.samples)
        for task, text, windows in self._tasks(number):
            counts[text] += len(windows) if task.name in self.state.batches else 0
        return min(counts) >= FEWEST_UNITS

    def _keep(self, task: Task, outcome: Outcome) -> None:
        assert outcome.recipient is not None
        losses: Losses = {RECIPIENT: outcome.recipient}
        losses.update({candidate.label: values for candidate, values in outcome.places.items()})
        if not numpy.isfinite(outcome.recipient).all():
            raise ModelError(f"the recipient's own loss is not finite on some of the text ({task.name}).")
        scored = [window.scored for window in task.windows]
        for label, values in losses.items():
            pairs = zip(values, scored, strict=True)
            losses[label] = [value if numpy.isfinite(value) else _WORST * count for value, count in pairs]
        self.state.batches[task.name] = losses
        self.state.passes += outcome.passes
        self.state.tokens += sum(len(window.ids) for window in task.windows) * len(losses)

    def by_unit(self, text: int, candidate: Candidate | None, windows: Sequence[int]) -> numpy.ndarray:
        """Return the summed losses of each independent piece of text in some windows, in nats."""
        return numpy.bincount(self._places(text, windows), weights=self.losses(text, candidate, windows))

    def unit_tokens(self, text: int, windows: Sequence[int]) -> numpy.ndarray:
        """Return how many tokens are scored in each independent piece of text in some windows."""
        scored = [float(self.samples[text].windows[place].scored) for place in windows]
        return numpy.bincount(self._places(text, windows), weights=scored)

    def _places(self, text: int, windows: Sequence[int]) -> numpy.ndarray:
        units = [self.samples[text].units[place] for place in windows]
        places: numpy.ndarray = numpy.unique(units, return_inverse=True)[1]
        return places

    def _ranked(self) -> list[Candidate]:
        """Return the places that are still in, the best first."""
        return sorted(self.live, key=lambda candidate: float(self.losses(0, candidate, self.done[0]).sum()))

    def _decide(self) -> dict[str, Stopped]:
        """Say which places drop out after a round, and why."""
        if self.settings.prune == "never" or len(self.live) < 2:
            return {}
        order, windows = self._ranked(), self.done[0]
        limits = ratio_intervals(
            numpy.stack([self.by_unit(0, candidate, windows) for candidate in order[1:]]),
            self.by_unit(0, order[0], windows),
            self.unit_tokens(0, windows),
            error=among(len(self.candidates) - 1),
            seed=self.settings.seed,
        )
        dropped: dict[str, Stopped] = {
            candidate.label: "worse" for candidate, low in zip(order[1:], limits.low, strict=True) if low > 1
        }
        if self.settings.prune == "halving":
            keep = max(2, -(-len(order) // 2))
            left = [candidate for candidate in order if candidate.label not in dropped]
            dropped.update({candidate.label: "halved" for candidate in left[keep:]})
        return dropped

    def _drop(self, reasons: dict[str, Stopped], rounds: int) -> None:
        """Let places drop out that took part in so many rounds."""
        for candidate in [candidate for candidate in self.live if candidate.label in reasons]:
            self.dropped[candidate] = (rounds, reasons[candidate.label])
            self.folder.drop_weights(candidate)
        self.live = [candidate for candidate in self.live if candidate.label not in reasons]
        if reasons:
            log.info("%d places drop out, %d are left", len(reasons), len(self.live))

    def _report(self, number: int, done: int, total: int) -> None:
        if self.progress is not None:
            best = self._ranked()[0].label if self.done[0] else None
            self.progress(ScanProgress(number, self.count, done, total, len(self.live), best, self.seconds))

    def _save(self) -> None:
        self._saved, self.state.seconds = time.monotonic(), self.seconds
        self.folder.save(self.state)
