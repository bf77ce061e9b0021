"""Attack an organ as somebody would who has it, and say how much of its training text it gives away."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from neurograft import data as text_data
from neurograft.bank.references import is_reference
from neurograft.compat import refuse_findings, tokenizer_findings
from neurograft.errors import DataError, UsageError, VerificationError
from neurograft.evaluation import DEFAULT_LENGTH
from neurograft.manifest import Audit, CanaryFigures, Digest, Manifest, Mode
from neurograft.models import (
    fingerprint_tokenizer,
    fit_sequence_length,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)
from neurograft.organ import Organ, now, open_organ, organ_path, read_organ
from neurograft.privacy import canaries as planted
from neurograft.privacy import membership, verbatim
from neurograft.privacy.scoring import ScoredDocument, score_documents
from neurograft.steps import recommended_place
from neurograft.trust.signature_files import signature_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")

Progress = Callable[[int, int], None]
FEWEST_DOCUMENTS = 2
PREFIX = LENGTH = 32


class AuditReport(BaseModel):
    """What an audit found, and of which organ."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    organ: str
    version: str
    tensors_digest: Digest
    audit: Audit
    recorded: bool
    fingerprinted: bool
    """Whether the manifest says, by a fingerprint, what text some training was on; a private one leaves it out."""
    signatures_void: bool
    """Whether there are signatures beside the organ's file, which are of the file as it was before."""
    """Whether the organ's manifest holds it."""


@dataclass(frozen=True)
class _Texts:
    """What is asked about; three lists of documents."""

    members: list[str]
    others: list[str]
    canaries: planted.Canaries | None
    verified: bool
    """Whether the members are those that the manifest's fingerprint stands for."""

    @property
    def all(self) -> list[str]:
        """All documents: members, others, included canaries, canaries that were left out."""
        found = [*self.members, *self.others]
        return found if self.canaries is None else [*found, *self.canaries.included, *self.canaries.left_out]


