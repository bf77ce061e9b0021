"""Deployment, history and rollback: what passes is deployed, what does not changes nothing, and there is a way back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import Factory
from deployments import EASY, IMPOSSIBLE, everything, write_gates
from neurograft import deploy, extract, history, rollback
from neurograft.cli import app
from neurograft.deployment.folder import DeploymentFolder
from neurograft.errors import (
    DataError,
    DeploymentBusyError,
    DeploymentError,
    GateError,
    HistoryError,
    UsageError,
    VerificationError,
)
from neurograft.organ import Organ
from tiny import LAYERS, load, logits

Gates = Callable[[str], Path]


@pytest.fixture(scope="session")
def second(model_directory: Factory) -> Organ:
    return extract(model_directory("llama", seed=2), layers=(1, 2), name="second")


@pytest.fixture
def gates(tmp_path: Path) -> Gates:
    return lambda limit: write_gates(tmp_path, limit)


def _lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_the_first_deployment_keeps_the_start_and_serves_the_result(hospital: Path, recipient: Path) -> None:
    assert (hospital / "current").readlink() == Path("versions/0002-tiny")
    assert load(hospital / "current").config.num_hidden_layers == LAYERS
    assert torch.equal(logits(load(hospital / "versions" / f"0001-{recipient.name}")), logits(load(recipient)))
    start, deployed = history(hospital, verify="full").entries
    assert (start.action, start.before, deployed.action, deployed.before) == ("start", None, "deploy", start.version)
    assert deployed.organ is not None and deployed.organ.name == "tiny" and deployed.gates_digest is not None
    assert [gate.name for gate in deployed.gates] == ["reports"] and deployed.previous == start.digest
    whole = (hospital / "versions/0002-tiny").rglob("*")
    assert set(deployed.files) == {
        str(path.relative_to(hospital / "versions/0002-tiny")) for path in whole if path.is_file()
    }


def test_organs_go_in_and_out_and_back(hospital: Path, second: Organ, gates: Gates) -> None:
    base = history(hospital).entries[0].version
    report = deploy(second, to=hospital, gates=gates(EASY), mode="insert", at=5)
    assert report.deployed and (report.current, report.before) == ("0003-second", "0002-tiny")
    report = deploy(to=hospital, remove="tiny", gates=gates(EASY))
    assert report.deployed and report.current == "0004-without-tiny"
    assert load(hospital / "current").config.num_hidden_layers == LAYERS + 1
    for expected in ("0003-second", "0002-tiny", base):
        assert rollback(hospital).current == expected == (hospital / "current").readlink().name
    with pytest.raises(UsageError, match=f"{base} is what the deployment started from"):
        rollback(hospital)
    assert rollback(hospital, to=4, verify="full").current == "0004-without-tiny"
    with pytest.raises(UsageError, match="0004-without-tiny is deployed already"):
        rollback(hospital, to=4)
    with pytest.raises(UsageError, match=f"there is no version 9; there are {base}, 0002-tiny, 0003-second"):
        rollback(hospital, to=9)
    # A version's number is never used again, and what was deployed before counts, not what has the number before.
    rollback(hospital, to=2)
    assert deploy(second, to=hospital, gates=gates(EASY), mode="insert", at=0).current == "0005-second"
    assert rollback(hospital).current == "0002-tiny"
    assert [entry["action"] for entry in _lines(hospital)].count("rollback") == 6


def test_a_failed_gate_changes_nothing(hospital: Path, second: Organ, gates: Gates) -> None:
    before = everything(hospital)
    report = deploy(second, to=hospital, gates=gates(IMPOSSIBLE))
    assert not report.deployed and report.current == report.before == "0002-tiny"
    assert "times that of 0002-tiny" in report.gates[0].reason and "<= 0.01" in report.gates[0].reason
    assert not deploy(to=hospital, remove="tiny", gates=gates(IMPOSSIBLE)).deployed
    assert everything(hospital) == before


def test_a_failed_first_deployment_leaves_nothing(tmp_path: Path, recipient: Path, organ: Organ, gates: Gates) -> None:
    report = deploy(organ, to=tmp_path / "new", recipient=recipient, gates=gates(IMPOSSIBLE))
    assert not report.deployed and report.current is None and report.head is None
    assert everything(tmp_path / "new") == {}
    assert deploy(organ, to=tmp_path / "new", recipient=recipient, gates=gates(EASY)).deployed


def test_a_model_alone_can_be_the_start(tmp_path: Path, recipient: Path, organ: Organ, gates: Gates) -> None:
    report = deploy(to=tmp_path / "new", recipient=recipient)
    assert report.deployed and report.current == f"0001-{recipient.name}" and not report.gates
    assert deploy(organ, to=tmp_path / "new", gates=gates(EASY)).current == "0002-tiny"


def test_retention_is_measured_against_the_start(hospital: Path, second: Organ, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("\n\n".join(f"of all things {n}" for n in range(9)))
    path = tmp_path / "gates.yaml"
    path.write_text("gates:\n  general: {metric: retention, data: general.txt, tolerance: 0.99}\n")
    report = deploy(second, to=hospital, gates=path)
    assert report.deployed and report.gates[0].against == history(hospital).entries[0].version


def test_arguments_that_do_not_go_together(
    hospital: Path, tmp_path: Path, organ: Organ, recipient: Path, gates: Gates
) -> None:
    easy = gates(EASY)
    for arguments, sentence in (
        ({"organ": organ, "remove": "tiny", "gates": easy}, "either put in or taken out"),
        ({}, "nothing to deploy was given"),
        ({"organ": organ}, "no gates were given"),
        ({"recipient": "x", "remove": "tiny", "gates": easy}, "holds no organ to remove yet"),
        ({"recipient": "x", "gates": easy}, "omit --gate"),
        ({"organ": organ, "recipient": "x", "gates": easy}, "holds a deployment already"),
        ({"remove": "absent", "gates": easy}, "absent"),
    ):
        before = everything(hospital)
        with pytest.raises(UsageError, match=sentence):
            deploy(to=hospital, **arguments)
        assert everything(hospital) == before
    with pytest.raises(DeploymentError, match=r"none holds no deployment; start one with neurograft deploy"):
        deploy(organ, to=tmp_path / "none", gates=easy)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("x")
    with pytest.raises(DeploymentError, match=r"holds letter.txt, which is none of a deployment's"):
        deploy(organ, to=tmp_path / "full", recipient=recipient, gates=easy)
    with pytest.raises(DeploymentError, match="does not exist; create it first"):
        deploy(organ, to=tmp_path / "no/such", recipient=recipient, gates=easy)
    with pytest.raises(UsageError, match="overlaps the input"):
        deploy(to=recipient / "inside", recipient=recipient)
    assert not (recipient / "inside").exists()


def test_gates_are_read_before_anything_is_written(hospital: Path, tmp_path: Path, organ: Organ) -> None:
    before, path = everything(hospital), tmp_path / "gates.yaml"
    path.write_text('gates:\n  a: {metric: perplexity, data: absent.txt, limit: "<9"}\n')
    with pytest.raises(DataError, match=r"absent\.txt"):
        deploy(organ, to=hospital, gates=path)
    path.write_text("gates:\n  a: {metric: loss}\n")
    with pytest.raises(GateError, match="known are perplexity, retention, task"):
        deploy(organ, to=hospital, gates=path)
    assert everything(hospital) == before


def test_of_two_operators_one_is_told(hospital: Path, organ: Organ, gates: Gates) -> None:
    with (
        DeploymentFolder(hospital).deploying(wait=False),
        pytest.raises(DeploymentBusyError, match=r"another operator is deploying to .*hospital; try again later, or"),
    ):
        deploy(organ, to=hospital, gates=gates(EASY))


def test_of_two_operators_one_waits(hospital: Path, second: Organ, gates: Gates) -> None:
    easy = gates(EASY)
    reports = []
    other = threading.Thread(
        target=lambda: reports.append(deploy(second, to=hospital, gates=easy, wait=True, mode="insert"))
    )
    with DeploymentFolder(hospital).deploying(wait=False):
        other.start()
        time.sleep(0.5)
        assert not reports and other.is_alive()
        assert rollback(hospital).current.startswith("0001-")  # the way back is free while somebody deploys
    other.join(120)
    assert reports[0].deployed and str(reports[0].before).startswith("0001-") and reports[0].current == "0003-second"


def test_a_rollback_meanwhile_ends_a_deployment(
    hospital: Path, second: Organ, gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neurograft.deployment import deploying

    measure: Any = deploying.__dict__["measure"]

    def slow(*arguments: object, **options: object) -> object:
        rollback(hospital)
        return measure(*arguments, **options)

    monkeypatch.setattr(deploying, "measure", slow)
    with pytest.raises(
        DeploymentError, match=r"was switched to 0001-.* while this was measured .*; nothing was changed"
    ):
        deploy(second, to=hospital, gates=gates(EASY))
    assert history(hospital, verify="full").current.startswith("0001-")
    assert not (hospital / "versions/0003-second").exists()


def _flip(path: Path, place: int, *, keep_time: bool) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_rollback_refuses_what_was_altered(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = hospital / "versions" / history(hospital).entries[0].version
    before = (hospital / "history.jsonl").read_bytes()
    weights = base / "model.safetensors"
    for damage, sentence in (
        (lambda: _flip(weights, -1, keep_time=False), r"model.safetensors was altered since 0001-.* passed"),
        (lambda: (base / "config.json").unlink(), r"config.json is missing, so 0001-"),
        (lambda: (base / "adapter_config.json").write_text("{}"), r"adapter_config.json was not there when 0001-"),
        (lambda: (base / "x").symlink_to("config.json"), "is no plain file"),
        (lambda: shutil.rmtree(base), "is not there any more"),
    ):
        kept = hospital / "kept"
        shutil.copytree(base, kept)
        damage()
        with pytest.raises(VerificationError, match=sentence):
            rollback(hospital)
        assert (hospital / "current").readlink().name == "0002-tiny"
        assert (hospital / "history.jsonl").read_bytes() == before
        shutil.rmtree(base, ignore_errors=True)
        kept.rename(base)
    assert rollback(hospital).current == base.name  # a copy with other times and inodes is read, and is right


def test_quick_reads_only_what_looks_changed(
    tmp_path: Path, recipient: Path, organ: Organ, gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the documentation says of `quick`: a large file altered under its old time is seen by `full` only."""
    from neurograft.deployment import seals

    monkeypatch.setattr(seals, "ALWAYS_READ", 10_000)
    place = tmp_path / "new"
    deploy(organ, to=place, recipient=recipient, gates=gates(EASY))
    assert "model.safetensors" not in rollback(place).read
    _flip(place / "versions/0002-tiny/model.safetensors", -1, keep_time=True)
    with pytest.raises(VerificationError, match=r"model.safetensors was altered since 0002-tiny"):
        rollback(place, to=2, verify="full")
    assert rollback(place, to=2, verify="quick").current == "0002-tiny"
    os.utime(place / "versions/0002-tiny/model.safetensors")
    with pytest.raises(VerificationError, match=r"model.safetensors was altered"):
        history(place, verify="quick")


