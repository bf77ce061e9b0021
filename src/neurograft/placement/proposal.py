"""Propose which layers to take for a new organ, how many and how to train them, and say what it will cost."""

from __future__ import annotations

import logging
import math
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft.anatomy import describe
from neurograft.data import paths_of, separator_token
from neurograft.errors import UsageError
from neurograft.extraction import parse_layers
from neurograft.files import atomic_file, check_output_file, human_bytes
from neurograft.layer_weights import to_disk
from neurograft.models import ModelDirectory, load_config, load_model, load_tokenizer, resolve
from neurograft.placement.costs import Measured, measure, predict
from neurograft.placement.plan_results import PlanReport, Proposal
from neurograft.placement.signals import layer_signals, logit_lens
from neurograft.placement.trials import Trials, shortlist
from neurograft.sketch import SKIPPED, WIDTH, WINDOWS, window_of
from neurograft.training.loop import Batches, Trainee, TrainingRun, sample_tokens
from neurograft.training.options import TrainingOptions, fit_to_model, parse_options
from neurograft.training.protocols import read_texts
from neurograft.training.search import DECIDED_BY_PLAN

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")

Paths = str | Path | Sequence[str | Path]
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_AMOUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*$", re.IGNORECASE)
_LIMITS = ("tokens", "seconds", "memory", "bytes")
# Of the training: of a long one a small share tells candidates apart, and no candidate shows much in a few steps.
_TRIAL_SHARE, _LARGEST_TRIAL_SHARE, _TRIAL_TOKENS = 32, 8, 4096
_REST_OF_MANIFEST = 8_000  # bytes


PlanProgress = Callable[[str], None]


