"""The training loop: batches, the optimizer, held-out evaluations, and going on after an interruption."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft import data
from neurograft.data import PackedTokens
from neurograft.errors import NeurograftError, UsageError
from neurograft.loss import NextTokenLoss
from neurograft.models import cache_directory
from neurograft.sharding import fill, spread_like, whole
from neurograft.training.options import TrainingOptions
from neurograft.training.prefix import Prefix, PrefixCache, cache_for
from neurograft.training.processes import Processes
from neurograft.training.run_state import RunState, load_state, save_state
from neurograft.training.tracking import Tracking, check_tracker

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")


@dataclass(frozen=True)
class TrainingProgress:
    """What a training loop reports after each step."""

    step: int
    steps: int
    loss: float
    """Mean training loss of the step, nats per token."""
    held_out_perplexity: float
    """At the last evaluation."""
    tokens_per_second: float
    seconds: float
    """Since the run started, interruptions not counted."""


ProgressCallback = Callable[[TrainingProgress], None]


@dataclass(frozen=True)
class Texts:
    """Documents to train on and documents to evaluate on."""

    training: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Batches:
    """Training and held-out sequences, packed."""

    training: PackedTokens
    held_out: PackedTokens
    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Sequences in one forward and backward pass of all processes together."""
    seed: int
    accumulate: int = 1
    """Such passes in an optimizer step."""

    @property
    def step_size(self) -> int:
        """Sequences in an optimizer step."""
        return self.batch_size * self.accumulate

    @classmethod
    def build(cls, texts: Texts, tokenizer: Any, options: TrainingOptions) -> Batches:
        """Tokenize and pack the text, and work out how many steps there will be."""
        separator, length = data.separator_token(tokenizer), options.sequence_length
        training = data.pack(
            data.tokenize_documents(texts.training, tokenizer), sequence_length=length, separator_id=separator
        )
        held_out = data.pack(
            _first_tokens(texts.held_out, tokenizer, options.eval_tokens),
            sequence_length=length,
            separator_id=separator,
        )
        step_size = options.batch_size * options.accumulate
        an_epoch = len(training.input_ids) / step_size
        if options.steps is not None:
            steps = options.steps
        elif options.max_tokens is not None:
            steps = math.ceil(options.max_tokens / (step_size * length))
        else:
            steps = math.ceil((options.epochs or 1) * an_epoch)
        return cls(training, held_out, max(steps, 1), options.batch_size, options.seed, options.accumulate)

    @property
    def repeats(self) -> bool:
        """Whether the run goes over some training text again."""
        return self.steps * self.step_size > len(self.training.input_ids)

    def training_rows(self) -> Iterator[list[int]]:
        """Yield the rows of each step, in a new random order each pass, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        rows: Iterator[int] = itertools.chain.from_iterable(
            torch.randperm(len(self.training.input_ids), generator=generator).tolist() for _ in itertools.count()
        )
        while True:
            yield list(itertools.islice(rows, self.step_size))


def _first_tokens(documents: list[str], tokenizer: Any, limit: int) -> list[list[int]]:
    """Tokenize documents until there are `limit` tokens, cutting the last; at least one document."""
    chosen: list[list[int]] = []
    for tokens in data.tokenize_documents(documents, tokenizer):
        left = limit - sum(map(len, chosen))
        if left <= 0:
            break
        chosen.append(tokens[:left])
    return chosen


@dataclass(frozen=True)
class Trainee:
    """What trains in a model; everything else in it is frozen."""

    parameters: Sequence[nn.Parameter]
    modules: Sequence[nn.Module]
    """Those that are in training mode while it trains."""
    first_layer: int
    """Number of the first decoder layer with something that trains; what lies below it runs once for each sequence,
    where that is possible and wanted. 0 where the embedding trains."""

    @classmethod
    def of_layers(cls, layers: Sequence[nn.Module], first_layer: int) -> Trainee:
        """Let all parameters of some decoder layers train."""
        return cls([parameter for layer in layers for parameter in layer.parameters()], layers, first_layer)


class TrainingRun:
    """One training run: something in a model trains, everything else in it is frozen.

    Args:
        model: A causal language model, in evaluation mode.
        trainee: What trains.
        batches: The text.
        options: How to train.
        progress: Called after each step.
        resume: Where the state of an interrupted run is kept; `None` to keep none.
        key: Digest of what the run depends on beside its options; a state with another is refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainee: Trainee,
        batches: Batches,
        options: TrainingOptions,
        *,
        progress: ProgressCallback | None = None,
        resume: Path | None = None,
        key: str = "",
    ) -> None:
        self.model, self.trainee, self.batches, self.options = model, trainee, batches, options
        self.progress, self.resume = progress, resume
        self.state = RunState(key=key)
        model.requires_grad_(False)
        for parameter in trainee.parameters:
            parameter.requires_grad_(True)
        self.processes = _processes(options, batches)
        self._tracking = Tracking(self.processes, options)
        # What is tried out is tried out while each process holds the whole model.
        self.loss = NextTokenLoss(model)
        self._prefix = Prefix(model, trainee.first_layer)
        self._caches = self._open_caches(trainee.first_layer)
        self.caller, self.parameters = self.processes.prepare(model, trainee.parameters)
        self.optimizer = self._make_optimizer()
        self._start = _copies(self.parameters)
        self._best = self._start
        self._random = torch.get_rng_state()
        self._consistent, self._agreed = True, False

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        return torch.optim.AdamW(self.parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)

    def train(self) -> None:
        """Train; at the end the layers hold the best weights that the held-out text has seen.

        Raises:
            NeurograftError: The loss is not finite any more.
            KeyboardInterrupt: The run was interrupted; its message says how to go on.
        """
        torch.manual_seed(self.options.seed)
        self._random = torch.get_rng_state()
        self._restore()
        self._before, self._started = self.state.seconds, time.monotonic()
        self._saved = self._started
        self._tracking.start(self.state.key)
        try:
            # A second signal, such as a launcher sends after Ctrl-C, must not break off the saving either.
            with self.processes.noting_interruptions():
                self._loop_or_explain()
        finally:
            self._tracking.close()
        self._keep_best()
        self._training_mode(False)
        self.state.seconds = self._seconds()

    def _loop_or_explain(self) -> None:
        try:
            self._loop()
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self._explain_interruption()) from interrupt

    def _loop(self) -> None:
        rows = itertools.islice(self.batches.training_rows(), self.state.step, None)
        while True:
            if self._evaluation_is_due():
                self._evaluate()
            if self.state.step == self.batches.steps or self._stops_early():
                break
            self._step(next(rows))
            if self.processes.interrupted():
                self._agreed = True
                raise KeyboardInterrupt
            if self._save_is_due():
                self._save()

    def _keep_best(self) -> None:
        """Give the parameters their best values, or those part of the way there."""
        with torch.no_grad():
            for parameter, first, last in zip(self.parameters, self._start, self._best, strict=True):
                strength = self.options.strength
                parameter.copy_(torch.lerp(first, last, strength) if strength < 1 else last)

    def _step(self, rows: list[int]) -> None:
        self._training_mode(True)
        self._draw_apart()
        tokens = _count(self.batches.training, rows)
        size, mine = self.batches.batch_size, 0.0
        for start in range(0, len(rows), size):
            mine += self._pass(rows[start : start + size], tokens, last=start + size >= len(rows))
        (loss,) = self.processes.total(mine)
        if not math.isfinite(loss):
            raise NeurograftError(
                f"training diverged: the loss at step {self.state.step + 1} is {loss}; try a lower --lr than "
                f"{self.options.lr:g}."
            )
        self._consistent = False
        self._update()
        self.state.step += 1
        self.state.tokens_seen += tokens
        self.state.window.append(loss)
        self._random = torch.get_rng_state()
        self._consistent = True
        self._report()

    def _pass(self, rows: Sequence[int], tokens: int, *, last: bool) -> float:
        """Add this process's share of the gradient of a part of a step.

        Args:
            rows: The part's rows, of all processes.
            tokens: How many tokens of the whole step have a loss.
            last: Whether the step's other parts are done.

        Returns:
            This process's share of the step's mean loss in nats per token.
        """
        with self.processes.passing(self.caller, last=last), self.loss.through(self.caller):
            losses = self._losses(self.batches.training, "training", self.processes.share(rows))
            loss = losses.sum() / max(tokens, 1)
            # The processes' gradients are averaged, and their sum is wanted.
            (loss * self.processes.count if self.processes.count > 1 else loss).backward()
        return float(loss.detach())

    def _update(self) -> None:
        """Let the optimizer take its step along the clipped gradient."""
        self.processes.accelerator.clip_grad_norm_(self.parameters, self.options.clip)
        share = learning_rate_share(self.state.step, self.batches.steps, self.options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _draw_apart(self) -> None:
        """Let each process but the first draw dropout of its own, which depends on the step alone."""
        if not self.processes.first:
            torch.manual_seed(hash((self.options.seed, self.state.step, self.processes.number)) & 0x7FFF_FFFF_FFFF_FFFF)

    def _losses(self, packed: PackedTokens, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Return the losses of some sequences, (B, T) in nats."""
        chosen = list(rows)
        with self._entered(packed, self._caches[name], chosen), self.processes.accelerator.autocast():
            return self.loss(packed.input_ids[chosen], packed.labels[chosen])

    @contextmanager
    def _entered(self, packed: PackedTokens, cache: PrefixCache | None, rows: list[int]) -> Iterator[None]:
        """Let the trained layers be entered by what is cached for these sequences, and cache it if it is not yet."""
        if cache is None:
            yield
        elif cache.has(rows):
            with self._prefix.given(cache.read(rows).to(self.model.device, self.model.dtype)):
                yield
        else:
            with self._prefix.noted(cache.dtype) as seen:
                yield
            cache.write(rows, seen[0])

    def _open_caches(self, position: int) -> dict[str, PrefixCache | None]:
        """Open the caches of what enters the trained layers, where they are wanted and possible."""
        wanted, texts = (
            self.options.cache_prefix,
            {"training": self.batches.training, "held-out": self.batches.held_out},
        )
        if wanted == "never" or position == 0:
            return dict.fromkeys(texts)
        if not self._prefix.works():
            if wanted == "always":
                raise NeurograftError(
                    f"what enters layer {position} of this {self.model.config.model_type} model can't be cached, since "
                    "later layers take more from those below; leave --cache-prefix at auto."
                )
            return dict.fromkeys(texts)
        return {
            name: cache_for(
                cache_directory() / "prefix",
                self.model,
                position,
                packed.input_ids,
                dtype=self.options.cache_dtype,
                needed=wanted == "always",
            )
            if name == "held-out" or wanted == "always" or self.batches.repeats
            else None
            for name, packed in texts.items()
        }

    def _training_mode(self, training: bool) -> None:
        for module in self.trainee.modules:
            module.train(training)

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.step, max(1, math.ceil(self.batches.steps / self.options.evaluations))
        evaluated = bool(self.state.held_out) and self.state.held_out[-1][0] == step
        return not evaluated and (step % every == 0 or step == self.batches.steps)

    def _evaluate(self) -> None:
        """Evaluate the held-out text, and keep the weights if they are the best so far."""
        self._training_mode(False)
        state, loss = self.state, self.held_out_loss()
        perplexity = math.exp(min(loss, 700))
        log.info("step %d: held-out perplexity %.2f", state.step, perplexity)
        self._tracking.log({"held_out_perplexity": perplexity}, state.step)
        best = _finite(state.held_out[state.best][1]) if state.held_out else math.inf
        kept = _copies(self.parameters) if _finite(loss) < best else None
        self._consistent = False
        state.held_out.append((state.step, loss))
        if kept is not None:
            self._best, state.best = kept, len(state.held_out) - 1
        if state.window:
            state.losses.append((state.step, sum(state.window) / len(state.window)))
            state.window = []
        self._consistent = True

    def _stops_early(self) -> bool:
        stops = len(self.state.held_out) - 1 - self.state.best >= self.options.patience
        if stops:
            log.info("stopping early at step %d: the held-out loss no longer falls", self.state.step)
        return stops

    def held_out_loss(self) -> float:
        """Return the mean held-out loss in nats per token; with several processes, all must ask at once."""
        packed, mine = self.batches.held_out, 0.0
        with torch.no_grad():
            for rows in torch.arange(len(packed.input_ids)).split(self.batches.batch_size):
                chosen = self.processes.share(rows.tolist())
                # Where the model is spread, a process without a row of its own has to lend the others its part.
                losses = self._losses(packed, "held-out", chosen or rows[:1].tolist())
                mine += float(losses.double().sum()) if chosen else 0.0
        (total,) = self.processes.total(mine)
        return total / max(_count(packed, range(len(packed.input_ids))), 1)

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _report(self) -> None:
        state, seconds = self.state, self._seconds()
        speed = state.tokens_seen / max(seconds, 1e-9)
        rate = self.optimizer.param_groups[0]["lr"]
        self._tracking.log({"loss": state.window[-1], "learning_rate": rate, "tokens_per_second": speed}, state.step)
        if self.progress is not None and self.processes.first:
            perplexity = math.exp(min(state.held_out[-1][1], 700))
            self.progress(
                TrainingProgress(state.step, self.batches.steps, state.window[-1], perplexity, speed, seconds)
            )

    def _save_is_due(self) -> bool:
        due = self.processes.first and time.monotonic() - self._saved >= self.options.checkpoint_every
        return self.processes.any(due)

    def _save(self) -> None:
        """Write the run's state beside its output; with several processes, all must do it at once."""
        self._saved = time.monotonic()
        path = self.resume
        if path is None:
            return
        self.state.seconds = self._seconds()
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self._tensors():
            gathered = whole(tensor.detach()).contiguous().cpu()
            if self.processes.first:
                tensors[name] = gathered
        self.processes.on_first(lambda: save_state(path, self.state, tensors))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the run's state, with their names."""
        yield "random", self._random
        for number, (parameter, best) in enumerate(zip(self.parameters, self._best, strict=True)):
            yield f"parameter.{number}", parameter
            yield f"best.{number}", best
            for name, value in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{number}.{name}", value

    def _restore(self) -> None:
        """Go on from where an interrupted run stood, if one left its state."""
        text, tensors = self.processes.from_first(self._load)
        if not text:
            return
        self.state = RunState.model_validate_json(text)
        self._random = tensors["random"]
        torch.set_rng_state(self._random)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                fill(parameter, tensors[f"parameter.{number}"])
        self._best = [spread_like(tensors[f"best.{number}"], p.detach()) for number, p in enumerate(self.parameters)]
        self._restore_optimizer(tensors)
        log.info("going on after step %d of %d", self.state.step, self.batches.steps)

    def _load(self) -> tuple[str, dict[str, torch.Tensor]]:
        """Read the state that an interrupted run left, as JSON, and its tensors; an empty text if there is none."""
        found = load_state(self.resume, self.state.key) if self.resume is not None else None
        return (found[0].model_dump_json(), found[1]) if found is not None else ("", {})

    def _restore_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, inner = rest.partition(".")
                parameter = self.parameters[int(number)].detach()
                value = spread_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
                states.setdefault(int(number), {})[inner] = value
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _explain_interruption(self) -> str:
        at = f"training stopped after step {self.state.step} of {self.batches.steps}"
        if self.resume is None:
            return at
        # With several processes, one alone can't gather the state.
        if self._consistent and self.state.step and (self.processes.count == 1 or self._agreed):
            self._save()
        return f"{at}; the same command goes on from there" if self.resume.is_file() else at


def _processes(options: TrainingOptions, batches: Batches) -> Processes:
    check_tracker(options)
    processes = Processes(log_with=options.log_to, log_folder=str(options.log_dir) if options.log_to else None)
    if batches.batch_size < processes.count:
        raise UsageError(
            f"--batch-size {batches.batch_size} leaves some of the {processes.count} processes without a sequence; "
            "give at least as many as there are processes."
        )
    return processes


def _copies(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _count(packed: PackedTokens, rows: Sequence[int]) -> int:
    """Count the tokens of some sequences that have a loss."""
    return int((packed.labels[list(rows), 1:] != data.IGNORED_LABEL).sum())


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))
