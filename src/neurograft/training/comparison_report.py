"""A comparison as people read it: tables in Markdown, and quality against wall-clock as pictures."""

from __future__ import annotations

import html as escaping
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neurograft.files import human_bytes
from neurograft.training.comparison_results import Comparison, MethodReport, Spread, Trial
from neurograft.training.search import Settings
from neurograft.wording import counted

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind people too
_AXES = ("seconds of training", "perplexity on validation text")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 760, 440, 70, 56, 24


@dataclass(frozen=True)
class _Curve:
    """One method's quality over time, over its seeds, an entry for each evaluation."""

    method: str
    colour: str
    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def show_settings(settings: Settings) -> str:
    """Render settings: `lr 0.003, rank 16`."""
    return ", ".join(
        f"{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in settings.items()
    )


def show(spread: Spread | None, digits: int = 2) -> str:
    """Render a mean and, over several seeds, the standard deviation: `14.51 ± 0.08`."""
    if spread is None:
        return "failed"
    mean = f"{spread.mean:,.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.deviation:,.{digits}f}"


def _show_bytes(spread: Spread | None) -> str:
    if spread is None:
        return "failed"
    mean = human_bytes(round(spread.mean))
    return mean if spread.deviation is None else f"{mean} ± {human_bytes(round(spread.deviation))}"


