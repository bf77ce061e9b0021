"""The command line: every verb succeeds and fails as it says, and scripts can rely on what it prints."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import neurograft
from neurograft import transplant
from neurograft.cli import app, application
from neurograft.organ import Organ
from tiny import LAYERS

Run = Callable[..., Result]
VERBS = (
    "extract", "train", "inspect", "check", "compose", "merge", "transplant", "recover", "evaluate", "compare",
    "remove", "demo",
)  # fmt: skip


@pytest.fixture
def run() -> Run:
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"report {number}: nothing to be seen, patient well" for number in range(12)))
    return path


def test_long_work_is_told_line_by_line_where_there_is_no_terminal(
    run: Run, donor: Path, organ: Organ, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organ.save(tmp_path / "organ.safetensors")
    command = ["train", tmp_path / "organ.safetensors", "--host", donor, "--data", text, "--steps", 3, "--json"]
    result = run(*command, "--sequence-length", 16, "-o", tmp_path / "quick.safetensors")
    assert "step 2/3" not in result.stderr  # short work needs no telling
    monkeypatch.setattr(application, "_SECONDS_BETWEEN_LINES", 0.0)
    result = run(*command, "--sequence-length", 16, "-o", tmp_path / "told.safetensors")
    assert re.search(r"^step 2/3 .* held-out perplexity [\d.]+", result.stderr, re.MULTILINE)
    assert json.loads(result.stdout)["name"]


def test_the_whole_story_by_command(run: Run, donor: Path, recipient: Path, text: Path, tmp_path: Path) -> None:
    organ, trained = tmp_path / "organ.safetensors", tmp_path / "trained.safetensors"
    steps: list[tuple[list[Any], str]] = [
        (["extract", donor, "--layers", "2:4", "-o", organ, "--license", "MIT"], "from 2:4 of the 6 of llama"),
        (
            ["train", organ, "--host", donor, "--data", text, "-o", trained, "--steps", 3, "--sequence-length", 16],
            "in_place",
        ),
        (["inspect", trained], "perplexity"),
        (["check", trained, donor], "position 2 matches"),
        (
            ["transplant", trained, recipient, "--at", 1, "--mode", "replace", "-o", tmp_path / "out"],
            "replace at position 1",
        ),
        (
            [
                "evaluate",
                tmp_path / "out",
                "--data",
                f"domain={text}",
                "--baseline",
                recipient,
                "--gate",
                "domain<=9*baseline",
            ],
            "passed",
        ),
        (
            [
                *("recover", tmp_path / "out", "--data", text, "-o", tmp_path / "recovered", "--scope", "neighbours"),
                *("--unfreeze", "gradual", "--general", text, "--steps", 2, "--sequence-length", 16),
            ],
            "up to 1 on each side",
        ),
        (["remove", tmp_path / "recovered", "-o", tmp_path / "back"], "equal to the original's, to the bit"),
    ]
    for words, expected in steps:
        result = run(*words)
        assert result.exit_code == 0, (words, result.output)
        assert expected in result.stdout, (words, result.stdout)


def test_json_is_one_document_and_nothing_else(run: Run, donor: Path, text: Path, tmp_path: Path) -> None:
    organ = tmp_path / "organ.safetensors"
    for words, key in [
        (["extract", donor, "-o", organ], "schema_version"),
        (["inspect", organ], "tensors_digest"),
        (["check", organ, donor], "findings"),
        (["transplant", organ, donor, "-o", tmp_path / "out"], "operations"),
        (["evaluate", donor, "--data", text], "data"),
        (
            [
                "recover",
                tmp_path / "out",
                "--data",
                text,
                "-o",
                tmp_path / "new",
                "--steps",
                1,
                "--sequence-length",
                16,
            ],
            "recoveries",
        ),
        (["remove", tmp_path / "out", "-o", tmp_path / "back"], "original_restored"),
        (["inspect", tmp_path / "nowhere.safetensors"], "error"),
        (["remove", donor, "-o", tmp_path / "x"], "error"),
    ]:
        result = run(*words, "--json")
        assert key in json.loads(result.stdout), words
        assert result.stdout.count("\n") == 1
        assert (result.exit_code == 0) == (key != "error")


def test_errors_are_one_sentence_on_standard_error(
    run: Run, donor: Path, organ_file: Path, text: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    for words, reason in [
        (
            ["extract", donor, "--layers", "4:9", "-o", f"{new}.safetensors"],
            "4:9 does not lie inside a model of 6 layers",
        ),
        (["extract", tmp_path / "nowhere", "-o", f"{new}.safetensors"], "there is no model at"),
        (["extract", donor, "-o", organ_file], "exists already"),
        (
            ["train", organ_file, "--host", donor, "--data", "no.txt", "-o", f"{new}.safetensors"],
            "no file or folder no.txt",
        ),
        (["train", organ_file, "--host", donor, "--data", text, "-o", f"{new}.safetensors", "--lr", 7], "--lr"),
        (["inspect", text], "truncated or no safetensors file"),
        (["check", organ_file, text], "is a file; a model is a transformers directory"),
        (
            ["transplant", organ_file, donor, "--at", LAYERS + 1, "--mode", "insert", "-o", new],
            "position 7 is out of range",
        ),
        (["transplant", organ_file, donor, "-o", donor], "overlaps the input"),
        (["evaluate", donor, "--data", f"a={text}", "--gate", "b<3"], "names the data set b; there are a"),
        (["evaluate", donor, "--data", "a="], "write NAME=PATH"),
        (["recover", donor, "--data", text, "-o", new], "has no neurograft.json"),
        (["recover", tmp_path / "nowhere", "--data", text, "-o", new], "is no directory"),
        (["remove", donor, "-o", new], "has no neurograft.json"),
        (["remove", tmp_path / "nowhere", "-o", new], "is no directory"),
    ]:
        result = run(*words)
        assert result.exit_code == 2, (words, result.output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and reason in lines[0], (words, result.stderr)
        assert result.stdout == "" and "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["organ.safetensors", "text.txt"]


def test_no_output_replaces_an_input(run: Run, donor: Path, text: Path, organ: Organ, tmp_path: Path) -> None:
    model, new = tmp_path / "model", tmp_path / "new"
    shutil.copytree(donor, model)
    organ.save(tmp_path / "organ.safetensors")
    transplant(organ, donor, at=2, mode="replace", output=tmp_path / "grafted")
    (model / "texts").mkdir()
    (model / "texts" / "a.txt").write_text("nothing")
    train = ["train", tmp_path / "organ.safetensors", "--host", model, "--data", text, "--steps", 1]
    recover = ["recover", tmp_path / "grafted", "--data", text, "--steps", 1, "-o", new, "--save-organ"]
    compare = ["compare", "--model", model, "--data", text, "--tokens", 9, "-o"]
    link = tmp_path / "link.safetensors"
    link.symlink_to(model / "model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for words, reason in [
        (["extract", model, "-o", model / "model.safetensors"], "overlaps the input"),
        (["extract", model, "-o", model / "organ.safetensors"], "overlaps the input"),
        (["extract", model, "-o", link], "overlaps the input"),
        ([*train, "-o", model / "model.safetensors"], "overlaps the input"),
        ([*train, "-o", tmp_path / "organ.safetensors"], "overlaps the input"),
        ([*train, "-o", tmp_path / "organ.bin"], "ends in .safetensors"),
        ([*recover, tmp_path / "grafted" / "model.safetensors"], "overlaps the input"),
        ([*recover, new / "organ.safetensors"], "which is written as a whole"),
        ([*compare, model / "comparison"], "overlaps the input"),
        ([*compare, model / "texts" / "comparison", "--general", model / "texts"], "overlaps the input"),
    ]:
        result = run(*words, "--overwrite")
        assert result.exit_code == 2 and reason in result.stderr, (words, result.output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_values_that_no_command_takes(
    run: Run, donor: Path, organ_file: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurograft.demonstration.find_packaged_model", lambda: donor)
    monkeypatch.setattr("neurograft.demonstration.find_ontology", lambda: text)
    monkeypatch.chdir(donor)  # what an empty name must not mean
    new = tmp_path / "new.safetensors"
    train = ["train", organ_file, "--host", donor, "--data", text, "-o", new]
    recover = ["recover", donor, "--data", text, "-o", tmp_path / "new"]
    (tmp_path / "other").mkdir()
    shutil.copy(text, tmp_path / "other")
    for words, reason in [
        (["extract", donor, "-o", new, "--organ-version", "banana"], "'banana'; write a semantic version"),
        ([*train, "--organ-version", "banana"], "'banana'; write a semantic version"),
        (["extract", "", "-o", new], "the model's name is empty"),
        (["recover", "", *recover[2:]], "'' is no directory"),
        ([*train, "--data", ""], "a path of text is empty"),
        *(([*words, "--seed", seed], "--seed") for words in (train, recover) for seed in (-1, 1 << 63)),
        (["evaluate", donor, "--data", text, "--seed", -1], "--seed"),
        *(([*train, "--epochs", value], "--epochs: Input should be a finite number") for value in ("inf", "nan")),
        ([*recover, "--weight-decay", "inf"], "--weight-decay: Input should be a finite number"),
        (["demo", "--folder", text], "is a file"),
        (["evaluate", donor, "--data", text, "--data", tmp_path / "other" / text.name], "would both be called text"),
    ]:
        result = run(*words)
        assert result.exit_code == 2 and reason in " ".join(result.stderr.split()), (words, result.output)
        assert "unexpected" not in result.stderr and "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["organ.safetensors", "other", "text.txt"]


def test_an_interrupted_demo_without_a_folder_begins_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt("training stopped after step 3 of 9; the same command goes on from there")

    monkeypatch.setattr("neurograft.demonstration.find_packaged_model", lambda: tmp_path)
    monkeypatch.setattr("neurograft.demonstration.find_ontology", lambda: tmp_path)
    monkeypatch.setattr("neurograft.demonstration._Story.play", interrupted)
    result = run("demo")
    assert result.exit_code == 130 and "after step 3 of 9; the demo's temporary folder was deleted" in result.stderr
    assert "the same command goes on" not in result.stderr
    assert "the same command goes on" in run("demo", "--folder", tmp_path / "kept").stderr


def test_what_nobody_foresaw_is_no_verdict(run: Run, organ_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("neurograft.organ.read_manifest", fails)
    result = run("inspect", organ_file, "--json")
    message = json.loads(result.stdout)["error"]["message"]
    assert result.exit_code == 2 and message.startswith("unexpected error: KeyError: ") and "report it" in message
    assert result.stderr == f"error: {message}\n"
    monkeypatch.setenv("NEUROGRAFT_TRACEBACK", "1")
    shown = run("inspect", organ_file)
    assert shown.exit_code == 2 and "in fails" in shown.stderr and shown.stdout == ""


def test_verdicts_are_exit_status_one(
    run: Run, donor: Path, organ_file: Path, model_directory: Any, text: Path
) -> None:
    result = run("check", organ_file, model_directory("llama", seed=1, hidden_size=64))
    assert result.exit_code == 1 and "blocked" in result.stdout and "hidden_size" in result.stdout
    blocked = run("check", organ_file, donor, "--at", 9, "--json")
    assert blocked.exit_code == 1 and json.loads(blocked.stdout)["blocked"] is True
    result = run("evaluate", donor, "--data", f"a={text}", "--gate", "a<1")
    assert result.exit_code == 1 and "FAILED  a<1" in result.stdout


def test_several_organs_by_command(run: Run, donor: Path, recipient: Path, text: Path, tmp_path: Path) -> None:
    first, second, merged = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "merged"))
    for path in (first, second):
        run("extract", donor, "--layers", "2:4", "--name", path.stem, "-o", path)
    two, both = [first, second, recipient], tmp_path / "both"
    steps: list[tuple[list[Any], int, str]] = [
        (["compose", *two], 1, "do not go together"),
        (["compose", *two, "--at", 0, "--at", 3, "--data", f"a={text}", "-o", tmp_path / "r.md"], 0, "go together"),
        (["compose", *two, "--at", 0, "--at", 3, "--mode", "insert", "--json"], 0, '"blocked": false'),
        (["transplant", *two, "-o", both], 2, "or merge the two into one organ (neurograft merge)"),
        (["transplant", *two, "--at", 0, "--at", 3, "-o", both], 0, "replace at position 3"),
        (["transplant", *two, "--mode", "fly", "-o", tmp_path / "x"], 2, "'fly'; it can be replace or insert"),
        (["transplant", *two, *["--at", 0] * 3, "-o", tmp_path / "x"], 2, "3 positions were given for 2 organs"),
        (["remove", both, "--organ", "first", "-o", tmp_path / "half"], 0, "second"),
        (
            ["merge", first, second, "--method", "ties", "--base", donor, "-o", merged],
            0,
            "by ties from first 0.1.0 (50%)",
        ),
        (["inspect", merged], 0, "second 0.1.0 (50%)"),
        (["merge", first, second, "--weights", "3,1", "-o", tmp_path / "m.safetensors", "--json"], 0, '"weight":0.75'),
        (["merge", first, second, "--weights", "3;1", "-o", tmp_path / "x.safetensors"], 2, "separated by commas"),
        (["merge", first, "-o", tmp_path / "x.safetensors"], 2, "a merge takes two or more"),
        (["compose", *two, "--data", "a="], 2, "write NAME=PATH"),
    ]
    for words, status, expected in steps:
        result = run(*words)
        assert result.exit_code == status and expected in " ".join(result.output.split()), (words, result.output)
    assert (tmp_path / "r.md").read_text().startswith("# first, second in llama")


@pytest.mark.parametrize(
    "words", [["extract"], ["extract", "x"], ["fly"], ["inspect", "--wings"], ["check", "a", "b", "--mode", "fly"]]
)
def test_wrong_words(words: list[str], run: Run) -> None:
    result = run(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, run: Run) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout


def test_verbs_are_functions_too(run: Run) -> None:
    for verb in VERBS:
        assert callable(getattr(neurograft, verb)), verb
    importlib.import_module("neurograft.demonstration")  # a module of the same name would hide the function

    assert callable(neurograft.demo)
    assert run("--version").stdout == f"neurograft {neurograft.__version__}\n"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = _python(
        "import sys\nfrom neurograft.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_the_list_of_commands_is_the_same_without_their_options() -> None:
    start = "import sys\nsys.argv[0] = 'neurograft'\nfrom neurograft.cli import app, main\n"
    for words in (["--help"], ["-h"], ["--version"]):
        quick, whole = (
            subprocess.run(
                [sys.executable, "-c", start + how, *words], capture_output=True, text=True, check=True
            ).stdout
            for how in ("main()", "app()")
        )
        assert quick == whole and ("transplant" in quick or words == ["--version"])


def test_an_interruption_while_it_starts_ends_it_without_a_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == sys.argv[1]:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "import neurograft.cli\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    for module, status, output in (("neurograft.cli.trust", -signal.SIGINT, ""), ("none", 0, "True\n")):
        done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (status, output, "")


def test_piped_output_is_plain(organ_file: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "neurograft", "inspect", organ_file], capture_output=True, text=True, check=True
    )
    digest = neurograft.inspect(organ_file).file_digest
    assert digest in result.stdout and "\x1b" not in result.stdout and result.stderr == ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_in_one_sentence(
    sent: signal.Signals, donor: Path, organ_file: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new.safetensors"
    words = ["train", organ_file, "--host", donor, "--data", text, "-o", output, "--steps", "1000000"]
    words += ["--checkpoint-every", "0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "neurograft", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    while not output.with_name(f"{output.name}.resume").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and re.fullmatch(  # on a busy machine, lines on what it is doing come before
        r"error: interrupted; training stopped after step \d+ of 1000000; the same command goes on from there\.",
        err.splitlines()[-1],
    )
    left = ["new.safetensors.resume", "organ.safetensors", "text.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--json"], "Missing argument 'ORGAN'."),
        (
            ["transplant", "a", "b", "-o", "c", "--link", "soft", "--json"],
            "'soft' is not one of 'auto', 'copy', 'hard'.",
        ),
        (["nosuch", "--json"], "No such command 'nosuch'."),
    ],
)
def test_wrong_arguments_are_one_json_document_too(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "neurograft", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "UsageError" and message in error["message"] and "Value error" not in error["message"]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
