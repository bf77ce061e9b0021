"""Where an organ came from, as an in-toto statement with the predicate of SLSA provenance: what, from what, by digests.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neurograft import __version__
from neurograft.files import file_sha256
from neurograft.manifest import Manifest, Source, Training
from neurograft.organ import organ_path, read_manifest
from neurograft.trust.signature_files import read_signatures, signature_path

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:neurograft:organ:v1"
# Digests that docs/organ-format.md defines and no file's bytes have go by names of their own.
TENSORS, TEXT, SEALED = "neurograftTensors", "neurograftText", "neurograftFile"


def provenance(organ: str | Path) -> dict[str, Any]:
    """Return the in-toto statement of an organ file, from its manifest; it names data by digest only.

    Args:
        organ: The path of an organ file, or a reference to one in a bank.

    Raises:
        OrganFileError: The file is no organ, or was altered.
        TrustError: There are signatures that can't be read.
    """
    path = organ_path(organ)
    manifest = read_manifest(path)
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": path.name, "digest": {"sha256": file_sha256(path), TENSORS: manifest.tensors_digest}},
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": _parameters(manifest),
                "internalParameters": {"trainings": [_training(training) for training in manifest.trainings]},
                "resolvedDependencies": _materials(manifest),
            },
            "runDetails": {
                "builder": {"id": "urn:neurograft", "version": _versions(manifest)},
                "metadata": {"finishedOn": manifest.created},
                "byproducts": _signatures(path),
            },
        },
    }


def _parameters(manifest: Manifest) -> dict[str, Any]:
    source = manifest.source
    return {
        "name": manifest.name,
        "version": manifest.version,
        "model": source.model,
        "revision": source.revision,
        "layers": f"{source.layer_start}:{source.layer_stop}",
        "merge": None if manifest.merged is None else manifest.merged.method,
    }


def _training(training: Training) -> dict[str, Any]:
    """Return how the organ was trained once; what it was trained on is among the materials."""
    return training.model_dump(mode="json", exclude={"loss_history", "data_fingerprint"})


def _materials(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what the organ was made of: layers, organs, text."""
    parents = [] if manifest.merged is None else manifest.merged.parents
    return [
        *_layers(manifest.source),
        *(
            {
                "name": f"organ {parent.name} {parent.version}",
                "digest": {TENSORS: parent.tensors_digest}
                | ({} if parent.file_digest is None else {SEALED: parent.file_digest}),
                "annotations": {"weight": parent.weight},
            }
            for parent in parents
        ),
        *(
            {
                "name": f"text of training {number}",
                "digest": {TEXT: training.data_fingerprint},
                "annotations": {"host": training.host, "documents": training.documents},
            }
            for number, training in enumerate(manifest.trainings, 1)
            if training.data_fingerprint is not None
        ),
    ]


def _layers(source: Source) -> list[dict[str, Any]]:
    revision = {} if source.revision is None else {"annotations": {"revision": source.revision}}
    return [
        {"name": f"layer {number} of {source.model}", "digest": {TENSORS: digest}, **revision}
        for number, digest in enumerate(source.layer_digests, source.layer_start)
    ]


def _versions(manifest: Manifest) -> dict[str, str]:
    """Return the versions of what trained the organ last, else of what writes this."""
    return {"neurograft": __version__} if manifest.training is None else manifest.training.versions


def _signatures(path: Path) -> list[dict[str, Any]]:
    """Return who says by signature that the organ is theirs; whether it is so, `verify` says."""
    signatures, beside = read_signatures(path), signature_path(path)
    if not signatures:
        return []
    signers = [signature.signer for signature in signatures]
    return [{"name": beside.name, "digest": {"sha256": file_sha256(beside)}, "annotations": {"signers": signers}}]
