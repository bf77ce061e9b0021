"""The page itself: one self-contained HTML file, light and dark, for screens, phones and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from neurograft.wording import harmless

# A page of a private model must not tell anybody that it is read: nothing is fetched, and nothing may be.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --paper: #ffffff; --panel: #f5f7f9;
  --host: #c9d3dd; --organ: #0072b2; --organ-ink: #ffffff; --good: #00704f; --bad: #b3400a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #39424c; --paper: #14181c;
  --panel: #1d2329; --host: #3d4955; --organ: #56b4e9; --organ-ink: #10151a; --good: #4cc79d; --bad: #f08a4b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 1.75rem; } p.note { color: var(--soft); } code, .mono { font-family: ui-monospace, monospace; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.better { color: var(--good); } .worse { color: var(--bad); }
dl { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: 0.2rem 1rem; } dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.stack { display: flex; flex-direction: column-reverse; gap: 2px; margin: 1rem 0; padding: 0; list-style: none;
  max-width: 26rem; }
.stack li { padding: 0 0.6rem; border-radius: 3px; background: var(--host); font-size: 0.75rem; line-height: 1.35rem; }
.stack li.organ { background: var(--organ); color: var(--organ-ink); font-weight: 600; }
.stack li.end { background: none; color: var(--soft); }
.plot { margin: 1rem 0; min-height: 20rem; } .plot .bg { fill: transparent !important; }
.plot text { fill: var(--ink) !important; } .plot .gridlayer path, .plot .zerolinelayer path, .plot .xlines-above,
.plot .ylines-above { stroke: var(--line) !important; }
.plot .hoverlayer text { fill: #ffffff !important; }
blockquote { margin: 0.5rem 0; padding: 0.5rem 1rem; border-left: 3px solid var(--line); background: var(--panel);
  white-space: pre-wrap; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } h1 { font-size: 1.3rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --panel: #fff; --host: #ddd;
  --organ: #0072b2; --organ-ink: #fff; --good: #000; --bad: #000; color-scheme: light; }
  body { max-width: none; } section, .plot, .stack { break-inside: avoid; }
  .stack li { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(title: str, sections: Sequence[str], *, plots: bool) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        sections: HTML of its sections.
        plots: Whether some section has a plot, which needs plotly's script.
    """
    script = f"<script>{_plotly()}</script>" if plots else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style>{script}</head>\n'
        f"<body><h1>{escape(title)}</h1>\n{harmless(''.join(sections))}</body></html>\n"
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def section(title: str, *parts: str, level: int = 2) -> str:
    """Return a section with a heading; parts are HTML, and empty ones count for nothing."""
    return f"<section><h{level}>{escape(title)}</h{level}>\n{''.join(parts)}</section>\n"


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph of plain text; nothing where there is none."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{escape(text)}</p>\n" if text else ""


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return a list of names and plain texts; those without a text are left out."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows if text)
    return f"<dl>{items}</dl>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain texts, which scrolls sideways where it is too wide; numbers stand to the right."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'


def _cell(text: str) -> str:
    kind = "number" if text.lstrip("+-")[:1].isdigit() else ""
    if text.endswith("%") and text[0] in "+-":
        kind += " worse" if text[0] == "+" else " better"
    return f'<td class="{kind}">{escape(text)}</td>'


def plot(figure: Any, description: str) -> str:
    """Return a plotly figure, with a description for those who can't see it."""
    figure.update_layout(
        template="plotly_white", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 16, "t": 32, "b": 48}, legend={"orientation": "h", "y": 1.12}, height=380,
    )  # fmt: skip
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return f'<div class="plot" role="img" aria-label="{escape(description, quote=True)}">{drawn}</div>\n'