def main_table(report: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of what each method came to."""
    texts = [name for name in ("domain", "general") if name in report.untrained]
    header = [
        "method", *(f"{name} perplexity" for name in texts), "seconds", "memory beyond the model", "with the model",
        "trainable parameters", "shipped", "settings",
    ]  # fmt: skip
    rows = [["untrained", *(f"{report.untrained[name]:,.2f}" for name in texts), *[""] * 6]]
    rows += [_main_row(method, texts) for method in report.methods]
    return header, rows


def _main_row(method: MethodReport, texts: Sequence[str]) -> list[str]:
    name = method.method if not method.failed else f"{method.method} ({method.failed} failed)"
    return [
        name,
        *(show(method.perplexity.get(text)) for text in texts),
        show(method.seconds, 1),
        _show_bytes(method.memory_beyond_model),
        _show_bytes(method.memory_with_model),
        f"{method.trainable_parameters:,}",
        human_bytes(method.shipped_bytes),
        show_settings(method.settings),
    ]


def time_table(report: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of how long each method took to each other's final quality."""
    targets = {
        method.method: method.perplexity["validation"].mean
        for method in report.methods
        if "validation" in method.perplexity
    }
    header = ["seconds to the quality of", *(f"{name} ({value:.2f})" for name, value in targets.items())]
    rows = []
    for method in report.methods:
        cells = []
        for name in targets:
            reached = method.seconds_to[name]
            some = f" ({reached.runs} of {method.runs})" if 0 < reached.runs < method.runs else ""
            cells.append("never" if reached.seconds is None else show(reached.seconds, 1) + some)
        rows.append([method.method, *cells])
    return header, rows


def search_table(report: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of every try of the search."""
    header = ["method", "settings", "validation perplexity", "seconds", ""]
    return header, [_search_row(trial) for trial in report.trials]


def _search_row(trial: Trial) -> list[str]:
    if trial.error is not None:
        return [trial.method, show_settings(trial.settings), "failed", "", trial.error]
    chosen = "chosen" if trial.chosen else ""
    if trial.perplexity is None or trial.seconds is None:
        return [trial.method, show_settings(trial.settings), "not tried", "", chosen]
    return [trial.method, show_settings(trial.settings), f"{trial.perplexity:.2f}", f"{trial.seconds:.1f}", chosen]


def conditions(report: Comparison) -> str:
    """Say in a paragraph what was compared, and how."""
    options, documents = report.options, report.documents
    validation = counted(documents["validation"], "validation document")
    choose = "choose" if documents["validation"] > 1 else "chooses"
    searched = (
        f"For each method {report.trials_each} settings were tried, on {report.search_tokens:,} tokens each, and "
        f"chosen by {validation}, which also {choose} the best weights of every run."
        if report.trials_each > 1
        else "For each method the middle of its search space was taken, untried; "
        f"{validation} {choose} the best weights of every run."
    )
    return (
        f"{report.model}: {counted(report.steps, 'step')} of {options['batch_size']} x {options['sequence_length']} "
        f"tokens (for {report.tokens:,} tokens; {report.passes:g} passes through "
        f"{counted(documents['training'], 'document')}), {counted(len(report.seeds), 'seed')}, mean ± standard "
        f"deviation. {searched} {_texts(report)}Seconds are of training, caching of hidden states included, loading "
        "the model and evaluating not."
    )


def _texts(report: Comparison) -> str:
    """Say what perplexities are over, and what of that was trained on."""
    parts = [
        f"{name} perplexity is over {counted(count, 'token')}"
        + f" from {counted(report.documents[name], 'document')}"
        + (f", {report.trained_on[name]:,} of which are trained on too" if name in report.trained_on else "")
        for name, count in report.evaluated_tokens.items()
    ]
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}, packed. " if parts else ""


def markdown(report: Comparison) -> str:
    """Render a comparison as a Markdown page."""
    where = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    remarks = [f"- {run.method}, seed {run.seed} failed: {run.error}\n" for run in report.runs if run.error]
    remarks += [
        f"- {run.method}, seed {run.seed}: no evaluation was better than before the first step, so it kept its start.\n"
        for run in report.runs
        if run.measured is not None and run.measured.kept_its_start
    ]
    return "\n".join(
        [
            f"# Ways to adapt {report.model}\n",
            conditions(report) + "\n",
            markdown_table(*main_table(report)),
            *remarks,
            "## Time to each other's quality\n",
            "The row's method first came to the column's mean final perplexity on the validation text after so many "
            "seconds of training. With `standalone`, what counts is the organ put back, which is evaluated at the end "
            "only.\n",
            markdown_table(*time_table(report)),
            "## The search\n",
            markdown_table(*search_table(report)),
            "".join(f"- {remark}\n" for remark in edges(report)),
            f"{report.machine}{_when(report)}; {where}.\n",
        ]
    )


def edges(report: Comparison) -> list[str]:
    """Say which settings were chosen at the end of three values or more, so that a wider search might find better ones.

    Of two values each is at an end.
    """
    remarks = []
    for method in report.methods:
        tried = [trial.settings for trial in report.trials if trial.method == method.method]
        for name, chosen in method.settings.items():
            values = [settings[name] for settings in tried if name in settings]
            numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
            if len(numbers) > 2 and chosen in (min(numbers), max(numbers)):
                end = "lowest" if chosen == min(numbers) else "highest"
                remarks.append(
                    f"{method.method}: {show_settings({name: chosen})} is the {end} that was tried; a wider search "
                    "might find better."
                )
    return remarks


def _when(report: Comparison) -> str:
    times = sorted(run.measured.finished for run in report.runs if run.measured and run.measured.finished)
    if not times:
        return ""
    return f"; the runs ended from {times[0]} to {times[-1]}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Render a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _curves(report: Comparison) -> list[_Curve]:
    """Reduce the runs' curves over seeds; every run is evaluated at the same steps."""
    curves = []
    for method, colour in zip(report.methods, COLOURS, strict=False):
        runs = [r.measured for r in report.runs if r.method == method.method and r.measured is not None]
        runs = [run for run in runs if run.curve_counts and run.curve]
        points = list(zip(*(run.curve for run in runs), strict=False))
        values = [[point.perplexity for point in at] for at in points]
        curves.append(
            _Curve(
                method.method,
                colour,
                [statistics.fmean(point.seconds for point in at) for at in points],
                [statistics.fmean(at) for at in values],
                [min(at) for at in values],
                [max(at) for at in values],
            )
        )
    return [curve for curve in curves if curve.seconds]


def quality_figure(report: Comparison) -> Any:
    """Draw quality against wall-clock as a plotly figure: a line for the mean, a band for the seeds."""
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    for curve in _curves(report):
        around = [*curve.seconds, *reversed(curve.seconds)]
        figure.add_scatter(
            x=around, y=[*curve.high, *reversed(curve.low)], fill="toself", line_width=0, fillcolor=curve.colour,
            opacity=0.2, hoverinfo="skip", showlegend=False, legendgroup=curve.method,
        )  # fmt: skip
        figure.add_scatter(
            x=curve.seconds, y=curve.mean, mode="lines+markers", name=curve.method, line_color=curve.colour,
            legendgroup=curve.method,
        )  # fmt: skip
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(title=_AXES[0], rangemode="tozero")
    figure.update_yaxes(title=_AXES[1], type="log")
    return figure


def html(report: Comparison) -> str:
    """Render quality against wall-clock as one page that needs nothing from elsewhere."""
    figure = quality_figure(report)
    figure.update_layout(title=f"Ways to adapt {report.model}", template="plotly_white")
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False}))


