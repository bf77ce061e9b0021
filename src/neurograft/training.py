"""Train an organ inside a frozen host, or alone between a host's embedding and head."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neurograft import __version__, data, probe
from neurograft.anatomy import describe
from neurograft.compat import refuse_findings, tokenizer_findings
from neurograft.errors import NeurograftError, UsageError
from neurograft.files import check_output_file
from neurograft.identity import as_identity
from neurograft.layer_weights import load_layers
from neurograft.manifest import Evaluation, LayerAnatomy, Mode, Protocol, Training
from neurograft.models import fingerprint_tokenizer, load_model, load_tokenizer, resolve
from neurograft.organ import Organ, clean_name, config_to_json, dtype_name, now, read_organ
from neurograft.surgery import Attachment, attach, attach_alone, tensors_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neurograft.data import PackedTokens

log = logging.getLogger("neurograft")


class TrainingOptions(BaseModel):
    """How to train; every value has its meaning and unit here, and the command line reads them from here."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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
    """Tokens in a training sequence."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences in an optimizer step."""
    lr: float = Field(default=1e-3, gt=0, lt=1)
    """Peak learning rate of AdamW."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; after it, it falls to a tenth along a cosine."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all of the organ."""
    strength: float = Field(default=1.0, gt=0, le=1)
    """Share of the way from the starting weights to the best trained ones that is kept. Less than 1 gives up some of
    the gain and keeps more of what the model could do before (weight-space ensembling, arXiv 2109.01903)."""
    seed: int = 0
    """Seed of the order of sequences, of the held-out share and of dropout."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents kept for evaluation where no evaluation data is given."""
    eval_tokens: int = Field(default=8192, ge=2)
    """At most this many held-out tokens are evaluated each time."""
    evaluations: int = Field(default=4, ge=1)
    """How many times the held-out text is evaluated during training."""
    patience: int = Field(default=2, ge=1)
    """Stop early after this many evaluations in a row without a better one; the best weights are kept."""

    @model_validator(mode="after")
    def _one_limit(self) -> TrainingOptions:
        given = [name for name in ("max_tokens", "epochs", "steps") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say when to stop; give one")
        return self


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
    """Since the training loop started."""


ProgressCallback = Callable[[TrainingProgress], None]


def parse_options(**values: Any) -> TrainingOptions:
    """Build training options from keyword values, leaving out those that are `None`.

    Raises:
        UsageError: A value is not as the option allows; one sentence names it.
    """
    try:
        return TrainingOptions(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = "--" + "-".join(map(str, first["loc"])).replace("_", "-") + ": " if first["loc"] else ""
        shown = f" (it is {first['input']!r})" if first["loc"] else ""
        raise UsageError(f"{place}{first['msg'].removeprefix('Value error, ')}{shown}.") from error


def train(
    organ: str | Path | Organ,
    *,
    host: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    name: str | None = None,
    version: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Organ:
    """Train an organ on domain text; nothing outside the organ's layers changes, and no text enters its file.

    Args:
        organ: An organ, or the path of its file.
        host: The frozen model around it: a local transformers directory, a `.gguf` file or a Hub id.
        data: Files, folders or a Hub dataset id with the domain's text; see `neurograft.data.read_documents`.
        output: File to write, ending in `.safetensors`; left out, the organ is only returned.
        eval_data: Held-out text; left out, a share of the documents of `data` is kept for it.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        name: Name of the trained organ; left out, the organ's own with the protocol.
        version: Its semantic version; left out, the organ's.
        overwrite: Whether an existing file may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called after each optimizer step.
        **options: Fields of `TrainingOptions`, such as `protocol`, `max_tokens`, `lr`, `seed`.

    Returns:
        The trained organ, with the best weights seen on the held-out text.

    Raises:
        UsageError: An option is wrong, or the output exists.
        DataError: There is no text, or it can't be read.
        IncompatibleError: The organ does not fit the host.
        NeurograftError: The loss is not finite any more.
    """
    chosen = parse_options(**options)
    if output is not None:
        check_output_file(Path(output), overwrite=overwrite)
    organ = organ if isinstance(organ, Organ) else read_organ(organ)
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    texts = _read_texts(data, eval_data, chosen, reading)
    trained = _train(organ, host, texts, chosen, trust_remote_code, progress)
    names = {
        "name": clean_name(name or f"{organ.name.removesuffix(f'-{chosen.protocol}')}-{chosen.protocol}"),
        "version": version or organ.manifest.version,
        "created": now(),
    }
    trained = Organ(trained.manifest.model_copy(update=names), trained.tensors)
    return trained if output is None else trained.save(output, overwrite=overwrite)


@dataclass(frozen=True)
class _Texts:
    training: list[str]
    held_out: list[str]


def _read_texts(paths: Any, eval_paths: Any, options: TrainingOptions, reading: dict[str, Any]) -> _Texts:
    log.info("reading the text")
    documents = data.read_documents(paths, **reading)
    if eval_paths is not None:
        return _Texts(documents, data.read_documents(eval_paths, **reading))
    return _Texts(*data.split_documents(documents, held_out=options.held_out, seed=options.seed))


def _train(
    organ: Organ,
    host: str | Path,
    texts: _Texts,
    options: TrainingOptions,
    trust_remote_code: bool,
    progress: ProgressCallback | None,
) -> Organ:
    import torch

    directory = resolve(host, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if organ.manifest.tokenizer is not None:
        refuse_findings(
            organ.name,
            directory.name,
            tokenizer_findings(organ.manifest.tokenizer, fingerprint_tokenizer(tokenizer)),
        )
    batches = _Batches.build(texts, tokenizer, options)
    log.info("loading the host %s", directory.name)
    model = load_model(directory, dtype=torch.float32, trust_remote_code=trust_remote_code)
    torch.nn.Module.to(model, _device())
    attachment = _place(model, organ, options)
    run = _Run(model, attachment.layers, batches, options, progress)
    run.train()
    return _trained_organ(organ, directory.name, model, attachment, texts, run)


def tune_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    layers: Sequence[nn.Module],
    progress: ProgressCallback | None = None,
    **options: Any,
) -> None:
    """Train some layers of a loaded model in place, by the same loop as an organ.

    Args:
        model: A causal language model; everything in it but `layers` is frozen afterwards.
        tokenizer: Its tokenizer.
        documents: Text; a share of it is held out, and the best weights on that are kept.
        layers: The modules to train.
        progress: Called after each optimizer step.
        **options: Fields of `TrainingOptions`; `protocol` and `at` have no meaning here.

    Raises:
        UsageError: An option is wrong.
        DataError: There are fewer than two documents.
    """
    chosen = parse_options(**options)
    texts = _Texts(*data.split_documents(documents, held_out=chosen.held_out, seed=chosen.seed))
    _Run(model, layers, _Batches.build(texts, tokenizer, chosen), chosen, progress).train()


def _device() -> torch.device:
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _place(model: PreTrainedModel, organ: Organ, options: TrainingOptions) -> Attachment:
    """Put the organ where it is to be trained."""
    position = organ.manifest.recommended_position if options.at is None else options.at
    if options.protocol == "standalone":
        return attach_alone(model, organ)
    if options.protocol == "insert":
        log.info("finding the tensors that make the organ an identity")
        return attach(model, as_identity(organ), at=position, mode="insert")
    return attach(model, organ, at=position, mode="replace")


@dataclass(frozen=True)
class _Batches:
    """Training and held-out sequences, packed."""

    training: PackedTokens
    held_out: PackedTokens
    steps: int
    batch_size: int
    seed: int

    @classmethod
    def build(cls, texts: _Texts, tokenizer: Any, options: TrainingOptions) -> _Batches:
        separator, length = data.separator_token(tokenizer), options.sequence_length
        training = data.pack(
            data.tokenize_documents(texts.training, tokenizer), sequence_length=length, separator_id=separator
        )
        held_out = data.pack(
            _first_tokens(texts.held_out, tokenizer, options.eval_tokens),
            sequence_length=length,
            separator_id=separator,
        )
        an_epoch = len(training.input_ids) / options.batch_size
        if options.steps is not None:
            steps = options.steps
        elif options.max_tokens is not None:
            steps = math.ceil(options.max_tokens / (options.batch_size * length))
        else:
            steps = math.ceil((options.epochs or 1) * an_epoch)
        return cls(training, held_out, max(steps, 1), options.batch_size, options.seed)

    def training_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (input_ids, labels), each (B, T), in a new random order each pass, without end."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        rows: Iterator[int] = itertools.chain.from_iterable(
            torch.randperm(len(self.training.input_ids), generator=generator).tolist() for _ in itertools.count()
        )
        while True:
            chosen = list(itertools.islice(rows, self.batch_size))
            yield self.training.input_ids[chosen], self.training.labels[chosen]


def _first_tokens(documents: list[str], tokenizer: Any, limit: int) -> list[list[int]]:
    """Tokenize documents until there are `limit` tokens, cutting the last; at least one document."""
    chosen: list[list[int]] = []
    for tokens in data.tokenize_documents(documents, tokenizer):
        left = limit - sum(map(len, chosen))
        if left <= 0:
            break
        chosen.append(tokens[:left])
    return chosen


@dataclass
class _Run:
    """One training run: the loop and what it learned."""

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    """The modules that train; everything else is frozen."""
    batches: _Batches
    options: TrainingOptions
    progress: ProgressCallback | None
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean held-out loss in nats per token), from step 0."""
    tokens_seen: int = 0
    steps_done: int = 0
    seconds: float = 0.0

    def train(self) -> None:
        """Train the organ's parameters; at the end they are the best that the held-out text has seen."""
        import torch

        options, steps, started = self.options, self.batches.steps, time.monotonic()
        torch.manual_seed(options.seed)
        self.model.requires_grad_(False)
        parameters = [p for layer in self.layers for p in layer.requires_grad_(True).parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_share(step, steps, options.warmup)
        )
        every = max(1, math.ceil(steps / options.evaluations))
        best = self._evaluate(0), 0
        start = kept = [p.detach().cpu().clone() for p in parameters]
        window: list[float] = []
        for step, (inputs, labels) in zip(range(1, steps + 1), self.batches.training_batches(), strict=False):
            self._organ_mode(True)
            loss_sum, tokens = next_token_loss(self.model, inputs, labels)
            loss = loss_sum / max(tokens, 1)
            if not torch.isfinite(loss):
                raise NeurograftError(
                    f"training diverged: the loss at step {step} is {float(loss)}; try a lower --lr than "
                    f"{options.lr:g}."
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            self.tokens_seen += tokens
            self.steps_done = step
            step_loss = float(loss.detach())
            window.append(step_loss)
            if step % every == 0 or step == steps:
                self.losses.append((step, sum(window) / len(window)))
                window = []
                held_out = self._evaluate(step)
                if held_out < best[0]:
                    best = held_out, len(self.held_out) - 1
                    kept = [p.detach().cpu().clone() for p in parameters]
            self._report(step, step_loss, started)
            if len(self.held_out) - 1 - best[1] >= options.patience:
                log.info(
                    "stopping early at step %d: no better held-out loss in %d evaluations",
                    step,
                    options.patience,
                )
                break
        with torch.no_grad():
            for parameter, first, last in zip(parameters, start, kept, strict=True):
                parameter.copy_(torch.lerp(first, last, options.strength) if options.strength < 1 else last)
        self._organ_mode(False)
        self.seconds = time.monotonic() - started

    def _organ_mode(self, training: bool) -> None:
        for layer in self.layers:
            layer.train(training)

    def _evaluate(self, step: int) -> float:
        """Return the mean held-out loss in nats per token, and note it."""
        self._organ_mode(False)
        loss = self.held_out_loss()
        self.held_out.append((step, loss))
        log.info("step %d: held-out perplexity %.2f", step, math.exp(min(loss, 700)))
        return loss if math.isfinite(loss) else math.inf

    def held_out_loss(self) -> float:
        """Return the mean held-out loss in nats per token."""
        import torch

        total, tokens = 0.0, 0
        packed = self.batches.held_out
        with torch.no_grad():
            for rows in torch.arange(len(packed.input_ids)).split(self.batches.batch_size):
                loss, count = next_token_loss(self.model, packed.input_ids[rows], packed.labels[rows])
                total, tokens = total + float(loss), tokens + count
        return total / max(tokens, 1)

    def _report(self, step: int, loss: float, started: float) -> None:
        if self.progress is not None:
            seconds = time.monotonic() - started
            perplexity = math.exp(min(self.held_out[-1][1], 700))
            speed = self.tokens_seen / max(seconds, 1e-9)
            self.progress(TrainingProgress(step, self.batches.steps, loss, perplexity, speed, seconds))


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


def next_token_loss(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of the next-token losses in nats, and how many tokens it is over.

    Args:
        model: A causal language model.
        input_ids: (B, T) token ids.
        labels: (B, T), the same with -100 where no loss is wanted; the model's logits at t predict the label at t + 1.
    """
    import torch

    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits  # (B, T, vocabulary)
    # Labels are shifted, not logits: a slice of the logits would be copied, and they are the largest tensor there is.
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=data.IGNORED_LABEL).to(logits.device)  # (B, T)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=data.IGNORED_LABEL, reduction="sum"
    )
    return loss, int((targets != data.IGNORED_LABEL).sum())


def _trained_organ(
    organ: Organ, host: str, model: PreTrainedModel, attachment: Attachment, texts: _Texts, run: _Run
) -> Organ:
    """Take the trained tensors out of the model, in the dtypes that they came in, and say what was done."""
    dtypes = {name: tensor.dtype for name, tensor in organ.tensors.items()}
    tensors = {
        name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors_of(attachment, model).items()
    }
    _load_rounded(model, attachment, organ, tensors)
    options, mode = run.options, _mode_of(run.options.protocol)
    first = attachment.positions[0]
    answers = probe.probe_layers(model, describe(model).layers_path)[attachment.positions]
    evaluation = Evaluation(
        data="held-out text",
        documents=len(texts.held_out),
        tokens=run.batches.held_out.tokens,
        before=math.exp(min(run.held_out[0][1], 700)),
        after=math.exp(min(run.held_out_loss(), 700)),
    )
    training = Training(
        protocol=options.protocol,
        position=first,
        host=host,
        data_fingerprint=data.fingerprint(texts.training),
        documents=len(texts.training),
        tokens_seen=run.tokens_seen,
        steps=run.steps_done,
        hyperparameters=options.model_dump(exclude={"protocol", "seed"}),
        seed=options.seed,
        versions=versions(),
        seconds=round(run.seconds, 1),
        loss_history=[(step, round(loss, 5)) for step, loss in run.losses],
    )
    anatomy = LayerAnatomy(
        model_type=model.config.model_type,
        config=config_to_json(model.config),
        first_layer=first,
        layer_values=organ.manifest.anatomy.layer_values,
        dtype=dtype_name(tensors),
    )
    update: dict[str, Any] = {
        "anatomy": anatomy,
        "training": training,
        "evaluations": [evaluation],
        "recommended_mode": mode,
        "recommended_position": first if options.protocol != "standalone" else organ.manifest.recommended_position,
        "probe": probe.to_manifest(answers, "float32"),
    }
    return Organ(organ.manifest.model_copy(update=update), tensors)


def _mode_of(protocol: Protocol) -> Mode:
    return "replace" if protocol == "in_place" else "insert"


def _load_rounded(
    model: PreTrainedModel, attachment: Attachment, organ: Organ, tensors: dict[str, torch.Tensor]
) -> None:
    """Give the layers in the model the weights that the file will hold, so that what is measured is what ships."""
    import torch

    carrier = load_layers(
        organ.config(), organ.manifest.anatomy.layer_values, tensors, dtype=torch.float32, name=organ.name
    )
    sources = carrier.get_submodule(describe(carrier).layers_path).children()
    for layer, source in zip(attachment.layers, sources, strict=True):
        layer.load_state_dict(source.state_dict())


def versions() -> dict[str, str]:
    """Return the versions of the software that computed a result."""
    names = ("torch", "transformers", "safetensors")
    return {"neurograft": __version__, **{name: importlib.metadata.version(name) for name in names}}
