"""Run the whole path of an organ by the command line, with every connection but those on the loopback refused.

Called by test_alone.py in a process of its own: whole_path.py FOLDER. What was asked of the network goes to
FOLDER/asked.txt, what was printed to FOLDER/out, what was logged there too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
OUT, DATA = FOLDER / "out", FOLDER / "data"
TRAIN = ["--sequence-length", 32, "--batch-size", 2, "--evaluations", 2, "--cache-prefix", "always", "--lr", 1e-3]


def run(name: str, *words: Any, status: int = 0) -> None:
    """Run a command, and keep what it prints."""
    from neurograft.cli.application import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = int(app([str(word) for word in words], standalone_mode=False) or 0)
        except SystemExit as stop:
            code = int(stop.code or 0)
    (OUT / f"{name}.stdout").write_text(out.getvalue())
    (OUT / f"{name}.stderr").write_text(err.getvalue())
    if code != status:
        raise SystemExit(f"{words[0]} ended with {code}, not {status}: {err.getvalue()}")


def interrupted_training() -> None:
    """Leave what an interrupted run leaves."""
    import neurograft

    def stop(progress: Any) -> None:
        if progress.step >= 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        neurograft.train(
            OUT / "organ.safetensors", host=FOLDER / "host", data=DATA / "members.jsonl", progress=stop, steps=6,
            output=OUT / "interrupted.safetensors", sequence_length=32, batch_size=2, checkpoint_every=0,
        )  # fmt: skip


def card() -> None:
    """Write the model card."""
    from neurograft.bank.card import model_card
    from neurograft.organ import read_manifest

    (OUT / "card.md").write_text(model_card(read_manifest(OUT / "trained.safetensors"), "bank:organ@0.1.0"))


def main() -> None:
    """Do everything once, and write what only a refused connection could tell."""
    import neurograft.cli  # noqa: F401 (registers the commands)

    logging.basicConfig(filename=OUT / "everything.log", level=logging.DEBUG)
    host, organ, trained = FOLDER / "host", OUT / "organ.safetensors", OUT / "trained.safetensors"
    members, others, model = DATA / "members.jsonl", DATA / "others.jsonl", OUT / "model"
    run("extract", "extract", host, "--layers", "1:3", "-o", organ)
    run("train", "train", organ, "--host", host, "--data", members, "--eval-data", others, "-o", trained, "--steps", 6,
        "--redact", "--log-to", "tensorboard", "--log-dir", OUT / "logs", *TRAIN)  # fmt: skip
    run("again", "train", organ, "--host", host, "--data", members, "-o", OUT / "other.safetensors", "--steps", 2,
        "--json", *TRAIN)  # fmt: skip
    interrupted_training()
    run("check", "check", trained, host)
    run("transplant", "transplant", trained, host, "-o", model)
    run("evaluate", "evaluate", model, "--data", f"domain={members}", "--baseline", host, "--json")
    (OUT / "evaluation.json").write_text((OUT / "evaluate.stdout").read_text())
    run("audit", "audit", trained, "--host", host, "--members", members, "--non-members", others, "--prefix", 4,
        "--length", 4, "--record")  # fmt: skip
    run("refused", "audit", trained, "--host", host, "--members", members, "--non-members", members, status=2)
    run("scan", "scan", trained, host, "--data", others, "--positions", "1,2", "-o", OUT / "scan.json")
    run("inspect", "inspect", trained)
    run("inspect-json", "inspect", trained, "--json")
    run("push", "push", trained, OUT / "bank")
    run("report", "report", trained, model, OUT / "scan.json", OUT / "evaluation.json", "-o", OUT / "report.html")
    run("remove", "remove", model, "-o", OUT / "back")
    card()


if __name__ == "__main__":
    main()
