"""The loop does what a few lines of plain torch do, counts every token of a step alike, and leaves others alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from neurograft.loss import NextTokenLoss
from neurograft.training.loop import Batches, Texts, Trainee, TrainingProgress, TrainingRun
from neurograft.training.options import parse_options
from neurograft.training.schedules import learning_rate_share
from tiny import make_model

QUICK: dict[str, Any] = {"steps": 8, "sequence_length": 16, "batch_size": 4, "lr": 1e-2, "evaluations": 2}
EXACT = {"precision": "float32"}


@pytest.fixture
def texts() -> Texts:
    documents = [
        f"report {number}: a shadow of grade {number % 7} in the left lung, seen twice" for number in range(30)
    ]
    return Texts(documents[3:], documents[:3])


def _run(
    texts: Texts, tokenizer: Any, model: Any, progress: Callable[[TrainingProgress], None] | None = None, **changes: Any
) -> TrainingRun:
    options = parse_options(**{**QUICK, **EXACT, **changes})
    layers = list(model.get_submodule("model.layers").children())[2:4]
    batches = Batches.build(texts, tokenizer, options)
    return TrainingRun(model, Trainee.of_layers(layers, 2), batches, options, progress=progress)


def _parameters(run: TrainingRun) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_plain_loop_ends_with_the_same_bits(accumulate: int, precision: str, texts: Texts, tokenizer: Any) -> None:
    run = _run(
        texts, tokenizer, make_model("llama"), accumulate=accumulate, steps=5, evaluations=1, precision=precision
    )
    run.train()
    expected = _plain_loop(make_model("llama"), run)
    assert run.state.best == 1
    for found, wanted in zip(run.parameters, expected, strict=True):
        assert torch.equal(found, wanted)


def _plain_loop(model: Any, run: TrainingRun) -> list[torch.Tensor]:
    batches, options = run.batches, run.options
    model.requires_grad_(False)
    parameters = [
        parameter.requires_grad_(True) for layer in model.model.layers[2:4] for parameter in layer.parameters()
    ]
    optimizer = torch.optim.AdamW(
        parameters, lr=run.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True
    )
    losses, packed = NextTokenLoss(model), batches.training
    for step, rows in zip(range(batches.steps), batches.training_rows(), strict=False):
        tokens = int((packed.labels[rows, 1:] >= 0).sum())
        for part in torch.tensor(rows).split(options.batch_size):
            with run.arithmetic.active(model.device):
                loss = losses(packed.input_ids[part], packed.labels[part]).sum() / tokens
            with run.arithmetic.active(model.device, backward=True):
                loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        for group in optimizer.param_groups:
            share = learning_rate_share(step, batches.steps, warmup=options.warmup, schedule="cosine")
            group["lr"] = run.lr * share
        optimizer.step()
        optimizer.zero_grad()
    return parameters


def test_two_passes_of_four_are_one_of_eight(texts: Texts, tokenizer: Any) -> None:
    runs = []
    for accumulate, size in ((1, 8), (2, 4), (8, 1)):
        run = _run(texts, tokenizer, make_model("llama"), accumulate=accumulate, batch_size=size, epochs=2, steps=None)
        run.train()
        runs.append(run)
    one, two, eight = runs
    assert one.batches.steps == two.batches.steps == eight.batches.steps > 5
    assert one.state.tokens_seen == two.state.tokens_seen == eight.state.tokens_seen
    for other in (two, eight):
        for (step, loss), (same_step, same_loss) in zip(one.state.losses, other.state.losses, strict=True):
            assert step == same_step and loss == pytest.approx(same_loss, rel=1e-5)
        for found, wanted in zip(other.parameters, one.parameters, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=2e-4
            )  # AdamW magnifies rounding where gradients are 0


def test_every_token_counts_alike_however_they_are_spread(texts: Texts, tokenizer: Any) -> None:
    """A padded sequence has few tokens: a mean of means over the passes would give them more weight than the others."""
    losses = {}
    for size in (1, 2):
        run = _run(texts, tokenizer, make_model("llama"), accumulate=2 // size, batch_size=size, steps=1)
        padded = len(run.batches.training.input_ids) - 1
        run.batches.training.labels[padded, 3:] = -100
        run._before, run._started = 0.0, 0.0
        run.state.held_out.append((0, 0.0))
        run._step([0, padded])
        losses[size] = run.state.window[0]
        rows, packed = torch.tensor([0, padded]), run.batches.training
        with torch.no_grad():
            expected = NextTokenLoss(make_model("llama"))(packed.input_ids[rows], packed.labels[rows])
        assert losses[size] == pytest.approx(float(expected.sum()) / 17, rel=1e-6)  # 15 + 2 targets


def test_how_many_steps_there_are(texts: Texts, tokenizer: Any) -> None:
    def steps(**options: Any) -> int:
        return Batches.build(texts, tokenizer, parse_options(sequence_length=16, **options)).steps

    sequences = len(Batches.build(texts, tokenizer, parse_options(sequence_length=16)).training.input_ids)
    assert steps(batch_size=4, accumulate=2) == math.ceil(sequences / 8) == steps(batch_size=8)
    assert steps(batch_size=4, accumulate=2, max_tokens=1000) == math.ceil(1000 / (8 * 16))
    assert steps(batch_size=4, accumulate=2, steps=3) == 3
    rows = next(Batches.build(texts, tokenizer, parse_options(batch_size=4, accumulate=2)).training_rows())
    assert rows == next(Batches.build(texts, tokenizer, parse_options(batch_size=8)).training_rows())


def test_runs_of_one_process_do_not_disturb_each_other(texts: Texts, tokenizer: Any) -> None:
    """Accelerators of one process share their state: neither another run's options nor a user's own may leak."""
    from accelerate import Accelerator

    alone = _run(texts, tokenizer, make_model("llama"), accumulate=2)
    alone.train()
    users = Accelerator(gradient_accumulation_steps=4)
    runs = [_run(texts, tokenizer, make_model("llama"), accumulate=a) for a in (2, 1, 2)]
    for run in runs:
        run.train()
    assert users.gradient_accumulation_steps == 4
    for run in runs[::2]:
        assert all(torch.equal(a, b) for a, b in zip(run.parameters, alone.parameters, strict=True))
    assert not torch.distributed.is_initialized()


def test_a_run_leaves_models_where_and_as_they_stand(texts: Texts, tokenizer: Any) -> None:
    model: Any = make_model("llama")
    forward, layers = model.forward, list(model.model.layers)
    run = _run(texts, tokenizer, model)
    run.train()
    assert model.forward == forward and "forward" not in vars(model) and list(model.model.layers) == layers
    assert not model.training and not any(module.training for module in model.modules())


def test_progress_says_how_far_it_is(texts: Texts, tokenizer: Any) -> None:
    from neurograft.progress import training_line

    seen: list[TrainingProgress] = []
    _run(texts, tokenizer, make_model("llama"), seen.append).train()
    assert [progress.step for progress in seen] == list(range(1, 9))
    line = training_line(seen[3])
    assert line.startswith(f"step 4/8  loss {seen[3].loss:.3f}") and line.endswith(" s left")
    assert f"held-out perplexity {seen[3].held_out_perplexity:.2f}" in line and " tokens/s" in line


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launcher asks for DeepSpeed; neurograft trains with DDP or FSDP2"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "the launcher asks for FSDP version 1; give accelerate launch --fsdp_version 2",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "asks for FSDP's CPU offload, which neurograft does not do",
        ),
    ],
)
def test_a_launcher_that_asks_for_something_else(
    variables: dict[str, str], reason: str, texts: Texts, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neurograft.errors import UsageError

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=reason):
        _run(texts, tokenizer, make_model("llama"))


def test_held_out_tokens_come_from_all_over(tokenizer: Any) -> None:
    documents = [f"report {number}: a shadow of grade {number % 7} in the left lung" for number in range(200)]
    options = parse_options(sequence_length=16, eval_tokens=600, steps=1)
    held_out = Batches.build(Texts(documents, documents), tokenizer, options).held_out
    read = tokenizer.decode(held_out.input_ids.flatten().tolist())
    seen = [number for number in range(200) if f"report {number}:" in read or f"report {number} :" in read]
    assert 600 <= held_out.tokens < 800 and len(seen) > 10
    assert min(seen) < 50 and max(seen) > 150 and seen == sorted(seen)
    options = parse_options(sequence_length=16, eval_tokens=100_000, steps=1)
    everything = Batches.build(Texts(documents, documents), tokenizer, options)
    assert torch.equal(everything.held_out.input_ids, everything.training.input_ids)
