"""The text that places are compared on: windows in an order of which any beginning is a fair sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from neurograft import data as text_data
from neurograft.errors import DataError
from neurograft.evaluation import Window, cut_windows

# Fewer independent pieces of text than this tell nothing about the others.
FEWEST_UNITS = 8
FIRST_WINDOWS, FIRST_TOKENS = 16, 512
_TOKENIZED_TOGETHER = 64
# Long texts are taken from that many documents at least, if there are as many.
_DOCUMENTS = 32


@dataclass(frozen=True)
class Sample:
    """Windows of one text, in the order in which they are run."""

    name: str
    windows: list[Window]
    units: list[int]
    """For each window the number of the independent piece of text that it belongs to: its document, or, where there
    are too few documents, itself."""
    documents: int
    """How many documents they come from."""
    stops: list[int]
    """How many windows have been run after each round."""

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(window.scored for window in self.windows)

    @property
    def context_tokens(self) -> int:
        """Tokens that are run: also those that are only context."""
        return sum(len(window.ids) for window in self.windows)

    @property
    def by_document(self) -> bool:
        """Whether documents are drawn anew in the bootstrap, and not windows."""
        return len(self.windows) > 0 and self.units == [window.document for window in self.windows]

    def round(self, number: int) -> list[int]:
        """Return the numbers of the windows that a round adds; none after the last."""
        if number >= len(self.stops):
            return []
        return list(range(self.stops[number - 1] if number else 0, self.stops[number]))

    def batches(self, number: int, batch_size: int) -> list[list[int]]:
        """Return the numbers of the windows in each batch of a round; windows of about one length run together."""
        ordered = sorted(self.round(number), key=lambda place: len(self.windows[place].ids))
        return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def draw_sample(
    name: str,
    documents: Sequence[str],
    tokenizer: Any,
    *,
    max_tokens: int,
    sequence_length: int,
    seed: int,
) -> Sample:
    """Draw windows from documents.

    Args:
        name: Of the text, for messages.
        documents: The text.
        tokenizer: The recipient's.
        max_tokens: About how many tokens are scored at most.
        sequence_length: Tokens in a window.
        seed: Seed of the order.

    Raises:
        DataError: The tokenizer makes no tokens of it, or there are too few windows to compare anything on.
    """
    chosen = _draw_documents(documents, tokenizer, max_tokens, seed)
    windows = cut_windows(chosen, sequence_length, text_data.separator_token(tokenizer))
    if not windows:
        raise DataError(f"the tokenizer makes no tokens of the {name} text.")
    available = len(windows)
    windows = _cut(_round_robin(windows), max_tokens)
    if len(windows) < FEWEST_UNITS:
        scored = sum(window.scored for window in windows)
        cut = len(windows) < available
        remedy = "give a larger --max-tokens (in a study --eval-tokens)" if cut else "give more text or more documents"
        remedy += ", or a smaller --sequence-length"
        raise DataError(
            f"{scored:,} tokens of the {name} text in {len(windows)} window{'s' * (len(windows) > 1)} of up to "
            f"{sequence_length} tokens are too few: places can be compared on {FEWEST_UNITS} windows or more; {remedy}."
        )
    count = len({window.document for window in windows})
    units = [window.document for window in windows] if count >= FEWEST_UNITS else list(range(len(windows)))
    return Sample(name, windows, units, count, _stops(windows))


def _draw_documents(documents: Sequence[str], tokenizer: Any, max_tokens: int, seed: int) -> list[list[int]]:
    """Return the token ids of documents from all over the text, as many as it takes."""
    order = numpy.random.default_rng(seed).permutation(len(documents)).tolist()
    chosen: list[list[int]] = []
    total = 0
    for start in range(0, len(order), _TOKENIZED_TOGETHER):
        part = [documents[number] for number in order[start : start + _TOKENIZED_TOGETHER]]
        for tokens in text_data.tokenize_documents(part, tokenizer):
            if total >= max_tokens and len(chosen) >= _DOCUMENTS:
                return chosen
            if tokens:
                chosen.append(tokens)
                total += len(tokens)
    return chosen


def _round_robin(windows: Sequence[Window]) -> list[Window]:
    """Order windows so that all documents' first ones come before any second."""
    seen: dict[int, int] = {}
    turns = []
    for window in windows:
        seen[window.document] = seen.get(window.document, -1) + 1
        turns.append(seen[window.document])
    return [window for _, window in sorted(zip(turns, windows, strict=True), key=lambda pair: pair[0])]


def _cut(windows: list[Window], max_tokens: int) -> list[Window]:
    """Return windows from the start until enough tokens are scored."""
    done = 0
    for number, window in enumerate(windows):
        done += window.scored
        if done >= max_tokens:
            return windows[: number + 1]
    return windows


def _stops(windows: Sequence[Window]) -> list[int]:
    """Return how many windows have been run after each round: each has about twice as many as the one before."""
    tokens = numpy.cumsum([window.scored for window in windows])
    first = max(FIRST_WINDOWS, int(numpy.searchsorted(tokens, FIRST_TOKENS)) + 1)
    stops = [len(windows)]
    while stops[0] // 2 >= first:
        stops.insert(0, stops[0] // 2)
    return stops
