"""Put organs into a model directory; the result is checked before it gets its name."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
)
from neurograft.manifest import (
    RECORD_FILE,
    SurgicalRecord,
    Verify,
)
from neurograft.model_files import Written, new_names, plan_files, write_model
from neurograft.models import (
    ModelDirectory,
    resolve,
)
from neurograft.number_formats import converted
from neurograft.organ import Organ, clean_name
from neurograft.record import EXPLANT_FOLDER, combine_known, free_explant, make_record, read_record, unique_names
from neurograft.several import (
    Modes,
    Organs,
    Placement,
    Positions,
    each_place,
    in_order,
    numbers_of,
    open_organs,
    pieces_of_all,
    refuse_collisions,
    steps_of,
)
from neurograft.steps import Step
from neurograft.streaming import loaded_to_ask
from neurograft.studies import study_order, studying
from neurograft.tensor_files import Piece, bytes_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")


def transplant(
    organ: Organs,
    recipient: str | Path,
    *,
    at: Positions = None,
    mode: Modes = None,
    output: str | Path,
    link: Link = "auto",
    verify: Verify | Literal["auto"] = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> SurgicalRecord:
    """Put one or several organs into a recipient on disk; the result is a new plain transformers directory.

    The recipient is never changed. Bytes are copied, or linked, without loading the model: memory stays the same
    whatever its size. What `replace` took out is kept beside it, so that `remove` is exact. Several organs are put in
    at once, and each can leave again by itself.

    Args:
        organ: An organ, or the path of its file, or several of these.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        at: Position, 0 to L; left out, the one that matches by weights, else the one that the organ recommends. For
            several organs one each, `None` to leave it out; all are positions in the recipient as it is before. Of what
            is inserted at the same position, the first comes first.
        mode: `replace` or `insert`; left out, what the organ recommends. For several organs one for all, or one each.
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
        IncompatibleError: An organ does not fit, or two would stand in each other's way.
        VerificationError: The result would compute something else; nothing was written.
    """
    output = Path(output)
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    check_output_directory(output, overwrite=overwrite, inputs=[directory.path])
    with studying():
        checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
        placements, config = place_organs(organ, checkpoint, at=at, mode=mode, trust_remote_code=trust_remote_code)
        level = verify if verify != "auto" else "layers" if checkpoint.runs_easily else "bytes"
        operation = Surgery(tuple(placements), checkpoint, link, level, trust_remote_code)
        return operation.write(config, output, overwrite=overwrite)


def place_organs(
    organs: Organs, checkpoint: Checkpoint, *, at: Positions, mode: Modes, trust_remote_code: bool
) -> tuple[list[Placement], str]:
    """Decide where each organ goes, check each, and refuse what does not go together.

    Returns:
        The organs in the order in which they come to stand, and the `config.json` of the result.

    Raises:
        UsageError, OrganFileError, IncompatibleError: See `transplant`.
    """
    opened = open_organs(organs)
    placements, config = [], None
    for organ, (position, chosen) in zip(opened, each_place(at, mode, len(opened)), strict=True):
        log.info("checking %s against %s", organ.name, checkpoint.directory.name)
        report, config = check_checkpoint(
            organ, checkpoint, at=position, mode=chosen, look_for_match=False, trust_remote_code=trust_remote_code
        )
        refuse_blocked(report)
        _say_if_there(organ, checkpoint)
        placements.append(Placement(organ, report.position, report.mode))
    refuse_collisions(placements, checkpoint.layer_count)
    placements = in_order(placements)
    if len(placements) > 1:
        config = config_of(placements, checkpoint, trust_remote_code=trust_remote_code)
    assert config is not None
    return placements, config


def _say_if_there(organ: Organ, checkpoint: Checkpoint) -> None:
    record = read_record(checkpoint.directory.path)
    operations = record.operations if record is not None else []
    there = {each.position for each in operations if each.organ_file_digest == organ.manifest.file_digest}
    if there:
        places = ", ".join(map(str, sorted(there)))
        log.warning("%s is in %s already, at position %s", organ.name, checkpoint.directory.name, places)


def config_of(placements: Sequence[Placement], checkpoint: Checkpoint, *, trust_remote_code: bool) -> str:
    """Return the `config.json` of a recipient with several organs in it.

    Raises:
        IncompatibleError: Some layer would compute something else beside the other organs.
    """
    layers = [
        (placement.organ.manifest, layer) for placement in placements for layer in range(placement.organ.layer_count)
    ]
    steps = steps_of(placements, checkpoint.layer_count)
    return study_order(checkpoint.directory, steps, layers, trust_remote_code=trust_remote_code).config


@dataclass(frozen=True)
class Surgery:
    """A transplant that was found possible."""

    placements: tuple[Placement, ...]
    """The organs, in the order in which they come to stand."""
    checkpoint: Checkpoint
    link: Link
    verify: Verify
    trust_remote_code: bool

    @property
    def steps(self) -> tuple[Step, ...]:
        """Where each layer of the result comes from; the organs' layers are numbered through."""
        return steps_of(self.placements, self.checkpoint.layer_count)

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
            explants = self._write_explants(before, temporary)
            original = self._original_digests(written, leaving)
            record = make_record(
                self.placements, self.checkpoint, self.steps, written, original, temporary, explants, self.verify
            )
            (temporary / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            if before is not None:
                log.info("asking the result's layers the probe questions")
                self._verify_answers(before, self._ask(ModelDirectory(temporary, output.name)))
        return record

    def _dtypes(self) -> dict[str, tuple[Piece, str]]:
        """Return the organs' tensors, each with the dtype that the recipient's layers have there on disk."""
        dtypes = {inner: piece.dtype for inner, piece in self.checkpoint.layer_pieces(0).items()}
        plain = [piece.dtype for piece in self.checkpoint.layer_pieces(0).values() if piece.is_float]
        common = max(set(plain), key=plain.count) if plain else None
        return {
            name: (piece, dtypes.get(name.split(".", 2)[2], common or piece.dtype))
            for name, piece in pieces_of_all(self.placements).items()
        }

    @cached_property
    def _kept(self) -> dict[str, str]:
        """The recipient's tensors that stay, name there -> name in the result."""
        return new_names(self.checkpoint, self.steps)

    def _leaving(self) -> dict[str, Piece]:
        """Return the recipient's tensors that `replace` takes out."""
        return {name: piece for name, piece in self.checkpoint.pieces.items() if name not in self._kept}

    def _original_digests(self, written: Written, leaving: Mapping[str, Piece]) -> dict[str, str | None]:
        """Return the digest of each of the recipient's tensors, as it was read to be copied."""
        stay = {old: written.digests[new] for old, new in self._kept.items()}
        return {**stay, **self.checkpoint.digests_of(leaving)}

    def _verify_organ(self, fitted: Mapping[str, Piece], written: Written) -> None:
        """Check that the organs' bytes, as copied, are those that their files were checked to hold.

        Raises:
            VerificationError: A file was changed meanwhile.
        """
        positions = [position for position, step in enumerate(self.steps) if step.source == "organ"]
        for placement, numbers in numbers_of(self.placements):
            organ, digests, as_it_is = placement.organ, dict[str, str | None](), True
            if organ.path is None:
                continue
            for name, piece in organ.pieces.items():
                _, layer, inner = name.split(".", 2)
                number = numbers[int(layer)]
                as_it_is &= fitted[f"layers.{number}.{inner}"] == piece
                digests[name] = written.digests[f"{self.checkpoint.layer_prefix}{positions[number]}.{inner}"]
            if as_it_is and combine_known(digests) != organ.manifest.tensors_digest:
                raise VerificationError(f"{organ.path} was changed while it was copied; the result was not kept.")

    def _write_explants(self, before: _Measured | None, target: Path) -> list[str | None]:
        """Save what each `replace` takes out as an organ of its own.

        Returns:
            For each placement the path relative to `target`, `None` for what is inserted.
        """
        old = self.checkpoint.directory.path / EXPLANT_FOLDER
        if old.is_dir():
            shutil.copytree(old, target / EXPLANT_FOLDER)
        names = unique_names(self.placements, self.checkpoint)
        return [
            None if placement.mode == "insert" else self._write_explant(placement, name, before, target)
            for placement, name in zip(self.placements, names, strict=True)
        ]

    def _write_explant(self, placement: Placement, name: str, before: _Measured | None, target: Path) -> str:
        explant = organ_from_checkpoint(
            self.checkpoint,
            range(placement.at, placement.stop),
            answers=before.answers if before else None,
            dtype=before.dtype if before else "",
            name=clean_name(f"{name}-explant"[:96]),
            description=f"what {name} replaced",
            kind="explant",
        )
        (target / EXPLANT_FOLDER).mkdir(exist_ok=True)
        path = free_explant(name, target)
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
        organs = [placement.organ for placement in self.placements]
        verify_graft(organs, self.steps, before.answers, after.answers, after.dtype)
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
