"""Write docs/verbs.md from the commands' own --help, so that the page can't say anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

PAGE = Path(__file__).resolve().parent.parent / "docs" / "verbs.md"
WIDTH = 100
INTRODUCTION = """# Verbs

This page is made from `--help` by `make cli-docs`; don't edit it.

Every verb is also a function of the same name in Python: see the [API](api.md). Results go to standard output,
everything else to standard error; with `--json`, standard output is one JSON document and nothing else.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | the verdict is no: an organ does not fit (`check`), a gate fails (`evaluate`, `deploy`), `demo` misses a target |
| 2 | an error: one sentence on standard error says what is wrong, and nothing was written |
| 130 | interrupted; nothing was written but what the same command goes on from, if it says so |

With `NEUROGRAFT_TRACEBACK=1` in the environment, an unexpected error also shows where it came from.
"""


def render() -> str:
    """Return the page: the help of `neurograft` and of each of its commands."""
    from neurograft.cli import app

    verbs = [[name] for name in _names(app)]
    for group in (each.typer_instance for each in app.registered_groups if each.typer_instance):
        verbs += [[str(group.info.name), name] for name in _names(group)]
    return "\n".join([INTRODUCTION, _section("neurograft", []), *(_section(" ".join(verb), verb) for verb in verbs)])


def _names(app: Any) -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def _section(title: str, arguments: list[str]) -> str:
    """Return the help of one command under a heading.

    Raises:
        RuntimeError: The command has no help to show.
    """
    from neurograft.cli import app

    # The width of whoever runs this must not show in the page.
    result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="neurograft", terminal_width=WIDTH)
    if result.exit_code != 0:
        raise RuntimeError(f"neurograft {title} --help failed: {result.output}") from result.exception
    lines = [line.rstrip() for line in result.output.splitlines()]
    return f"## {title}\n\n```text\n" + "\n".join(lines).strip("\n") + "\n```\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
