"""Alter files at random, below their structure and within it, so that the same number always gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from neurograft.manifest import UNSEALED

_ESCAPES = ["../../outside", "/etc/passwd", "C:\\outside", "\0", "a/b", ".", "..", "nul", "x" * 5000, "\udcff", "‮"]
_NUMBERS = [-1, 0, 1, 2**31, 2**53, 2**63, -(2**63), 10**30, 1e308, -0.0, 0.1, float("nan"), float("inf")]
_OTHERS: list[Any] = [None, True, False, "", [], {}, [[]], {"": ""}, ["x"] * 300]
_DEEP = 3000


def alter(data: bytes, number: int) -> bytes:
    """Return altered bytes.

    Args:
        data: An organ file, JSON, JSON Lines, or anything else.
        number: Which of the alterations.
    """
    chance = random.Random(number)
    ways: list[Callable[[bytes, random.Random], bytes]] = [_alter_bytes]
    if data[8:9] == b"{":
        ways += [_alter_header] * 3
    elif data[:1] in b"{[":
        ways += [_alter_text] * 3
    return chance.choice(ways)(data, chance)


def _alter_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat, insert or remove bytes."""
    altered = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(altered) + 1)
        what = chance.randrange(6)
        if what == 0 and place < len(altered):
            altered[place] ^= 1 << chance.randrange(8)
        elif what == 1:
            del altered[place:]
        elif what == 2:
            altered[place:place] = altered[place : place + chance.randrange(1, 64)]
        elif what == 3:
            altered[place:place] = chance.randbytes(chance.randrange(1, 32))
        elif what == 4:
            del altered[place : place + chance.randrange(1, 64)]
        else:
            altered[:8] = chance.choice([0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(altered)


def _alter_text(data: bytes, chance: random.Random) -> bytes:
    """Alter a value of JSON, or of one line of JSON Lines."""
    lines = data.splitlines()
    if len(lines) > 1 and all(line[:1] == b"{" for line in lines):
        number = chance.randrange(len(lines))
        lines[number] = _alter_json(lines[number], chance)
        if chance.random() < 0.2:
            chance.shuffle(lines)
        return b"\n".join(lines) + b"\n"
    return _alter_json(data, chance)


def _alter_header(data: bytes, chance: random.Random) -> bytes:
    """Alter a value in a safetensors header, or in the manifest in it; often with a digest that is right again."""
    length = int.from_bytes(data[:8], "little")
    body = data[8 + length :]
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):  # it was altered before
        return _alter_bytes(data, chance)
    if isinstance(metadata, dict) and isinstance(metadata.get("neurograft"), str) and chance.random() < 0.6:
        metadata["neurograft"] = _alter_json(metadata["neurograft"].encode(), chance).decode("utf-8", "surrogatepass")
        text = json.dumps(header).encode()
    else:
        text = _alter_json(json.dumps(header).encode(), chance)
    whole = len(text).to_bytes(8, "little") + text + body
    manifest = metadata.get("neurograft") if isinstance(metadata, dict) else None
    return _sealed(whole, manifest) if isinstance(manifest, str) and chance.random() < 0.8 else whole


def _sealed(data: bytes, manifest: str) -> bytes:
    """Give an organ file the digest that its bytes have, if it says where its digest stands."""
    try:
        digest = json.loads(manifest)["file_digest"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data
    if len(digest) != 64 or digest not in data:
        return data
    start = data.rindex(digest)
    zeroed = data[:start] + UNSEALED.encode() + data[start + 64 :]
    return data[:start] + hashlib.sha256(zeroed).hexdigest().encode() + data[start + 64 :]


def _alter_json(text: bytes, chance: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _alter_bytes(text, chance)
    for _ in range(chance.choice([1, 1, 1, 3])):
        value = _alter_value(value, chance)
    written = json.dumps(value).encode()
    what = chance.random()
    if what < 0.05:
        return b"[" * _DEEP + written + b"]" * _DEEP
    if what < 0.1 and written[:1] == b"{" and len(written) > 2:
        return b'{"' + chance.choice([b"name", b"schema_version", b"layers"]) + b'":' + b"1," + written[1:]
    return written


def _alter_value(value: Any, chance: random.Random) -> Any:
    """Go down at random, and put something else where that ends."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        what = chance.random()
        if what < 0.08:
            return {name: each for name, each in value.items() if name != key}
        if what < 0.16:
            return {**value, chance.choice(_ESCAPES): value[key]}
        return {**value, key: _alter_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        if chance.random() < 0.15:
            return [*value, *value] if chance.random() < 0.5 else value[:place]
        return [*value[:place], _alter_value(value[place], chance), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 64, -(2**33), 2**33])
    return chance.choice([*_ESCAPES, *_NUMBERS, *_OTHERS])
