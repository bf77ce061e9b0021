"""What a model says of every token of some documents: what all attacks on an organ start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neurograft.evaluation import Window, batch_tensors, cut_windows

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedModel

    from neurograft.loss import NextTokenLoss

Count = Callable[[int], None]
_TINY = 1e-6  # nats; keeps a distribution that is all on one token from dividing by zero


@dataclass(frozen=True)
class Stretch:
    """The tokens of one document that were scored in one window, each array (n,)."""

    context: int
    """Tokens of the document that stand before the first of them in the window."""
    losses: numpy.ndarray
    """Negative log likelihood of each token, in nats."""
    normalised: numpy.ndarray
    """Each token's log-probability in standard deviations from the mean of what the model would draw (Min-K%++)."""
    greedy: numpy.ndarray
    """Whether greedy decoding would choose the token."""


@dataclass(frozen=True)
class ScoredDocument:
    """One document as a model sees it."""

    stretches: list[Stretch]

    @property
    def losses(self) -> numpy.ndarray:
        """(T,) negative log likelihood of each token, in nats."""
        import numpy

        return numpy.concatenate([stretch.losses for stretch in self.stretches])

    @property
    def normalised(self) -> numpy.ndarray:
        """(T,) see `Stretch`."""
        import numpy

        return numpy.concatenate([stretch.normalised for stretch in self.stretches])


def score_documents(
    model: PreTrainedModel,
    token_lists: Sequence[Sequence[int]],
    *,
    sequence_length: int,
    batch_size: int,
    separator_id: int,
    progress: Count | None = None,
) -> list[ScoredDocument]:
    """Score every token of some documents once, by the windows that `evaluation.document_losses` cuts.

    Args:
        model: A causal language model; its mode is as before afterwards.
        token_lists: Token ids of each document; none is empty.
        sequence_length: Tokens in a window.
        batch_size: Windows in a forward pass.
        separator_id: The end-of-text token, which stands before each document.
        progress: Called with the number of tokens scored since the last call.
    """
    from neurograft.arithmetic import fast_float32
    from neurograft.loss import NextTokenLoss

    windows = cut_windows(token_lists, sequence_length, separator_id)
    order = sorted(range(len(windows)), key=lambda number: len(windows[number].ids))
    found: dict[int, Stretch] = {}
    training = model.training
    model.eval()
    try:
        loss = NextTokenLoss(model)
        with fast_float32(model.device):
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                batch = [windows[number] for number in numbers]
                found.update(zip(numbers, _score_batch(loss, batch, separator_id), strict=True))
                if progress is not None:
                    progress(sum(window.scored for window in batch))
    finally:
        model.train(training)
    documents: list[list[Stretch]] = [[] for _ in token_lists]
    for number, window in enumerate(windows):
        documents[window.document].append(found[number])
    return [ScoredDocument(stretches) for stretches in documents]


def _score_batch(loss: NextTokenLoss, batch: Sequence[Window], padding: int) -> list[Stretch]:
    facts = loss.facts(*batch_tensors(batch, padding))
    losses = facts.losses.double().cpu().numpy()  # (N,), windows one after the other
    mean, deviation = facts.mean.double().cpu().numpy(), facts.deviation.double().cpu().numpy()
    normalised = (-losses - mean) / (deviation + _TINY)
    greedy = facts.greedy.cpu().numpy()
    stretches, done = [], 0
    for window in batch:
        part = slice(done, done + window.scored)
        # The separator before a document is no token of it; a later window has none.
        first = len(window.ids) - window.scored == 1
        context = 0 if first else len(window.ids) - window.scored
        stretches.append(Stretch(context, losses[part], normalised[part], greedy[part]))
        done += window.scored
    return stretches
