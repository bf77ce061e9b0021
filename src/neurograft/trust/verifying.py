"""Say whether an organ is signed by whom it should be, and whether what it claims of itself holds here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from neurograft.errors import UsageError
from neurograft.manifest import Manifest
from neurograft.organ import organ_path, read_manifest
from neurograft.trust.claims import ClaimsReport, measure_claims
from neurograft.trust.policy import judge, policy_path, read_policy
from neurograft.trust.signature_files import read_signatures, require_library, signature_path
from neurograft.trust.signers import Examined, OrganBytes, Signer, examine, require_readable


class Verification(BaseModel):
    """What `verify` found."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    organ: str
    path: str
    policy: str | None
    """The `trust.toml` that was heeded; `None` where signers were given, or there is none."""
    signatures: list[Examined]
    trusted: bool | None
    """Whether it is signed by whom it should be; `None` where nothing says who that is."""
    refusal: str | None
    """Why it is not trusted."""
    claims: ClaimsReport | None
    passed: bool
    """Whether it is trusted, and every claim holds, as far as these were asked about."""


def verify(
    organ: str | Path,
    *,
    signers: Sequence[Signer] = (),
    claims: bool = False,
    recipient: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    general: str | Path | Sequence[str | Path] | None = None,
    tolerance: float = 0.05,
    at: int | None = None,
    max_tokens: int | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check the signatures of an organ, and measure anew what its manifest claims if that is asked for.

    Args:
        organ: The path of an organ file, or a reference to one in a bank.
        signers: Everybody whose signature it should have. Left out, the `trust.toml` in force says; see
            `neurograft.trust.policy.policy_path`.
        claims: Whether to measure what the manifest claims; see `neurograft.trust.claims.measure_claims`, which says
            what the other arguments mean.
        recipient: The model to measure in.
        data: Text of the kind that the organ was trained on.
        general: Other text, on which nothing should be lost.
        tolerance: By how much a ratio of perplexities may be above the claimed one, as a share of it.
        at: Position; left out, the one that fits best.
        max_tokens: At most about so many tokens of each text.
        text_column: See `neurograft.data.read_documents`.
        document_separator: See there.
        encoding: See there.
        seed: Of the bootstrap.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called with (tokens done, tokens in all).

    Raises:
        UsageError: Nothing says whose signature to expect, and no claims are asked about; claims lack a recipient or
            data.
        OrganFileError: The file is no organ, or was altered without being signed again.
        TrustError: The signatures, a key or `trust.toml` can't be read.
        NeurograftError: The extra is missing, or Sigstore can't be reached.
    """
    path = organ_path(organ)
    if not claims and (recipient is not None or data is not None or general is not None):
        raise UsageError("a recipient and text are for measuring claims; add --claims.")
    if claims and (recipient is None or data is None):
        raise UsageError("claims are measured in a model, on text; give --recipient MODEL and --data PATH.")
    where = None if signers else policy_path()
    if not signers and where is None and not claims:
        raise UsageError(
            f"nothing says whose signature {path} should have; give --key, --certificate or --identity, or a "
            "trust.toml."
        )
    manifest = read_manifest(path)
    signatures, trusted, refusal = _signatures(path, str(organ), manifest, signers, where)
    measured = None
    if claims:
        assert recipient is not None and data is not None
        reading: dict[str, Any] = {
            "text_column": text_column, "document_separator": document_separator, "encoding": encoding
        }  # fmt: skip
        measured = measure_claims(
            path, recipient, data, general, tolerance=tolerance, at=at, max_tokens=max_tokens, reading=reading,
            seed=seed, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    return Verification(
        organ=manifest.name,
        path=str(path),
        policy=None if where is None else str(where),
        signatures=signatures,
        trusted=trusted,
        refusal=refusal,
        claims=measured,
        passed=trusted is not False and (measured is None or measured.holds),
    )


def _signatures(
    path: Path, called: str, manifest: Manifest, signers: Sequence[Signer], where: Path | None
) -> tuple[list[Examined], bool | None, str | None]:
    """Return what the signatures are worth, whether they are enough, and why not."""
    if where is not None:
        verdict = judge(path, manifest, read_policy(where), where, called=called)
        return verdict.signatures, verdict.refusal is None, verdict.refusal
    if not signers:
        return [], None, None
    require_library()
    require_readable(signers)
    found = read_signatures(path)
    if not found:
        return [], False, f"{path} is not signed: there is no {signature_path(path).name} beside it."
    examined = examine(OrganBytes(path), found, {str(signer): signer for signer in signers})
    holding = {each.name for each in examined if each.holds}
    for signer in map(str, signers):
        if signer not in holding:
            return examined, False, _lacking(path, signer, examined)
    return examined, True, None


def _lacking(path: Path, signer: str, examined: Sequence[Examined]) -> str:
    failed = [each.reason for each in examined if each.name == signer and each.reason is not None]
    others = ", ".join(each.signer for each in examined)
    return failed[0] if failed else f"{path} is not signed by {signer}; it is signed by {others}."
