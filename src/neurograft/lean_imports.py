"""Import torch and transformers without the parts that only training, compiling or running a model needs.

Building a model without weights uses little of torch, and importing all that transformers imports takes a third more
memory and time. This is for processes that do nothing else: `neurograft.studies` starts them. Whatever they can't
answer is asked again in a process that imports everything, so what is left out here may cost time and never an answer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Packages that transformers uses if they are there, and never to build a model from its configuration.
_LEFT_OUT = ("accelerate", "PIL", "jinja2", "scipy", "sklearn", "pandas", "peft", "datasets")
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"


def without_torch() -> None:
    """Let transformers find no torch: tokenizers need none."""
    sys.modules["torch"] = None  # type: ignore[assignment]


def for_skeletons() -> None:
    """Import torch and transformers for building models without weights."""
    for name in _LEFT_OUT:
        sys.modules[name] = None  # type: ignore[assignment]
    import torch

    _leave_out_compiler(torch)
    _leave_out_symbols(torch)
    torch.distributed.is_available = lambda: False
    import transformers  # noqa: F401


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stand for decorators that tell the compiler something about a function."""
    return (lambda decorated: decorated) if function is None else function


def _leave_out_compiler(torch: Any) -> None:
    """Let `torch._dynamo` hold only what transformers takes from it while it is imported."""
    tracing = ModuleType("torch._dynamo._trace_wrapped_higher_order_op")
    vars(tracing)["TransformGetItemToIndex"] = type("TransformGetItemToIndex", (), {})
    compiler = ModuleType("torch._dynamo")
    vars(compiler).update(__path__=[], assume_constant_result=_unchanged, allow_in_graph=_unchanged, disable=_unchanged)
    sys.modules.update({module.__name__: module for module in (compiler, tracing)})
    torch._dynamo = compiler
    torch.compiler.disable = _unchanged


def _leave_out_symbols(torch: Any) -> None:
    """Answer torch's questions about sizes that may be symbols where they are plain numbers, as here they always are.

    The module that answers them imports all of sympy.
    """
    symbols = _StandIn(_SYMBOLS, {name: _for_plain_numbers(name) for name in _ANSWERS})
    _StandIn("sympy", {"Basic": type("Basic", (), {})})  # torch asks whether a number is one of these
    torch.fx.experimental.symbolic_shapes = symbols


_ANSWERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("expect_true", "guard_bool", "guard_int", "guard_or_false", "guard_or_true", "guard_size_oblivious"),
        lambda value: value,
    ),
    **dict.fromkeys(("guarding_hint_or_throw", "statically_known_true"), lambda value: value),
    "has_guarding_hint": lambda _: True,
    "is_nested_int": lambda _: False,
    "sym_and": lambda *values: all(values),
    "sym_eq": lambda one, other: one == other,
    "sym_or": lambda *values: any(values),
}


def _for_plain_numbers(name: str) -> Callable[..., Any]:
    """Return a function that answers for plain numbers itself, and leaves the others to torch's."""

    def answer(*values: Any, **named: Any) -> Any:
        if not named and all(map(_is_plain, values)):
            return _ANSWERS[name](*values)
        return getattr(_really_import(_SYMBOLS), name)(*values, **named)

    return answer


def _is_plain(value: Any) -> bool:
    return type(value) in (bool, int) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _really_import(name: str) -> ModuleType:
    """Import a module that something else stands for."""
    present = sys.modules.get(name)
    if isinstance(present, _StandIn):
        del sys.modules[name]
        vars(present).pop("Basic", None)  # from here on there is the real one
    return importlib.import_module(name)


class _StandIn(ModuleType):
    """Stands for a module that takes long to import, until something is asked for that it has not."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(known)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name, self.__name__) != ("__path__", "sympy"):  # sympy is a package
            raise AttributeError(name)
        return getattr(_really_import(self.__name__), name)