def plan(
    model: str | Path,
    *,
    data: Paths,
    budget: Sequence[str] | Mapping[str, float] = (),
    eval_data: Paths | None = None,
    trials: int = 6,
    trial_tokens: int | None = None,
    output: str | Path | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: PlanProgress | None = None,
    **options: Any,
) -> PlanReport:
    """Propose layers, how many, mode and protocol for a new organ, and predict what training it costs.

    A few real steps at both ends of the model tell what every range of layers costs. Of the ranges that the budget
    allows, the paper's, the longest from some starts all over the model and the one with the largest gradients on the
    text are trained for a short while; the better half of them again, from the start, for twice as long, and so on
    until two are left. The one that then learns most is proposed.

    Args:
        model: The host: a local transformers directory, a `.gguf` file or a Hub id.
        data: Files, folders or a Hub dataset id with the domain's text; see `neurograft.data.read_documents`.
        budget: Limits, as `NAME=AMOUNT` or a mapping: `tokens` to train on, in whole steps (left out, one pass),
            `seconds` of training, `memory` beyond the host in bytes, `bytes` of the organ's file. Amounts may end in k,
            M or G.
        eval_data: Held-out text; left out, a share of the documents of `data` is kept for it.
        trials: How many ranges are tried.
        trial_tokens: Tokens that each is trained on in the first round; left out, a thirty-second of the tokens, but at
            least 4,096, or of a short training an eighth.
        output: File to write the report to, as JSON.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        overwrite: Whether an existing `output` may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with what is being done.
        **options: Fields of `TrainingOptions` that the training will have, such as `sequence_length`, `batch_size`.

    Raises:
        UsageError: An option or limit is wrong, the output exists, or no organ keeps to the budget.
        ModelError, DataError: The model or text can't be read.
    """
    limits = parse_budget(budget)
    chosen = _options(options, limits)
    if trials < 1 or (trial_tokens is not None and trial_tokens < 1):
        raise UsageError("--trials and --trial-tokens must be above 0.")
    directory = resolve(model, trust_remote_code=trust_remote_code)
    if output is not None:
        check_output_file(
            Path(output), overwrite=overwrite, inputs=[directory.path, *paths_of(data), *paths_of(eval_data)]
        )
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    texts = read_texts(data, eval_data, chosen, reading)
    chosen = fit_to_model(chosen, load_config(directory, trust_remote_code=trust_remote_code), directory.name)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    batches = Batches.build(texts, tokenizer, chosen)
    if len(batches.training.input_ids) < batches.batch_size:
        raise UsageError("there is too little text for one batch; give more, or a smaller --batch-size.")
    log.info("loading %s", directory.name)
    loaded = load_model(directory, dtype=torch.float32, trust_remote_code=trust_remote_code)
    torch.nn.Module.to(loaded, torch.accelerator.current_accelerator() or torch.device("cpu"))
    held_out = sample_tokens(texts.held_out, tokenizer, chosen.eval_tokens)
    case = _Case(
        loaded, directory, batches, held_out, separator_token(tokenizer), chosen, limits, trust_remote_code, progress
    )
    words = _text_words(data, eval_data, reading)
    report = case.plan(str(model), words, trials, trial_tokens)
    if output is not None:
        with atomic_file(Path(output), overwrite=overwrite) as temporary:
            temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def parse_budget(budget: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Read limits such as `memory=2GB`.

    Raises:
        UsageError: One can't be read, has another name or is given twice.
    """
    if isinstance(budget, Mapping):
        budget = [f"{name}={value:f}" for name, value in budget.items()]
    limits: dict[str, float] = {}
    for text in budget:
        name, _, amount = text.partition("=")
        match = _AMOUNT.match(amount)
        if name not in _LIMITS or match is None or float(match[1]) <= 0:
            raise UsageError(
                f"the budget {text!r} is none; write NAME=AMOUNT above 0 with {', '.join(_LIMITS)}, such as memory=2GB."
            )
        if name in limits:
            raise UsageError(f"the budget of {name} is given twice.")
        limits[name] = float(match[1]) * _UNITS[match[2].lower()]
    return limits


def _options(options: dict[str, Any], limits: Mapping[str, float]) -> TrainingOptions:
    for name in DECIDED_BY_PLAN:
        if options.get(name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning here: plan decides it, or --budget does.")
    chosen = parse_options(**options)
    if "tokens" not in limits:
        return chosen
    step = chosen.batch_size * chosen.accumulate * chosen.sequence_length
    if limits["tokens"] < step:
        raise UsageError(
            f"the budget of {limits['tokens']:g} tokens is less than one optimizer step, which takes {step:,}; give "
            "more, or a smaller --batch-size, --accumulate or --sequence-length."
        )
    return parse_options(**options, max_tokens=int(limits["tokens"] // step) * step)


@dataclass
class _Case:
    """A host, a text and a budget."""

    model: PreTrainedModel
    directory: ModelDirectory
    batches: Batches
    documents: list[list[int]]
    """Held-out ones, as tokens."""
    separator_id: int
    options: TrainingOptions
    limits: dict[str, float]
    trust_remote_code: bool
    progress: PlanProgress | None

    def __post_init__(self) -> None:
        path = describe(self.model).layers_path
        self.layers: list[nn.Module] = list(self.model.get_submodule(path).children())
        stored = _stored_dtype(self.directory)
        disk = to_disk(self.model, range(len(self.layers)))
        self._sizes = [0] * len(self.layers)
        for name, tensor in disk.items():
            width = stored.itemsize if tensor.is_floating_point() else tensor.element_size()
            self._sizes[int(name.split(".")[1])] += tensor.numel() * width
        # Two arrays of half-precision states as base64 text, and the rest of the manifest.
        states = WINDOWS * (window_of(self.model) - SKIPPED) * WIDTH
        self._manifest_bytes = 2 * 2 * states * 4 // 3 + _REST_OF_MANIFEST

    def plan(self, reference: str, text_words: Sequence[str], trials: int, trial_tokens: int | None) -> PlanReport:
        """Measure, choose, try."""
        started = time.monotonic()
        self._say("measuring a few steps at both ends of the model")
        measured = measure(self.model, self.layers, self.batches, self.options)
        self._say("measuring gradients and influence of all layers, and what can be read off between them")
        arithmetic = TrainingRun(
            self.model, Trainee.of_layers(self.layers[-1:], len(self.layers) - 1), self.batches,
            self.options.model_copy(update={"cache_prefix": "never"}),
        ).arithmetic  # fmt: skip
        gradients, influence = layer_signals(self.model, self.layers, self.batches, arithmetic)
        lens = logit_lens(self.model, self.layers, self.batches)
        paper_range = parse_layers("auto", len(self.layers))
        paper = self._proposal(measured, gradients, paper_range, inserted=False)
        possible = [
            proposal
            for count in range(1, len(self.layers) + 1)
            for start in range(len(self.layers) - count + 1)
            if self._fits(proposal := self._proposal(measured, gradients, range(start, start + count), inserted=False))
        ]
        if not possible:
            cheapest = self._proposal(
                measured, gradients, range(len(self.layers) - 1, len(self.layers)), inserted=False
            )
            raise UsageError(
                f"no organ keeps to the budget: the cheapest, layers {cheapest.layers}, takes about "
                f"{cheapest.cost.seconds:.0f} s, {human_bytes(cheapest.cost.memory)} of memory and a file of "
                f"{human_bytes(cheapest.cost.bytes)}."
            )
        tokens = self.batches.steps * self.batches.step_size * self.batches.training.input_ids.shape[1]
        few = trial_tokens or max(tokens // _TRIAL_SHARE, min(tokens // _LARGEST_TRIAL_SHARE, _TRIAL_TOKENS), 1)
        trying = Trials(
            self.model, self.directory, self.batches, self.options, documents=self.documents,
            separator_id=self.separator_id, trust_remote_code=self.trust_remote_code, say=self._say,
        )  # fmt: skip

        def insertion(layers: range) -> Proposal | None:
            proposal = self._proposal(measured, gradients, layers, inserted=True)
            return proposal if self._fits(proposal) else None

        tried = trying.run(shortlist(possible, trials, len(self.layers)), few, insertion)
        paper = next((p for p in tried if (p.layers, p.protocol) == (paper.layers, paper.protocol)), paper)
        return PlanReport(
            model=self.directory.name,
            layer_count=len(self.layers),
            tokens=tokens,
            steps=self.batches.steps,
            trial_tokens=tried[0].trial_tokens,
            budget=self.limits,
            untrained=trying.untrained,
            gradients=gradients,
            influence=influence,
            lens=lens,
            best=tried[0],
            proposals=tried,
            paper=paper,
            seconds=round(time.monotonic() - started, 1),
            commands=_commands(reference, text_words, tried[0], tokens, self.options),
        )

    def _say(self, text: str) -> None:
        log.info(text)
        if self.progress is not None:
            self.progress(text)

    def _proposal(self, measured: Measured, gradients: list[float], layers: range, *, inserted: bool) -> Proposal:
        size = sum(self._sizes[number] for number in layers) + self._manifest_bytes
        cost = predict(
            measured, self.batches, self.options, start=layers.start, count=len(layers), inserted=inserted, size=size
        )
        return Proposal(
            layers=f"{layers.start}:{layers.stop}",
            protocol="insert" if inserted else "in_place",
            mode="insert" if inserted else "replace",
            position=layers.start,
            cost=cost,
            gradient=sum(gradients[number] for number in layers),
            trial=None,
        )

    def _fits(self, proposal: Proposal) -> bool:
        cost = proposal.cost
        found = {"seconds": cost.seconds, "memory": cost.memory, "bytes": cost.bytes}
        return all(value <= self.limits.get(name, math.inf) for name, value in found.items())


def _stored_dtype(directory: ModelDirectory) -> torch.dtype:
    """Return the dtype in which the host's layers are stored, which is what an organ's file takes over."""
    from safetensors import safe_open

    for path in sorted(directory.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                piece = stream.get_slice(name)
                if len(piece.get_shape()) == 2:
                    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(piece.get_dtype(), torch.float32)
    return torch.float32


def _text_words(data: Paths, eval_data: Paths | None, reading: Mapping[str, str | None]) -> list[str]:
    """Return the options that name the text and how it is read, as `train` takes them."""
    usual = {"text_column": "text", "document_separator": None, "encoding": "utf-8"}
    words = [word for path in paths_of(data) for word in ("--data", str(path))] or ["--data", "DATA"]
    words += [word for path in paths_of(eval_data) for word in ("--eval-data", str(path))]
    for name, value in reading.items():
        if value is not None and value != usual[name]:
            words += [f"--{name.replace('_', '-')}", value]
    return words


def _commands(
    reference: str, text_words: Sequence[str], best: Proposal, tokens: int, options: TrainingOptions
) -> list[str]:
    given = {
        name: value
        for name, value in options.model_dump(mode="json", exclude_unset=True).items()
        if name not in DECIDED_BY_PLAN and value is not None
    }
    extra = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    extract = ["extract", reference, "--layers", best.layers, "-o", "organ.safetensors"]
    train = [
        "train", "organ.safetensors", "--host", reference, *text_words, "--protocol", best.protocol,
        "--at", str(best.position), "--max-tokens", str(tokens), *extra, "-o", "trained.safetensors",
    ]  # fmt: skip
    return [shlex.join(["neurograft", *words]) for words in (extract, train)]
