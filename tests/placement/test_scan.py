"""A scan says of each place what evaluating it says, drops what it may drop, and survives interruptions."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

import neurograft
from conftest import Factory
from neurograft import check, evaluate, extract, scan, transplant
from neurograft.cli import app
from neurograft.data import tokenize_documents
from neurograft.errors import DataError, IncompatibleError, NeurograftError, UsageError, VerificationError
from neurograft.evaluation import document_losses
from neurograft.identity import as_identity
from neurograft.organ import Organ, read_organ
from neurograft.placement import recording
from neurograft.placement.candidates import Candidate
from neurograft.placement.engines import LocalEngine
from neurograft.placement.results import Place, ScanReport
from neurograft.placement.rounds import ScanProgress
from neurograft.surgery import attach
from tiny import LAYERS, load, make_tokenizer, save_model

RUNNER = CliRunner()


def _write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def _documents(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("abcdefgh ijk") for _ in range(rng.randint(12, longest))) for _ in range(count)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return _write(tmp_path / "text.jsonl", _documents(70))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _place(report: ScanReport, mode: str, position: int) -> Place:
    return next(place for place in report.places if (place.mode, place.position) == (mode, position))


@pytest.mark.parametrize(
    ("mode", "position"), [("replace", 0), ("replace", 4), ("insert", 0), ("insert", 3), ("insert", 6)]
)
def test_a_place_is_what_evaluate_says_of_the_transplanted_model(
    mode: Any, position: int, organ_file: Path, recipient: Path, text: Path, tmp_path: Path
) -> None:
    general = _write(tmp_path / "general.jsonl", _documents(20, seed=9, longest=90))
    report = scan(
        organ_file, recipient, data=text, general=general, positions=[position], modes=mode, sequence_length=32
    )
    transplant(organ_file, recipient, at=position, mode=mode, output=tmp_path / "grafted")
    data: Any = {"domain": text, "general": general}
    expected = evaluate(tmp_path / "grafted", baseline=recipient, data=data, sequence_length=32)
    assert report.complete and (report.mode, report.position, report.tied) == (mode, position, [])
    for name, score in (("domain", report.places[0].domain), ("general", report.places[0].general)):
        same = expected.data[name]
        assert score is not None
        assert (score.tokens, score.documents) == (same.tokens, same.documents)
        assert score.perplexity == pytest.approx(same.perplexity, rel=1e-5)
        assert score.recipient == pytest.approx(same.baseline_perplexity, rel=1e-5)
        assert score.ratio == pytest.approx(same.ratio, rel=1e-5)
        assert same.ratio_low is not None and same.ratio_high is not None
        assert score.low == pytest.approx(same.ratio_low, rel=0.02) and score.high == pytest.approx(
            same.ratio_high, rel=0.02
        )


def test_halving_finds_what_measuring_everything_finds(organ: Organ, recipient: Path, text: Path) -> None:
    whole = scan(organ, recipient, data=text, prune="never")
    halved = scan(organ, recipient, data=text)
    assert (halved.mode, halved.position) == (whole.mode, whole.position)
    assert halved.complete and whole.complete
    assert all(place.stopped is None for place in whole.places)
    assert len(whole.places) == len(halved.places) == (LAYERS + 1) + (LAYERS - 1)
    assert halved.layer_passes < whole.layer_passes < whole.layer_passes_from_scratch
    assert halved.layer_passes_from_scratch == whole.layer_passes_from_scratch
    left, rounds = len(halved.places), max(place.rounds for place in halved.places)
    assert rounds >= 2
    for number in range(1, rounds):
        going_on = sum(place.rounds > number for place in halved.places)
        assert going_on <= max(2, -(-left // 2))
        left = going_on
    for place in halved.places:
        same = _place(whole, place.mode, place.position)
        assert place.domain is not None and same.domain is not None
        if place.stopped is None:
            assert place.domain.perplexity == pytest.approx(same.domain.perplexity, rel=1e-5)
        else:
            assert place.domain.tokens < same.domain.tokens


def test_nothing_is_said_of_places_that_are_alike(recipient: Path, text: Path) -> None:
    identity = as_identity(extract(recipient, layers=(2, 4)))
    report = scan(identity, recipient, data=text, modes="insert", prune="evidence")
    assert len(report.tied) == LAYERS and not report.helps
    for place in report.places:
        assert place.domain is not None and place.stopped is None
        assert place.domain.ratio == pytest.approx(1, abs=1e-6) and place.apart is False
    halved = scan(identity, recipient, data=text, modes="insert")
    assert len(halved.tied) == LAYERS
    assert {place.stopped for place in halved.places} == {None, "halved"}


def test_worse_places_drop_out_by_evidence(recipient: Path, model_directory: Factory, text: Path) -> None:
    own = extract(recipient, layers=(2, 4))
    noise = {name: tensor + 0.5 * torch.randn_like(tensor) for name, tensor in own.tensors.items()}
    assert scan(own, recipient, data=text, modes="replace", positions=[2]).places[0].domain.ratio == pytest.approx(1)  # type: ignore[union-attr]
    broken = Organ(own.manifest.model_copy(update={"probe": None}), noise)
    report = scan(broken, recipient, data=text, prune="evidence")
    worse = [place for place in report.places if place.stopped == "worse"]
    assert any(place.apart and place.behind_low is not None and place.behind_low > 1 for place in worse)
    assert all(place.rounds < 3 for place in worse)
    best = next(place for place in report.places if (place.mode, place.position) == (report.mode, report.position))
    assert best.stopped is None


def test_long_documents_are_compared_by_windows(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    path = _write(tmp_path / "long.jsonl", ["".join(_documents(60))])
    report = scan(organ, recipient, data=path, sequence_length=32, positions="2:5", modes="insert")
    assert report.units == "windows" and report.domain.documents == 1 and report.complete
    low, high = report.places[0].domain.low, report.places[0].domain.high  # type: ignore[union-attr]
    assert low < report.places[0].domain.ratio < high  # type: ignore[union-attr]


def test_a_sample_of_the_text(organ: Organ, recipient: Path, text: Path) -> None:
    report = scan(organ, recipient, data=text, max_tokens=600, positions=[1, 2], modes="insert")
    assert 600 <= report.domain.tokens < 660 and report.complete


class TestBudget:
    def test_tokens(self, organ: Organ, recipient: Path, text: Path) -> None:
        free = scan(organ, recipient, data=text, prune="never")
        for share in (0.3, 0.6):
            budget = int(free.tokens_run * share)
            report = scan(organ, recipient, data=text, prune="never", budget_tokens=budget)
            assert report.tokens_run <= budget
            assert any(place.stopped == "budget" for place in report.places) or not report.complete

    def test_too_few_tokens_for_all_places(self, organ: Organ, recipient: Path, text: Path) -> None:
        report = scan(organ, recipient, data=text, budget_tokens=9000)
        unmeasured = [place for place in report.places if place.domain is None]
        assert unmeasured and all(place.stopped == "budget" for place in unmeasured)
        measured = [place.position for place in report.places if place.domain is not None]
        assert max(measured) - min(measured) >= LAYERS // 2
        with pytest.raises(UsageError, match="the budget allows nothing: the first round runs"):
            scan(organ, recipient, data=text, budget_tokens=100)

    def test_seconds(self, organ: Organ, recipient: Path, text: Path) -> None:
        report = scan(organ, recipient, data=text, budget_seconds=1e-3)
        assert not report.complete and report.domain.documents == 8
        assert all(place.domain is not None and place.domain.documents == 8 for place in report.places)


def _interrupt_after(count: int) -> Callable[[ScanProgress], None]:
    seen = 0

    def show(_progress: ScanProgress) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise KeyboardInterrupt

    return show


def _comparable(report: ScanReport) -> dict[str, Any]:
    return report.model_dump(exclude={"seconds"})


class TestInterruption:
    @pytest.mark.parametrize("after", [1, 5, 9, 16])
    def test_the_same_call_goes_on(
        self, after: int, organ: Organ, recipient: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[str] = []
        run = LocalEngine.run

        def noted(self: LocalEngine, tasks: Any) -> Any:
            for task, outcome in run(self, tasks):
                ran.append(task.name)
                yield task, outcome

        monkeypatch.setattr(LocalEngine, "run", noted)
        arguments: dict[str, Any] = {"data": text, "general": text, "sequence_length": 48}
        expected = scan(organ, recipient, **arguments)
        names = list(ran)
        assert len(set(names)) == len(names) > 16
        ran.clear()
        with pytest.raises(KeyboardInterrupt, match=r"in round \d of \d; the same command goes on from there"):
            scan(organ, recipient, **arguments, progress=_interrupt_after(after))
        assert len(list((cache / "scan").iterdir())) == 1
        kept = neurograft.cache().entries
        assert "scan" in {entry.kind for entry in kept}
        resumed = scan(organ, recipient, **arguments)
        assert ran == names
        assert _comparable(resumed) == _comparable(expected)
        assert list((cache / "scan").iterdir()) == []

    def test_with_a_budget(self, organ: Organ, recipient: Path, text: Path) -> None:
        arguments: dict[str, Any] = {"data": text, "prune": "never", "batch_size": 4, "budget_tokens": 16_000}
        expected = scan(organ, recipient, **arguments)
        assert any(place.stopped == "budget" for place in expected.places)
        for after in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                scan(organ, recipient, **arguments, progress=_interrupt_after(after))
        assert _comparable(scan(organ, recipient, **arguments)) == _comparable(expected)

    def test_other_options_begin_anew(self, organ: Organ, recipient: Path, text: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            scan(organ, recipient, data=text, progress=_interrupt_after(3))
        report = scan(organ, recipient, data=text, seed=1)
        assert report.complete and report.seed == 1

    def test_what_can_not_be_read_begins_anew(self, organ: Organ, recipient: Path, text: Path, cache: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            scan(organ, recipient, data=text, progress=_interrupt_after(3))
        next((cache / "scan").rglob("state.json")).write_text("{")
        assert scan(organ, recipient, data=text).complete


class TestRecovery:
    ARGUMENTS: ClassVar[dict[str, Any]] = {"recover_tokens": 2000, "positions": [1, 3], "prune": "never"}

    def test_places_are_measured_with_what_the_organ_becomes_there(
        self, organ: Organ, recipient: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept: dict[Candidate, bytes] = {}
        recover = LocalEngine.recover

        def noted(self: LocalEngine, candidates: Any) -> Any:
            for candidate, data in recover(self, candidates):
                kept[candidate] = data
                yield candidate, data

        monkeypatch.setattr(LocalEngine, "recover", noted)
        measured_on, trained_on = text, _write(text.with_name("recovery.jsonl"), _documents(60, seed=5))
        plain = scan(organ, recipient, data=measured_on, positions=[1, 3], prune="never")
        report = scan(organ, recipient, data=measured_on, recover_data=trained_on, **self.ARGUMENTS)
        assert report.recover_tokens == 2000 and len(kept) == 4
        assert report.tokens_run == plain.tokens_run + 4 * 2000
        from safetensors.torch import load as parse

        documents = [document.strip() for document in _documents(70)]
        tokens = make_tokenizer()(documents, add_special_tokens=False)["input_ids"]
        for candidate, data in kept.items():
            model = load(recipient)
            attachment = attach(model, organ, at=candidate.position, mode=candidate.mode, verify=False)
            for number, layer in enumerate(attachment.layers):
                prefix = f"{number}."
                own = {n.removeprefix(prefix): t for n, t in parse(data).items() if n.startswith(prefix)}
                layer.load_state_dict(own)
            pairs = document_losses(model, tokens, sequence_length=128, batch_size=8, separator_id=1)
            expected = sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)
            found, before = (_place(r, candidate.mode, candidate.position).domain for r in (report, plain))
            assert found is not None and before is not None
            assert found.perplexity == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
            assert found.perplexity < before.perplexity
        assert list((cache / "scan").iterdir()) == []

    def test_an_interruption_costs_no_finished_recovery(
        self, organ: Organ, recipient: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = scan(organ, recipient, data=text, **self.ARGUMENTS)
        counts: list[int] = []
        recover = LocalEngine.recover

        def counted(self: LocalEngine, candidates: Any) -> Any:
            counts.append(len(candidates))
            yield from recover(self, candidates)

        monkeypatch.setattr(LocalEngine, "recover", counted)
        with pytest.raises(KeyboardInterrupt, match="while organs recovered; the same command goes on"):
            scan(organ, recipient, data=text, **self.ARGUMENTS, progress=_interrupt_after(3))
        with pytest.raises(KeyboardInterrupt, match="in round 1"):
            scan(organ, recipient, data=text, **self.ARGUMENTS, progress=_interrupt_after(2))
        resumed = scan(organ, recipient, data=text, **self.ARGUMENTS)
        assert counts == [4, 1]
        assert _comparable(resumed) == _comparable(expected)

    def test_a_budget_is_spread_over_positions(self, organ: Organ, recipient: Path, text: Path) -> None:
        report = scan(
            organ, recipient, data=text, recover_tokens=2000, modes="insert", budget_tokens=12_000, max_tokens=600
        )
        assert [place.position for place in report.places if place.rounds] == [0, 2, 4, 6]
        assert {place.stopped for place in report.places if not place.rounds} == {"budget"}
        with pytest.raises(UsageError, match="allows no recovery at a single place"):
            scan(organ, recipient, data=text, recover_tokens=1000, budget_tokens=900)


class TestRecord:
    def test_the_manifest_holds_the_curve(self, organ_file: Path, recipient: Path, text: Path, tmp_path: Path) -> None:
        before = read_organ(organ_file)
        report = scan(organ_file, recipient, data=text, general=text, output=tmp_path / "scan.json", record=True)
        after = read_organ(organ_file)
        assert after.manifest.tensors_digest == before.manifest.tensors_digest
        assert (after.manifest.recommended_mode, after.manifest.recommended_position) == (report.mode, report.position)
        [kept] = after.manifest.scans
        assert (kept.mode, kept.position, kept.recipient) == (report.mode, report.position, recipient.name)
        assert len(kept.points) == len(report.places)
        for point, place in zip(kept.points, report.places, strict=True):
            assert place.domain is not None and place.general is not None
            assert (point.mode, point.position, point.ratio) == (place.mode, place.position, place.domain.ratio)
            assert (point.apart, point.general_ratio) == (place.apart, place.general.ratio)
        assert ScanReport.model_validate_json((tmp_path / "scan.json").read_text()) == report
        transplant(organ_file, recipient, output=tmp_path / "grafted")
        record = json.loads((tmp_path / "grafted" / "neurograft.json").read_text())
        assert (record["operations"][0]["mode"], record["operations"][0]["position"]) == (report.mode, report.position)
        best = next(point for point in kept.points if (point.mode, point.position) == (report.mode, report.position))
        found = check(organ_file, recipient, alignment="skip").findings
        [told] = [finding for finding in found if finding.subject == "recorded scan"]
        assert f"measured {best.ratio:.3f}" in told.why
        assert told == next(finding for finding in found if finding.severity == told.severity)
        elsewhere = next(point for point in kept.points if point.position != report.position)
        found = check(organ_file, recipient, at=elsewhere.position, mode=elsewhere.mode, alignment="skip").findings
        [told] = [finding for finding in found if finding.subject == "recorded scan"]
        assert told.severity == ("risks" if elsewhere.low > 1 else "notes")
        assert f"measured {elsewhere.ratio:.3f}" in told.why
        assert f"best place was {report.mode} at {report.position}: {best.ratio:.3f}" in told.why
        scan(organ_file, recipient, data=text, positions=[2], modes="insert", record=True)
        assert len(read_organ(organ_file).manifest.scans) == 2

    def test_a_position_in_a_deeper_relative_counts_from_the_donor(
        self, donor: Path, organ: Organ, recipient: Path, text: Path, tmp_path: Path
    ) -> None:
        transplant(
            extract(recipient, layers=(0, 2), name="other"), donor, at=0, mode="insert", output=tmp_path / "deep"
        )
        organ.save(tmp_path / "organ.safetensors")
        scan(tmp_path / "organ.safetensors", tmp_path / "deep", data=text, modes="replace", positions=[5], record=True)
        manifest = read_organ(tmp_path / "organ.safetensors").manifest
        assert manifest.scans[0].position == 5 and manifest.recommended_position == 3

    def test_further_training_makes_it_void(self, organ_file: Path, recipient: Path, text: Path) -> None:
        scan(organ_file, recipient, data=text, positions=[2], modes="insert", max_tokens=300, record=True)
        assert len(read_organ(organ_file).manifest.scans) == 1
        trained = neurograft.train(organ_file, host=recipient, data=text, at=2, steps=1, sequence_length=32)
        assert trained.manifest.scans == []

    def test_another_file_meanwhile(
        self, organ_file: Path, recipient: Path, text: Path, donor: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scanned = read_organ(organ_file)
        report = scan(scanned, recipient, data=text, positions=[2], modes="insert")
        extract(donor, layers=(1, 3), name="another", output=organ_file, overwrite=True)
        with pytest.raises(VerificationError, match="does not hold any more what was scanned"):
            recording.record_scan(organ_file, scanned, report, neurograft.models.resolve(recipient))


@pytest.fixture(scope="module")
def ray_of_two() -> Any:
    """A Ray cluster on this machine, with room for two workers."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_of_two")
