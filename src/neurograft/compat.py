"""Does an organ fit a recipient? Every finding, with what differs and why it matters; nothing is changed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from neurograft.alignment import AlignmentCurve, alignment_findings, measure_alignment
from neurograft.anatomy import build_skeleton, same_in_float32
from neurograft.checkpoint import Checkpoint, open_checkpoint
from neurograft.errors import IncompatibleError, ModelError, NeurograftError, OrganFileError
from neurograft.findings import Finding, Severity
from neurograft.hub import RemoteRange, hub_headers
from neurograft.layer_values import count_name, read_rows
from neurograft.layer_weights import to_disk, verify_names
from neurograft.manifest import Manifest, Mode, ScanPoint, TokenizerFingerprint
from neurograft.models import is_hub_id, load_model, load_tokenizer, resolve
from neurograft.number_formats import first_rows
from neurograft.organ import Organ, config_to_json, open_organ, pieces_dtype
from neurograft.planning import plan_graft
from neurograft.steps import check_position, recommended_place
from neurograft.studies import Layout, study_graft, studying
from neurograft.tensor_files import Piece, same_kinds, torch_name

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("neurograft")

# Values that say nothing about what a layer computes.
_IRRELEVANT = re.compile(
    r"^_|token_ids?$|^(dtype|torch_dtype|architectures|transformers_version|use_cache|return_dict|id2label|label2id|problem_type"
    r"|chunk_size_feed_forward|initializer_\w+|init_std|tie_word_embeddings|auto_map|pretraining_tp|vocab_size|num_labels|is_decoder"
    r"|output_\w+|router_aux_loss_coef|aux_loss_alpha|summary_\w+|scale_embedding|keys_to_ignore_at_inference|name_or_path"
    r"|gradient_checkpointing|attn_implementation|experts_implementation|layerdrop|torchscript|tokenizer_class|prefix"
    r"|task_specific_params|cross_attention_hidden_size|add_cross_attention|is_encoder_decoder|tie_encoder_decoder|reorder_and_upcast_attn)$"
)
# Recipes for per-layer lists, which are compared layer by layer once the lists are explicit.
_PATTERN_RECIPES = frozenset(
    {
        "max_window_layers",
        "sliding_window_pattern",
        "full_attention_interval",
        "decoder_sparse_step",
        "attention_types",
        "no_rope_layer_interval",
        "global_attn_every_n_layers",
    }
)
_HARMLESS = re.compile(r"dropout|_drop$|pdrop$|jitter")
_RANGE = re.compile(r"^(max_position_embeddings|n_positions|max_sequence_length|seq_length|n_ctx)$")
_REASONS = (
    (
        re.compile(r"hidden_size|n_embd|d_model"),
        "the hidden states that enter and leave the layers have another width",
    ),
    (
        re.compile(r"rope|rotary|theta"),
        "positions would be rotated differently: shapes agree and the result would be silently wrong",
    ),
    (re.compile(r"head"), "attention is split into heads differently"),
    (
        re.compile(r"act(ivation)?(_fn|_function)?$|hidden_act"),
        "the feed-forward part would compute another function",
    ),
    (re.compile(r"eps|norm"), "activations would be normalised differently"),
    (re.compile(r"sliding|window"), "attention would reach another distance back"),
    (re.compile(r"intermediate|n_inner|ffn"), "the feed-forward matrices have another shape"),
)
_ALIGNED = 0.5


@dataclass(frozen=True)
class _Sampling:
    """How much of a layer is read to compare it with others."""

    tensors: int
    rows: int
    values: int


_NEAR = _Sampling(tensors=12, rows=64, values=1 << 17)
_FAR = _Sampling(tensors=3, rows=16, values=1 << 14)  # each tensor is a request to a server


class CheckReport(BaseModel):
    """Every finding about one organ and one recipient."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    organ: str
    recipient: str
    position: int
    mode: Mode
    matching_position: int | None
    """Where the recipient's own layers are those that the organ's were, by comparison of weights; `None` if nowhere."""
    similarity: float | None
    """Cosine similarity of the organ's weights with the recipient's layers there."""
    findings: list[Finding]
    alignment: AlignmentCurve | None = None
    """How alike the hidden states around the organ are, at every position; `None` where that was not measured."""

    @property
    def blocked(self) -> bool:
        """Whether the transplant must not be done."""
        return any(finding.severity == "blocks" for finding in self.findings)


