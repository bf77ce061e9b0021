"""Several organs checked together: what collides, and what each does alone and beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Factory
from neurograft import compose, evaluate, extract, train, transplant
from neurograft.errors import DataError, UsageError
from neurograft.organ import Organ

QUICK: dict[str, Any] = {"sequence_length": 32, "bootstrap_samples": 50}


@pytest.fixture(scope="session")
def organs(model_directory: Factory) -> dict[str, Organ]:
    return {
        name: extract(model_directory("llama", seed=seed), layers=(1, 3), name=name)
        for name, seed in (("clinical", 3), ("legal", 4), ("loud", 5))
    }


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, words in (("reports", "kidney well"), ("law", "the court finds"), ("other", "def f(x): return")):
        found[name] = tmp_path / f"{name}.txt"
        found[name].write_text("\n\n".join(f"{words} {number}" for number in range(9)))
    return found


def test_the_matrix_is_what_evaluate_measures(
    organs: dict[str, Organ], texts: dict[str, Path], recipient: Path, tmp_path: Path
) -> None:
    data = {"reports": texts["reports"], "law": texts["law"]}
    given = [organs["legal"], organs["clinical"]]
    counted: list[tuple[int, int]] = []
    report = compose(
        given, recipient, at=[4, 1], mode=["insert", "replace"], data=data, general=texts["other"],
        output=tmp_path / "report.md", progress=lambda *numbers: counted.append(numbers), **QUICK,
    )  # fmt: skip
    assert not report.blocked and [row.name for row in report.rows] == ["recipient", "clinical", "legal", "together"]
    assert report.stack() == "recipient 0:1, clinical 0:2, recipient 3:4, legal 0:2, recipient 4:6"
    assert counted[-1][0] == counted[-1][1] == 4 * sum(domain.tokens for domain in report.data)
    places: dict[str, dict[str, Any]] = {
        "clinical": {"organ": given[1], "at": 1, "mode": "replace"},
        "legal": {"organ": given[0], "at": 4, "mode": "insert"},
        "together": {"organ": given, "at": [4, 1], "mode": ["insert", "replace"]},
    }
    for row in report.rows[1:]:
        transplant(recipient=recipient, output=tmp_path / row.name, **places[row.name])
        expected = evaluate(
            tmp_path / row.name, data={**data, "general": texts["other"]}, baseline=recipient, **QUICK
        ).data
        for name, score in row.scores.items():
            assert score.perplexity == pytest.approx(expected[name].perplexity, rel=1e-5)
            assert score.ratio == pytest.approx(expected[name].ratio, rel=1e-5)
            assert (score.low, score.high) == pytest.approx(
                (expected[name].ratio_low, expected[name].ratio_high), rel=1e-4
            )
    for item in report.interference:
        alone = {row.name: row.scores[item.data].perplexity for row in report.rows if len(row.organs) == 1}
        assert item.best == min(alone, key=lambda name: alone[name])
        assert item.ratio == pytest.approx(report.rows[-1].scores[item.data].perplexity / alone[item.best], rel=1e-6)
    page = (tmp_path / "report.md").read_text()
    assert page == report.markdown()
    assert "| inside | reports | law | general |" in page and "| together / best alone |" in page
    assert f"| recipient | {report.rows[0].scores['reports'].perplexity:,.2f} |" in page


def test_three_organs_and_what_each_adds(organs: dict[str, Organ], texts: dict[str, Path], recipient: Path) -> None:
    given = list(organs.values())
    report = compose(given, recipient, at=[0, 2, 4], mode="replace", data={"law": texts["law"]}, **QUICK)
    names = [row.name for row in report.rows]
    assert names == ["recipient", *organs, "together", "all but clinical", "all but legal", "all but loud"]
    assert [row.organs for row in report.rows][-1] == ["clinical", "legal"]
    pair = compose(given[:2], recipient, at=[0, 2], mode="replace", data={"law": texts["law"]}, **QUICK)
    assert pair.rows[-1].scores == report.rows[-1].scores


def test_the_order_at_one_position(organs: dict[str, Organ], texts: dict[str, Path], recipient: Path) -> None:
    given, data = [organs["clinical"], organs["legal"]], {"law": texts["law"]}
    report = compose(given, recipient, at=[3, 3], mode="insert", data=data, **QUICK)
    other = compose(given[::-1], recipient, at=[3, 3], mode="insert", data=data, **QUICK)
    assert report.rows[-1].name == "together, in reverse order"
    assert report.rows[-1].scores == other.rows[-2].scores != report.rows[-2].scores
    better = report.rows[-1].scores["law"].perplexity < report.rows[-2].scores["law"].perplexity
    why = next(finding.why for finding in report.findings if finding.subject == "order")
    assert why == f"in the reverse order perplexity is lower on {'law' if better else 'no data set'}"


def test_interference_is_said(organs: dict[str, Organ], texts: dict[str, Path], recipient: Path) -> None:
    trained = train(
        extract(recipient, layers=(1, 3)), host=recipient, data=texts["law"], name="court", steps=30, batch_size=4,
        sequence_length=32, lr=1e-2,
    )  # fmt: skip
    manifest = organs["loud"].manifest.model_copy(update={"probe": None})
    loud = Organ(manifest, {name: 9 * tensor for name, tensor in organs["loud"].tensors.items()})
    report = compose(
        [trained, loud],
        recipient,
        at=[1, 4],
        mode="replace",
        data={"law": texts["law"]},
        general=texts["other"],
        **QUICK,
    )
    said = {finding.subject: finding for finding in report.findings}
    assert said["interference"].severity == "risks" and not report.blocked
    assert "on law perplexity with all organs is" in said["interference"].why
    assert "times that with court alone" in said["interference"].why
    assert report.verdict() == "go together, with risks" and "They go together, with risks." in report.markdown()
    ratio = report.rows[-1].scores["general"].ratio
    assert f"perplexity on general text is {ratio:.3f}" in said["general"].why
    calm = compose([trained], recipient, at=1, data={"law": texts["law"]}, general=texts["other"], **QUICK)
    assert [row.name for row in calm.rows] == ["recipient", "court"] and calm.findings == []


def test_what_collides_is_not_measured(organs: dict[str, Organ], texts: dict[str, Path], recipient: Path) -> None:
    given = [organs["clinical"], organs["legal"]]
    report = compose(given, recipient, at=[1, 2], mode="replace", data={"law": texts["law"]}, **QUICK)
    assert report.blocked and report.rows == [] and report.layers == []
    assert [finding.subject for finding in report.findings] == ["overlap"]
    assert "do not go together" in report.markdown() and "free for its 2 layers: 3 to 4" in report.markdown()


def test_without_text_only_the_plan_is_checked(organs: dict[str, Organ], recipient: Path) -> None:
    report = compose([organs["clinical"], organs["clinical"]], recipient, at=[0, 4], mode="insert")
    assert not report.blocked and report.rows == [] and [organ.name for organ in report.organs] == [
        "clinical", "clinical-2",
    ]  # fmt: skip


def test_an_organ_that_does_not_fit_is_said_of_that_one(
    organs: dict[str, Organ], model_directory: Factory, texts: dict[str, Path]
) -> None:
    wide = model_directory("llama", seed=1, hidden_size=64)
    fits = extract(wide, layers=(0, 1), name="wide")
    report = compose([fits, organs["legal"]], wide, at=[0, 3], data={"law": texts["law"]}, **QUICK)
    blocking = {organ.name for organ in report.organs for f in organ.findings if f.severity == "blocks"}
    assert report.blocked and blocking == {"legal"} and report.rows == []


def test_arguments_that_are_wrong(
    organs: dict[str, Organ], texts: dict[str, Path], recipient: Path, tmp_path: Path
) -> None:
    given, law = [organs["clinical"], organs["legal"]], texts["law"]
    (tmp_path / "there.md").touch()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": {"general": law}, "general": law}, UsageError, "a data set is named general, and --general"),
        ({"output": tmp_path / "report.txt"}, UsageError, r"its name ends in \.md, and .*report\.txt does not"),
        ({"output": tmp_path / "there.md"}, UsageError, "exists already"),
        ({"seed": -1}, UsageError, "the seed is -1"),
        ({"data": {"law": tmp_path / "no.txt"}}, DataError, r"no file or folder .*no\.txt"),
        ({"at": [1, 2, 3]}, UsageError, "3 positions were given for 2 organs"),
    ]
    for options, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            compose(given, recipient, **options)
