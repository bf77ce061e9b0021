"""Commands that put organs into models and take them out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neurograft.cli.application import app, running
from neurograft.cli.arguments import (
    AsJson,
    AtEach,
    LinkOption,
    ModeEach,
    OrganFiles,
    Overwrite,
    Recipient,
    RemoteCode,
    modes,
)
from neurograft.errors import UsageError


@app.command()
def transplant(
    organs: OrganFiles,
    recipient: Recipient,
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory to write.")],
    at: AtEach = None,
    mode: ModeEach = None,
    link: LinkOption = "auto",
    verify: Annotated[
        Literal["auto", "written", "bytes", "layers"],
        typer.Option(
            "--verify",
            help="Digest what is written, also what is linked, also ask every layer; auto: the latter where it fits "
            "easily.",
        ),
    ] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Put one or several organs into a copy of a recipient: a new plain transformers directory."""
    with running(as_json, "reading the organ") as screen:
        from neurograft import render, transplantation

        record = transplantation.transplant(
            organs,
            recipient,
            at=at or None,
            mode=modes(mode),
            output=output,
            link=link,
            verify=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(record, lambda: render.record(record, str(output), len(organs)))


@app.command()
def remove(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory that transplant wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory to write.")],
    organ: Annotated[
        str | None, typer.Option("--organ", metavar="NAME", help="Which organ, if there are several.")
    ] = None,
    link: LinkOption = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Take an organ out again, and prove by digest that the original is back."""
    with running(as_json, "reading the model") as screen:
        from neurograft import removal, render

        if not directory or not Path(directory).is_dir():
            raise UsageError(f"{directory!r} is no directory; give the one that transplant wrote.")
        result = removal.remove(
            directory, organ=organ, output=output, link=link, overwrite=overwrite, trust_remote_code=trust_remote_code
        )
        screen.result(result, lambda: render.removal(result))
