"""Put an organ into a model directory; the result is checked before it gets its name."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from neurograft.byte_moves import Link
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.compat import check_checkpoint, refuse_blocked
from neurograft.errors import VerificationError
from neurograft.extraction import organ_from_checkpoint
from neurograft.files import (
    atomic_directory,
    check_output_directory,
    combine_digests,
)
from neurograft.manifest import (
    RECORD_FILE,
    Mode,
    SurgicalRecord,
    Verify,
)
from neurograft.model_files import Written, new_names, plan_files, write_model
from neurograft.models import (
    ModelDirectory,
    resolve,
)
from neurograft.number_formats import converted
from neurograft.organ import Organ, clean_name, open_organ
from neurograft.record import EXPLANT_FOLDER, make_record, unique_name
from neurograft.steps import Step, order_layers
from neurograft.streaming import loaded_to_ask
from neurograft.studies import studying
from neurograft.tensor_files import Piece, bytes_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")


def transplant(
    organ: str | Path | Organ,
    recipient: str | Path,
    *,
    at: int | None = None,
    mode: Mode | None = None,
    output: str | Path,
    link: Link = "auto",
    verify: Verify | Literal["auto"] = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> SurgicalRecord:
    """Put an organ into a recipient on disk; the result is a new plain transformers directory.

    The recipient is never changed. Bytes are copied, or linked, without loading the model: memory stays the same
    whatever its size. What `replace` took out is kept beside it, so that `remove` is exact.

    Args:
        organ: An organ, or the path of its file.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        at: Position, 0 to L; left out, the one that matches by weights, else the one that the organ recommends.
        mode: `replace` or `insert`; left out, what the organ recommends.
        output: Directory to write.
        link: What happens to files that stay as they are. `auto`: they share blocks with the recipient's where the file
            system can do that, and are copied elsewhere; `hard`: hard links where it can't; `copy`: always copied.
        verify: `written`: the plan, and a digest of every byte that is written; `bytes`: also of what is linked;
            `layers`: also every layer is asked the probe questions before and after, for which transformers runs both
            models, one after the other, with their layers on the disk where they are not small for the machine.
            `auto`: `layers` where the weights are plain and take at most a quarter of this machine's memory, else
            `bytes`; the surgical record says which it was.
        overwrite: Whether an existing model directory may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        The surgical record, also written as `neurograft.json`.

    Raises:
        UsageError: The position is out of range, or `output` exists or overlaps the recipient.
        OrganFileError, ModelError: An input can't be read or trusted.
        IncompatibleError: The organ does not fit.
        VerificationError: The result would compute something else; nothing was written.
    """
    output = Path(output)
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    check_output_directory(output, overwrite=overwrite, inputs=[directory.path])
    organ = organ if isinstance(organ, Organ) else open_organ(organ)
    with studying():
        checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
        log.info("checking %s against %s", organ.name, directory.name)
        report, config = check_checkpoint(
            organ, checkpoint, at=at, mode=mode, look_for_match=False, trust_remote_code=trust_remote_code
        )
        refuse_blocked(report)
        assert config is not None
        level = verify if verify != "auto" else "layers" if checkpoint.runs_easily else "bytes"
        operation = Surgery(organ, checkpoint, report.position, report.mode, link, level, trust_remote_code)
        return operation.write(config, output, overwrite=overwrite)


@dataclass(frozen=True)
class Surgery:
    """A transplant that was found possible."""

    organ: Organ
    checkpoint: Checkpoint
    at: int
    mode: Mode
    link: Link
    verify: Verify
    trust_remote_code: bool

    @property
    def steps(self) -> tuple[Step, ...]:
        """Where each layer of the result comes from."""
        return order_layers(self.checkpoint.layer_count, self.organ.layer_count, at=self.at, mode=self.mode)

    def write(self, config: str, output: Path, *, overwrite: bool) -> SurgicalRecord:
        """Write the result, check it and give it its name."""
        before = self._ask(self.checkpoint.directory) if self.verify == "layers" else None
        fitted = {name: converted(piece, dtype) for name, (piece, dtype) in self._dtypes().items()}
        files = plan_files(self.checkpoint, self.steps, fitted)
        leaving = self._leaving()
        with atomic_directory(output, overwrite=overwrite) as temporary:
            log.info("writing %s", output)
            written = write_model(
                self.checkpoint,
                files,
                config,
                temporary,
                link=self.link,
                read_linked=self.verify != "written",
                further_bytes=bytes_of(leaving.values()),
            )
            self._verify_organ(fitted, written)
            explant = self._write_explant(before, temporary)
            original = self._original_digests(written, leaving)
            record = make_record(
                self.organ, self.checkpoint, self.steps, self.at, written, original, temporary, explant, self.verify
            )
            (temporary / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            if before is not None:
                log.info("asking the result's layers the probe questions")
                self._verify_answers(before, self._ask(ModelDirectory(temporary, output.name)))
        return record

    def _dtypes(self) -> dict[str, tuple[Piece, str]]:
        """Return the organ's tensors, each with the dtype that the recipient's layers have there on disk."""
        dtypes = {inner: piece.dtype for inner, piece in self.checkpoint.layer_pieces(0).items()}
        plain = [piece.dtype for piece in self.checkpoint.layer_pieces(0).values() if piece.is_float]
        common = max(set(plain), key=plain.count) if plain else None
        return {
            name: (piece, dtypes.get(name.split(".", 2)[2], common or piece.dtype))
            for name, piece in self.organ.pieces.items()
        }

    def _leaving(self) -> dict[str, Piece]:
        """Return the recipient's tensors that `replace` takes out."""
        kept = new_names(self.checkpoint, self.steps)
        return {name: piece for name, piece in self.checkpoint.pieces.items() if name not in kept}

    def _original_digests(self, written: Written, leaving: Mapping[str, Piece]) -> dict[str, str | None]:
        """Return the digest of each of the recipient's tensors, as it was read to be copied."""
        kept = new_names(self.checkpoint, self.steps)
        return {**{old: written.digests[new] for old, new in kept.items()}, **self.checkpoint.digests_of(leaving)}

    def _verify_organ(self, fitted: Mapping[str, Piece], written: Written) -> None:
        """Check that the organ's bytes, as copied, are those that its file was checked to hold.

        Raises:
            VerificationError: The file was changed meanwhile.
        """
        if self.organ.path is None or dict(fitted) != dict(self.organ.pieces):
            return
        names = {
            f"layers.{step.layer}.": f"{self.checkpoint.layer_prefix}{position}."
            for position, step in enumerate(self.steps)
            if step.source == "organ"
        }
        copied = {
            name: written.digests[start + name.split(".", 2)[2]]
            for old, start in names.items()
            for name in fitted
            if name.startswith(old)
        }
        digests = {name: digest for name, digest in copied.items() if digest is not None}
        if combine_digests(digests) != self.organ.manifest.tensors_digest:
            raise VerificationError(f"{self.organ.path} was changed while it was copied; the result was not kept.")

    def _write_explant(self, before: _Measured | None, target: Path) -> str | None:
        """Save what `replace` takes out as an organ of its own; return its path relative to `target`."""
        old = self.checkpoint.directory.path / EXPLANT_FOLDER
        if old.is_dir():
            shutil.copytree(old, target / EXPLANT_FOLDER)
        if self.mode == "insert":
            return None
        name = unique_name(self.organ.name, self.checkpoint)
        explant = organ_from_checkpoint(
            self.checkpoint,
            range(self.at, self.at + self.organ.layer_count),
            answers=before.answers if before else None,
            dtype=before.dtype if before else "",
            name=clean_name(f"{name}-explant"[:96]),
            description=f"what {name} replaced",
            kind="explant",
        )
        (target / EXPLANT_FOLDER).mkdir(exist_ok=True)
        path = f"{EXPLANT_FOLDER}/{name}.safetensors"
        explant.save(target / path)
        return path

    def _ask(self, directory: ModelDirectory) -> _Measured:
        from neurograft import probe
        from neurograft.anatomy import describe

        log.info("asking the layers of %s the probe questions", directory.name)
        whole = self.checkpoint.runs_easily or self.checkpoint.packing is not None
        with loaded_to_ask(directory, whole=whole, trust_remote_code=self.trust_remote_code) as (model, unused):
            probe.refuse_future_leak(model, directory.name)
            answers = probe.probe_layers(model, describe(model).layers_path)
            return _Measured(answers, probe.cache_gap(model), str(model.dtype).removeprefix("torch."), unused)

    def _verify_answers(self, before: _Measured, after: _Measured) -> None:
        from neurograft.surgery import verify_graft

        if new := after.unused - before.unused:
            raise VerificationError(
                f"the result would hold tensors that its model has no place for, such as {sorted(new)[0]}; it was not "
                f"kept."
            )
        verify_graft(self.organ, self.steps, before.answers, after.answers, after.dtype)
        if after.cache_gap > max(10 * before.cache_gap, 1e-3):
            raise VerificationError(
                f"with the KV cache the result's logits are {after.cache_gap:.2g} of their size off (the recipient's: "
                f"{before.cache_gap:.2g}), so it was not kept."
            )


@dataclass(frozen=True)
class _Measured:
    """What a loaded model was seen to do."""

    answers: torch.Tensor
    cache_gap: float
    dtype: str
    unused: set[str]
    """Kinds of tensors in the files that the model has no place for."""
