"""What an interrupted training run leaves beside its output, so that the same command goes on from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from neurograft.arithmetic import Attention, Kernels
from neurograft.errors import UsageError
from neurograft.files import atomic_file, clear_left

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

_METADATA_KEY = "neurograft-run"


class Notes(BaseModel):
    """What a run that is measured has noted so far; see `neurograft.training.measuring`."""

    model_config = ConfigDict(extra="forbid")

    evaluating: float = 0.0
    """Seconds of the run that went into held-out evaluations."""
    began: dict[int, float] = {}
    """Seconds of training, evaluations left out, at which the evaluation at each step began."""
    training_losses: dict[int, float] = {}
    """Loss on the training text that is watched, nats per token, at the same steps."""
    memory_beyond_model: int = 0
    """Bytes: the peak, less what the process held once the model was loaded."""
    memory_with_model: int = 0
    """Bytes: the peak of the whole process."""


class RunState(BaseModel):
    """Where a run stands, but for its tensors."""

    model_config = ConfigDict(extra="forbid")

    key: str
    """Digest of all that the run depends on: options, text, organ and host."""
    kernels: list[Kernels] = []
    """How matrices are multiplied while training, and while evaluating."""
    attention: Attention = "fused"
    """How the model attends while training."""
    compiled: bool | None = None
    """Whether the layers are compiled; `None` if that was not decided yet."""
    step: int = 0
    """Optimizer steps that were done."""
    tokens_seen: int = 0
    seconds: float = 0.0
    window: list[float] = []
    """Training losses of the steps since the last evaluation, nats per token."""
    losses: list[tuple[int, float]] = []
    """(step, mean training loss since the evaluation before it, nats per token)."""
    held_out: list[tuple[int, float]] = []
    """(step, mean held-out loss, nats per token), from step 0."""
    best: int = 0
    """Index of the best entry of `held_out`."""
    secret: str = ""
    """Of a private run, in hexadecimal: what its choice of documents and its noise come from."""
    notes: Notes = Notes()


def forget_state(path: Path) -> None:
    """Delete the state of a run that is done, with what processes that were killed while they wrote it have left."""
    path.unlink(missing_ok=True)
    clear_left(path, new=True)


def state_path(output: Path) -> Path:
    """Return where the state of a run that writes `output` lies."""
    return output.with_name(f"{output.name}.resume")


def save_state(path: Path, state: RunState, tensors: dict[str, torch.Tensor]) -> None:
    """Write a run's state and tensors as one safetensors file, atomically.

    Only the user may read it: with what a private run keeps secret, its noise could be taken out again.

    Raises:
        NeurograftError: The disk is full or the folder can't be written to.
    """
    from safetensors.torch import save_file

    with atomic_file(path, overwrite=True, private=True) as temporary:
        save_file(tensors, temporary, metadata={_METADATA_KEY: state.model_dump_json()})


def load_state(path: Path, key: str) -> tuple[RunState, dict[str, torch.Tensor]] | None:
    """Read what an interrupted run left; `None` if there is nothing.

    Args:
        path: The file.
        key: The digest of what the present run depends on.

    Raises:
        UsageError: The file is of another run, or can't be read.
    """
    with _opened(path, key) as found:
        if found is None:
            return None
        state, stream = found
        return state, {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


def forget_unreadable(path: Path, key: str) -> None:
    """Delete the state of a run, and say so, if no run can go on from it."""
    try:
        with _opened(path, key):
            pass
    except UsageError as error:
        log.warning("a run begins anew: %s", str(error).partition(";")[0])
        forget_state(path)


@contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[RunState, Any] | None]:
    """Open the file of a run's state; its tensors are not read yet."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        yield None
        return
    try:
        with safe_open(path, framework="pt") as stream:
            state = RunState.model_validate(json.loads((stream.metadata() or {})[_METADATA_KEY]))
            if state.key == key:
                yield state, stream
                return
    except (SafetensorError, ValidationError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"{path} is not what an interrupted training run leaves; delete it to begin anew.") from error
    raise UsageError(
        f"{path} is what an interrupted run with other options, text, organ or host left; give those again to go on, "
        "or delete it to begin anew."
    )
