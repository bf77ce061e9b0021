"""Two processes train what one would, whether each holds everything or everything is spread over them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from together import KINDS, OPTIONS, RECOVERY

from neurograft import extract, graft, recover, remove, train, transplant
from neurograft.organ import read_organ
from neurograft.training.run_state import state_path
from tiny import load, logits, make_model, make_tokenizer, save_model

pytestmark = pytest.mark.xdist_group("distributed")

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# The processes add up in another order, and AdamW magnifies rounding where gradients are almost 0.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, organs and text for all tests."""
    folder, generator = tmp_path_factory.mktemp("together"), random.Random(0)
    for name, count in (("text", 12), ("held-out", 3), ("general", 4)):
        documents = (" ".join(generator.choices(["liver", "kidney", "heart", "lung"], k=12)) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "other.txt").write_text("XKCD (QED) = 100%!\n\nZYX * WVU / TSR; 73 + 12?")
    half = make_model("llama")
    torch.nn.Module.to(half, torch.bfloat16)
    half.save_pretrained(folder / "half")
    make_tokenizer().save_pretrained(folder / "half")
    extract(folder / "half", layers=(2, 4), name="tiny", output=folder / "half-organ.safetensors")
    for kind in (*KINDS, "dropout"):
        gpt2 = {"resid_pdrop": 0.3 if kind == "dropout" else 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        changes: dict[str, Any] = gpt2 if kind in ("gpt2", "dropout") else {}
        host = save_model(folder / kind, "gpt2" if kind == "dropout" else kind, **changes)
        extract(host, layers=(2, 4), name="tiny", output=folder / f"{kind}-organ.safetensors")
    transplant(
        folder / "llama-organ.safetensors", save_model(folder / "recipient", "llama", seed=1), at=2, mode="insert",
        output=folder / "transplanted",
    )  # fmt: skip
    return folder


def _environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NEUROGRAFT_CACHE": str(folder / "cache"), **more}


@pytest.fixture(scope="module", params=["replicated", "sharded"])
def together(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes found, each, and the folder that they left their files in."""
    own = tmp_path_factory.mktemp(request.param)
    for path in folder.iterdir():
        (own / path.name).symlink_to(path)
    command = [*LAUNCH, str(Path(__file__).with_name("together.py")), str(own)]
    more = SHARDED if request.param == "sharded" else {}
    result = subprocess.run(command, env=_environment(own, **more), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return request.param, own, json.loads((own / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process finds."""

    def found(kind: str, **changes: Any) -> dict[str, Any]:
        losses: list[float] = []
        options = {**OPTIONS, **changes}
        organ = train(
            folder / f"{kind}-organ.safetensors", host=folder / kind, data=folder / "text.jsonl",
            eval_data=folder / "held-out.jsonl", progress=lambda p: losses.append(p.loss), **options,
        )  # fmt: skip
        assert organ.manifest.training is not None
        return {
            "losses": losses, "organ": organ, "steps": organ.manifest.training.steps,
            "tokens": organ.manifest.training.tokens_seen, "after": organ.manifest.evaluations[0].after,
        }  # fmt: skip

    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_losses_as_one_process(kind: str, together: Any, alone: Any) -> None:
    _, _, (first, second) = together
    assert first["count"] == 2
    expected = alone(kind)
    assert first[kind]["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE) and len(expected["losses"]) > 5
    assert second[kind]["losses"] == []  # only the first process reports
    for found in (first[kind], second[kind]):
        assert (found["steps"], found["tokens"]) == (expected["steps"], expected["tokens"])
        assert found["after"] == pytest.approx(expected["after"], rel=TOLERANCE)
    assert first[kind]["digest"] == second[kind]["digest"] and first[kind]["file_digest"] == second[kind]["file_digest"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_organ_is_one_whole_file(kind: str, together: Any, alone: Any, folder: Path) -> None:
    _, own, (first, _) = together
    organ, expected = read_organ(own / f"{kind}.safetensors"), alone(kind)["organ"]
    assert organ.manifest.file_digest == first[kind]["file_digest"]
    assert {n: (t.shape, t.dtype) for n, t in organ.tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.tensors.items()
    }
    answers = []
    for one in (organ, expected):
        with graft(load(folder / kind), one) as model:
            answers.append(logits(model))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3)
    assert not list(own.glob(".*")) and not list(own.glob(f"{kind}.safetensors.resume"))


def test_layers_that_compute_again_for_the_backward_pass(together: Any) -> None:
    _, _, (first, second) = together
    assert first["recomputed"]["losses"] == first["llama"]["losses"]
    assert first["recomputed"]["digest"] == second["recomputed"]["digest"] == first["llama"]["digest"]


def test_another_protocol(together: Any, alone: Any) -> None:
    _, _, (first, _) = together
    expected = alone("llama", protocol="insert", cache_prefix="never")
    assert first["insert"]["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)


def test_a_host_in_half_precision_with_an_organ_in_float32(together: Any, alone: Any) -> None:
    _, own, (first, second) = together
    expected = alone("half", host_precision="stored")
    # Hidden states of the frozen layers have eight bits, and another share of a batch can round them otherwise.
    assert first["half"]["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    assert first["half"]["after"] == second["half"]["after"] == pytest.approx(expected["after"], rel=5e-3)
    assert {tensor.dtype for tensor in read_organ(own / "half.safetensors").tensors.values()} == {torch.bfloat16}


def test_interrupted_in_one_process_all_end_and_all_go_on_to_the_same_bits(together: Any) -> None:
    _, _, answers = together
    first, second = answers
    for found in answers:
        assert found["interrupted"].startswith("training stopped after step 3 of ")
        assert found["interrupted"].endswith("; the same command goes on from there")
    assert first["gone_on"]["losses"] == first["dropout"]["losses"][3:] != []
    assert first["gone_on"]["digest"] == first["dropout"]["digest"] == second["dropout"]["digest"]


def test_one_process_goes_on_from_what_two_left(together: Any) -> None:
    _, own, (first, _) = together
    assert "after step 3 of" in first["interrupted_again"]
    steps: list[int] = []
    organ = train(
        own / "dropout-organ.safetensors", host=own / "dropout", data=own / "text.jsonl",
        eval_data=own / "held-out.jsonl", output=own / "later.safetensors",
        progress=lambda p: steps.append(p.step), **OPTIONS,
    )  # fmt: skip
    assert steps[0] == 4 and steps[-1] == first["dropout"]["steps"]
    # Dropout is drawn apart by each process, so only about the same can come out.
    assert organ.manifest.evaluations[0].after == pytest.approx(first["dropout"]["after"], rel=0.05)


def test_a_recovery_is_that_of_one_process(together: Any, folder: Path, tmp_path: Path) -> None:
    _, own, answers = together
    losses: list[float] = []
    record = recover(
        folder / "transplanted", data=folder / "text.jsonl", eval_data=folder / "held-out.jsonl",
        general=folder / "general.jsonl", output=tmp_path / "alone", progress=lambda p: losses.append(p.loss),
        **RECOVERY,
    )  # fmt: skip
    expected = record.recoveries[-1]
    assert answers[0]["recovered"]["losses"] == pytest.approx(losses, rel=TOLERANCE) and len(losses) == 7
    for found in (each["recovered"] for each in answers):
        assert found["stages"] == [stage.model_dump() for stage in expected.stages]
        for one, other in zip(found["evaluations"], expected.evaluations, strict=True):
            assert one["before"] == pytest.approx(other.before, rel=TOLERANCE)
            assert one["after"] == pytest.approx(other.after, rel=TOLERANCE)
    for found in answers:
        assert "stopped after step 2 of 4" in found["recovery_interrupted"]
        assert found["recovery_gone_on"]["digest"] == found["recovered"]["digest"]
    result = remove(own / "recovered", output=tmp_path / "back")
    assert result.original_restored and result.tensors_digest == record.original_tensors_digest
    assert read_organ(own / "recovered.safetensors").manifest.evaluations[0].after == pytest.approx(
        expected.evaluations[0].after, rel=TOLERANCE
    )
    assert not list(own.glob("recovered*.resume")) and not list(own.glob(".recovered*"))


def test_all_stop_early_together(together: Any) -> None:
    _, _, (first, second) = together
    assert first["early"]["steps"] == second["early"]["steps"] < 60


def test_all_raise_what_one_finds_wrong(together: Any) -> None:
    for found in together[2]:
        exists, few, offloaded = found["errors"]
        assert "llama.safetensors exists already" in exists
        assert few.startswith("--batch-size 1 leaves some of the 2 processes without a sequence")
        assert offloaded.startswith("--offload is for one process")


def test_what_is_spread(together: Any) -> None:
    kind, _, (first, second) = together
    assert set(first["inside"]["sharded"]) == {kind == "sharded"}
    held = first["inside"]["held"] + second["inside"]["held"]
    assert held == first["inside"]["whole"] * (1 if kind == "sharded" else 2)
    assert first["inside"]["digest"] == second["inside"]["digest"]
    assert first["inside"]["loss"] == second["inside"]["loss"]
    assert "everything that trains must be in the model" in first["inside"]["foreign"]


def test_the_cache_is_one_for_all(together: Any) -> None:
    _, own, _ = together
    folders = sorted((own / "cache" / "prefix").iterdir())
    assert len(folders) > 4 and not any(path.name.startswith(".") for path in folders)
    for path in folders:
        there = (path / "there.bin").read_bytes()
        states = torch.frombuffer(bytearray((path / "states.bin").read_bytes()), dtype=torch.float32)
        assert set(there) <= {0, 1} and any(there)
        written = states.view(len(there), -1).abs().amax(1) > 0
        assert written.tolist() == [bool(flag) for flag in there]


def _command(folder: Path, output: Path, *more: str) -> list[str]:
    options = {name: value for name, value in OPTIONS.items() if name != "cache_prefix"}
    command = ["-m", "neurograft", "train", str(folder / "llama-organ.safetensors"), "--host", str(folder / "llama")]
    command += ["--data", str(folder / "text.jsonl"), "--eval-data", str(folder / "held-out.jsonl"), "-o", str(output)]
    return command + [w for n, v in options.items() for w in (f"--{n.replace('_', '-')}", str(v))] + list(more)


def test_accelerate_launch_prints_one_result(folder: Path, tmp_path: Path, alone: Any) -> None:
    output = tmp_path / "o.safetensors"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, *_command(folder, output, "--json")]
    result = subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)  # one document
    assert manifest["file_digest"] == read_organ(output).manifest.file_digest
    assert manifest["evaluations"][0]["after"] == pytest.approx(alone("llama")["after"], rel=TOLERANCE)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["o.safetensors"]


def test_torchrun_prints_one_error(folder: Path, tmp_path: Path) -> None:
    command = [*LAUNCH, *_command(folder, tmp_path / "o.safetensors", "--at", "9", "--json")]
    result = subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True, check=False)
    assert result.returncode != 0 and result.stderr.count("error: position 9 is out of range") == 1
    assert json.loads(result.stdout)["error"]["kind"] == "UsageError"


def test_killed_and_gone_on_by_as_many_or_fewer(folder: Path, tmp_path: Path, alone: Any) -> None:
    output = tmp_path / "o.safetensors"
    command = [*LAUNCH, *_command(folder, output, "--checkpoint-every", "0", "--json")]
    environment = _environment(tmp_path, **SHARDED)
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state_path(output).exists() and process.poll() is None:
        time.sleep(0.005)
    for one in (process, *process.children(recursive=True)):
        one.kill()
    process.wait()
    state, expected = state_path(output).read_bytes(), alone("llama")["after"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert read_organ(output).manifest.evaluations[0].after == pytest.approx(expected, rel=TOLERANCE)
    assert not state_path(output).exists()
    output.unlink()
    state_path(output).write_bytes(state)
    found = alone("llama", output=output, cache_prefix="auto")
    assert 0 < len(found["losses"]) < found["steps"] and found["after"] == pytest.approx(expected, rel=TOLERANCE)
