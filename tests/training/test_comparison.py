"""A comparison is fair, can be interrupted, keeps what it finished, and says what it found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import Factory
from neurograft import compare, extract
from neurograft.cli import app
from neurograft.errors import DataError, DiskError, NeurograftError, UsageError
from neurograft.loss import NextTokenLoss
from neurograft.training import comparison_report, measuring
from neurograft.training.baselines import METHODS
from neurograft.training.comparison_results import Comparison, Run, Trial, _reached, summaries
from neurograft.training.measuring import Job, Measured, Point
from neurograft.training.run_state import state_path
from neurograft.wording import counted

EVERY = "organ,insert,standalone,lora,dora,full"
SMALL: dict[str, Any] = {
    "tokens": 192, "seeds": 1, "trials": 1, "evaluations": 2, "sequence_length": 16, "batch_size": 4, "isolated": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = [f"report {number}: nodule of grade {number % 4}, seen in the left lung" for number in range(40)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "general.txt"
    path.write_text("\n\n".join(f"chapter {number}, in which the dog ran home" for number in range(12)))
    return path


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Tensor]]:
    """What each method's run was trained on, batch by batch; filled with the report below."""
    return {}


@pytest.fixture(scope="module")
def everything(
    donor: Path,
    text: Path,
    general: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seen: dict[str, list[Tensor]],
) -> tuple[Comparison, Path]:
    """A comparison of all methods."""
    output = tmp_path_factory.mktemp("compare") / "out"
    measure, losses = measuring.measure, NextTokenLoss.__call__

    def noted(job: Job, show: Any = None) -> Measured:
        batches: list[torch.Tensor] = []

        def noting(loss: NextTokenLoss, input_ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                batches.append(input_ids.clone())
            return losses(loss, input_ids, *rest, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NextTokenLoss, "__call__", noting)
            measured = measure(job, show)
        seen[f"{job.method} {job.options['seed']}"] = batches
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "measure", noted)
        report = compare(donor, data=text, general=general, output=output, methods=EVERY, **{**SMALL, "seeds": 2})
    return report, output


def test_every_method_sees_the_same_batches_in_the_same_order(
    everything: tuple[Comparison, Path], seen: dict[str, list[Tensor]]
) -> None:
    for seed in (0, 1):
        first = seen[f"organ {seed}"]
        assert len(first) == 3 and all(batch.shape == (4, 16) for batch in first)
        for method in EVERY.split(","):
            batches = seen[f"{method} {seed}"]
            assert len(batches) == 3 and all(map(torch.equal, batches, first)), method
    assert not torch.equal(seen["organ 0"][0], seen["organ 1"][0])


def test_the_report_says_what_each_method_came_to(everything: tuple[Comparison, Path], donor: Path) -> None:
    report, _ = everything
    assert [method.method for method in report.methods] == EVERY.split(",")
    assert report.steps == 3 and report.seeds == [0, 1] and 0 < report.passes < 1
    assert set(report.untrained) == {"validation", "domain", "general"}
    assert {method.tokens_seen for method in report.methods} == {3 * 4 * 15}
    by_name = {method.method: method for method in report.methods}
    for method in report.methods:
        assert method.runs == 2 and method.failed == 0 and method.shipped_bytes > 0
        assert method.perplexity["domain"].mean < report.untrained["domain"], method.method
        assert method.perplexity["domain"].deviation is not None and method.seconds is not None
        assert method.memory_with_model is not None and method.memory_with_model.mean > 1e7
        assert method.seconds_with_evaluations is not None
        assert method.seconds_with_evaluations.mean > method.seconds.mean
        assert method.trainable_bytes == 4 * method.trainable_parameters
    everything_trains = by_name["full"].trainable_parameters
    assert everything_trains * 4 == by_name["full"].shipped_bytes > by_name["organ"].shipped_bytes
    assert by_name["dora"].trainable_parameters > by_name["lora"].trainable_parameters
    for run in report.runs:
        assert run.measured is not None and run.measured.curve_counts == (run.method != "standalone")
        assert [point.step for point in run.measured.curve] == [0, 2, 3]
        if run.method != "standalone":
            # What chose the best weights during training is what the finished model is measured to be.
            best = min(point.perplexity for point in run.measured.curve)
            assert run.measured.perplexity["validation"] == pytest.approx(best, rel=1e-5)
            assert run.measured.curve[0].perplexity == pytest.approx(report.untrained["validation"], rel=1e-4)
            times = [point.seconds for point in run.measured.curve]
            assert times == sorted(times) and times[-1] <= run.measured.seconds + 1e-6


