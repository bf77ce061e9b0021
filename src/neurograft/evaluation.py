"""Perplexity on named data sets, beside a baseline, with intervals, and gates that decide on deployment."""

from __future__ import annotations

import logging
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from neurograft import data as text_data
from neurograft.errors import DataError, GateError, ModelError, UsageError
from neurograft.models import ModelDirectory, fit_sequence_length, load_config, load_model, load_tokenizer, resolve

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neurograft.loss import NextTokenLoss

log = logging.getLogger("neurograft")

LoadedModel = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]
Progress = Callable[[int, int], None]
DEFAULT_LENGTH = 512  # tokens in a window

_GATE = re.compile(r"^\s*([\w.-]+)\s*(<=|>=|<|>)\s*(?:(\d+(?:\.\d+)?)\s*\*\s*)?(baseline|\d+(?:\.\d+)?)\s*$")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_NUMBER_OR_BASELINE = "NAME<=FACTOR*baseline or NAME<=NUMBER (also <, >, >=), such as 'domain<=0.9*baseline'"


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSetResult(_Result):
    """What was measured on one data set; intervals are 95 %, by bootstrap over documents."""

    name: str
    documents: int
    tokens: int
    """Tokens scored."""
    perplexity: float
    """exp of the mean loss in nats per token, over all tokens of the data set."""
    low: float
    high: float
    baseline_tokens: int | None = None
    baseline_perplexity: float | None = None
    comparable_tokens: bool | None = None
    """Whether both models cut the text into as many tokens. If not, `ratio` compares losses per byte of text."""
    ratio: float | None = None
    """Perplexity over the baseline's."""
    ratio_low: float | None = None
    ratio_high: float | None = None


class GateResult(_Result):
    """Whether one gate holds."""

    gate: str
    passed: bool
    value: float
    """The perplexity measured, or times the ratio where token counts differ."""
    limit: float


class EvaluationReport(_Result):
    """Everything that `evaluate` measured."""

    model: str
    baseline: str | None
    sequence_length: int
    seed: int
    data: dict[str, DataSetResult]
    gates: list[GateResult]
    passed: bool | None
    """Whether every gate holds; `None` where none was given."""


@dataclass(frozen=True)
class Gate:
    """A limit on one data set's perplexity: absolute, or a multiple of the baseline's."""

    text: str
    name: str
    comparison: str
    factor: float
    of_baseline: bool


def parse_gate(text: str) -> Gate:
    """Parse a gate such as `domain<=0.9*baseline` or `domain<20`.

    Raises:
        GateError: It is not written so.
    """
    match = _GATE.match(text)
    if match is None or (match[3] and match[4] != "baseline"):
        raise GateError(f"the gate {text!r} can't be read; write {_NUMBER_OR_BASELINE}.")
    of_baseline = match[4] == "baseline"
    factor = float(match[3] or 1) if of_baseline else float(match[4])
    return Gate(text.strip(), match[1], match[2], factor, of_baseline)


