"""Short trials of candidates for a new organ: all of them briefly, the better half for longer."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neurograft.anatomy import describe
from neurograft.errors import ModelError
from neurograft.evaluation import DEFAULT_LENGTH, document_losses
from neurograft.extraction import extract, parse_layers
from neurograft.identity import as_identity
from neurograft.models import ModelDirectory, fit_sequence_length
from neurograft.placement.candidates import Candidate, spread_out
from neurograft.placement.costs import restored
from neurograft.placement.plan_results import Proposal
from neurograft.surgery import attach, detach
from neurograft.training.loop import Batches, Trainee, TrainingRun
from neurograft.training.options import TrainingOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")

_FINALISTS = 2
_FIRST_STARTS = (1 / 3, 1 / 4, 1 / 2, 1 / 6)
# Identities are found by trying each tensor, which takes too long for more layers.
_INSERTED_AT_MOST = 6


def shortlist(possible: Sequence[Proposal], trials: int, layer_count: int) -> list[Proposal]:
    """Choose what to try.

    A budget leaves a few layers early in the model, or more of them later, and which learns more depends on the text:
    so the longest range is taken from each of some starts, spread over the model. Gradients are largest at its two
    ends, where organs learn least, and so they name only one.

    Args:
        possible: All that keep to the budget.
        trials: How many are chosen at most.
        layer_count: L.

    Returns:
        The paper's choice if it is possible; the longest ranges from L/3, L/4, L/2 and L/6 on; the one with the
        largest gradients; and the longest from the starts in between.
    """
    auto = parse_layers("auto", layer_count)
    longest: dict[int, Proposal] = {}
    for proposal in sorted(possible, key=lambda proposal: proposal.count):
        longest[proposal.position] = proposal
    starts = list(dict.fromkeys(round(layer_count * share) for share in _FIRST_STARTS))
    chosen = [proposal for proposal in possible if proposal.layers == f"{auto.start}:{auto.stop}"]
    chosen += [longest[start] for start in starts if start in longest]
    chosen += sorted(possible, key=lambda proposal: -proposal.gradient)[:1]
    chosen += [longest[place.position] for place in spread_out([Candidate(start, "replace") for start in longest])]
    return list({proposal.layers: proposal for proposal in chosen}.values())[:trials]


class _TrialRun(TrainingRun):
    """A short training that is measured as `evaluate` and `scan` measure, by documents that are read from their start.

    Attributes:
        ask: Returns the held-out loss of the model as it is, in nats per token.
        untrained: What that was before anything trained, which is the same for every candidate.
    """

    ask: Callable[[], float]
    untrained: float

    def held_out_loss(self) -> float:
        """See `TrainingRun`."""
        return self.ask() if self.state.step else self.untrained


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


class Trials:
    """Trains candidates from their start for a short while, the better half of them for twice as long, and so on.

    Args:
        model: The host; it is afterwards as it was.
        directory: Where it is from.
        batches: The text, as the whole training will see it.
        documents: Token ids of the held-out documents that tell candidates apart, each read from its own start.
        separator_id: What stands between documents.
        options: How the whole training will be done.
        trust_remote_code: See `neurograft.models.resolve`.
        say: Called with what is being done.
    """

    def __init__(
        self, model: PreTrainedModel, directory: ModelDirectory, batches: Batches, options: TrainingOptions, *,
        documents: Sequence[Sequence[int]], separator_id: int, trust_remote_code: bool, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._model, self._directory, self._batches = model, directory, batches
        self._documents, self._separator_id = documents, separator_id
        self._trust, self._say = trust_remote_code, say
        self._layers: list[nn.Module] = list(model.get_submodule(describe(model).layers_path).children())
        self._step = batches.step_size * batches.training.input_ids.shape[1]
        self._options = options.model_copy(update={"evaluations": 1, "patience": 2, "strength": 1.0})
        self._untrained = self._held_out_loss()

    @property
    def untrained(self) -> float:
        """Held-out perplexity of the model as it is."""
        return _perplexity(self._untrained)

    def _held_out_loss(self) -> float:
        """Return the loss on the held-out documents, in nats per token."""
        length = fit_sequence_length(None, DEFAULT_LENGTH, self._model.config, self._directory.name)
        scores = document_losses(
            self._model, self._documents, sequence_length=length, batch_size=self._batches.batch_size,
            separator_id=self._separator_id,
        )  # fmt: skip
        losses, counts = zip(*scores, strict=True)
        return math.fsum(losses) / max(sum(counts), 1)

    def run(
        self, candidates: Sequence[Proposal], tokens: int, insertion: Callable[[range], Proposal | None]
    ) -> list[Proposal]:
        """Return all candidates, those that went furthest first, and of them the best.

        Args:
            candidates: What to try.
            tokens: Training tokens of each trial in the first round; no later one has more than half of the whole
                training's.
            insertion: Returns the candidate that inserts a copy of some layers as identities, if there is one.
        """
        left, done = list(candidates), list[Proposal]()
        while True:
            found = [self._try(proposal, tokens) for proposal in left]
            if not done:
                found += self._try_inserted(found, tokens, insertion)
            found.sort(key=lambda proposal: proposal.trial or math.inf)
            if len(found) <= _FINALISTS or 4 * tokens > self._batches.steps * self._step:
                return found + done
            kept = max(math.ceil(len(found) / 2), _FINALISTS)
            left, done, tokens = found[:kept], found[kept:] + done, 2 * tokens

    def _try(self, proposal: Proposal, tokens: int) -> Proposal:
        batches = dataclasses.replace(self._batches, steps=math.ceil(tokens / self._step))
        how = "inserted as identities" if proposal.protocol == "insert" else "in place"
        self._say(f"trying layers {proposal.layers} {how}, {batches.steps * self._step:,} tokens")
        with self._in_the_model(proposal) as layers:
            run = _TrialRun(self._model, Trainee.of_layers(layers, proposal.position), batches, self._options)
            run.ask, run.untrained = self._held_out_loss, self._untrained
            run.train()
        self._model.requires_grad_(False)
        reached = min(loss for _, loss in run.state.held_out)
        return proposal.model_copy(update={"trial": _perplexity(reached), "trial_tokens": batches.steps * self._step})

    @contextmanager
    def _in_the_model(self, proposal: Proposal) -> Iterator[Sequence[nn.Module]]:
        """Yield a candidate's layers, in their place in the model."""
        start, stop = proposal.position, proposal.position + proposal.count
        if proposal.protocol == "in_place":
            with restored(self._layers[start:stop]):
                yield self._layers[start:stop]
            return
        path, trust = self._directory.path, self._trust
        organ = as_identity(extract(path, layers=(start, stop), verify="bytes", trust_remote_code=trust))
        attachment = attach(self._model, organ, at=start, mode="insert", verify=False)
        try:
            yield attachment.layers
        finally:
            detach(self._model)

    def _try_inserted(
        self, tried: Sequence[Proposal], tokens: int, insertion: Callable[[range], Proposal | None]
    ) -> list[Proposal]:
        """Try the best of the smaller organs as identities inserted at its place, where that is possible."""
        small = [proposal for proposal in tried if proposal.count <= _INSERTED_AT_MOST]
        best = min(small, key=lambda proposal: proposal.trial or math.inf, default=None)
        inserted = None if best is None else insertion(range(best.position, best.position + best.count))
        try:
            return [] if inserted is None else [self._try(inserted, tokens)]
        except ModelError as error:
            log.info("insert is not tried: %s", error)
            return []
