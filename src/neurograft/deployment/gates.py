"""The gates file: what a model has to show, against what is deployed, before it may take its place."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neurograft.errors import GateError
from neurograft.evaluation import Gate, parse_gate
from neurograft.files import read_bounded

Against = Literal["current", "base"]
_LARGEST = 1 << 20  # bytes
_NAME = re.compile(r"[\w.-]+")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _TextGate(_Part):
    data: str | list[str]
    """Files, folders or a Hub dataset id; a path is relative to the gates file."""
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    """At most about this many tokens, whole documents from the start."""
    text_column: str = "text"
    document_separator: str | None = None
    encoding: str = "utf-8"

    @field_validator("data")
    @classmethod
    def _some_data(cls, data: str | list[str]) -> str | list[str]:
        if not data:
            raise ValueError("it is empty; give at least one file, folder or Hub dataset id")
        return data


class PerplexityGate(_TextGate):
    """A limit on the perplexity on one data set, which the whole interval has to keep."""

    metric: Literal["perplexity"]
    limit: str
    """As in `evaluate --gate`, without the name: `<=0.98*baseline`, or `<20`."""
    against: Against = "current"
    """What `baseline` stands for: what is deployed now, or the model that the deployment started from."""

    @model_validator(mode="after")
    def _without_a_name(self) -> PerplexityGate:
        if not self.limit.lstrip().startswith(("<", ">")):
            raise ValueError(f"the limit is {self.limit!r}; write it without a name, such as <=0.98*baseline or <20")
        return self

    def parsed(self, name: str) -> Gate:
        """Return the limit in the form that `evaluate` uses."""
        return parse_gate(f"{name}{self.limit}")


class RetentionGate(_TextGate):
    """How much of what the model knew in general may be lost."""

    metric: Literal["retention"]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """By what share perplexity may rise; the whole interval of the ratio has to be below 1 + tolerance."""
    against: Against = "base"
    """The start, so that many small losses don't add up to a large one unseen."""


class TaskGate(_Part):
    """Scores on a task of lm-evaluation-harness, question by question."""

    metric: Literal["task"]
    task: str
    """Name of a task or a group, of the harness's own or in `tasks_from`."""
    tasks_from: str | None = None
    """Folder of local task files, relative to the gates file."""
    score: str | None = None
    """Which of the task's scores, such as `acc_norm`; left out, its first."""
    require: Literal["better", "not_worse"] = "not_worse"
    """`better`: shown to be better; `not_worse`: not shown to be worse, with `tolerance`: shown not to be by more."""
    tolerance: Annotated[float | None, Field(ge=0)] = None
    """By how much the mean score may be lower; the whole interval of the difference has to be above it."""
    at_least: float | None = None
    """A limit on the mean score itself, which its whole interval has to keep."""
    questions: Annotated[int | None, Field(ge=1)] = None
    """At most so many, from the start of each task."""
    shots: Annotated[int | None, Field(ge=0)] = None
    """Examples in the prompt; left out, what the task says."""
    against: Against = "current"

    @model_validator(mode="after")
    def _one_question(self) -> TaskGate:
        if self.require == "better" and self.tolerance is not None:
            raise ValueError("tolerance goes with require: not_worse")
        return self


AnyGate = PerplexityGate | RetentionGate | TaskGate
METRICS: dict[str, type[PerplexityGate] | type[RetentionGate] | type[TaskGate]] = {
    "perplexity": PerplexityGate,
    "retention": RetentionGate,
    "task": TaskGate,
}


