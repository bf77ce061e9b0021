"""Commands that measure models and organs, and show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from neurograft.cli.application import EXIT_NO, app, running
from neurograft.cli.arguments import (
    AsJson,
    AtEach,
    Encoding,
    ModeEach,
    Model,
    OrganFile,
    OrganFiles,
    Overwrite,
    Recipient,
    RemoteCode,
    Separator,
    TextColumn,
    modes,
)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="NAME=PATH", help="A data set and its name. Repeatable; one name twice is one data set."
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="A model to stand beside it.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Such as 'domain<=0.9*baseline'; exit status 1 if one fails. Repeatable."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in a window [default: 512, or as many as the models take]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="At most this many tokens of each data set.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on named data sets, beside a baseline, and hold it against gates."""
    with running(as_json, "reading the text") as screen:
        from neurograft import evaluation, render
        from neurograft.progress import evaluation_line

        def show(done: int, total: int) -> None:
            screen.say(evaluation_line(done, total))

        report = evaluation.evaluate(
            model,
            data=evaluation.parse_data_arguments(data),
            baseline=baseline,
            gates=gate or [],
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(report, lambda: render.evaluation(report))
    if report.passed is False:
        raise typer.Exit(EXIT_NO)


@app.command()
def scan(
    organ: OrganFile,
    recipient: Recipient,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="Domain text that the organ has not seen. Repeatable."),
    ],
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text, on which forgetting shows. Repeatable."),
    ] = None,
    modes: Annotated[str, typer.Option("--modes", help="replace, insert, or both.")] = "replace,insert",
    positions: Annotated[
        str | None,
        typer.Option("--positions", help="START:STOP, START:STOP:STEP (half-open from 0) or 3,5,8 [default: all]."),
    ] = None,
    prune: Annotated[
        Literal["halving", "evidence", "never"],
        typer.Option(
            "--prune",
            help="Who drops out between rounds: all but the better half; only places told apart from the best; nobody.",
        ),
    ] = "halving",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of each text in the whole sample, at most.")
    ] = 32_768,
    budget_seconds: Annotated[
        float | None, typer.Option("--budget-seconds", help="Stop after about so many seconds of measuring.")
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option("--budget-tokens", min=1, help="Run at most so many tokens, each counted once for each place."),
    ] = None,
    recover_tokens: Annotated[
        int | None,
        typer.Option(
            "--recover-tokens", min=1, help="Train the organ at each place on so many tokens before it is measured."
        ),
    ] = None,
    recover_data: Annotated[
        list[str] | None,
        typer.Option("--recover-data", metavar="PATH", help="Text for that; else half of the documents. Repeatable."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in a window [default: 512, or as many as the recipient takes]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of sample, bootstrap and recovery.")] = 0,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="This process, or workers of a Ray cluster (the extra neurograft[ray])."),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Ray workers [default: as many as there are cores here].")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of a Ray cluster: auto or HOST:PORT [default: one is started here]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report there too, as JSON.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Write curve and best place into the organ's file, as what it recommends."),
    ] = False,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure an organ at every position of a recipient, in both modes, at the price of a few evaluations."""
    with running(as_json, "reading the organ") as screen:
        from neurograft import render
        from neurograft.placement import scan as scanning
        from neurograft.progress import scan_line

        def show(progress: Any) -> None:
            screen.say(scan_line(progress))

        report = scanning.scan(
            organ,
            recipient,
            data=data,
            general=general or None,
            modes=modes,
            positions=positions,
            prune=prune,
            max_tokens=max_tokens,
            budget_seconds=budget_seconds,
            budget_tokens=budget_tokens,
            recover_tokens=recover_tokens,
            recover_data=recover_data or None,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            engine=engine,
            workers=workers,
            address=address,
            output=output,
            record=record,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(report, lambda: render.scan(report))


@app.command()
def compose(
    organs: OrganFiles,
    recipient: Recipient,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=PATH",
            help="A domain's text and its name. Repeatable; one name twice is one domain.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Text of no organ's domain. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Markdown report to write (.md).")
    ] = None,
    at: AtEach = None,
    mode: ModeEach = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in a window [default: 512, or as many as the model takes]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="At most this many tokens of each data set.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether several organs go together, and what each does alone and beside the others; exit status 1 if not."""
    with running(as_json, "reading the organs") as screen:
        from neurograft import composition, render
        from neurograft.evaluation import parse_data_arguments
        from neurograft.progress import evaluation_line

        def show(done: int, total: int) -> None:
            screen.say(evaluation_line(done, total))

        report = composition.compose(
            organs,
            recipient,
            at=at or None,
            mode=modes(mode),
            data=parse_data_arguments(data) if data else None,
            general=general or None,
            output=output,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        document = {**report.model_dump(mode="json"), "blocked": report.blocked}
        screen.result(document, lambda: render.composition(report))
    if report.blocked:
        raise typer.Exit(EXIT_NO)


@app.command()
def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Organ files, transplanted models, comparisons, studies, and what plan, scan or evaluate print "
            "with --json.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    title: Annotated[str | None, typer.Option("--title", help="Title of the page.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text that the models go on with. Repeatable.")
    ] = None,
    recipient: Annotated[
        str | None, typer.Option("--recipient", metavar="MODEL", help="A model that goes on with the prompts before.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="At most so many new tokens for each prompt.")] = 60,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page with pictures about organs, transplanted models and measurements."""
    with running(as_json, "reading the sources") as screen:
        from neurograft import render
        from neurograft.reporting import writing

        written = writing.report(
            sources,
            output=output,
            title=title,
            prompts=prompt or [],
            recipient=recipient,
            tokens=tokens,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(written, lambda: render.report(written))
