"""Deployments as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from neurograft.deployment.deploying import DeploymentReport
    from neurograft.deployment.entries import Entry
    from neurograft.deployment.rolling_back import DeploymentHistory, Rollback


def deployed(report: DeploymentReport) -> RenderableType:
    """Render what a deployment found, gate by gate, and what came of it."""
    gates = [
        Text(
            f"{'passed' if gate.passed else 'FAILED'}  {gate.name}: {gate.reason}",
            style="green" if gate.passed else "bold red",
        )
        for gate in report.gates
    ]
    if report.deployed:
        end = f"deployed {report.version} to {report.directory} (before: {report.before or 'nothing'})"
    else:
        end = f"not deployed: {report.version}; {report.directory} is as before, at {report.current or 'nothing'}"
    return Group(*gates, Text(end))


def history(found: DeploymentHistory) -> RenderableType:
    """Render a history: a row for each entry."""
    table = Table(title=f"{found.directory}: {found.current} is deployed", title_justify="left")
    for column in ("entry", "when (UTC)", "who", "what", "version", "gates", "digest"):
        table.add_column(column)
    for entry in found.entries:
        cells = [str(entry.number), entry.when[:19], entry.operator, _what(entry), entry.version]
        table.add_row(*map(Text, [*cells, f"{len(entry.gates)} passed" if entry.gates else "", entry.digest[:12]]))
    notes = [f"last entry's digest: {found.head}"]
    if found.torn_bytes:
        notes.append(
            f"the last line is unfinished ({found.torn_bytes} bytes): a process was killed while writing it; the next "
            "deployment or rollback takes it off and says so"
        )
    if found.unfinished:
        notes.append(f"the switch to {found.unfinished} is not done yet; the next deployment or rollback finishes it")
    if found.verified:
        notes.append(f"verified: {', '.join(found.verified)}")
    return Group(table, *map(Text, notes))


def _what(entry: Entry) -> str:
    organ = f" {entry.organ.name} {entry.organ.version}" if entry.organ else ""
    return f"{entry.action}{organ}"


def rolled_back(result: Rollback) -> RenderableType:
    """Render where a rollback led."""
    return Text(
        f"{result.directory}: back from {result.before} to {result.current} in {result.seconds:.3f} s; "
        f"{result.files} files verified, {len(result.read)} of them read"
    )
