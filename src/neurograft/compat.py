"""Does an organ fit a recipient? Every finding, with what differs and why it matters; nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from neurograft.anatomy import build_skeleton
from neurograft.errors import IncompatibleError, NeurograftError, OrganFileError
from neurograft.layer_values import count_name, read_rows
from neurograft.layer_weights import to_disk, verify_names
from neurograft.manifest import Manifest, Mode, TokenizerFingerprint
from neurograft.models import ModelDirectory, fingerprint_tokenizer, load_tokenizer_if_any, resolve
from neurograft.organ import Organ, config_to_json, dtype_name, read_organ
from neurograft.planning import check_position, plan_graft, recommended_place

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from neurograft.checkpoint import Checkpoint

Severity = Literal["blocks", "risks", "notes"]

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
_SAMPLED_ROWS = 64
_SAMPLED_TENSORS = 12


class Finding(BaseModel):
    """One thing that was noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    severity: Severity
    """`blocks`: it must not be done; `risks`: it may go wrong; `notes`: good to know."""
    subject: str
    """What differs, such as `hidden_size`."""
    organ: Any = None
    recipient: Any = None
    why: str

    def sentence(self) -> str:
        """Return the finding in one sentence."""
        if self.organ is None and self.recipient is None:
            return f"{self.subject}: {self.why}"
        return f"{self.subject} is {self.organ} in the organ and {self.recipient} in the recipient: {self.why}"


class CheckReport(BaseModel):
    """Every finding about one organ and one recipient."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organ: str
    recipient: str
    position: int
    mode: Mode
    matching_position: int | None
    """Where the recipient's own layers are those that the organ's were, by comparison of weights; `None` if nowhere."""
    similarity: float | None
    """Cosine similarity of the organ's weights with the recipient's layers there."""
    findings: list[Finding]

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
    trust_remote_code: bool = False,
) -> CheckReport:
    """Compare an organ with a recipient, without changing either.

    Args:
        organ: An organ, or the path of its file.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        at: Position to check; left out, the one that matches by weights, else the one that the organ recommends.
        mode: `replace` or `insert`; left out, what the organ recommends.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        Every finding, those that block first.

    Raises:
        OrganFileError: The organ file can't be trusted.
        ModelError: The recipient can't be read or cut into layers.
    """
    from neurograft.checkpoint import open_checkpoint

    organ = organ if isinstance(organ, Organ) else read_organ(organ)
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    return check_checkpoint(organ, checkpoint, at=at, mode=mode, trust_remote_code=trust_remote_code)


def check_checkpoint(
    organ: Organ,
    checkpoint: Checkpoint,
    *,
    at: int | None,
    mode: Mode | None,
    trust_remote_code: bool = False,
) -> CheckReport:
    """Do what `check` does, on a recipient that is open already."""
    verify_tensors(organ)
    alignment = align(organ, checkpoint)
    if at is None and alignment is not None:
        at = alignment.position
    position, chosen = recommended_place(organ.manifest, at=at, mode=mode)
    values = config_findings(organ.manifest, checkpoint.config)
    places = place_findings(organ, checkpoint.skeleton, at=position, mode=chosen)
    if any(finding.severity == "blocks" for finding in values):
        # Layers that would compute something else are what such values come to; the values are the cause.
        places = [finding for finding in places if finding.subject != "layers"]
    findings = [
        *values,
        *places,
        *_name_findings(organ, checkpoint),
        *_tokenizer_findings(organ.manifest.tokenizer, checkpoint.directory, trust_remote_code),
        *_alignment_findings(organ, alignment, position, chosen),
        *_manifest_findings(organ.manifest),
        *_dtype_findings(organ),
        *(Finding(severity="notes", subject="recipient", why=note) for note in checkpoint.directory.notes),
    ]
    order = {"blocks": 0, "risks": 1, "notes": 2}
    return CheckReport(
        organ=organ.name,
        recipient=checkpoint.directory.name,
        position=position,
        mode=chosen,
        matching_position=alignment.position if alignment else None,
        similarity=round(alignment.similarity, 4) if alignment else None,
        findings=sorted(findings, key=lambda finding: order[finding.severity]),
    )


def verify_tensors(organ: Organ) -> None:
    """Check that an organ has the tensors, all and no others, that its own configuration calls for.

    Raises:
        OrganFileError: Names the first tensor that is missing, extra, misshapen or of another kind of number.
    """
    first, name = organ.manifest.anatomy.first_layer, str(organ.path or organ.name)
    expected = to_disk(build_skeleton(organ.config()), range(first, first + organ.layer_count))
    shapes, wanted = ({key: tuple(tensor.shape) for key, tensor in t.items()} for t in (organ.tensors, expected))
    verify_names(shapes, wanted, name)
    for key, tensor in organ.tensors.items():
        if tensor.is_floating_point() != expected[key].is_floating_point():
            found, called = (str(t.dtype).removeprefix("torch.") for t in (tensor, expected[key]))
            raise OrganFileError(
                f"{name} holds {key} as {found} where its configuration calls for {called} or the like."
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
        if old.get(name, "absent") != new.get(name, "absent")
    ]


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
    """Compare tensor names and shapes with those of the recipient's layers on disk."""
    if organ.manifest.anatomy.model_type != checkpoint.config.model_type:
        return []
    known: dict[str, tuple[int, ...]] = {}
    for layer in range(checkpoint.layer_count):
        for inner, name in checkpoint.layer_names(layer).items():
            if inner not in known:
                known[inner] = checkpoint.shape(name)
    if set(organ.layer(0)) == set(known) and all(
        tuple(organ.layer(0)[inner].shape) == shape for inner, shape in known.items()
    ):
        return []
    found = {
        inner: tuple(tensor.shape)
        for index in range(organ.layer_count)
        for inner, tensor in organ.layer(index).items()
        if inner in known and known[inner] != tuple(tensor.shape)
    }
    if not found:
        return []
    first = next(iter(found))
    others = f", as have {len(found) - 1} more of a layer's tensors" if len(found) > 1 else ""
    why = f"the tensor has another shape{others}"
    return [Finding(severity="blocks", subject=first, organ=list(found[first]), recipient=list(known[first]), why=why)]