def svg(report: Comparison) -> str:
    """Render quality against wall-clock as a small vector image: a line for the mean, a band for the seeds."""
    curves = _curves(report)
    x, ticks_x = _scale([s for curve in curves for s in curve.seconds] + [0.0], _LEFT, _WIDTH - _MARGIN, log=False)
    values = [value for curve in curves for value in (*curve.low, *curve.high)] or [1.0]
    y, ticks_y = _scale(values, _HEIGHT - _BOTTOM, _MARGIN, log=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in ticks_x:
        parts.append(_line(x(tick), _HEIGHT - _BOTTOM, x(tick), _MARGIN))
        parts.append(_words(x(tick), _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle"))
    for tick in ticks_y:
        parts.append(_line(_LEFT, y(tick), _WIDTH - _MARGIN, y(tick)))
        parts.append(_words(_LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    parts.append(_words((_LEFT + _WIDTH) / 2, _HEIGHT - 14, _AXES[0], "middle"))
    parts.append(
        f'<text transform="translate(18 {_HEIGHT / 2 - 10:.0f}) rotate(-90)" text-anchor="middle">{_AXES[1]}</text>'
    )
    for number, curve in enumerate(curves):
        band = [*zip(curve.seconds, curve.high, strict=True), *reversed([*zip(curve.seconds, curve.low, strict=True)])]
        parts.append(f'<polygon points="{_path(band, x, y)}" fill="{curve.colour}" opacity="0.2"/>')
        middle = list(zip(curve.seconds, curve.mean, strict=True))
        parts.append(f'<polyline points="{_path(middle, x, y)}" fill="none" stroke="{curve.colour}" stroke-width="2"/>')
        top = _MARGIN + 16 + 18 * number
        parts.append(f'<rect x="{_WIDTH - 140}" y="{top - 9}" width="18" height="4" fill="{curve.colour}"/>')
        parts.append(_words(_WIDTH - 116, top - 2, curve.method, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _scale(
    values: Sequence[float], start: float, stop: float, *, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Return a function from values to places on the page, and round values to mark on the axis."""
    change = math.log if log else float
    low, high = change(min(values)), change(max(values))
    width = (high - low) or 1.0
    ticks = [tick for tick in _round_values(min(values), max(values)) if min(values) <= tick <= max(values)]
    return lambda value: start + (change(value) - low) / width * (stop - start), ticks


def _round_values(low: float, high: float) -> list[float]:
    """Return about six multiples of 1, 2 or 5 times a power of ten that cover a range."""
    raw = max(high - low, 1e-9) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(step * number, 12) for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _words(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaping.escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(first):.1f},{y(second):.1f}" for first, second in points)
