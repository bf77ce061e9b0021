"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from neurograft.errors import UsageError

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


def modes(given: list[str] | None) -> Any:
    """Return the modes as typed; typer has no repeated choices.

    Raises:
        UsageError: One has another name.
    """
    for mode in given or []:
        if mode not in ("replace", "insert"):
            raise UsageError(f"the mode is {mode!r}; it can be replace or insert.")
    return given or None