def _edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: [lines[0].replace(b'"start"', b'"deploy"'), *lines[1:]], "entry 1 of .* was altered"),
        (lambda lines: [*lines[:2], lines[2].replace(b"rollback", b"deploy  ")], "entry 3 of .* is no entry"),
        (lambda lines: [lines[0], lines[2]], "entry 2 of .* does not follow the entry before it"),
        (lambda lines: [lines[1], lines[0], lines[2]], "entry 1 of .* does not follow"),
        (lambda lines: [*lines, lines[2]], "entry 4 of .* does not follow"),
        (lambda lines: [lines[0].replace(b'"number":1', b'"number": 1'), *lines[1:]], "entry 1 of .* was altered"),
        (lambda lines: [lines[0], b"{}\n", *lines[1:]], "entry 2 of .* is no entry"),
        (lambda lines: [lines[0].replace(b'"schema_version":1', b'"schema_version":9')], "entry 1 .* has schema 9"),
        (lambda lines: [b"[" * 100_000 + b"\n"], "entry 1 of .* is no entry"),
        (lambda lines: lines[:1], "0002-tiny is in no entry of history.jsonl: the end of the history was cut off"),
        (lambda lines: [], "is in no entry of history.jsonl"),
        (lambda lines: lines[:2], "points to 0001-.*, and the last entry of history.jsonl, entry 2, says 0002"),
        (lambda lines: [*lines[:2], lines[2][:-1]], "the link was changed by hand, or the end of the history was cut"),
    ],
)  # fmt: skip
def test_a_tampered_history_is_refused_by_name(
    hospital: Path, change: Callable[[list[bytes]], list[bytes]], sentence: str, organ: Organ, gates: Gates
) -> None:
    rollback(hospital)
    _edit(hospital / "history.jsonl", change)
    before = everything(hospital)
    for verb in (lambda: history(hospital), lambda: rollback(hospital, to=2)):
        with pytest.raises(HistoryError, match=sentence):
            verb()
    with pytest.raises(HistoryError, match=sentence):
        deploy(organ, to=hospital, gates=gates(EASY))
    assert everything(hospital) == before