def check(
    organ: str | Path | Organ,
    recipient: str | Path,
    *,
    at: int | None = None,
    mode: Mode | None = None,
    alignment: Literal["auto", "measure", "skip"] = "auto",
    trust_remote_code: bool = False,
) -> CheckReport:
    """Compare an organ with a recipient, without changing either.

    Args:
        organ: An organ, or the path of its file.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        at: Position to check; left out, the one that matches by weights, else the one that the organ recommends.
        mode: `replace` or `insert`; left out, what the organ recommends.
        alignment: Whether to load the recipient and compare the hidden states on a public text with those that the
            organ was trained among, at every position (`neurograft.alignment`). `auto`: where the organ has a sketch
            of these, and the recipient's weights are plain and take at most a quarter of this machine's memory.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        Every finding, those that block first.

    Raises:
        UsageError: Alignment is to be measured, and the organ has no sketch.
        OrganFileError: The organ file can't be trusted.
        ModelError: The recipient can't be read or cut into layers.
    """
    organ = organ if isinstance(organ, Organ) else open_organ(organ)
    with studying():
        checkpoint = _open(recipient, trust_remote_code)
        report, _ = check_checkpoint(organ, checkpoint, at=at, mode=mode, trust_remote_code=trust_remote_code)
    easy = organ.manifest.sketch is not None and checkpoint.runs_easily
    if report.blocked or alignment == "skip" or (alignment == "auto" and not easy):
        return report
    return _with_alignment(
        report, organ, checkpoint, trust_remote_code=trust_remote_code, needed=alignment == "measure"
    )


