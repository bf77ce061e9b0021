"""The application that all commands belong to: what it shows, how it fails, and with which exit status it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.segment import Segments

from neurograft import __version__, ranks
from neurograft.allocator import start_again_merging
from neurograft.errors import NeurograftError
from neurograft.wording import harmless, harmless_json

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType
    from rich.status import Status

EXIT_NO = 1  # the verdict is no: an organ that does not fit, a gate that does not hold
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
PIPED_WIDTH = 140
_TRAINING = ("train", "recover", "plan", "demo")  # commands that train in this process
_SECONDS_BETWEEN_LINES = 30.0
_WrongArguments: Any = typer.BadParameter.__mro__[2]  # the parent of all that is wrong with arguments

app = typer.Typer(
    name="neurograft",
    help="Move trained slices of language models between compatible models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Screen:
    """Where results and progress go: results to standard output, everything else to standard error."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # Without a terminal there is no width to keep to, and whoever reads the output should find digests whole.
        self.out = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, emoji=False)
        self.err = Console(stderr=True, quiet=ranks.rank() > 0, emoji=False)
        self.status: Status | None = None
        self._said = time.monotonic()

    def say(self, text: str) -> None:
        """Show what is being done: in the status line or, where there is no terminal, as a line now and then."""
        text = harmless(text)
        if self.err.is_terminal:
            if self.status is not None:
                self.status.update(text)
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.err.print(text, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print what should be known of a result, to standard error."""
        self.err.print(harmless(f"note: {text}."), markup=False, highlight=False, soft_wrap=True)

    def result(
        self, document: BaseModel | dict[str, Any], pretty: RenderableType | Callable[[], RenderableType]
    ) -> None:
        """Print a result, as JSON or for people; of several processes, the first does."""
        if ranks.rank() > 0:
            return
        if self.as_json:
            text = json.dumps(document) if isinstance(document, dict) else document.model_dump_json()
            sys.stdout.write(harmless_json(text) + "\n")
        else:
            segments = self.out.render(pretty() if callable(pretty) else pretty)
            shown = [each if each.control else each._replace(text=harmless(each.text)) for each in segments]
            self.out.print(Segments(shown), crop=False)  # a command is whole or of no use

    def fail(self, message: str, kind: str) -> None:
        """Print an error: one sentence on standard error, and as JSON on standard output if that was asked for."""
        ranks.original_streams()
        self.err.quiet = False
        if self.as_json:
            sys.stdout.write(json.dumps({"error": {"kind": kind, "message": message}}) + "\n")
        self.err.print(harmless(f"error: {message}"), style="bold red", markup=False, highlight=False, soft_wrap=True)


class _StatusHandler(logging.Handler):
    """Show what neurograft is doing right now, and leave standing what one should know of it."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.screen.note(record.getMessage())
        else:
            self.screen.say(record.getMessage())


@contextmanager
def running(as_json: bool, doing: str) -> Iterator[Screen]:
    """Show a status line while a verb runs, and turn what it raises into one sentence and an exit status."""
    screen = Screen(as_json)
    logger = logging.getLogger("neurograft")
    handler = _StatusHandler(screen)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with screen.err.status(doing) as screen.status:
            yield screen
    except NeurograftError as error:
        if ranks.claim_failure():
            screen.fail(str(error), type(error).__name__)
        raise typer.Exit(EXIT_ERROR) from error
    except KeyboardInterrupt as interrupt:
        # Only the first process knows what it wrote, and one that another's failure ended has nothing to say.
        if ranks.rank() == 0 and ranks.claim_failure():
            screen.fail(f"interrupted; {str(interrupt) or 'nothing was written'}.", "Interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except MemoryError as error:
        if ranks.claim_failure():
            screen.fail("the memory is full; nothing was written.", "MemoryError")
        raise typer.Exit(EXIT_ERROR) from error
    except BrokenPipeError as error:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (Python flushes it when it ends)
        raise typer.Exit(EXIT_ERROR) from error
    except Exception as error:
        # Whatever it is, it is no verdict, which is what Python's own exit status of 1 would mean. What one process's
        # failure makes of the others, such as a lost connection, would hide the reason.
        if ranks.claim_failure():
            screen.fail(_unexpected(error), type(error).__name__)
        raise typer.Exit(EXIT_ERROR) from error
    finally:
        logger.removeHandler(handler)


@contextmanager
def training_display(screen: Screen) -> Iterator[Callable[[Any], None]]:
    """Yield a callback that shows a training run's progress."""
    from neurograft.progress import training_line

    def show(progress: Any) -> None:
        screen.say(training_line(progress))

    yield show


def _unexpected(error: Exception) -> str:
    """Say in one sentence what nobody foresaw, after the traceback if `NEUROGRAFT_TRACEBACK` asks for it."""
    if os.environ.get("NEUROGRAFT_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    first = next(iter(str(error).strip().splitlines()), "no message").rstrip(".")
    return (
        f"unexpected error: {type(error).__name__}: {first}; please report it (with NEUROGRAFT_TRACEBACK=1 in the "
        "environment, the same command shows where it came from)."
    )


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"neurograft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    trust: Annotated[
        str | None,
        typer.Option(
            "--trust",
            metavar="FILE",
            help="The trust.toml that says whose organs may be used [default: NEUROGRAFT_TRUST, else "
            "neurograft/trust.toml in the user's folder of configuration].",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if trust is not None:  # the processes that a command starts are to heed it too
        before = os.environ.get("NEUROGRAFT_TRUST")
        os.environ["NEUROGRAFT_TRUST"] = trust and os.path.abspath(trust)  # an empty one is refused, not this folder
        context.call_on_close(lambda: _set_back(before))


def _set_back(trust: str | None) -> None:
    os.environ.pop("NEUROGRAFT_TRUST")
    if trust is not None:
        os.environ["NEUROGRAFT_TRUST"] = trust


def _terminate(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a polite end (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    if set(sys.argv[1:]) <= {"-h", "--help", "--version"} and "_NEUROGRAFT_COMPLETE" not in os.environ:
        _leave_out_options()
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    if verb in _TRAINING and not {"-h", "--help"} & set(sys.argv):
        start_again_merging()
    _keep_only(verb)
    ranks.silence_all_but_first()
    status = _run()
    ranks.leave(status)
    sys.exit(status)


def _run() -> int:
    """Run the command line; return the exit status. With `--json`, wrong arguments are one JSON document too."""
    try:
        return int(app(standalone_mode=False) or 0)
    except _WrongArguments as error:
        _show_wrong_arguments(error)
        return EXIT_ERROR
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("error: interrupted; nothing was written.\n")
        return EXIT_INTERRUPTED


def _show_wrong_arguments(error: Any) -> None:
    """Say in one sentence what is wrong with the arguments, or show the help of a command that got none."""
    context, text = error.ctx, error.format_message()
    if context is not None and text == context.get_help():
        error.show()
        return
    message = " ".join(text.replace("Value error, ", "").split())
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {"kind": "UsageError", "message": message}}) + "\n")
    command = "neurograft" if context is None else context.command_path
    sys.stderr.write(f"error: {message[:1].lower()}{message[1:].rstrip('.')}; see {command} -h.\n")


def _leave_out_options() -> None:
    """Let commands be known by name and first sentence alone; reading all their options takes most of a second."""
    for each in (app, *(group.typer_instance for group in app.registered_groups)):
        for command in each.registered_commands:  # type: ignore[union-attr]
            command.callback = _without_options(command.callback)


def _without_options(callback: Any) -> Callable[[], None]:
    def bare() -> None:
        """Stand for a command that is listed, and not called."""

    bare.__name__, bare.__doc__ = callback.__name__, callback.__doc__
    return bare


def _keep_only(verb: str) -> None:
    """Forget the other commands if this is one: reading all their options takes as long as many a command."""
    commands = [command for command in app.registered_commands if command.callback.__name__ == verb]  # type: ignore[union-attr]
    groups = [group for group in app.registered_groups if group.typer_instance.info.name == verb]  # type: ignore[union-attr]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups
