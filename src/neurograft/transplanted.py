"""A transplanted model on disk, held against its surgical record."""

from __future__ import annotations

from dataclasses import dataclass

from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import ModelError, UsageError
from neurograft.files import combine_digests
from neurograft.manifest import RECORD_FILE, Operation, SurgicalRecord
from neurograft.models import ModelDirectory
from neurograft.record import read_record
from neurograft.studies import studying
from neurograft.undoing import choose_operation


@dataclass(frozen=True)
class Transplanted:
    """A transplanted model, and one organ in it."""

    checkpoint: Checkpoint
    record: SurgicalRecord
    operation: Operation
    digests: dict[str, str]
    """Tensor name -> digest."""
    own: list[int]
    """Numbers of the organ's layers in the model."""

    @classmethod
    def open(cls, source: ModelDirectory, organ: str | None, trust_remote_code: bool) -> Transplanted:
        """Read a model directory and its record, and hold one against the other.

        Raises:
            UsageError: No such organ, several and none named, or another organ replaced layers of it.
            ModelError: There is no record, the model is not what it describes, or its record has no digest of files
                that were linked and not read.
        """
        record = read_record(source.path)
        if record is None:
            raise ModelError(f"{source.path} has no {RECORD_FILE}: no organ was put into it by neurograft.")
        operation = choose_operation(record, organ)
        for other in record.operations:
            if any(origin is not None and origin.organ == operation.organ for origin in other.explant_origins):
                raise UsageError(
                    f"the organ {other.organ} replaced layers of {operation.organ}; recover around {other.organ}, or "
                    "remove it first."
                )
        if record.tensors_digest is None:
            raise ModelError(
                f"some files of {source.path} were linked and not read at the transplant, so nothing could prove later "
                "that recovery was undone; transplant again with --verify bytes."
            )
        with studying():
            checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
        digests = checkpoint.digests()
        if checkpoint.layer_count != len(record.layers) or combine_digests(digests) != record.tensors_digest:
            raise ModelError(
                f"{source.path} was changed since its {RECORD_FILE} was written, so what recovery changes could not be "
                "undone exactly; start from the directory that transplant wrote."
            )
        own = [number for number, origin in enumerate(record.layers) if origin.organ == operation.organ]
        return cls(checkpoint, record, operation, digests, own)

    @property
    def name(self) -> str:
        """The organ's name in this model."""
        return self.operation.organ

    @property
    def contiguous(self) -> bool:
        """Whether no other layers stand between the organ's."""
        return self.own == list(range(self.own[0], self.own[-1] + 1))