def test_the_files_say_the_same(everything: tuple[Comparison, Path]) -> None:
    report, output = everything
    assert sorted(path.name for path in output.iterdir()) == [
        "quality.html", "quality.svg", "results.json", "results.md", "runs",
    ]  # fmt: skip
    assert Comparison.model_validate_json((output / "results.json").read_text()) == report
    page = (output / "results.md").read_text()
    for method in report.methods:
        assert f"| {method.method} | {comparison_report.show(method.perplexity['domain'])} |" in page
    drawing = ElementTree.fromstring((output / "quality.svg").read_text())
    lines = drawing.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5  # standalone's curve is of another model
    assert all(len(line.attrib["points"].split()) == 3 for line in lines)
    html = (output / "quality.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", html) and "insert" in html


def test_no_text_is_left_behind(everything: tuple[Comparison, Path]) -> None:
    _, output = everything
    for path in output.rglob("*"):
        assert path.is_dir() or b"nodule" not in path.read_bytes()


def test_what_is_finished_is_not_run_again(
    everything: tuple[Comparison, Path],
    donor: Path,
    text: Path,
    general: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, shared = everything
    output = shutil.copytree(shared, tmp_path / "out")  # other tests read what is there
    ran: list[str | None] = []
    measure = measuring.measure

    def counted(job: Job, show: Any = None) -> Measured:
        ran.append(job.method)
        return measure(job, show)

    monkeypatch.setattr(measuring, "measure", counted)
    arguments: dict[str, Any] = {**SMALL, "data": text, "general": general, "output": output, "methods": EVERY}
    with pytest.raises(UsageError, match="holds a finished comparison already"):
        compare(donor, **{**arguments, "seeds": 2})
    again = compare(donor, **{**arguments, "seeds": 2, "overwrite": True})
    assert not ran and again == report
    more = compare(donor, **{**arguments, "seeds": 3, "methods": "lora", "overwrite": True})
    assert ran == ["lora"] and more.runs[:2] == [run for run in report.runs if run.method == "lora"]
    compare(donor, **{**arguments, "methods": "lora", "overwrite": True, "batch_size": 2})
    assert ran == ["lora", None, "lora"]


def test_an_interrupted_comparison_goes_on(
    donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, ran = measuring.measure, list[str | None]()

    def stopped(job: Job, show: Any = None) -> Measured:
        if job.method == "full" and "stopped" not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(job.method)
        return measure(job, show)

    monkeypatch.setattr(measuring, "measure", stopped)
    arguments: dict[str, Any] = {**SMALL, "data": text, "output": tmp_path / "out", "methods": "organ,full"}
    with pytest.raises(KeyboardInterrupt, match="full, seed 0, run 1 of 1 was not finished; the same command goes on"):
        compare(donor, **arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["runs"]
    compare(donor, **arguments)
    assert ran == [None, "organ", "stopped", "full"]


def test_the_search_finds_the_better_learning_rate(donor: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("organ: {lr: [1e-6, 1e-2], layers: [3]}\nlora: {lr: [1e-2, 1e-6]}\n")
    report = compare(
        donor, data=text, output=tmp_path / "out", methods="organ,lora", search=tmp_path / "search.yaml",
        **{**SMALL, "trials": 2, "search_tokens": 128},
    )  # fmt: skip
    assert {method.settings["lr"] for method in report.methods} == {1e-2}
    for method in ("organ", "lora"):
        trials = {float(trial.settings["lr"]): trial for trial in report.trials if trial.method == method}
        assert set(trials) == {1e-6, 1e-2}
        good, bad = trials[1e-2], trials[1e-6]
        assert good.chosen and not bad.chosen and good.seconds is not None
        assert good.perplexity is not None and bad.perplexity is not None and good.perplexity < bad.perplexity
    assert report.search_tokens == 128 and report.trials_each == 2


def test_what_fails_counts_as_tried(donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measuring.measure

    def fragile(job: Job, show: Any = None) -> Measured:
        if job.settings.get("lr") == 0.5 or job.options.get("seed") == 1:
            raise NeurograftError("training diverged: the loss at step 2 is nan.")
        return measure(job, show)

    monkeypatch.setattr(measuring, "measure", fragile)
    (tmp_path / "search.json").write_text('{"full": {"lr": [0.5, 0.001]}}')
    arguments: dict[str, Any] = {
        **SMALL, "data": text, "output": tmp_path / "out", "methods": "full", "search": tmp_path / "search.json",
    }  # fmt: skip
    report = compare(donor, **{**arguments, "trials": 2, "seeds": 2})
    failed = [trial for trial in report.trials if trial.error]
    assert [trial.settings["lr"] for trial in failed] == [0.5] and not failed[0].chosen
    assert (report.methods[0].runs, report.methods[0].failed) == (1, 1)
    page = (tmp_path / "out" / "results.md").read_text()
    assert "full (1 failed)" in page and "full, seed 1 failed: training diverged" in page
    (tmp_path / "search.json").write_text('{"full": {"lr": [0.5]}}')
    with pytest.raises(NeurograftError, match="nothing that was tried for full worked: training diverged"):
        (tmp_path / "search.json").write_text('{"full": {"lr": [0.5], "warmup": [0.5, 0.1]}}')
        compare(donor, **{**arguments, "trials": 2, "overwrite": True})


def _measured(validation: float, *curve: tuple[float, float], counts: bool = True) -> Measured:
    points = [Point(step=number, seconds=at, perplexity=value) for number, (at, value) in enumerate(curve)]
    return Measured(perplexity={"validation": validation}, curve=points, curve_counts=counts, seconds=9.0)


def test_a_full_disk_is_no_fault_of_a_method(
    donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measuring.measure

    def full(job: Job, show: Any = None) -> Measured:
        if job.method is not None:
            raise DiskError("the disk is full.")
        return measure(job, show)

    arguments: dict[str, Any] = {**SMALL, "data": text, "output": tmp_path / "out", "methods": "full"}
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "measure", full)
        with pytest.raises(DiskError, match="the disk is full"):
            compare(donor, **arguments)
    assert compare(donor, **arguments).methods[0].failed == 0


def test_a_full_disk_in_a_process_of_its_own_is_told_apart(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import errno\n"
        "from neurograft.training import measuring\n"
        "def full(*_):\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "measuring.measure = full\n"
        "measuring.main()\n"
    )
    monkeypatch.setattr(measuring, "_command", lambda: [sys.executable, "-c", code])
    with pytest.raises(DiskError, match="the disk is full"):
        measuring.measure_apart(
            Job(model=str(donor), method=None, training=["a"], validation=["b"]), str(tmp_path), print
        )


def test_what_makes_figures_weak_is_said(
    donor: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short.txt").write_text("Short.")
    (tmp_path / "search.yaml").write_text("full: {lr: [1e-6, 1e-5, 1e-3]}\n")
    report = compare(
        donor, data=text, eval_data=text, general=tmp_path / "short.txt", output=tmp_path / "out", methods="full",
        search=tmp_path / "search.yaml", **{**SMALL, "trials": 3},
    )  # fmt: skip
    assert "40 documents of the domain text are in the training text too" not in caplog.text  # some are for validation
    assert re.search(r"\d+ documents of the domain text are in the training text too", caplog.text)
    assert re.search(r"the general text has \d+ tokens, too few for its perplexity to say much", caplog.text)
    page = (tmp_path / "out" / "results.md").read_text()
    assert f"from 40 documents, {report.trained_on['domain']} of which are trained on too" in page
    assert f"general perplexity is over {counted(report.evaluated_tokens['general'], 'token')} from 1 document" in page
    assert report.methods[0].settings["lr"] == 1e-3
    assert "- full: lr 0.001 is the highest that was tried; a wider search might find better.\n" in page
    assert report.runs[0].measured is not None and report.runs[0].measured.finished is not None


def test_a_run_that_got_no_better_is_said_to_keep_its_start(donor: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("full: {lr: [0.9]}\n")
    report = compare(
        donor, data=text, output=tmp_path / "out", methods="full", search=tmp_path / "search.yaml", **SMALL
    )
    (run,) = report.runs
    assert run.measured is not None and run.measured.kept_its_start
    assert run.measured.perplexity["domain"] == pytest.approx(report.untrained["domain"])
    assert (
        "full, seed 0: no evaluation was better than before the first step" in (tmp_path / "out/results.md").read_text()
    )


def test_time_to_quality_is_that_of_the_first_evaluation_that_is_as_good() -> None:
    runs = [_measured(10, (0, 30), (2, 20), (4, 10)), _measured(12, (0, 30), (3, 14), (5, 12))]
    reached = _reached(runs, 14)
    assert reached.runs == 2 and reached.seconds is not None
    assert (reached.seconds.low, reached.seconds.high, reached.seconds.mean) == (3, 4, 3.5)
    assert _reached(runs, 11).runs == 1 and _reached(runs, 9).seconds is None
    # Another model's curve says nothing; the finished run does.
    alone = _reached([_measured(13, (0, 30), (2, 5), counts=False)], 14)
    assert alone.seconds is not None and alone.seconds.mean == 9
    assert _reached([_measured(15, (0, 30), (2, 5), counts=False)], 14).runs == 0


def test_targets_are_means_over_seeds() -> None:
    methods = [METHODS["organ"], METHODS["full"]]
    trials = [Trial(method=m.name, settings={}, perplexity=1, seconds=1, chosen=True) for m in methods]
    runs = [
        Run(method="organ", seed=0, measured=_measured(10, (0, 30), (2, 15), (4, 10))),
        Run(method="organ", seed=1, measured=_measured(20, (0, 30), (3, 20))),
        Run(method="full", seed=0, measured=_measured(12, (0, 30), (8, 12))),
        Run(method="full", seed=1, measured=None, error="out of memory"),
    ]
    organ, full = summaries(methods, trials, runs)
    assert full.seconds_to["organ"].seconds is not None and full.seconds_to["organ"].seconds.mean == 8  # 15
    assert organ.seconds_to["full"].runs == 1 and organ.seconds_to["full"].seconds is not None
    assert organ.seconds_to["full"].seconds.mean == 4
    assert (full.runs, full.failed) == (1, 1) and organ.perplexity["validation"].mean == 15


def test_refusals(donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.txt").write_text("one\n\ntwo")
    (tmp_path / "three.txt").write_text("one\n\ntwo\n\nthree")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "wings.json").write_text('{"organ": {"wings": [2]}}')
    (tmp_path / "prefix.json").write_text('{"prefix": {"lr": [0.1]}}')
    (tmp_path / "layers.json").write_text('{"organ": {"layers": [7]}}')
    (tmp_path / "few.json").write_text('{"organ": {"lr": [0.1]}}')
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.iterdir())
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"methods": "organ,prefix"}, UsageError, "there is no method prefix"),
        ({"data": tmp_path / "two.txt"}, DataError, "2 documents can't be divided into training, validation and test"),
        ({"data": tmp_path / "three.txt"}, DataError, "fills 1 sequences of 16 tokens, and a batch takes 4"),
        ({"output": tmp_path / "full"}, UsageError, "exists and holds no comparison"),
        ({"output": tmp_path / "two.txt"}, UsageError, "is a file; give the name of a folder"),
        ({"output": tmp_path / "a" / "b"}, UsageError, "does not exist; create it first"),
        (
            {"search": tmp_path / "wings.json"},
            UsageError,
            "wings.json: wings is no setting that can be searched for organ",
        ),
        ({"search": tmp_path / "prefix.json"}, UsageError, "prefix.json: there is no method prefix"),
        ({"search": tmp_path / "layers.json"}, UsageError, "organ of 7 layers, and the model has 6"),
        ({"search": tmp_path / "few.json", "trials": 2}, UsageError, "organ has fewer than 2 combinations"),
        ({"seeds": 0}, UsageError, "at least one of each"),
        ({"lr": 1e-3}, UsageError, "compare decides lr itself"),
        ({"rank": 4}, UsageError, "compare decides rank itself"),
        ({"output": tmp_path / "nowhere"}, UsageError, "is a link to nothing"),
        ({"wings": 2}, UsageError, "--wings"),
    ]
    for changes, kind, reason in wrong:
        arguments = {**SMALL, "data": text, "output": tmp_path / "out", "methods": "organ", **changes}
        with pytest.raises(kind, match=re.escape(reason)):
            compare(donor, **arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(NeurograftError, match="compare needs plotly, which is not installed"):
        compare(donor, data=text, output=tmp_path / "out", methods="organ", **SMALL)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_has_a_process_and_a_cache_of_its_own(donor: Path, text: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    words = [
        "compare", "--model", donor, "--data", text, "--tokens", 128, "--methods", "organ", "--seeds", 1, "--trials", 1,
        "--sequence-length", 16, "--batch-size", 4, "--evaluations", 1, "-o", tmp_path / "out",
    ]  # fmt: skip
    result = runner.invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    report = Comparison.model_validate_json(result.stdout)
    assert report.methods[0].perplexity["domain"].mean < report.untrained["domain"]
    assert "general" not in report.untrained
    again = runner.invoke(app, [*map(str, words), "--overwrite"])
    assert again.exit_code == 0 and "untrained" in again.stdout and "written to" in again.stdout
    refused = runner.invoke(app, [*map(str, words), "--json"])
    assert refused.exit_code == 2 and "finished comparison" in json.loads(refused.stdout)["error"]["message"]


def test_a_process_that_dies_is_explained(
    donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(line: str) -> list[str]:
        return [sys.executable, "-c", f"import os, sys; sys.stdin.read(); {line}"]

    job = Job(model=str(donor), method="organ", training=["a"], validation=["b"])
    for line, reason in [
        ("os.kill(os.getpid(), 9)", "ended by signal 9; the machine's memory may be too small"),
        ("sys.exit('no such thing')", "status 1: no such thing"),
        (f"print('{measuring._ANSWER}' + '{{\"error\": \"it diverged\"}}')", "^it diverged$"),
    ]:
        monkeypatch.setattr(measuring, "_command", lambda line=line: dead(line))
        with pytest.raises(NeurograftError, match=reason):
            measuring.measure_apart(job, str(tmp_path), lambda _: None)


def _job(donor: Path, text: Path, method: str, folder: Path) -> Job:
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    organ = folder / "organ.safetensors"
    if method == "organ" and not organ.is_file():
        extract(donor, layers=(1, 3), name="tiny", output=organ)
    options = {"steps": 6, "evaluations": 3, "sequence_length": 16, "batch_size": 4, "lr": 0.003}
    return Job(
        model=str(donor), method=method, settings={"layers": "1:3"} if method == "organ" else {},
        organ=str(organ) if method == "organ" else None, options=options, watched_tokens=32,
        training=documents[:32], validation=documents[32:],
    )  # fmt: skip


def _came_to(measured: Measured) -> dict[str, Any]:
    """What does not depend on how fast the machine is."""
    found = measured.model_dump(exclude={"seconds", "seconds_with_evaluations", "finished", "curve"})
    curve = [(point.step, point.perplexity, point.training) for point in measured.curve]
    return {**{name: value for name, value in found.items() if not name.startswith("memory")}, "curve": curve}


@pytest.mark.parametrize("method", ["organ", "lora", "full"])
@pytest.mark.parametrize("isolated", [False, True])
def test_an_interrupted_run_goes_on(
    method: str, isolated: bool, donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isolated and method == "full":
        pytest.skip("the others show that processes of their own do it too")
    (tmp_path / "runs").mkdir()
    job = _job(donor, text, method, tmp_path)

    def run(name: str) -> Measured:
        return measuring.measure_once(job, {"name": name}, tmp_path, name, isolated=isolated)

    whole = run("whole")
    info = measuring.log.info

    def stop(message: str, *rest: Any) -> None:
        info(message, *rest)
        if any("step 3/" in str(part) for part in rest):
            raise KeyboardInterrupt

    monkeypatch.setattr(measuring.log, "info", stop)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    (left,) = (tmp_path / "runs").glob("*.resume")
    assert left.stat().st_mode & 0o077 == 0 and b"nodule" not in left.read_bytes()
    monkeypatch.undo()
    seen = list[str]()
    monkeypatch.setattr(measuring.log, "info", lambda message, *rest: seen.append(message % rest))
    again = run("stopped")
    first = next(line for line in seen if "step " in line)
    # A process of its own may have taken some steps more before it heard of it.
    assert "step 1/" not in first and "step 2/" not in first and "step 3/" not in first
    assert _came_to(again) == _came_to(whole)
    assert 0 < again.memory_beyond_model <= again.memory_with_model
    seconds = [point.seconds for point in again.curve]
    assert seconds == sorted(seconds) and seconds[-1] <= again.seconds < again.seconds_with_evaluations
    assert len(list((tmp_path / "runs").iterdir())) == 2  # the results


@pytest.mark.parametrize("damage", [lambda state: state[: len(state) // 2], lambda state: b"{}", lambda state: b""])
def test_a_damaged_state_is_no_fault_of_a_method(
    damage: Callable[[bytes], bytes], donor: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs").mkdir()
    job = _job(donor, text, "lora", tmp_path)
    whole = measuring.measure_once(job, {}, tmp_path, "whole", isolated=False)
    (result,) = (tmp_path / "runs").iterdir()
    result.unlink()

    def stop(line: str) -> None:
        if "step 2/" in line:
            raise KeyboardInterrupt

    state = state_path(result)
    key = measuring.digest_of({})
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(job.model_copy(update={"resume": str(state), "key": key}), stop)
    state.write_bytes(damage(state.read_bytes()))
    again = measuring.measure_once(job, {}, tmp_path, "again", isolated=False)
    assert "a run begins anew" in caplog.text and _came_to(again) == _came_to(whole)
    assert list((tmp_path / "runs").iterdir()) == [result]


def test_nothing_is_written_if_no_run_worked(
    donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measuring.measure

    def failing(job: Job, show: Any = None) -> Measured:
        if job.method is not None:
            raise NeurograftError("it diverged")
        return measure(job, show)

    monkeypatch.setattr(measuring, "measure", failing)
    with pytest.raises(NeurograftError, match="no run worked: it diverged"):
        compare(donor, data=text, output=tmp_path / "out", methods="organ,lora", **SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["runs"]


def test_settings_say_which_layers_an_organ_is_of(everything: tuple[Comparison, Path]) -> None:
    report, output = everything
    by_name = {method.method: method for method in report.methods}
    for name in ("organ", "insert", "standalone"):
        assert by_name[name].settings["layers"] == "4:6" and "position" not in by_name[name].settings
    assert "layers 4:6" in (output / "results.md").read_text()


def test_a_run_whose_comparison_is_killed_keeps_its_state(donor: Path, text: Path, tmp_path: Path) -> None:
    job = _job(donor, text, "organ", tmp_path).model_copy(update={"resume": str(tmp_path / "state"), "key": "k"})
    job.options["steps"] = 10**6
    process = subprocess.Popen(measuring._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(job.model_dump_json())
    process.stdin.close()
    assert process.stdout.readline().startswith("step 1/")
    process.stdout.close()
    assert process.wait(timeout=240) == 130
    assert (tmp_path / "state").is_file()


def test_a_run_that_diverges_leaves_no_state(donor: Path, text: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    job = _job(donor, text, "full", tmp_path).model_copy(update={"resume": str(state), "key": "k"})

    def stop(line: str) -> None:
        if "step 2/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measuring.measure(job, stop)
    assert state.is_file()
    with pytest.raises(NeurograftError, match="training diverged"):
        measuring.measure(job.model_copy(update={"options": {**job.options, "lr": 0.9, "weight_decay": 1e38}}))
    assert not state.is_file()


def test_a_run_goes_on_though_its_state_can_not_be_kept(
    donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise DiskError("the disk is full.")

    monkeypatch.setattr(measuring, "_SAVED_EVERY", 0.0)
    monkeypatch.setattr("neurograft.training.loop.save_state", full)
    job = _job(donor, text, "organ", tmp_path)
    job = job.model_copy(update={"resume": str(tmp_path / "state"), "options": {**job.options, "checkpoint_every": 0}})
    assert measuring.measure(job).steps == 6
    assert caplog.text.count("the run's state is not kept any more: the disk is full.") == 1

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^training stopped after step 1 of 6$"):
        measuring.measure(job, stop)


def test_an_interrupted_command_ends_its_process_and_leaves_no_cache(donor: Path, text: Path, tmp_path: Path) -> None:
    words = ["compare", "--model", donor, "--data", text, "--tokens", 10**9, "--methods", "organ", "-o", tmp_path / "o"]
    process = subprocess.Popen(
        [sys.executable, "-m", "neurograft", *map(str, words), "--trials", "1", "--sequence-length", "16"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not list((tmp_path / "o").glob("runs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "was not finished; the same command goes on from there" in errors
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["runs"]


def test_sequences_longer_than_the_model_takes(text: Path, model_directory: Factory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes at most 64 positions; give --sequence-length 64 or less"):
        compare(model_directory("gpt2"), data=text, output=tmp_path / "c", **{**SMALL, "sequence_length": 65})
