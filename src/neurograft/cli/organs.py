"""Commands on organs as files: take one out of a model, look at it, ask whether it fits, merge several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neurograft.cli.application import EXIT_NO, app, running
from neurograft.cli.arguments import (
    AsJson,
    At,
    Model,
    ModeOption,
    OrganFile,
    OrganFiles,
    Overwrite,
    Recipient,
    RemoteCode,
)
from neurograft.errors import UsageError


@app.command()
def extract(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Organ file to write (.safetensors).")],
    layers: Annotated[
        str, typer.Option("--layers", help="START:STOP, half-open from 0, or auto: three from floor(L/3).")
    ] = "auto",
    name: Annotated[str | None, typer.Option("--name", help="Name of the organ.")] = None,
    version: Annotated[str, typer.Option("--organ-version", help="Its semantic version.")] = "0.1.0",
    license: Annotated[str | None, typer.Option("--license", help="Its licence, such as Apache-2.0.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="One line about it.")] = None,
    verify: Annotated[
        Literal["auto", "bytes", "layers"],
        typer.Option(
            "--verify", help="Copy bytes, or also run the layers and keep their answers; auto: where it fits easily."
        ),
    ] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Take a contiguous range of decoder layers out of a model, as one organ file."""
    with running(as_json, "reading the model") as screen:
        from neurograft import extraction, render

        organ = extraction.extract(
            model,
            layers=layers,
            output=output,
            name=name,
            version=version,
            license=license,
            description=description,
            verify=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(organ.manifest, lambda: render.manifest(organ.manifest, output.stat().st_size))


@app.command()
def inspect(organ: OrganFile, as_json: AsJson = False) -> None:
    """Show an organ's manifest, after checking the file's digest."""
    with running(as_json, "reading the organ") as screen:
        from neurograft import render
        from neurograft.organ import organ_path, read_manifest

        path = organ_path(organ)
        manifest = read_manifest(path)
        screen.result(manifest, lambda: render.manifest(manifest, path.stat().st_size))


@app.command()
def check(
    organ: OrganFile,
    recipient: Recipient,
    at: At = None,
    mode: ModeOption = None,
    alignment: Annotated[
        Literal["auto", "measure", "skip"],
        typer.Option(
            "--alignment",
            help="Whether to compare hidden states at every position, for which the recipient is loaded; auto: where "
            "the organ has a sketch of them and the recipient is small for the machine.",
        ),
    ] = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether an organ fits a recipient, and where; exit status 1 if something blocks."""
    with running(as_json, "reading the organ") as screen:
        from neurograft import compat, render

        report = compat.check(
            organ, recipient, at=at, mode=mode, alignment=alignment, trust_remote_code=trust_remote_code
        )
        document = {**report.model_dump(mode="json"), "blocked": report.blocked}
        screen.result(document, lambda: render.check_report(report))
    if report.blocked:
        raise typer.Exit(EXIT_NO)


@app.command()
def merge(
    organs: OrganFiles,
    output: Annotated[Path, typer.Option("-o", "--output", help="Merged organ file to write (.safetensors).")],
    method: Annotated[
        Literal["average", "ties", "dare"],
        typer.Option("--method", help="Mean of the weights, or of what training added: TIES, DARE."),
    ] = "average",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W...", help="How much each organ counts, separated by commas."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL|ORGAN", help="What the organs were made from, untrained; for ties and dare."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share that is kept [default: ties 0.2, dare 0.5].")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Multiplies what is added to the base [default: 1].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of what dare drops [default: 0].")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the merged organ.")] = None,
    version: Annotated[str, typer.Option("--organ-version", help="Its semantic version.")] = "0.1.0",
    license: Annotated[str | None, typer.Option("--license", help="Its licence [default: those of all].")] = None,
    description: Annotated[str | None, typer.Option("--description", help="One line about it.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge organs that were made from the same layers into one organ that names its parents."""
    with running(as_json, "reading the organs") as screen:
        from neurograft import merging, render

        merged = merging.merge(
            organs,
            output=output,
            method=method,
            weights=_numbers(weights),
            base=base,
            density=density,
            scale=scale,
            seed=seed,
            name=name,
            version=version,
            license=license,
            description=description,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(merged.manifest, lambda: render.manifest(merged.manifest, output.stat().st_size))


def _numbers(text: str | None) -> list[float] | None:
    """Read numbers separated by commas.

    Raises:
        UsageError: One is no number.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"the weights {text!r} can't be read; write numbers separated by commas.") from error
