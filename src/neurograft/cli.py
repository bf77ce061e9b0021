"""The command line: each command parses, calls the public function of the same name, and prints.

torch and everything that imports it are imported inside the commands, so that `neurograft --help` is instant.
"""

from __future__ import annotations

import inspect as introspection
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.console import Console

from neurograft import __version__, ranks
from neurograft.errors import NeurograftError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType
    from rich.status import Status

EXIT_NO = 1  # the verdict is no: an organ that does not fit, a gate that does not hold
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
PIPED_WIDTH = 140
_WrongArguments: Any = typer.BadParameter.__mro__[2]  # the parent of all that is wrong with arguments

app = typer.Typer(
    name="neurograft",
    help="Move trained slices of language models between compatible models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a transformers directory or a .gguf file.")]
Recipient = Annotated[
    str, typer.Argument(metavar="RECIPIENT", help="A Hub id, a transformers directory or a .gguf file.")
]
OrganFile = Annotated[
    str, typer.Argument(metavar="ORGAN", help="An organ file (.safetensors), or one in a bank: BANK:NAME@VERSION.")
]
OrganFiles = Annotated[
    list[str],
    typer.Argument(metavar="ORGAN", help="One or several organ files (.safetensors), or organs in a bank."),
]
InBank = Annotated[
    str,
    typer.Argument(metavar="ORGAN", help="BANK:NAME@VERSION, hf://org/repo@VERSION or oci://registry/name:VERSION."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that lies beside the model's weights.")
]
At = Annotated[
    int | None,
    typer.Option("--at", help="Position: how many recipient layers stand before the organ, from 0."),
]
ModeOption = Annotated[
    Literal["replace", "insert"] | None,
    typer.Option("--mode", help="What the organ recommends, if left out."),
]
AtEach = Annotated[
    list[int] | None,
    typer.Option(
        "--at",
        help="Position: how many recipient layers stand before the organ, from 0, in the recipient as it is. With "
        "several organs once for each, in their order.",
    ),
]
ModeEach = Annotated[
    list[str] | None,
    typer.Option(
        "--mode",
        metavar="[replace|insert]",
        help="What the organ recommends, if left out. With several organs once, or once for each.",
    ),
]
LinkOption = Annotated[
    Literal["auto", "copy", "hard"],
    typer.Option("--link", help="Files that stay as they are: share blocks if the disk can, copy, or hard links."),
]
TextColumn = Annotated[str, typer.Option("--text-column", help="Column that holds the text, in tables.")]
Separator = Annotated[
    str | None,
    typer.Option("--document-separator", help="What separates documents in .txt files [default: blank lines]."),
]
Encoding = Annotated[str, typer.Option("--encoding", help="Encoding of text files.")]


class _Screen:
    """Where results and progress go: results to standard output, everything else to standard error."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # Without a terminal there is no width to keep to, and whoever reads the output should find digests whole.
        self.out = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        self.err = Console(stderr=True, quiet=ranks.rank() > 0)
        self.status: Status | None = None

    def result(
        self, document: BaseModel | dict[str, Any], pretty: RenderableType | Callable[[], RenderableType]
    ) -> None:
        """Print a result, as JSON or for people; of several processes, the first does."""
        if ranks.rank() > 0:
            return
        if self.as_json:
            text = json.dumps(document) if isinstance(document, dict) else document.model_dump_json()
            sys.stdout.write(text + "\n")
        else:
            self.out.print(pretty() if callable(pretty) else pretty)

    def fail(self, message: str, kind: str) -> None:
        """Print an error: one sentence on standard error, and as JSON on standard output if that was asked for."""
        ranks.original_streams()
        self.err.quiet = False
        if self.as_json:
            sys.stdout.write(json.dumps({"error": {"kind": kind, "message": message}}) + "\n")
        self.err.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)


class _StatusHandler(logging.Handler):
    """Show what neurograft is doing right now in the status line."""

    def __init__(self, screen: _Screen) -> None:
        super().__init__(logging.INFO)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if self.screen.status is not None:
            self.screen.status.update(record.getMessage())


@contextmanager
def _running(as_json: bool, doing: str) -> Iterator[_Screen]:
    """Show a status line while a verb runs, and turn what it raises into one sentence and an exit status."""
    screen = _Screen(as_json)
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
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def extract(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Organ file to write (.safetensors).")],
    layers: Annotated[
        str, typer.Option("--layers", help="START:STOP, half-open from 0, or auto: three from floor(L/3).")
    ] = "auto",
    name: Annotated[str | None, typer.Option("--name", help="Name of the organ.")] = None,
    version: Annotated[str, typer.Option("--organ-version", help="Its semantic version.")] = "0.1.0",
    license: Annotated[str | None, typer.Option("--license", help="Its licence, such as Apache-2.0.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="One line about it.")] = None,
    verify: Annotated[
        Literal["auto", "bytes", "layers"],
        typer.Option(
            "--verify", help="Copy bytes, or also run the layers and keep their answers; auto: where it fits easily."
        ),
    ] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Take a contiguous range of decoder layers out of a model, as one organ file."""
    with _running(as_json, "reading the model") as screen:
        from neurograft import extraction, render

        organ = extraction.extract(
            model,
            layers=layers,
            output=output,
            name=name,
            version=version,
            license=license,
            description=description,
            verify=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(organ.manifest, lambda: render.manifest(organ.manifest, output.stat().st_size))


class _WithTrainingOptions:
    """A command whose `**options` stand for an option for each field of `TrainingOptions`: names, defaults and help.

    They are read when somebody looks at the command's signature; commands that move bytes must not wait for that.
    """

    def __init__(self, command: Callable[..., None], without: Callable[[], Collection[str]] = tuple) -> None:
        self._command = command
        self._without = without
        self.__name__ = command.__name__
        self.__doc__ = command.__doc__

    def __call__(self, **arguments: Any) -> None:
        self._command(**arguments)

    @property
    def __signature__(self) -> introspection.Signature:
        return _signature_with_options(self._command, self._without())

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: parameter.annotation for name, parameter in self.__signature__.parameters.items()}


def _decided_by_compare() -> Collection[str]:
    from neurograft.training.search import DECIDED_BY_COMPARE

    return DECIDED_BY_COMPARE


def _decided_by_plan() -> Collection[str]:
    from neurograft.training.search import DECIDED_BY_PLAN

    return DECIDED_BY_PLAN


def _signature_with_options(command: Callable[..., None], without: Collection[str]) -> introspection.Signature:
    """Return a command's signature with `**options` replaced.

    Args:
        command: The command.
        without: Fields that have no meaning for it.
    """
    from neurograft.training.options import TrainingOptions

    own = introspection.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, field in TrainingOptions.model_fields.items():
        if name in without:
            continue
        default = "" if field.default is None else f" [default: {field.default}]"
        annotation: Any = field.annotation
        if len(kinds := get_args(annotation)) > 1 and Literal["auto"] in kinds:
            annotation = str  # a number or a word, which `parse_options` tells apart
        optional = annotation if field.default is None else annotation | None
        text = " ".join((field.description or "").replace("`", "").split())
        option = typer.Option(f"--{name.replace('_', '-')}", help=text + default, show_default=False)
        parameters.append(
            introspection.Parameter(
                name,
                introspection.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[optional, option],
            )
        )
    return own.replace(parameters=parameters)


@app.command()
@partial(_WithTrainingOptions, without=_decided_by_plan)
def plan(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="Domain text, as for train. Repeatable."),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="NAME=AMOUNT",
            help="A limit: tokens, seconds, memory (beyond the model) or bytes (of the file): memory=2GB. Repeatable.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text; else a share of the documents."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many ranges of layers are tried.")] = 6,
    trial_tokens: Annotated[
        int | None,
        typer.Option("--trial-tokens", min=1, help="Training tokens of each [default: a sixteenth of the tokens]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report there too, as JSON.")
    ] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Propose layers, how many, mode and protocol for a new organ, and predict what training it costs."""
    with _running(as_json, "reading the text") as screen:
        from neurograft import render
        from neurograft.placement import proposal

        report = proposal.plan(
            model,
            data=data,
            budget=budget or [],
            eval_data=eval_data or None,
            trials=trials,
            trial_tokens=trial_tokens,
            output=output,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **options,
        )
        screen.result(report, lambda: render.plan(report))


@app.command()
@_WithTrainingOptions
def train(
    organ: OrganFile,
    host: Annotated[str, typer.Option("--host", metavar="MODEL", help="The frozen model around the organ.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Domain text: .txt, .jsonl, .json(.gz/.zst), .parquet, a folder, a Hub dataset. Repeatable.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trained organ file to write (.safetensors).")],
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text; else a share of the documents."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the trained organ.")] = None,
    version: Annotated[str | None, typer.Option("--organ-version", help="Its semantic version.")] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train an organ on domain text inside a frozen host."""
    with _running(as_json, "reading the organ") as screen:
        from neurograft import render
        from neurograft.training import protocols

        with _training_display(screen) as progress:
            trained = protocols.train(
                organ,
                host=host,
                data=data,
                output=output,
                eval_data=eval_data or None,
                name=name,
                version=version,
                text_column=text_column,
                document_separator=document_separator,
                encoding=encoding,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **options,
            )
        screen.result(trained.manifest, lambda: render.manifest(trained.manifest, output.stat().st_size))


@contextmanager
def _training_display(screen: _Screen) -> Iterator[Callable[[Any], None]]:
    """Yield a callback that shows a training run's progress in the status line."""
    from neurograft.progress import training_line

    def show(progress: Any) -> None:
        if screen.status is not None:
            screen.status.update(training_line(progress))

    yield show


@app.command()
@partial(_WithTrainingOptions, without=_decided_by_compare)
def compare(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The model that is adapted.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Domain text: .txt, .jsonl, .json(.gz/.zst), .parquet, a folder, a Hub dataset. Repeatable.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Training tokens of each measured run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report and the finished runs.")],
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text, on which forgetting shows. Repeatable."),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Test text; else a share of the documents."),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Of organ, insert, standalone, lora, dora, full; separated by commas.")
    ] = "organ,lora,dora,full",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Measured runs of each method.")] = 3,
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Settings tried for each method; 1 for no search.")
    ] = 6,
    search_tokens: Annotated[
        int | None,
        typer.Option("--search-tokens", min=1, help="Training tokens of each trial [default: a quarter of --tokens]."),
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option("--search", metavar="FILE", help="YAML or JSON: METHOD: {SETTING: [VALUE, ...] or {low, high}}."),
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=1, help="Evaluations of the validation text in each measured run.")
    ] = 12,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Compare organs with LoRA, DoRA and full fine-tuning, each tuned as long as the others."""
    with _running(as_json, "reading the text") as screen:
        from neurograft import render
        from neurograft.training import comparison

        report = comparison.compare(
            model,
            data=data,
            output=output,
            tokens=tokens,
            general=general or None,
            eval_data=eval_data or None,
            methods=methods,
            seeds=seeds,
            trials=trials,
            search_tokens=search_tokens,
            search=search,
            evaluations=evaluations,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **{name: value for name, value in options.items() if value is not None},
        )
        screen.result(report, lambda: render.comparison(report, str(output)))


@app.command()
def inspect(organ: OrganFile, as_json: AsJson = False) -> None:
    """Show an organ's manifest, after checking the file's digest."""
    with _running(as_json, "reading the organ") as screen:
        from neurograft import render
        from neurograft.organ import organ_path, read_manifest

        path = organ_path(organ)
        manifest = read_manifest(path)
        screen.result(manifest, lambda: render.manifest(manifest, path.stat().st_size))


@app.command()
def push(
    organ: OrganFile,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A folder, any fsspec URL, hf://org/repo or oci://registry/name:tag; perhaps :NAME."
        ),
    ],
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="A tag that shall stand for this version. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put an organ into a bank, as the version that its manifest gives; versions never change."""
    with _running(as_json, "reading the organ") as screen:
        from neurograft.bank import moving, tables

        result = moving.push(organ, target, tags=tag or [])
        screen.result(result, lambda: tables.pushed(result))


