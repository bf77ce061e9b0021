"""Commands on organs in banks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neurograft.cli.application import app, running
from neurograft.cli.arguments import AsJson, InBank, OrganFile, Overwrite


@app.command()
def push(
    organ: OrganFile,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A folder, any fsspec URL, hf://org/repo or oci://registry/name:tag; perhaps :NAME."
        ),
    ],
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="A tag that shall stand for this version. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put an organ into a bank, as the version that its manifest gives; versions never change."""
    with running(as_json, "reading the organ") as screen:
        from neurograft.bank import moving, tables

        result = moving.push(organ, target, tags=tag or [])
        screen.result(result, lambda: tables.pushed(result))


@app.command()
def pull(
    organ: InBank,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Organ file to write [default: NAME-VERSION.safetensors]."),
    ] = None,
    allow_yanked: Annotated[
        bool, typer.Option("--allow-yanked", help="Take a version that was yanked, if it is named.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take an organ file out of a bank, verified by digest; an interrupted pull goes on."""
    with running(as_json, "asking the bank") as screen:
        from neurograft.bank import moving, tables

        result = moving.pull(organ, output=output, allow_yanked=allow_yanked, overwrite=overwrite)
        screen.result(result, lambda: tables.pulled(result))


@app.command(name="list")
def list_organs(
    bank: Annotated[
        str, typer.Argument(metavar="BANK", help="A folder, any fsspec URL, hf://org or oci://registry/path.")
    ],
    as_json: AsJson = False,
) -> None:
    """List the organs in a bank."""
    with running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.list_organs(bank)
        screen.result(result, lambda: tables.bank_list(result))


@app.command()
def versions(organ: InBank, as_json: AsJson = False) -> None:
    """List every version of an organ in a bank."""
    with running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.versions(organ)
        screen.result(result, lambda: tables.versions(result))


@app.command()
def tag(
    organ: InBank,
    name: Annotated[str, typer.Argument(metavar="TAG", help="Such as stable.")],
    as_json: AsJson = False,
) -> None:
    """Let a tag stand for a version of an organ in a bank."""
    with running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.tag(organ, name)
        screen.result(result, lambda: tables.changed(result))


@app.command()
def yank(
    organ: InBank,
    reason: Annotated[str, typer.Option("--reason", help="Why, for everyone who asks for the version.")] = (
        "no reason given"
    ),
    undo: Annotated[bool, typer.Option("--undo", help="Let the version be taken again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take a version back: it stays in the bank, but nothing takes it any more unless told to."""
    with running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.yank(organ, reason=reason, undo=undo)
        screen.result(result, lambda: tables.changed(result))
