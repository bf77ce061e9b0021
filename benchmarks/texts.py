"""The texts that the benchmarks train on and evaluate with: two domains, and general text that belongs to neither."""

from __future__ import annotations

import gzip
import subprocess
import tempfile
from pathlib import Path

from neurograft.demonstration import find_ontology, read_definitions, read_reference
from neurograft.models import cache_directory

DICTIONARY_PACKAGE = "dict-gcide"  # the Collaborative International Dictionary of English, GPL, as Debian packages it
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SHORTEST, _MOST = 120, 40_000


def read_domain(name: str) -> list[str]:
    """Return the documents of a domain: `clinical` (Human Phenotype Ontology) or `dictionary` (GCIDE)."""
    return read_definitions(find_ontology()) if name == "clinical" else read_dictionary()


def read_general() -> list[str]:
    """Return general text: the Python language reference."""
    return read_reference()


def read_dictionary() -> list[str]:
    """Return entries of the dictionary, in the order in which they stand there, evenly taken from the whole of it."""
    folder = _unpacked()
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    places = set()
    for line in (folder / "gcide.index").read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")
        if not word.startswith("00"):  # the dictionary's own description
            places.add((_number(start), _number(length)))
    spans = sorted(places)
    entries = [" ".join(text[start : start + length].decode("utf-8", "replace").split()) for start, length in spans]
    long_enough = [entry for entry in entries if len(entry) >= _SHORTEST]
    return long_enough[:: max(1, len(long_enough) // _MOST)]


def _number(digits: str) -> int:
    """Read a number as dictd's index writes it: base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def _unpacked() -> Path:
    """Download and unpack Debian's package once; it needs apt and dpkg, and no rights."""
    target = cache_directory() / "benchmarks" / DICTIONARY_PACKAGE
    if not (target / "gcide.index").is_file():
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["apt-get", "download", DICTIONARY_PACKAGE], cwd=folder, check=True, capture_output=True)
            package = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
            for name in ("gcide.dict.dz", "gcide.index"):
                (target / name).write_bytes((Path(folder) / "usr/share/dictd" / name).read_bytes())
    return target
