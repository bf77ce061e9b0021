"""What training an organ will cost: seconds, peak memory and bytes, predicted from a few measured steps.

An optimizer step runs the layers below the organ forwards, the organ forwards and backwards, and those above it
forwards and backwards too, since the gradient reaches the organ through them. A few real steps at the two ends of the
model tell what each of these costs for one layer, and every other range follows.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

from neurograft.loss import CHUNK
from neurograft.training.loop import Batches, Trainee, TrainingProgress, TrainingRun
from neurograft.training.options import TrainingOptions
from neurograft.training.prefix import Prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

_STEPS = 4
clock = time.perf_counter
"""What tells the seconds; where a machine is shared, a benchmark may count processor time instead."""
# Bytes for each number that trains: its gradient, AdamW's two moments, the best value so far.
_TRAINING_BYTES = 4 + 8 + 4
# Copies of the logits of a chunk that exist at once: themselves, in float32, and what the loss makes of them.
_LOGIT_COPIES = 3


class Cost(BaseModel):
    """What training one organ costs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float
    """Of the training loop with its evaluations, as in the manifest; loading not counted."""
    memory: int
    """Peak memory beyond the host itself, in bytes."""
    bytes: int
    """Of the organ file."""


@dataclass(frozen=True)
class Measured:
    """What was measured on batches of the size that will be trained, all for one layer unless it says otherwise."""

    layer_count: int
    forward: float
    """Seconds without gradients."""
    through: float
    """Seconds forwards and backwards where only the gradient of what enters the layer is wanted."""
    training: float
    """The same where the layer trains, its update included."""
    fixed: float
    """Seconds of a step for everything that is no layer: head, loss."""
    evaluating: float
    """The same without gradients."""
    through_bytes: float
    """Bytes that are kept from the forward pass for the backward pass, where the layer is frozen."""
    training_bytes: float
    """The same where it trains."""
    fixed_bytes: float
    """The same for everything that is no layer, with the logits of a chunk."""
    parameters: int
    """Numbers in a layer."""


def predict(
    measured: Measured, batches: Batches, options: TrainingOptions, *, start: int, count: int, inserted: bool, size: int
) -> Cost:
    """Predict what training an organ costs.

    Args:
        measured: What was measured.
        batches: The text, as it will be trained on.
        options: How it will be trained.
        start: Number of the organ's first layer.
        count: How many layers it has.
        inserted: Whether it is added to the host's layers, and does not take the place of any.
        size: Bytes of its tensors.
    """
    above = measured.layer_count - start - (0 if inserted else count)
    cached = batches.repeats and options.cache_prefix != "never" and start > 0
    below = 0.0 if cached else start * measured.forward
    step = options.accumulate * (measured.fixed + below + count * measured.training + above * measured.through)
    evaluation = len(batches.held_out.input_ids) / batches.batch_size
    again = measured.evaluating + (count + above) * measured.forward
    # What enters the organ is computed once for the held-out text, and once for training text that comes again.
    once = evaluation * start * measured.forward
    if options.cache_prefix == "never":
        again, once = again + start * measured.forward, 0.0
    if cached:
        once += len(batches.training.input_ids) / batches.batch_size * start * measured.forward
    looks = min(options.evaluations, batches.steps) + 1
    kept = count * measured.training_bytes + above * measured.through_bytes + measured.fixed_bytes
    own = count * measured.parameters
    added = 4 * own if inserted else 0
    return Cost(
        seconds=batches.steps * step + looks * evaluation * again + once,
        memory=int(kept + own * _TRAINING_BYTES + added + size),
        bytes=size,
    )


