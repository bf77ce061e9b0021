"""A full disk and a read-only one: each verb that writes says so in one sentence, and leaves what was there."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import neurograft
from deployments import everything, one_more, write_gates
from neurograft.errors import NeurograftError
from neurograft.organ import Organ

DATA = Path(__file__).parent / "data"
NO_BYTES = hashlib.sha256().hexdigest()
SHORT: dict[str, Any] = {"sequence_length": 16, "batch_size": 2}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    mount = tmp_path_factory.mktemp("disk")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("file systems can't be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture(scope="module")
def place(disk: Path, organ: Organ, donor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verbs read, on that disk."""
    organ.save(disk / "organ.safetensors")
    (disk / "text.txt").write_text("\n\n".join(f"a shadow of grade {n} in the left lung" for n in range(40)))
    gates = write_gates(disk)
    neurograft.push(disk / "organ.safetensors", disk / "bank")
    neurograft.deploy(organ, to=disk / "hospital", recipient=donor, gates=gates, mode="insert", at=1)
    one_more(organ, disk / "hospital").save(disk / "second.safetensors")
    neurograft.plant(disk / "canaries.jsonl", canaries=disk / "secret.json", count=10, seed=3)
    measured = neurograft.evaluate(donor, data={"words": disk / "text.txt"}, **SHORT)
    (disk / "measured.json").write_text(measured.model_dump_json())
    return disk


def _sign(place: Path, donor: Path) -> None:
    pytest.importorskip("model_signing")
    key = place.parent / "maker.pem"
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    neurograft.sign(place / "organ.safetensors", key=key)


def _train(place: Path, donor: Path) -> None:
    output = place / "trained.safetensors"
    neurograft.train(place / "organ.safetensors", host=donor, data=place / "text.txt", output=output, steps=2, **SHORT)


def _scan(place: Path, donor: Path) -> None:
    organ, text, output = place / "organ.safetensors", place / "text.txt", place / "scan.json"
    neurograft.scan(organ, donor, data=text, positions="1:2", modes="insert", output=output, **SHORT)


def _record(place: Path, donor: Path) -> None:
    organ, text = place / "organ.safetensors", place / "text.txt"
    neurograft.scan(organ, donor, data=text, positions="1:2", modes="insert", record=True, **SHORT)


def _audit(place: Path, donor: Path) -> None:
    neurograft.audit(
        place / "organ.safetensors", host=donor, members=place / "text.txt", non_members=place / "canaries.jsonl",
        record=True, prefix=4, length=4, **SHORT,
    )  # fmt: skip


def _plan(place: Path, donor: Path) -> None:
    neurograft.plan(donor, data=place / "text.txt", output=place / "plan.json", trials=1, trial_tokens=64, **SHORT)


def _compare(place: Path, donor: Path) -> None:
    neurograft.compare(
        donor, data=place / "text.txt", output=place / "comparison", tokens=64, search_tokens=32, seeds=1, trials=1,
        methods="organ", isolated=False, **SHORT,
    )  # fmt: skip


def _study(place: Path, donor: Path) -> None:
    neurograft.study_cross_domain(
        donor, target=place / "text.txt", domains={"other": place / "reports.txt"}, output=place / "study", tokens=64,
        seeds=1, isolated=False, **SHORT,
    )  # fmt: skip


Verb = Callable[[Path, Path], Any]
VERBS: dict[str, Verb] = {
    "sign": _sign,
    "deploy": lambda p, d: neurograft.deploy(p / "second.safetensors", to=p / "hospital", gates=p / "gates.yaml", at=2),
    "first deployment": lambda p, d: neurograft.deploy(to=p / "clinic", recipient=d),
    "rollback": lambda p, d: neurograft.rollback(p / "hospital"),
    "push": lambda p, d: neurograft.push(DATA / "organ-v2.safetensors", p / "bank"),
    "first push": lambda p, d: neurograft.push(p / "organ.safetensors", p / "new-bank"),
    "tag": lambda p, d: neurograft.tag(f"{p}/bank/:tiny@0.1.0", "stable"),
    "yank": lambda p, d: neurograft.yank(f"{p}/bank/:tiny@0.1.0"),
    "pull": lambda p, d: neurograft.pull(f"{p}/bank/:tiny", output=p / "pulled.safetensors"),
    "plant": lambda p, d: neurograft.plant(p / "more.jsonl", canaries=p / "more.json", count=2000),
    "card": lambda p, d: neurograft.card(p / "organ.safetensors", output=p / "README.md"),
    "provenance": lambda p, d: neurograft.card(p / "organ.safetensors", provenance=p / "made.json"),
    "extract": lambda p, d: neurograft.extract(d, layers=(1, 3), output=p / "cut.safetensors"),
    "merge": lambda p, d: neurograft.merge([p / "organ.safetensors"] * 2, output=p / "merged.safetensors"),
    "transplant": lambda p, d: neurograft.transplant(p / "organ.safetensors", d, at=1, output=p / "model"),
    "train": _train,
    "scan": _scan,
    "scan --record": _record,
    "audit --record": _audit,
    "plan": _plan,
    "compare": _compare,
    "study": _study,
    "report": lambda p, d: neurograft.report([p / "measured.json"], output=p / "report.html"),
}  # fmt: skip


@pytest.fixture(params=["full", "read-only"])
def bad(request: pytest.FixtureRequest, place: Path) -> Iterator[Path]:
    if request.param == "full":
        filler = place / "filler"
        with filler.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
            while True:
                stream.write(b"x" * os.statvfs(place).f_bsize)
        yield place
        filler.unlink()
        return
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_left_half_written(verb: str, bad: Path, donor: Path) -> None:
    before = _files(bad)
    try:
        VERBS[verb](bad, donor)
    except NeurograftError as error:
        said = str(error)
        assert "\n" not in said and ("disk" in said or "could not be written" in said), said
        assert _files(bad) == before
    else:
        # A line may have room in the last block of the history.
        assert verb == "rollback" and neurograft.history(bad / "hospital", verify="full").entries[-1].action == verb


def _files(folder: Path) -> dict[str, str]:
    """Return every file and link; an empty folder, such as that of a bank's first organ, is no half of anything."""
    return {name: digest for name, digest in everything(folder).items() if digest not in ("a folder", NO_BYTES)}
