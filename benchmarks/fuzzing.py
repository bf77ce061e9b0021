"""Alter files by the hundred thousand and let every reader read them: taken, or refused in one sentence.

Run it with `python benchmarks/fuzzing.py`, some ten minutes on one core, or with `make fuzz`, which afterwards lets
atheris look for alterations that reach new code (`--guided SECONDS` for each reader). Whatever is raised beside the
project's own errors is a failure, printed with the number that makes the same bytes again. It writes
benchmarks/results/fuzzing.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

GUIDED = "--only" in sys.argv
if GUIDED:
    import atheris

# atheris sees what runs only in what it watched being imported.
with atheris.instrument_imports(include=["neurograft"]) if GUIDED else nullcontext():
    from mutations import alter
    from readers import Reader, make_readers, read
from render import describe_run  # noqa: E402

RESULT = Path(__file__).parent / "results" / "fuzzing.json"
EACH = 12_600


def main() -> None:
    """Alter, read, count; exit with 1 if anything but a refusal was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=EACH, help="altered files for each reader")
    parser.add_argument("--guided", type=int, metavar="SECONDS", help="then let atheris look, so long for each reader")
    parser.add_argument("--only", metavar="READER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").mkdir()
        readers = make_readers(Path(folder) / "examples")
        if arguments.only:
            look(next(r for r in readers if r.name == arguments.only), arguments.guided, Path(folder) / "work")
            return
        rows = [count(reader, arguments.each, Path(folder)) for reader in readers]
    for row in rows if arguments.guided else ():
        row["guided"] = run_guided(row["reader"], arguments.guided)
    result = {"run": describe_run("python benchmarks/fuzzing.py"), "each": arguments.each, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["failures"] or row.get("guided", {}).get("failed") for row in rows))


def count(reader: Reader, number: int, folder: Path) -> dict[str, Any]:
    """Let one reader read so many altered files."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    everything, started = _listing(folder), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken, failures = 0, 0
    for which in range(number):
        try:
            taken += read(reader, alter(reader.seed, which), work)
        except Exception:
            failures += 1
            print(f"{reader.name}, alteration {which}:\n{traceback.format_exc(limit=-2)}", file=sys.stderr)
    row = {
        "reader": reader.name,
        "altered": number,
        "taken": taken,
        "refused": number - taken - failures,
        "failures": failures,
        "files_left": len(_listing(folder) ^ everything),
        "memory_grew_megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(row, flush=True)
    return row


def _listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*")) | set(folder.parent.glob("outside*"))


def run_guided(reader: str, seconds: int) -> dict[str, Any]:
    """Run atheris in a process of its own, which it does not return from; return how many files it tried."""
    command = [sys.executable, __file__, "--only", reader, "--guided", str(seconds)]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    executed = [line for line in done.stderr.splitlines() if "stat::number_of_executed_units" in line]
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return {"tried": int(executed[-1].split()[-1]) if executed else 0, "failed": bool(done.returncode)}


def look(reader: Reader, seconds: int, work: Path) -> None:
    """Let atheris look for bytes that a reader neither takes nor refuses; it ends the process."""
    work.mkdir()

    def try_one(data: bytes) -> None:
        read(reader, data or b"\0", work)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return alter(data if len(data) > 8 and seed % 4 else reader.seed, seed)[:most]

    options = [f"-max_total_time={seconds}", f"-max_len={2 * len(reader.seed) + 4096}", "-print_final_stats=1"]
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "whole").write_bytes(reader.seed)
        atheris.Setup([sys.argv[0], *options, corpus], try_one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
