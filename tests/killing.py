"""Work that is killed: in a child, forked from a process that has loaded everything, for speed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[Path], Any]


def fork(work: Work, place: Path, seconds: float | None) -> tuple[bool, float]:
    """Do the work in a child, kill it after so many seconds; return whether it was killed, and how long it took."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work(place)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(3)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError("the work failed by itself")
    return os.WIFSIGNALED(status), time.monotonic() - start
