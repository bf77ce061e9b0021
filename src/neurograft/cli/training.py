"""Commands that train, or propose what to train."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from neurograft.cli.application import app, running, training_display
from neurograft.cli.arguments import AsJson, Encoding, Model, OrganFile, Overwrite, RemoteCode, Separator, TextColumn
from neurograft.cli.training_options import WithTrainingOptions
from neurograft.errors import UsageError


def _decided_by_plan() -> Collection[str]:
    from neurograft.training.search import DECIDED_BY_PLAN

    return DECIDED_BY_PLAN


def _decided_by_compare() -> Collection[str]:
    from neurograft.training.search import DECIDED_BY_COMPARE

    return DECIDED_BY_COMPARE


def _no_meaning_for_recovery() -> Collection[str]:
    from neurograft.training.search import NO_MEANING_FOR_RECOVERY

    return NO_MEANING_FOR_RECOVERY


@app.command()
@partial(WithTrainingOptions, without=_decided_by_plan)
def plan(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="Domain text, as for train. Repeatable."),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="NAME=AMOUNT",
            help="A limit: tokens, seconds, memory (beyond the model) or bytes (of the file): memory=2GB. Repeatable.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text; else a share of the documents."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many ranges of layers are tried.")] = 6,
    trial_tokens: Annotated[
        int | None,
        typer.Option(
            "--trial-tokens",
            min=1,
            help="Training tokens of each at first [default: a 32nd of the tokens, but 4,096 or at least an eighth].",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report there too, as JSON.")
    ] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Propose layers, how many, mode and protocol for a new organ, and predict what training it costs."""
    with running(as_json, "reading the text") as screen:
        from neurograft import render
        from neurograft.placement import proposal

        report = proposal.plan(
            model,
            data=data,
            budget=budget or [],
            eval_data=eval_data or None,
            trials=trials,
            trial_tokens=trial_tokens,
            output=output,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **options,
        )
        screen.result(report, lambda: render.plan(report))


@app.command()
@WithTrainingOptions
def train(
    organ: OrganFile,
    host: Annotated[str, typer.Option("--host", metavar="MODEL", help="The frozen model around the organ.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Domain text: .txt, .jsonl, .json(.gz/.zst), .parquet, a folder, a Hub dataset. Repeatable.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trained organ file to write (.safetensors).")],
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text; else a share of the documents."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the trained organ.")] = None,
    version: Annotated[str | None, typer.Option("--organ-version", help="Its semantic version.")] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    redact: Annotated[
        bool, typer.Option("--redact", help="Mask personal data in the text first; needs the extra redact.")
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train an organ on domain text inside a frozen host."""
    with running(as_json, "reading the organ") as screen:
        from neurograft import render
        from neurograft.training import protocols

        with training_display(screen) as progress:
            trained = protocols.train(
                organ,
                host=host,
                data=data,
                output=output,
                eval_data=eval_data or None,
                name=name,
                version=version,
                text_column=text_column,
                document_separator=document_separator,
                encoding=encoding,
                redact=redact,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **options,
            )
        screen.result(trained.manifest, lambda: render.manifest(trained.manifest, output.stat().st_size))


@app.command()
@partial(WithTrainingOptions, without=_no_meaning_for_recovery)
def recover(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory that transplant wrote.")],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="General or domain text to train on. Repeatable."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory to write.")],
    organ: Annotated[
        str | None, typer.Option("--organ", metavar="NAME", help="Around which organ, if there are several.")
    ] = None,
    scope: Annotated[
        Literal["organ", "neighbours", "seams"],
        typer.Option(
            "--scope",
            help="What trains: the organ's layers; also layers on each side; or only the vectors (weights of norms, "
            "biases) of its first layer and of the first one behind it.",
        ),
    ] = "organ",
    neighbours: Annotated[
        int | None, typer.Option("--neighbours", help="Layers on each side, for that scope [default: 1].")
    ] = None,
    unfreeze: Annotated[
        Literal["at_once", "gradual"],
        typer.Option(
            "--unfreeze",
            help="gradual: first the organ alone, then one more layer on each side a stage; each stage has an equal "
            "share of the budget.",
        ),
    ] = "at_once",
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text; else a share of the documents."),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text to measure before and after. Repeatable."),
    ] = None,
    save_organ: Annotated[
        Path | None, typer.Option("--save-organ", metavar="FILE", help="Write the recovered organ as well.")
    ] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train an organ where it stands, or what is around it; the original stays restorable to the bit."""
    with running(as_json, "reading the model") as screen:
        from neurograft import recovery, render

        if not directory or not Path(directory).is_dir():
            raise UsageError(f"{directory!r} is no directory; give the one that transplant wrote.")
        with training_display(screen) as progress:
            record = recovery.recover(
                directory,
                data=data,
                output=output,
                organ=organ,
                scope=scope,
                neighbours=neighbours,
                unfreeze=unfreeze,
                eval_data=eval_data or None,
                general=general or None,
                save_organ=save_organ,
                text_column=text_column,
                document_separator=document_separator,
                encoding=encoding,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **options,
            )
        screen.result(record, lambda: render.recovery(record, str(output)))


@app.command()
@partial(WithTrainingOptions, without=_decided_by_compare)
def compare(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The model that is adapted.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Domain text: .txt, .jsonl, .json(.gz/.zst), .parquet, a folder, a Hub dataset. Repeatable.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Training tokens of each measured run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report and the finished runs.")],
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text, on which forgetting shows. Repeatable."),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Test text; else a share of the documents."),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Of organ, insert, standalone, lora, dora, full; separated by commas.")
    ] = "organ,lora,dora,full",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Measured runs of each method.")] = 3,
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Settings tried for each method; 1 for no search.")
    ] = 6,
    search_tokens: Annotated[
        int | None,
        typer.Option("--search-tokens", min=1, help="Training tokens of each trial [default: a quarter of --tokens]."),
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option("--search", metavar="FILE", help="YAML or JSON: METHOD: {SETTING: [VALUE, ...] or {low, high}}."),
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=1, help="Evaluations of the validation text in each measured run.")
    ] = 12,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Compare organs with LoRA, DoRA and full fine-tuning, each tuned as long as the others."""
    with running(as_json, "reading the text") as screen:
        from neurograft import render
        from neurograft.training import comparison

        report = comparison.compare(
            model,
            data=data,
            output=output,
            tokens=tokens,
            general=general or None,
            eval_data=eval_data or None,
            methods=methods,
            seeds=seeds,
            trials=trials,
            search_tokens=search_tokens,
            search=search,
            evaluations=evaluations,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **{name: value for name, value in options.items() if value is not None},
        )
        screen.result(report, lambda: render.comparison(report, str(output)))
