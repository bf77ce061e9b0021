"""The cross-domain study as people read it: a table, a sentence for each organ, and gaps over time as a picture."""

from __future__ import annotations

import statistics
from typing import Any

from neurograft.study.results import CONTROLS, ArmSummary, CrossDomainReport, GapPoint
from neurograft.training.comparison_report import COLOURS, markdown_table, show
from neurograft.wording import counted

_FEW_PASSES = 2


def conditions(report: CrossDomainReport) -> str:
    """Say in a paragraph what was done, and how."""
    options = report.options
    return (
        f"{report.model} ({report.layer_count} layers): organs of {counted(report.layers, 'layer')}, inserted at "
        f"{report.position}, each trained on {report.organ_tokens:,} tokens of its own domain; then {report.steps} "
        f"steps of {options['batch_size']} x {options['sequence_length']} tokens on {report.target_tokens:,} tokens of "
        f"the target text ({report.tokens / report.target_tokens:.1f} passes), "
        f"{counted(len(report.seeds), 'seed')}, mean ± "
        "standard deviation. The gap is the held-out loss less the loss on the text that trains, after the last step. "
        "Differences are of the best held-out loss on the way, each with the same seed; below zero, the row is better."
    )


def findings(report: CrossDomainReport) -> list[str]:
    """Say of each organ whether it helped the model with the target text more than the controls did."""
    sentences = []
    if report.tokens < _FEW_PASSES * report.target_tokens:
        sentences.append(
            f"The target text was passed over {report.tokens / report.target_tokens:.2g} times, too little to be "
            "learnt by heart: what follows is of adapting to it, not of regularising."
        )
    for arm in report.arms:
        if arm.arm in CONTROLS or not arm.runs:
            continue
        each = [f"{arm.lower.get(c, 0)} of {counted(len(report.seeds), 'seed')} against {c}" for c in CONTROLS]
        verdict = "yes" if report.regularises(arm.arm) else "no"
        sentences.append(
            f"Does an organ from {arm.arm} lower what the model can reach on held-out text of the target? {verdict}: "
            f"lower in {' and in '.join(each)}."
        )
    return sentences


def table(report: CrossDomainReport) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of what each arm came to."""
    against = [f"nats beside {control}" for control in CONTROLS]
    header = ["arm", "held-out at first", "best", "at the end", "gap at the end, nats", *against]
    return header, [_row(arm) for arm in report.arms]


def _row(arm: ArmSummary) -> list[str]:
    return [
        arm.arm,
        *(show(value) for value in (arm.start, arm.best, arm.end)),
        show(arm.gap, 3),
        *("" if control not in arm.against else show(arm.against[control], 3) for control in CONTROLS),
    ]


def markdown(report: CrossDomainReport) -> str:
    """Render the study as a Markdown page."""
    failures = [f"- {run.arm}, seed {run.seed} failed: {run.error}" for run in report.runs if run.error]
    where = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(
        [
            "# Organs from another domain\n",
            conditions(report) + "\n",
            markdown_table(*table(report)),
            *(f"- {sentence}" for sentence in findings(report)),
            *failures,
            f"\n{report.machine}; {where}.\n",
        ]
    )


def figure(report: CrossDomainReport, what: str) -> Any:
    """Draw something over the steps on the target text: a line for the mean, a band for the seeds.

    Args:
        report: The study.
        what: `gap`, in nats per token, or `held_out`, a perplexity.
    """
    import plotly.graph_objects as plots

    drawn: Any = plots.Figure()
    for number, arm in enumerate(each.arm for each in report.arms):
        runs = [run.points for run in report.runs if run.arm == arm and run.points]
        if not runs:
            continue
        values = [[_value(point, what) for point in at] for at in zip(*runs, strict=False)]
        steps, colour = [point.step for point in runs[0]], COLOURS[number % len(COLOURS)]
        drawn.add_scatter(
            x=[*steps, *reversed(steps)], y=[*map(max, values), *reversed([*map(min, values)])], fill="toself",
            line_width=0, fillcolor=colour, opacity=0.2, hoverinfo="skip", showlegend=False, legendgroup=arm,
        )  # fmt: skip
        drawn.add_scatter(
            x=steps, y=[statistics.fmean(at) for at in values], mode="lines+markers", name=arm, line_color=colour,
            legendgroup=arm,
        )  # fmt: skip
    drawn.update_layout(hovermode="x unified")
    drawn.update_xaxes(title="steps on the target text", rangemode="tozero")
    title = "held-out less training loss, nats" if what == "gap" else "held-out perplexity"
    drawn.update_yaxes(title=title, type="linear" if what == "gap" else "log")
    return drawn


def _value(point: GapPoint, what: str) -> float:
    return point.gap if what == "gap" else point.held_out
