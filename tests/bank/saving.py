"""Versions of an organ, for the tests of all kinds of banks."""

from __future__ import annotations

from pathlib import Path

from neurograft.organ import Organ


def save_version(organ: Organ, folder: Path, version: str, description: str | None = None) -> Path:
    """Save an organ as a version, with a description that makes its bytes others; return its file."""
    path = folder / f"{version}-{description}.safetensors"
    update = {"version": version, "description": description}
    Organ(organ.manifest.model_copy(update=update), organ.tensors).save(path, overwrite=True)
    return path
