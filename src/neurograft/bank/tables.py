"""What the bank's verbs return, as people read it."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from neurograft import render
from neurograft.bank.entries import BankList, Changed, Pulled, Pushed, Versions
from neurograft.files import human_bytes


def pushed(result: Pushed) -> RenderableType:
    """Render what `push` did."""
    entry = result.entry
    state = "was there already, with the same bytes" if result.already_there else "pushed"
    if result.restored:
        state = "was there already, and its file, which was lost or damaged, was sent again"
    rows = [("bank", result.bank), ("version", f"{entry.version}, {state}"), ("size", human_bytes(entry.size))]
    rows += [("tags", ", ".join(result.tags))] if result.tags else []
    return render.facts(f"organ {entry.name}", [*rows, ("SHA-256", entry.sha256)])


def pulled(result: Pulled) -> RenderableType:
    """Render what `pull` did."""
    entry = result.entry
    rows = [("from", result.bank), ("version", entry.version), ("file", f"{result.path}, {human_bytes(entry.size)}")]
    rows += [("yanked", result.yanked)] if result.yanked is not None else []
    return render.facts(f"organ {entry.name}", [*rows, ("SHA-256", entry.sha256)])


def bank_list(result: BankList) -> RenderableType:
    """Render what `list` found."""
    if not result.organs:
        return Text(f"{result.bank} holds no organs")
    table = Table(title=Text(result.bank), title_justify="left")
    for column in ("organ", "newest", "versions", "tags"):
        table.add_column(column, overflow="fold")
    for organ in result.organs:
        tags = ", ".join(f"{tag} = {version}" for tag, version in sorted(organ.tags.items()))
        table.add_row(organ.name, organ.newest or "all yanked", str(organ.versions), tags)
    return table


def versions(result: Versions) -> RenderableType:
    """Render what `versions` found."""
    table = Table(title=Text(f"{result.bank}: {result.name}"), title_justify="left")
    for column in ("version", "tags", "size", "pushed", "SHA-256"):
        table.add_column(column, overflow="fold")
    for version in result.versions:
        state = version.version if version.yanked is None else f"{version.version}, yanked: {version.yanked}"
        tags = ", ".join(version.tags)
        table.add_row(Text(state), tags, human_bytes(version.size), version.pushed, version.sha256[:12])
    return table


def changed(result: Changed) -> RenderableType:
    """Render what `tag` or `yank` did."""
    if result.tag is not None:
        return Text(f"{result.tag} stands for {result.name} {result.version} in {result.bank}")
    state = "may be taken again" if result.yanked is None else f"was yanked: {result.yanked}"
    return Text(f"{result.name} {result.version} in {result.bank} {state}")
