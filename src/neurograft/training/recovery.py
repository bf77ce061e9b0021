"""What trains when a model recovers from a transplant, in which order, and for how long.

The paper (arXiv 2601.13580) lets the recipient settle around an organ by unfreezing outward from it. Here each stage of
that is a training run of its own, with its share of the budget and a learning rate that rises and falls within it; what
trained in a stage goes on training in the next, from the best weights that its held-out text has seen.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft import ranks
from neurograft.anatomy import describe
from neurograft.errors import ModelError, UsageError
from neurograft.manifest import Scope, Stage, Unfreeze
from neurograft.sharding import fill, whole
from neurograft.training.loop import Batches, ProgressCallback, Texts, Trainee, TrainingRun
from neurograft.training.options import TrainingOptions
from neurograft.training.run_state import RunState, state_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")


@dataclass(frozen=True)
class RecoveryPlan:
    """What trains around an organ."""

    organ: str
    scope: Scope
    neighbours: int
    unfreeze: Unfreeze
    stages: list[list[int]]
    """For each stage the numbers of the layers in which something trains, in order; each holds the one before it."""

    @property
    def layers(self) -> list[int]:
        """Numbers of all layers in which something trains."""
        return self.stages[-1]

    def trainee(self, layers: Sequence[nn.Module], stage: int) -> Trainee:
        """Say what trains in a stage.

        Args:
            layers: All decoder layers of the model.
            stage: Number of the stage, from 0.

        Raises:
            ModelError: Only the seams are to train, and the layers there have no vectors.
        """
        numbers = self.stages[stage]
        chosen = [layers[number] for number in numbers]
        if self.scope != "seams":
            return Trainee.of_layers(chosen, numbers[0])
        vectors = [parameter for layer in chosen for parameter in layer.parameters() if parameter.dim() == 1]
        if not vectors:
            raise ModelError(
                f"the layers at the seams of {self.organ} have no vectors (weights of norms, biases) that could train; "
                "use the scope organ or neighbours."
            )
        return Trainee(vectors, chosen, numbers[0])


def plan_recovery(
    own: Sequence[int],
    layer_count: int,
    *,
    organ: str,
    scope: Scope = "organ",
    neighbours: int | None = None,
    unfreeze: Unfreeze = "at_once",
) -> RecoveryPlan:
    """Work out which layers train in which stage.

    A plain model has no modules between its layers. The residual stream passes a seam as it is: in x + f(norm(x))
    nothing that a layer holds can scale x itself, and only a bias in what writes to the stream, which most
    architectures lack, could shift it. So vectors on the stream can't be folded into weights. What can is how the
    stream is *read*: a scale in front of a layer's projections is the weight of its norm, a shift is a bias where there
    is one. The scope `seams` therefore trains the vectors (all one-dimensional parameters: weights of norms, biases) of
    the two layers that read at a seam: the organ's first, and the first behind it. They are the model's own parameters:
    nothing has to be folded, and nothing is rounded. Behind an organ at the end there is only the final norm, which
    belongs to no layer and stays as it is.

    Args:
        own: Numbers of the organ's layers in the model.
        layer_count: L.
        organ: The organ's name.
        scope: `organ`: its layers. `neighbours`: its layers and some on each side. `seams`: the vectors at its
            two ends.
        neighbours: How many layers on each side, for that scope; 1 if left out.
        unfreeze: `gradual`: first the organ alone, then one more layer on each side a stage.

    Raises:
        UsageError: The choices do not go together, or the scope asks for a side that the organ does not have.
    """
    own = sorted(own)
    if neighbours is not None and scope != "neighbours":
        raise UsageError(f"--neighbours goes with --scope neighbours, and the scope is {scope}.")
    if neighbours is not None and neighbours < 1:
        raise UsageError(f"--neighbours is {neighbours}; it counts the layers on each side that train, at least 1.")
    if unfreeze == "gradual" and scope != "neighbours":
        raise UsageError(
            f"--unfreeze gradual goes outward from the organ, and nothing outside it trains with the scope {scope}; "
            "add --scope neighbours."
        )
    if scope != "organ" and own != list(range(own[0], own[-1] + 1)):
        raise UsageError(
            f"other layers stand between those of {organ}, so it has more than two sides; use --scope organ."
        )
    # Beyond the ends of the model there is nothing that could train.
    width = min(neighbours or 1, max(own[0], layer_count - 1 - own[-1])) if scope == "neighbours" else 0
    if scope == "seams":
        stages = [[own[0], *([own[-1] + 1] if own[-1] + 1 < layer_count else [])]]
    else:
        widths = range(width + 1) if unfreeze == "gradual" else [width]
        stages = [_widened(own, by, layer_count) for by in widths]
    return RecoveryPlan(organ, scope, width, unfreeze, stages)


def _widened(own: list[int], by: int, layer_count: int) -> list[int]:
    """Return the organ's layers and up to `by` more on each side."""
    below = range(max(own[0] - by, 0), own[0])
    above = range(own[-1] + 1, min(own[-1] + 1 + by, layer_count))
    return [*below, *own, *above]


def share_steps(steps: int, stages: int) -> list[int]:
    """Share optimizer steps among stages, equally; what is left over goes to the last ones.

    Raises:
        UsageError: There are fewer steps than stages.
    """
    if steps < stages:
        raise UsageError(f"the budget is {steps} optimizer steps, and there are {stages} stages; each needs one.")
    share, left = divmod(steps, stages)
    return [share + (number >= stages - left) for number in range(stages)]


