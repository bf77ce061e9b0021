"""What is proposed keeps to the budget and can be run; what it costs follows from a few measured steps."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import Factory
from neurograft import extract, plan
from neurograft.arithmetic import Arithmetic
from neurograft.cli import app
from neurograft.data import pack
from neurograft.errors import UsageError
from neurograft.evaluation import document_losses
from neurograft.models import resolve
from neurograft.placement.costs import Measured, _Probe, measure, predict
from neurograft.placement.plan_results import PlanReport, Proposal
from neurograft.placement.proposal import parse_budget
from neurograft.placement.signals import layer_signals, logit_lens
from neurograft.placement.trials import Trials, shortlist
from neurograft.training.loop import Batches
from neurograft.training.options import TrainingOptions, parse_options
from tiny import LAYERS, make_model

RUNNER = CliRunner()
OPTIONS: dict[str, Any] = {"sequence_length": 32, "batch_size": 2, "eval_tokens": 128, "precision": "float32"}
MEASURED = Measured(
    layer_count=10, forward=1.0, through=3.0, training=5.0, fixed=7.0, evaluating=2.0,
    through_bytes=100.0, training_bytes=1000.0, fixed_bytes=50.0, parameters=10,
)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    documents = [f"patient {number} has the finding {'abcdefg'[number % 7] * 5}" for number in range(60)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "cache"))


def _batches(steps: int = 20, rows: int = 60, accumulate: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, 80, (31,), generator=generator).tolist() for _ in range(rows + 4)]
    packed = [pack(part, sequence_length=32, separator_id=1) for part in (tokens[:rows], tokens[rows:])]
    return Batches(packed[0], packed[1], steps, 2, 0, accumulate)


class TestCosts:
    def test_what_runs_is_what_is_counted(self) -> None:
        options = parse_options(**OPTIONS, evaluations=4)
        cost = predict(MEASURED, _batches(), options, start=3, count=2, inserted=False, size=80)
        step = 7 + 3 * 1 + 2 * 5 + 5 * 3
        looks = 2 * (5 * (2 + 7 * 1) + 3 * 1)  # two batches: five evaluations above the cached states, once below
        assert cost.seconds == 20 * step + looks
        assert cost.memory == 2 * 1000 + 5 * 100 + 50 + 2 * 10 * 16 + 80
        assert cost.bytes == 80

    def test_text_that_comes_again_is_computed_below_once(self) -> None:
        options = parse_options(**OPTIONS)
        once = predict(MEASURED, _batches(30), options, start=8, count=1, inserted=False, size=0)
        twice = predict(MEASURED, _batches(60), options, start=8, count=1, inserted=False, size=0)
        assert twice.seconds - once.seconds == 30 * (7 + 5 + 3) - 30 * 8 + 30 * 8
        never = predict(
            MEASURED, _batches(60), parse_options(**OPTIONS, cache_prefix="never"), start=8, count=1, inserted=False,
            size=0,
        )  # fmt: skip
        looking = 2 * (5 - 1) * 8
        assert never.seconds - twice.seconds == 60 * 8 - 30 * 8 + looking

    def test_an_early_organ_keeps_every_later_layer(self) -> None:
        options = parse_options(**OPTIONS)
        memory = [
            predict(MEASURED, _batches(), options, start=start, count=2, inserted=False, size=0).memory
            for start in range(9)
        ]
        assert [a - b for a, b in itertools.pairwise(memory)] == [100] * 8
        inserted = predict(MEASURED, _batches(), options, start=3, count=2, inserted=True, size=0)
        assert inserted.memory == memory[3] + 2 * 100 + 4 * 2 * 10

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
    def test_the_memory_of_other_ranges_follows(self, kind: str) -> None:
        model: Any = make_model(kind)
        path = "transformer.h" if kind == "gpt2" else "model.layers"
        layers = list(model.get_submodule(path).children())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        options, batches = TrainingOptions(**OPTIONS), _batches()
        measured = measure(model, layers, batches, options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
        assert 0 < measured.through_bytes < measured.training_bytes
        assert 0 < measured.forward <= measured.through and measured.forward <= measured.training
        logits = (
            measured.fixed_bytes - _Probe(model, layers, batches, options, range(5, 6)).kept + measured.training_bytes
        )
        for chosen in (range(2, 4), range(1, 6), range(3, 4)):
            kept = _Probe(model, layers, batches, options, chosen).kept
            above = LAYERS - chosen.stop
            expected = (
                len(chosen) * measured.training_bytes + above * measured.through_bytes + measured.fixed_bytes - logits
            )
            assert kept == pytest.approx(expected, rel=0.05)


def test_signals_are_what_autograd_says() -> None:
    model: Any = make_model("llama")
    batches = _batches(rows=4)
    layers = list(model.model.layers)
    gradients, influence = layer_signals(model, layers, batches, Arithmetic("float32"))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    for layer in layers:
        layer.requires_grad_(True)
    expected, moved = [0.0] * LAYERS, [0.0] * LAYERS
    for rows in (slice(0, 2), slice(2, 4)):
        ids = batches.training.input_ids[rows]
        output = model(input_ids=ids, labels=batches.training.labels[rows], output_hidden_states=True)
        model.zero_grad()
        output.loss.backward()
        for number, layer in enumerate(layers):
            expected[number] += sum(float(p.grad.square().sum()) for p in layer.parameters()) / 2
        for number in range(LAYERS - 1):  # what leaves the last one is given after the final norm
            entering, leaving = (state.detach() for state in output.hidden_states[number : number + 2])
            moved[number] += float(1 - torch.nn.functional.cosine_similarity(entering, leaving, dim=-1).mean()) / 2
    assert gradients == pytest.approx(expected, rel=1e-3)
    assert influence[:-1] == pytest.approx(moved[:-1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_lens_reads_what_the_head_makes_of_each_boundary(kind: str) -> None:
    model: Any = make_model(kind)
    parts = {"gpt2": ("transformer.h", "transformer.ln_f")}.get(kind, ("model.layers", "model.norm"))
    layers, norm = list(model.get_submodule(parts[0]).children()), model.get_submodule(parts[1])
    batches = _batches(rows=4)
    found = logit_lens(model, layers, batches)
    ids, labels = batches.training.input_ids[:2], batches.training.labels[:2]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states  # the last one after the norm
        for boundary, read in enumerate(found):
            logits = model.lm_head(norm(states[boundary]) if boundary < LAYERS else states[boundary])
            softcap = getattr(model.config, "final_logit_softcapping", None)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            assert read == pytest.approx(float(expected), rel=1e-4)
    assert len(found) == LAYERS + 1
    assert all("forward" not in vars(layer) for layer in layers)


def test_the_better_half_of_the_candidates_trains_again_for_twice_as_long(model_directory: Factory) -> None:
    model: Any = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options, batches = TrainingOptions(**OPTIONS), _batches(40)
    candidates = [_proposal(start, start + 1, 0) for start in range(LAYERS)]
    directory, said = resolve(model_directory("llama")), list[str]()
    documents = [list(range(2, 20)), list(range(5, 40))]

    def trials_on(batches: Batches) -> Trials:
        return Trials(
            model, directory, batches, options, documents=documents, separator_id=1, trust_remote_code=False,
            say=said.append,
        )  # fmt: skip

    trials = trials_on(batches)
    losses = document_losses(model, documents, sequence_length=512, batch_size=2, separator_id=1)
    assert trials.untrained == pytest.approx(math.exp(sum(x for x, _ in losses) / sum(n for _, n in losses)))

    def insertion(layers: range) -> Proposal:
        proposal = _proposal(layers.start, layers.stop, 0)
        return proposal.model_copy(update={"protocol": "insert", "mode": "insert"})

    found = trials.run(candidates, 2 * 64, insertion)
    assert sorted(p.layers for p in found if p.protocol == "in_place") == [p.layers for p in candidates]
    assert [p.trial_tokens // 64 for p in found] == [8, 8, 4, 4, 2, 2, 2]  # seven, then four, then two
    assert all(a.trial <= b.trial for a, b in itertools.pairwise(found) if a.trial_tokens == b.trial_tokens)  # type: ignore[operator]
    assert sum("inserted" in line for line in said) >= 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # With little to train on in all, one round must do.
    assert {p.trial_tokens for p in trials_on(_batches(7)).run(candidates, 2 * 64, lambda _: None)} == {2 * 64}


def test_the_plan_keeps_to_its_budget_and_its_commands_run(recipient: Path, text: Path, tmp_path: Path) -> None:
    size = sum(t.nbytes for t in extract(recipient, layers=(0, 1)).tensors.values())
    report = plan(
        recipient,
        data=text,
        budget=[f"bytes={2 * size + 190_000}", "tokens=1050"],
        trials=2,
        output=tmp_path / "plan.json",
        **OPTIONS,
    )
    assert PlanReport.model_validate_json((tmp_path / "plan.json").read_text()) == report
    assert report.tokens == 1024 and report.steps == 16 and report.layer_count == LAYERS
    assert report.best == report.proposals[0] and report.best.count <= 2
    assert len(report.lens) == LAYERS + 1
    assert {proposal.protocol for proposal in report.proposals} == {"in_place", "insert"}
    for proposal in report.proposals:
        assert proposal.cost.bytes - proposal.count * size == report.best.cost.bytes - report.best.count * size
        assert proposal.trial is not None
        assert proposal.trial <= report.untrained and proposal.cost.seconds > 0
        start = int(proposal.layers.split(":")[0])
        assert proposal.gradient == pytest.approx(sum(report.gradients[start : start + proposal.count]))
    ranks = [(-proposal.trial_tokens, proposal.trial or 0) for proposal in report.proposals]
    assert ranks == sorted(ranks) and report.trial_tokens == report.best.trial_tokens
    assert report.paper.layers == "2:5" and report.paper.trial is None  # too many bytes
    for command in report.commands:
        words = shlex.split(command)[1:]
        words = [str(tmp_path / word) if word.endswith(".safetensors") else word for word in words]
        result = RUNNER.invoke(app, words)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "trained.safetensors").stat().st_size == pytest.approx(report.best.cost.bytes, rel=0.05)


def test_commands_are_printed_whole(recipient: Path, text: Path, tmp_path: Path) -> None:
    data = tmp_path / f"{'a long name ' * 12}.jsonl"
    data.write_bytes(text.read_bytes())
    words = ["plan", str(recipient), "--data", str(data), "--trials", "1", "--trial-tokens", "64"]
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = RUNNER.invoke(app, [*words, *options])
    assert result.exit_code == 0, result.output
    [command] = [line for line in result.stdout.splitlines() if line.startswith("neurograft train")]
    assert shlex.split(command)[-2:] == ["-o", "trained.safetensors"] and str(data) in shlex.split(command)


def test_memory_rules_out_early_layers(recipient: Path, text: Path) -> None:
    free = plan(recipient, data=text, trials=1, trial_tokens=64, **OPTIONS)
    assert free.best.count == LAYERS or free.proposals[0].cost.memory > 0
    late = plan(
        recipient, data=text, trials=9, trial_tokens=64, budget={"memory": free.paper.cost.memory * 0.9}, **OPTIONS
    )
    assert all(proposal.cost.memory <= free.paper.cost.memory * 0.9 for proposal in late.proposals)


def _proposal(start: int, stop: int, gradient: float) -> Proposal:
    cost: Any = {"seconds": 1.0, "memory": 1, "bytes": 1}
    return Proposal(
        layers=f"{start}:{stop}", protocol="in_place", mode="replace", position=start, cost=cost, gradient=gradient,
        trial=None,
    )  # fmt: skip


def test_the_shortlist_is_spread_over_what_the_budget_allows() -> None:
    possible = [_proposal(s, s + n, 10.0 * n - s) for s in range(12) for n in (1, 3, 5) if s + n <= 12]
    found = [proposal.layers for proposal in shortlist(possible, 9, 12)]
    assert found[:6] == ["4:7", "4:9", "3:8", "6:11", "2:7", "0:5"]  # the paper's, four starts, the largest gradient
    assert len(found) == len(set(found)) == 9
    everything = {proposal.layers for proposal in shortlist(possible, 99, 12)}
    assert everything == {"4:7", *(f"{s}:{s + (5 if s <= 7 else 3 if s <= 9 else 1)}" for s in range(12))}
    assert [proposal.layers for proposal in shortlist([_proposal(11, 12, 1)], 6, 12)] == ["11:12"]


class TestRefusals:
    @pytest.mark.parametrize(
        "budget", ["memory", "memory=", "memory=much", "disk=3", "seconds=-1", "seconds=0", "bytes=1X"]
    )
    def test_a_budget_that_can_not_be_read(self, budget: str) -> None:
        with pytest.raises(UsageError, match="is none; write NAME=AMOUNT above 0 with tokens, seconds, memory, bytes"):
            parse_budget([budget])

    def test_amounts(self) -> None:
        assert parse_budget(["tokens=60k", "memory=1.5 GB", "bytes=100MB", "seconds=90"]) == {
            "tokens": 60_000, "memory": 1.5e9, "bytes": 1e8, "seconds": 90,
        }  # fmt: skip
        with pytest.raises(UsageError, match="the budget of tokens is given twice"):
            parse_budget(["tokens=1", "tokens=2"])

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"protocol": "insert"}, "--protocol has no meaning here"),
            ({"max_tokens": 5}, "--max-tokens has no meaning here"),
            ({"trials": 0}, "must be above 0"),
            ({"budget": ["tokens=9"]}, "less than one optimizer step"),
            ({"lr": 7}, "--lr"),
            ({"budget": ["bytes=10"]}, r"no organ keeps to the budget: the cheapest, layers 5:6, takes about"),
            ({"batch_size": 100}, "there is too little text for one batch"),
        ],
    )
    def test_options(self, options: dict[str, Any], sentence: str, recipient: Path, text: Path) -> None:
        with pytest.raises(UsageError, match=sentence):
            plan(recipient, data=text, **{**OPTIONS, **options})

    def test_an_existing_output(self, recipient: Path, text: Path, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text("{}")
        with pytest.raises(UsageError, match="exists already"):
            plan(recipient, data=text, output=tmp_path / "plan.json", **OPTIONS)


class TestCommand:
    def test_table_and_json(self, recipient: Path, text: Path) -> None:
        words = ["plan", str(recipient), "--data", str(text), "--budget", "tokens=500", "--trials", "1"]
        words += ["--sequence-length", "32", "--batch-size", "2", "--eval-tokens", "64"]
        shown = RUNNER.invoke(app, words)
        assert shown.exit_code == 0, shown.output
        assert "predicted costs" in shown.stdout and "neurograft extract" in shown.stdout
        report = json.loads(RUNNER.invoke(app, [*words, "--json"]).stdout)
        assert report["proposals"][0] == report["best"]

    def test_failure(self, recipient: Path, text: Path) -> None:
        result = RUNNER.invoke(app, ["plan", str(recipient), "--data", str(text), "--budget", "all"])
        assert result.exit_code == 2 and "the budget 'all' is none; write" in result.stderr


def test_the_text_is_never_overwritten(recipient: Path, text: Path) -> None:
    before = text.read_bytes()
    with pytest.raises(UsageError, match=r"text\.jsonl"):
        plan(recipient, data=text, output=text, overwrite=True, **OPTIONS)
    assert text.read_bytes() == before