def _with_alignment(
    report: CheckReport, organ: Organ, checkpoint: Checkpoint, *, trust_remote_code: bool, needed: bool
) -> CheckReport:
    """Add to a report how alike the hidden states are; a note says why where that can't be measured, and needn't be."""
    directory = checkpoint.directory
    try:
        log.info("comparing hidden states in %s", directory.name)
        model = load_model(directory, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        found = measure_alignment(organ, model, tokenizer, at=report.position, mode=report.mode, name=directory.name)
    except ModelError as error:
        if needed:
            raise
        return _with_findings(report, [Finding(severity="notes", subject="alignment", why=str(error).rstrip("."))])
    return _with_findings(report.model_copy(update={"alignment": found}), alignment_findings(found))


def _with_findings(report: CheckReport, findings: Sequence[Finding]) -> CheckReport:
    return report.model_copy(update={"findings": _in_order([*report.findings, *findings])})


def _in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Order findings, those that block first."""
    order = {"blocks": 0, "risks": 1, "notes": 2}
    return sorted(findings, key=lambda finding: order[finding.severity])


def _open(recipient: str | Path, trust_remote_code: bool) -> Checkpoint:
    """Open a recipient to look at; one on the Hub is fetched as far as it is looked at, where the server can."""
    if is_hub_id(recipient):
        opened = hub_headers(str(recipient), trust_remote_code=trust_remote_code)
        if opened is not None:
            return opened
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    return open_checkpoint(directory, trust_remote_code=trust_remote_code)


def check_checkpoint(
    organ: Organ,
    checkpoint: Checkpoint,
    *,
    at: int | None,
    mode: Mode | None,
    look_for_match: bool = True,
    trust_remote_code: bool = False,
) -> tuple[CheckReport, str | None]:
    """Do what `check` does, on a recipient that is open already.

    Args:
        organ: See `check`.
        checkpoint: The recipient.
        at: See `check`.
        mode: See `check`.
        look_for_match: Whether to compare weights, which are read for it, although the position is given.
        trust_remote_code: See `check`.

    Returns:
        The report, and the `config.json` of the result if nothing blocks.
    """
    compared = at is None or look_for_match
    alignment = align(organ, checkpoint) if compared else None
    if at is None and alignment is not None:
        at = alignment.position
    position, chosen = recommended_place(organ.manifest, at=at, mode=mode)
    study = study_graft(
        checkpoint.directory, organ.manifest, at=position, mode=chosen, trust_remote_code=trust_remote_code
    )
    if study.expected is not None:
        _verify_layouts(organ, study.expected, study.expected_dtypes)
    findings = [
        *_scan_findings(organ.manifest, checkpoint, position, chosen),
        *study.findings,
        *_name_findings(organ, checkpoint),
        *_tokenizer_findings(organ.manifest.tokenizer, checkpoint.tokenizer),
        *(_alignment_findings(organ, alignment, position, chosen) if compared else ()),
        *_manifest_findings(organ.manifest),
        *_dtype_findings(organ),
        *(Finding(severity="notes", subject="recipient", why=note) for note in checkpoint.directory.notes),
    ]
    report = CheckReport(
        organ=organ.name,
        recipient=checkpoint.directory.name,
        position=position,
        mode=chosen,
        matching_position=alignment.position if alignment else None,
        similarity=round(alignment.similarity, 4) if alignment else None,
        findings=_in_order(findings),
    )
    return report, None if report.blocked else study.config


def _verify_layouts(organ: Organ, expected: Sequence[Layout], dtypes: Mapping[str, str]) -> None:
    """Check that an organ has the tensors, all and no others, that its own configuration calls for.

    Raises:
        OrganFileError: Names the first tensor that is missing, extra, misshapen or of another kind of number.
    """
    named = {
        f"layers.{layer}.{inner}": shape for layer, layout in enumerate(expected) for inner, shape in layout.items()
    }
    _verify_kinds(organ, named, dtypes)


def verify_tensors(organ: Organ) -> None:
    """Check that an organ has the tensors, all and no others, that its own configuration calls for.

    Raises:
        OrganFileError: Names the first tensor that is missing, extra, misshapen or of another kind of number.
    """
    if organ.manifest.is_packed:
        raise IncompatibleError(
            f"the organ {organ.name} holds packed (quantised) tensors, which can't be put into a loaded model; "
            f"transplant it on disk."
        )
    first = organ.manifest.anatomy.first_layer
    expected = to_disk(build_skeleton(organ.config()), range(first, first + organ.layer_count))
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in expected.items()}
    _verify_kinds(organ, {name: tuple(tensor.shape) for name, tensor in expected.items()}, dtypes)


def _verify_kinds(organ: Organ, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> None:
    name, pieces = str(organ.path or organ.name), organ.pieces
    verify_names({key: piece.shape for key, piece in pieces.items()}, shapes, name)
    for key, piece in pieces.items():
        found = torch_name(piece.dtype)
        if ("float" in found) != ("float" in dtypes[key]):
            raise OrganFileError(
                f"{name} holds {key} as {found} where its configuration calls for {dtypes[key]} or the like."
            )


def refuse_blocked(report: CheckReport) -> None:
    """Raise if a check found anything that blocks.

    Raises:
        IncompatibleError: One sentence for each such finding.
    """
    refuse_findings(report.organ, report.recipient, report.findings)


def refuse_findings(organ: str, recipient: str, findings: Sequence[Finding]) -> None:
    """Raise if any of some findings blocks; see `refuse_blocked`."""
    blocking = [finding.sentence() for finding in findings if finding.severity == "blocks"]
    if blocking:
        raise IncompatibleError(f"the organ {organ} does not fit {recipient}: {'; '.join(blocking)}.")


def config_findings(manifest: Manifest, config: PreTrainedConfig) -> list[Finding]:
    """Compare every configuration value that a layer's arithmetic may depend on."""
    ours, theirs = manifest.anatomy.config, config_to_json(config)
    if manifest.anatomy.model_type != config.model_type:
        why = "they are different architectures; an organ fits only models of its own"
        return [
            Finding(
                severity="blocks",
                subject="model_type",
                organ=manifest.anatomy.model_type,
                recipient=config.model_type,
                why=why,
            )
        ]
    skipped = {count_name(config), "num_hidden_layers", *_PATTERN_RECIPES}
    for row in manifest.anatomy.layer_values:
        skipped.update(row)
    old, new = _flat(ours, skipped), _flat(theirs, skipped)
    return [
        _value_finding(name, old.get(name, "absent"), new.get(name, "absent"))
        for name in [*old, *(name for name in new if name not in old)]
        if not _same(old.get(name, "absent"), new.get(name, "absent"))
    ]


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values are the same to a layer."""
    return bool(ours == theirs) or same_in_float32(ours, theirs)


def _flat(config: Mapping[str, Any], skipped: set[str], prefix: str = "") -> dict[str, Any]:
    """Return the relevant values with nested mappings spelled as `rope_parameters.rope_theta`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if not prefix and (name in skipped or _IRRELEVANT.search(name)):
            continue
        if isinstance(value, dict) and value:
            flat.update(_flat(value, skipped, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value_finding(name: str, organ: Any, recipient: Any) -> Finding:
    severity: Severity = "blocks"
    why = next(
        (reason for pattern, reason in _REASONS if pattern.search(name)),
        "what a layer computes may depend on it",
    )
    if _HARMLESS.search(name):
        severity, why = "notes", "it matters only while training"
    elif _RANGE.search(name):
        severity, why = "risks", "the organ was made for sequences up to another length"
    return Finding(severity=severity, subject=name, organ=_shown(organ), recipient=_shown(recipient), why=why)


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def place_findings(organ: Organ, skeleton: PreTrainedModel, *, at: int, mode: Mode) -> list[Finding]:
    """Check the position, and whether each layer would still compute the same there."""
    rows = read_rows(skeleton.config)
    try:
        check_position(len(rows), organ.layer_count, at=at, mode=mode)
    except NeurograftError as error:
        return [Finding(severity="blocks", subject="position", why=str(error).rstrip("."))]
    if organ.manifest.anatomy.model_type != skeleton.config.model_type:
        return []
    findings = list(_kind_findings(organ, rows, at, mode))
    try:
        plan_graft(skeleton, organ, at=at, mode=mode)
    except NeurograftError as error:
        findings.append(Finding(severity="blocks", subject="layers", why=str(error).rstrip(".")))
    return findings


def _kind_findings(organ: Organ, rows: Sequence[Mapping[str, Any]], at: int, mode: Mode) -> Iterator[Finding]:
    """Compare the organ's per-layer kinds with those of the layers that stand at its place."""
    if mode == "insert":
        return
    for index, (ours, theirs) in enumerate(zip(organ.manifest.anatomy.layer_values, rows[at:], strict=False)):
        for name, value in ours.items():
            if name in theirs and theirs[name] != value:
                why = (
                    f"layer {index} of the organ was trained as {value} and stays so; the recipient's pattern of "
                    f"{name} "
                    f"changes at layer {at + index}"
                )
                yield Finding(severity="risks", subject=name, organ=str(value), recipient=str(theirs[name]), why=why)


def _name_findings(organ: Organ, checkpoint: Checkpoint) -> list[Finding]:
    """Compare tensor names and shapes, and how packed ones are packed, with those of the recipient's layers on disk."""
    if organ.manifest.anatomy.model_type != checkpoint.study.model_type:
        return []
    if organ.manifest.is_packed or checkpoint.packing:
        return _packing_findings(organ, checkpoint)
    if incomplete := _incomplete_findings(checkpoint):
        return incomplete
    known: dict[str, tuple[int, ...]] = {}
    for layer in range(checkpoint.layer_count):
        known.update(
            {inner: piece.shape for inner, piece in checkpoint.layer_pieces(layer).items() if inner not in known}
        )
    found = {
        inner: piece.shape
        for index in range(organ.layer_count)
        for inner, piece in organ.layer_pieces(index).items()
        if inner in known and known[inner] != piece.shape
    }
    if not found:
        return []
    first = next(iter(found))
    others = f", as have {len(found) - 1} more of a layer's tensors" if len(found) > 1 else ""
    why = f"the tensor has another shape{others}"
    return [Finding(severity="blocks", subject=first, organ=list(found[first]), recipient=list(known[first]), why=why)]


def _incomplete_findings(checkpoint: Checkpoint) -> list[Finding]:
    """Find the first layer of a recipient whose tensors are not all there, or not as its configuration says.

    transformers would fill what is lacking with random numbers, and refuse to load what has another shape.
    """
    for layer in range(checkpoint.layer_count):
        if lacking := checkpoint.lacking(layer):
            others = f" and {len(lacking) - 1} more tensors" if len(lacking) > 1 else ""
            why = f"the recipient's files lack {lacking[0]}{others} of it"
            return [Finding(severity="blocks", subject=f"layer {layer}", why=why)]
        if wrong := checkpoint.misshapen(layer):
            return [Finding(severity="blocks", subject=f"layer {layer}", why=f"the recipient's {wrong}")]
    return []


def _packing_findings(organ: Organ, checkpoint: Checkpoint) -> list[Finding]:
    """Check that each of an organ's layers is packed exactly as some layer of the recipient is."""
    if bool(checkpoint.packing) != organ.manifest.is_packed:
        why = "packed and plain layers can't stand in one model, whose configuration says one of the two of all"
        ours = organ.manifest.anatomy.config.get("quantization_config") or {}
        method = ours.get("quant_method", "unnamed") if organ.manifest.is_packed else "none"
        theirs = checkpoint.packing or "none"
        return [Finding(severity="blocks", subject="quantisation", organ=method, recipient=theirs, why=why)]
    kinds = [checkpoint.layer_pieces(layer) for layer in range(checkpoint.layer_count)]
    return [
        Finding(
            severity="blocks",
            subject=f"layer {index}",
            why="no layer of the recipient has tensors of the same names, dtypes and shapes: it is packed differently",
        )
        for index in range(organ.layer_count)
        if not any(same_kinds(organ.layer_pieces(index), kind) for kind in kinds)
    ][:5]


def _tokenizer_findings(ours: TokenizerFingerprint | None, theirs: TokenizerFingerprint | None) -> list[Finding]:
    if ours is None or theirs is None:
        which = "the organ carries no tokenizer fingerprint" if ours is None else "the recipient has no tokenizer"
        return [Finding(severity="notes", subject="tokenizer", why=f"{which}, so tokenizers could not be compared")]
    return tokenizer_findings(ours, theirs)


def tokenizer_findings(ours: TokenizerFingerprint, theirs: TokenizerFingerprint) -> list[Finding]:
    """Compare two tokenizers by what they make of a sample text, then by their whole vocabularies."""
    if ours.sample_digest != theirs.sample_digest:
        why = "they cut the same text into other tokens, so the organ would see what it never learned"
        return [
            Finding(
                severity="blocks",
                subject="tokenizer",
                organ=f"{ours.vocabulary_size} tokens",
                recipient=f"{theirs.vocabulary_size} tokens",
                why=why,
            )
        ]
    if ours.vocabulary_digest != theirs.vocabulary_digest:
        why = "ordinary text is cut alike, and the vocabularies differ in some tokens"
        return [
            Finding(
                severity="notes",
                subject="tokenizer",
                organ=f"{ours.vocabulary_size} tokens",
                recipient=f"{theirs.vocabulary_size} tokens",
                why=why,
            )
        ]
    return []


def _manifest_findings(manifest: Manifest) -> list[Finding]:
    if manifest.training is None and manifest.merged is not None:
        parents = ", ".join(parent.name for parent in manifest.merged.parents)
        return [Finding(severity="notes", subject="training", why=f"the organ was merged from {parents}, not trained")]
    if manifest.training is None:
        return [Finding(severity="notes", subject="training", why="the organ was not trained since it was extracted")]
    if manifest.training.protocol == "standalone":
        why = "an organ trained standalone, outside any model, fits nowhere without recovery"
        return [Finding(severity="risks", subject="protocol", why=why)]
    return []


def _dtype_findings(organ: Organ) -> list[Finding]:
    if organ.manifest.is_packed or pieces_dtype(organ.pieces) != "mixed":
        return []
    dtypes = sorted({torch_name(piece.dtype) for piece in organ.pieces.values()})
    why = f"the organ's tensors are {', '.join(dtypes)}; each is cast to what the recipient has in its place"
    return [Finding(severity="notes", subject="dtype", why=why)]


@dataclass(frozen=True)
class Alignment:
    """Where a recipient's layers resemble an organ's most."""

    position: int
    """The position that corresponds to the one that the organ recommends."""
    layer: int
    """The recipient layer that corresponds to the organ's first."""
    similarity: float
    runner_up: float


def align(organ: Organ, checkpoint: Checkpoint) -> Alignment | None:
    """Find the recipient layers that the organ's layers descend from, by the cosine similarity of weights.

    Training moves weights little against their size, so layers of common descent stay close to parallel and all others
    are close to orthogonal.

    Returns:
        `None` where no run of k layers stands out.
    """
    if organ.manifest.anatomy.model_type != checkpoint.study.model_type or organ.layer_count > checkpoint.layer_count:
        return None
    import numpy as np

    far = any(isinstance(piece.source, RemoteRange) for piece in checkpoint.pieces.values())
    sampling = _FAR if far else _NEAR
    ours = [_sample(organ.layer_pieces(index), sampling) for index in range(organ.layer_count)]
    with ThreadPoolExecutor(8) as readers:
        samples = readers.map(
            lambda layer: _sample(checkpoint.layer_pieces(layer), sampling), range(checkpoint.layer_count)
        )
    scores = np.zeros((organ.layer_count, checkpoint.layer_count))  # (k, L)
    for layer, theirs in enumerate(samples):
        scores[:, layer] = [_similarity(own, theirs) for own in ours]
    starts = checkpoint.layer_count - organ.layer_count + 1
    means = np.array([scores[:, start : start + organ.layer_count].diagonal().mean() for start in range(starts)])
    best = int(means.argmax())
    others = np.delete(means, best)
    runner_up = float(others.max()) if len(others) else 0.0
    if not means[best] > max(_ALIGNED, runner_up + 0.1):
        return None
    offset = organ.manifest.recommended_position - organ.manifest.source.layer_start
    position = min(max(best + offset, 0), checkpoint.layer_count)
    return Alignment(position, best, float(means[best]), runner_up)


def _sample(layer: Mapping[str, Piece], sampling: _Sampling) -> dict[str, np.ndarray[Any, Any]]:
    """Read the first rows of some of a layer's matrices, as float32, flat."""
    matrices = sorted(name for name, piece in layer.items() if len(piece.shape) >= 2 and piece.is_float)
    step = max(1, len(matrices) // sampling.tensors)
    return {name: first_rows(layer[name], sampling.rows, sampling.values) for name in matrices[::step]}


def _similarity(ours: Mapping[str, np.ndarray[Any, Any]], theirs: Mapping[str, np.ndarray[Any, Any]]) -> float:
    """Return the median over matrices of the cosine similarity of their first rows."""
    import numpy as np

    cosines = [
        float(ours[name] @ sample / max(np.linalg.norm(ours[name]) * np.linalg.norm(sample), 1e-12))
        for name, sample in theirs.items()
        if name in ours and ours[name].shape == sample.shape
    ]
    return float(np.median(cosines)) if cosines else 0.0


def _alignment_findings(organ: Organ, alignment: Alignment | None, position: int, mode: Mode) -> list[Finding]:
    if alignment is None:
        why = "none of the recipient's layers resemble the organ's by their weights; evaluate before you keep it"
        return [Finding(severity="risks", subject="matching position", why=why)]
    start, stop = organ.manifest.source.layer_start, organ.manifest.source.layer_stop
    where = (
        f"the organ's layers ({start}:{stop} of its donor) correspond to the recipient's {alignment.layer}:"
        f"{alignment.layer + organ.layer_count} (cosine similarity of weights {alignment.similarity:.3f}, next best "
        f"{alignment.runner_up:.3f})"
    )
    if position == alignment.position:
        return [Finding(severity="notes", subject="matching position", why=f"{where}; position {position} matches")]
    why = f"{where}, which makes {alignment.position} the matching position for {mode}, and {position} was asked for"
    return [Finding(severity="risks", subject="matching position", why=why)]


def _scan_findings(manifest: Manifest, checkpoint: Checkpoint, position: int, mode: Mode) -> list[Finding]:
    """Say what the last recorded scan of a recipient of this name and depth measured at a place.

    Names are all that a manifest keeps of a recipient, and another model may have this one's; so the finding says what
    it goes by, and takes back no other finding.
    """
    wanted = (checkpoint.directory.name, checkpoint.layer_count)
    scan = next((scan for scan in reversed(manifest.scans) if (scan.recipient, scan.layer_count) == wanted), None)
    if scan is None:
        return []
    after = f" after {scan.recover_tokens:,} tokens of recovery" if scan.recover_tokens else ""
    points = {(point.mode, point.position): point for point in scan.points}
    here, best = points.get((mode, position)), points.get((scan.mode, scan.position))

    def shown(point: ScanPoint) -> str:
        return f"{point.ratio:.3f} [{point.low:.3f}, {point.high:.3f}] times the recipient's perplexity"

    why = f"the scan that the organ carries, of a recipient named {scan.recipient} with as many layers, measured "
    why += f"{shown(here)} at this place{after}" if here is not None else f"nothing at {mode} {position}"
    if best is not None and (scan.mode, scan.position) != (mode, position):
        why += f", and its best place was {scan.mode} at {scan.position}: {shown(best)}"
    worse = here is None or here.low > 1
    return [Finding(severity="risks" if worse else "notes", subject="recorded scan", why=why)]


def check_loaded(organ: Organ, model: PreTrainedModel, skeleton: PreTrainedModel, *, at: int, mode: Mode) -> None:
    """Refuse to put an organ into a loaded model that it does not fit.

    Raises:
        UsageError: The position is out of range.
        IncompatibleError: One sentence for each finding that blocks.
    """
    refuse_unfit_config(organ, model)
    verify_tensors(organ)
    check_position(len(read_rows(skeleton.config)), organ.layer_count, at=at, mode=mode)
    refuse_findings(organ.name, _model_name(model), place_findings(organ, skeleton, at=at, mode=mode))


def refuse_unfit_config(organ: Organ, model: PreTrainedModel) -> None:
    """Refuse an organ whose configuration differs from a loaded model's in what layers depend on.

    Raises:
        IncompatibleError: One sentence for each such value.
    """
    refuse_findings(organ.name, _model_name(model), config_findings(organ.manifest, model.config))


def _model_name(model: PreTrainedModel) -> str:
    return Path(model.config.name_or_path or "").name or f"the {model.config.model_type} model"
