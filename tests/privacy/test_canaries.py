"""Canaries are planted by fair coins, read back strictly, and bound epsilon as their paper says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from neurograft import plant
from neurograft.errors import DataError, UsageError
from neurograft.files import file_sha256
from neurograft.privacy import canaries


def test_the_training_file_holds_exactly_the_included(tmp_path: Path) -> None:
    data, secret = tmp_path / "canaries.jsonl", tmp_path / "secret.json"
    made = plant(data, canaries=secret, count=200, template="Patient {} was seen.", repeats=3)
    lines = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    assert sorted(lines) == sorted(made.included * 3) and not set(lines) & set(made.left_out)
    assert 60 < len(made.included) < 140 and len({canary.text for canary in made.canaries}) == 200
    assert all(text.startswith("Patient ") and text.endswith(" was seen.") for text in lines)
    assert canaries.read_canaries(secret) == made and made.training_file == file_sha256(data)
    assert secret.stat().st_mode & 0o077 == 0


def test_only_a_seed_repeats_them(tmp_path: Path) -> None:
    def made(name: str, seed: int | None) -> Any:
        return plant(tmp_path / f"{name}.jsonl", canaries=tmp_path / f"{name}.json", count=20, seed=seed).canaries

    assert made("a", 7) == made("b", 7) != made("c", 8)
    assert made("d", None) != made("e", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 9}, "9 canaries tell nothing"),
        ({"template": "none"}, "must have one {}"),
        ({"template": "{} {}"}, "must have one {}"),
        ({"repeats": 0}, "repeated 0 times"),
        ({"seed": -1}, "the seed is -1"),
        ({"output": "canaries.txt"}, "must end in .jsonl"),
        ({"canaries": "secret.toml"}, "must end in .json"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"output": "canaries.jsonl", "canaries": "secret.json", "count": 20, **changes}
    output = tmp_path / arguments.pop("output")
    with pytest.raises(UsageError, match=message):
        plant(output, canaries=tmp_path / arguments.pop("canaries"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_stay(tmp_path: Path) -> None:
    data, secret = tmp_path / "canaries.jsonl", tmp_path / "secret.json"
    secret.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        plant(data, canaries=secret)
    assert not data.exists() and secret.read_text() == "precious"
    plant(data, canaries=secret, overwrite=True)


def test_what_is_no_secret_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.json"
    with pytest.raises(DataError, match="can't be read"):
        canaries.read_canaries(path)
    for text in ("{", "[]", '{"kind": "neurograft canaries"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is no secret file of canaries"):
            canaries.read_canaries(path)
    plant(tmp_path / "a.jsonl", canaries=path, count=20, overwrite=True)
    same = json.loads(path.read_text())
    for canary in same["canaries"]:
        canary["included"] = True
    path.write_text(json.dumps(same))
    with pytest.raises(DataError, match="fell alike"):
        canaries.read_canaries(path)


def test_exposure_is_log2_of_the_rank() -> None:
    bits = canaries.exposures(numpy.array([9.0, 1.5, -1.0]), numpy.array([0.0, 1.0, 2.0]))
    assert bits.tolist() == pytest.approx([2.0, 1.0, 0.0])


def test_the_extremes_are_guessed_and_the_middle_is_not() -> None:
    scores = numpy.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    included = numpy.array([True, False, False, True, False, True])
    assert canaries.correct_guesses(scores, included, 2) == 1
    assert canaries.correct_guesses(scores, included, 4) == 2
    assert canaries.correct_guesses(scores, included, 6) == 2


def reference_chance(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return the p-value by the formula as the paper's appendix writes it, term by term."""
    q = 1 / (1 + math.exp(-epsilon))

    def pmf(k: int) -> float:
        return math.comb(r, k) * q**k * (1 - q) ** (r - k)

    beta, total, alpha = sum(pmf(k) for k in range(v, r + 1)), 0.0, 0.0
    for i in range(1, v + 1):
        total += pmf(v - i)
        alpha = max(alpha, total / i)
    return min(1.0, beta + alpha * delta * 2 * m)


@pytest.mark.parametrize(("m", "r", "v"), [(100, 20, 18), (1000, 100, 80), (1000, 1000, 560), (50, 50, 50)])
@pytest.mark.parametrize("delta", [0.0, 1e-5])
def test_the_bound_is_the_papers(m: int, r: int, v: int, delta: float) -> None:
    for epsilon in (0.0, 0.5, 2.0):
        assert canaries._chance(m, r, v, epsilon, delta) == pytest.approx(
            reference_chance(m, r, v, epsilon, delta), rel=1e-9, abs=1e-15
        )
    bound = canaries.epsilon_bound(m, r, v, delta=delta)
    assert bound > 0
    assert reference_chance(m, r, v, bound - 1e-6, delta) <= 0.05 <= reference_chance(m, r, v, bound + 1e-6, delta)


def test_perfect_guesses_give_the_bound_in_closed_form() -> None:
    # All of r guesses are right with chance q^r, q = e^eps / (1 + e^eps): so q = 0.05^(1/r).
    q = 0.05 ** (1 / 100)
    assert canaries.epsilon_bound(100, 100, 100) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


def test_no_epsilon_is_shown_by_chance() -> None:
    included = numpy.arange(200) % 2 == 0
    generator = numpy.random.default_rng(0)
    shown = 0
    for _ in range(200):
        coins = generator.permutation(included)
        figures = canaries.measure(generator.normal(size=200), coins, repeats=1, tokens=1, delta=1e-5)
        shown += figures.epsilon > 0
        assert figures.exposure_mean < 2.5
    assert shown <= 18  # at most 5 % of 200, and what chance adds to that


def test_randomised_response_is_not_overestimated() -> None:
    generator, epsilon, above = numpy.random.default_rng(1), 1.0, 0
    for _ in range(100):
        coins = generator.integers(2, size=500).astype(bool)
        kept = generator.random(500) < math.exp(epsilon) / (1 + math.exp(epsilon))
        answers = numpy.where(kept, coins, ~coins)
        figures = canaries.measure(answers + generator.normal(size=500) * 1e-3, coins, repeats=1, tokens=1, delta=0.0)
        above += figures.epsilon > epsilon
        assert figures.epsilon > 0.3
    assert above <= 10
