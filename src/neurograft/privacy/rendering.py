"""Figures of audits and redactions, in words and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neurograft.manifest import Audit, CanaryFigures, ExtractionFigures, Manifest, MembershipFigures, Redaction

if TYPE_CHECKING:
    from rich.console import RenderableType

    from neurograft.privacy.auditing import AuditReport


def membership_line(figures: MembershipFigures) -> str:
    """Say in one line how well an attack does."""
    host = "" if figures.host_auc is None else f"; {figures.host_auc:.3f} by the host alone"
    return (
        f"area {figures.auc:.3f} ({figures.auc_low:.3f} to {figures.auc_high:.3f}{host}), "
        f"{figures.true_positives:.1%} found at 1 % false positives "
        f"({figures.true_positives_low:.1%} to {figures.true_positives_high:.1%})"
    )


def extraction_line(figures: ExtractionFigures) -> str:
    """Say in one line how many documents are recited."""
    if not figures.documents:
        return f"none of the {figures.text} is long enough for {figures.prefix} + {figures.length} tokens"
    return (
        f"{figures.recited} of {figures.documents} {figures.text} ({figures.recited_low:.1%} to "
        f"{figures.recited_high:.1%}), the host alone {figures.recited_by_host}; longest {figures.longest} tokens, the "
        f"host alone {figures.longest_by_host}"
    )


def canary_line(figures: CanaryFigures) -> str:
    """Say in one line how well canaries are remembered."""
    return (
        f"exposure {figures.exposure_mean:.2f} bits on average, {figures.exposure_most:.2f} at most (limit "
        f"{figures.exposure_limit:.2f}); {figures.correct} of {figures.guesses} guesses right: epsilon is at least "
        f"{figures.epsilon:.2f} at delta {figures.delta:g} ({figures.confidence:.0%} confidence)"
    )


def redaction_line(redaction: Redaction) -> str:
    """Say in one line what was masked, and what was not looked for."""
    names = f"names by {redaction.names_by}" if redaction.names_by else "names not looked for"
    if redaction.counts is None or redaction.documents is None:
        return f"what was found is not said, since the training is private; {names}"
    found = ", ".join(f"{kind} {count}" for kind, count in sorted(redaction.counts.items())) or "nothing found"
    return f"{found}, in {redaction.documents:,} documents; {names}"


def privacy_line(manifest: Manifest) -> str | None:
    """Say in one line how private the last training was; `None` if it was not."""
    spent = None if manifest.training is None else manifest.training.privacy
    if spent is None:
        return None
    others = [training for training in manifest.training_history if training.privacy is None]
    return (
        f"epsilon {spent.epsilon:.3g} at delta {spent.delta:.2g} for each of {spent.units:,} {spent.unit}s: noise "
        f"{spent.noise_multiplier:.3g} x clip {spent.clip:g}, {spent.steps} steps of {spent.sample_rate:.2%} of them "
        f"({spent.accountant.upper()} accountant)"
        f"{f'; {len(others)} of the trainings before it had no such promise' if others else ''}"
    )


def audit_rows(found: Audit) -> list[tuple[str, str]]:
    """Return what to say of an audit, each with its name."""
    rows = [
        (
            "audited",
            f"in {found.host}, {found.mode} at {found.position}: {found.members:,} members"
            f"{'' if found.members_verified else ' (by word)'}, {found.non_members:,} non-members",
        )
    ]
    rows += [(f"  {figures.attack}", membership_line(figures)) for figures in found.membership]
    rows += [("  recited", extraction_line(figures)) for figures in found.extraction]
    if found.canaries is not None:
        rows.append(("  canaries", canary_line(found.canaries)))
    return rows


def audit_markdown(audits: list[Audit]) -> list[str]:
    """Return lines of a model card about audits; none if there were none."""
    lines: list[str] = []
    for found in audits:
        (_, title), *rows = audit_rows(found)
        lines += ["", f"Audited {title} ({found.when}):", ""]
        lines += [f"- {name.strip()}: {text}" for name, text in rows]
    return lines


def audit(report: AuditReport) -> RenderableType:
    """Render an audit."""
    from neurograft.render import facts

    rows = audit_rows(report.audit)
    if not report.audit.members_verified:
        wrong = "the manifest's fingerprint is not that of these members; pass exactly what was trained on"
        none = "the manifest has no fingerprint of text (no training, or private): that these are members is your word"
        rows.append(("note", wrong if report.fingerprinted else none))
    rows.append(("recorded", "in the organ's file, as figures" if report.recorded else "no (--record does)"))
    if report.signatures_void:
        rows.append(("signatures", "of the file as it was before: sign it anew with --overwrite"))
    return facts(f"audit of {report.organ} {report.version}", rows)


def planted(summary: dict[str, Any]) -> RenderableType:
    """Render what `plant` made."""
    from neurograft.render import facts

    return facts(
        "canaries",
        [
            (
                "train on",
                f"{summary['output']} ({summary['included']} of {summary['count']}, {summary['repeats']} x each)",
            ),
            ("keep secret", f"{summary['canaries']} until the organ is trained; audit --canaries reads it"),
        ],
    )