def measure(
    model: PreTrainedModel, layers: Sequence[nn.Module], batches: Batches, options: TrainingOptions
) -> Measured:
    """Train a few steps at both ends of a model, which is afterwards as it was.

    Args:
        model: The host, loaded in float32.
        layers: Its decoder layers.
        batches: The text.
        options: How an organ will be trained.
    """
    count = len(layers)
    several = min(4, count)
    last = _Probe(model, layers, batches, options, range(count - 1, count))
    first = _Probe(model, layers, batches, options, range(0, 1))
    more = _Probe(model, layers, batches, options, range(count - several, count))
    forward, whole = _time_forward(model, last.run, batches)
    training = forward + (more.step - last.step) / max(several - 1, 1)
    training_bytes = (more.kept - last.kept) / max(several - 1, 1)
    vocabulary = int(model.config.vocab_size)
    positions = batches.batch_size * batches.training.input_ids.shape[1]
    logits = min(CHUNK, positions) if last.run.loss.head is not None else positions
    return Measured(
        layer_count=count,
        forward=forward,
        through=max(forward + (first.step - last.step) / max(count - 1, 1), forward),
        training=max(training, forward),
        fixed=max(last.step - (count - 1) * forward - training, 0.0),
        evaluating=max(whole - count * forward, 0.0),
        through_bytes=(first.kept - last.kept) / max(count - 1, 1),
        training_bytes=training_bytes,
        fixed_bytes=max(last.kept - training_bytes, 0.0) + _LOGIT_COPIES * 4.0 * logits * vocabulary,
        parameters=sum(parameter.numel() for parameter in layers[0].parameters()),
    )


class _Probe:
    """A few steps with some layers training."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        batches: Batches,
        options: TrainingOptions,
        chosen: range,
    ) -> None:
        update = {"steps": _STEPS, "max_tokens": None, "epochs": None, "cache_prefix": "never", "evaluations": 1}
        own = options.model_copy(update={**update, "log_to": None, "lr": 1e-6})
        few = Batches(batches.training, _first_rows(batches), _STEPS, batches.batch_size, batches.seed)
        times: list[float] = []

        def note(progress: TrainingProgress) -> None:
            times.append(clock())

        trained = [layers[number] for number in chosen]
        with restored(trained):
            self.run = TrainingRun(model, Trainee.of_layers(trained, chosen.start), few, own, progress=note)
            self.run.train()
            self.kept = _kept_bytes(self.run, few)
        self.step = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
        """Seconds of a step, the median of a few: training goes on amid whatever else the machine does."""
        model.requires_grad_(False)


def _first_rows(batches: Batches) -> Any:
    held_out = batches.held_out
    return type(held_out)(held_out.input_ids[:1], held_out.labels[:1], held_out.tokens)


@contextmanager
def restored(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Give layers back the parameters that they had."""
    before = [parameter.detach().clone() for layer in layers for parameter in layer.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            parameters = (parameter for layer in layers for parameter in layer.parameters())
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _kept_bytes(run: TrainingRun, batches: Batches) -> float:
    """Return how many bytes a forward pass keeps for the backward pass, parameters not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # while they are, no two have the same address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    rows = slice(0, batches.batch_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        run.arithmetic.active(run.model.device),
    ):
        run.loss(batches.training.input_ids[rows], batches.training.labels[rows])
    return float(sum(kept.values()))


def _time_forward(model: Any, run: TrainingRun, batches: Batches) -> tuple[float, float]:
    """Return the seconds of one layer, and of the whole model with its loss, without gradients, on one batch."""
    ids, labels = batches.training.input_ids[: batches.batch_size], batches.training.labels[: batches.batch_size]
    prefix = Prefix(model, run.trainee.first_layer)
    count = run.trainee.first_layer

    def below() -> None:
        if count:
            prefix.entering(ids)

    with torch.no_grad(), run.arithmetic.active(model.device):
        layers = _median(below)
        whole = _median(lambda: run.loss(ids, labels))
    return (layers / count if count else whole), whole


def _median(compute: Any) -> float:
    compute()
    times = []
    for _ in range(_STEPS):
        started = clock()
        compute()
        times.append(clock() - started)
    return statistics.median(times)
