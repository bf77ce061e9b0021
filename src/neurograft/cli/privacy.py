"""Commands that find out what an organ gives away of its training text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neurograft.cli.application import app, running
from neurograft.cli.arguments import (
    AsJson,
    At,
    Encoding,
    ModeOption,
    OrganFile,
    Overwrite,
    RemoteCode,
    Separator,
    TextColumn,
)


@app.command()
def audit(
    organ: OrganFile,
    host: Annotated[
        str, typer.Option("--host", metavar="MODEL", help="The model around the organ, best the one it was trained in.")
    ],
    members: Annotated[
        list[str],
        typer.Option("--members", metavar="PATH", help="What the organ was trained on: its --data. Repeatable."),
    ],
    non_members: Annotated[
        list[str],
        typer.Option("--non-members", metavar="PATH", help="Text of the same kind that it has not seen. Repeatable."),
    ],
    canaries: Annotated[
        Path | None, typer.Option("--canaries", metavar="FILE", help="Secret file of plant, if those were trained on.")
    ] = None,
    at: At = None,
    mode: ModeOption = None,
    prefix: Annotated[
        int, typer.Option("--prefix", min=1, help="Tokens that are given, at least, before a document is recited.")
    ] = 32,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens in a row that must be recited.")] = 32,
    delta: Annotated[
        float, typer.Option("--delta", help="Of the differential privacy that canaries put to the test.")
    ] = 1e-5,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", min=2, help="Tokens in a window [default: 512, or what the host takes]."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    max_documents: Annotated[
        int | None, typer.Option("--max-documents", min=2, help="At most so many members and so many others.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the figures, and no text, into the organ's own file.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of what is drawn and of the bootstrap.")] = 0,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Find out by attacks whether an organ gives away its training text."""
    with running(as_json, "reading the text") as screen:
        from neurograft.privacy import auditing, rendering
        from neurograft.progress import evaluation_line

        def show(done: int, total: int) -> None:
            screen.say(evaluation_line(done, total))

        report = auditing.audit(
            organ,
            host=host,
            members=members,
            non_members=non_members,
            canaries=canaries,
            at=at,
            mode=mode,
            prefix=prefix,
            length=length,
            delta=delta,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_documents=max_documents,
            record=record,
            seed=seed,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(report, lambda: rendering.audit(report))


@app.command()
def plant(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Canaries to train on (.jsonl): one more --data of train.")
    ],
    canaries: Annotated[
        Path, typer.Option("--canaries", metavar="FILE", help="Secret file to write (.json), for audit afterwards.")
    ],
    count: Annotated[
        int, typer.Option("--count", min=10, help="How many; a coin is tossed for each, and half are trained on.")
    ] = 1000,
    template: Annotated[
        str, typer.Option("--template", help="What they look like; {} stands for 24 random digits.")
    ] = "The reference number of this file is {}.",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often each is in the file to train on.")] = 1,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="For tests [default: randomness that nobody can repeat].")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make canaries: sentences to train on, of which audit shows afterwards how well they are remembered."""
    with running(as_json, "tossing coins") as screen:
        from neurograft.privacy.canaries import plant as make
        from neurograft.privacy.rendering import planted

        made = make(
            output,
            canaries=canaries,
            count=count,
            template=template,
            repeats=repeats,
            seed=seed,
            overwrite=overwrite,
        )
        summary = {
            "output": str(output),
            "canaries": str(canaries),
            "count": len(made.canaries),
            "included": len(made.included),
            "repeats": made.repeats,
        }
        screen.result(summary, lambda: planted(summary))
