"""What the verbs about trust return, as people read it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neurograft import render
from neurograft.trust.claims import Claim, ClaimsReport
from neurograft.trust.signing import Signed
from neurograft.trust.verifying import Verification

_COLOURS = {"holds": "green", "fails": "bold red", "open": "yellow", "not measured": "dim"}


def signed(result: Signed) -> RenderableType:
    """Render what `sign` did."""
    rows = [("signed by", result.signer), ("signatures", f"{result.path}, {len(result.signers)}")]
    return render.facts(f"organ {result.organ}", [*rows, ("SHA-256", result.sha256)])


def verification(result: Verification) -> RenderableType:
    """Render what `verify` found."""
    parts: list[RenderableType] = [Text(f"organ {result.organ}", style="bold underline")]
    for each in result.signatures:
        state = f"holds: {each.name}" if each.holds else f"does not count: {each.reason}"
        parts.append(Text(f"{each.signer}  {state}", style="green" if each.holds else "yellow"))
    if result.trusted is not None:
        told = any(each.reason == result.refusal for each in result.signatures)  # right above
        said = "trusted" if result.trusted else "not trusted" if told else f"not trusted: {result.refusal}"
        parts.append(Text(said, style="bold green" if result.trusted else "bold red"))
    if result.claims is not None:
        parts += [_claims(result.claims), render.evaluation(result.claims.evaluation)]
    return Group(*parts)


def _claims(report: ClaimsReport) -> RenderableType:
    title = Text(f"claims, measured in {report.recipient}, {report.mode} at {report.position}")
    table = Table(title=title, title_justify="left", caption=_caption(report), caption_justify="left")
    for column in ("claim", "where", "claimed", "measured", "verdict"):
        table.add_column(column, overflow="fold", justify="right" if column in ("claimed", "measured") else "left")
    for claim in report.claims:
        cells = [claim.kind, claim.source, f"{claim.claimed:.3f}", _measured(claim)]
        table.add_row(*map(Text, cells), Text(claim.verdict, style=_COLOURS[claim.verdict]))
    return table


def _measured(claim: Claim) -> str:
    return "" if claim.measured is None else f"{claim.measured:.3f} [{claim.low:.3f}, {claim.high:.3f}]"


def _caption(report: ClaimsReport) -> Text:
    text = f"perplexity with the organ over that without; a claim holds up to {report.tolerance:.0%} above it"
    if any(claim.verdict == "open" for claim in report.claims):
        text += "; open: the interval is too wide to tell, give more text"
    if any(claim.verdict == "not measured" for claim in report.claims):
        text += "; not measured: give --general"
    if "general" in report.evaluation.data and all(claim.kind != "retention" for claim in report.claims):
        text += "; the manifest claims nothing of general text, which is measured below all the same"
    return Text(text)
