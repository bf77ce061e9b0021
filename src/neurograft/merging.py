"""Merge organs that were made from the same layers into one organ, by plain arithmetic on their weights.

A *task vector* is what training added: an organ's weights less those of the layers that it was made from. Methods:

- `average`: the weighted mean of the weights (model soups, arXiv 2203.05482).
- `ties`: of each task vector only the largest values are kept; for each value a sign is elected, the one with more
  weight behind it; what agrees with it is averaged and added to the original (TIES-Merging, arXiv 2306.01708).
- `dare`: of each task vector a random share is dropped and the rest scaled up to make up for it; their weighted mean is
  added to the original (DARE, arXiv 2311.03099).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from neurograft.compat import config_findings, tokenizer_findings
from neurograft.errors import IncompatibleError, ModelError, UsageError, VerificationError
from neurograft.extraction import extract
from neurograft.files import combine_digests
from neurograft.manifest import UNSEALED, Manifest, Merge, MergeMethod, Parent, Probe
from neurograft.number_formats import digest_pieces
from neurograft.organ import Organ, check_name, check_organ_output, check_version, clean_name, now, open_organ
from neurograft.several import OrganOrPath, open_organs
from neurograft.tensor_files import same_kinds

if TYPE_CHECKING:
    import torch

log = logging.getLogger("neurograft")

Tensors = dict[str, "torch.Tensor"]
METHODS: tuple[str, ...] = get_args(MergeMethod)
DENSITIES = {"ties": 0.2, "dare": 0.5}
"""Share of each task vector that is kept if nothing else is said."""


def merge(
    organs: Sequence[OrganOrPath],
    *,
    output: str | Path | None = None,
    method: MergeMethod = "average",
    weights: Sequence[float] | None = None,
    base: OrganOrPath | None = None,
    density: float | None = None,
    scale: float | None = None,
    seed: int | None = None,
    name: str | None = None,
    version: str = "0.1.0",
    license: str | None = None,
    description: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Organ:
    """Merge organs that were made from the same layers into one, which takes the same place in a recipient.

    Args:
        organs: Two or more organs, or the paths of their files.
        output: File to write, ending in `.safetensors`; left out, the organ is only returned.
        method: `average`, `ties` or `dare`; see `neurograft.merging`.
        weights: How much each organ counts, in their order; left out, all alike. They are scaled to a sum of 1.
        base: For `ties` and `dare`: the layers that the organs were made from, before any training. A model, of which
            the right layers are taken, or an organ file.
        density: For `ties` and `dare`: share of each task vector that is kept, above 0 and up to 1; left out, 0.2 for
            `ties`, 0.5 for `dare`.
        scale: For `ties` and `dare`: what the merged task vector is multiplied by; left out, 1.
        seed: For `dare`: which values are dropped; left out, 0.
        name: The merged organ's name; left out, made from theirs.
        version: Its semantic version.
        license: Its licence; left out, those of all the organs, joined by AND, if all have one.
        description: One line about it.
        overwrite: Whether an existing file may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.

    Returns:
        The merged organ. Its manifest names its parents, with version, digest and weight.

    Raises:
        UsageError: An option is wrong or has no meaning for the method, or the output exists or is one of the organs.
        OrganFileError: An organ file can't be trusted.
        IncompatibleError: The organs were not made from the same layers, or `base` is not what they were made from.
        ModelError: The base can't be read or cut into layers.
    """
    check_name(name)
    check_version(version)
    settings = _settings(method, base, density, scale, seed)
    if output is not None:
        inputs = [Path(item) for item in [*organs, base] if isinstance(item, str | Path)]
        check_organ_output(Path(output), overwrite=overwrite, inputs=inputs)
    opened = open_organs(organs)
    shares = _shares(weights, len(opened))
    _refuse_unlike(opened)
    original = None if base is None else _original(base, opened[0], trust_remote_code)
    log.info("merging %s", ", ".join(organ.name for organ in opened))
    tensors = merge_tensors([organ.tensors for organ in opened], shares, original, settings)
    merged = _describe(opened, shares, tensors, original, settings)
    update = {
        "name": clean_name(name or "-".join([*(organ.name[:40] for organ in opened), method])),
        "version": version,
        "license": license or _common_license(opened),
        "description": description,
    }
    merged = Organ(merged.manifest.model_copy(update=update), tensors)
    return merged if output is None else merged.save(output, overwrite=overwrite)


def _settings(method: str, base: Any, density: float | None, scale: float | None, seed: int | None) -> dict[str, Any]:
    """Return what the method needs to know, with defaults filled in.

    Raises:
        UsageError: Something is missing, out of range, or has no meaning for the method.
    """
    if method not in METHODS:
        raise UsageError(f"the method is {method!r}; it can be {', '.join(METHODS)}.")
    given = {"base": base, "density": density, "scale": scale, "seed": seed}
    allowed = {"average": (), "ties": ("base", "density", "scale"), "dare": ("base", "density", "scale", "seed")}
    for name, value in given.items():
        if value is not None and name not in allowed[method]:
            raise UsageError(f"--{name} has no meaning for the method {method}.")
    if method == "average":
        return {"method": method}
    if base is None:
        raise UsageError(
            f"the method {method} works on what training added, so it needs the layers that the organs were made from: "
            "give --base MODEL or --base ORGAN."
        )
    density, scale = DENSITIES[method] if density is None else density, 1.0 if scale is None else scale
    if not 0 < density <= 1:
        raise UsageError(f"the density is {density:g}; it must be above 0 and at most 1.")
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"the scale is {scale:g}; it must be a finite number above 0.")
    if seed is not None and seed < 0:
        raise UsageError(f"the seed is {seed}; it must not be negative.")
    return {"method": method, "density": density, "scale": scale} | ({"seed": seed or 0} if method == "dare" else {})


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the organs' weights, scaled to a sum of 1.

    Raises:
        UsageError: There are fewer than two organs, another number of weights, or one is negative.
    """
    if count < 2:
        raise UsageError(f"{count} organ was given; a merge takes two or more.")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise UsageError(f"{len(given)} weights were given for {count} organs; give one for each, in their order.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or sum(given) <= 0:
        raise UsageError(f"the weights are {', '.join(f'{w:g}' for w in given)}; give numbers from 0 up, not all 0.")
    return [weight / sum(given) for weight in given]


def _refuse_unlike(organs: Sequence[Organ]) -> None:
    """Refuse organs whose weights can't be compared number by number.

    Raises:
        IncompatibleError: One sentence says why.
    """
    first = organs[0]
    for other in organs:
        if other.manifest.is_packed:
            raise IncompatibleError(f"the organ {other.name} is quantised, and packed numbers can't be merged.")
    for other in organs[1:]:
        ours, theirs = first.manifest, other.manifest
        if ours.source.layer_digests != theirs.source.layer_digests:
            raise IncompatibleError(
                f"{first.name} was made from {_source_of(ours)} and {other.name} from {_source_of(theirs)}, which are "
                "not the same layers, so a merge of the two would mean nothing; put them at different positions."
            )
        if _place_of(ours) != _place_of(theirs):
            raise IncompatibleError(
                f"{first.name} was trained to {_place_of(ours)} and {other.name} to {_place_of(theirs)}; only organs "
                "of one place can be merged."
            )
        findings = config_findings(ours, other.config())
        if ours.tokenizer is not None and theirs.tokenizer is not None:
            findings += tokenizer_findings(ours.tokenizer, theirs.tokenizer)
        if blocking := [finding for finding in findings if finding.severity == "blocks"]:
            reasons = "; ".join(f"{f.subject} is {f.organ} in one and {f.recipient} in the other" for f in blocking)
            raise IncompatibleError(f"{first.name} and {other.name} can't be merged: {reasons}.")
        if not same_kinds(first.pieces, other.pieces):
            raise IncompatibleError(f"the tensors of {first.name} and {other.name} differ in names, shapes or dtypes.")


def _source_of(manifest: Manifest) -> str:
    source = manifest.source
    return f"layers {source.layer_start}:{source.layer_stop} of {source.model}"


def _place_of(manifest: Manifest) -> str:
    return f"{manifest.recommended_mode} at position {manifest.recommended_position}"


def _original(base: OrganOrPath, organ: Organ, trust_remote_code: bool) -> Organ:
    """Return the layers that an organ was made from, as they were before any training.

    Raises:
        IncompatibleError: What was given is not that.
    """
    source = organ.manifest.source
    if isinstance(base, Organ) or Path(base).suffix == ".safetensors":
        original = base if isinstance(base, Organ) else open_organ(base)
    else:
        original = extract(
            base,
            layers=(source.layer_start, source.layer_stop),
            verify="bytes",
            trust_remote_code=trust_remote_code,
        )
    found = [original.layer_digest(layer) for layer in range(original.layer_count)]
    if found != source.layer_digests:
        raise IncompatibleError(
            f"{base if isinstance(base, str | Path) else base.name} does not hold what {organ.name} was made from, "
            f"{_source_of(organ.manifest)}, to the bit; give the donor, or an organ that was extracted there and not "
            "trained."
        )
    if organ.manifest.recommended_mode == "insert" and organ.manifest.training is not None:
        from neurograft.identity import as_identity  # training began at an identity, so that is what it added to

        return as_identity(original)
    return original


def merge_tensors(
    organs: Sequence[Any], weights: Sequence[float], original: Organ | None, settings: dict[str, Any]
) -> Tensors:
    """Merge weights.

    Args:
        organs: For each organ its tensors by name; all with the same names, shapes and dtypes.
        weights: How much each counts; their sum is 1.
        original: What the task vectors are taken from; `None` for `average`.
        settings: `method`, and for the others than `average` `density` and `scale`, for `dare` also `seed`.

    Returns:
        Name -> tensor, in the dtype that it had.

    Raises:
        IncompatibleError: A tensor of whole numbers differs between the organs.
        UsageError: The scale makes numbers that its dtype can't hold.
    """
    import torch

    method = settings["method"]
    thresholds = [_threshold(organ, original, settings["density"]) for organ in organs] if method == "ties" else []
    merged: Tensors = {}
    for name in organs[0]:
        own = [organ[name] for organ in organs]
        if not own[0].is_floating_point():
            if not all(torch.equal(own[0], tensor) for tensor in own):
                raise IncompatibleError(f"the tensor {name} holds whole numbers that differ, which can't be merged.")
            merged[name] = own[0].clone()
            continue
        wide = torch.promote_types(own[0].dtype, torch.float32)
        if original is None:
            total = _weighted(own, weights, wide)
        else:
            start = original.tensors[name].to(wide)
            vectors = [tensor.to(wide) - start for tensor in own]
            if method == "ties":
                vectors = [_trim(vector, limit) for vector, limit in zip(vectors, thresholds, strict=True)]
                added = _elect_and_average(vectors, weights)
            else:
                vectors = [
                    _drop(vector, settings["density"], _generator(settings["seed"], number, name))
                    for number, vector in enumerate(vectors)
                ]
                added = _weighted(vectors, weights, wide)
            total = start + settings["scale"] * added
        merged[name] = total.to(own[0].dtype)
        if not bool(merged[name].isfinite().all()):
            raise UsageError(f"the merged {name} is not finite in {merged[name].dtype}; give a smaller --scale.")
    return merged


def _weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    import torch

    total = torch.zeros(tensors[0].shape, dtype=dtype)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(dtype), alpha=weight)
    return total


