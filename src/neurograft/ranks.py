"""Which of several processes this is, told by the launcher alone, and which of them speaks.

Knows nothing of torch until something goes wrong, so that the command line starts fast.
"""

from __future__ import annotations

import datetime
import os
import sys

from neurograft.errors import UsageError


def rank() -> int:
    """Return this process's number among those that `torchrun` or `accelerate launch` started; 0 if it is alone."""
    return int(os.environ.get("RANK", "0")) if several() else 0


def several() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_several(verb: str) -> None:
    """Refuse to go on as one of several processes.

    Raises:
        UsageError: A launcher started several.
    """
    if several():
        raise UsageError(f"{verb} runs in one process; start it without torchrun or accelerate launch.")


def silence_all_but_first() -> None:
    """Let every process but the first write to nowhere; `original_streams` undoes it."""
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def leave(status: int) -> None:
    """End this process with an exit status if it is one of several; where it is alone, do nothing.

    Python does not take itself apart then: threads of torch's process groups may still hold tensors, and one that asks
    for the interpreter while it goes aborts the process (`terminate called without an active exception`), which
    launchers report as a failure of what was done and written.
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def original_streams() -> None:
    """Let this process write again, if it was silenced."""
    if rank() == 0:
        return
    sys.stdout, sys.stderr = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr


def claim_failure() -> bool:
    """Claim to be the process whose error is shown; only the first that asks may show one.

    Often all processes fail alike, or the others fail because one did. The launcher's own store, which outlives them,
    keeps count. Where it can't be reached, an error shown twice is better than none.
    """
    if not several():
        return True
    import torch.distributed as distributed

    attempt = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    try:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
        )
        return bool(store.add(f"neurograft/failures/{attempt}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):
        return True
