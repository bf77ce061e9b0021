"""The report's sections: what there is to say of each source, in words, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from neurograft.composition_report import CompositionReport
from neurograft.evaluation import EvaluationReport
from neurograft.files import human_bytes
from neurograft.manifest import Evaluation, Manifest, Operation, Origin, SurgicalRecord
from neurograft.placement.plan_results import PlanReport, Proposal
from neurograft.placement.results import Place, ScanReport
from neurograft.privacy.rendering import privacy_line
from neurograft.reporting import pictures
from neurograft.reporting.continuations import Continuation
from neurograft.reporting.page import facts, paragraph, plot, section, table
from neurograft.study import cross_domain_report
from neurograft.study.results import CrossDomainReport
from neurograft.training.comparison_report import conditions, main_table, quality_figure, search_table, time_table
from neurograft.training.comparison_results import Comparison

_SHOWN_PLACES = 12


def model_section(name: str, record: SurgicalRecord) -> str:
    """Say what a transplanted model is made of, and what was done to it."""
    parts = [paragraph(_what_was_done(name, record))]
    parts.append(pictures.stack(record.layers))
    measured = [
        (f"{recovery.organ}: {each.data}", each) for recovery in record.recoveries for each in recovery.evaluations
    ]
    if measured:
        parts.append(section("Recovery", _before_and_after(measured), level=3))
    rows = [_operation_row(operation) for operation in record.operations]
    header = ["organ", "version", "mode", "position", "taken out", "checked", "when"]
    parts.append(section("Transplants", table(header, rows), level=3))
    digests = [
        ("weights of the original", record.original_tensors_digest or "not read: files were linked"),
        ("weights now", record.tensors_digest or "not read: files were linked"),
    ]
    parts.append(facts(digests))
    parts.append(paragraph("Any organ can be taken out again, to the bit: neurograft remove.", note=True))
    return section(f"The model {name}", *parts)


def _what_was_done(name: str, record: SurgicalRecord) -> str:
    own = sum(origin.organ is None for origin in record.layers)
    organs = len(record.layers) - own
    return (
        f"{name} has {len(record.layers)} layers: {own} are those of {record.recipient}, {organs} came with "
        f"{_count(len({origin.organ for origin in record.layers} - {None}), 'organ')}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _operation_row(operation: Operation) -> list[str]:
    taken = _count(len(operation.explant_origins), "layer") if operation.explant else "nothing"
    return [
        operation.organ, operation.organ_version, operation.mode, str(operation.position), taken, operation.verified,
        operation.when[:19].replace("T", " "),
    ]  # fmt: skip


def organ_section(manifest: Manifest) -> str:
    """Render a manifest for people: what the organ is, where it came from, how it was trained, what it claims."""
    source = manifest.source
    anatomy = manifest.anatomy
    parts = [
        paragraph(manifest.description or ""),
        facts(
            [
                ("version", manifest.version),
                ("licence", manifest.license or "not given"),
                ("layers", f"{manifest.layer_count}, {anatomy.model_type}, {anatomy.dtype}"),
                ("cut out of", f"{source.model}, layers {source.layer_start} to {source.layer_stop - 1} "
                 f"of {source.layer_count}"),
                ("computed from", source.dequantised_from or ""),
                ("recommended", f"{manifest.recommended_mode} at position {manifest.recommended_position}"),
                ("merged", manifest.merge_line() or ""),
                ("private", privacy_line(manifest) or ""),
                ("made", manifest.created[:19].replace("T", " ")),
                ("digest of the file", manifest.file_digest),
            ]
        ),
    ]  # fmt: skip
    if manifest.evaluations:
        claimed = [(each.data, each) for each in manifest.evaluations]
        parts.append(section("What it claims", _before_and_after(claimed), level=3))
    if manifest.trainings:
        parts.append(section("How it was trained", _trainings(manifest), level=3))
    return section(f"The organ {manifest.name}", *parts)


def _trainings(manifest: Manifest) -> str:
    header = ["protocol", "host", "documents", "tokens", "steps", "seconds", "learning rate", "seed"]
    rows = [
        [
            part.protocol, part.host, f"{part.documents:,}", f"{part.tokens_seen:,}", f"{part.steps:,}",
            f"{part.seconds:,.0f}", f"{part.hyperparameters.get('lr', '')}", str(part.seed),
        ]
        for part in manifest.trainings
    ]  # fmt: skip
    drawn = ""
    if any(part.loss_history for part in manifest.trainings):
        drawn = plot(pictures.training(manifest), "training loss over optimizer steps")
    note = "No text of the training data is in the organ; documents and tokens are counts."
    return table(header, rows) + drawn + paragraph(note, note=True)


def _before_and_after(measured: Sequence[tuple[str, Evaluation]]) -> str:
    rows = [(name, each.before, each.after) for name, each in measured]
    header = ["on", "documents", "tokens", "before", "after", "change"]
    cells = [
        [
            name, f"{each.documents:,}", f"{each.tokens:,}", f"{each.before:,.2f}", f"{each.after:,.2f}",
            _change(each.after / each.before),
        ]
        for name, each in measured
    ]  # fmt: skip
    description = "perplexity before and after: " + "; ".join(f"{n} {b:.2f}, {a:.2f}" for n, b, a in rows)
    return plot(pictures.before_and_after(rows), description) + table(header, cells)


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def evaluation_section(name: str, report: EvaluationReport) -> str:
    """Render an evaluation: each text, beside the baseline, with intervals, and the gates."""
    parts = []
    beside = [
        (result.name, result.baseline_perplexity, result.perplexity)
        for result in report.data.values()
        if result.baseline_perplexity is not None
    ]
    if beside:
        description = f"perplexity of {report.baseline} and of {report.model} on each text"
        parts.append(plot(pictures.before_and_after(beside), description))
    rows = []
    for result in report.data.values():
        row = [result.name, f"{result.documents:,}", f"{result.tokens:,}",
               f"{result.perplexity:,.2f} [{result.low:,.2f}, {result.high:,.2f}]"]  # fmt: skip
        if result.ratio is not None:
            row += [f"{result.baseline_perplexity:,.2f}", f"{_change(result.ratio)}",
                    f"{result.ratio:.3f} [{result.ratio_low:.3f}, {result.ratio_high:.3f}]"]  # fmt: skip
        rows.append(row)
    header = ["text", "documents", "tokens", "perplexity, 95 % interval"]
    if report.baseline is not None:
        header += [report.baseline, "change", "ratio, 95 % interval"]
    parts.append(table(header, rows))
    if report.gates:
        gates = [
            [gate.gate, "holds" if gate.passed else "fails", f"{gate.value:,.3f}", f"{gate.limit:,.3f}"]
            for gate in report.gates
        ]
        parts.append(table(["gate", "verdict", "measured", "limit"], gates))
    return section(f"Evaluation {name}: {report.model}", *parts)


def plan_section(name: str, report: PlanReport) -> str:
    """Render a plan: what each organ that was tried will cost and promises, and what of the layers speaks for it."""
    best = report.best
    header = ["layers", "protocol", "seconds", "memory", "file", "perplexity after a trial of so many tokens"]
    description = "squared gradient and block influence of each layer, each over its largest"
    read = plot(pictures.lens(report), "loss on the text read off after each layer") if report.lens else ""
    limits = ", ".join(f"{name} {amount:g}" for name, amount in report.budget.items()) or "none"
    return section(
        f"A plan: {name}",
        paragraph(
            f"For {report.model} and {report.tokens:,} training tokens (limits: {limits}): layers {best.layers}, "
            f"{best.protocol}, {best.mode} at position {best.position}. All organs were tried on a few tokens, the "
            f"better half again on twice as many, and so on to {report.trial_tokens:,}; the model as it is has a "
            f"held-out perplexity of {report.untrained:.2f}."
        ),
        table(header, [_proposal_row(proposal) for proposal in report.proposals]),
        section("What the layers say", plot(pictures.signals(report), description), level=3),
        section("What can be read off between them", read, level=3) if read else "",
    )


def _proposal_row(proposal: Proposal) -> list[str]:
    cost = proposal.cost
    size = human_bytes(cost.bytes)
    return [
        proposal.layers,
        proposal.protocol,
        f"{cost.seconds:,.0f}",
        human_bytes(cost.memory),
        size,
        proposal.show_trial(),
    ]


def scan_section(name: str, report: ScanReport) -> str:
    """Render a scan: the best place, the curve over positions, and the places in a table."""
    tied = f" It can't be told apart from {', '.join(report.tied)}." if report.tied else ""
    verdict = "helps there" if report.helps else "does not help there"
    parts = [
        paragraph(
            f"{report.organ} ({_count(report.organ_layers, 'layer')}) in {report.recipient}: best {report.mode} at "
            f"position {report.position}, where it {verdict}.{tied}"
        )
    ]
    for text in ("domain", "general") if report.general is not None else ("domain",):
        description = f"perplexity on the {text} text at each position, relative to the recipient's"
        parts.append(section(f"On the {text} text", plot(pictures.positions(report, text), description), level=3))
    best = sorted((p for p in report.places if p.domain is not None), key=lambda p: p.domain.ratio if p.domain else 0)
    header = ["place", "domain, times the recipient's", "general", "tokens", ""]
    parts.append(table(header, [_place_row(place) for place in best[:_SHOWN_PLACES]]))
    if len(best) > _SHOWN_PLACES:
        parts.append(paragraph(f"The {_SHOWN_PLACES} best of {len(best)} places.", note=True))
    if report.unmeasured:
        left = (
            f"The budget left {report.unmeasured} of {len(report.places)} places out; the best is that of the others."
        )
        parts.append(paragraph(left))
    if not report.complete:
        parts.append(paragraph("The budget ended before the whole sample was used.", note=True))
    return section(f"Positions: {name}", *parts)


def _place_row(place: Place) -> list[str]:
    assert place.domain is not None
    general = "" if place.general is None else f"{place.general.ratio:.3f}"
    interval = f"{place.domain.ratio:.3f} [{place.domain.low:.3f}, {place.domain.high:.3f}]"
    return [f"{place.mode} at {place.position}", interval, general, f"{place.domain.tokens:,}", place.stopped or ""]


def composition_section(name: str, report: CompositionReport) -> str:
    """Render several organs together: the model that they would make, the matrix, and every finding."""
    layers = [
        Origin(organ=segment.organ, layer=layer, digest=None)
        for segment in report.layers
        for layer in range(segment.start, segment.stop)
    ]
    found = [("together", finding) for finding in report.findings]
    found += [(organ.name, finding) for organ in report.organs for finding in organ.findings]
    names = ", ".join(organ.name for organ in report.organs)
    parts = [paragraph(f"{names} in {report.recipient}: they {report.verdict()}.")]
    if layers:
        parts.append(pictures.stack(layers))
    if report.rows:
        note = "Perplexity, and its ratio to the recipient's with its 95 % interval by bootstrap over documents."
        parts += [table(*report.table()), paragraph(note, note=True)]
    if found:
        rows = [[finding.severity, who, finding.sentence()] for who, finding in found]
        parts.append(table(["", "about", "finding"], rows))
    return section(f"Together: {name}", *parts)


def comparison_section(name: str, report: Comparison) -> str:
    """Render a comparison with LoRA and others: the tables, and quality against wall-clock."""
    return section(
        f"Comparison {name}",
        paragraph(conditions(report)),
        plot(quality_figure(report), "validation perplexity against seconds of training, for each method"),
        table(*main_table(report)),
        section("Time to each other's quality", table(*time_table(report)), level=3),
        section("The search", table(*search_table(report)), level=3),
    )


def cross_domain_section(name: str, report: CrossDomainReport) -> str:
    """Render the cross-domain study: the table, the answers, and gap and held-out perplexity over the steps."""
    gap = "held-out less training loss over the steps, for each arm"
    held_out = "held-out perplexity over the steps, for each arm"
    return section(
        f"Organs from another domain: {name}",
        paragraph(cross_domain_report.conditions(report)),
        *(paragraph(sentence) for sentence in cross_domain_report.findings(report)),
        table(*cross_domain_report.table(report)),
        section("The gap", plot(cross_domain_report.figure(report, "gap"), gap), level=3),
        section("Held-out text", plot(cross_domain_report.figure(report, "held_out"), held_out), level=3),
    )


def continuation_section(continuations: Sequence[Continuation]) -> str:
    """Show what the models made of each prompt, one below the other."""
    parts = []
    for each in continuations:
        said = "".join(
            f"<p><strong>{escape(name)}</strong></p><blockquote>{escape(text) or '(nothing)'}</blockquote>"
            for name, text in each.answers.items()
        )
        parts.append(f"<h3>{escape(each.prompt)}</h3>{said}")
    return section("How they go on", *parts, paragraph("Greedy: always the likeliest token.", note=True))