class GateSettings(_Part):
    """What holds for all gates of a file."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of intervals and of tests."""
    sequence_length: Annotated[int | None, Field(ge=2)] = None
    """Tokens in a window; left out, 512, or as many as the models have positions."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0


class Gates(_Part):
    """A gates file."""

    settings: GateSettings = GateSettings()
    gates: dict[str, AnyGate]
    folder: Path
    """What paths are relative to."""
    digest: str
    """SHA-256 of the file."""

    def paths(self, gate: PerplexityGate | RetentionGate) -> list[str]:
        """Return a gate's data: paths beside the gates file, and what is not there as it is written."""
        given = [gate.data] if isinstance(gate.data, str) else gate.data
        return [str(beside) if (beside := self.folder / path).exists() else path for path in given]


def read_gates(path: str | Path) -> Gates:
    """Read a gates file.

    Raises:
        GateError: It is missing, no YAML, or says something that gates don't know.
    """
    path = Path(path)
    content = _read(path)
    raw = _parse_yaml(path, content)
    _refuse_unknown(str(path), raw, ("settings", "gates"))
    try:
        settings = GateSettings.model_validate(raw.get("settings") or {})
    except ValidationError as error:
        raise GateError(_sentence(f"the settings of {path}", error, GateSettings)) from error
    named = raw.get("gates")
    if not isinstance(named, dict) or not named:
        raise GateError(f"{path} has no gates; write at least one, as docs/deployment.md shows.")
    gates = {str(name): _read_gate(path, name, value) for name, value in named.items()}
    return Gates(settings=settings, gates=gates, folder=path.parent, digest=sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _LARGEST)
    except OSError as error:
        raise GateError(f"the gates file {path} can't be read: {error.strerror or error}.") from error


def _parse_yaml(path: Path, content: bytes) -> dict[Hashable, Any]:
    import yaml

    try:
        text = content.decode()
        _refuse_duplicates(path, yaml.compose(text, Loader=yaml.SafeLoader), set())
        raw = yaml.safe_load(text)
    except GateError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise GateError(f"the gates file {path} can't be read: {reason}.") from error
    if not isinstance(raw, dict):
        raise GateError(f"{path} has no gates; write at least one, as docs/deployment.md shows.")
    return raw


def _refuse_duplicates(path: Path, node: Any, seen: set[int]) -> None:
    """Refuse a key that is there twice, of which YAML would silently take the last.

    `seen` are the nodes that were looked at: by aliases, a few lines can name one more often than there are atoms.
    """
    import yaml

    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise GateError(f"{path} has {twice[0]!r} twice in the same place; keep one.")
        for _, value in node.value:
            _refuse_duplicates(path, value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(path, value, seen)


def _read_gate(path: Path, name: Hashable, value: Any) -> AnyGate:
    place = f"the gate {name} of {path}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GateError(f"{place} has a name that is none: use letters, digits, '.', '_' and '-'.")
    metric = value.get("metric") if isinstance(value, dict) else None
    if not isinstance(metric, str) or metric not in METRICS:
        found = "no metric" if metric is None else f"the metric {metric!r}"
        raise GateError(f"{place} has {found}; known are {', '.join(METRICS)}.")
    kind = METRICS[metric]
    _refuse_unknown(place, value, tuple(kind.model_fields))
    try:
        gate = kind.model_validate(value)
    except ValidationError as error:
        raise GateError(_sentence(place, error, kind)) from error
    if isinstance(gate, PerplexityGate):
        try:
            gate.parsed(name)
        except GateError as error:
            raise GateError(f"in {path}, {error}") from error
    return gate


def _refuse_unknown(place: str, value: Mapping[Hashable, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            raise GateError(f"{place} has the unknown key {key!r}; known are {', '.join(known)}.")


def _sentence(place: str, error: ValidationError, kind: type[BaseModel]) -> str:
    """Say what is wrong with the first thing that is."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part in kind.model_fields)
    if first["type"] == "missing":
        return f"{place} lacks {key}."
    if first["type"] == "extra_forbidden":
        return f"{place} has the unknown key {str(first['loc'][-1])!r}; known are {', '.join(kind.model_fields)}."
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place} can't be used: {key + ': ' if key else ''}{message[0].lower()}{message[1:]}."
