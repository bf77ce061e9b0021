"""Training with differential privacy of whole documents (DP-SGD, arXiv 1607.00133)."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from neurograft import data, ranks
from neurograft.errors import NeurograftError, UsageError
from neurograft.manifest import Privacy
from neurograft.training.baselines import require_extra
from neurograft.training.loop import Batches, Texts, TrainingRun, count_steps, pack_held_out
from neurograft.training.offloading import skipping
from neurograft.training.options import TrainingOptions
from neurograft.training.per_document import DocumentGradients, quiet_import
from neurograft.training.run_state import load_state

if TYPE_CHECKING:
    import numpy

log = logging.getLogger("neurograft")

Accountant = Literal["prv", "rdp"]

_WATCHED = 3  # steps at the beginning in which every document must move what trains
_TRIED = 3  # documents that are tried to go through the organ together
_DELTA_POWER = 1.1
_LARGE_DELTA = 1e-3
_SECRET_BYTES = 32
_TOLERANCE = 0.01  # share of an epsilon that may be left unspent


@dataclass(frozen=True)
class PrivateBatches(Batches):
    """Training documents, each in a sequence of its own, and steps that draw each of them by chance."""

    delta: float = 0.0
    noise_multiplier: float = 0.0
    accountant: Accountant = "rdp"
    secret: bytes = b""
    """Nobody may know it who is to know what was trained, or the noise could be taken out again."""

    @property
    def sample_rate(self) -> float:
        """Chance of each document to be in a step."""
        return self.step_size / len(self.training.input_ids)

    @classmethod
    def build(cls, texts: Texts, tokenizer: Any, options: TrainingOptions) -> Self:
        """Tokenize the text, and find how much noise the budget asks for.

        Raises:
            UsageError: Steps would take more documents than there are, or no noise keeps to the budget.
        """
        tokens, length = data.tokenize_documents(texts.training, tokenizer), options.sequence_length
        training = data.pack_apart(tokens, sequence_length=length, separator_id=data.separator_token(tokenizer))
        count, step_size = len(training.input_ids), options.batch_size * options.accumulate
        left = [len(document) - length for document in tokens if len(document) > length]
        if left:
            log.warning(
                "%d of %d documents are longer than %d tokens; %d tokens of theirs are left out",
                len(left), count, length, sum(left),
            )  # fmt: skip
        if step_size > count:
            raise UsageError(
                f"a private step draws {step_size} documents on average, and there are {count}; give a smaller "
                "--batch-size or --accumulate."
            )
        delta = count**-_DELTA_POWER if options.dp_delta is None else options.dp_delta
        if delta * count >= 1:
            raise UsageError(
                f"--dp-delta {delta:g} is no less than 1 in {count} documents, by which publishing one of them whole "
                f"would count as private; give less than {1 / count:.2g}."
            )
        if delta > _LARGE_DELTA:
            log.warning(
                "with %d documents delta is %.2g, the chance by which the promise may not hold at all; so few are "
                "hardly kept private by any epsilon",
                count, delta,
            )  # fmt: skip
        held_out = pack_held_out(texts, tokenizer, options) if texts.held_out else _nothing(length)
        steps = count_steps(options, count)
        assert options.dp_epsilon is not None
        noise, accountant = find_noise(options.dp_epsilon, delta, step_size / count, steps)
        return cls(
            training, held_out, steps, options.batch_size, options.seed, options.accumulate, delta, noise, accountant
        )

    def training_rows(self) -> Iterator[list[int]]:
        """Yield the rows of each step, without end: each document is in it by a chance of its own."""
        for step in range(1 << 62):
            drawn = generator(self.secret, "documents", step).random(len(self.training.input_ids))
            yield (drawn < self.sample_rate).nonzero()[0].tolist()

    def spent(self, steps: int, clip: float) -> Privacy:
        """Return what so many steps have spent."""
        return Privacy(
            epsilon=spent_epsilon(self.accountant, self.noise_multiplier, self.sample_rate, steps, self.delta),
            delta=self.delta,
            units=len(self.training.input_ids),
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            clip=clip,
            steps=steps,
            accountant=self.accountant,
        )


def _nothing(length: int) -> data.PackedTokens:
    empty = torch.empty((0, length), dtype=torch.long)
    return data.PackedTokens(empty, empty, 0)


class PrivateRun(TrainingRun):
    """A training run whose steps go along sums of cut gradients of documents, with noise.

    Without evaluation data nothing is measured on any text, and the last weights are what was trained. The arguments
    are those of `TrainingRun`.
    """

    batches: PrivateBatches

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.state.secret = self.batches.secret.hex()
        self._documents = DocumentGradients(self.trainee.modules, self.parameters)
        self._unmoved = [parameter.detach().clone() for parameter in self.parameters]
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters]

    def train(self) -> None:
        """Train.

        Raises:
            NeurograftError: The loss is not finite any more, or a document or a parameter is left out of training.
            KeyboardInterrupt: See `TrainingRun`.
        """
        with skipping(self.below):
            if not self._documents.try_together(self._tried_losses, _TRIED):
                log.info("documents pass through this organ one at a time")
        log.info(
            "noise of %.3g x %.3g on sums over %.0f of %d documents on average",
            self.batches.noise_multiplier, self.options.clip, self.batches.step_size,
            len(self.batches.training.input_ids),
        )  # fmt: skip
        with self._documents.hooked():
            super().train()

    def _tried_losses(self, rows: torch.Tensor) -> torch.Tensor:
        """Return losses of tokens that are nobody's."""
        length, vocabulary = self.batches.training.input_ids.shape[1], int(self.model.config.vocab_size)
        ids = torch.arange(_TRIED * min(length, 12)).view(_TRIED, -1) * 37 % vocabulary  # (n, T)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) > 3 + torch.arange(_TRIED)[:, None], data.IGNORED_LABEL)
        return self.loss(ids[rows], labels[rows]).sum(1)

    def _passes(self, rows: list[int], tokens: int) -> float:
        """Give the parameters the noisy gradients of a step; return the mean loss of its documents."""
        torch._foreach_zero_(self._sums)
        size, losses = self.batches.batch_size if self._documents.together else 1, list[float]()
        for start in range(0, len(rows), size):
            losses += self._private_pass(rows[start : start + size])
        noise = generator(self.batches.secret, "noise", self.state.step)
        deviation = self.batches.noise_multiplier * self.options.clip
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            drawn = torch.from_numpy(noise.standard_normal(tuple(total.shape), dtype="float32")).to(total.device)
            parameter.grad = total.add(drawn, alpha=deviation).div_(self.batches.step_size).to(parameter.dtype)
        return sum(losses) / len(losses) if losses else (self.state.window or [0.0])[-1]

    def _private_pass(self, rows: list[int]) -> list[float]:
        """Add the cut gradients of a part of a step to its sums; return the documents' mean losses in nats per token.

        Raises:
            NeurograftError: A document has no gradient, or one that is not finite.
        """
        device, labels = self.model.device, self.batches.training.labels[rows, 1:]
        counts = (labels != data.IGNORED_LABEL).sum(1).clamp_min(1).to(device)
        losses = self._losses(self.batches.training, "training", rows, self.arithmetic).sum(1) / counts  # (n,)
        with self.arithmetic.active(device, backward=True):
            gradients = self._documents.take(losses)
        with self._exact.active(device):
            found = gradients.add_clipped(self._sums, self.options.clip)
        if not bool(found.isfinite().all()):
            raise NeurograftError(
                f"training diverged: the gradient of a document is not finite at step {self.state.step + 1}; try a "
                f"lower --lr than {self.lr:g}."
            )
        if self.state.step < _WATCHED and not bool((found > 0).all()):
            raise NeurograftError(
                f"private training stopped at step {self.state.step + 1}: a document gives what trains no gradient, "
                "so that nothing would be learnt from it."
            )
        return [float(loss) for loss in losses.detach()]

    def _update(self) -> None:
        super()._update()
        if self.state.step + 1 == min(_WATCHED, self.batches.steps):
            for parameter, before in zip(self.parameters, self._unmoved, strict=True):
                if torch.equal(parameter.detach(), before):
                    raise NeurograftError(
                        f"private training stopped after {self.state.step + 1} steps: a parameter of shape "
                        f"{list(parameter.shape)} is still where it was; try a higher --lr than {self.lr:g}."
                    )
            self._unmoved = []

    def _evaluation_is_due(self) -> bool:
        return len(self.batches.held_out.input_ids) > 0 and super()._evaluation_is_due()

    def _stops_early(self) -> bool:
        return False

    def _keep_best(self) -> None:
        if not self.state.held_out:
            if self._average is not None:
                self._average.swap()
            self._best = [parameter.detach().clone() for parameter in self.parameters]
        super()._keep_best()