def test_a_link_changed_by_hand_is_refused(hospital: Path) -> None:
    base = history(hospital).entries[0].version
    (hospital / "current").unlink()
    (hospital / "current").symlink_to(f"versions/{base}")
    with pytest.raises(HistoryError, match=f"current points to {base}, and the last entry .* says 0002-tiny"):
        rollback(hospital)
    (hospital / "current").unlink()
    (hospital / "current").symlink_to("/etc")
    with pytest.raises(HistoryError, match=r"is no link to a folder in .*; take it away, and the same command"):
        history(hospital)


def test_a_lost_link_is_put_back_as_the_sentence_says(hospital: Path) -> None:
    target = os.readlink(hospital / "current")
    (hospital / "current").unlink()
    with pytest.raises(HistoryError, match="the link was lost; put it back with: ln -s versions/0002-tiny ") as caught:
        rollback(hospital)
    subprocess.run(shlex.split(str(caught.value).partition("with: ")[2].removesuffix(".")), check=True)
    assert os.readlink(hospital / "current") == target
    assert history(hospital).current == "0002-tiny"


def test_gates_compare_with_what_passed_its_gates(hospital: Path, second: Organ, gates: Gates) -> None:
    base = hospital / "versions" / history(hospital).entries[0].version
    file, against_base = base / "model.safetensors", gates(EASY)
    against_base.write_text(against_base.read_text() + "    against: base\n")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(VerificationError, match="was altered since 0001-"):
        deploy(second, to=hospital, gates=against_base)
    shutil.rmtree(base)
    with pytest.raises(DeploymentError, match=r"the gates compare with 0001-.* restore it, or write against: current"):
        deploy(second, to=hospital, gates=against_base)
    assert history(hospital).current == "0002-tiny"