def audit(
    organ: str | Path | Organ,
    *,
    host: str | Path,
    members: str | Path | Sequence[str | Path],
    non_members: str | Path | Sequence[str | Path],
    canaries: str | Path | None = None,
    at: int | None = None,
    mode: Mode | None = None,
    prefix: int = PREFIX,
    length: int = LENGTH,
    delta: float = 1e-5,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_documents: int | None = None,
    record: bool = False,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    seed: int = 0,
    bootstrap_samples: int = 1000,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> AuditReport:
    """Find out whether an organ gives away its training text: membership inference, extraction, planted canaries.

    Args:
        organ: An organ, the path of its file, or one in a bank.
        host: The model that it is put into, best the one that it was trained in; also the reference without it.
        members: What it was trained on: the `data` of its training. If a share of that was held out from training,
            which the manifest tells, it is left out here too.
        non_members: Text of the same kind that it was not trained on.
        canaries: Secret file of `plant`, if its canaries were trained on.
        at: Position; left out, what the organ recommends.
        mode: `replace` or `insert`; left out, what the organ recommends.
        prefix: Tokens of a document that are given, at least, before it is to be recited.
        length: Tokens in a row that must be recited.
        delta: Of the differential privacy that the canaries test.
        sequence_length: Tokens in a window; left out, 512, or as many as the host has positions.
        batch_size: Windows in a forward pass.
        max_documents: At most so many members and so many others, drawn by `seed`.
        record: Whether the figures are written into the organ's own file.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        seed: Seed of what is drawn, and of the bootstrap.
        bootstrap_samples: How often documents are drawn anew.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all).

    Raises:
        UsageError: A number is out of range, or there is no file to record in.
        DataError: Text or canaries can't be read, a document is both a member and none, or canaries were not trained
            on.
        IncompatibleError: The organ does not fit the host.
        OrganFileError, ModelError: Organ or host can't be read.
        VerificationError: The file changed meanwhile; nothing was recorded.
    """
    _check_numbers(prefix=prefix, length=length, delta=delta, seed=seed, samples=bootstrap_samples, most=max_documents)
    path = _recordable(organ) if record else None
    organ = organ if isinstance(organ, Organ) else read_organ(organ_path(organ))
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    texts = _read(organ.manifest, members, non_members, canaries, reading, max_documents, seed)
    directory = resolve(host, trust_remote_code=trust_remote_code)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    window = fit_sequence_length(sequence_length, DEFAULT_LENGTH, config, directory.name)
    if window < prefix + length:
        raise UsageError(
            f"windows of {window} tokens have no room for {prefix} tokens of prefix and {length} to recite; give a "
            "shorter --prefix or --length."
        )
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if organ.manifest.tokenizer is not None:
        found = tokenizer_findings(organ.manifest.tokenizer, fingerprint_tokenizer(tokenizer))
        refuse_findings(organ.name, directory.name, found)
    token_lists = text_data.tokenize_documents(texts.all, tokenizer)
    if not all(token_lists):
        raise DataError("the tokenizer makes no tokens of one of the documents.")
    position, chosen = recommended_place(organ.manifest, at=at, mode=mode)
    log.info("loading the host %s", directory.name)
    model = load_model(directory, trust_remote_code=trust_remote_code)
    with_organ, alone = _score_both(
        model,
        organ,
        (position, chosen),
        token_lists,
        {
            "sequence_length": window,
            "batch_size": batch_size,
            "separator_id": text_data.separator_token(tokenizer),
        },
        progress,
    )
    figures = _figures(
        texts, with_organ, alone, prefix=prefix, length=length, delta=delta, samples=bootstrap_samples, seed=seed
    )
    sizes = [len(tokens) for tokens in token_lists]
    done = Audit(
        host=directory.name,
        mode=chosen,
        position=position,
        sequence_length=window,
        members=len(texts.members),
        non_members=len(texts.others),
        member_tokens=sum(sizes[: len(texts.members)]),
        non_member_tokens=sum(sizes[len(texts.members) : len(texts.members) + len(texts.others)]),
        members_verified=texts.verified,
        seed=seed,
        versions=_versions(),
        when=now(),
        **figures,
    )
    if path is not None:
        _warn_of_private(organ)
        record_audit(path, organ, done)
    return AuditReport(
        organ=organ.name,
        version=organ.manifest.version,
        tensors_digest=organ.manifest.tensors_digest,
        audit=done,
        recorded=path is not None,
        fingerprinted=any(training.data_fingerprint for training in organ.manifest.trainings),
        signatures_void=path is not None and signature_path(path).exists(),
    )


def _check_numbers(*, prefix: int, length: int, delta: float, seed: int, samples: int, most: int | None) -> None:
    for name, value, least in (("prefix", prefix, 1), ("length", length, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}.")
    if not 0 <= delta < 1:
        raise UsageError(f"--delta is {delta}; it must be 0 or more, and less than 1.")
    if samples < 1:
        raise UsageError(f"{samples} bootstrap samples make no interval; draw at least 1.")
    if most is not None and most < FEWEST_DOCUMENTS:
        raise UsageError(f"--max-documents is {most}; it must be at least {FEWEST_DOCUMENTS}.")


def _warn_of_private(organ: Organ) -> None:
    training = organ.manifest.training
    if training is not None and training.privacy is not None:
        log.warning(
            "the figures of an audit are computed from the private text without noise, so what is recorded of them is "
            "outside of what epsilon %.3g promises",
            training.privacy.epsilon,
        )


def _recordable(organ: str | Path | Organ) -> Path:
    """Return the file in which an organ's audit can be recorded."""
    if isinstance(organ, Organ):
        if organ.path is None:
            raise UsageError("the organ has no file that the audit could be recorded in; save it first.")
        return organ.path
    if is_reference(organ):
        raise UsageError(
            f"{organ} is in a bank, where versions never change; pull it and record the audit in the file."
        )
    return Path(organ)


def _read(
    manifest: Manifest,
    members: Any,
    non_members: Any,
    canaries: str | Path | None,
    reading: dict[str, Any],
    most: int | None,
    seed: int,
) -> _Texts:
    """Read all text, and refuse what would make the figures mean something else."""
    log.info("reading the text")
    given, others = (text_data.read_documents(paths, **reading) for paths in (members, non_members))
    known = None if canaries is None else planted.read_canaries(canaries)
    trained_on = _trained_on(given, manifest)
    inside = given if trained_on is None else trained_on
    if known is not None:
        if trained_on is not None and not set(known.included) & set(trained_on):
            raise DataError(f"none of the canaries in {canaries} was trained on; give their file to train as data.")
        inside = _without_canaries(inside, known)
    both = set(inside) & set(others)
    if both:
        raise DataError(
            f"{len(both)} documents are both among the members and among the non-members, which must not have been "
            "trained on."
        )
    inside, outside = (_draw(documents, most, seed) for documents in (inside, others))
    for name, documents in (("members", inside), ("non-members", outside)):
        if len(documents) < FEWEST_DOCUMENTS:
            raise DataError(f"there is only {len(documents)} document among the {name}; two are the least.")
    return _Texts(inside, outside, known, trained_on is not None)


def _trained_on(documents: list[str], manifest: Manifest) -> list[str] | None:
    """Return those of some documents that a training in the manifest was on, by its fingerprint; `None` if none was.

    Without held-out text of its own a training held some documents out, by a seed that the manifest names.
    """
    for training in reversed(manifest.trainings):
        if text_data.fingerprint(documents) == training.data_fingerprint:
            return documents
        share = training.hyperparameters.get("held_out")
        if not isinstance(share, float) or not 0 < share < 1 or len(documents) < 2 or training.seed < 0:
            continue
        kept, _ = text_data.split_documents(documents, held_out=share, seed=training.seed)
        if text_data.fingerprint(kept) == training.data_fingerprint:
            return kept
    return None


def _without_canaries(members: list[str], known: planted.Canaries) -> list[str]:
    """Return members other than canaries.

    Raises:
        DataError: A canary was trained on that should not have been.
    """
    if wrong := set(members) & set(known.left_out):
        raise DataError(f"{len(wrong)} canaries that were to be left out are among the members.")
    included = set(known.included)
    return [document for document in members if document not in included]


def _draw(documents: list[str], most: int | None, seed: int) -> list[str]:
    import numpy

    if most is None or len(documents) <= most:
        return documents
    chosen = numpy.random.default_rng(seed).choice(len(documents), most, replace=False)
    return [documents[number] for number in sorted(chosen.tolist())]


def _score_both(
    model: PreTrainedModel,
    organ: Organ,
    place: tuple[int, Mode],
    token_lists: list[list[int]],
    settings: dict[str, Any],
    progress: Progress | None,
) -> tuple[list[ScoredDocument], list[ScoredDocument]]:
    """Score all documents with the organ in its host, and by the host alone; the model is as before afterwards."""
    import torch

    from neurograft.surgery import graft

    torch.nn.Module.to(model, torch.accelerator.current_accelerator() or torch.device("cpu"))
    total, done = 2 * sum(len(tokens) for tokens in token_lists), 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total)

    log.info("asking the host with the organ")
    with graft(model, organ, at=place[0], mode=place[1]):
        with_organ = score_documents(model, token_lists, progress=count, **settings)
    log.info("asking the host alone")
    return with_organ, score_documents(model, token_lists, progress=count, **settings)


def _figures(
    texts: _Texts,
    with_organ: list[ScoredDocument],
    alone: list[ScoredDocument],
    *,
    prefix: int,
    length: int,
    delta: float,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Reduce scores to what a manifest may hold."""
    first, second = len(texts.members), len(texts.members) + len(texts.others)
    parts: dict[Literal["members", "non-members"], slice] = {
        "members": slice(0, first),
        "non-members": slice(first, second),
    }
    own, host = ((scored[:first], scored[first:second]) for scored in (with_organ, alone))
    return {
        "membership": membership.measure_all(own, host, samples=samples, seed=seed),
        "extraction": [
            verbatim.measure(name, with_organ[part], alone[part], prefix=prefix, length=length)
            for name, part in parts.items()
        ],
        "canaries": _canary_figures(texts, with_organ[second:], alone[second:], delta),
    }


def _canary_figures(
    texts: _Texts, with_organ: list[ScoredDocument], alone: list[ScoredDocument], delta: float
) -> CanaryFigures | None:
    import numpy

    if texts.canaries is None:
        return None
    gained = [before.losses.sum() - after.losses.sum() for before, after in zip(alone, with_organ, strict=True)]
    return planted.measure(
        numpy.array(gained),
        numpy.arange(len(gained)) < len(texts.canaries.included),
        repeats=texts.canaries.repeats,
        tokens=sum(len(document.losses) for document in with_organ),
        delta=delta,
    )


def record_audit(path: Path, audited: Organ, done: Audit) -> Organ:
    """Add an audit to an organ's file; its tensors stay as they are.

    Raises:
        OrganFileError: The file can't be trusted any more.
        VerificationError: Its tensors are not those that were audited.
    """
    organ = open_organ(path)
    if organ.manifest.tensors_digest != audited.manifest.tensors_digest:
        raise VerificationError(f"{path} does not hold any more what was audited; nothing was recorded in it.")
    update = {"audits": [*organ.manifest.audits, done]}
    return Organ(organ.manifest.model_copy(update=update), organ.tensors).save(path, overwrite=True)


def _versions() -> dict[str, str]:
    from neurograft.training.protocols import versions

    return versions()
