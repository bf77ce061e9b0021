"""Small things that people read: numbers of things, and text of strangers that does no harm."""

from __future__ import annotations

import re

# What steers a terminal (C0 but for tab and line feed, DEL, C1), and what turns the direction of writing round.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def counted(number: int, what: str) -> str:
    """Render a number of things: `1 layer`, `3 layers`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def harmless(text: str) -> str:
    """Return text with what would steer a terminal, or turn its writing round, as escapes: it may be anyone's."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def harmless_json(text: str) -> str:
    """Do the same to a JSON document, in which it stays the same text."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
