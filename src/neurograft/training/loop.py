"""The training loop: batches, the optimizer, held-out evaluations, and going on after an interruption."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft import data
from neurograft.allocator import keeping_freed_memory
from neurograft.anatomy import describe
from neurograft.arithmetic import Arithmetic, choose_arithmetic
from neurograft.attention import choose_attention
from neurograft.data import PackedTokens
from neurograft.errors import NeurograftError, UsageError
from neurograft.loss import NextTokenLoss, VocabularySample
from neurograft.models import cache_directory
from neurograft.sharding import fill, spread_like, whole
from neurograft.training.compiling import LayerCompiler
from neurograft.training.filling import Passages
from neurograft.training.filling import fill as fill_caches
from neurograft.training.offloading import OffloadedLayers, skipping
from neurograft.training.optimizers import Average, Optimizers, pull_back
from neurograft.training.options import TrainingOptions
from neurograft.training.prefix import Prefix, PrefixCache, cache_for
from neurograft.training.processes import Processes
from neurograft.training.recomputing import recomputing
from neurograft.training.run_state import RunState, load_state, save_state
from neurograft.training.schedules import automatic_lr, learning_rate_share
from neurograft.training.tracking import Tracking, check_tracker

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")

# Tokens of the vocabulary that stand, in each step, for all those that do not occur in the training text.
_OTHER_TOKENS = 2048
_TOKENIZED_TOGETHER = 64
_FEW = 16  # sequences that a step may take of any text, over and over if need be


@dataclass(frozen=True)
class TrainingProgress:
    """What a training loop reports after each step."""

    step: int
    steps: int
    loss: float
    """Mean training loss of the step, nats per token."""
    held_out_perplexity: float | None
    """At the last evaluation; `None` in a private run without evaluation data."""
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
        """Tokenize and pack the text, and work out how many steps there will be.

        Raises:
            UsageError: Accumulation would go over the text more than twice in one step, or the training is to be
                private.
        """
        if options.dp_epsilon is not None:
            raise UsageError("--dp-epsilon is for train; nothing else trains with differential privacy.")
        training = data.pack(
            data.tokenize_documents(texts.training, tokenizer),
            sequence_length=options.sequence_length,
            separator_id=data.separator_token(tokenizer),
        )
        step_size = options.batch_size * options.accumulate
        asked = options.accumulate > 1 or "batch_size" in options.model_fields_set
        if asked and step_size > max(_FEW, 2 * len(training.input_ids)):
            raise UsageError(
                f"an optimizer step would take {options.accumulate} x {options.batch_size} sequences, and the text "
                f"fills {len(training.input_ids)}; give a smaller --accumulate or --batch-size."
            )
        if options.max_tokens is not None and step_size * options.sequence_length > options.max_tokens:
            log.warning(
                "a step takes %s tokens, more than the %s that were asked for",
                f"{step_size * options.sequence_length:,}", f"{options.max_tokens:,}",
            )  # fmt: skip
        held_out = pack_held_out(texts, tokenizer, options)
        steps = count_steps(options, len(training.input_ids))
        return cls(training, held_out, steps, options.batch_size, options.seed, options.accumulate)

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


def pack_held_out(texts: Texts, tokenizer: Any, options: TrainingOptions) -> PackedTokens:
    """Pack a sample of the held-out text."""
    return data.pack(
        sample_tokens(texts.held_out, tokenizer, options.eval_tokens),
        sequence_length=options.sequence_length,
        separator_id=data.separator_token(tokenizer),
    )


def count_steps(options: TrainingOptions, sequences: int) -> int:
    """Return how many optimizer steps the options ask for, with so many training sequences."""
    step_size = options.batch_size * options.accumulate
    if options.steps is not None:
        return options.steps
    if options.max_tokens is not None:
        return math.ceil(options.max_tokens / (step_size * options.sequence_length))
    return max(1, math.ceil((options.epochs or 1) * sequences / step_size))


def sample_tokens(documents: list[str], tokenizer: Any, limit: int) -> list[list[int]]:
    """Tokenize documents until there are `limit` tokens, cutting the last; at least one document.

    They are taken from all over: neighbours often treat of the same thing, and the first ones would stand for it alone.
    """
    chosen: dict[int, list[int]] = {}
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    left = limit
    for part in torch.tensor(order).split(_TOKENIZED_TOGETHER):
        numbers = part.tolist()
        tokenized = data.tokenize_documents([documents[number] for number in numbers], tokenizer)
        for number, tokens in zip(numbers, tokenized, strict=True):
            if left > 0:
                chosen[number] = tokens[:left]
                left -= len(tokens)
        if left <= 0:
            break
    return [chosen[number] for number in sorted(chosen)]


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
        below: The layers below what trains, where they are not in memory.
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
        below: OffloadedLayers | None = None,
    ) -> None:
        self.model, self.trainee, self.batches, self.options = model, trainee, batches, options
        self.progress, self.resume, self.below = progress, resume, below
        self.state = RunState(key=key)
        model.requires_grad_(False)
        for parameter in trainee.parameters:
            parameter.requires_grad_(True)
        self.processes = _processes(options, batches)
        self.arithmetic, self._exact = self._choose_arithmetic()
        self._tracking = Tracking(self.processes, options)
        # What is tried out is tried out while each process holds the whole model.
        with skipping(below):
            self.loss = NextTokenLoss(model)
        self._vocabulary = self._sample_vocabulary()
        self._prefix = Prefix(model, trainee.first_layer)
        self._caches = self._open_caches(trainee.first_layer)
        if below is not None:
            fill_caches(self._prefix, below, list(self._passages()))
        self.caller, self.parameters = self.processes.prepare(model, trainee.parameters)
        layers = list(model.get_submodule(describe(model).layers_path).children())
        self._layers = layers[trainee.first_layer :]  # those that a gradient goes through
        self._compiler = self._make_compiler()
        self.lr = self._choose_lr()
        self.optimizers = Optimizers(
            self.parameters, name=options.optimizer, lr=self.lr, weight_decay=options.weight_decay
        )
        self._average = Average(self.parameters, options.average) if options.average else None
        self._start = _copies(self.parameters) if options.strength < 1 or options.anchor else None
        self._best = _copies(self.parameters)
        self._random = torch.get_rng_state()
        self._consistent, self._agreed = True, False

    def _choose_arithmetic(self) -> tuple[Arithmetic, Arithmetic]:
        """Return how to multiply while training, and while evaluating; the first process chooses for all."""
        device = self.model.device
        asked = self.options.precision
        if asked == "auto" and self.processes.accelerator.mixed_precision == "bf16":
            asked = "bfloat16"

        def choose() -> tuple[str, dict[str, torch.Tensor]]:
            found = load_state(self.resume, self.state.key) if self.resume is not None else None
            # A run that goes on must go on with the same arithmetic, or it would not come to the same bits.
            if found is not None and found[0].kernels:
                return json.dumps([found[0].kernels, found[0].attention]), {}
            kernels = [choose_arithmetic(p, device).kernels for p in (asked, "float32")]
            attention = choose_attention(self.batches.training.input_ids.shape[1], kernels[0], device)
            return json.dumps([kernels, attention]), {}

        self.state.kernels, self.state.attention = json.loads(self.processes.from_first(choose)[0])
        training, evaluating = self.state.kernels
        log.info("matrices are multiplied in %s, attention is %s", training, self.state.attention)
        return Arithmetic(training, self.state.attention), Arithmetic(evaluating)

    def _sample_vocabulary(self) -> VocabularySample | None:
        if self.options.vocabulary == "full" or self.loss.head is None or self.loss.head.weight.requires_grad:
            return None
        return VocabularySample(self.loss.head, self.batches.training.input_ids, _OTHER_TOKENS)

    def _make_compiler(self) -> LayerCompiler:
        """Choose whether the layers above the frozen ones are compiled, or leave that to the first steps."""
        several = self.processes.count > 1
        if several and self.options.compile == "always":
            raise UsageError("--compile always is for one process; leave it at auto, which compiles in one alone.")
        return LayerCompiler(
            self._layers,
            self.options.compile,
            steps=self.batches.steps,
            eligible=not several and self.model.device.type == "cpu" and self.options.dp_epsilon is None,
        )

    def _choose_lr(self) -> float:
        """Return the peak learning rate, chosen by what trains if it was left open."""
        if self.options.lr != "auto":
            return self.options.lr
        path = describe(self.model).layers_path
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trained = {names.get(id(p), "").removeprefix(f"{path}.").partition(".")[0] for p in self.parameters}
        width = int(self.model.config.hidden_size)
        vectors = all(parameter.dim() < 2 for parameter in self.parameters)
        lr = automatic_lr(len(trained), width, low_rank=self.options.rank is not None, vectors=vectors)
        log.info("peak learning rate %.2g", lr)
        return lr

    def train(self) -> None:
        """Train; at the end the layers hold the best weights that the held-out text has seen.

        Raises:
            NeurograftError: The loss is not finite any more.
            KeyboardInterrupt: The run was interrupted; its message says how to go on.
        """
        torch.manual_seed(self.options.seed)
        self._random = torch.get_rng_state()
        self._restore()
        self._compiler.recall(self.state.compiled)
        self._before, self._started = self.state.seconds, time.monotonic()
        self._saved = self._started
        self._tracking.start(self.state.key)
        try:
            # A second signal, such as a launcher sends after Ctrl-C, must not break off the saving either.
            with self.processes.noting_interruptions(), keeping_freed_memory():
                self._loop_or_explain()
        finally:
            self._tracking.close()
        self._keep_best()
        self._let_go()
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
            for number, (parameter, last) in enumerate(zip(self.parameters, self._best, strict=True)):
                first, strength = self._start[number] if self._start else last, self.options.strength
                parameter.copy_(torch.lerp(first, last, strength) if strength < 1 else last)

    def _let_go(self) -> None:
        """Free what only training needs: gathering what was trained takes memory again."""
        self._best, self._start = [], None
        for optimizer in self.optimizers.each:
            optimizer.state.clear()

    def _step(self, rows: list[int]) -> None:
        self._training_mode(True)
        self._draw_apart()
        if self._vocabulary is not None:
            self._vocabulary.draw(self.options.seed * self.batches.steps + self.state.step)
        tokens = _count(self.batches.training, rows)
        loss = self._compiler.run(self.state.step, lambda: self._passes(rows, tokens), self._clear_gradients)
        self.state.compiled = self._compiler.chosen
        if not math.isfinite(loss):
            raise NeurograftError(
                f"training diverged: the loss at step {self.state.step + 1} is {loss}; try a lower {self._suspect()}."
            )
        self._consistent = False
        self._update()
        self.state.step += 1
        self.state.tokens_seen += tokens
        self.state.window.append(loss)
        self._random = torch.get_rng_state()
        self._consistent = True
        self._report()

    def _passes(self, rows: list[int], tokens: int) -> float:
        """Give the parameters the gradients of a step; return its mean loss in nats per token.

        Args:
            rows: The step's rows, of all processes.
            tokens: How many of their tokens have a loss.
        """
        size, mine = self.batches.batch_size, 0.0
        for start in range(0, len(rows), size):
            mine += self._pass(rows[start : start + size], tokens, last=start + size >= len(rows))
        (loss,) = self.processes.total(mine)
        self.processes.accelerator.clip_grad_norm_(self.parameters, self.options.clip)
        return loss

    def _pass(self, rows: Sequence[int], tokens: int, *, last: bool) -> float:
        """Add this process's share of the gradient of a part of a step.

        Args:
            rows: The part's rows, of all processes.
            tokens: How many tokens of the whole step have a loss.
            last: Whether the step's other parts are done.

        Returns:
            This process's share of the step's mean loss in nats per token.
        """
        checkpointing = recomputing(self._layers if self.options.gradient_checkpointing else ())
        with self.processes.passing(self.caller, last=last), self.loss.through(self.caller), checkpointing:
            share = self.processes.share(rows)
            losses = self._losses(self.batches.training, "training", share, self.arithmetic, self._vocabulary)
            loss = losses.sum() / max(tokens, 1)
            with self.arithmetic.active(self.model.device, backward=True):
                # The processes' gradients are averaged, and their sum is wanted.
                (loss * self.processes.count if self.processes.count > 1 else loss).backward()
        return float(loss.detach())

    def _suspect(self) -> str:
        """Return what most likely made a run diverge, as it is given: by a decay of 2 and more weights grow."""
        for name in ("anchor", "weight_decay"):
            value = getattr(self.options, name)
            if value * self.lr >= 2:
                return f"--{name.replace('_', '-')} than {value:g}"
        return f"--lr than {self.lr:g}"

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _update(self) -> None:
        """Let the optimizer take its step along the gradient."""
        options, step = self.options, self.state.step
        share = learning_rate_share(step, self.batches.steps, warmup=options.warmup, schedule=options.schedule)
        self.optimizers.step(share)
        if options.anchor and self._start is not None:
            pull_back(self.parameters, self._start, self.lr * share * options.anchor)
        if self._average is not None:
            self._average.update(step + 1)

    def _draw_apart(self) -> None:
        """Let each process but the first draw dropout of its own, which depends on the step alone."""
        if not self.processes.first:
            torch.manual_seed(hash((self.options.seed, self.state.step, self.processes.number)) & 0x7FFF_FFFF_FFFF_FFFF)

    def _losses(
        self,
        packed: PackedTokens,
        name: str,
        rows: Sequence[int],
        arithmetic: Arithmetic,
        vocabulary: VocabularySample | None = None,
    ) -> torch.Tensor:
        """Return the losses of some sequences, (B, T) in nats."""
        chosen = list(rows)
        with self._entered(packed, self._caches[name], chosen), arithmetic.active(self.model.device):
            return self.loss(packed.input_ids[chosen], packed.labels[chosen], vocabulary=vocabulary)

    @contextmanager
    def _entered(self, packed: PackedTokens, cache: PrefixCache | None, rows: list[int]) -> Iterator[None]:
        """Let the trained layers be entered by what is cached for these sequences, and cache it if it is not yet."""
        if cache is None:
            yield
        elif cache.has(rows):
            with self._prefix.given(cache.read(rows).to(self.model.device, self.model.dtype)):
                yield
        else:
            with self._prefix.noted(lambda states: cache.settle(rows, states)):
                yield

    def _open_caches(self, position: int) -> dict[str, PrefixCache | None]:
        """Open the caches of what enters the trained layers, where they are wanted and possible."""
        wanted = "always" if self.below is not None else self.options.cache_prefix
        texts = {"training": self.batches.training, "held-out": self.batches.held_out}
        if wanted == "never" or position == 0:
            return dict.fromkeys(texts)
        if not self._prefix.works():
            if wanted == "always":
                raise NeurograftError(
                    f"what enters layer {position} of this {self.model.config.model_type} model can't be cached, since "
                    "later layers take more from those below; leave --cache-prefix at auto, and --offload out."
                )
            return dict.fromkeys(texts)
        return {
            name: cache_for(
                cache_directory() / "prefix",
                self.model,
                position,
                packed.input_ids,
                dtype=self.options.cache_dtype,
                arithmetic=self.arithmetic if name == "training" else self._exact,
                needed=wanted == "always",
                elsewhere=None if self.below is None else self.below.digests,
            )
            if len(packed.input_ids) and (name == "held-out" or wanted == "always" or self.batches.repeats)
            else None
            for name, packed in texts.items()
        }

    def _passages(self) -> Iterator[Passages]:
        """Yield all that the run will pass through the layers below, in the batches in which it asks for it."""
        size, steps = self.batches.batch_size, itertools.islice(self.batches.training_rows(), self.batches.steps)
        training = [rows[start : start + size] for rows in steps for start in range(0, len(rows), size)]
        for name, packed, arithmetic, batches in (
            ("training", self.batches.training, self.arithmetic, training),
            ("held-out", self.batches.held_out, self._exact, self._held_out_rows()),
        ):
            if (cache := self._caches[name]) is not None:
                yield Passages(packed.input_ids, cache, arithmetic, batches)

    def _held_out_rows(self) -> list[list[int]]:
        rows = torch.arange(len(self.batches.held_out.input_ids))
        return [part.tolist() for part in rows.split(self.batches.batch_size)]

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
        if self._average is not None:
            self._average.swap()
        state, loss = self.state, self.held_out_loss()
        perplexity = math.exp(min(loss, 700))
        log.info("step %d: held-out perplexity %.2f", state.step, perplexity)
        self._tracking.log({"held_out_perplexity": perplexity}, state.step)
        best = _finite(state.held_out[state.best][1]) if state.held_out else math.inf
        self._consistent = False
        if _finite(loss) < best:
            state.best = len(state.held_out)
            with torch.no_grad():
                for kept, parameter in zip(self._best, self.parameters, strict=True):
                    kept.copy_(parameter)
        if self._average is not None:
            self._average.swap()
        state.held_out.append((state.step, loss))
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
            for rows in self._held_out_rows():
                chosen = self.processes.share(rows)
                # Where the model is spread, a process without a row of its own has to lend the others its part.
                losses = self._losses(packed, "held-out", chosen or rows[:1], self._exact)
                mine += float(losses.double().sum()) if chosen else 0.0
        (total,) = self.processes.total(mine)
        return total / max(_count(packed, range(len(packed.input_ids))), 1)

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _report(self) -> None:
        state, seconds = self.state, self._seconds()
        speed = state.tokens_seen / max(seconds, 1e-9)
        rate = float(self.optimizers.each[0].param_groups[0]["lr"])
        self._tracking.log({"loss": state.window[-1], "learning_rate": rate, "tokens_per_second": speed}, state.step)
        if self.progress is not None and self.processes.first:
            perplexity = math.exp(min(state.held_out[-1][1], 700)) if state.held_out else None
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
        for number, value in enumerate(self._average.values if self._average else ()):
            yield f"average.{number}", value
        for name, value in self.optimizers.state():
            yield f"optimizer.{name}", value

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
        for number, value in enumerate(self._average.values if self._average else ()):
            fill(value, tensors[f"average.{number}"])
        start = "optimizer."
        self.optimizers.load_state({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        log.warning("going on after step %d of %d, where an earlier run stopped", self.state.step, self.batches.steps)

    def _load(self) -> tuple[str, dict[str, torch.Tensor]]:
        """Read the state that an interrupted run left, as JSON, and its tensors; an empty text if there is none."""
        found = load_state(self.resume, self.state.key) if self.resume is not None else None
        return (found[0].model_dump_json(), found[1]) if found is not None else ("", {})

    def _explain_interruption(self) -> str:
        at = f"training stopped after step {self.state.step} of {self.batches.steps}"
        if self.resume is None:
            return at
        # With several processes, one alone can't gather the state.
        if self._consistent and self.state.step and (self.processes.count == 1 or self._agreed):
            self._save()
        kept = self.resume is not None and self.resume.is_file()
        return f"{at}; the same command goes on from there" if kept else at


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