@app.command()
def pull(
    organ: InBank,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Organ file to write [default: NAME-VERSION.safetensors]."),
    ] = None,
    allow_yanked: Annotated[
        bool, typer.Option("--allow-yanked", help="Take a version that was yanked, if it is named.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take an organ file out of a bank, verified by digest; an interrupted pull goes on."""
    with _running(as_json, "asking the bank") as screen:
        from neurograft.bank import moving, tables

        result = moving.pull(organ, output=output, allow_yanked=allow_yanked, overwrite=overwrite)
        screen.result(result, lambda: tables.pulled(result))


@app.command(name="list")
def list_organs(
    bank: Annotated[
        str, typer.Argument(metavar="BANK", help="A folder, any fsspec URL, hf://org or oci://registry/path.")
    ],
    as_json: AsJson = False,
) -> None:
    """List the organs in a bank."""
    with _running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.list_organs(bank)
        screen.result(result, lambda: tables.bank_list(result))


@app.command()
def versions(organ: InBank, as_json: AsJson = False) -> None:
    """List every version of an organ in a bank."""
    with _running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.versions(organ)
        screen.result(result, lambda: tables.versions(result))


@app.command()
def tag(
    organ: InBank,
    name: Annotated[str, typer.Argument(metavar="TAG", help="Such as stable.")],
    as_json: AsJson = False,
) -> None:
    """Let a tag stand for a version of an organ in a bank."""
    with _running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.tag(organ, name)
        screen.result(result, lambda: tables.changed(result))


@app.command()
def yank(
    organ: InBank,
    reason: Annotated[str, typer.Option("--reason", help="Why, for everyone who asks for the version.")] = (
        "no reason given"
    ),
    undo: Annotated[bool, typer.Option("--undo", help="Let the version be taken again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take a version back: it stays in the bank, but nothing takes it any more unless told to."""
    with _running(as_json, "asking the bank") as screen:
        from neurograft.bank import cataloguing, tables

        result = cataloguing.yank(organ, reason=reason, undo=undo)
        screen.result(result, lambda: tables.changed(result))


@app.command()
def check(
    organ: OrganFile,
    recipient: Recipient,
    at: At = None,
    mode: ModeOption = None,
    alignment: Annotated[
        Literal["auto", "measure", "skip"],
        typer.Option(
            "--alignment",
            help="Whether to compare hidden states at every position, for which the recipient is loaded; auto: where "
            "the organ has a sketch of them and the recipient is small for the machine.",
        ),
    ] = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether an organ fits a recipient, and where; exit status 1 if something blocks."""
    with _running(as_json, "reading the organ") as screen:
        from neurograft import compat, render

        report = compat.check(
            organ, recipient, at=at, mode=mode, alignment=alignment, trust_remote_code=trust_remote_code
        )
        document = {**report.model_dump(mode="json"), "blocked": report.blocked}
        screen.result(document, lambda: render.check_report(report))
    if report.blocked:
        raise typer.Exit(EXIT_NO)


@app.command()
def compose(
    organs: OrganFiles,
    recipient: Recipient,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=PATH",
            help="A domain's text and its name. Repeatable; one name twice is one domain.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Text of no organ's domain. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Markdown report to write (.md).")
    ] = None,
    at: AtEach = None,
    mode: ModeEach = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in a window [default: 512, or as many as the model takes]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="At most this many tokens of each data set.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether several organs go together, and what each does alone and beside the others; exit status 1 if not."""
    with _running(as_json, "reading the organs") as screen:
        from neurograft import composition, render
        from neurograft.evaluation import parse_data_arguments
        from neurograft.progress import evaluation_line

        def show(done: int, total: int) -> None:
            if screen.status is not None:
                screen.status.update(evaluation_line(done, total))

        report = composition.compose(
            organs,
            recipient,
            at=at or None,
            mode=_modes(mode),
            data=parse_data_arguments(data) if data else None,
            general=general or None,
            output=output,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        document = {**report.model_dump(mode="json"), "blocked": report.blocked}
        screen.result(document, lambda: render.composition(report))
    if report.blocked:
        raise typer.Exit(EXIT_NO)


@app.command()
def transplant(
    organs: OrganFiles,
    recipient: Recipient,
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory to write.")],
    at: AtEach = None,
    mode: ModeEach = None,
    link: LinkOption = "auto",
    verify: Annotated[
        Literal["auto", "written", "bytes", "layers"],
        typer.Option(
            "--verify",
            help="Digest what is written, also what is linked, also ask every layer; auto: the latter where it fits "
            "easily.",
        ),
    ] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Put one or several organs into a copy of a recipient: a new plain transformers directory."""
    with _running(as_json, "reading the organ") as screen:
        from neurograft import render, transplantation

        record = transplantation.transplant(
            organs,
            recipient,
            at=at or None,
            mode=_modes(mode),
            output=output,
            link=link,
            verify=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(record, lambda: render.record(record, str(output), len(organs)))


@app.command()
def merge(
    organs: OrganFiles,
    output: Annotated[Path, typer.Option("-o", "--output", help="Merged organ file to write (.safetensors).")],
    method: Annotated[
        Literal["average", "ties", "dare"],
        typer.Option("--method", help="Mean of the weights, or of what training added: TIES, DARE."),
    ] = "average",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W...", help="How much each organ counts, separated by commas."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL|ORGAN", help="What the organs were made from, untrained; for ties and dare."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share that is kept [default: ties 0.2, dare 0.5].")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Multiplies what is added to the base [default: 1].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of what dare drops [default: 0].")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the merged organ.")] = None,
    version: Annotated[str, typer.Option("--organ-version", help="Its semantic version.")] = "0.1.0",
    license: Annotated[str | None, typer.Option("--license", help="Its licence [default: those of all].")] = None,
    description: Annotated[str | None, typer.Option("--description", help="One line about it.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge organs that were made from the same layers into one organ that names its parents."""
    with _running(as_json, "reading the organs") as screen:
        from neurograft import merging, render

        merged = merging.merge(
            organs,
            output=output,
            method=method,
            weights=_numbers(weights),
            base=base,
            density=density,
            scale=scale,
            seed=seed,
            name=name,
            version=version,
            license=license,
            description=description,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(merged.manifest, lambda: render.manifest(merged.manifest, output.stat().st_size))


def _numbers(text: str | None) -> list[float] | None:
    """Read numbers separated by commas.

    Raises:
        UsageError: One is no number.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"the weights {text!r} can't be read; write numbers separated by commas.") from error


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="NAME=PATH", help="A data set and its name. Repeatable; one name twice is one data set."
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="A model to stand beside it.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Such as 'domain<=0.9*baseline'; exit status 1 if one fails. Repeatable."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in a window [default: 512, or as many as the models take]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="At most this many tokens of each data set.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on named data sets, beside a baseline, and hold it against gates."""
    with _running(as_json, "reading the text") as screen:
        from neurograft import evaluation, render
        from neurograft.progress import evaluation_line

        def show(done: int, total: int) -> None:
            if screen.status is not None:
                screen.status.update(evaluation_line(done, total))

        report = evaluation.evaluate(
            model,
            data=evaluation.parse_data_arguments(data),
            baseline=baseline,
            gates=gate or [],
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(report, lambda: render.evaluation(report))
    if report.passed is False:
        raise typer.Exit(EXIT_NO)


@app.command()
def scan(
    organ: OrganFile,
    recipient: Recipient,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="Domain text that the organ has not seen. Repeatable."),
    ],
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text, on which forgetting shows. Repeatable."),
    ] = None,
    modes: Annotated[str, typer.Option("--modes", help="replace, insert, or both.")] = "replace,insert",
    positions: Annotated[
        str | None,
        typer.Option("--positions", help="START:STOP, START:STOP:STEP (half-open from 0) or 3,5,8 [default: all]."),
    ] = None,
    prune: Annotated[
        Literal["halving", "evidence", "never"],
        typer.Option(
            "--prune",
            help="Who drops out between rounds: all but the better half; only places told apart from the best; nobody.",
        ),
    ] = "halving",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of each text in the whole sample, at most.")
    ] = 32_768,
    budget_seconds: Annotated[
        float | None, typer.Option("--budget-seconds", help="Stop after about so many seconds of measuring.")
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option("--budget-tokens", min=1, help="Run at most so many tokens, each counted once for each place."),
    ] = None,
    recover_tokens: Annotated[
        int | None,
        typer.Option(
            "--recover-tokens", min=1, help="Train the organ at each place on so many tokens before it is measured."
        ),
    ] = None,
    recover_data: Annotated[
        list[str] | None,
        typer.Option("--recover-data", metavar="PATH", help="Text for that; else half of the documents. Repeatable."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in a window [default: 512, or as many as the recipient takes]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of sample, bootstrap and recovery.")] = 0,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="This process, or workers of a Ray cluster (the extra neurograft[ray])."),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Ray workers [default: as many as there are cores here].")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of a Ray cluster: auto or HOST:PORT [default: one is started here]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report there too, as JSON.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Write curve and best place into the organ's file, as what it recommends."),
    ] = False,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure an organ at every position of a recipient, in both modes, at the price of a few evaluations."""
    with _running(as_json, "reading the organ") as screen:
        from neurograft import render
        from neurograft.placement import scan as scanning
        from neurograft.progress import scan_line

        def show(progress: Any) -> None:
            if screen.status is not None:
                screen.status.update(scan_line(progress))

        report = scanning.scan(
            organ,
            recipient,
            data=data,
            general=general or None,
            modes=modes,
            positions=positions,
            prune=prune,
            max_tokens=max_tokens,
            budget_seconds=budget_seconds,
            budget_tokens=budget_tokens,
            recover_tokens=recover_tokens,
            recover_data=recover_data or None,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            engine=engine,
            workers=workers,
            address=address,
            output=output,
            record=record,
            text_column=text_column,
            document_separator=document_separator,
            encoding=encoding,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
        screen.result(report, lambda: render.scan(report))


@app.command()
@partial(_WithTrainingOptions, without=lambda: ("protocol", "at", "rank", "host_precision", "offload"))
def recover(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory that transplant wrote.")],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="General or domain text to train on. Repeatable."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory to write.")],
    organ: Annotated[
        str | None, typer.Option("--organ", metavar="NAME", help="Around which organ, if there are several.")
    ] = None,
    scope: Annotated[
        Literal["organ", "neighbours", "seams"],
        typer.Option(
            "--scope",
            help="What trains: the organ's layers; also layers on each side; or only the vectors (weights of norms, "
            "biases) of its first layer and of the first one behind it.",
        ),
    ] = "organ",
    neighbours: Annotated[
        int | None, typer.Option("--neighbours", help="Layers on each side, for that scope [default: 1].")
    ] = None,
    unfreeze: Annotated[
        Literal["at_once", "gradual"],
        typer.Option(
            "--unfreeze",
            help="gradual: first the organ alone, then one more layer on each side a stage; each stage has an equal "
            "share of the budget.",
        ),
    ] = "at_once",
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="PATH", help="Held-out text; else a share of the documents."),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="PATH", help="Other text to measure before and after. Repeatable."),
    ] = None,
    save_organ: Annotated[
        Path | None, typer.Option("--save-organ", metavar="FILE", help="Write the recovered organ as well.")
    ] = None,
    text_column: TextColumn = "text",
    document_separator: Separator = None,
    encoding: Encoding = "utf-8",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train an organ where it stands, or what is around it; the original stays restorable to the bit."""
    with _running(as_json, "reading the model") as screen:
        from neurograft import recovery, render

        if not directory or not Path(directory).is_dir():
            raise UsageError(f"{directory!r} is no directory; give the one that transplant wrote.")
        with _training_display(screen) as progress:
            record = recovery.recover(
                directory,
                data=data,
                output=output,
                organ=organ,
                scope=scope,
                neighbours=neighbours,
                unfreeze=unfreeze,
                eval_data=eval_data or None,
                general=general or None,
                save_organ=save_organ,
                text_column=text_column,
                document_separator=document_separator,
                encoding=encoding,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **options,
            )
        screen.result(record, lambda: render.recovery(record, str(output)))


@app.command()
def remove(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory that transplant wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory to write.")],
    organ: Annotated[
        str | None, typer.Option("--organ", metavar="NAME", help="Which organ, if there are several.")
    ] = None,
    link: LinkOption = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Take an organ out again, and prove by digest that the original is back."""
    with _running(as_json, "reading the model") as screen:
        from neurograft import removal, render

        if not directory or not Path(directory).is_dir():
            raise UsageError(f"{directory!r} is no directory; give the one that transplant wrote.")
        result = removal.remove(
            directory, organ=organ, output=output, link=link, overwrite=overwrite, trust_remote_code=trust_remote_code
        )
        screen.result(result, lambda: render.removal(result))


@app.command()
def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Organ files, transplanted models, comparisons, and what scan or evaluate print with --json.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    title: Annotated[str | None, typer.Option("--title", help="Title of the page.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text that the models go on with. Repeatable.")
    ] = None,
    recipient: Annotated[
        str | None, typer.Option("--recipient", metavar="MODEL", help="A model that goes on with the prompts before.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="At most so many new tokens for each prompt.")] = 60,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page with pictures about organs, transplanted models and measurements."""
    with _running(as_json, "reading the sources") as screen:
        from neurograft import render
        from neurograft.reporting import writing

        written = writing.report(
            sources,
            output=output,
            title=title,
            prompts=prompt or [],
            recipient=recipient,
            tokens=tokens,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        screen.result(written, lambda: render.report(written))


@app.command()
def cache(
    clear: Annotated[
        Literal["gguf", "prefix", "scan", "studies", "organs", "demo", "all"] | None,
        typer.Option("--clear", help="Delete this kind: gguf, prefix, scan, studies, organs, demo or all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is kept to save time (dequantised models, hidden states below organs), or clear it."""
    with _running(as_json, "reading the cache") as screen:
        from neurograft import caching, render

        report = caching.cache(clear=clear)
        screen.result(report, lambda: render.cache(report))


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter run, under 90 seconds, with smaller gains.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where to leave the demo's files [default: a temporary folder]."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Play the whole story on a real model: a hospital trains an organ, another site tries it and removes it."""
    with _running(as_json, "looking for the packaged model and text") as screen:
        from neurograft import demonstration as story

        report = story.demo(quick=quick, folder=folder, show=None if as_json else screen.out.print)
        screen.result(report, lambda: story.closing_table(report))
    if not report.passed:
        raise typer.Exit(EXIT_NO)


def _modes(given: list[str] | None) -> Any:
    """Return the modes as typed; typer has no repeated choices.

    Raises:
        UsageError: One has another name.
    """
    for mode in given or []:
        if mode not in ("replace", "insert"):
            raise UsageError(f"the mode is {mode!r}; it can be replace or insert.")
    return given or None


def _terminate(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a polite end (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    _keep_only(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), ""))
    ranks.silence_all_but_first()
    status = _run()
    ranks.leave(status)
    sys.exit(status)


def _run() -> int:
    """Run the command line; return the exit status. With `--json`, wrong arguments are one JSON document too."""
    try:
        return int(app(standalone_mode=False) or 0)
    except _WrongArguments as error:
        if "--json" in sys.argv:
            message = " ".join(error.format_message().replace("Value error, ", "").split())
            sys.stdout.write(json.dumps({"error": {"kind": "UsageError", "message": message}}) + "\n")
        error.show()
        return EXIT_ERROR
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("error: interrupted; nothing was written.\n")
        return EXIT_INTERRUPTED


def _keep_only(verb: str) -> None:
    """Forget the other commands if this is one: reading all their options takes as long as many a command."""
    chosen = [command for command in app.registered_commands if command.callback.__name__ == verb]  # type: ignore[union-attr]
    if chosen:
        app.registered_commands = chosen
