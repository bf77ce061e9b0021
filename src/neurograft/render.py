"""Results as people read them: tables and panels for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neurograft.files import human_bytes
from neurograft.privacy.rendering import audit_rows, privacy_line, redaction_line

if TYPE_CHECKING:
    from neurograft.alignment import AlignmentCurve
    from neurograft.caching import CacheReport
    from neurograft.compat import CheckReport
    from neurograft.composition_report import CompositionReport
    from neurograft.evaluation import EvaluationReport
    from neurograft.manifest import Manifest, SurgicalRecord
    from neurograft.placement.plan_results import PlanReport, Proposal
    from neurograft.placement.results import Place, ScanReport
    from neurograft.removal import Removal
    from neurograft.reporting.writing import ReportWritten
    from neurograft.study.paper_results import PaperReport
    from neurograft.study.results import CrossDomainReport
    from neurograft.training.comparison_results import Comparison

_VERIFIED = {
    "written": "planned without weights, every byte that was written digested",
    "bytes": "planned without weights, every byte digested",
    "layers": "planned without weights, every byte digested, every layer's answers and the KV cache compared",
}
_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = {"blocks": "bold red", "risks": "yellow", "notes": "dim"}


def facts(title: str, rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Render names and values in two columns; a digest fits beside its name in 80 columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return Group(Text(title, style="bold underline"), table)


def manifest(organ: Manifest, size: int | None = None) -> RenderableType:
    """Render an organ's manifest."""
    source, training = organ.source, organ.training
    config = organ.anatomy.config
    widths = [
        f"{name} {config[name]}"
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        if config.get(name)
    ]
    rows = [
        ("version", organ.version),
        ("kind", organ.kind),
        (
            "layers",
            f"{organ.layer_count}, from {source.layer_start}:{source.layer_stop} of the {source.layer_count} of "
            f"{source.model}",
        ),
        ("architecture", ", ".join([organ.anatomy.model_type, *widths, organ.anatomy.dtype])),
        ("goes", f"{organ.recommended_mode} at position {organ.recommended_position} (recommended)"),
    ]
    if size is not None:
        rows.append(("size", human_bytes(size)))
    for name, value in (("licence", organ.license), ("about", organ.description)):
        if value:
            rows.append((name, value))
    if (merged := organ.merge_line()) is not None:
        rows.append(("merged", merged))
    if training is not None:
        rows.append(
            (
                "training",
                f"{training.protocol} in {training.host} at position {training.position}: {training.tokens_seen:,} "
                f"tokens of {training.documents:,} documents, steps: {training.steps}, seed: {training.seed}, "
                f"{training.seconds:.0f} s",
            )
        )
    for evaluation in organ.evaluations:
        rows.append(
            (
                "perplexity",
                f"{evaluation.before:.2f} before, {evaluation.after:.2f} after, on {evaluation.data} "
                f"({evaluation.tokens:,} tokens)",
            )
        )
    for scanned in organ.scans:
        best = next((p for p in scanned.points if (p.mode, p.position) == (scanned.mode, scanned.position)), None)
        ratio = "" if best is None else f", perplexity {best.ratio:.3f} of the recipient's alone"
        rows.append(
            (
                "scanned",
                f"in {scanned.recipient} ({scanned.layer_count} layers): best is {scanned.mode} at {scanned.position} "
                f"of {len(scanned.points)} places{ratio}",
            )
        )
    if training is not None and training.redaction is not None:
        rows.append(("masked", redaction_line(training.redaction)))
    if (private := privacy_line(organ)) is not None:
        rows.append(("private", private))
    for audited in organ.audits:
        rows += audit_rows(audited)
    if organ.sketch is not None:
        rows.append(("sketch", f"hidden states around it on {organ.sketch.tokens:,} tokens of a public text"))
    rows += [("created", organ.created), ("file digest", organ.file_digest)]
    return facts(f"organ {organ.name}", rows)