@dataclass(frozen=True)
class Recovered:
    """What a recovery came to; the weights are in the model."""

    stages: list[Stage]
    seconds: float
    before: float
    """Mean held-out loss before the first step, nats per token."""
    losses: list[tuple[int, float]]
    """(step over all stages, mean training loss since the entry before it, nats per token)."""
    last: TrainingRun
    """The run of the last stage, which can still measure the held-out loss."""


def trained_values(model: PreTrainedModel, plan: RecoveryPlan) -> dict[str, torch.Tensor]:
    """Return copies of all parameters of the layers in which something trains, whole; all processes must ask at once.

    Returns:
        Name in the model -> values, on the CPU.
    """
    path = describe(model).layers_path
    prefixes = tuple(f"{path}.{number}." for number in plan.layers)
    parameters = ((name, each) for name, each in model.named_parameters() if name.startswith(prefixes))
    return {name: whole(each.detach()).to("cpu", copy=True) for name, each in parameters}


def give_values(model: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters of a model, which may be spread over the processes, the values that belong to their names."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        fill(parameters[name], value)


def train_stages(
    model: PreTrainedModel,
    plan: RecoveryPlan,
    texts: Texts,
    tokenizer: Any,
    options: TrainingOptions,
    *,
    output: Path,
    key: str,
    progress: ProgressCallback | None,
    again: Callable[[Mapping[str, torch.Tensor]], PreTrainedModel],
) -> Recovered:
    """Train stage after stage.

    A stage that an interruption cut short goes on from its own state; the stages before it run again from theirs, to
    the same bits, so that no weights but those of a running stage have to be kept. With several processes each stage
    has a model of its own, since one that DDP or FSDP2 took hold of can't be made ready for other layers.

    Args:
        model: The transplanted model, in evaluation mode.
        plan: What trains.
        texts: What it trains on.
        tokenizer: The model's.
        options: How to train; the budget is that of all stages together.
        output: What is to be written; the states lie beside it.
        key: Digest of what the run depends on.
        progress: Called after each step, with steps counted over all stages.
        again: Loads the transplanted model once more, and gives parameters the values that they have by now.

    Raises:
        UsageError: The budget has fewer steps than there are stages, or another run left its state.
        NeurograftError: The loss is not finite any more.
    """
    count = len(plan.stages)
    batches = Batches.build(texts, tokenizer, options)
    shares = [batches.steps] if count == 1 else share_steps(batches.steps, count)
    start = trained_values(model, plan) if count > 1 and options.strength < 1 else {}
    stages: list[Stage] = []
    states: list[RunState] = []
    losses: list[tuple[int, float]] = []
    for number, share in enumerate(shares):
        done, seconds = sum(state.step for state in states), sum(state.seconds for state in states)
        own = options if count == 1 else _options_of_stage(options, share, number)
        if number and ranks.several():
            model = again(trained_values(model, plan))
        layers = list(model.get_submodule(describe(model).layers_path).children())
        trainee = plan.trainee(layers, number)
        size = sum(parameter.numel() for parameter in trainee.parameters)
        log.info("training layers %s (stage %d of %d)", plan.stages[number], number + 1, count)
        run = TrainingRun(
            model,
            trainee,
            batches if count == 1 else Batches.build(texts, tokenizer, own),
            own,
            progress=_counted(progress, done, sum(shares), seconds),
            resume=stage_path(output, number, count),
            key=hashlib.sha256(f"{key} {number}".encode()).hexdigest(),
        )
        run.train()
        states.append(run.state)
        losses += [(done + step, loss) for step, loss in run.state.losses]
        stages.append(_stage(plan.stages[number], size, run.state))
    if start:
        _go_part_of_the_way(start, model, plan, options.strength)
    return Recovered(stages, sum(state.seconds for state in states), states[0].held_out[0][1], losses, run)


def _stage(layers: list[int], size: int, state: RunState) -> Stage:
    return Stage(layers=layers, parameters=size, steps=state.step, tokens_seen=state.tokens_seen)


def _options_of_stage(options: TrainingOptions, steps: int, number: int) -> TrainingOptions:
    """Return the options of one stage of several: its share of the steps, an order of the text of its own."""
    update = {"steps": steps, "max_tokens": None, "epochs": None, "seed": options.seed + number, "strength": 1.0}
    return options.model_copy(update=update)


def _go_part_of_the_way(
    start: Mapping[str, torch.Tensor], model: PreTrainedModel, plan: RecoveryPlan, strength: float
) -> None:
    """Keep a share of the way from where all stages began; each stage by itself keeps all of it."""
    last = trained_values(model, plan)
    give_values(model, {name: torch.lerp(first, last[name], strength) for name, first in start.items()})


def _counted(progress: ProgressCallback | None, done: int, steps: int, seconds: float) -> ProgressCallback | None:
    """Let a stage report its steps as steps of the whole."""
    if progress is None:
        return None
    return lambda p: progress(replace(p, step=done + p.step, steps=steps, seconds=seconds + p.seconds))


def stage_path(output: Path, number: int, count: int) -> Path:
    """Return where the state of a stage lies: beside the output, numbered from 1 where there are several."""
    return state_path(output if count == 1 else output.with_name(f"{output.name}.stage-{number + 1}"))
