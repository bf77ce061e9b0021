"""The model card of an organ on the Hub, made from its manifest: front matter that the Hub knows, and what it means."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from neurograft.manifest import Evaluation, Manifest
from neurograft.privacy.rendering import audit_markdown, privacy_line, redaction_line
from neurograft.wording import harmless

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Of the Hub's own names of licences, those that SPDX names otherwise only in upper case.
_LICENSES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense",
    "artistic-2.0", "isc", "wtfpl", "zlib",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(manifest: Manifest, reference: str) -> str:
    """Return the model card of an organ, in Markdown with YAML in front.

    Args:
        manifest: What the organ says of itself.
        reference: What it is called in its bank, with the version.
    """
    from huggingface_hub import ModelCardData

    base: dict[str, Any] = {"base_model": manifest.source.model, "base_model_relation": "adapter"}
    data = ModelCardData(
        library_name="neurograft",
        model_name=manifest.name,
        tags=["neurograft", "donor-organ", manifest.anatomy.model_type],
        eval_results=[_result(evaluation) for evaluation in manifest.evaluations] or None,
        **(base if _HUB_ID.fullmatch(manifest.source.model) else {}),
        **_license(manifest.license),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{harmless(_body(manifest, reference))}"


def _license(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name.lower() in _LICENSES:
        return {"license": name.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-") or "other"}


def _result(evaluation: Evaluation) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^A-Za-z0-9._-]+", "-", evaluation.data) or "text",
        dataset_name=evaluation.data,
        metric_type="perplexity",
        metric_name="perplexity with the organ",
        metric_value=evaluation.after,
    )


def _body(manifest: Manifest, reference: str) -> str:
    source, lines = manifest.source, [f"# {manifest.name}", ""]
    if manifest.description:  # quoted, so that it can't pass for what neurograft says
        lines += [*(f"> {line}".rstrip() for line in manifest.description.splitlines()), ""]
    lines += [
        f"Layers {source.layer_start}:{source.layer_stop} (half-open, from 0) of the {source.layer_count} of "
        f"{source.model}, as an organ of neurograft: one safetensors file, no code.",
        "",
        "```",
        f"neurograft check {reference} MODEL",
        f"neurograft transplant {reference} MODEL -o MODEL-WITH-ORGAN",
        "```",
        "",
        f"It recommends to {manifest.recommended_mode} at position {manifest.recommended_position}.",
    ]
    if manifest.training is not None:
        training = manifest.training
        lines += [
            "",
            f"Trained {training.protocol} in {training.host}: {training.tokens_seen:,} tokens of "
            f"{training.documents:,} documents, {training.steps} steps, seed {training.seed}.",
        ]
    if manifest.evaluations:
        lines += ["", "| text | tokens | perplexity before | after |", "|---|---|---|---|"]
        lines += [f"| {e.data} | {e.tokens:,} | {e.before:.2f} | {e.after:.2f} |" for e in manifest.evaluations]
    if manifest.training is not None and manifest.training.redaction is not None:
        lines += ["", f"Masked in the training text: {redaction_line(manifest.training.redaction)}."]
    if (private := privacy_line(manifest)) is not None:
        lines += ["", f"Trained with differential privacy: {private}."]
    lines += audit_markdown(manifest.audits)
    return "\n".join([*lines, "", f"SHA-256 of the tensors: `{manifest.tensors_digest}`", ""])