def check_report(report: CheckReport) -> RenderableType:
    """Render the findings of `check`."""
    table = Table(
        title=Text(f"{report.organ} → {report.recipient}, {report.mode} at {report.position}"),
        title_justify="left",
    )
    table.add_column("severity")
    table.add_column("what", overflow="fold")
    table.add_column("organ", overflow="fold")
    table.add_column("recipient", overflow="fold")
    table.add_column("why it matters", overflow="fold", ratio=1)
    for finding in report.findings:
        values = ["" if value is None else str(value) for value in (finding.organ, finding.recipient)]
        table.add_row(
            Text(finding.severity, style=_COLOURS[finding.severity]),
            finding.subject,
            *map(Text, values),
            Text(finding.why),
        )
    verdict = (
        Text("blocked: it can't be transplanted there", style="bold red")
        if report.blocked
        else Text("nothing blocks it", style="bold green")
    )
    if not report.findings:
        return Text("nothing blocks it; nothing differs", style="bold green")
    if report.alignment is not None:
        return Group(table, _alignment(report.alignment), verdict)
    return Group(table, verdict)


def _alignment(found: AlignmentCurve) -> RenderableType:
    """Draw the distance at every position as a row of bars, with the best position and the one asked for in figures."""
    bars = "".join(_BARS[min(int(entry.distance * len(_BARS)), len(_BARS) - 1)] for entry in found.curve)
    rows = [("at 0 to " + str(found.curve[-1].position), bars)]
    for name, position in (("asked for", found.position), ("most alike", found.best)):
        entry = next(entry for entry in found.curve if entry.position == position)
        rows.append(
            (
                name,
                f"{position}: {entry.verdict}, distance {entry.distance:.3f}, CKA {entry.cka_entering:.3f} entering, "
                f"{entry.cka_leaving:.3f} leaving",
            )
        )
    return facts("distance of hidden states, from 0 to 1, by position", rows)


def composition(report: CompositionReport) -> RenderableType:
    """Render what `compose` found: the stack of layers, the matrix, the findings."""
    parts: list[RenderableType] = []
    if report.layers:
        parts.append(facts("layers", [("", report.stack())]))
    if report.rows:
        header, rows = report.table()
        matrix = Table(title="perplexity (ratio to the recipient's, 95 % interval)", title_justify="left")
        for number, column in enumerate(header):
            matrix.add_column(Text(column), justify="right" if number else "left")
        for row in rows:
            matrix.add_row(*map(Text, row))
        parts.append(matrix)
    table = Table(title_justify="left")
    for name in ("severity", "organ", "what", "why it matters"):
        table.add_column(name, overflow="fold")
    found = [("all", finding) for finding in report.findings]
    found += [(organ.name, finding) for organ in report.organs for finding in organ.findings]
    for organ, finding in found:
        shown = Text(finding.severity, style=_COLOURS[finding.severity])
        table.add_row(shown, Text(organ), Text(finding.subject), Text(finding.sentence().partition(": ")[2]))
    style = "bold red" if report.blocked else "bold green"
    return Group(*parts, *([table] if found else []), Text(report.verdict(), style=style))


def record(surgery: SurgicalRecord, output: str, organs: int = 1) -> RenderableType:
    """Render what a transplant of so many organs did."""
    rows = []
    for operation in reversed(surgery.operations[-organs:]):
        rows += [
            ("organ", f"{operation.organ} {operation.organ_version}"),
            ("done", f"{operation.mode} at position {operation.position}"),
            ("taken out", operation.explant or "nothing"),
        ]
    rows += [
        ("layers", str(len(surgery.layers))),
        ("verified", _VERIFIED[surgery.operations[-1].verified]),
        ("tensors digest", surgery.tensors_digest or "not made: linked files were not read"),
    ]
    return facts(output, rows)


def recovery(surgery: SurgicalRecord, output: str) -> RenderableType:
    """Render what the last recovery did."""
    done = surgery.recoveries[-1]
    rows = [
        ("organ", done.organ),
        ("scope", done.scope + (f", up to {done.neighbours} on each side" if done.neighbours else "")),
    ]
    for number, stage in enumerate(done.stages, start=1):
        rows.append(
            (
                f"stage {number}" if len(done.stages) > 1 else "trained",
                f"{stage.parameters:,} numbers in layers {', '.join(map(str, stage.layers))}: {stage.tokens_seen:,} "
                f"tokens, steps: {stage.steps}",
            )
        )
    for evaluation in done.evaluations:
        rows.append(
            (
                "perplexity",
                f"{evaluation.before:.2f} before, {evaluation.after:.2f} after, on {evaluation.data} "
                f"({evaluation.tokens:,} tokens)",
            )
        )
    kept = {layer.explant for layer in done.changed if layer.explant}
    rows += [
        ("kept", ", ".join(sorted(kept)) or "nothing but the organ's own layers changed"),
        ("tensors digest", surgery.tensors_digest or "not made: linked files were not read"),
    ]
    return facts(output, rows)