def _tokenizer_findings(
    ours: TokenizerFingerprint | None, directory: ModelDirectory, trust_remote_code: bool
) -> list[Finding]:
    tokenizer = load_tokenizer_if_any(directory, trust_remote_code=trust_remote_code)
    if ours is None or tokenizer is None:
        which = "the organ carries no tokenizer fingerprint" if ours is None else "the recipient has no tokenizer"
        return [Finding(severity="notes", subject="tokenizer", why=f"{which}, so tokenizers could not be compared")]
    return tokenizer_findings(ours, fingerprint_tokenizer(tokenizer))


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
    if manifest.training is None:
        return [Finding(severity="notes", subject="training", why="the organ was not trained since it was extracted")]
    if manifest.training.protocol == "standalone":
        why = "an organ trained standalone, outside any model, fits nowhere without recovery"
        return [Finding(severity="risks", subject="protocol", why=why)]
    return []


def _dtype_findings(organ: Organ) -> list[Finding]:
    if dtype_name(organ.tensors) != "mixed":
        return []
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in organ.tensors.values()})
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
    import torch

    if organ.manifest.anatomy.model_type != checkpoint.config.model_type or organ.layer_count > checkpoint.layer_count:
        return None
    scores = torch.zeros(organ.layer_count, checkpoint.layer_count)  # (k, L)
    for layer in range(checkpoint.layer_count):
        samples = _sample_recipient(organ, checkpoint, layer)
        for index in range(organ.layer_count):
            scores[index, layer] = _similarity(organ.layer(index), samples)
    starts = checkpoint.layer_count - organ.layer_count + 1
    means = torch.stack([scores[:, start : start + organ.layer_count].diagonal().mean() for start in range(starts)])
    best = int(means.argmax())
    others = torch.cat([means[:best], means[best + 1 :]])
    runner_up = float(others.max()) if len(others) else 0.0
    if not means[best] > max(_ALIGNED, runner_up + 0.1):
        return None
    offset = organ.manifest.recommended_position - organ.manifest.source.layer_start
    position = min(max(best + offset, 0), checkpoint.layer_count)
    return Alignment(position, best, float(means[best]), runner_up)


def _sample_recipient(organ: Organ, checkpoint: Checkpoint, layer: int) -> dict[str, Any]:
    """Read the first rows of a layer's matrices."""
    from safetensors import safe_open

    matrices = sorted(name for name, tensor in organ.layer(0).items() if tensor.ndim >= 2)
    step = max(1, len(matrices) // _SAMPLED_TENSORS)
    names = checkpoint.layer_names(layer)
    samples = {}
    for inner in matrices[::step]:
        if inner in names:
            with safe_open(checkpoint.files[names[inner]], framework="pt") as stream:
                samples[inner] = stream.get_slice(names[inner])[:_SAMPLED_ROWS].float()
    return samples


def _similarity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Return the median over matrices of the cosine similarity of their first rows."""
    import torch

    cosines = [
        torch.cosine_similarity(ours[name][:_SAMPLED_ROWS].float().flatten(), sample.flatten(), dim=0)
        for name, sample in theirs.items()
        if name in ours and ours[name][:_SAMPLED_ROWS].shape == sample.shape
    ]
    return float(torch.stack(cosines).median()) if cosines else 0.0


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
