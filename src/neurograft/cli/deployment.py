"""Commands that deploy models with organs, and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neurograft.cli.application import EXIT_NO, app, running
from neurograft.cli.arguments import AsJson, At, LinkOption, ModeOption, RemoteCode

Deployment = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A folder that deploy made.")]


@app.command()
def deploy(
    to: Annotated[
        Path, typer.Option("--to", metavar="MODEL_DIR", help="Deployment folder; its link `current` is what to serve.")
    ],
    organ: Annotated[
        str | None,
        typer.Argument(metavar="ORGAN", help="An organ file (.safetensors), or one in a bank: BANK:NAME@VERSION."),
    ] = None,
    gate: Annotated[
        Path | None, typer.Option("--gate", metavar="GATES.yaml", help="What has to hold before anything is switched.")
    ] = None,
    recipient: Annotated[
        str | None,
        typer.Option("--recipient", metavar="MODEL", help="At the first deployment: the model to start from."),
    ] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="NAME", help="Take this organ out, instead of putting one in.")
    ] = None,
    at: At = None,
    mode: ModeOption = None,
    link: LinkOption = "auto",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another operator who is deploying there, instead of failing.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Put an organ into what is deployed, or take one out; switch to the result if its gates hold."""
    with running(as_json, "reading the gates") as screen:
        from neurograft.deployment import deploying, tables
        from neurograft.progress import evaluation_line

        def show(done: int, total: int) -> None:
            screen.say(evaluation_line(done, total))

        report = deploying.deploy(
            organ,
            to=to,
            gates=gate,
            recipient=recipient,
            remove=remove,
            at=at,
            mode=mode,
            link=link,
            wait=wait,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(report, lambda: tables.deployed(report))
    if not report.deployed:
        raise typer.Exit(EXIT_NO)


@app.command()
def history(
    directory: Deployment,
    verify: Annotated[
        Literal["quick", "full"] | None,
        typer.Option("--verify", help="Also check the versions' files: what changed by size or time, or all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what was deployed, and check the chain of digests."""
    with running(as_json, "reading the history") as screen:
        from neurograft.deployment import rolling_back, tables

        found = rolling_back.history(directory, verify=verify)
        screen.result(found, lambda: tables.history(found))


@app.command()
def rollback(
    directory: Deployment,
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="N", help="Number of the version [default: what the present one was built on]."),
    ] = None,
    verify: Annotated[
        Literal["quick", "full"],
        typer.Option("--verify", help="Read small files and those whose size, time or inode changed, or read all."),
    ] = "quick",
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier version that passed its gates, verified by digest."""
    with running(as_json, "reading the history") as screen:
        from neurograft.deployment import rolling_back, tables

        result = rolling_back.rollback(directory, to=to, verify=verify)
        screen.result(result, lambda: tables.rolled_back(result))
