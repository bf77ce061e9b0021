"""How to train: the options of `train`, with their meaning, units and limits, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neurograft.arithmetic import Precision
from neurograft.errors import UsageError
from neurograft.manifest import Protocol
from neurograft.models import fit_sequence_length
from neurograft.training.schedules import OptimizerName, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HostPrecision = Literal["float32", "stored", "nf4"]
CacheDtype = Literal["float32", "bfloat16", "float16"]
Compile = Literal["auto", "always", "never"]


SEEDS = 1 << 32  # how many there are: all that NumPy and torch take, also multiplied by a number of steps


class TrainingOptions(BaseModel):
    """How to train; every value has its meaning and unit here, and the command line reads them from here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    protocol: Protocol = "in_place"
    """`in_place`: the organ's layers train where they stand in the frozen host. `insert`: they start as identities
    between the host's layers. `standalone`: they train alone between its embedding and head (arXiv 2601.13580)."""
    at: int | None = None
    """Position in the host; left out, what the organ recommends."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop after this many training tokens, over as many passes through the text as it takes."""
    epochs: float | None = Field(default=None, gt=0)
    """Stop after this many passes through the training text; 1 if no other limit is given."""
    steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens in a training sequence; left out, no more than the model has positions."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences in one forward and backward pass, over all processes together: each of N takes an Nth of them."""
    accumulate: int = Field(default=1, ge=1)
    """Such passes in an optimizer step, which takes this many times the batch size of sequences. Every token of a step
    counts alike, so that 2 passes of 4 sequences come to the same as 1 of 8, but for rounding."""
    optimizer: OptimizerName = "adamw"
    """`adamw`; `muon` for matrices (orthogonalised momentum), with AdamW for everything else; or `adafactor`, which
    keeps next to nothing beside the weights, and whose learning rate is relative to the size of each matrix."""
    lr: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    """Peak learning rate, or `auto`: 0.009 divided by the number of layers that train, at most 0.003; in proportion
    less for models wider than 576; ten times that, at most 0.01, where `rank` is given; 0.01 where only vectors train
    (`recover --scope seams`)."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Schedule = "cosine"
    """How it falls to a tenth after that: along half a `cosine`, `linear`ly, or, with `wsd`, only at the end."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    anchor: float = Field(default=0.0, ge=0)
    """Decay towards the starting weights instead of zero: keeps more of what the model could do before."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is evaluated and kept in their place; 0 for none."""
    rank: int | None = Field(default=None, ge=1)
    """Train the organ's matrices by changes of this rank, which are added to them at the end; left out, all of the
    organ's parameters train."""
    precision: Precision = "auto"
    """How matrices are multiplied; weights and their updates are float32 in any case. `auto` takes bfloat16 where a
    short measurement finds it faster, and otherwise, as with `float32`, the fastest float32."""
    compile: Compile = "auto"
    """Whether `torch.compile` compiles the layers that train and those above them, which takes half a minute and a C++
    compiler, and saves about an eighth of every step where many layers train. `auto`: on CPUs, in one process, where
    the first steps say that the others will take ten minutes or more."""
    gradient_checkpointing: bool = False
    """Keep of every layer only what enters it, and let the backward pass compute the rest anew: the same results in a
    fraction of the memory, for up to half more time."""
    host_precision: HostPrecision = "float32"
    """How the frozen host is held: as `float32`; as it is `stored`, such as bfloat16 in half of the memory; or as
    `nf4`, four bits for each weight of its layers' matrices (bitsandbytes, on GPUs). The organ is float32 anyway."""
    vocabulary: Literal["full", "sampled"] = "full"
    """Over what the training loss is taken: `sampled` estimates it from the tokens that occur in the training text and
    a few thousand others, which costs less where the head is a large part of what runs. Held-out losses are exact."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all of the organ."""
    strength: float = Field(default=1.0, gt=0, le=1)
    """Share of the way from the starting weights to the best trained ones that is kept. Less than 1 gives up some of
    the gain and keeps more of what the model could do before (weight-space ensembling, arXiv 2109.01903)."""
    dp_epsilon: float | None = Field(default=None, gt=0, le=100)
    """Train with differential privacy of whole documents, by noise that keeps to this epsilon; `docs/privacy.md` says
    what that promises. A document is one sequence, its gradient is cut to the norm `clip`, and steps draw documents at
    random, `batch_size` times `accumulate` on average. Needs the extra `dp`."""
    dp_delta: float | None = Field(default=None, gt=0, lt=1)
    """Delta of that; left out, 1 over the number of documents to the power of 1.1."""
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    """Seed of the order of sequences, of the held-out share and of dropout."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents kept for evaluation where no evaluation data is given."""
    eval_tokens: int = Field(default=8192, ge=2)
    """At most this many held-out tokens are evaluated each time."""
    evaluations: int = Field(default=4, ge=1)
    """How many times the held-out text is evaluated during training."""
    patience: int = Field(default=2, ge=1)
    """Stop early after this many evaluations in a row without a better one; the best weights are kept."""

    cache_prefix: Literal["auto", "always", "never"] = "auto"
    """Whether the hidden states that enter the organ are kept on disk, so that the frozen layers below it run once for
    each sequence: `auto` keeps those of the held-out text, and of the training text if a run goes over it again."""
    cache_dtype: CacheDtype = "float32"
    """How they are kept: narrower takes less disk, and rounds them once."""
    offload: bool = False
    """Leave the host's layers below the organ on the disk: each is read, all text passes through it, and it is dropped,
    so that memory holds the organ and what follows it, whatever the size of the host."""
    checkpoint_every: float = Field(default=60.0, ge=0)
    """Seconds between two saves of the run's state, beside the output, from which the same command goes on if it is
    interrupted."""

    log_to: Literal["tensorboard", "trackio"] | None = None
    """Log loss, held-out perplexity, learning rate and tokens per second there; never any text. Needs the extra of the
    same name."""
    log_dir: Path = Path("neurograft-logs")
    """Folder of these logs."""

    @model_validator(mode="after")
    def _one_limit(self) -> TrainingOptions:
        given = [name for name in ("max_tokens", "epochs", "steps") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names} say when to stop, each in its own way; give one")
        if self.offload and self.cache_prefix == "never":
            raise ValueError("--offload keeps on disk what enters the organ, and --cache-prefix never forbids that")
        if self.rank is not None and self.strength < 1:
            raise ValueError("--strength mixes weights and --rank trains factors of their changes; give one of them")
        return self

    @model_validator(mode="after")
    def _private(self) -> TrainingOptions:
        if self.dp_epsilon is None:
            if self.dp_delta is not None:
                raise ValueError("--dp-delta says how private --dp-epsilon is; give that too")
            return self
        if self.vocabulary == "sampled":
            raise ValueError("a sampled vocabulary is that of the private text, which it would show; leave it full")
        if self.gradient_checkpointing:
            raise ValueError(
                "--dp-epsilon counts the gradient of each document, and with --gradient-checkpointing layers would "
                "show it twice; leave one of the two out"
            )
        if self.compile == "always":
            raise ValueError("compiled layers show no gradients of single documents; leave --compile out")
        for name, why in (
            ("patience", "a private training takes all the steps that its noise was chosen for"),
            ("held_out", "a private training measures nothing on its own text; give evaluation data instead"),
        ):
            if name in self.model_fields_set:
                raise ValueError(f"{why}; leave {name} out")
        return self


def fit_to_model(options: TrainingOptions, config: PreTrainedConfig, name: str) -> TrainingOptions:
    """Return options whose sequences a model takes: a length that was left out is cut to the model's positions.

    Raises:
        UsageError: A longer one was given.
    """
    given = options.sequence_length if "sequence_length" in options.model_fields_set else None
    length = fit_sequence_length(given, options.sequence_length, config, name)
    return options.model_copy(update={"sequence_length": length})


def parse_options(**values: Any) -> TrainingOptions:
    """Build training options from keyword values, leaving out those that are `None`.

    Raises:
        UsageError: A value is not as the option allows; one sentence names it.
    """
    try:
        return TrainingOptions(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = f"--{str(first['loc'][0]).replace('_', '-')}: " if first["loc"] else ""
        shown = f" (it is {first['input']!r})" if first["loc"] else ""
        raise UsageError(f"{place}{first['msg'].removeprefix('Value error, ')}{shown}.") from error
