"""What `compose` found, and the same in Markdown."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from neurograft.findings import Finding
from neurograft.manifest import Mode


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OrganInside(_Part):
    """One organ, where it goes, and what `check` found about it."""

    name: str
    """In the result, where each name is there once."""
    version: str
    mode: Mode
    position: int
    """In the recipient as it is before."""
    layer_count: int
    findings: list[Finding]


class Segment(_Part):
    """A run of layers in the model with all the organs, from one source."""

    organ: str | None
    """`None` for the recipient."""
    start: int
    """First layer of the run in its source; the range is half-open."""
    stop: int


class Domain(_Part):
    """One data set."""

    name: str
    documents: int
    tokens: int


class _Ratio(_Part):
    """One perplexity over another, with a 95 % interval by bootstrap over documents."""

    ratio: float
    low: float
    high: float

    def show_ratio(self) -> str:
        """Write the ratio with its interval: `0.712 [0.690, 0.731]`."""
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Score(_Ratio):
    """A perplexity, and its ratio to the recipient's."""

    perplexity: float


class Interference(_Ratio):
    """The perplexity with all organs together over that with the one that alone is best on a data set."""

    data: str
    best: str


class Row(_Part):
    """The recipient with some organs in it, or none."""

    name: str
    organs: list[str]
    scores: dict[str, Score]
    """Data set -> perplexity."""


class CompositionReport(_Part):
    """Everything that `compose` found."""

    recipient: str
    organs: list[OrganInside]
    """In the order in which they come to stand."""
    layers: list[Segment]
    """What the model would consist of, first to last; empty if something blocks."""
    findings: list[Finding]
    """About the organs together: `overlap`, `together` and, once measured, `interference`, `general`, `order`."""
    data: list[Domain] = []
    rows: list[Row] = []
    """The matrix organs x data sets; empty if no text was given, or something blocks."""
    interference: list[Interference] = []
    sequence_length: int | None = None
    seed: int

    @property
    def blocked(self) -> bool:
        """Whether the transplant of all of them must not be done."""
        found = [*self.findings, *(finding for organ in self.organs for finding in organ.findings)]
        return any(finding.severity == "blocks" for finding in found)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the matrix."""
        header = ["inside", *(domain.name for domain in self.data)]
        rows = [[row.name, *(_cell(row, domain.name) for domain in self.data)] for row in self.rows]
        if len(self.organs) > 1:
            found = {item.data: item for item in self.interference}
            rows.append(
                ["together / best alone", *(f"{i.show_ratio()} ({i.best})" for i in (found[d.name] for d in self.data))]
            )
        return header, rows

    def stack(self) -> str:
        """Write the model's layers in one line: `recipient 0:10, clinical 0:3, recipient 13:30`."""
        return ", ".join(f"{segment.organ or 'recipient'} {segment.start}:{segment.stop}" for segment in self.layers)

    def verdict(self) -> str:
        """Say in a few words what the findings come to."""
        if self.blocked:
            return "do not go together"
        risky = any(finding.severity == "risks" for finding in self.findings)
        return "go together, with risks" if risky else "go together"

    def markdown(self) -> str:
        """Return the report as a Markdown page."""
        parts = [f"# {', '.join(organ.name for organ in self.organs)} in {self.recipient}", f"They {self.verdict()}."]
        header = ["organ", "version", "mode", "position", "layers"]
        parts.append(
            _table(header, [[o.name, o.version, o.mode, str(o.position), str(o.layer_count)] for o in self.organs])
        )
        if self.layers:
            parts.append(f"Layers: {self.stack()}.")
        if self.rows:
            sizes = ", ".join(f"{d.name}: {d.documents:,} documents, {d.tokens:,} tokens" for d in self.data)
            parts += [
                "## Perplexity",
                _table(*self.table()),
                "In parentheses the ratio to the recipient's, with its 95 % interval by bootstrap over documents; the "
                "last row sets all organs beside the one that alone is best. Windows of "
                f"{self.sequence_length} tokens; {sizes}.",
            ]
        lines = [f"- **{finding.severity}** {finding.sentence()}" for finding in self.findings]
        lines += [f"- **{f.severity}** {organ.name}: {f.sentence()}" for organ in self.organs for f in organ.findings]
        parts += ["## Findings", "\n".join(lines) or "None."]
        return "\n\n".join(parts) + "\n"


def _cell(row: Row, name: str) -> str:
    score = row.scores[name]
    return f"{score.perplexity:,.2f}" + (f" ({score.show_ratio()})" if row.organs else "")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
