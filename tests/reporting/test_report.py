"""A report: what it shows of each source, that it needs nothing from elsewhere, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from neurograft import evaluate, report, train, transplant
from neurograft.cli import app
from neurograft.errors import OrganFileError, UsageError
from neurograft.organ import Organ
from neurograft.placement.costs import Cost
from neurograft.placement.plan_results import PlanReport, Proposal
from neurograft.placement.results import Place, PlaceScore, ScannedText, ScanReport

SENTENCES = "".join(f"report {n}: a shadow of grade {n % 7} in the left lung\n\n" for n in range(40))


class _Page(HTMLParser):
    """Collects the text outside scripts and styles, and every address that something would be fetched from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.addresses, self._skipped = "", list[str](), 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._skipped += tag in ("script", "style")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset") and value]

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data


def scan_report() -> ScanReport:
    def score(ratio: float) -> PlaceScore:
        return PlaceScore(
            documents=9, tokens=900, perplexity=20 * ratio, recipient=20, ratio=ratio, low=ratio - 0.1, high=ratio + 0.2
        )

    places = [
        Place(mode=mode, position=p, domain=score(1.5 - 0.1 * p)) for p in range(5) for mode in ("replace", "insert")
    ]
    text = ScannedText(documents=9, tokens=900, fingerprint="0" * 64, perplexity=20)
    fields: dict[str, Any] = {
        name: value
        for name, value in {
            "organ": "tiny", "recipient": "llama", "layer_count": 6, "organ_layers": 2, "mode": "replace",
            "position": 4, "tied": ["insert at 4"], "helps": False, "domain": text, "general": None, "places": places,
            "complete": True, "units": "documents", "prune": "halving", "recover_tokens": None, "sequence_length": 64,
            "max_tokens": 900, "seed": 0,
        }.items()
    }  # fmt: skip
    missing = {name: field for name, field in ScanReport.model_fields.items() if name not in fields}
    plain: dict[str, Any] = {"int": 1, "float": 1.0, "str": "x"}
    for name, field in missing.items():
        annotation = getattr(field.annotation, "__name__", "")
        if field.is_required():
            fields[name] = {} if annotation == "dict" else plain.get(annotation, {})
    return ScanReport.model_validate(fields)


@pytest.fixture
def trained(organ_file: Path, donor: Path, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES, encoding="utf-8")
    output = tmp_path / "trained.safetensors"
    train(organ_file, host=donor, data=text, output=output, steps=4, sequence_length=16, evaluations=2)
    return output


def test_everything_is_on_one_page(trained: Path, organ_file: Path, donor: Path, tmp_path: Path) -> None:
    model = tmp_path / "with-organ"
    transplant(trained, donor, output=model, mode="insert", at=1)
    (tmp_path / "scan.json").write_text(scan_report().model_dump_json(), encoding="utf-8")
    measured = evaluate(model, data={"words": tmp_path / "text.txt"}, baseline=donor, gates=["words<=2*baseline"])
    (tmp_path / "measured.json").write_text(measured.model_dump_json(), encoding="utf-8")
    command = ["compose", str(trained), str(organ_file), str(donor), "--data", f"words={tmp_path / 'text.txt'}"]
    together = CliRunner().invoke(app, [*command, "--at", "1", "--at", "4", "--mode", "insert", "--json"])
    (tmp_path / "together.json").write_text(together.stdout, encoding="utf-8")
    output = tmp_path / "report.html"
    sources = [model, trained, *(tmp_path / f"{name}.json" for name in ("scan", "measured", "together"))]
    written = report(sources, output=output, prompts=["a shadow <b>"], recipient=donor, tokens=5)
    html = output.read_text(encoding="utf-8")
    page = _Page(html)
    assert written.models == ["with-organ"] and len(written.organs) == 1  # the same organ, twice a source
    assert written.bytes == output.stat().st_size
    for words in (
        "with-organ has 8 layers: 6 are those of", "2 came with 1 organ", "0embedding"[1:], "tiny-in_place, layer 1",
        "What it claims", "How it was trained", "best replace at position 4, where it does not help there",
        "It can't be told apart from insert at 4", "words<=2*baseline", "holds", "a shadow <b>", "before",
        "together / best alone", "tiny-in_place, tiny in",
    ):  # fmt: skip
        assert words in page.text, words
    assert html.count("Plotly.newPlot(") >= 4
    assert page.addresses == ["data:,"]
    assert "grade" not in page.text  # no text of the data
    assert str(tmp_path) not in html  # nor where it lay


