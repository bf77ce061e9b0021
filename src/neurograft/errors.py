"""Every error that neurograft raises on purpose: one root, a few kinds, each with a one-sentence message."""


class NeurograftError(Exception):
    """Root of all errors that neurograft raises on purpose; the command line prints its message and exits."""


class UsageError(NeurograftError, ValueError):
    """An argument is wrong: a layer range, a position, a mode, a gate, an output that already exists."""


class OrganFileError(NeurograftError, ValueError):
    """An organ file is truncated, altered, foreign, from the future, or holds tensors that it should not."""


class ModelError(NeurograftError, ValueError):
    """A model can't be found, read, or cut into layers."""


class IncompatibleError(NeurograftError, ValueError):
    """An organ and a recipient do not fit; the message lists every finding that blocks."""


class DataError(NeurograftError, ValueError):
    """Text data is missing, empty, unreadable, or not in the expected shape."""


class GateError(NeurograftError, ValueError):
    """A deployment gate is not written in the form that gates have, or names what was not measured."""


class VerificationError(NeurograftError, RuntimeError):
    """A result was computed or written, checked, and found not to be what was promised."""
