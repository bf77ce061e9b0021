"""Numbers of a training run, for TensorBoard or trackio, through the trackers of `accelerate`; never any text."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurograft.errors import UsageError
from neurograft.training.options import TrainingOptions
from neurograft.training.processes import Processes

PROJECT = "neurograft"
# What options say about the run as a whole, and not about what is learnt.
_NOT_LOGGED = {"log_to", "log_dir", "checkpoint_every"}


class Tracking:
    """Writes a run's numbers where the options say, if they do; of several processes, the first writes.

    Args:
        processes: Made with `log_with` and `log_folder` of the same options.
        options: How the run trains, noted as its hyperparameters.
    """

    def __init__(self, processes: Processes, options: TrainingOptions) -> None:
        self.processes, self.options = processes, options

    def start(self, key: str) -> None:
        """Begin to log; until then, nothing is written.

        Args:
            key: The run's digest: one that goes on after an interruption is the same run. Empty if it has none.
        """
        processes, options = self.processes, self.options
        if options.log_to is None:
            return
        name = key[:12] or time.strftime("%Y%m%d-%H%M%S")
        shown = {k: v for k, v in options.model_dump(mode="json", exclude=_NOT_LOGGED).items() if v is not None}
        extra = {"name": name, "resume": "allow", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints where it writes
            processes.accelerator.init_trackers(
                PROJECT if options.log_to == "trackio" else f"{PROJECT}-{name}",
                config=shown,
                init_kwargs={"trackio": extra},
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note some numbers at an optimizer step."""
        self.processes.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is still in memory."""
        with contextlib.redirect_stdout(io.StringIO()):
            for tracker in self.processes.accelerator.trackers:
                tracker.finish()
                if tracker.name == "trackio" and self.processes.first:
                    importlib.import_module("trackio").finish()  # or it would do so, and print, when the program ends
        self.processes.accelerator.trackers = []


def check_tracker(options: TrainingOptions) -> None:
    """Refuse to log to what is not installed, and tell trackio where to write.

    Raises:
        UsageError: The package is missing, the folder is a file, or trackio writes somewhere else already.
    """
    if options.log_to is None:
        return
    if importlib.util.find_spec(options.log_to) is None:
        raise UsageError(
            f"--log-to {options.log_to} needs a package that is not installed: pip install "
            f"'neurograft[{options.log_to}]'."
        )
    if options.log_dir.exists() and not options.log_dir.is_dir():
        raise UsageError(f"--log-dir {options.log_dir} is a file; give a folder.")
    if options.log_to == "trackio":
        _place_trackio(options.log_dir)


def _place_trackio(folder: Path) -> None:
    """Set trackio's folder, which it takes from the environment once, when it is imported."""
    loaded: Any = sys.modules.get("trackio.utils")
    wanted = folder.resolve()
    if loaded is None:
        os.environ["TRACKIO_DIR"] = str(wanted)
    elif Path(loaded.TRACKIO_DIR).resolve() != wanted:
        raise UsageError(
            f"trackio writes to {loaded.TRACKIO_DIR} already in this process and can't write to {folder}; give the "
            "former as --log-dir."
        )