def _threshold(organ: Any, original: Organ | None, density: float) -> float:
    """Return the magnitude that the kept share of a whole task vector reaches, as TIES takes it over all tensors."""
    import torch

    assert original is not None
    parts = [
        (tensor.float() - original.tensors[name].float()).abs().reshape(-1)
        for name, tensor in organ.items()
        if tensor.is_floating_point()
    ]
    sizes = torch.cat(parts)  # (N,)
    kept = max(1, round(density * len(sizes)))
    return float(sizes.kthvalue(len(sizes) - kept + 1).values)


def _trim(vector: torch.Tensor, limit: float) -> torch.Tensor:
    return vector * (vector.abs() >= limit)


def _elect_and_average(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Average, value by value, what has the sign that more weight is behind; 0 where all were trimmed."""
    import torch

    elected = torch.sign(_weighted(vectors, weights, vectors[0].dtype))
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector, weight in zip(vectors, weights, strict=True):
        agrees = (torch.sign(vector) == elected) & (vector != 0)
        total.add_(vector * agrees, alpha=weight)
        count.add_(agrees.to(count.dtype), alpha=weight)
    return torch.where(count > 0, total / count.clamp_min(torch.finfo(count.dtype).tiny), torch.zeros_like(total))


def _drop(vector: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep each value with a probability of `density`, scaled so that its expectation stays what it is."""
    import torch

    return vector * (torch.rand(vector.shape, generator=generator) < density) / density


def _generator(seed: int, organ: int, name: str) -> torch.Generator:
    """Return a source of random numbers for one tensor of one organ, which depends on nothing else."""
    import torch

    digest = hashlib.sha256(f"{seed}\0{organ}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _describe(
    organs: Sequence[Organ],
    weights: Sequence[float],
    tensors: Tensors,
    original: Organ | None,
    settings: dict[str, Any],
) -> Organ:
    """Make the merged organ's manifest from that of the first, with nothing that is true of that one alone."""
    parents = [
        Parent(
            name=organ.name,
            version=organ.manifest.version,
            tensors_digest=combine_digests(digest_pieces(organ.pieces)),
            file_digest=organ.manifest.file_digest if organ.manifest.file_digest != UNSEALED else None,
            weight=weight,
        )
        for organ, weight in zip(organs, weights, strict=True)
    ]
    update: dict[str, Any] = {
        "created": now(),
        "training": None,
        "training_history": [],
        "evaluations": [],
        "scans": [],  # they and the audits were of one parent's weights
        "audits": [],
        "probe": _probe(organs[0], tensors),
        "sketch": None,
        "merged": Merge(**settings, base=None if original is None else original.manifest.source.model, parents=parents),
        "tensors_digest": UNSEALED,
        "file_digest": UNSEALED,
    }
    return Organ(organs[0].manifest.model_copy(update=update), tensors)


def _probe(parent: Organ, tensors: Tensors) -> Probe | None:
    """Return what the merged layers answer to the probe, held in a model of their own.

    That they answer there as they would in their donor is checked with a parent, whose answers are known; `None` where
    that can't be shown.
    """
    import torch

    from neurograft import probe
    from neurograft.anatomy import describe
    from neurograft.layer_weights import load_layers

    def ask(weights: Any) -> torch.Tensor:
        config, rows = parent.config(), parent.manifest.anatomy.layer_values
        carrier = load_layers(config, rows, weights, dtype=torch.float32, name=parent.name)
        return probe.probe_layers(carrier, describe(carrier).layers_path)

    if parent.manifest.probe is None:
        return None
    try:
        probe.verify_answers(parent.manifest.probe, ask(parent.tensors), "float32", parent.name)
        return probe.to_manifest(ask(tensors), "float32")
    except (ModelError, VerificationError):
        log.debug("the merged layers can't be asked apart from a model")
        return None


def _common_license(organs: Sequence[Organ]) -> str | None:
    licenses = [organ.manifest.license for organ in organs]
    return None if None in licenses else " AND ".join(dict.fromkeys(map(str, licenses)))
