"""The paper's questions and what came of them here, as people read it: published figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neurograft.placement.results import Place, PlaceScore, ScanReport
from neurograft.study import cross_domain_report
from neurograft.study.paper_results import PaperReport, PositionStudy, Transfer
from neurograft.training import comparison_report
from neurograft.training.comparison_report import COLOURS, markdown_table, show
from neurograft.wording import counted

PAPER = "arXiv 2601.13580"
_POSITION_HEADER = ["position", "as it comes", "after recovery", "untrained layers after recovery"]
_TRANSFER_HEADER = ["organ", "at home, times the host's", "sibling tuned on", "there, times the sibling's", "gain kept"]
# Ratios further apart than this are drawn on a logarithmic scale.
_WIDE = 3.0


@dataclass(frozen=True)
class Published:
    """One row of the paper: perplexities after an organ, LoRA and full fine-tuning."""

    model: str
    layer_count: int
    layers: str
    position: int
    organ: float
    lora: float
    full: float | None


PUBLISHED = (
    Published("GPT-2 124M", 12, "4-6", 1, 17.33, 668.40, 1352.05),
    Published("TinyLlama 1.1B", 22, "7-9", 3, 54.15, 460.41, 788.36),
    Published("GPT-OSS 20B", 24, "8-10", 4, 34.56, 98.37, None),
)


@dataclass(frozen=True)
class Question:
    """One of the paper's questions."""

    title: str
    published: str
    """What the paper says to it, as far as that could be had."""
    answers: Callable[[PaperReport], list[str]]
    """What came of it here, a sentence each."""


def _position_answers(report: PaperReport) -> list[str]:
    return [_position_answer(study, report.layer_count) for study in report.positions]


def _position_answer(study: PositionStudy, layer_count: int) -> str:
    pairs = study.pairs()
    if not pairs:
        return f"{study.domain}: no position could be measured."
    organ, nothing = (min(places, key=_ratio) for places in zip(*pairs, strict=True))
    ahead = sum(_ratio(place) < _ratio(control) for place, control in pairs)
    arriving = [_ratio(place) for place in study.as_it_comes.places if place.domain is not None]
    return (
        f"{study.domain}: as it comes, the organ multiplies the model's perplexity by {min(arriving):,.2f} to "
        f"{max(arriving):,.2f}. After recovery it is best at {organ.position} of {layer_count} "
        f"({_third(organ.position, layer_count)}), at {_shown(organ.domain)} times the model's. Untrained layers come "
        f"to {_shown(nothing.domain)} at {nothing.position}; the organ is ahead of them at {ahead} of {len(pairs)} "
        "positions."
    )


