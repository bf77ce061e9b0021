"""The cross-domain study trains what it says, keeps it, holds organs against both controls, and shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import Factory
from neurograft import study_cross_domain
from neurograft.cli import app
from neurograft.errors import UsageError
from neurograft.files import alone_in
from neurograft.organ import read_manifest
from neurograft.reporting.sources import read_sources
from neurograft.study import cross_domain_report
from neurograft.study.results import NO_ORGAN, UNTRAINED, ArmRun, CrossDomainReport, GapPoint, summarise
from neurograft.training import measuring

SMALL: dict[str, Any] = {
    "tokens": 512, "organ_tokens": 128, "target_tokens": 128, "layers": 1, "seeds": 2, "evaluations": 2,
    "sequence_length": 16, "batch_size": 4, "lr": 3e-3,
}  # fmt: skip


def _write(path: Path, sentence: str, count: int = 40) -> Path:
    path.write_text("".join(json.dumps({"text": sentence.format(number)}) + "\n" for number in range(count)))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    sentences = {"clinical": "nodule {} of the left lung", "law": "paragraph {} of the act", "target": "ship {} at sea"}
    return {name: _write(folder / f"{name}.jsonl", sentence) for name, sentence in sentences.items()}


@pytest.fixture(scope="module")
def done(
    model_directory: Factory, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[CrossDomainReport, Path]:
    folder = tmp_path_factory.mktemp("study") / "out"
    domains = {name: texts[name] for name in ("clinical", "law")}
    return study_cross_domain(
        model_directory("llama"), domains=domains, target=texts["target"], output=folder, isolated=False, **SMALL
    ), folder


def test_every_arm_runs_with_every_seed_and_watches_both_texts(done: tuple[CrossDomainReport, Path]) -> None:
    report, _ = done
    assert [each.arm for each in report.arms] == ["clinical", "law", UNTRAINED, NO_ORGAN]
    assert sorted((run.arm, run.seed) for run in report.runs) == sorted(
        (arm.arm, seed) for arm in report.arms for seed in (0, 1)
    )
    assert [point.step for point in report.runs[0].points] == [0, 4, 8]
    for run in report.runs:
        assert run.error is None
        assert run.points[-1].training < run.points[0].training  # it learns what it trains on


def test_an_untrained_insert_and_no_organ_start_as_the_same_model(done: tuple[CrossDomainReport, Path]) -> None:
    starts = {(run.arm, run.seed): run.points[0].held_out for run in done[0].runs}
    assert starts[UNTRAINED, 0] == pytest.approx(starts[NO_ORGAN, 0], rel=1e-5)
    assert starts["clinical", 0] != pytest.approx(starts[UNTRAINED, 0], rel=1e-5)
    assert starts["clinical", 0] != starts["law", 0] and starts["clinical", 0] != starts["clinical", 1]


def test_the_organs_stay_as_files_with_their_protocol(done: tuple[CrossDomainReport, Path]) -> None:
    report, folder = done
    (path,) = (folder / "organs").glob("clinical-0-*.safetensors")
    manifest = read_manifest(path)
    assert (manifest.recommended_mode, manifest.recommended_position) == ("insert", report.position)
    assert manifest.training is not None and manifest.training.protocol == "insert"


def test_a_study_goes_on_and_runs_only_what_is_new(
    done: tuple[CrossDomainReport, Path],
    model_directory: Factory,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "measure_here", lambda *_: pytest.fail("ran again"))
    domains = {name: texts[name] for name in ("clinical", "law")}
    again = study_cross_domain(
        model_directory("llama"), domains=domains, target=texts["target"], output=done[1], isolated=False,
        overwrite=True, **SMALL,
    )  # fmt: skip
    assert again == done[0]


def test_the_page_and_the_report_verb_show_it(done: tuple[CrossDomainReport, Path]) -> None:
    report, folder = done
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('class="plot"') == 2 and "Does an organ from law lower" in page
    assert "ship 3 at sea" not in page
    ((name, found),) = read_sources([folder]).studies
    assert (name, found) == ("out", report)
    assert "| no organ |" in (folder / "results.md").read_text(encoding="utf-8")


def test_organs_are_held_against_controls_with_the_same_seed() -> None:
    def run(arm: str, seed: int, best: float | None) -> ArmRun:
        points = [GapPoint(step=0, training=9, held_out=10), GapPoint(step=1, training=4, held_out=8)]
        return ArmRun(arm=arm, seed=seed, points=points if best else [], best=best, error=None if best else "diverged")

    runs = [run("a", 0, 6.0), run("a", 1, 7.0), run("b", 0, 6.0), run("b", 1, None)]
    runs += [run(control, seed, best) for control in (UNTRAINED, NO_ORGAN) for seed, best in ((0, 6.5), (1, 6.9))]
    a, b, *_ = summarise(["a", "b", UNTRAINED, NO_ORGAN], runs)
    assert a.gap is not None and a.gap.mean == pytest.approx(math.log(2))
    assert a.lower == {UNTRAINED: 1, NO_ORGAN: 1}
    assert a.against[NO_ORGAN].mean == pytest.approx((math.log(6 / 6.5) + math.log(7 / 6.9)) / 2)
    assert b.runs == 1 and b.against[NO_ORGAN].deviation is None


def test_an_answer_is_yes_only_if_every_seed_says_so(done: tuple[CrossDomainReport, Path]) -> None:
    report = done[0]
    lower = {UNTRAINED: 2, NO_ORGAN: 2}
    arms = [arm.model_copy(update={"lower": lower}) if arm.arm == "law" else arm for arm in report.arms]
    sure = report.model_copy(update={"arms": arms})
    assert sure.regularises("law")
    assert any("from law" in line and "? yes" in line for line in cross_domain_report.findings(sure))
    arms = [arm.model_copy(update={"lower": {**lower, NO_ORGAN: 1}}) if arm.arm == "law" else arm for arm in arms]
    assert not report.model_copy(update={"arms": arms}).regularises("law")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {}}, "at least one domain"),
        ({"domains": {"no organ": "x"}}, "can't be a domain's name"),
        ({"at": 99}, "position 99 is outside"),
        ({"layers": 99}, "can't be made of"),
        ({"seeds": 0}, "must be positive"),
        ({"patience": 3}, "decides patience itself"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    changes: dict[str, Any], message: str, model_directory: Factory, texts: dict[str, Path], tmp_path: Path
) -> None:
    given = {"domains": {"law": texts["law"]}, "target": texts["target"], **SMALL, **changes}
    with pytest.raises(UsageError, match=message):
        study_cross_domain(model_directory("llama"), output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_a_domain_looks_like(tmp_path: Path, texts: dict[str, Path]) -> None:
    arguments = ["study", "cross-domain", "model", "--domain", "law", "--data", str(texts["target"]), "--tokens", "9"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 2
    assert "write NAME=PATH" in json.loads(result.stdout)["error"]["message"]


def test_one_run_at_a_time_works_in_a_folder(
    done: tuple[CrossDomainReport, Path], model_directory: Factory, texts: dict[str, Path]
) -> None:
    folder = done[1]
    given: dict[str, Any] = {"domains": {"law": texts["law"]}, "target": texts["target"], "overwrite": True, **SMALL}
    (folder / ".cache-live").mkdir()
    with alone_in(folder), pytest.raises(UsageError, match="another run is at work in "):
        study_cross_domain(model_directory("llama"), output=folder, isolated=False, **given)
    assert (folder / ".cache-live").is_dir()  # it may be the other run's
    (folder / ".cache-live").rmdir()


def test_less_than_two_passes_are_said_to_tell_nothing_of_learning_by_heart(
    done: tuple[CrossDomainReport, Path],
) -> None:
    assert not any("passed over" in line for line in cross_domain_report.findings(done[0]))
    short = done[0].model_copy(update={"tokens": done[0].target_tokens})
    assert "passed over 1 times" in cross_domain_report.findings(short)[0]
