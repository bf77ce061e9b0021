"""Every error that neurograft raises on purpose: one root, a few kinds, each with a one-sentence message."""


class NeurograftError(Exception):
    """Root of all errors that neurograft raises on purpose; the command line prints its message and exits."""


class UsageError(NeurograftError, ValueError):
    """An argument is wrong: a layer range, a position, a mode, a gate, an output that already exists."""


class DiskError(NeurograftError, RuntimeError):
    """The disk is full, or does not let itself be written to."""


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


class DeploymentError(NeurograftError, RuntimeError):
    """A deployment folder does not allow what was asked for; nothing was changed."""


class DeploymentBusyError(DeploymentError):
    """Another operator is at work on the same deployment folder."""


class HistoryError(DeploymentError, ValueError):
    """The history of a deployment was altered, or is not that of what is deployed."""


class BankError(NeurograftError, RuntimeError):
    """Something is wrong with an organ bank; the kinds below say what."""


class BankUnreachableError(BankError):
    """There is no network, or the bank does not answer."""


class BankAccessError(BankError):
    """The bank refuses: no password, a wrong one, or too few rights."""


class NotInBankError(BankError, LookupError):
    """The bank has no such organ, version or tag."""


class NoBankError(NotInBankError):
    """There is no bank at all at this place."""


class VersionExistsError(BankError):
    """The bank has this version already, with other bytes; versions never change."""


class YankedError(BankError):
    """The version was taken back by who published it."""


class BankDigestError(BankError, ValueError):
    """What came out of a bank is not what was put in: it was altered on the way or there."""


class TrustError(NeurograftError, ValueError):
    """An organ is not signed by whom it should be, its signatures can't be read, or `trust.toml` can't."""


def first_line(error: BaseException) -> str:
    """Return what an error of a library says in one line, without a full stop; its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:  # which leaves out number and path
        return error.strerror
    line = next(iter(str(error).strip().splitlines()), "").strip()
    return line.removeprefix("Got: ").rstrip(".") or type(error).__name__  # so huggingface_hub begins some
