"""Take an organ out of a transplanted model directory, and prove that the original is back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from neurograft import __version__
from neurograft.byte_moves import Link
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import ModelError, OrganFileError, VerificationError
from neurograft.files import (
    atomic_directory,
    check_output_directory,
    file_sha256,
)
from neurograft.manifest import (
    RECORD_FILE,
    SCHEMA_VERSION,
    Digest,
    ExplantLayer,
    Manifest,
    Operation,
    Origin,
    SurgicalRecord,
)
from neurograft.model_files import Written, plan_files, seal_of, write_model
from neurograft.models import resolve
from neurograft.organ import open_organ
from neurograft.record import EXPLANT_FOLDER, combine_known, layer_digests, read_record
from neurograft.steps import Step
from neurograft.studies import study_order, studying
from neurograft.tensor_files import Piece
from neurograft.undoing import (
    OldLayer,
    choose_operation,
    explants_of,
    label_of,
    layers_without,
    operations_without,
    recoveries_without,
)

log = logging.getLogger("neurograft")


class Removal(BaseModel):
    """What `remove` did, and its proof."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    organ: str
    output: str
    original_restored: bool
    """Whether this was the last organ, so that the directory holds the original recipient again."""
    tensors_digest: Digest | None
    """`None` where files were linked at the transplant and never read."""
    config_digest: Digest
    expected_tensors_digest: Digest | None
    """The original's, from the surgical record; `None` while other organs are left."""
    expected_config_digest: Digest | None
    organs_left: list[str]
    linked: list[str]
    """Files that the transplant linked and did not read, so that no digest can be compared; their size and the time of
    their last change are as they were then."""


@dataclass(frozen=True)
class _Explanted:
    """Layers out of several explants, numbered as if they were one organ's; their bytes stay where they are."""

    numbers: dict[ExplantLayer, int]
    pieces: dict[str, Piece]
    """`layers.{number}.{name}` -> tensor."""
    places: list[tuple[Manifest, int]]
    """For each layer the manifest of its explant, and its number there."""

    @classmethod
    def open(cls, folder: Path, layers: Sequence[OldLayer]) -> _Explanted:
        """Open the explants, relative to `folder`, that some layers of the model without an organ come from.

        Raises:
            OrganFileError: One is missing, altered, or lacks a layer.
        """
        wanted = [layer.source for layer in layers if isinstance(layer.source, ExplantLayer)]
        paths = dict.fromkeys(source.path for source in wanted)
        organs = {path: open_organ(folder / path, for_use=False) for path in paths}  # the model's own, unsigned
        opened = cls({}, {}, [])
        for number, source in enumerate(wanted):
            organ = organs[source.path]
            if source.layer >= organ.layer_count:
                raise OrganFileError(f"{folder / source.path} has {organ.layer_count} layers, and one more is needed.")
            opened.numbers[source] = number
            opened.pieces.update({f"layers.{number}.{n}": p for n, p in organ.layer_pieces(source.layer).items()})
            opened.places.append((organ.manifest, source.layer))
        return opened

    def steps(self, layers: Sequence[OldLayer]) -> tuple[Step, ...]:
        """Say where each layer of the model without the organ comes from."""
        return tuple(
            Step("organ", self.numbers[layer.source])
            if isinstance(layer.source, ExplantLayer)
            else Step("recipient", layer.source)
            for layer in layers
        )


