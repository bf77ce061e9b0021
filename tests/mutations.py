"""Alter files at random, below their structure and within it, so that the same number always gives the same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Callable
from typing import Any

from neurograft.manifest import UNSEALED

_ESCAPES = ["../../outside", "/etc/passwd", "C:\\outside", "\0", "a/b", ".", "..", "nul", "x" * 5000, "\udcff", "‮"]
_NUMBERS = [-1, 0, 1, 2**31, 2**53, 2**63, -(2**63), 10**30, 1e308, -0.0, 0.1, float("nan"), float("inf")]
_OTHERS: list[Any] = [None, True, False, "", [], {}, [[]], {"": ""}, ["x"] * 300]
_DEEP = 3000
_WORD = re.compile(rb"[\w./*-]+|\"[^\"\n]*\"")
_ENCODED = re.compile(r"[A-Za-z0-9+/]*=*")
_SHORT = 80  # digests are shorter
_NO_DIGEST = "0" * 64


def alter(data: bytes, number: int) -> bytes:
    """Return altered bytes.

    Args:
        data: An organ file, a GGUF file, JSON, JSON Lines, other text, or anything else.
        number: Which of the alterations.
    """
    chance = random.Random(number)
    ways: list[Callable[[bytes, random.Random], bytes]] = [_alter_bytes]
    if data[8:9] == b"{":
        ways += [_alter_header] * 3
    elif data[:4] == b"GGUF":
        ways += [_alter_numbers] * 3
    elif data[:1] == b"{":
        ways += [_alter_text] * 3
    elif _is_text(data):
        ways += [_alter_words] * 3
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


def _alter_numbers(data: bytes, chance: random.Random) -> bytes:
    """Put other numbers among those of a binary header, and cut what it describes."""
    altered = bytearray(data)
    for _ in range(chance.choice([1, 1, 2])):
        width = chance.choice([1, 4, 8])
        place = chance.randrange(4, min(len(altered), 4096))
        number = chance.choice([0, 1, 2, 9, 31, 255, 2**16, 2**31, 2**32 - 1, 2**60, 2**64 - 1])
        altered[place : place + width] = (number % 256**width).to_bytes(width, "little")
    return bytes(altered[: chance.randrange(len(altered))] if chance.random() < 0.1 else altered)


def _is_text(data: bytes) -> bool:
    return data.isascii() and b"\0" not in data


def _alter_words(data: bytes, chance: random.Random) -> bytes:
    """Put other values for words of TOML, YAML or PEM, or lines at other places."""
    found = list(_WORD.finditer(data))
    if not found or chance.random() < 0.2:
        lines = data.split(b"\n")
        place = chance.randrange(len(lines))
        lines.insert(chance.randrange(len(lines)), b" " * chance.randrange(5) + lines[place])
        return b"\n".join(lines)
    word = chance.choice(found)
    values = [
        *_ESCAPES,
        *_NUMBERS,
        *_OTHERS,
        "&a [*a]",
        "*a",
        "!!python/object:os.system",
        "<<",
        "[[" * _DEEP,
        "- " * 99,
    ]
    written = str(chance.choice(values)).encode("utf-8", "surrogatepass")
    return data[: word.start()] + written + data[word.end() :]


def _alter_text(data: bytes, chance: random.Random) -> bytes:
    """Alter a value of JSON, or of one line of JSON Lines."""
    lines = data.splitlines()
    if len(lines) > 1 and all(line[:1] == b"{" for line in lines):
        number = chance.randrange(len(lines))
        lines[number] = _alter_json(lines[number], chance)
        if chance.random() < 0.2:
            chance.shuffle(lines)
        if chance.random() < 0.7:
            lines = _chained(lines)
        return b"\n".join(lines) + b"\n"
    return _alter_json(data, chance)


def _chained(lines: list[bytes]) -> list[bytes]:
    """Give the entries of a history the digests that they should have, each with that of the one before."""
    before, found = _NO_DIGEST, list[bytes]()
    for line in lines:
        try:
            entry = json.loads(line)
            whole = {**entry, "previous": before, "digest": _NO_DIGEST}
            if not {"previous", "digest"} <= entry.keys():
                raise ValueError("it is no entry of a history")
            text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
        except (ValueError, AttributeError, TypeError, RecursionError):
            found.append(line)
            continue
        before = hashlib.sha256(text).hexdigest()
        whole["digest"] = before
        found.append(json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode())
    return found


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
        try:
            manifest = metadata["neurograft"].encode()
            metadata["neurograft"] = _alter_json(manifest, chance).decode("utf-8", "surrogatepass")
        except UnicodeError:  # it was altered before, and is no JSON or no text now
            return _alter_bytes(data, chance)
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
    if isinstance(value, str) and len(value) > _SHORT and _ENCODED.fullmatch(value) and chance.random() < 0.8:
        return _alter_encoded(value, chance)
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 64, -(2**33), 2**33])
    return chance.choice([*_ESCAPES, *_NUMBERS, *_OTHERS])


def _alter_encoded(value: str, chance: random.Random) -> str:
    """Alter what is written in base64, as in bundles of signatures."""
    try:
        decoded = base64.b64decode(value)
    except ValueError:
        return chance.choice(_ESCAPES)
    altered = _alter_json(decoded, chance) if decoded[:1] == b"{" else _alter_bytes(decoded, chance)
    return base64.b64encode(altered).decode()
