"""Commands that take all options of training: one for each field of `TrainingOptions`."""

from __future__ import annotations

import inspect as introspection
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, get_args

import typer


class WithTrainingOptions:
    """A command whose `**options` stand for an option for each field of `TrainingOptions`: names, defaults and help.

    They are read when somebody looks at the command's signature; commands that move bytes must not wait for that.
    """

    def __init__(self, command: Callable[..., None], without: Callable[[], Collection[str]] = tuple) -> None:
        self._command = command
        self._without = without
        self.__name__ = command.__name__
        self.__doc__ = command.__doc__

    def __call__(self, **arguments: Any) -> None:
        """Run the command."""
        self._command(**arguments)

    @property
    def __signature__(self) -> introspection.Signature:
        return _signature_with_options(self._command, self._without())

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: parameter.annotation for name, parameter in self.__signature__.parameters.items()}


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
