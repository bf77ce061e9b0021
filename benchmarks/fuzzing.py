"""Alter files by the hundred thousand and let every reader read them: taken, or refused in one sentence.

Run it with `python benchmarks/fuzzing.py`, some ten minutes on one core, or with `make fuzz`, which afterwards lets
atheris look for alterations that reach new code (`--guided SECONDS` for each reader). Whatever is raised beside the
project's own errors is a failure, printed with the number that makes the same bytes again; so is a file that takes a
minute, or more memory than a process may have here. It writes benchmarks/results/fuzzing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

GUIDED = "--look" in sys.argv
if GUIDED:
    import atheris

# atheris sees what runs only in what it watched being imported.
with atheris.instrument_imports(include=["neurograft"]) if GUIDED else nullcontext():
    from mutations import alter
    from readers import Reader, make_readers, read
from render import describe_run  # noqa: E402

RESULT = Path(__file__).parent / "results" / "fuzzing.json"
EACH = 7_000
MOST_SECONDS, MOST_BYTES = 60, 12 << 30


def main() -> None:
    """Alter, read, count; exit with 1 if anything but a refusal was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=EACH, help="altered files for each reader")
    parser.add_argument("--guided", type=int, metavar="SECONDS", help="then let atheris look, so long for each reader")
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROGRAFT_CACHE"] = f"{folder}/cache"
        (Path(folder) / "examples").mkdir()
        readers = make_readers(Path(folder) / "examples")
        if arguments.look:
            look_at_all(readers, arguments.guided, Path(folder))
            return
        rows = [count(reader, arguments.each // reader.slowness, Path(folder)) for reader in readers]
    guided = run_guided(arguments.guided) if arguments.guided else {}
    for row in rows:
        row |= {"guided": guided[row["reader"]]} if guided else {}
    command = f"python benchmarks/fuzzing.py{f' --guided {arguments.guided}' if guided else ''}"
    result = {"run": describe_run(command), "each": arguments.each, "rows": rows}
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
            with limited():
                taken += read(reader, alter(reader.seed, which), work)
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic in a library's Rust is no Exception
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


class TooSlowError(BaseException):
    """A reader took too long; none that it calls takes this for a fault of the file."""


@contextmanager
def limited() -> Iterator[None]:
    """Interrupt what takes too long."""

    def interrupt(*_: Any) -> None:
        raise TooSlowError(f"it took {MOST_SECONDS} s")

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*")) | set(folder.parent.glob("outside*"))


def run_guided(seconds: int) -> dict[str, dict[str, Any]]:
    """Let atheris look in a process that imports everything under its eyes; return what it tried for each reader."""
    command = [sys.executable, __file__, "--look", "--guided", str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("reader"): row for row in rows}


def look_at_all(readers: list[Reader], seconds: int, folder: Path) -> None:
    """Let atheris look at each reader in a process of its own, which it ends; print what it tried."""
    for reader in readers:
        log = folder / "log"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            try:
                look(reader, seconds, folder / "work")
            except SystemExit as end:
                os._exit(int(end.code or 0))  # without clearing folders that the parent still needs
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        said = log.read_text(encoding="utf-8", errors="replace")
        executed = [line for line in said.splitlines() if "stat::number_of_executed_units" in line]
        row = {"tried": int(executed[-1].split()[-1]) if executed else 0, "failed": bool(status)}
        if status:
            sys.stderr.write(said[-4000:])
        sys.stdout.write(json.dumps({"reader": reader.name, **row}) + "\n")
        sys.stdout.flush()


def look(reader: Reader, seconds: int, work: Path) -> None:
    """Let atheris look for bytes that a reader neither takes nor refuses; it ends the process."""
    work.mkdir(exist_ok=True)

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