def remove(
    directory: str | Path,
    *,
    organ: str | None = None,
    output: str | Path,
    link: Link = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Removal:
    """Take an organ out of a transplanted model directory, and prove by digest that nothing of it is left.

    Args:
        directory: A directory that `transplant` or `recover` wrote.
        organ: Which organ, by name; may be left out where there is only one.
        output: Directory to write.
        link: What happens to files that stay as they are; see `transplant`.
        overwrite: Whether an existing model directory may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        UsageError: No such organ, several and none named, another has to go first, or `output` exists or overlaps the
            input.
        ModelError: The directory holds no transplanted model.
        OrganFileError: An explant is missing or altered.
        VerificationError: The result is not the original's to the bit, because the model was changed since; nothing was
            written.
    """
    source, output = resolve(directory, trust_remote_code=trust_remote_code), Path(output)
    check_output_directory(output, overwrite=overwrite, inputs=[source.path])
    record = read_record(source.path)
    if record is None:
        raise ModelError(f"{source.path} has no {RECORD_FILE}: no organ was put into it by neurograft.")
    operation = choose_operation(record, organ)
    with studying():
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
        if checkpoint.layer_count != len(record.layers):
            raise ModelError(
                f"{source.path} has {checkpoint.layer_count} layers and its {RECORD_FILE} describes "
                f"{len(record.layers)}."
            )
        old = layers_without(record, operation)
        explanted = _Explanted.open(source.path, old)
        excision = _Excision(checkpoint, record, operation, old, explanted, link, trust_remote_code)
        return excision.write(output, overwrite=overwrite)


@dataclass(frozen=True)
class _Excision:
    """A removal that was found possible."""

    checkpoint: Checkpoint
    record: SurgicalRecord
    operation: Operation
    old: Sequence[OldLayer]
    """What each layer of the model without the organ is."""
    explanted: _Explanted
    link: Link
    trust_remote_code: bool

    @property
    def left(self) -> list[Operation]:
        """The transplants that stay."""
        return operations_without(self.record, self.operation)

    def write(self, output: Path, *, overwrite: bool) -> Removal:
        """Write the model without the organ, prove what it is, and give it its name."""
        steps, origins = self.explanted.steps(self.old), [layer.origin for layer in self.old]
        self._refuse_changed_links()
        files = plan_files(self.checkpoint, steps, self.explanted.pieces)
        config = self.record.original_config if not self.left else self._config(steps)
        with atomic_directory(output, overwrite=overwrite) as temporary:
            log.info("writing %s", output)
            # Only what has a digest in the record can be compared, and only that need be read where it is linked.
            read = self.record.original_tensors_digest is not None
            written = write_model(self.checkpoint, files, config, temporary, link=self.link, read_linked=read)
            self._prove_layers(written, origins)
            if self.left:
                self._write_rest(written, origins, temporary)
            return self._prove(written, temporary, output)

    def _config(self, steps: Sequence[Step]) -> str:
        directory, places = self.checkpoint.directory, self.explanted.places
        return study_order(directory, steps, places, trust_remote_code=self.trust_remote_code).config

    def _prove_layers(self, written: Written, origins: Sequence[Origin]) -> None:
        """Compare every layer, as it was copied, with the digest in the record.

        Raises:
            VerificationError: A layer was changed since the transplant.
        """
        digests = layer_digests(written.digests, self.checkpoint.layer_prefix, len(origins))
        for origin, digest in zip(origins, digests, strict=True):
            if None not in (digest, origin.digest) and digest != origin.digest:
                raise VerificationError(
                    f"{label_of(origin)} was changed since the transplant, so removing {self.operation.organ} would "
                    f"not restore it; nothing was written."
                )

    def _write_rest(self, written: Written, origins: list[Origin], target: Path) -> None:
        """Write what lies beside a model that still holds other organs: their explants and the record."""
        recoveries, left = recoveries_without(self.record, self.operation.organ), self.left
        for path in explants_of(left, recoveries):
            (target / EXPLANT_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(self.checkpoint.directory.path / path, target / path)
        update = {
            "schema_version": SCHEMA_VERSION,
            "layers": origins,
            "operations": left,
            "recoveries": recoveries,
            "tensors_digest": combine_known(written.digests),
            "config_digest": file_sha256(target / "config.json"),
            "neurograft_version": __version__,
            "linked": written.linked,
        }
        record = self.record.model_copy(update=update)
        (target / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _prove(self, written: Written, target: Path, output: Path) -> Removal:
        """Compare the digests of what was written with those of the original.

        Raises:
            VerificationError: They differ.
        """
        tensors, config = combine_known(written.digests), file_sha256(target / "config.json")
        expected = self.record.original_tensors_digest
        if not self.left and (config != self.record.original_config_digest or None is not expected != tensors):
            raise VerificationError(
                f"without {self.operation.organ} the tensors of {self.checkpoint.directory.path} are not the "
                f"original's: tensors outside the layers were changed since the transplant; nothing was written."
            )
        return Removal(
            organ=self.operation.organ,
            output=str(output),
            original_restored=not self.left,
            tensors_digest=tensors,
            config_digest=config,
            expected_tensors_digest=expected if not self.left else None,
            expected_config_digest=self.record.original_config_digest if not self.left else None,
            organs_left=[other.organ for other in self.left],
            linked=sorted(self.record.linked),
        )

    def _refuse_changed_links(self) -> None:
        """Refuse files that have no digest in the record and were written to since they were linked.

        Raises:
            VerificationError: Names the file.
        """
        for name, seal in self.record.linked.items():
            if seal != seal_of(self.checkpoint.directory.path / name):
                raise VerificationError(
                    f"{name} was linked and not read at the transplant, and its size or time has changed since, so "
                    f"nothing can prove that it is the original's; nothing was written."
                )
