"""Verbatim extraction: which documents does a model go on with, word for word, when it is given their beginning?

Greedy decoding recites n tokens after a prefix exactly if each of them is the most likely one after all that stands
before it in the document. So one pass over the document answers this for every prefix in it, and nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from neurograft.manifest import ExtractionFigures
from neurograft.privacy.membership import share_interval

if TYPE_CHECKING:
    from neurograft.privacy.scoring import ScoredDocument


def longest_recited(document: ScoredDocument, prefix: int) -> int:
    """Return the most tokens in a row that greedy decoding recites after a prefix of at least `prefix` tokens.

    What is recited lies in one window, so that what stands before it is what the model was given.
    """
    longest = 0
    for stretch in document.stretches:
        run = 0
        for number, greedy in enumerate(stretch.greedy.tolist()):
            run = run + 1 if greedy and stretch.context + number >= prefix else 0
            longest = max(longest, run)
    return longest


def is_long_enough(document: ScoredDocument, prefix: int, length: int) -> bool:
    """Whether a document has a prefix with as many tokens after it as are to be recited."""
    return any(
        stretch.context + len(stretch.greedy) - max(prefix, stretch.context) >= length for stretch in document.stretches
    )


def measure(
    text: Literal["members", "non-members"],
    documents: Sequence[ScoredDocument],
    before: Sequence[ScoredDocument],
    *,
    prefix: int,
    length: int,
) -> ExtractionFigures:
    """Count the documents of which `length` tokens in a row are recited, with the organ and by the host alone.

    Args:
        text: Which documents these are.
        documents: Them, as the host with the organ sees them.
        before: The same, as the host alone does.
        prefix: Tokens that the model is given, at least.
        length: n: tokens in a row that it must recite.
    """
    asked = [number for number, document in enumerate(documents) if is_long_enough(document, prefix, length)]
    own = [longest_recited(documents[number], prefix) for number in asked]
    host = [longest_recited(before[number], prefix) for number in asked]
    count = sum(run >= length for run in own)
    low, high = share_interval(count, len(asked)) if asked else (0.0, 1.0)
    return ExtractionFigures(
        text=text,
        prefix=prefix,
        length=length,
        documents=len(asked),
        recited=count,
        recited_low=low,
        recited_high=high,
        recited_by_host=sum(run >= length for run in host),
        longest=max(own, default=0),
        longest_by_host=max(host, default=0),
    )
