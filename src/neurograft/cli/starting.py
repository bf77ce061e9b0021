"""What holds while the commands are imported; it comes before them."""

from __future__ import annotations

import os
import signal
import threading

# To find plugins pydantic reads the metadata of every installed package, which takes as long as reading a manifest.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

# Until a command can say what was interrupted, Ctrl-C ends it as it ends any program, and not in a traceback.
_handler = signal.getsignal(signal.SIGINT)
_ours = _handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
if _ours:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def done() -> None:
    """Leave Ctrl-C to the commands."""
    if _ours:
        signal.signal(signal.SIGINT, _handler)