def cache(report: CacheReport) -> RenderableType:
    """Render what the cache holds or held."""
    table = Table(title=f"{report.folder}{', deleted' if report.cleared else ''}", title_justify="left")
    for column in ("kind", "name", "size", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for entry in report.entries:
        table.add_row(entry.kind, entry.name, human_bytes(entry.bytes), entry.used)
    table.add_row("", "in all", human_bytes(sum(entry.bytes for entry in report.entries)), "")
    return table


def removal(result: Removal) -> RenderableType:
    """Render what `remove` did, with its proof."""
    rows = [("removed", result.organ)]
    if result.original_restored:
        rows += [
            ("tensors", "equal to the original's, to the bit"),
            (
                "",
                result.tensors_digest or f"linked and not changed since: {', '.join(result.linked)}",
            ),
            ("config.json", "equal to the original's, to the bit"),
            ("", result.config_digest),
        ]
    else:
        rows += [
            ("still inside", ", ".join(result.organs_left)),
            ("tensors digest", result.tensors_digest or "not made"),
        ]
    return facts(result.output, rows)


def report(written: ReportWritten) -> RenderableType:
    """Render what a report holds and where it is."""
    kinds = ("models", "organs", "scans", "evaluations", "compositions", "comparisons", "plans", "studies")
    rows = [(kind, ", ".join(getattr(written, kind))) for kind in kinds if getattr(written, kind)]
    if written.prompts:
        rows.append(("prompts", str(written.prompts)))
    rows.append(("size", human_bytes(written.bytes)))
    return facts(written.output, rows)


def scan(report: ScanReport) -> RenderableType:
    """Render the curve of a scan: a row for each position, the modes side by side."""
    table = Table(
        title=Text(f"{report.organ} → {report.recipient}: perplexity over the recipient's alone (95 % interval)"),
        title_justify="left",
    )
    texts = ["domain", *(["general"] if report.general is not None else [])]
    modes = [mode for mode in ("replace", "insert") if any(place.mode == mode for place in report.places)]
    table.add_column("position", justify="right")
    for mode in modes:
        for text in texts:
            table.add_column(f"{mode}, {text}" if len(texts) > 1 else mode, justify="right")
    tied = set(report.tied)
    at: dict[tuple[int, str], Place] = {(place.position, place.mode): place for place in report.places}
    for position in sorted({place.position for place in report.places}):
        cells = [_scanned(report, at.get((position, mode)), text, tied) for mode in modes for text in texts]
        table.add_row(str(position), *cells)
    return Group(table, *(Text(sentence) for sentence in _scan_sentences(report)))


def _scanned(report: ScanReport, place: Place | None, text: str, tied: set[str]) -> Text:
    score = None if place is None else place.domain if text == "domain" else place.general
    if place is None or score is None:
        return Text("" if place is None else place.stopped or "", style="dim")
    best = (place.mode, place.position) == (report.mode, report.position)
    mark = "* " if best else "≈ " if f"{place.mode} at {place.position}" in tied else ""
    style = "bold green" if best else "green" if mark else "dim" if place.stopped else ""
    digits = 3 if score.ratio < 100 else 0
    shown = [f"{value:,.{digits}f}" for value in (score.ratio, score.low, score.high)]
    return Text(f"{mark if text == 'domain' else ''}{shown[0]} [{shown[1]}, {shown[2]}]", style=style)


def _scan_sentences(report: ScanReport) -> Iterable[str]:
    domain = report.domain
    yield (
        f"* best: {report.mode} at {report.position}; the recipient alone has perplexity {domain.perplexity:.2f} on "
        f"{domain.tokens:,} tokens of {domain.documents:,} documents"
    )
    if report.tied:
        yield f"≈ can't be told apart from it on the text that they saw: {', '.join(report.tied)}"
    if not report.helps:
        yield "nowhere is the organ sure to make the recipient better on this text"
    if report.unmeasured:
        yield (
            f"the budget left {report.unmeasured} of {len(report.places)} places out, so this is the best of the "
            "others only, and --record keeps what the organ recommended before"
        )
    if not report.complete:
        yield "the budget ended before the whole sample was used"
    if any(place.domain is not None and place.stopped for place in report.places):
        yield "places that dropped out saw less of the text, so that their figures are of other text (--json: how much)"
    yield (
        f"{report.layer_passes / max(report.layer_passes_from_scratch, 1):.0%} of the layer passes of measuring each "
        f"place by itself, {report.seconds:.0f} s"
    )


def plan(report: PlanReport) -> RenderableType:
    """Render what `plan` proposes: each organ that was tried, what it will cost, and what to run."""
    table = Table(
        title=Text(
            f"{report.model}, {report.tokens:,} training tokens: predicted costs, and held-out perplexity after trials "
            f"(untrained {report.untrained:.2f})"
        ),
        title_justify="left",
    )
    for column in ("layers", "protocol", "seconds", "memory", "file", "perplexity"):
        table.add_column(column, justify="left" if column == "protocol" else "right")
    for proposal in report.proposals:
        table.add_row(*_proposal_cells(proposal), style="bold green" if proposal == report.best else "")
    if report.paper not in report.proposals:
        table.add_row(*_proposal_cells(report.paper), style="dim")
    # Whole lines, however narrow the terminal is: they are there to be copied.
    commands = [Text(command, no_wrap=True, overflow="ignore") for command in report.commands]
    return Group(table, Text("to train the first of them:"), *commands)


def _proposal_cells(proposal: Proposal) -> list[str]:
    cost = proposal.cost
    return [
        proposal.layers,
        proposal.protocol,
        f"{cost.seconds:,.0f}",
        human_bytes(cost.memory),
        human_bytes(cost.bytes),
        proposal.show_trial(),
    ]


def comparison(report: Comparison, output: str) -> RenderableType:
    """Render what `compare` found; every try of the search is in the files."""
    from neurograft.training import comparison_report

    tables = [_table(*found) for found in (comparison_report.main_table(report), comparison_report.time_table(report))]
    return Group(*tables, Text(comparison_report.conditions(report)), Text(f"written to {output}", style="green"))


def cross_domain(report: CrossDomainReport, output: str) -> RenderableType:
    """Render what `study cross-domain` found."""
    from neurograft.study import cross_domain_report

    sentences = [cross_domain_report.conditions(report), *cross_domain_report.findings(report)]
    table = _table(*cross_domain_report.table(report))
    return Group(table, *map(Text, sentences), Text(f"written to {output}", style="green"))


def paper(report: PaperReport, output: str) -> RenderableType:
    """Render what `study paper` found: the answers, and the comparison with published figures."""
    from neurograft.study import paper_report

    parts: list[RenderableType] = [Text(paper_report.conditions(report))]
    for number, question in enumerate(paper_report.QUESTIONS, 1):
        parts.append(Text(f"{number}. {question.title}", style="bold"))
        parts += [Text(sentence) for sentence in (f"The paper: {question.published}", *question.answers(report))]
    table = _table(*paper_report.comparison_table(report))
    return Group(*parts, table, Text(f"written to {output}", style="green"))


def _table(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title_justify="left")
    for number, column in enumerate(header):
        table.add_column(Text(column), justify="left" if number == 0 or column == "settings" else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def evaluation(report: EvaluationReport) -> RenderableType:
    """Render perplexities, side by side with the baseline, and the gates."""
    table = Table(title="perplexity (95 % interval over documents)", title_justify="left")
    table.add_column("data")
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    if report.baseline is not None:
        table.add_column(Text(str(report.baseline)), justify="right")
    table.add_column(Text(str(report.model)), justify="right")
    if report.baseline is not None:
        table.add_column("ratio", justify="right")
    for name, result in report.data.items():
        cells = [name, f"{result.documents:,}", f"{result.tokens:,}"]
        if report.baseline is not None:
            cells.append(f"{result.baseline_perplexity:.2f}")
        cells.append(f"{result.perplexity:.2f} [{result.low:.2f}, {result.high:.2f}]")
        if result.ratio is not None:
            cells.append(f"{result.ratio:.3f} [{result.ratio_low:.3f}, {result.ratio_high:.3f}]")
        table.add_row(*map(Text, cells))
    gates = [
        Text(
            f"{'passed' if gate.passed else 'FAILED'}  {gate.gate}  ({gate.value:.2f} against {gate.limit:.2f})",
            style="green" if gate.passed else "bold red",
        )
        for gate in report.gates
    ]
    return Group(table, *gates)
