"""Render benchmarks/results/*.json into docs/results.md, so that no figure there was typed by hand.

Run it with `python benchmarks/render.py`; `--demo FILE` first takes over what `neurograft demo --json` printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurograft.study import cross_domain_report, paper_report
from neurograft.study.paper_results import PaperReport
from neurograft.wording import counted

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
RELIABILITY_PAGE = PAGE.with_name("reliability.md")
RELIABILITY = """# Reliability

What neurograft does with files that were altered, and what is left when it is killed; measured by scripts that anyone
can run. The test suite does less of the same each time: hypothesis alters files for every reader, training is killed
and goes on to the same bits, deployments are killed at every step of their switch, disks are full and folders are
read-only.
"""
HEADER = """# Results

Every figure on this page was written by a script from what it measured; the command, the date and the machine stand
under each table. One seed unless it says otherwise. Perplexities are token-weighted; intervals are 95 %, by bootstrap
over documents. Each document is scored from its own start, so perplexities of short documents are higher than those of
packed text.
"""


def describe_run(command: str) -> dict[str, str]:
    """Return what a reader needs to judge or repeat a measurement: command, date, machine, versions."""
    import os

    from neurograft.training.protocols import versions

    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="output of `neurograft demo --json`")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        report = json.loads(arguments.demo.read_text(encoding="utf-8"))
        result = {"run": describe_run("neurograft demo --json"), "report": report}
        (RESULTS / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(render(), encoding="utf-8")
    RELIABILITY_PAGE.write_text(render_reliability(), encoding="utf-8")


def render() -> str:
    """Return the page."""
    parts = [HEADER]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(result) + "\n" + footer(result["run"]))
    return "\n".join(parts)


def render_reliability() -> str:
    """Return the page about altered files and killed processes."""
    parts = [RELIABILITY]
    for name, section in (("fuzzing", fuzzing_section), ("kills", kills_section)):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(result) + "\n" + footer(result["run"]))
    return "\n".join(parts)


def fuzzing_section(result: dict[str, Any]) -> str:
    """Render how readers took altered files."""
    rows = [
        [
            row["reader"],
            *(f"{row[key]:,}" for key in ("altered", "taken", "refused", "failures")),
            f"{row['guided']['tried']:,}" if "guided" in row else "",
            str(row["files_left"]),
            str(row["memory_grew_megabytes"]),
        ]
        for row in result["rows"]
    ]
    header = [
        "reader", "altered", "taken", "refused in one sentence", "anything else", "tried by atheris", "files left",
        "memory grew, MB",
    ]  # fmt: skip
    total = sum(row["altered"] + row.get("guided", {}).get("tried", 0) for row in result["rows"])
    return (
        f"## Altered files\n\n{total:,} files: bytes flipped, cut, repeated; values of JSON replaced by null, huge "
        "numbers, paths that lead elsewhere, thousands of brackets; keys doubled; offsets moved; digests made right "
        "again. Some alterations do no harm, and are taken.\n\n" + table(header, rows)
    )


def kills_section(result: dict[str, Any]) -> str:
    """Render what killed processes left."""
    header = ["verb", "killed", "output absent", "old or new, and verified", "half-written", "could not be done again"]
    keys = ("verb", "killed", "absent", "old_or_new", "broken", "not_done_again")
    return (
        "## Killed at random moments\n\nKilled by SIGKILL at moments drawn from the time that the work takes, on tiny "
        "models. Half of the runs begin with nothing, the others replace an older result, push beside another version, "
        "or deploy to a folder in use; rollbacks go either way. *Verified* is: the organ's digest, the original that "
        "comes back out of the model, a pull of every version, `history --verify full` with `current` at a version "
        "that it verified. Then the same was done again.\n\n"
        + table(header, [[str(row[key]) for key in keys] for row in result["rows"]])
    )


def footer(run: dict[str, str]) -> str:
    """Render where figures come from."""
    return f"`{run['command']}`, {run['date']}; {run['machine']}; {run['versions']}.\n"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Render a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def demo_section(result: dict[str, Any]) -> str:
    """Render the demo's closing table."""
    report = result["report"]
    rows = [
        [
            name,
            f"{report[f'{name}_before']:.2f}",
            f"{report[f'{name}_after']:.2f}",
            f"{report[f'{name}_after'] / report[f'{name}_before'] - 1:+.1%}",
            " to ".join(f"{limit - 1:+.1%}" for limit in report[f"{name}_interval"]),
        ]
        for name in ("clinical", "general")
    ]
    return (
        "## The demo\n\nAn organ of three layers, trained in place on clinical definitions, in a recipient that was "
        "grown by two layers and fine-tuned on other text.\n\n"
        + table(["text", "recipient", "with the organ", "change", "95 % interval of the change"], rows)
        + f"\nOne file of {report['organ_bytes'] / 1e6:.1f} MB, trained on {report['trained_tokens']:,} tokens; after "
        f"removal the digests were {'equal' if report['digests_equal'] else 'not equal'}; {report['seconds']:.0f} s.\n"
    )


