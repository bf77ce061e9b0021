"""Commands about who made an organ and whether to believe it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neurograft.cli.application import EXIT_NO, app, running
from neurograft.cli.arguments import AsJson, Encoding, OrganFile, Overwrite, RemoteCode, Separator, TextColumn
from neurograft.errors import UsageError

if TYPE_CHECKING:
    from neurograft.trust.signers import Signer


@app.command()
def sign(
    organ: Annotated[str, typer.Argument(metavar="ORGAN", help="An organ file (.safetensors).")],
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            help="Private key, PEM, curve P-256, P-384 or P-521; its password is taken from NEUROGRAFT_KEY_PASSWORD. "
            "Left out, Sigstore is asked, which needs a network.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="The key's certificate, PEM, to sign with it.")
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option("--chain", help="Certificates between that and the root, PEM. Repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop the signatures that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sign an organ file, beside the signatures of others, in ORGAN.sig."""
    with running(as_json, "reading the organ") as screen:
        from neurograft.trust import signing, tables

        result = signing.sign(
            organ,
            key=key,
            password=(os.environ.get("NEUROGRAFT_KEY_PASSWORD") or None) if key is not None else None,
            certificate=certificate,
            chain=chain or [],
            overwrite=overwrite,
        )
        screen.result(result, lambda: tables.signed(result))


@app.command()
def verify(
    organ: OrganFile,
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="Public key, PEM, of who should have signed it. Repeatable.")
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", help="Root certificates, PEM, of who should have signed it; with --subject."),
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="What their certificate calls them: an address, a name.")
    ] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", help="Who should have signed it through Sigstore; with --issuer.")
    ] = None,
    issuer: Annotated[str | None, typer.Option("--issuer", help="URL of who says to Sigstore that it is them.")] = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Measure anew what the manifest claims; with --recipient and --data.")
    ] = False,
    recipient: Annotated[
        str | None, typer.Option("--recipient", metavar="MODEL", help="The model to measure claims in.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="Text of the kind that the organ was trained on. Repeatable."),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text, on which nothing should be lost. Repeatable."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0, help="How far a ratio of perplexities may be above the claimed one."),
    ] = 0.05,
    at: Annotated[
        int | None, typer.Option("--at", help="Position to measure at [default: the one that fits best].")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="At most this many tokens of each text.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether an organ is signed by whom it should be, and whether its claims hold; exit status 1 if not."""
    with running(as_json, "reading the organ") as screen:
        from neurograft.progress import evaluation_line
        from neurograft.trust import tables, verifying

        def show(done: int, total: int) -> None:
            screen.say(evaluation_line(done, total))

        result = verifying.verify(
            organ,
            signers=_signers(key or [], certificate, subject, identity, issuer),
            claims=claims,
            recipient=recipient,
            data=data or None,
            general=general or None,
            tolerance=tolerance,
            at=at,
            max_tokens=max_tokens,
            seed=seed,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(result, lambda: tables.verification(result))
    if not result.passed:
        raise typer.Exit(EXIT_NO)


def _signers(
    keys: list[Path], certificate: Path | None, subject: str | None, identity: str | None, issuer: str | None
) -> list[Signer]:
    """Return whom the options name.

    Raises:
        UsageError: A certificate lacks a subject, an identity its issuer, or the other way round.
    """
    from neurograft.trust.signers import Signer

    if (certificate is None) != (subject is None):
        raise UsageError("--certificate says whose certificates count and --subject who among them; give both.")
    if (identity is None) != (issuer is None):
        raise UsageError("--identity is vouched for by --issuer; give both.")
    signers = [Signer(key=key) for key in dict.fromkeys(keys)]
    signers += [Signer(certificate=certificate, subject=subject)] if certificate is not None else []
    return [*signers, *([Signer(identity=identity, issuer=issuer)] if identity is not None else [])]


@app.command()
def card(
    organ: OrganFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Markdown file to write [default: standard output].")
    ] = None,
    provenance: Annotated[
        Path | None,
        typer.Option("--provenance", help="JSON file to write: an in-toto statement of what it was made from."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Render an organ's manifest as a model card, and its provenance as an in-toto statement."""
    with running(as_json, "reading the organ") as screen:
        from rich.text import Text

        from neurograft.trust import describing

        result = describing.card(organ, output=output, provenance=provenance, overwrite=overwrite)
        if output is None and not as_json:
            sys.stdout.write(result.card)  # as it is: a terminal's width is nothing to Markdown
        else:
            screen.result(result, Text(f"the card of {result.organ} is in {output}"))