class TestRay:
    def test_two_workers_find_the_same(self, organ: Organ, recipient: Path, text: Path) -> None:
        arguments: dict[str, Any] = {"data": text, "general": text, "positions": "0:7:2"}
        alone = scan(organ, recipient, **arguments)
        together = scan(organ, recipient, **arguments, engine="ray", workers=2)
        assert together.places == alone.places
        assert _comparable(together) | {"layer_passes": 0} == _comparable(alone) | {"layer_passes": 0}
        # Each part of a divided batch runs what lies below it.
        assert alone.layer_passes <= together.layer_passes < 2 * alone.layer_passes

    def test_after_recovery_too(self, organ: Organ, recipient: Path, text: Path) -> None:
        arguments: dict[str, Any] = {
            "data": text, "positions": [1, 4], "modes": "insert", "recover_tokens": 1000, "max_tokens": 600,
        }  # fmt: skip
        alone = scan(organ, recipient, **arguments)
        together = scan(organ, recipient, **arguments, engine="ray", workers=2)
        for own, other in zip(together.places, alone.places, strict=True):
            assert own.domain is not None and other.domain is not None
            assert own.domain.perplexity == pytest.approx(other.domain.perplexity, rel=1e-4)

    def test_what_a_worker_raises_is_one_sentence(
        self, organ: Organ, recipient: Path, text: Path, tmp_path: Path
    ) -> None:
        from neurograft.placement.engines import RayEngine, Setup
        from neurograft.placement.scan_state import ScanFolder

        setup = Setup(str(tmp_path / "gone"), organ, [Candidate(1, "insert")], 1, None, False)
        with pytest.raises(NeurograftError, match="there is no model at"):
            RayEngine(setup, None, ScanFolder("0" * 64), workers=1, address=None)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"modes": "append"}, "the mode is 'append'; it can be replace, insert, or both"),
            ({"modes": "insert,insert"}, "the mode insert is given twice"),
            ({"modes": []}, "no mode was given"),
            ({"positions": "3-5"}, "the positions '3-5' can't be read"),
            ({"positions": "5:5"}, "the positions '5:5' are none"),
            ({"positions": [7]}, "position 7 is out of range: in a model of 6 layers, it can be 0 to 6"),
            ({"positions": "0:9"}, "position 7 is out of range"),
            (
                {"positions": [5], "modes": "replace"},
                "none of these positions allows to replace 2 layers in a model of 6",
            ),
            ({"prune": "all"}, "--prune is 'all'; it can be halving, evidence, never"),
            ({"engine": "mpi"}, "--engine is 'mpi'; it can be local, ray"),
            ({"workers": 2}, "--workers counts the workers of a Ray cluster; add --engine ray"),
            ({"address": "auto"}, "--address is that of a Ray cluster; add --engine ray"),
            ({"max_tokens": 0}, "--max-tokens is 0; it must be above 0"),
            ({"budget_seconds": -1.0}, "--budget-seconds is -1.0; it must be above 0"),
            ({"seed": -1}, "the seed is -1; it must not be negative"),
            ({"recover_data": "x"}, "--recover-data goes with --recover-tokens"),
            ({"record": True}, "the organ has no file that the scan could be recorded in"),
            ({"sequence_length": 10**7}, "takes at most"),
        ],
    )
    def test_options(self, options: dict[str, Any], sentence: str, organ: Organ, recipient: Path, text: Path) -> None:
        with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
            scan(Organ(organ.manifest, organ.tensors), recipient, data=text, **options)

    def test_too_little_text(self, organ: Organ, recipient: Path, tmp_path: Path) -> None:
        path = _write(tmp_path / "few.jsonl", _documents(7))
        with pytest.raises(
            DataError, match=r"in 7 windows of up to 512 tokens are too few: .* on 8 windows or more; give more text or"
        ):
            scan(organ, recipient, data=path)
        with pytest.raises(DataError, match=r"too few: .* give a larger --max-tokens"):
            scan(organ, recipient, data=_write(tmp_path / "many.jsonl", _documents(70)), max_tokens=5)
        with pytest.raises(DataError, match="there is too little text to recover on"):
            scan(organ, recipient, data=path, recover_tokens=100, recover_data=_write(tmp_path / "one.jsonl", ["a"]))

    def test_an_existing_output(self, organ: Organ, recipient: Path, text: Path, tmp_path: Path) -> None:
        (tmp_path / "scan.json").write_text("{}")
        with pytest.raises(UsageError, match="exists already"):
            scan(organ, recipient, data=text, output=tmp_path / "scan.json")
        with pytest.raises(UsageError, match="overlaps the input"):
            scan(organ, recipient, data=text, output=recipient / "scan.json", overwrite=True)

    def test_another_architecture(self, organ: Organ, model_directory: Factory, text: Path) -> None:
        with pytest.raises(IncompatibleError, match="model_type is llama in the organ and gpt2 in the recipient"):
            scan(organ, model_directory("gpt2"), data=text)

    def test_another_tokenizer(self, organ: Organ, tmp_path: Path, text: Path) -> None:
        folder = save_model(tmp_path / "other", "llama", seed=1)
        make_tokenizer("zyxwvutsrqponmlkjihgfedcba ").save_pretrained(folder)
        with pytest.raises(IncompatibleError, match="they cut the same text into other tokens"):
            scan(organ, folder, data=text)

    def test_places_that_are_blocked_are_told(self, model_directory: Factory, text: Path) -> None:
        folder = model_directory("gpt2", scale_attn_by_inverse_layer_idx=True)
        report = scan(extract(folder, layers=(0, 2)), folder, data=text)
        blocked = [place for place in report.places if place.stopped == "blocked"]
        assert (report.mode, report.position) == ("replace", 0) and len(blocked) == len(report.places) - 1
        assert all(place.why and "would not compute the same" in place.why for place in blocked)
        with pytest.raises(IncompatibleError, match=r"layer 2 can't be made what the plan says: attn\.scaling"):
            scan(extract(folder, layers=(2, 4)), folder, data=text)
        with pytest.raises(IncompatibleError, match="can stand at none of 1 places, at the first since: layer"):
            scan(extract(folder, layers=(2, 4)), folder, data=text, modes="insert", positions=[0])

    def test_ray_is_missing(self, organ: Organ, recipient: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
        with pytest.raises(NeurograftError, match=r"pip install 'neurograft\[ray\]'"):
            scan(organ, recipient, data=text, engine="ray")

    def test_a_cluster_that_is_not_there(self, organ: Organ, recipient: Path, text: Path) -> None:
        with pytest.raises(NeurograftError, match=r"the Ray cluster at 127\.0\.0\.1:1 can't be reached"):
            scan(organ, recipient, data=text, engine="ray", address="127.0.0.1:1")


class TestCommand:
    def test_tables_and_json(self, organ_file: Path, recipient: Path, text: Path, tmp_path: Path) -> None:
        words = ["scan", str(organ_file), str(recipient), "--data", str(text), "--general", str(text), "--record"]
        shown = RUNNER.invoke(app, words)
        assert shown.exit_code == 0, shown.output
        assert "replace, domain" in shown.stdout and "* best: " in shown.stdout and "layer passes" in shown.stdout
        result = RUNNER.invoke(app, [*words, "--json", "-o", str(tmp_path / "scan.json")])
        report = json.loads(result.stdout)
        assert report == json.loads((tmp_path / "scan.json").read_text())
        assert len(report["places"]) == 2 * LAYERS
        inspected = RUNNER.invoke(app, ["inspect", str(organ_file)])
        assert f"best is {report['mode']} at {report['position']} of {2 * LAYERS} places" in inspected.stdout

    def test_what_is_not_sure_is_said(self, recipient: Path, text: Path, tmp_path: Path) -> None:
        as_identity(extract(recipient, layers=(2, 4))).save(tmp_path / "identity.safetensors")
        words = [str(tmp_path / "identity.safetensors"), str(recipient), "--data", str(text), "--modes", "insert"]
        shown = RUNNER.invoke(app, ["scan", *words, "--budget-tokens", "9000"])
        assert "≈ can't be told apart" in shown.stdout and "nowhere is the organ sure" in shown.stdout
        assert "the budget ended before the whole sample was used" in shown.stdout

    def test_failure(self, organ_file: Path, recipient: Path, text: Path) -> None:
        result = RUNNER.invoke(app, ["scan", str(organ_file), str(recipient), "--data", str(text), "--positions", "99"])
        assert result.exit_code == 2 and "position 99 is out of range" in result.stderr


@pytest.mark.parametrize("which", ["data", "general", "recover_data"])
def test_text_is_never_overwritten(which: str, organ: Organ, recipient: Path, text: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "other.jsonl", _documents(30, seed=3))
    before = other.read_bytes()
    given: dict[str, Any] = {"data": text, which: other, **({"recover_tokens": 64} if which == "recover_data" else {})}
    with pytest.raises(UsageError, match=r"other\.jsonl"):
        scan(organ, recipient, output=other, overwrite=True, **given)
    assert other.read_bytes() == before


def test_a_scan_that_left_places_out_recommends_nothing(organ_file: Path, recipient: Path, text: Path) -> None:
    before = read_organ(organ_file).manifest
    options: dict[str, Any] = {"sequence_length": 16, "max_tokens": 400, "modes": "insert", "prune": "never"}
    whole = scan(organ_file, recipient, data=text, **options)
    part = scan(organ_file, recipient, data=text, record=True, budget_tokens=whole.tokens_run // 2, **options)
    assert whole.unmeasured == 0 < part.unmeasured < len(part.places)
    after = read_organ(organ_file).manifest
    assert len(after.scans) == 1
    assert (after.recommended_mode, after.recommended_position) == (
        before.recommended_mode,
        before.recommended_position,
    )


def test_a_tokenizer_without_words_for_the_text_is_one_sentence() -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Exception("WordLevel error: Missing [UNK] token")

    with pytest.raises(DataError, match=r"the tokenizer can't encode the text: WordLevel error"):
        tokenize_documents(["a text"], refuse)  # type: ignore[arg-type]
