"""What else could make an organ learn faster: phases, a teacher, a learning rate that is looked for.

Run it with `python benchmarks/phases.py`; some 15 minutes on one core. It needs the demo's packaged model and ontology
(`make venv` installs both) and writes benchmarks/results/phases.json; finished rows are kept, and it goes on from
there. Each row has a process of its own, sees as many tokens in all, and is evaluated alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from engine import read_texts
from neurograft import extraction
from neurograft.arithmetic import Arithmetic
from neurograft.data import IGNORED_LABEL, PackedTokens
from neurograft.demonstration import find_packaged_model
from neurograft.loss import NextTokenLoss, _passing
from neurograft.models import load_model, load_tokenizer
from neurograft.training.baselines import METHODS, prepare
from neurograft.training.loop import Batches, Texts, Trainee, TrainingRun
from neurograft.training.measuring import _mean_loss
from neurograft.training.options import TrainingOptions, parse_options
from render import describe_run

RESULT = Path(__file__).parent / "results" / "phases.json"
LAYERS, TOKENS, SEQUENCE_LENGTH, TOKENS_A_STEP, EVALUATED_TOKENS = "10:30", 30_720, 128, 512, 8_192
TEACHER: dict[str, Any] = {"rank": 16, "lr": 2e-3}
CHUNK = 256
FINDER_STEPS, LOWEST_LR, HIGHEST_LR = 40, 2e-5, 2e-2
# Name -> phases, each its share of the tokens and its training options.
PHASES: dict[str, list[tuple[float, dict[str, Any]]]] = {
    "one phase": [(1.0, {})],
    "rank 16 for a half, merged, then everything": [(0.5, {"rank": 16}), (0.5, {})],
    "sequences of 32, 64, then 128 tokens": [
        (0.25, {"sequence_length": 32}),
        (0.25, {"sequence_length": 64}),
        (0.5, {}),
    ],
}
FOUND, TAUGHT = "learning rate found by a range test", "taught by a LoRA-tuned model"


def main() -> None:
    """Measure the rows that are not there yet, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", metavar="ROW", help="measure one, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []
    for name in (*PHASES, FOUND, TAUGHT):
        if any(row["name"] == name for row in rows):
            continue
        command = [sys.executable, __file__, "--one", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"name": name, **json.loads(output.splitlines()[-1])})
        print(rows[-1], flush=True)
        settings = {"layers": LAYERS, "tokens": TOKENS, "tokens_a_step": TOKENS_A_STEP, "teacher": TEACHER}
        result = {"run": describe_run("python benchmarks/phases.py"), "settings": settings, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(name: str) -> dict[str, Any]:
    """Train one way, and return perplexities and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROGRAFT_CACHE"] = folder
        texts, tokenizer = read_texts(), load_tokenizer(find_packaged_model())
        organ = Path(folder) / "organ.safetensors"
        extraction.extract(find_packaged_model(), layers=LAYERS, output=organ)
        more: dict[str, Any] = {}
        if name == TAUGHT:
            teacher, more["seconds_of_teacher"] = _teach_teacher(texts, tokenizer)
        if name == FOUND:
            started = time.monotonic()
            more["lr"] = find_lr(texts, tokenizer, organ)
            more["seconds_of_search"] = round(time.monotonic() - started, 1)
        seconds = 0.0
        for number, (share, options) in enumerate(PHASES.get(name, [(1.0, {})])):
            chosen = _options(share, **({"lr": more["lr"]} if name == FOUND else {}), **options)
            batches = Batches.build(Texts(_part(texts["training"], share), texts["validation"]), tokenizer, chosen)
            model = load_model(find_packaged_model(), dtype=torch.float32)
            own, _ = METHODS["organ"].parse({"layers": LAYERS})
            started = time.monotonic()
            prepared = prepare(model, METHODS["organ"], own, organ=organ, rank=chosen.rank)
            run = TrainingRun(model, prepared.trainee, batches, chosen)
            if name == TAUGHT:
                run = TaughtRun(model, prepared.trainee, batches, chosen)
                run.teacher = teacher
            run.train()
            prepared.deploy()
            seconds += time.monotonic() - started
            phase = Path(folder) / str(number)
            phase.mkdir()
            prepared.ship(phase)
            organ = phase / "organ.safetensors"
        model = _with_organ(organ)
        found = {text: math.exp(_held_out_loss(model, tokenizer, texts[text])) for text in ("domain", "general")}
    return {
        "perplexity": {text: round(value, 3) for text, value in found.items()},
        "seconds": round(seconds, 1),
        **more,
    }


def _with_organ(organ: Path) -> Any:
    """Return the packaged model with an organ in it."""
    model = load_model(find_packaged_model(), dtype=torch.float32)
    own, _ = METHODS["organ"].parse({"layers": LAYERS})
    prepare(model, METHODS["organ"], own, organ=organ)
    return model


def _options(share: float, **options: Any) -> TrainingOptions:
    length = options.get("sequence_length", SEQUENCE_LENGTH)
    return parse_options(
        **{
            "max_tokens": int(share * TOKENS),
            "sequence_length": length,
            "batch_size": TOKENS_A_STEP // length,
            "eval_tokens": EVALUATED_TOKENS,
            "evaluations": 1,
            "patience": 9,
            **options,
        }
    )


def _part(documents: list[str], share: float) -> list[str]:
    """Return documents of which a phase with this share of the tokens sees each at most once."""
    return documents[:: max(1, round(1 / share))] if share < 1 else documents


def _held_out_loss(model: Any, tokenizer: Any, documents: list[str]) -> float:
    packed = Batches.build(Texts(documents, documents), tokenizer, _options(1.0)).held_out
    return _mean_loss(NextTokenLoss(model.eval()), packed, 4)


def _teach_teacher(texts: dict[str, list[str]], tokenizer: Any) -> tuple[Any, float]:
    """Return a model tuned by LoRA on as many tokens as the organ will see, and the seconds that it took."""
    model = load_model(find_packaged_model(), dtype=torch.float32)
    own, searched = METHODS["lora"].parse(TEACHER)
    options = _options(1.0, **searched)
    batches = Batches.build(Texts(texts["training"], texts["validation"]), tokenizer, options)
    started = time.monotonic()
    TrainingRun(model, prepare(model, METHODS["lora"], own).trainee, batches, options).train()
    return model.eval(), round(time.monotonic() - started, 1)


class TaughtRun(TrainingRun):
    """Trains towards the mean of the text's next tokens and of what a teacher expects them to be (arXiv 1503.02531)."""

    teacher: Any

    def _losses(
        self, packed: PackedTokens, name: str, rows: Any, arithmetic: Arithmetic, vocabulary: Any = None
    ) -> Any:
        if name != "training":
            return super()._losses(packed, name, rows, arithmetic, vocabulary)
        chosen = list(rows)
        ids, labels = packed.input_ids[chosen], packed.labels[chosen]
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # (B, T)
        wanted = targets != IGNORED_LABEL
        with arithmetic.active(self.model.device):
            hidden = _last_hidden(self.model, ids)[wanted]  # (N, C)
            with torch.no_grad():
                taught = _last_hidden(self.teacher, ids)[wanted]
            losses = _TaughtLosses.apply(hidden, taught, self.loss.head.weight, targets[wanted])  # type: ignore[union-attr]
        return losses.new_zeros(targets.shape).masked_scatter(wanted, losses)


def _last_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with _passing(model.get_output_embeddings(), spread=False):
        hidden: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return hidden


class _TaughtLosses(torch.autograd.Function):
    """Mean of the cross-entropies with the right token and with the teacher's probabilities, under a frozen head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, taught: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        losses, gradient = torch.empty(len(hidden)), torch.empty_like(hidden)
        narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        weight = weight.to(narrow)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(hidden), CHUNK):
                chunk = slice(start, start + CHUNK)
                logs = torch.log_softmax((hidden[chunk].to(narrow) @ weight.T).float(), dim=1)  # (n, V)
                wanted = torch.softmax((taught[chunk].to(narrow) @ weight.T).float(), dim=1)
                wanted.mul_(0.5).scatter_add_(1, targets[chunk, None], torch.full((len(wanted), 1), 0.5))
                losses[chunk] = -(wanted * logs).sum(dim=1)
                gradient[chunk] = (logs.exp_() - wanted).to(narrow) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient), None, None, None


def find_lr(texts: dict[str, list[str]], tokenizer: Any, organ: Path) -> float:
    """Raise the learning rate a little in each step until the loss grows; return a third of the one where it is least.

    The range test of arXiv 1506.01186, on losses smoothed over some five steps.
    """
    model = load_model(find_packaged_model(), dtype=torch.float32)
    own, _ = METHODS["organ"].parse({"layers": LAYERS})
    trainee: Trainee = prepare(model, METHODS["organ"], own, organ=organ).trainee
    options = _options(1.0, lr=LOWEST_LR)
    batches = Batches.build(Texts(texts["training"], texts["validation"]), tokenizer, options)
    run: Any = TrainingRun(model, trainee, batches, options)
    run._before, run._started = 0.0, time.monotonic()
    rows, smooth, found = batches.training_rows(), None, []
    for step in range(FINDER_STEPS):
        lr = LOWEST_LR * (HIGHEST_LR / LOWEST_LR) ** (step / (FINDER_STEPS - 1))
        run.optimizers.lr, run.batches = lr, batches
        run.state.step = batches.steps // 8  # past the rise of the schedule
        run._step(next(rows))
        loss = run.state.window[-1]
        smooth = loss if smooth is None else 0.8 * smooth + 0.2 * loss
        found.append((smooth, lr))
        if smooth > 1.2 * min(found)[0]:
            break
    return float(f"{min(found)[1] / 3:.2g}")


if __name__ == "__main__":
    main()