def protocols_section(result: dict[str, Any]) -> str:
    """Render the comparison of protocols."""
    settings = result["settings"]
    rows = [
        [
            row["name"],
            *(_with_interval(row[key], row[f"{key}_interval"]) for key in ("clinical", "general")),
            "" if row["training_seconds"] is None else f"{row['training_seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    return (
        f"## Three protocols\n\n{settings['model']}, layers {settings['layers']}, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['sequence_length']} tokens, learning rate {settings['lr']:g} for all "
        "three, no recovery after the graft.\n\n"
        + table(["organ", "clinical perplexity", "general perplexity", "seconds of training"], rows)
    )


def recovery_section(result: dict[str, Any]) -> str:
    """Render what recovery does to an organ that was trained alone, a row for each position and choice."""
    settings = result["settings"]
    budget, places = settings["recovery"], {at: name for name, at in settings["positions"].items()}
    rows = [
        [
            "" if row["position"] is None else f"{places[row['position']]} ({row['position']})",
            row["recovery"],
            *(_with_interval(row[key], row[f"{key}_interval"]) for key in ("clinical", "general")),
            f"{row['parameters']:,}" if "parameters" in row else "",
            f"{row['training_seconds']:.0f}" if "training_seconds" in row else "",
        ]
        for row in result["rows"]
    ]
    rates = ", ".join(f"{name}: {choice['lr']:g}" for name, choice in settings["choices"].items())
    recovered = [row for row in result["rows"] if "restored" in row]
    restored = sum(row["restored"] for row in recovered)
    length, trained = settings["sequence_length"], settings["organ"]
    header = ["position", "recovery", "clinical perplexity", "general perplexity", "numbers trained"]
    return (
        f"## Recovery\n\n{settings['model']}; an organ of layers {settings['layers']}, trained `standalone` for "
        f"{trained['steps']} steps of {trained['batch_size']} x {length} tokens, inserted, then recovered on clinical "
        f"text for {budget['steps']} steps of {budget['batch_size']} x {length} tokens (learning rates: {rates}; "
        f"neighbours: {settings['choices']['neighbours']['neighbours']} on each side).\n\n"
        + table([*header, "seconds of training"], rows)
        + f"\nAfter `remove`, {restored} of {len(recovered)} recovered models were the original again, to the bit.\n"
    )


_AIMS = """Yes and no say whether what was aimed at was reached; perplexities that are nearer to each other than the
root of the sum of their seeds' variances are not told apart. A fourth aim, 70 % of the machine's rate of multiplying
matrices, is measured [below](#what-a-training-step-costs), and so is [what was
tried](#what-the-training-engine-chooses-from). The time is that of the runs that come, on the validation text, to
LoRA's mean there; that text also chooses the best weights of every run, and domain and general perplexities are of
other documents, so a method can be ahead on those and never get there. DoRA, which `compare` offers, was not run at
these budgets, and training all parameters in a case of its own, later.

The cases of 500k go 4.5 times over 109,000 tokens of clinical text and 3.1 times over 157,000 of the dictionary, taken
from all over each, with the settings that the search of the short cases chose; with those, organs and LoRA alike are
best after not quite two passes, and learn by heart from then on: no better than what 60k tokens of ever new text bring.
They have one seed. Organ and LoRA ran at the same time, each on one core of the same machine; the clinical runs were
interrupted and taken up again.

In the anchored cases what trains, in organ and LoRA alike, is pulled back a little to where it began (`--anchor`):
nearly all of what is lost on general text otherwise is kept, for 1 % or 2 % of domain perplexity. Seconds compare
within a case, not between cases: they were measured on different days and, from 2026-11-28, on another machine. Memory
was measured before freed memory was kept in one piece, except in the cases of 500k, and without gradient checkpointing;
for the same settings it differs by a third between texts. With both, a step of an organ of all layers takes [a quarter
of what LoRA takes as peft runs it](#what-a-training-step-keeps-in-memory), and three fifths of LoRA with the same.
"""


def adaptation_section(result: dict[str, Any]) -> str:
    """Render the comparisons with LoRA, the verdicts on what was aimed at, and the paper's figures beside them."""
    parts = ["## Organs beside LoRA and full fine-tuning\n", _verdicts(result["cases"]), _AIMS]
    for name, report in result["cases"].items():
        methods = {method["method"]: method for method in report["methods"]}
        rows = [["untrained", *(f"{report['untrained'][text]:.2f}" for text in ("domain", "general")), *[""] * 5]]
        rows += [_method_row(method, len(report["seeds"])) for method in methods.values()]
        parts.append(
            f"### {name}\n\n{report['tokens']:,} training tokens, {report['passes']:g} passes through the text, "
            f"{counted(len(report['seeds']), 'seed')}, {counted(report['trials_each'], 'trial')} of "
            f"{report['search_tokens']:,} tokens for "
            f"each method, {report['machine'].replace('1 threads', '1 thread')}, {report['measured']}.\n\n"
            + table(
                ["method", "domain", "general", "seconds", "to LoRA's quality, s", "memory beyond model, MB",
                 "shipped, MB", "settings"],
                rows,
            )
        )  # fmt: skip
    parts.append(
        "The paper's figures (perplexity organ / LoRA / full fine-tuning): GPT-2 124M 17.33 / 668.40 / 1352.05; "
        "TinyLlama 1.1B 54.15 / 460.41 / 788.36; GPT-OSS 20B 34.56 / 98.37 / none; training 2 to 28 times faster than "
        "LoRA. Its data and code could not be had. Here LoRA, tuned by a search as long as the organ's, is a strong "
        "baseline, and nothing of that size is seen.\n"
    )
    return "\n".join(parts)


def _spread(value: dict[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    if value is None:
        return ""
    spread = "" if value["deviation"] is None else f" ± {value['deviation'] / scale:.{digits}f}"
    return f"{value['mean'] / scale:,.{digits}f}{spread}"


def _time_reached(reached: dict[str, Any] | None, runs: int) -> str:
    if reached is None:
        return ""
    if reached["seconds"] is None:
        return "not reached"
    return f"{reached['seconds']['mean']:,.0f} ({reached['runs']} of {counted(runs, 'run')})"


def _method_row(method: dict[str, Any], runs: int) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in method["settings"].items())
    return [
        method["method"],
        _spread(method["perplexity"].get("domain")),
        _spread(method["perplexity"].get("general")),
        _spread(method["seconds"], digits=0),
        "" if method["method"] == "lora" else _time_reached(method["seconds_to"].get("lora"), runs),
        _spread(method["memory_beyond_model"], 1e6, 0),
        f"{method['shipped_bytes'] / 1e6:.0f}",
        settings,
    ]


def _verdicts(cases: dict[str, Any]) -> str:
    """Hold organs against LoRA in what the project set out to win in, a row for each case."""
    rows = []
    for name, report in cases.items():
        methods = {method["method"]: method for method in report["methods"]}
        if {"organ", "lora"} <= set(methods):
            rows.append([name, *_against(methods["organ"], methods["lora"], len(report["seeds"]))])
    header = [
        "organ over LoRA", "time to LoRA's final quality (aim 1/3)", "domain perplexity (aim 1)",
        "general perplexity (aim 1)", "memory beyond the model (aim 1/2)",
    ]  # fmt: skip
    return table(header, rows)


def _against(organ: dict[str, Any], lora: dict[str, Any], runs: int) -> list[str]:
    came, reached = organ["seconds_to"]["lora"]["runs"], organ["seconds_to"]["lora"]["seconds"]
    time = reached["mean"] / lora["seconds"]["mean"] if reached else None
    some = "" if came == runs else f" in {came} of {runs} runs"
    memory = organ["memory_beyond_model"]["mean"] / lora["memory_beyond_model"]["mean"]
    return [
        "never" if time is None else f"{time:.2f}{some}: {_yes(time <= 1 / 3)}",
        *(_perplexity_verdict(organ["perplexity"][text], lora["perplexity"][text]) for text in ("domain", "general")),
        f"{memory:.2f}: {_yes(memory <= 0.5)}",
    ]


def _perplexity_verdict(organ: dict[str, Any], lora: dict[str, Any]) -> str:
    ratio, difference = organ["mean"] / lora["mean"], abs(organ["mean"] - lora["mean"])
    if organ["deviation"] is None:
        return f"{ratio:.3f}: {_yes(ratio <= 1)}, by one seed"
    if difference <= math.hypot(organ["deviation"], lora["deviation"]):
        return f"{ratio:.3f}: no difference beyond the spread"
    return f"{ratio:.3f}: {_yes(ratio <= 1)}"


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def engine_section(result: dict[str, Any]) -> str:
    """Render what was tried to make an organ learn faster, each beside the same thing without it."""
    shared = result["settings"]
    rows = [
        [
            row["group"],
            f"{row['method']} {row['name']}",
            *(f"{row['perplexity'][text]:.2f}" for text in ("domain", "general")),
            f"{row['seconds']:.0f}",
            f"{row['megabytes_beyond_model']:,}",
            f"{row['shipped_megabytes']:g}",
            _beside_plain(row, result["rows"]),
        ]
        for row in result["rows"]
    ]
    header = [
        "choice", "run", "domain", "general", "seconds", "memory beyond model, MB", "shipped, MB",
        "over the plain run: domain, general, seconds, memory",
    ]  # fmt: skip
    return (
        f"## What the training engine chooses from\n\nSmolLM2-135M-Instruct, clinical definitions, "
        f"{shared['max_tokens']:,} tokens once, {shared['batch_size']} x {shared['sequence_length']} tokens a step, "
        f"one seed, one thread. LoRA runs through the same loop. Plain are the organs of the first group, and LoRA of "
        "rank 16 at 0.002.\n\n" + table(header, rows) + _beside_lora(result["rows"])
    )


def _beside_plain(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Divide a run's figures by those of the same method and layers without what was tried; empty for a plain run."""
    same = [each for each in rows if each["method"] == row["method"]]
    plain = next(each for each in same if each["settings"].get("layers") == row["settings"].get("layers"))
    if plain is row:
        return ""
    ratios = [row["perplexity"][text] / plain["perplexity"][text] for text in ("domain", "general")]
    ratios += [row[key] / plain[key] for key in ("seconds", "megabytes_beyond_model")]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _beside_lora(rows: list[dict[str, Any]]) -> str:
    """Say how the organs stand beside LoRA, in what the project set out to win in."""
    adapters = [row for row in rows if row["method"] == "lora" and "precision" not in row["settings"]]
    organs = [row for row in rows if row["method"] == "organ"]
    if not adapters or not organs:
        return ""
    lora = min(adapters, key=lambda row: row["perplexity"]["domain"])

    def against(row: dict[str, Any]) -> str:
        domain, general = (row["perplexity"][text] / lora["perplexity"][text] for text in ("domain", "general"))
        seconds, memory = (row[key] / lora[key] for key in ("seconds", "megabytes_beyond_model"))
        return (
            f"`{row['name']}`: domain perplexity {domain:.3f} of LoRA's, general {general:.3f}, seconds {seconds:.2f}, "
            f"memory {memory:.2f}"
        )

    best = min(organs, key=lambda row: row["perplexity"]["domain"])
    leanest = min(organs, key=lambda row: row["megabytes_beyond_model"])
    return (
        f"\nThe organ with the best quality, {against(best)}. The one with the least memory, {against(leanest)}. Aimed "
        "at was LoRA's quality in a third of its time and half of its memory.\n"
    )


def phases_section(result: dict[str, Any]) -> str:
    """Render what was tried beside one plain phase of training."""
    settings = result["settings"]
    rows = []
    for row in result["rows"]:
        before = row.get("seconds_of_teacher") or row.get("seconds_of_search")
        rows.append(
            [
                row["name"] + (f" ({row['lr']:g})" if "lr" in row else ""),
                *(f"{row['perplexity'][text]:.2f}" for text in ("domain", "general")),
                f"{row['seconds']:.0f}" + (f" + {before:.0f} before" if before else ""),
            ]
        )
    return (
        f"## Phases, a teacher, a range test\n\nAn organ of layers {settings['layers']}, "
        f"{settings['tokens']:,} tokens, {settings['tokens_a_step']} a step, one seed, one thread.\n\n"
        + table(["way", "domain", "general", "seconds"], rows)
    )


def paper_section(result: dict[str, Any]) -> str:
    """Render the study of the paper's questions."""
    report = PaperReport.model_validate(result["report"])
    tables = {
        1: [("", paper_report.position_table(study)) for study in report.positions],
        2: [("", paper_report.transfer_table(report))],
        3: [("", report.together.table())],
        4: [("", paper_report.comparison_table(report))],
        5: [(cross_domain_report.conditions(report.cross_domain), cross_domain_report.table(report.cross_domain))],
    }
    parts = [
        "## The paper's five questions\n",
        f"{paper_report.conditions(report)} {report.seconds / 60:.0f} minutes on one core.\n",
    ]
    for number, question in enumerate(paper_report.QUESTIONS, 1):
        answers = "".join(f"- {answer}\n" for answer in question.answers(report))
        parts += [f"### {number}. {question.title}\n", f"The paper: {question.published} Here:\n", answers]
        parts += [f"{text}\n\n{table(*found)}".lstrip() for text, found in tables[number]]
    return "\n".join(parts)


def attention_section(result: dict[str, Any]) -> str:
    """Render how long attention by plain products takes beside torch's fused kernel."""
    settings = result["settings"]
    rows = [
        [row["dtype"].removeprefix("torch."), str(row["tokens"]), *map(str, row["milliseconds"]), f"{row['ratio']:.2f}"]
        for row in result["rows"]
    ]
    return (
        f"## Attention while training\n\nForward and backward pass of causal attention, {settings['sequences']} "
        f"sequences, {settings['heads']} heads of {settings['width']}, {settings['threads']} thread; medians of "
        "runs in turns, in milliseconds. On CPUs, `train` takes plain products in bfloat16 up to 512 tokens.\n\n"
        + table(["dtype", "tokens", "fused kernel", "plain products", "ratio"], rows)
    )


def training_cost_section(result: dict[str, Any]) -> str:
    """Render what a step costs, and the share of the rate of plain matrix products that it reaches."""
    settings, rows, reached = result["settings"], [], dict[str, float]()
    for row in result["rows"]:
        shares = [row["gigaflop"] / s / rate for s, rate in zip(row["seconds"], row["rates"], strict=True)]
        rows.append(
            [
                row["way"],
                row["kernels"],
                f"{statistics.median(row['seconds']):.2f}",
                f"{row['first_seconds']:.1f}",
                f"{row['gigaflop']:.0f}",
                f"{statistics.median(shares):.0%}",
                f"{row['megabytes']:,}",
                f"{row['megabytes_in_all']:,}",
            ]
        )
        if row["way"].startswith("organ"):
            reached[row["way"]] = statistics.median(shares)
    best = max(reached, key=lambda way: reached[way])
    rounds = settings["rounds"]
    header = ["step of", "arithmetic", "seconds", "the first", "GFLOP needed", "share of matrix rate"]
    return (
        f"## What a training step costs\n\n{settings['batch_size']} x {settings['sequence_length']} tokens; "
        f"{f'medians of {rounds} rounds in turns' if rounds > 1 else 'one round'}. Needed are only the products that "
        "the method asks for: with weights, and of attention the half that causality leaves, which is 1 % to 2 % of "
        "the whole. The rate is that of plain products of the same size in the same arithmetic, measured after each "
        f"step. The aim was a share of 70 %: {best} comes to {reached[best]:.1%}, the other organs to "
        f"{min(reached.values()):.0%} and more, and an organ of all layers at low rank, which has LoRA's "
        "quality, is not in the table. Memory is as the C library keeps it by itself; "
        "[below](#what-a-training-step-keeps-in-memory) is what can be saved of it.\n\n"
        + table([*header, "memory beyond model, MB", "in all, MB"], rows)
    )


def step_memory_section(result: dict[str, Any]) -> str:
    """Render what memory training steps take, as the C library keeps it and merging what is freed."""
    settings, lora = result["settings"], result["rows"][0]["merging"]
    rows = [
        [
            row["way"],
            *(f"{row[kind]['seconds']:.1f}" for kind in ("as it comes", "merging")),
            *(f"{row[kind]['megabytes']:,}" for kind in ("as it comes", "merging")),
            f"{row['merging']['seconds'] / lora['seconds']:.2f}",
            f"{row['merging']['megabytes'] / lora['megabytes']:.2f}",
        ]
        for row in result["rows"]
    ]
    return (
        f"## What a training step keeps in memory\n\n{settings['batch_size']} x {settings['sequence_length']} tokens; "
        "the second pair of steps, one run each (from run to run, memory varies by some 50 MB and time by a tenth); "
        "memory is the peak beyond the model since it was loaded. In the later column of each pair, as in "
        "commands that train, the C library merges small blocks that are freed (`GLIBC_TUNABLES`). The ratios are "
        "those of the later columns to LoRA's as peft runs it, the first row; an organ and LoRA come "
        "to the same weights with gradient checkpointing and without.\n\n"
        + table(
            ["step of", "seconds, as it comes", "merging", "MB beyond model, as it comes", "merging",
             "seconds over LoRA's", "memory over LoRA's"],
            rows,
        )
    )  # fmt: skip


def scan_section(result: dict[str, Any]) -> str:
    """Render a scan's curve, and what it cost beside evaluating each place by itself."""
    report, settings = result["report"], result["settings"]
    places, best = report["places"], (report["mode"], report["position"])
    at = {(place["position"], place["mode"]): place for place in places}
    rows = [
        [number, *(_place_cell(at.get((number, mode)), best, report["tied"]) for mode in ("replace", "insert"))]
        for number in range(report["layer_count"] + 1)
    ]
    alone = [row for row in result["alone"] if row["sixth"]]
    layers = {"replace": report["layer_count"], "insert": report["layer_count"] + report["organ_layers"]}
    rate = sum(row["seconds"] for row in alone) / sum(layers[row["mode"]] for row in alone)
    estimate = rate * sum(layers[place["mode"]] for place in places)
    passes = report["layer_passes_from_scratch"] / report["layer_passes"]
    same = [row["perplexity"] / row["scanned"] - 1 for row in result["alone"] if row["scanned"] is not None]
    rounds = max(place["rounds"] for place in places)
    left = [sum(place["rounds"] > number for place in places) for number in range(rounds)]
    costs = [
        ["layer passes, one token through one layer", f"{report['layer_passes_from_scratch'] / 1e6:.2f} million",
         f"{report['layer_passes'] / 1e6:.2f} million", f"{passes:.1f}"],
        ["seconds", f"{estimate:,.0f}", f"{report['seconds']:,.0f}", f"{estimate / report['seconds']:.1f}"],
    ]  # fmt: skip
    return (
        f"## A scan\n\nAn organ of layers {settings['layers']} of SmolLM2-135M-Instruct, trained in place on "
        f"{settings['training_tokens']:,} tokens of clinical definitions, at every place of the same model, on "
        f"{report['domain']['tokens']:,} other tokens ({report['domain']['documents']} documents), without "
        "recovery.\n\n"
        + table(["", "each place by itself", "scan", "times cheaper"], costs)
        + f"\nSeconds by itself: of {len(alone)} of {len(places)} places, scaled by layers; other work ran as well. "
        f"Places in each round: {', '.join(map(str, left))}. Where a place was measured on all of the text both ways, "
        f"the perplexities differ by {max(map(abs, same)):.1e} of themselves at most.\n\n"
        f"Perplexity over the recipient's alone, which is {report['domain']['perplexity']:.2f} (* the best, ≈ not "
        "to be told apart from it; intervals are wide where a place dropped out after the first round):\n\n"
        + table(["position", "replace", "insert"], rows)
    )


def plan_section(result: dict[str, Any]) -> str:
    """Render what was planned beside the paper's choice, and predicted costs beside measured ones."""
    settings, rows, quality = result["settings"], [], []
    for row in result["rows"]:
        planned, measured = row["planned"], row["measured"]
        for name, proposal in (("plan", planned["best"]), ("paper", planned["paper"])):
            found, cost = measured[name], proposal["cost"]
            rows.append(
                [
                    row["domain"],
                    name,
                    f"{proposal['layers']} {proposal['protocol']}",
                    _beside(cost["seconds"], found["seconds"], 1),
                    _beside(cost["memory"], found["memory"], 1e6),
                    _beside(cost["bytes"], found["bytes"], 1e6),
                ]
            )
        low, high = row["ratio"][1:]
        quality.append(
            [
                row["domain"],
                f"{measured['plan']['perplexity']:.2f}",
                f"{measured['paper']['perplexity']:.2f}",
                f"{row['ratio'][0]:.3f} [{low:.3f}, {high:.3f}]",
            ]
        )
    slack = f"{settings['slack']} times as many" if "slack" in settings else "as many"
    return (
        f"## Following a plan\n\nSmolLM2-135M-Instruct, {settings['tokens']:,} training tokens. `plan` may take "
        f"{slack} seconds as it predicts for the paper's choice, three layers from floor(L/3). Perplexity on text "
        "that chose nothing:\n\n"
        + table(["domain", "plan", "paper's layers", "ratio (95 % interval)"], quality)
        + "\nPredicted before training, and measured (in parentheses their ratio); seconds of one thread's "
        "processor time, memory beyond the model and file in MB:\n\n"
        + table(["domain", "choice", "layers", "seconds", "memory", "file"], rows)
    )


def _beside(predicted: float, measured: float, unit: float) -> str:
    return f"{predicted / unit:,.0f}, {measured / unit:,.0f} ({predicted / measured:.2f})"


def _place_cell(place: dict[str, Any] | None, best: tuple[str, int], tied: list[str]) -> str:
    if place is None or place["domain"] is None:
        return ""
    mark = "* " if (place["mode"], place["position"]) == best else ""
    mark = "≈ " if f"{place['mode']} at {place['position']}" in tied else mark
    score = place["domain"]
    digits = 3 if score["ratio"] < 100 else 0
    ratio, low, high = (f"{score[name]:,.{digits}f}" for name in ("ratio", "low", "high"))
    return f"{mark}{ratio} [{low}, {high}]"


def disk_section(result: dict[str, Any]) -> str:
    """Render transplants on disk: seconds beside `cp` of the same bytes, and memory."""
    rows = result["rows"]
    names = list(rows[0]["ways"])
    middle = [
        {name: statistics.median(run["seconds"] for run in runs) for name, runs in row["ways"].items()} for row in rows
    ]
    seconds = [
        [name, *(f"{times[name]:.1f} ({times[name] / times['cp']:.2f})" for times in middle)]
        for name in names
        if all(name in times for times in middle)
    ]
    memory = [
        [name, *(f"{max(run['megabytes'] for run in row['ways'][name]):,.0f}" for row in rows)]
        for name in names
        if all(name in row["ways"] for row in rows)
    ]
    header = ["", *(f"{row['model_bytes'] / 1e9:.1f} GB" for row in rows)]
    rounds = ", ".join(f"{row['gigabytes']} GB: {len(row['ways']['cp'])}" for row in rows)
    first = ", ".join(f"{row['first']['insert']['seconds']:.0f} s" for row in rows)
    spread = ", ".join(
        f"`cp` of {row['gigabytes']} GB took {min(times):.1f} to {max(times):.1f} s"
        for row in rows
        if (times := [run["seconds"] for run in row["ways"]["cp"]])
    )
    beside = ", ".join(f"{times['mergekit'] / times['cp']:.1f}" for times in middle if "mergekit" in times)
    largest = max(found["megabytes"] for row in rows for found in row["first"].values())
    return (
        "## Transplants on disk\n\nA random bfloat16 llama of 48 layers, a file for each layer, and an organ of three "
        "of them. Each way runs with its input dropped from memory, and until `sync` returns; `cp` copies the model "
        "and the organ. Seconds (median), and in "
        f"parentheses relative to `cp`; rounds: {rounds}. The machine was shared with other work: "
        f"{spread}.{_sizes_left(rows)}\n\n"
        + table(header, seconds)
        + "\nWhat was aimed at, and what came out:\n\n"
        + table(["aim", *header[1:]], _disk_verdicts(middle, rows))
        + f"\n`cp` itself is {beside} times as fast as mergekit: what writes the same bytes can't be three times as "
        "fast where that is less than three. On 2026-11-25, on a machine whose disk took a third of the time, "
        "and before commands started sooner, copying took 1.35, 1.27 and 1.01 of `cp`, insertion at the end with hard "
        "links 0.47, 0.21 and 0.09, and mergekit 5.5, 5.0 and 2.6 times as long as copying: the less the disk takes, "
        "the more it counts that Python has to start.\n"
        + "\nLargest resident size of a process, in MB:\n\n"
        + table(header, memory)
        + "\nThe first time that a kind of organ meets a kind of model at a place, models are built without weights, "
        f"in processes of their own with at most {largest:.0f} MB; the first insertion took {first} in all.\n"
    )


def training_memory_section(result: dict[str, Any]) -> str:
    """Render what training in a large host takes, beside the bytes of what it is made of."""
    settings, rows = result["settings"], []
    for row in result["rows"]:
        parts = sum(row[f"{part}_bytes"] for part in ("program", "outside", "organ", "optimizer", "suffix"))
        rows.append(
            [
                f"{row['place']} ({row['position']})",
                "yes" if row["offload"] else "no",
                *(f"{row[f'{part}_bytes'] / 1e6:,.0f}" for part in ("organ", "optimizer", "suffix", "outside")),
                f"{parts / 1e6:,.0f}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{row['seconds']:.0f}",
            ]
        )
    first, perplexities = result["rows"][0], dict[str, set[float]]()
    for row in result["rows"]:
        perplexities.setdefault(row["place"], set()).add(row["perplexity"])
    equal = sum(len(values) == 1 for values in perplexities.values())
    header = ["organ at", "--offload", "organ", "optimizer", "after it", "embedding, head", "sum with program", "peak"]
    return (
        f"## Memory of training in a large host\n\nA random bfloat16 llama of {settings['layers']} layers and "
        f"{first['model_bytes'] / 2e9:.1f} billion parameters ({first['model_bytes'] / 1e6:,.0f} MB), held as stored; "
        f"an organ of {settings['organ']} layers, {settings['steps']} steps of {settings['batch_size']} x "
        f"{settings['sequence_length']} tokens, each run in a process of its own. In MB; the peak is the process's "
        f"largest resident size, and the program takes {first['program_bytes'] / 1e6:,.0f} of it once all is imported. "
        "The optimizer's share is gradients, two moments and the best weights so far. Seconds are those of a core "
        "shared with other work, hidden states included.\n\n"
        + table([*header, "seconds"], rows)
        + f"\nHeld-out perplexities with and without are equal at {equal} of {len(perplexities)} places.\n"
    )


def _sizes_left(rows: list[dict[str, Any]]) -> str:
    """Say which of the sizes that were to be measured were not."""
    left = [f"{size} GB" for size in (1, 4, 10) if size not in {row["gigabytes"] for row in rows}]
    return f" Not measured with this version: {', '.join(left)}." if left else ""


def _disk_verdicts(middle: list[dict[str, float]], rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a line for each aim of transplants on disk: for each size the figure, and whether it was met."""
    memory = []
    for row in rows:
        own = [runs for way, runs in row["ways"].items() if way not in ("cp", "mergekit") and "from Python" not in way]
        runs = [run for each in own for run in each]
        memory.append(max(run["megabytes"] for run in [*runs, *row["first"].values()]))
    aims = [
        ("insert, copied: at most 1.25 of `cp`", "{:.2f}", [t["insert, copied"] / t["cp"] for t in middle], 1.25),
        *(
            (f"{name}: at most 0.15 of `cp`", "{:.2f}", [t[name] / t["cp"] for t in middle], 0.15)
            for link in ("replace, hard links", "insert at the end, hard links")
            for name in (link, f"{link}, from Python")
            if all(name in times for times in middle)
        ),
        ("memory of any process: under 300 MB", "{:.0f} MB", memory, 300.0),
    ]
    lines = [
        [aim, *(f"{form.format(value)}: {'met' if value <= limit else 'not met'}" for value in values)]
        for aim, form, values, limit in aims
    ]
    if all("mergekit" in times for times in middle):
        faster = [times["mergekit"] / times["insert, copied"] for times in middle]
        cells = [f"{value:.1f}: {'met' if value >= 3 else 'not met'}" for value in faster]
        lines.append(["insert, copied: at least 3 times as fast as mergekit", *cells])
    return lines


def several_section(result: dict[str, Any]) -> str:
    """Render what two organs do alone, together at different positions, and merged at one."""
    settings = result["settings"]
    header = ["inside", *settings["texts"]]

    def cell(score: dict[str, float]) -> str:
        return f"{score['perplexity']:,.2f} ({score['ratio']:.3f} [{score['low']:.3f}, {score['high']:.3f}])"

    rows = [[row["name"], *(cell(row["scores"][name]) for name in settings["texts"])] for row in result["rows"]]
    return (
        f"## Several organs, and merges\n\nSmolLM2-135M-Instruct; organs of three layers trained in place on two "
        f"domains ({settings['steps']}). Perplexity, and in parentheses its ratio to the recipient's with its 95 % "
        f"interval over documents; about {settings['tokens']:,} tokens of each text. *Together*: clinical and "
        "dictionary, where they were trained. *Merged*: clinical and early-dictionary, of the same layers, made into "
        "one with equal weights.\n\n" + table(header, rows)
    )


def alignment_section(result: dict[str, Any]) -> str:
    """Render how well alignment foretells what an organ does to a recipient's perplexity."""
    settings, limits = result["settings"], result["thresholds"]
    scores = [
        [name, f"{found['spearman']:.3f}", _range(found["interval"]), _range(found["interval_over_groups"])]
        for name, found in result["correlations"].items()
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["organ"], row["recipient"]), []).append(row)
    rows = [
        [organ, recipient, ", ".join(f"{r['position']}: {r['distance']:.2f} → {r['change']:,.3g}" for r in pairs),
         f"{statistics.mean((r['cka_entering'] + r['cka_leaving']) / 2 for r in pairs):.2f}"]
        for (organ, recipient), pairs in groups.items()
    ]  # fmt: skip
    count = next(iter(result["correlations"].values()))
    return (
        f"## Alignment and perplexity\n\n{count['pairs']} pairs of organ, recipient and position, {count['groups']} "
        "groups of one organ in one recipient. The true change is perplexity on general text with the organ over the "
        f"recipient's ({settings['evaluated_tokens']:,} tokens, no recovery). *Turned axes*: the same function as the "
        "packaged model, with its residual stream rotated, so that its weights have nothing in common with it. "
        "*random*: an organ from a model with random weights. Spearman's correlation of the score with the change, "
        "with 95 % intervals by bootstrap over pairs, and over whole groups:\n\n"
        + table(["score", "Spearman", "interval", "interval, over groups"], scores)
        + f"\nThe distances that best tell apart changes up to {settings['fit']:g}, up to {settings['recover']:g} and "
        f"beyond are {limits['fits_below']:.3f} and {limits['recovers_below']:.3f}; with them {limits['right']} of "
        f"{limits['pairs']} verdicts are right, and {limits['right_left_out']} if thresholds are chosen without the "
        f"recipient that is judged. Comparing takes {settings['seconds_of_check']:.1f} s of one core beyond loading "
        "the recipient. What an inserted organ's distance can be at most, and the limit of what fits, were settled on "
        "these same pairs. Each pair as position: distance → change:\n\n"
        + table(["organ", "recipient", "pairs", "mean CKA"], rows)
    )


def private_training_section(result: dict[str, Any]) -> str:
    """Render what differential privacy costs and keeps."""
    settings, (alone, *trained) = result["settings"], result["rows"]
    rows = [[alone["name"], "", "", _with_interval(alone["perplexity"], alone["interval"]), *[""] * 5]]
    for row in trained:
        spent, canaries, attacks = row["privacy"], row["canaries"], row["membership"]
        rows.append(
            [
                row["name"],
                f"{row['lr']:g}",
                "" if spent is None else f"{spent['noise_multiplier']:.2f}",
                _with_interval(row["perplexity"], row["interval"]),
                *(
                    f"{attacks[name]['auc']:.3f} [{attacks[name]['auc_low']:.3f}, {attacks[name]['auc_high']:.3f}]"
                    for name in ("reference", "min-k%++")
                ),
                f"{canaries['exposure_mean']:.2f} ({canaries['exposure_most']:.2f})",
                f"{canaries['epsilon']:.2f}",
                f"{row['training_seconds']:.0f}",
            ]
        )
    header = [
        "training", "learning rate", "noise", "perplexity", "reference attack, area", "min-k%++, area",
        "canaries' exposure, mean (most), bits", "epsilon shown", "seconds",
    ]  # fmt: skip
    private = next((row["privacy"] for row in trained if row["privacy"] is not None), None)
    delta = "" if private is None else f", delta {private['delta']:.2g}, {private['sample_rate']:.1%} of them in a step"
    return (
        f"## Differential privacy\n\nSmolLM2-135M-Instruct, layers {settings['layers']} in place; "
        f"{settings['members']} definitions and half of {settings['canaries']} canaries, a document a unit{delta}; "
        f"{settings['steps']} steps "
        f"of {settings['step_size']} documents of at most {settings['sequence_length']} tokens on average; changes "
        "of low rank. Perplexity on other definitions "
        f"({alone['tokens']:,} tokens); attacks on {settings['others']} members and as many others, each area with its "
        "interval: 0.5 is chance. Learning rates were not searched. A budget this small "
        "in text is a hard case: noise weighs less the more documents there are.\n\n" + table(header, rows)
    )


def _range(interval: list[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _with_interval(value: float, interval: list[float]) -> str:
    return f"{value:,.2f} [{interval[0]:,.2f}, {interval[1]:,.2f}]"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo_section,
    "adaptation": adaptation_section,
    "engine": engine_section,
    "phases": phases_section,
    "attention": attention_section,
    "training_cost": training_cost_section,
    "step_memory": step_memory_section,
    "protocols": protocols_section,
    "recovery": recovery_section,
    "paper": paper_section,
    "plan": plan_section,
    "scan": scan_section,
    "disk": disk_section,
    "training_memory": training_memory_section,
    "several": several_section,
    "alignment": alignment_section,
    "private_training": private_training_section,
}


if __name__ == "__main__":
    main()
