"""The report's pictures: a model as a stack of layers, curves over positions and over training, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from neurograft.manifest import Manifest, Mode, Origin
from neurograft.placement.plan_results import PlanReport
from neurograft.placement.results import Place, ScanReport

# Told apart by colour-blind people too, on light and on dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Ratios from which a straight axis would press the good places flat.
_WIDE = 4.0
_SYMBOLS: dict[Mode, str] = {"replace": "circle", "insert": "diamond"}


def stack(layers: Sequence[Origin]) -> str:
    """Draw a model as a stack of layers, the first at the bottom, organs standing out."""
    rows = ['<li class="end">embedding</li>']
    for number, origin in enumerate(layers):
        if origin.organ is None:
            moved = f" (recipient's {origin.layer})" if origin.layer != number else ""
            rows.append(f"<li>{number}{moved}</li>")
        else:
            rows.append(f'<li class="organ">{number}: {escape(origin.organ)}, layer {origin.layer}</li>')
    rows.append('<li class="end">norm and head</li>')
    return f'<ol class="stack" aria-label="layers, first to last">{"".join(rows)}</ol>\n'


def before_and_after(rows: Sequence[tuple[str, float, float]]) -> Any:
    """Draw perplexities before and after as pairs of bars.

    Args:
        rows: What on, before, after.
    """
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    for place, (name, colour) in enumerate((("before", "#8a97a5"), ("after", COLOURS[0])), start=1):
        values = [row[place] for row in rows]
        figure.add_bar(
            x=[row[0] for row in rows], y=values, name=name, marker_color=colour,
            text=[f"{value:,.2f}" for value in values], textposition="outside", cliponaxis=False,
        )  # fmt: skip
    figure.update_layout(barmode="group")
    figure.update_yaxes(title="perplexity", rangemode="tozero")
    return figure


def training(manifest: Manifest) -> Any:
    """Draw the training losses of an organ, one curve for each training."""
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    done = 0
    for number, (colour, part) in enumerate(zip(_endless(COLOURS), manifest.trainings, strict=False), start=1):
        steps, losses = zip(*part.loss_history, strict=True) if part.loss_history else ((), ())
        figure.add_scatter(
            x=[done + step for step in steps], y=losses, mode="lines+markers", line_color=colour,
            name=f"{number}. {part.protocol}",
        )  # fmt: skip
        done += part.steps
    figure.update_layout(showlegend=len(manifest.trainings) > 1)
    figure.update_xaxes(title="optimizer steps", rangemode="tozero")
    figure.update_yaxes(title="training loss, nats per token")
    return figure


def _endless(colours: Sequence[str]) -> list[str]:
    return list(colours) * 8


def positions(report: ScanReport, text: str) -> Any:
    """Draw perplexity over positions, beside the recipient alone, with the intervals that were measured.

    Args:
        report: A scan.
        text: `domain` or `general`.
    """
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    for mode, colour in zip(_SYMBOLS, COLOURS, strict=False):
        places = [place for place in report.places if place.mode == mode and getattr(place, text) is not None]
        if places:
            _add_places(figure, places, text, mode, colour)
    figure.add_hline(y=1.0, line_dash="dot", line_color="#8a97a5", annotation_text=report.recipient)
    figure.update_xaxes(title=f"position, 0 to {report.layer_count}", dtick=1 if report.layer_count <= 16 else 5)
    ratios = [getattr(place, text).ratio for place in report.places if getattr(place, text) is not None]
    wide = max(ratios, default=1.0) > _WIDE
    figure.update_yaxes(title="perplexity, times the recipient's", type="log" if wide else "linear")
    return figure


def signals(report: PlanReport) -> Any:
    """Draw what a plan measured of each layer: its gradient on the text and its influence, each over its largest."""
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    measured = (("squared gradient", report.gradients), ("block influence", report.influence))
    for (name, values), colour in zip(measured, COLOURS, strict=False):
        largest = max(values, default=0.0) or 1.0
        figure.add_scatter(
            x=list(range(len(values))), y=[value / largest for value in values], mode="lines+markers", name=name,
            line_color=colour, customdata=values, hovertemplate="layer %{x}: %{customdata:.4g}",
        )  # fmt: skip
    start, _, stop = report.best.layers.partition(":")
    figure.add_vrect(x0=int(start) - 0.5, x1=int(stop) - 0.5, fillcolor="#8a97a5", opacity=0.2, line_width=0)
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="of the largest", rangemode="tozero")
    return figure


def lens(report: PlanReport) -> Any:
    """Draw the loss on the text read off at each boundary of a model."""
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    figure.add_scatter(
        x=list(range(len(report.lens))), y=report.lens, mode="lines+markers", line_color=COLOURS[0], showlegend=False,
        hovertemplate="after %{x} layers: %{y:.2f} nats",
    )  # fmt: skip
    figure.update_xaxes(title="layers passed")
    figure.update_yaxes(title="loss, nats per token", rangemode="tozero")
    return figure


def _add_places(figure: Any, places: Sequence[Place], text: str, mode: Mode, colour: str) -> None:
    scores = [getattr(place, text) for place in places]
    figure.add_scatter(
        x=[place.position for place in places],
        y=[score.ratio for score in scores],
        error_y={
            "type": "data", "symmetric": False, "thickness": 1,
            "array": [max(score.high - score.ratio, 0) for score in scores],
            "arrayminus": [max(score.ratio - score.low, 0) for score in scores],
        },
        mode="lines+markers", name=mode, line_color=colour, marker_symbol=_SYMBOLS[mode],
        customdata=[
            [score.perplexity, score.tokens, place.stopped or ""] for score, place in zip(scores, places, strict=True)
        ],
        hovertemplate="position %{x}: %{y:.3f} (perplexity %{customdata[0]:.2f} on %{customdata[1]:,} tokens) "
        "%{customdata[2]}",
    )  # fmt: skip
