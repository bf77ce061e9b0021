"""Studies: commands that ask a question about the method again, on one's own model and text."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from neurograft.cli.application import app, running
from neurograft.cli.arguments import AsJson, Encoding, Model, Overwrite, RemoteCode, Separator, TextColumn
from neurograft.cli.training_options import WithTrainingOptions
from neurograft.errors import UsageError

study = typer.Typer(
    name="study", help="Ask one of the method's questions again, on your own model and text.", no_args_is_help=True
)
app.add_typer(study)


def _decided() -> Collection[str]:
    from neurograft.training.search import DECIDED_BY_STUDY

    return DECIDED_BY_STUDY


@study.command(name="cross-domain")
@partial(WithTrainingOptions, without=_decided)
def cross_domain(
    model: Model,
    domain: Annotated[
        list[str],
        typer.Option(
            "--domain",
            metavar="NAME=PATH",
            help="Text that an organ is trained on before. Repeatable.",
        ),
    ],
    data: Annotated[
        list[str], typer.Option("--data", metavar="PATH", help="Text of the small target domain. Repeatable.")
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Training tokens of each run on the target text.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report and the finished runs.")],
    organ_tokens: Annotated[
        int | None, typer.Option("--organ-tokens", min=1, help="Training tokens of each organ [default: --tokens].")
    ] = None,
    target_tokens: Annotated[
        int, typer.Option("--target-tokens", min=1, help="How much of the target text there is to train on, about.")
    ] = 20_000,
    layers: Annotated[int, typer.Option("--layers", min=1, help="How many layers an organ has.")] = 3,
    at: Annotated[
        int | None, typer.Option("--at", min=0, help="Position of the inserted layers [default: a third of the way].")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How often each is repeated.")] = 3,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=1, help="How many times both losses are measured in each run.")
    ] = 8,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text of the target; else a share of its documents."),
    ] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Ask whether organs from other domains regularise: the gap between training and held-out text, with controls."""
    with running(as_json, "reading the text") as screen:
        from neurograft import render
        from neurograft.study.cross_domain import study_cross_domain

        report = study_cross_domain(
            model,
            domains=_named(domain),
            target=data,
            output=output,
            tokens=tokens,
            organ_tokens=organ_tokens,
            target_tokens=target_tokens,
            layers=layers,
            at=at,
            seeds=seeds,
            evaluations=evaluations,
            eval_data=eval_data or None,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **options,
        )
        screen.result(report, lambda: render.cross_domain(report, str(output)))


def _decided_by_paper() -> Collection[str]:
    from neurograft.training.search import DECIDED_BY_PAPER

    return DECIDED_BY_PAPER


@study.command()
@partial(WithTrainingOptions, without=_decided_by_paper)
def paper(
    model: Model,
    domain: Annotated[
        list[str],
        typer.Option("--domain", metavar="NAME=PATH", help="A domain's text; give at least two domains. Repeatable."),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Training tokens of everything together.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report and all that is finished.")],
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Text of no domain, on which forgetting shows. Repeatable."),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="How many layers an organ has.")] = 3,
    positions: Annotated[int, typer.Option("--positions", min=2, help="How many positions are tried, evenly.")] = 7,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each method and arm.")] = 3,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Settings tried for each method compared.")] = 3,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Ask the paper's five questions, within a budget of training tokens: one report, published figures beside."""
    with running(as_json, "reading the text") as screen:
        from neurograft import render
        from neurograft.study.paper import study_paper

        report = study_paper(
            model,
            domains=_named(domain),
            output=output,
            tokens=tokens,
            general=general or None,
            layers=layers,
            positions=positions,
            seeds=seeds,
            trials=trials,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **options,
        )
        screen.result(report, lambda: render.paper(report, str(output)))


def _named(given: list[str]) -> dict[str, list[str]]:
    """Group `NAME=PATH` arguments by name.

    Raises:
        UsageError: One has no name or no path.
    """
    found: dict[str, list[str]] = {}
    for each in given:
        name, _, path = each.partition("=")
        if not name or not path:
            raise UsageError(f"{each!r} names no domain and path; write NAME=PATH, such as clinical=reports/.")
        found.setdefault(name, []).append(path)
    return found
