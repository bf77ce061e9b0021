"""Reports in a real browser: nothing fetched, nothing complained of, plots there, readable on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neurograft import report, train, transplant

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; `make browser` installs it")
# Its own background traffic, which a closed network refuses, would be mistaken for the page's.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page_file(organ_file: Path, donor: Path, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"report {n}: a shadow of grade {n % 7}\n\n" for n in range(40)), encoding="utf-8")
    trained, model = tmp_path / "trained.safetensors", tmp_path / "with-organ"
    train(organ_file, host=donor, data=text, output=trained, steps=4, sequence_length=16, evaluations=2)
    transplant(trained, donor, output=model, mode="replace")
    report([model, trained], output=tmp_path / "report.html", prompts=["a shadow"], tokens=5)
    return tmp_path / "report.html"


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens(size: dict[str, int], scheme: str, browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector(".plot .main-svg .plot .trace, .plot .main-svg .barlayer .point", state="attached")
    assert complaints == []
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    drawn = page.locator(".plot .js-plotly-plot").count()
    assert drawn == page.locator(".plot").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    # The words of the axes are read on the ground that the reader chose.
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(_channels(ink)) > sum(_channels(paper))) == (scheme == "dark")
    assert page.locator(".stack li.organ").count() == 2


def _channels(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
