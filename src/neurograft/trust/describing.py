"""Papers of an organ: its model card, as on the Hub, and its provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from neurograft.bank.card import model_card
from neurograft.errors import UsageError
from neurograft.files import atomic_file, check_output_file
from neurograft.organ import organ_path, read_manifest
from neurograft.trust.provenance import provenance as provenance_of


class Card(BaseModel):
    """What `card` made."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organ: str
    card: str
    """Markdown with YAML in front, as the Hub takes it."""
    output: str | None
    """The file that it was written to."""
    provenance: dict[str, Any] | None
    """The in-toto statement, if it was asked for."""


def card(
    organ: str | Path,
    *,
    output: str | Path | None = None,
    provenance: str | Path | None = None,
    overwrite: bool = False,
) -> Card:
    """Render an organ's manifest as a model card, and its provenance as an in-toto statement.

    Args:
        organ: The path of an organ file, or a reference to one in a bank.
        output: The Markdown file to write; left out, the card is returned only.
        provenance: The JSON file to write the statement to, if there shall be one; see `neurograft.trust.provenance`.
        overwrite: Whether existing files may be replaced.

    Raises:
        OrganFileError: The file is no organ, or was altered.
        UsageError: An output exists, or both are one file.
        TrustError: There are signatures that can't be read.
    """
    path = organ_path(organ)
    outputs = [Path(file) for file in (output, provenance) if file is not None]
    for file in outputs:
        check_output_file(file, overwrite=overwrite, inputs=[path])
    if len({file.resolve() for file in outputs}) < len(outputs):
        raise UsageError(f"the card and the provenance would both be {outputs[0]}; give each a file of its own.")
    manifest = read_manifest(path)
    text = model_card(manifest, str(organ))
    statement = None if provenance is None else provenance_of(path)
    if output is not None:
        _write(Path(output), text, overwrite)
    if provenance is not None:
        _write(Path(provenance), json.dumps(statement, indent=2) + "\n", overwrite)
    return Card(organ=manifest.name, card=text, output=None if output is None else str(output), provenance=statement)


def _write(path: Path, text: str, overwrite: bool) -> None:
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
