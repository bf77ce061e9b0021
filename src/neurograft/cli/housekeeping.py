"""Commands about neurograft itself: what it keeps, and what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neurograft.cli.application import EXIT_NO, app, running
from neurograft.cli.arguments import AsJson


@app.command()
def cache(
    clear: Annotated[
        Literal["gguf", "prefix", "scan", "studies", "organs", "demo", "arithmetic", "all"] | None,
        typer.Option("--clear", help="Delete this kind."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is kept to save time (dequantised models, hidden states below organs), or clear it."""
    with running(as_json, "reading the cache") as screen:
        from neurograft import caching, render

        report = caching.cache(clear=clear)
        screen.result(report, lambda: render.cache(report))


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter run, under 90 seconds, with smaller gains.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where to leave the demo's files [default: a temporary folder]."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Play the whole story on a real model: a hospital trains an organ, another site tries it and removes it."""
    with running(as_json, "looking for the packaged model and text") as screen:
        from neurograft import demonstration as story

        report = story.demo(quick=quick, folder=folder, show=None if as_json else screen.out.print)
        screen.result(report, lambda: story.closing_table(report))
    if not report.passed:
        raise typer.Exit(EXIT_NO)
