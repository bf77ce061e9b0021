"""The study of the paper's questions divides its tokens, keeps what it did, and shows published figures beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import Factory
from neurograft import study_paper
from neurograft.cli import app
from neurograft.data import Documents
from neurograft.errors import NeurograftError, UsageError
from neurograft.organ import read_manifest
from neurograft.reporting.sources import read_sources
from neurograft.study import paper as studying
from neurograft.study.paper_report import QUESTIONS, comparison_table, position_table
from neurograft.study.paper_results import METHODS, PaperReport, divide
from neurograft.training import measuring
from tiny import LAYERS

SMALL: dict[str, Any] = {
    "tokens": 7000, "layers": 1, "positions": 3, "seeds": 1, "trials": 1, "sequence_length": 16, "batch_size": 2,
    "eval_tokens": 256, "precision": "float32",
}  # fmt: skip
SENTENCES = {"clinical": "nodule {} of the left lung, of grade {}", "law": "paragraph {} of the act of year {}"}


def _documents(sentence: str) -> Documents:
    return Documents(sentence.format(number, number % 7) for number in range(200))


@pytest.fixture(scope="module")
def domains() -> dict[str, Documents]:
    return {name: _documents(sentence) for name, sentence in SENTENCES.items()}


@pytest.fixture(scope="module")
def done(
    model_directory: Factory, domains: dict[str, Documents], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PaperReport, Path]:
    folder = tmp_path_factory.mktemp("study") / "out"
    report = study_paper(
        model_directory("llama"), domains=domains, general=_documents("ship {} at sea {}"), output=folder,
        isolated=False, **SMALL,
    )  # fmt: skip
    return report, folder


def test_all_runs_together_have_the_tokens_that_were_given() -> None:
    budget: dict[str, Any] = {"domains": 2, "crossed": 2, "positions": 7, "seeds": 3, "trials": 3, "step": 512}
    shares = divide(1_000_000, **budget)
    runs = 2 * 2 + 2 + 2 * len(METHODS) * 3 + 3 * (2 * 2 + 2)
    recoveries, trials = 2 * 2 * 7, 2 * len(METHODS) * 3

    def used(run: int) -> float:
        return runs * run + recoveries * run / 2 + trials * run / 4

    assert used(shares.run) <= 1_000_000 < used(shares.run + 512)
    assert shares.run % 512 == 0 and (shares.recovery, shares.trial) == (shares.run // 2, shares.run // 4)
    with pytest.raises(UsageError, match="give at least") as caught:
        divide(100_000, **budget)
    least = int(str(caught.value).split("give at least ")[1].split(", or")[0].replace(",", ""))
    assert divide(least, **budget).trial == 2 * 512
    with pytest.raises(UsageError, match="give at least"):
        divide(least - 1, **budget)


def test_every_question_is_asked_of_every_domain(done: tuple[PaperReport, Path]) -> None:
    report, _ = done
    assert [study.domain for study in report.positions] == list(SENTENCES)
    for study in report.positions:
        for scan in (study.as_it_comes, study.recovered, study.control):
            assert [place.position for place in scan.places] == [0, LAYERS // 2, LAYERS]
            assert scan.general is not None and all(place.mode == "insert" for place in scan.places)
        assert study.as_it_comes.recover_tokens is None
        assert study.recovered.recover_tokens == study.control.recover_tokens == report.recovery_tokens
    assert [(transfer.domain, transfer.tuned_on) for transfer in report.transfers] == [
        ("clinical", "law"), ("law", "clinical"),
    ]  # fmt: skip
    assert {organ.position for organ in report.together.organs} == {LAYERS // 3, 2 * (LAYERS // 3)}
    assert set(report.comparisons) == set(SENTENCES)
    for comparison in report.comparisons.values():
        assert [method.method for method in comparison.methods] == list(METHODS)
        assert comparison.tokens == report.run_tokens
    assert report.cross_domain.domains == ["clinical", "law"] and report.cross_domain.tokens == report.run_tokens


def test_a_sibling_is_another_model_and_the_gain_that_is_kept_is_in_nats(done: tuple[PaperReport, Path]) -> None:
    for transfer in done[0].transfers:
        home, away = transfer.scores()
        alone = [next(row for row in report.rows if not row.organs) for report in (transfer.home, transfer.away)]
        assert alone[0].scores[transfer.tuned_on].perplexity > alone[1].scores[transfer.tuned_on].perplexity
        assert home.ratio < 1 and transfer.kept == pytest.approx(math.log(away.ratio) / math.log(home.ratio))


def test_nothing_is_measured_on_text_that_trained(
    done: tuple[PaperReport, Path], domains: dict[str, Documents]
) -> None:
    report, folder = done
    held_out = report.comparisons["law"].fingerprints["domain"]
    study = next(study for study in report.positions if study.domain == "law")
    assert {scan.domain.fingerprint for scan in (study.as_it_comes, study.recovered)} == {held_out}
    for path in (folder / "organs").glob("law-*.safetensors"):
        training = read_manifest(path).training
        assert training is not None and training.data_fingerprint != held_out
        assert training.documents < len(domains["law"]) - 5


def test_a_study_goes_on_and_trains_nothing_again(
    done: tuple[PaperReport, Path], model_directory: Factory, domains: dict[str, Documents], monkeypatch: Any
) -> None:
    for module, name in ((measuring, "measure_here"), (studying, "train"), (studying, "scan"), (studying, "compose")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("ran again"))
    again = study_paper(
        model_directory("llama"), domains=domains, general=_documents("ship {} at sea {}"), output=done[1],
        isolated=False, overwrite=True, **SMALL,
    )  # fmt: skip
    assert again.model_copy(update={"seconds": done[0].seconds}) == done[0]


def test_no_sibling_and_no_text_stay_behind(done: tuple[PaperReport, Path]) -> None:
    _, folder = done
    assert not [path for path in folder.rglob("*") if path.name.startswith(".cache")]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"nodule 3 of the left" not in content and b"paragraph 3 of" not in content, path


def test_the_page_and_the_report_verb_show_every_question(done: tuple[PaperReport, Path], tmp_path: Path) -> None:
    report, folder = done
    page, text = (folder / "report.html").read_text(encoding="utf-8"), (folder / "results.md").read_text("utf-8")
    for number, question in enumerate(QUESTIONS, 1):
        assert f"{number}. {question.title}" in page and f"## {number}. {question.title}" in text
    assert "668.40" in page and "668.40" in text
    ((name, found),) = read_sources([folder]).papers
    assert name == "out" and found.model_copy(update={"seconds": report.seconds}) == report
    result = CliRunner().invoke(app, ["report", str(folder), "-o", str(tmp_path / "page.html"), "--json"])
    assert json.loads(result.stdout)["studies"] == ["out"]
    assert QUESTIONS[0].title in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_published_figures_stand_above_ours(done: tuple[PaperReport, Path]) -> None:
    header, rows = comparison_table(done[0])
    assert [row[0] for row in rows][:3] == [f"{name}, published" for name in
                                            ("GPT-2 124M", "TinyLlama 1.1B", "GPT-OSS 20B")]  # fmt: skip
    ours = done[0].comparisons["law"]
    lora = next(method for method in ours.methods if method.method == "lora")
    assert rows[-1][header.index("LoRA")] == f"{lora.perplexity['domain'].mean:,.2f}"
    _, places = position_table(done[0].positions[0])
    assert [row[0] for row in places] == ["0", str(LAYERS // 2), str(LAYERS)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {"law": _documents("paragraph {} {}")}}, "at least two domains"),
        ({"layers": LAYERS}, "don't go into"),
        ({"tokens": 1000}, "too few"),
        ({"positions": 1}, "positions at least 2"),
        ({"lr": 1e-3}, "decides lr itself"),
        ({"sequence_length": 256, "tokens": 120_000}, "held-out clinical text in 7 windows"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    changes: dict[str, Any], message: str, model_directory: Factory, domains: dict[str, Documents], tmp_path: Path
) -> None:
    with pytest.raises(NeurograftError, match=message):
        study_paper(model_directory("llama"), output=tmp_path / "out", **{"domains": domains, **SMALL, **changes})
    assert not (tmp_path / "out").exists()
