"""Render benchmarks/results/*.json into docs/results.md, so that no figure there was typed by hand.

Run it with `python benchmarks/render.py`; `--demo FILE` first takes over what `neurograft demo --json` printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
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


def render() -> str:
    """Return the page."""
    parts = [HEADER]
    for name, section in (("demo", demo_section), ("protocols", protocols_section), ("disk", disk_section)):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(result) + "\n" + footer(result["run"]))
    return "\n".join(parts)


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


def disk_section(result: dict[str, Any]) -> str:
    """Render transplants on disk: seconds beside `cp` of the same bytes, and memory."""
    rows = result["rows"]
    names = list(rows[0]["ways"])
    middle = [{name: median(run["seconds"] for run in runs) for name, runs in row["ways"].items()} for row in rows]
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
    largest = max(row["first"]["insert"]["megabytes"] for row in rows)
    return (
        "## Transplants on disk\n\nA random bfloat16 llama of 48 layers, a file for each layer, and an organ of three "
        "of them. Each way runs with its input dropped from memory, and until `sync` returns. Seconds (median), and in "
        f"parentheses relative to `cp`; rounds: {rounds}. The machine was shared with other work.\n\n"
        + table(header, seconds)
        + "\nLargest resident size of a process, in MB:\n\n"
        + table(header, memory)
        + "\nThe first time that a kind of organ meets a kind of model at a place, models are built without weights, "
        f"in a process of its own with {largest:.0f} MB; the first insertion took {first} in all.\n"
    )


def _with_interval(value: float, interval: list[float]) -> str:
    return f"{value:,.2f} [{interval[0]:,.2f}, {interval[1]:,.2f}]"


if __name__ == "__main__":
    main()
