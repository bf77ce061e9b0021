"""The study of the paper's questions as sections of a page."""

from __future__ import annotations

from neurograft.reporting import sections
from neurograft.reporting.page import paragraph, plot, section, table
from neurograft.study import paper_report
from neurograft.study.paper_results import PaperReport, PositionStudy


def paper_sections(report: PaperReport) -> list[str]:
    """Render each question: what the paper says, what came of it here, and the pictures and tables to it."""
    details = (
        [_positions(study) for study in report.positions],
        [section("The figures", table(*paper_report.transfer_table(report)), level=3)],
        [sections.composition_section("the organs of all domains", report.together)],
        [
            section("Published figures, and ours", table(*paper_report.comparison_table(report)), level=3),
            *(sections.comparison_section(domain, found) for domain, found in report.comparisons.items()),
        ],
        [sections.cross_domain_section("a small text", report.cross_domain)],
    )
    parts = [section(f"Beside {paper_report.PAPER}", paragraph(paper_report.conditions(report)))]
    for number, (question, more) in enumerate(zip(paper_report.QUESTIONS, details, strict=True), 1):
        answers = [paragraph(answer) for answer in question.answers(report)]
        title = f"{number}. {question.title}"
        parts.append(section(title, paragraph(f"The paper: {question.published}"), section("Here", *answers, level=3)))
        parts += more
    return parts


def _positions(study: PositionStudy) -> str:
    description = f"perplexity on {study.domain} at each position, before and after recovery, beside untrained layers"
    return section(
        f"Positions: {study.domain}",
        plot(paper_report.position_figure(study), description),
        table(*paper_report.position_table(study)),
        level=3,
    )