def parse_data_arguments(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Read `NAME=PATH` arguments; a bare path is named after its file, and a name given twice joins its paths.

    Raises:
        UsageError: A name or a path is empty, none is given, or a path would be joined with others by its file's name.
    """
    named: dict[str, list[str]] = {}
    bare: set[str] = set()
    for argument in arguments:
        name, found, path = argument.partition("=")
        if not found or "/" in name:
            name, path = Path(argument).name.split(".")[0], argument
            bare.add(name)
        if not name or not path:
            raise UsageError(f"the data argument {argument!r} can't be read; write NAME=PATH.")
        if name in bare and name in named:
            raise UsageError(f"{named[name][0]} and {path} would both be called {name}; write --data NAME=PATH.")
        named.setdefault(name, []).append(path)
    if not named:
        raise UsageError("no data was given; write --data NAME=PATH.")
    return named


@dataclass(frozen=True)
class Scores:
    """Losses of one model on one data set, a number a document."""

    losses: numpy.ndarray
    """(D,) sums of the negative log likelihood, in nats."""
    tokens: numpy.ndarray
    """(D,) tokens scored."""
    size: numpy.ndarray
    """(D,) bytes of text in UTF-8 that these tokens stand for."""

    @property
    def perplexity(self) -> float:
        """Over all tokens."""
        return math.exp(min(self.losses.sum() / self.tokens.sum(), 700))


def evaluate(
    model: str | Path | LoadedModel,
    *,
    data: Mapping[str, str | Path | Sequence[str | Path]],
    baseline: str | Path | LoadedModel | None = None,
    gates: Sequence[str] = (),
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    seed: int = 0,
    bootstrap_samples: int = 1000,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure token-weighted perplexity on named data sets, with bootstrap intervals over documents.

    Args:
        model: A Hub id, a directory, a `.gguf` file, or a loaded (model, tokenizer).
        data: Name -> files, folders or a Hub dataset id; see `neurograft.data.read_documents`.
        baseline: A model to stand beside it on the same documents; intervals of ratios are then paired.
        gates: Such as `domain<=0.9*baseline`; see `parse_gate`.
        sequence_length: Tokens in a window; longer documents are cut into windows that overlap by half. Left out, 512,
            or as many as both models have positions.
        batch_size: Windows in a forward pass.
        max_tokens: At most about this many tokens of each data set, whole documents from its start.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        seed: Seed of the bootstrap.
        bootstrap_samples: How often documents are drawn anew.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all).

    Raises:
        GateError: A gate can't be read, or names what is not measured. Checked before anything is loaded.
        UsageError: The seed is negative. The windows are longer than a model takes. Checked before weights are loaded.
        DataError, ModelError: Text or a model can't be read, or a loss is not finite.
    """
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must not be negative.")
    parsed = _check_gates(gates, data, has_baseline=baseline is not None)
    documents = {
        name: text_data.read_documents(
            paths, text_column=text_column, document_separator=document_separator, encoding=encoding
        )
        for name, paths in data.items()
    }
    given = [model] if baseline is None else [model, baseline]
    names = [_name(candidate) for candidate in given]
    models = [
        candidate if isinstance(candidate, tuple) else resolve(candidate, trust_remote_code=trust_remote_code)
        for candidate in given
    ]
    sequence_length = _window_length(models, names, sequence_length, trust_remote_code)
    scores: list[dict[str, Scores]] = []
    for number, candidate in enumerate(models):
        log.info("evaluating %s", names[number])
        loaded, tokenizer = load_to_score(candidate, trust_remote_code)
        if number == 0:
            documents = {name: first_documents(texts, tokenizer, max_tokens) for name, texts in documents.items()}
        counter = token_counter(progress, documents, tokenizer, number, len(models))
        settings = {"sequence_length": sequence_length, "batch_size": batch_size, "progress": counter}
        scores.append(
            {
                name: score_documents(loaded, tokenizer, name, texts, names[number], settings)
                for name, texts in documents.items()
            }
        )
        del loaded
    others: list[Scores | None] = [scores[1][name] if baseline is not None else None for name in documents]
    results = {
        name: _result(name, scores[0][name], other, seed, bootstrap_samples)
        for name, other in zip(documents, others, strict=True)
    }
    verdicts = [_apply(gate, results[gate.name]) for gate in parsed]
    return EvaluationReport(
        model=names[0],
        baseline=None if baseline is None else names[1],
        sequence_length=sequence_length,
        seed=seed,
        data=results,
        gates=verdicts,
        passed=all(verdict.passed for verdict in verdicts) if verdicts else None,
    )


def _check_gates(gates: Sequence[str], data: Mapping[str, Any], *, has_baseline: bool) -> list[Gate]:
    parsed = [parse_gate(text) for text in gates]
    for gate in parsed:
        if gate.name not in data:
            raise GateError(f"the gate {gate.text!r} names the data set {gate.name}; there are {', '.join(data)}.")
        if gate.of_baseline and not has_baseline:
            raise GateError(f"the gate {gate.text!r} speaks of a baseline, and none was given; add --baseline MODEL.")
    return parsed


def _window_length(
    models: Sequence[ModelDirectory | LoadedModel], names: Sequence[str], given: int | None, trust_remote_code: bool
) -> int:
    """Return a length of windows that all models take."""
    return min(
        fit_sequence_length(
            given,
            DEFAULT_LENGTH,
            model[0].config if isinstance(model, tuple) else load_config(model, trust_remote_code=trust_remote_code),
            name,
        )
        for model, name in zip(models, names, strict=True)
    )


def _name(model: str | Path | LoadedModel) -> str:
    if isinstance(model, tuple):
        return Path(model[0].config.name_or_path or "").name or model[0].config.model_type
    path = Path(model)
    return path.name if path.exists() else str(model)


def load_to_score(model: ModelDirectory | LoadedModel, trust_remote_code: bool) -> LoadedModel:
    """Load a model and its tokenizer, on the accelerator if there is one; what is loaded already stays where it is."""
    import torch

    if isinstance(model, tuple):
        return model
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    torch.nn.Module.to(loaded, torch.accelerator.current_accelerator() or torch.device("cpu"))
    return loaded, tokenizer


def first_documents(documents: list[str], tokenizer: Any, limit: int | None) -> list[str]:
    """Return whole documents from the start until there are `limit` tokens; at least one."""
    if limit is None:
        return documents
    chosen, total = [], 0
    for document in documents:
        chosen.append(document)
        total += len(text_data.tokenize_documents([document], tokenizer)[0])
        if total >= limit:
            break
    return chosen


def token_counter(
    progress: Progress | None, documents: Mapping[str, list[str]], tokenizer: Any, number: int, models: int
) -> Callable[[int], None] | None:
    """Return a function that adds tokens to a running total over all models and data sets, and reports it."""
    if progress is None:
        return None
    total = sum(len(ids) for texts in documents.values() for ids in text_data.tokenize_documents(texts, tokenizer))
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(number * total + done, models * total)

    return count


def score_documents(
    model: PreTrainedModel, tokenizer: Any, name: str, documents: list[str], model_name: str, settings: dict[str, Any]
) -> Scores:
    """Return the losses of one model on the documents of one data set.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        name: The data set's name, in messages.
        documents: Its texts.
        model_name: The model's name, in messages.
        settings: Further arguments of `document_losses`.

    Raises:
        ModelError: A loss is not finite.
        DataError: The texts hold no token.
    """
    import numpy

    token_lists = text_data.tokenize_documents(documents, tokenizer)
    pairs = document_losses(model, token_lists, separator_id=text_data.separator_token(tokenizer), **settings)
    losses = numpy.array([loss for loss, _ in pairs])
    tokens = numpy.array([count for _, count in pairs])
    if not numpy.isfinite(losses).all():
        raise ModelError(
            f"the loss of {model_name} on {name} is not finite in {(~numpy.isfinite(losses)).sum()} documents."
        )
    if tokens.sum() == 0:
        raise DataError(f"the tokenizer of {model_name} makes no tokens of {name}.")
    return Scores(losses, tokens, numpy.array([len(document.encode()) for document in documents]))


@dataclass(frozen=True)
class Window:
    """A stretch of one document; the first tokens may be context that another window scored."""

    document: int
    ids: list[int]
    scored: int
    """How many of the last tokens are scored here."""


def cut_windows(token_lists: Sequence[Sequence[int]], sequence_length: int, separator_id: int) -> list[Window]:
    """Cut documents into windows that score every token exactly once; the separator stands before each document."""
    windows = []
    for number, tokens in enumerate(token_lists):
        stream = [separator_id, *tokens]
        done = 1  # the separator is context only
        while done < len(stream):
            start = 0 if done == 1 else done - sequence_length // 2
            stop = min(start + sequence_length, len(stream))
            windows.append(Window(number, stream[start:stop], stop - done))
            done = stop
    return windows


def document_losses(
    model: PreTrainedModel,
    token_lists: Sequence[Sequence[int]],
    *,
    sequence_length: int,
    batch_size: int,
    separator_id: int,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, int]]:
    """Return for each document the sum of its tokens' negative log likelihood, in nats, and the number of tokens.

    Each document is scored from its own start: end-of-text stands before it, so that its first token is scored too. A
    document longer than a window is cut into windows whose first half is context from the window before.

    Args:
        model: A causal language model; its mode is as before afterwards.
        token_lists: Token ids of each document.
        sequence_length: Tokens in a window.
        batch_size: Windows in a forward pass.
        separator_id: The end-of-text token.
        progress: Called with the number of tokens scored since the last call.
    """
    import torch

    from neurograft.arithmetic import fast_float32
    from neurograft.loss import NextTokenLoss

    windows = sorted(cut_windows(token_lists, sequence_length, separator_id), key=lambda window: len(window.ids))
    sums, counts = [0.0] * len(token_lists), [0] * len(token_lists)
    training = model.training
    model.eval()
    try:
        losses = NextTokenLoss(model)
        with torch.no_grad(), fast_float32(model.device):
            for start in range(0, len(windows), batch_size):
                batch = windows[start : start + batch_size]
                for window, loss in zip(batch, window_losses(losses, batch, separator_id), strict=True):
                    sums[window.document] += loss
                    counts[window.document] += window.scored
                if progress is not None:
                    progress(sum(window.scored for window in batch))
    finally:
        model.train(training)
    return list(zip(sums, counts, strict=True))


