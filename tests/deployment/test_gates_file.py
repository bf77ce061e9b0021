"""The gates file: what it may say, and one sentence for everything else."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from neurograft.deployment.gates import PerplexityGate, RetentionGate, TaskGate, read_gates
from neurograft.errors import GateError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"


def _write(folder: Path, text: str) -> Path:
    (folder / "gates.yaml").write_text(text, encoding="utf-8")
    return folder / "gates.yaml"


def test_the_example_in_the_documentation_can_be_read(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert example is not None
    read = read_gates(_write(tmp_path, example[1]))
    assert {type(gate) for gate in read.gates.values()} == {PerplexityGate, RetentionGate, TaskGate}
    assert len(read.digest) == 64


def test_paths_are_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("x")
    text = 'gates:\n  a: {metric: perplexity, data: [here.txt, org/set], limit: "<9"}\n'
    read = read_gates(_write(tmp_path, text))
    gate = read.gates["a"]
    assert isinstance(gate, PerplexityGate) and read.paths(gate) == [str(tmp_path / "here.txt"), "org/set"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gates: {a: {metric: bleu}}", "the gate a of .* has the metric 'bleu'; known are perplexity, retention, task"),
        ("gates: {a: {metric: [task]}}", "the gate a of .* has the metric .'task'.; known are"),
        ("gates: {a: {task: x}}", "the gate a of .* has no metric; known are perplexity"),
        ("gates: {a: {metric: retention, dta: x}}", "the gate a of .* has the unknown key 'dta'; known are data,"),
        ("gates: {a: {metric: retention, data: []}}", "the gate a of .* can't be used: data: it is empty; give"),
        ("gates: {a: {metric: perplexity, data: x}}", "the gate a of .* lacks limit"),
        ('gates: {a: {metric: perplexity, data: x, limit: "<~9"}}', "in .*gates.yaml, the gate 'a<~9' can't be read"),
        ('gates: {a: {metric: perplexity, data: x, limit: "b<=9"}}', "the limit is 'b<=9'; write it without a name"),
        ("gates: {a: {metric: retention, data: x, tolerance: 2}}", "a of .*: tolerance: .*less than 1"),
        ("gates: {a: {metric: retention, data: x, tolerance: -1}}", "a of .*: tolerance: .*greater than or equal"),
        ("gates: {a: {metric: task, task: x, require: good}}", "the gate a of .*: require: .*'better' or 'not_worse'"),
        ("gates: {a: {metric: task, task: x, require: better, tolerance: 0.1}}", "goes with require: not_worse"),
        ("gates: {a b: {metric: task, task: x}}", "the gate a b of .* has a name that is none"),
        ("gate: {a: {metric: task, task: x}}", "has the unknown key 'gate'; known are settings, gates"),
        ("settings: {seed: -1}\ngates: {a: {metric: task, task: x}}", "the settings of .*: seed: "),
        ("settings: {sed: 1}\ngates: {a: {metric: task, task: x}}", "the settings of .* unknown key 'sed'; known are"),
        ("gates: {}", "has no gates"),
        ("- a", "has no gates"),
        ("gates: [", "the gates file .* can't be read: "),
        ("gates:\n  a: {metric: task, task: x}\n  a: {metric: task, task: y}\n", "has 'a' twice in the same place"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(GateError, match=sentence) as caught:
        read_gates(_write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_aliases_that_multiply_are_read_once(tmp_path: Path) -> None:
    lists = "[&b0 [x], " + ", ".join(f"&b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 40)) + "]"
    with pytest.raises(GateError, match=r"the gate a of .*: data: input should be a valid string"):
        read_gates(_write(tmp_path, f'gates: {{a: {{metric: perplexity, limit: "<9", data: {lists}}}}}'))


def test_neither_a_device_nor_a_pipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("zeros.yaml", "pipe.yaml"):
        with pytest.raises(GateError, match=rf"{name} can't be read: it is no ordinary file\."):
            read_gates(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"gates.yaml can't be read: it has more than 1.0 MB"):
        read_gates(_write(tmp_path, "#" * 1_100_000))


def test_what_the_shell_pipes_is_read() -> None:
    text = b'gates: {a: {metric: perplexity, limit: "<9", data: x.txt}}'
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    try:
        read = read_gates(f"/dev/fd/{reading}")
    finally:
        os.close(reading)
    assert list(read.gates) == ["a"] and read.digest == hashlib.sha256(text).hexdigest()


def test_a_missing_file_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"the gates file .*none.yaml can't be read: No such file"):
        read_gates(tmp_path / "none.yaml")
