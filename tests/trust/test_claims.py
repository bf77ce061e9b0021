"""Claims of a manifest, measured anew: what holds, what fails, what can't be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import neurograft
from neurograft.cli import app
from neurograft.errors import UsageError
from neurograft.manifest import Evaluation, Scan, ScanPoint
from neurograft.organ import Organ
from neurograft.trust.claims import claims_of
from neurograft.trust.verifying import verify


def claiming(organ: Organ, path: Path, *ratios: float, general: float | None = None) -> Path:
    """Save an organ that claims these ratios of perplexities on its text."""
    evaluations = [Evaluation(data="held-out text", documents=9, tokens=99, before=10, after=10 * r) for r in ratios]
    point = ScanPoint(
        mode="replace", position=2, tokens=9, perplexity=9, ratio=9, low=9, high=9, apart=True, general_ratio=general
    )
    scan = Scan(
        recipient="elsewhere", layer_count=4, mode="replace", position=2, data_fingerprint="0" * 64, documents=9,
        tokens=9, recipient_perplexity=9, recover_tokens=0, points=[point], seed=0, versions={}, when="2026",
    )  # fmt: skip
    update = {"evaluations": evaluations, "scans": [] if general is None else [scan]}
    return Organ(organ.manifest.model_copy(update=update), organ.tensors).save(path, overwrite=True).path or path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document number {number} says this and that {number * 7}" for number in range(24)))
    return path


def measure(path: Path, recipient: Path, text: Path, **more: Any) -> Any:
    found = verify(path, claims=True, recipient=recipient, data=text, at=2, **more)
    assert found.claims is not None
    return found


def test_claims_are_held_against_what_evaluate_measures(
    organ: Organ, organ_file: Path, recipient: Path, text: Path, tmp_path: Path
) -> None:
    neurograft.transplant(organ_file, recipient, output=tmp_path / "model", at=2)
    result = neurograft.evaluate(tmp_path / "model", data={"domain": text}, baseline=recipient).data["domain"]
    assert result.ratio is not None and result.ratio_low is not None and result.ratio_high is not None
    path = claiming(
        organ, tmp_path / "claims.safetensors", result.ratio_high * 1.001, result.ratio, result.ratio_low / 2
    )
    found = measure(path, recipient, text, tolerance=0.0)
    claims = found.claims.claims
    assert claims[0].measured == pytest.approx(result.ratio, rel=1e-6)
    assert [claim.verdict for claim in claims] == ["holds", "open", "fails"]
    assert not found.passed and not found.claims.holds and found.trusted is None


def test_a_tolerance_lets_a_claim_hold(organ: Organ, recipient: Path, text: Path, tmp_path: Path) -> None:
    path = claiming(organ, tmp_path / "claims.safetensors", 0.5)
    assert measure(path, recipient, text, tolerance=0.0).claims.claims[0].verdict == "fails"
    assert measure(path, recipient, text, tolerance=99.0).passed


def test_what_is_kept_is_claimed_by_scans(organ: Organ, recipient: Path, text: Path, tmp_path: Path) -> None:
    path = claiming(organ, tmp_path / "claims.safetensors", general=9.0)
    manifest = neurograft.inspect(path)
    assert [(claim.kind, claim.claimed) for claim in claims_of(manifest)] == [("gain", 9.0), ("retention", 9.0)]
    without = measure(path, recipient, text).claims.claims
    assert [claim.verdict for claim in without] == ["holds", "not measured"]
    with_general = measure(path, recipient, text, general=text).claims
    assert [claim.verdict for claim in with_general.claims] == ["holds", "holds"] and with_general.holds


def test_an_organ_that_claims_nothing(organ_file: Path, recipient: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="claims nothing that could be measured"):
        measure(organ_file, recipient, text)


def test_what_claims_need(organ_file: Path, recipient: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="give --recipient MODEL and --data PATH"):
        verify(organ_file, claims=True, recipient=recipient)
    with pytest.raises(UsageError, match="the tolerance is -1"):
        measure(organ_file, recipient, text, tolerance=-1)


def test_the_command(organ: Organ, recipient: Path, text: Path, tmp_path: Path) -> None:
    path = claiming(organ, tmp_path / "claims.safetensors", 99.0)
    words = ["verify", str(path), "--claims", "--recipient", str(recipient), "--data", str(text), "--at", "2"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["claims"]["claims"][0]["verdict"] == "holds"
    path = claiming(organ, path, 0.01)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "fails" in done.stdout
    assert "document number" not in done.stdout and "general text" not in done.stdout
    done = CliRunner().invoke(app, [*words, "--general", str(text)])
    assert "the manifest claims nothing of general text" in " ".join(done.stdout.split())