def test_a_pipe_instead_of_a_history(hospital: Path) -> None:
    for name in ("history.jsonl", "current"):
        (hospital / name).unlink()
    os.mkfifo(hospital / "history.jsonl")
    with pytest.raises(HistoryError, match="it is no ordinary file"):
        history(hospital)


def test_a_torn_last_line_is_shown_and_mended_openly(hospital: Path) -> None:
    path = hospital / "history.jsonl"
    with path.open("ab") as stream:
        stream.write(b'{"schema_version":1,"numb')
    found = history(hospital)
    assert found.torn_bytes == 25 and len(found.entries) == 2
    assert path.read_bytes().endswith(b"numb")  # looking changes nothing
    rollback(hospital)
    last = history(hospital).entries[-1]
    assert last.number == 3 and last.dropped is not None and last.dropped.bytes == 25
    assert history(hospital).torn_bytes == 0
    rollback(hospital, to=2)
    assert history(hospital).entries[-1].dropped is None


def test_a_torn_first_line_is_no_deployment(organ: Organ, recipient: Path, tmp_path: Path, gates: Gates) -> None:
    folder = tmp_path / "begun"
    (folder / "versions").mkdir(parents=True)
    (folder / "history.jsonl").write_bytes(b'{"schema_version":1,"numb')
    calls: list[Callable[[], object]] = [
        lambda: history(folder),
        lambda: rollback(folder),
        lambda: deploy(organ, to=folder, gates=gates(EASY), at=1),
    ]
    for call in calls:
        with pytest.raises(DeploymentError, match=r"begun holds no deployment; start one with neurograft deploy"):
            call()
    assert deploy(to=folder, recipient=recipient).deployed
    (start,) = history(folder).entries
    assert start.dropped is not None and start.dropped.bytes == 25


def test_two_who_switch_at_once_take_turns(hospital: Path) -> None:
    folder = DeploymentFolder(hospital)
    with folder.switching(), pytest.raises(DeploymentBusyError, match="another operator is switching"):
        _impatient(hospital)


def _impatient(hospital: Path) -> None:
    from neurograft.deployment import folder

    patience, folder._PATIENCE_SECONDS = folder._PATIENCE_SECONDS, 0.1
    try:
        rollback(hospital)
    finally:
        folder._PATIENCE_SECONDS = patience


def test_commands(hospital: Path, second: Organ, tmp_path: Path, gates: Gates) -> None:
    runner, easy = CliRunner(), gates(EASY)
    second.save(tmp_path / "second.safetensors")

    def run(*words: object) -> tuple[int, str]:
        result = runner.invoke(app, [str(word) for word in words])
        return result.exit_code, result.stdout

    code, text = run("deploy", tmp_path / "second.safetensors", "--to", hospital, "--gate", easy, "--json")
    assert code == 0 and json.loads(text)["current"] == "0003-second"
    again = runner.invoke(
        app, ["deploy", str(tmp_path / "second.safetensors"), "--to", str(hospital), "--gate", str(easy)]
    )
    assert again.exit_code == 2 and "error: second is in 0003-second already; to deploy another" in again.stderr
    code, text = run("deploy", "--remove", "tiny", "--to", hospital, "--gate", gates(IMPOSSIBLE))
    assert code == 1 and "FAILED  reports: the perplexity" in text and "not deployed: 0004-without-tiny" in text
    code, text = run("history", hospital)
    assert code == 0 and "0003-second is deployed" in text and "1 passed" in text
    code, text = run("rollback", hospital, "--to", 1)
    assert code == 0 and "back from 0003-second to 0001-" in text
    code, text = run("history", hospital, "--json", "--verify", "full")
    assert code == 0 and len(json.loads(text)["entries"]) == 4 and len(json.loads(text)["verified"]) == 3
    code, text = run("rollback", tmp_path, "--json")
    assert code == 2 and json.loads(text)["error"]["kind"] == "DeploymentError"
