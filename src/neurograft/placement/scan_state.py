"""What an interrupted scan leaves in the cache, so that the same command goes on from there."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from neurograft.arithmetic import Kernels
from neurograft.files import atomic_file, explained_os_errors
from neurograft.models import cache_directory
from neurograft.placement.candidates import Candidate
from neurograft.placement.results import Stopped

RECIPIENT = "recipient"
Losses = dict[str, list[float]]
"""Label of a place, or `recipient` -> for each window of a batch the sum of its losses in nats."""


class RoundRecord(BaseModel):
    """A round that is over."""

    model_config = ConfigDict(extra="forbid")

    left_out: dict[str, Stopped]
    """Places that the budget left out of it."""
    batches: list[str]
    """Names of the batches that were run."""
    dropped: dict[str, Stopped]
    """Places that dropped out after it."""


class ScanState(BaseModel):
    """Where a scan stands."""

    model_config = ConfigDict(extra="forbid")

    kernels: Kernels | None = None
    """How matrices are multiplied."""
    seconds: float = 0.0
    running_seconds: float = 0.0
    """Of these, those spent on running batches."""
    passes: int = 0
    tokens: int = 0
    """Tokens run, each once for each place and for the recipient alone."""
    recovered: int = 0
    """Tokens that organs were trained on."""
    unrecovered: dict[str, Stopped] | None = None
    """Places where the budget did not allow a recovery; `None` until all others have recovered."""
    rounds: list[RoundRecord] = []
    left_out: dict[str, Stopped] | None = None
    """Places that the budget leaves out of the round that is running; `None` between two rounds."""
    batches: dict[str, Losses] = {}
    """Name of a batch -> its losses."""
    ended: bool = False
    """Whether the budget ended the scan after these rounds."""


class ScanFolder:
    """Where a scan keeps what it has, while it is not finished.

    Args:
        key: Digest of everything that the scan depends on.
    """

    def __init__(self, key: str) -> None:
        self.path = cache_directory() / "scan" / key[:32]

    def load(self) -> ScanState:
        """Return what an interrupted scan left; an empty state if there is nothing that can be read."""
        try:
            return ScanState.model_validate_json((self.path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValidationError, ValueError):
            return ScanState()

    def save(self, state: ScanState) -> None:
        """Write the state, atomically.

        Raises:
            NeurograftError: The disk is full or the folder can't be written to.
        """
        self._make()
        with atomic_file(self.path / "state.json", overwrite=True) as temporary:
            temporary.write_text(state.model_dump_json(), encoding="utf-8")

    def weights_path(self, candidate: Candidate) -> Path:
        """Return where the organ's parameters after recovery at a place lie."""
        return self.path / f"{candidate.mode}-{candidate.position}.safetensors"

    def keep_weights(self, candidate: Candidate, data: bytes) -> None:
        """Write the organ's parameters after recovery at a place, as a safetensors file, atomically."""
        self._make()
        with atomic_file(self.weights_path(candidate), overwrite=True) as temporary:
            temporary.write_bytes(data)

    def drop_weights(self, candidate: Candidate) -> None:
        """Delete them: the place is out."""
        self.weights_path(candidate).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything: the scan is finished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _make(self) -> None:
        with explained_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