def test_a_plan_is_shown_with_what_the_layers_say(tmp_path: Path) -> None:
    cost = Cost(seconds=61.5, memory=2_000_000, bytes=3_000_000)
    best = Proposal(layers="4:6", protocol="in_place", mode="replace", position=4, cost=cost, gradient=0.5, trial=17.25)
    found = PlanReport(
        model="tiny", layer_count=6, tokens=5000, steps=10, trial_tokens=300, budget={"seconds": 90}, untrained=40.5,
        gradients=[1, 2, 3, 4, 5, 4], influence=[0.5, 0.1, 0.1, 0.1, 0.1, 0.2], lens=[9, 8, 7, 6, 5, 4, 3], best=best,
        proposals=[best], paper=best,
        seconds=3.0, commands=["neurograft extract"],
    )  # fmt: skip
    (tmp_path / "plan.json").write_text(found.model_dump_json(), encoding="utf-8")
    written = report(tmp_path / "plan.json", output=tmp_path / "page.html")
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert written.plans == ["plan"]
    for words in ("layers 4:6, in_place, replace at position 4", "limits: seconds 90", "17.25", "40.50", "3.0 MB"):
        assert words in page.text, words


def test_an_organ_without_training_has_no_plot(organ_file: Path, tmp_path: Path) -> None:
    report(organ_file, output=tmp_path / "page.html", title="A & B")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>A &amp; B</title>" in html and "plotly" not in html and len(html) < 20_000


def test_names_are_no_markup(organ: Organ, tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script>"
    update = {"description": evil, "license": evil}
    path = tmp_path / "organ.safetensors"
    Organ(organ.manifest.model_copy(update=update), organ.tensors).save(path)
    report(path, output=tmp_path / "page.html", title=evil)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and html.count("&lt;script&gt;alert(1)") == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [], "a report needs something to report on"),
        (lambda folder: [folder / "missing.json"], "missing.json does not exist; give an organ file"),
        (
            lambda folder: [_folder(folder)],
            "has neither neurograft.json, as a transplanted model has, nor the results.json of a",
        ),
        (
            lambda folder: [_written(folder, "{}")],
            "some.json is not what plan, scan, compare, compose, study or evaluate print with --json",
        ),
        (lambda folder: [_written(folder, "[" * 99_999)], "some.json is no organ file and no JSON"),
        (lambda folder: [_written(folder, "\x00")], "some.json is no organ file and no JSON"),
    ],
)
def test_sources_that_are_none(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        report(make(tmp_path), output=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def _folder(folder: Path) -> Path:
    (folder / "inner").mkdir()
    return folder / "inner"


def _written(folder: Path, content: str) -> Path:
    path = folder / "some.json"
    path.write_text(content, encoding="utf-8")
    return path


def test_options_that_do_not_go_together(organ_file: Path, donor: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(UsageError, match=r"page\.pdf should end in \.html"):
        report(organ_file, output=tmp_path / "page.pdf")
    with pytest.raises(UsageError, match="prompts need a model that goes on with them"):
        report(organ_file, output=page, prompts=["a"])
    with pytest.raises(UsageError, match="--recipient is the model that goes on with prompts"):
        report(organ_file, output=page, recipient=donor)
    page.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists"):
        report(organ_file, output=page)
    assert page.read_text(encoding="utf-8") == "mine"
    report(organ_file, output=page, overwrite=True)


def test_a_damaged_organ_is_refused(organ_file: Path, tmp_path: Path) -> None:
    raw = bytearray(organ_file.read_bytes())
    raw[-1] ^= 1
    organ_file.write_bytes(raw)
    with pytest.raises(OrganFileError):
        report(organ_file, output=tmp_path / "page.html")


def test_the_command_says_what_it_wrote(organ_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(organ_file), "-o", str(page), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["organs"] == ["tiny"]
    result = CliRunner().invoke(app, ["report", str(organ_file), "-o", str(page)])
    assert result.exit_code == 2 and "exists" in result.stderr