def check_private() -> None:
    """Refuse what can't be done privately.

    Raises:
        UsageError: Several processes train together.
        NeurograftError: The extra `dp` is not installed.
    """
    if ranks.several():
        raise UsageError("--dp-epsilon is for one process; start it without torchrun or accelerate launch.")
    require_extra("opacus", "--dp-epsilon", "dp")


def find_secret(resume: Path | None, key: str) -> bytes:
    """Return the secret of the run that goes on, or draw one."""
    found = load_state(resume, key) if resume is not None else None
    return bytes.fromhex(found[0].secret) if found is not None else draw_secret()


def draw_secret() -> bytes:
    """Return randomness of the system's."""
    return os.urandom(_SECRET_BYTES)


def generator(secret: bytes, purpose: str, step: int) -> numpy.random.Generator:
    """Return a source of randomness for one thing in one step; the same secret gives the same one again."""
    import numpy

    digest = hashlib.sha256(f"{purpose} {step} ".encode() + secret).digest()
    return numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest[:16], "little")))


@functools.cache
def find_noise(epsilon: float, delta: float, sample_rate: float, steps: int) -> tuple[float, Accountant]:
    """Return the least noise multiplier with which so many steps keep to a budget, and the accountant that says so.

    Raises:
        UsageError: No noise is enough.
    """
    for accountant in ("prv", "rdp"):
        try:
            return _noise_by(accountant, epsilon, delta, sample_rate, steps), accountant
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            log.info("the accountant %s can't tell (%s)", accountant, error)
    raise UsageError(
        f"no noise keeps {steps} steps to an epsilon of {epsilon:g} at a delta of {delta:g}; give a larger "
        "--dp-epsilon, or fewer steps."
    )


def _noise_by(accountant: Accountant, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    with quiet_import(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of logarithms of 0 that are masked, and of bounds that could be tighter
        from opacus.accountants.utils import get_noise_multiplier

        noise = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=accountant,
            epsilon_tolerance=_TOLERANCE * epsilon,
        )
    return float(noise)


def spent_epsilon(accountant: Accountant, noise: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return the epsilon that so many steps have spent, as an accountant of opacus computes it."""
    with quiet_import(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import create_accountant

        found: Any = create_accountant(mechanism=accountant)
        found.history = [(noise, sample_rate, steps)]
        return max(0.0, float(found.get_epsilon(delta=delta)))  # next to nothing can be computed as less