def _third(position: int, layer_count: int) -> str:
    return ("early", "in the middle", "late")[min(3 * position // max(layer_count, 1), 2)]


def _ratio(place: Place) -> float:
    return place.domain.ratio if place.domain is not None else math.inf


def _shown(score: PlaceScore | None) -> str:
    return "?" if score is None else f"{score.ratio:,.3f} [{score.low:,.3f}, {score.high:,.3f}]"


def _transfer_answers(report: PaperReport) -> list[str]:
    return [_transfer_answer(transfer) for transfer in report.transfers]


def _transfer_answer(transfer: Transfer) -> str:
    home, away = transfer.scores()
    kept = "it gains nothing at home" if transfer.kept is None else f"{transfer.kept:.0%} of its gain is kept"
    return (
        f"{transfer.domain}: {home.show_ratio()} times the perplexity of the host that it was trained in, and "
        f"{away.show_ratio()} times that of the same model after all its layers were trained on {transfer.tuned_on}; "
        f"{kept}."
    )


def _together_answers(report: PaperReport) -> list[str]:
    together = report.together
    sentences = [
        f"{item.data}: all organs together come to {item.show_ratio()} times the perplexity of the best alone "
        f"({item.best})."
        for item in together.interference
    ]
    return [f"The organs {together.verdict()}.", *sentences]


def _comparison_answers(report: PaperReport) -> list[str]:
    sentences = []
    for domain, comparison in report.comparisons.items():
        found = [(m.method, m.perplexity["domain"]) for m in comparison.methods if "domain" in m.perplexity]
        found.sort(key=lambda each: each[1].mean)
        each = ", ".join(f"{name} {show(perplexity)}" for name, perplexity in found)
        sentences.append(f"{domain}: untrained {comparison.untrained['domain']:,.2f}; {each}.")
    return sentences


def _cross_domain_answers(report: PaperReport) -> list[str]:
    trained = {arm.arm for arm in report.cross_domain.arms}
    target = next((domain for domain in report.domains if domain not in trained), "the general text")
    return [f"The target is {target}.", *cross_domain_report.findings(report.cross_domain)]


QUESTIONS = (
    Question(
        "Where does an organ go?",
        "position decides, and its best positions are early: "
        + ", ".join(f"{row.position} of {row.layer_count} in {row.model}" for row in PUBLISHED)
        + ".",
        _position_answers,
    ),
    Question(
        "Is an organ of use in another model?",
        "it asks for transferability; no figures for it could be had.",
        _transfer_answers,
    ),
    Question(
        "What do several organs come to?",
        "it puts several organs into one model; no figures for it could be had.",
        _together_answers,
    ),
    Question(
        "How does it stand beside LoRA and full fine-tuning?",
        "an organ reaches a far lower perplexity than either, in 2 to 28 times less time than LoRA; the perplexities "
        "are in the table. LoRA's and full fine-tuning's are hard to square with untrained models, whose perplexity on "
        "ordinary English is in the tens, and the data and code could not be had to check.",
        _comparison_answers,
    ),
    Question(
        "Does an organ from another domain help?",
        "at a billion parameters it acts as a regulariser.",
        _cross_domain_answers,
    ),
)


def conditions(report: PaperReport) -> str:
    """Say in a paragraph what was done, and how."""
    options = report.options
    return (
        f"{report.model} ({report.layer_count} layers), organs of {counted(report.layers, 'layer')}, domains "
        f"{' and '.join(report.domains)}. {report.tokens:,} training tokens in all: {report.run_tokens:,} for each "
        f"organ, sibling and measured run, {report.recovery_tokens:,} for each recovery at a position, in steps of "
        f"{options['batch_size']} x {options['sequence_length']}. The comparison and the last question ran with "
        f"{counted(len(report.seeds), 'seed')}, everything else once. All figures are of documents that nothing "
        "trained on or was chosen by. A recovery that made things worse on held-out text of its own is not kept, and "
        "shows as none. Intervals are 95 %, by bootstrap over documents."
    )


def comparison_table(report: PaperReport) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of published perplexities, and of ours."""
    header = ["perplexity on the domain", "untrained", "organ", "organ, standalone", "LoRA", "full"]
    rows = [
        [f"{row.model}, published", "not given", "", f"{row.organ:,.2f}", f"{row.lora:,.2f}",
         "none" if row.full is None else f"{row.full:,.2f}"]
        for row in PUBLISHED
    ]  # fmt: skip
    for domain, comparison in report.comparisons.items():
        found = {method.method: method.perplexity.get("domain") for method in comparison.methods}
        cells = [show(found.get(name)) for name in ("organ", "standalone", "lora", "full")]
        rows.append([f"{report.model}, {domain}", f"{comparison.untrained['domain']:,.2f}", *cells])
    return header, rows


def position_table(study: PositionStudy) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of one domain's perplexity at each position, over the model's own."""
    curves = [_scores(scan) for scan in (study.as_it_comes, study.recovered, study.control)]
    positions = sorted(set().union(*curves))
    rows = [[str(position), *(_shown(curve.get(position)) for curve in curves)] for position in positions]
    return _POSITION_HEADER, rows


def _scores(scan: ScanReport) -> dict[int, PlaceScore]:
    return {place.position: place.domain for place in scan.places if place.domain is not None}


def transfer_table(report: PaperReport) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of what organs are worth in another model."""
    rows = []
    for transfer in report.transfers:
        home, away = transfer.scores()
        kept = "" if transfer.kept is None else f"{transfer.kept:.0%}"
        rows.append([transfer.domain, home.show_ratio(), transfer.tuned_on, away.show_ratio(), kept])
    return _TRANSFER_HEADER, rows


def position_figure(study: PositionStudy) -> Any:
    """Draw one domain's perplexity over positions, over the model's own."""
    import plotly.graph_objects as plots

    figure: Any = plots.Figure()
    drawn = zip(_POSITION_HEADER[1:], (study.as_it_comes, study.recovered, study.control), COLOURS, strict=False)
    for name, scan, colour in drawn:
        scores = _scores(scan)
        figure.add_scatter(
            x=list(scores), y=[score.ratio for score in scores.values()], mode="lines+markers", name=name,
            line_color=colour,
            error_y={
                "type": "data", "symmetric": False, "thickness": 1,
                "array": [score.high - score.ratio for score in scores.values()],
                "arrayminus": [score.ratio - score.low for score in scores.values()],
            },
        )  # fmt: skip
    figure.add_hline(y=1.0, line_dash="dot", line_color="#8a97a5", annotation_text=study.recovered.recipient)
    figure.update_xaxes(title=f"position, 0 to {study.recovered.layer_count}")
    highest = max((_ratio(place) for place in study.as_it_comes.places if place.domain is not None), default=1.0)
    figure.update_yaxes(title="perplexity, times the model's", type="log" if highest > _WIDE else "linear")
    return figure


def markdown(report: PaperReport) -> str:
    """Render the study as a Markdown page."""
    where = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [f"# The paper's questions, asked of {report.model}\n", conditions(report) + "\n"]
    for number, question in enumerate(QUESTIONS, 1):
        answers = "".join(f"- {answer}\n" for answer in question.answers(report))
        parts += [f"## {number}. {question.title}\n", f"The paper: {question.published} Here:\n", answers]
        parts += [markdown_table(*found) + "\n" for found in _tables(report, number)]
    parts.append(f"{report.date}; {report.machine}; {where}.\n")
    return "\n".join(parts)


def _tables(report: PaperReport, number: int) -> Sequence[tuple[list[str], list[list[str]]]]:
    return (
        [position_table(study) for study in report.positions],
        [transfer_table(report)],
        [report.together.table()],
        [comparison_table(report), *map(comparison_report.main_table, report.comparisons.values())],
        [cross_domain_report.table(report.cross_domain)],
    )[number - 1]
