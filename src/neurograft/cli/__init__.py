"""The command line: each command parses, calls the public function of the same name, and prints.

torch and everything that imports it are imported inside the commands, so that `neurograft --help` is instant. Commands
are listed in the order in which their modules are imported here.
"""

from neurograft.cli import starting  # isort: skip
from neurograft.cli import organs, training, surgery, measuring, study, deployment, privacy, bank, trust, housekeeping  # noqa: F401, I001
from neurograft.cli.application import app, main

starting.done()

__all__ = ["app", "main"]