def window_losses(loss: NextTokenLoss, batch: Sequence[Window], padding: int) -> list[float]:
    """Return the sum of the losses of each window's scored tokens, in nats."""
    return [float(value) for value in loss(*batch_tensors(batch, padding)).double().sum(dim=1)]


def batch_tensors(batch: Sequence[Window], padding: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, labels and attention mask of some windows, (B, T) each, padded at the end."""
    import torch

    longest = max(len(window.ids) for window in batch)
    ids = torch.full((len(batch), longest), padding)  # (B, T)
    labels = torch.full((len(batch), longest), text_data.IGNORED_LABEL)  # (B, T)
    mask = torch.zeros_like(ids)  # (B, T)
    for row, window in enumerate(batch):
        length = len(window.ids)
        ids[row, :length] = torch.tensor(window.ids)
        labels[row, length - window.scored : length] = ids[row, length - window.scored : length]
        mask[row, :length] = 1
    return ids, labels, mask


def _result(name: str, own: Scores, other: Scores | None, seed: int, samples: int) -> DataSetResult:
    """Reduce scores to perplexities, ratio and intervals; both models' intervals are over the same draws of
    documents.
    """
    import numpy

    generator = numpy.random.default_rng(seed)
    draws = generator.integers(len(own.losses), size=(samples, len(own.losses)))  # (samples, D)
    low, high = _interval(own.losses[draws].sum(1) / numpy.maximum(own.tokens[draws].sum(1), 1))
    shared: dict[str, Any] = {
        "name": name, "documents": len(own.losses), "tokens": int(own.tokens.sum()), "perplexity": own.perplexity,
        "low": low, "high": high,
    }  # fmt: skip
    if other is None:
        return DataSetResult(**shared)
    comparable = bool((own.tokens == other.tokens).all())
    ratio_low, ratio_high = _interval(_log_ratio(own, other, draws, comparable))
    return DataSetResult(
        **shared,
        baseline_tokens=int(other.tokens.sum()),
        baseline_perplexity=other.perplexity,
        comparable_tokens=comparable,
        ratio=math.exp(float(_log_ratio(own, other, numpy.arange(len(own.losses))[None], comparable)[0])),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
    )


def _log_ratio(own: Scores, other: Scores, draws: numpy.ndarray, comparable: bool) -> numpy.ndarray:
    """Return the log of the perplexity ratio for each draw of documents, (samples, D) -> (samples,).

    Where the tokenizers differ, losses are compared per byte of text and scaled by the baseline's bytes per token,
    which makes the ratio that of perplexities per token of the baseline.
    """
    import numpy

    tokens = numpy.maximum(other.tokens[draws].sum(1), 1)
    difference = own.losses[draws].sum(1) - other.losses[draws].sum(1)
    if comparable:
        return numpy.asarray(difference / tokens)
    size = numpy.maximum(own.size[draws].sum(1), 1)
    return numpy.asarray(difference / size * (other.size.sum() / other.tokens.sum()))


def _interval(log_values: numpy.ndarray) -> tuple[float, float]:
    import numpy

    low, high = numpy.quantile(log_values, [0.025, 0.975])
    return math.exp(min(low, 700)), math.exp(min(high, 700))


def _apply(gate: Gate, result: DataSetResult) -> GateResult:
    if not gate.of_baseline:
        value, limit = result.perplexity, gate.factor
    else:
        baseline = result.baseline_perplexity or math.nan
        value, limit = (result.ratio or math.nan) * baseline, gate.factor * baseline
    return GateResult(gate=gate.text, passed=_OPERATORS[gate.comparison](value, limit), value=value, limit=limit)
