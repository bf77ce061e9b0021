"""Nothing asks the network that need not, and no file that is written holds a training sentence."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from neurograft.models import load_tokenizer
from tiny import save_model

SENTENCES = 24


def sentences(seed: int) -> list[str]:
    """Return sentences of words that are nowhere else."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(SENTENCES * 4)]
    return [f"{' '.join(words[4 * number : 4 * number + 4])}." for number in range(SENTENCES)]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment in which it is noted who asks the network, with every usual place to write in a folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "NEUROGRAFT_CACHE")}
    places = {name: str(folder / "out" / name.lower()) for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR")}
    for place in places.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    asked = {"NETWORK_ASKED": str(folder / "asked.txt")}
    return {**kept, **places, **asked, "NEUROGRAFT_CACHE": str(folder / "out" / "cache"), **more}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a whole path: text in `data`, all that was written in `out`."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "data").mkdir()
    (folder / "host").mkdir()
    save_model(folder / "host", "llama", layers=4)
    for name, seed in (("members", 0), ("others", 1)):
        lines = [json.dumps({"text": text}) + "\n" for text in sentences(seed)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines))
    script = Path(__file__).with_name("whole_path.py")
    done = subprocess.run(
        [sys.executable, script, folder], env=environment(folder), capture_output=True, text=True, cwd=folder / "out"
    )
    (folder / "out" / "driver.stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_whole_path_asks_no_network(path: Path) -> None:
    asked = path / "asked.txt"
    assert not asked.exists(), asked.read_text()


def encodings(text: str, ids: list[int]) -> Iterator[bytes]:
    """Yield what a text would look like in a file: as characters, and as token ids."""
    for encoding in ("utf-8", "utf-16-le", "utf-32-le"):
        yield text.encode(encoding)
    for kind in "BHIQ":
        yield struct.pack(f"<{len(ids)}{kind}", *ids)
    yield ", ".join(map(str, ids)).encode()
    yield ",".join(map(str, ids)).encode()


def holding(folder: Path, wanted: list[bytes]) -> list[Path]:
    """Return the files below a folder that hold any of these bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if any(piece in content for content in [file.read_bytes()] for piece in wanted)]


def test_no_file_holds_a_training_sentence(path: Path) -> None:
    tokenizer = load_tokenizer(path / "host")
    wanted: list[bytes] = []
    for text in [*sentences(0), *sentences(1)]:
        for start in range(0, len(text) - 12, 6):  # a dozen characters are more than a word
            piece = text[start : start + 12]
            wanted += encodings(piece, tokenizer(piece, add_special_tokens=False)["input_ids"])
    written = {str(file.relative_to(path / "out")) for file in (path / "out").rglob("*") if file.is_file()}
    expected = {
        "trained.safetensors", "interrupted.safetensors.resume", "model/neurograft.json", "card.md", "report.html",
        "everything.log", "audit.stdout", "refused.stderr", "train.stdout", "scan.json", "evaluation.json",
    }  # fmt: skip
    assert expected <= written
    assert any(name.startswith("cache/") for name in written) and any(name.startswith("logs/") for name in written)
    assert any(name.startswith("bank/") for name in written)
    assert holding(path / "out", wanted) == []
    assert len(holding(path / "data", wanted)) == 2  # the search itself finds them


def test_the_report_and_the_card_show_what_was_found(path: Path) -> None:
    card, shown = (path / "out" / "card.md").read_text(), (path / "out" / "inspect.stdout").read_text()
    assert "Audited" in card and "Masked in the training text" in card
    assert f"of {SENTENCES} members" in " ".join(shown.split())


@pytest.mark.parametrize(
    "words",
    [
        ["extract", "some-org/some-model", "-o", "organ.safetensors"],
        ["inspect", "hf://some-org/some-organ@1.0.0"],
        ["evaluate", "some-org/some-model", "--data", "domain=text.txt"],
    ],
)
def test_offline_means_that_the_hub_is_not_asked(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    done = subprocess.run(
        [sys.executable, "-m", "neurograft", *words],
        env=environment(tmp_path, HF_HUB_OFFLINE="1"), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert not (tmp_path / "asked.txt").exists(), (tmp_path / "asked.txt").read_text()
    assert not (tmp_path / "organ.safetensors").exists()


def test_the_guard_sees_who_asks(tmp_path: Path) -> None:
    code = "import socket\ntry: socket.create_connection(('example.org', 80))\nexcept OSError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert "connections are refused here" in done.stdout and (tmp_path / "asked.txt").read_text() == "example.org\n"
