"""Sign an organ: with a key, with a key and its certificate, or through Sigstore; several signers sign one organ."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from neurograft.errors import TrustError, UsageError, first_line
from neurograft.files import read_bounded
from neurograft.organ import organ_path, read_manifest
from neurograft.trust.signature_files import (
    Signature,
    parse_signature,
    read_signatures,
    require_library,
    signature_path,
    write_signatures,
)
from neurograft.trust.signers import (
    CURVES,
    OrganBytes,
    load_certificates,
    may_sign,
    reaching_sigstore,
    refuse_outside_validity,
)

_PASSWORD_MISSING = "the key {key} has a password; set NEUROGRAFT_KEY_PASSWORD."
_PASSWORD_NEEDLESS = "the key {key} has no password; unset NEUROGRAFT_KEY_PASSWORD."
_PASSWORD_AND_CERTIFICATE = (
    "the key {key} has a password, and model-signing takes none beside a certificate; give a copy of the key without "
    "one, made with: openssl ec -in {key} -out COPY, and unset NEUROGRAFT_KEY_PASSWORD."
)


class Signed(BaseModel):
    """What `sign` did."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organ: str
    sha256: str
    """Of the organ file."""
    path: str
    """The file of signatures."""
    signer: str
    """Whose signature was added."""
    signers: list[str]
    """All whose signatures are there now."""


def sign(
    organ: str | Path,
    *,
    key: str | Path | None = None,
    password: str | None = None,
    certificate: str | Path | None = None,
    chain: Sequence[str | Path] = (),
    identity_token: str | None = None,
    overwrite: bool = False,
) -> Signed:
    """Sign an organ file; the signature joins those in `<organ>.sig`, in place of an earlier one by the same signer.

    Without a key, Sigstore is asked, which needs a network: it takes the identity that the machine has where it runs
    (continuous integration), or opens a browser.

    Args:
        organ: The path of an organ file.
        key: A private key in PEM, on the curve P-256, P-384 or P-521.
        password: Of the key, if it has one.
        certificate: The certificate of the key, in PEM, to sign with it.
        chain: Files with the certificates between that one and the root, in PEM.
        identity_token: An OpenID Connect token for Sigstore, instead of asking for one.
        overwrite: Drop signatures that are there: of the file as it was before, or such as can't be read.

    Raises:
        UsageError: The organ is in a bank, or arguments contradict each other.
        OrganFileError: The file is no organ, or was altered.
        TrustError: The key or certificate can't be used, or there are signatures of other bytes.
        NeurograftError: The extra is missing, or Sigstore can't be reached.
    """
    path = organ_path(organ)
    if str(path) != str(organ):
        raise UsageError(f"{organ} is in a bank, where versions never change; pull it, sign the file, and push both.")
    if key is None and (certificate is not None or chain or password is not None):
        raise UsageError("a certificate, a chain and a password belong to a key; give the key as well (--key).")
    if chain and certificate is None:
        raise UsageError("a chain of certificates ends in the key's own; give that as well (--certificate).")
    if certificate is not None and password is not None:
        raise UsageError(_PASSWORD_AND_CERTIFICATE.format(key=key))
    if identity_token is not None and key is not None:
        raise UsageError("an identity token is for Sigstore, which needs no key; give one of the two.")
    require_library()
    manifest = read_manifest(path)
    signed = OrganBytes(path)
    there = [] if overwrite else _still_of(signed, path)
    if key is None:
        signature = _by_sigstore(signed, identity_token)
    elif certificate is None:
        signature = _by_key(signed, Path(key), password)
    else:
        signature = _by_certificate(signed, Path(key), Path(certificate), [Path(file) for file in chain])
    signatures = [*(other for other in there if other.signer != signature.signer), signature]
    written = write_signatures(path, signatures)
    return Signed(
        organ=manifest.name,
        sha256=signed.digest,
        path=str(written),
        signer=signature.signer,
        signers=[other.signer for other in signatures],
    )


def _still_of(organ: OrganBytes, path: Path) -> list[Signature]:
    """Return the signatures that are there.

    Raises:
        TrustError: One is of other bytes: the organ was changed since, and the others' word is not for what it is now.
    """
    there = read_signatures(path)
    for signature in there:
        if signature.digest != organ.digest:
            raise TrustError(
                f"{signature_path(path)} holds a signature ({signature.signer}) of other bytes than {path} has now; "
                "pass --overwrite to drop what was signed before."
            )
    return there


def _sign(config: Any, organ: OrganBytes) -> Signature:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        config.set_hashing_config(organ.hashing()).sign(organ.path, bundle)
        return parse_signature(bundle.read_text(encoding="utf-8"), "the signature that was made")


def _by_key(organ: OrganBytes, key: Path, password: str | None) -> Signature:
    from model_signing import signing

    _check_key(key, password)
    secret: Any = None if password is None else password.encode()  # annotated as text; cryptography takes bytes
    return _sign(signing.Config().use_elliptic_key_signer(private_key=key, password=secret), organ)


def _by_certificate(organ: OrganBytes, key: Path, certificate: Path, chain: Sequence[Path]) -> Signature:
    from model_signing import signing

    _check_key(key, None, locked=_PASSWORD_AND_CERTIFICATE)
    for path in [certificate, *chain]:
        for each in load_certificates(path):
            refuse_outside_validity(each, "nothing can be signed with it")
    if not may_sign(load_certificates(certificate)[0]):
        raise TrustError(
            f"the certificate {certificate} is not for signing files, so nobody would accept what is signed with it; "
            "ask for one whose key usage has digitalSignature and whose extended key usage, if it has one, has "
            "codeSigning."
        )
    above = chain or [certificate]  # model-signing reads no empty chain; who stands there twice is passed over
    try:
        config = signing.Config().use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=above
        )
    except ValueError as error:
        raise TrustError(f"{certificate} is not the certificate of the key {key}: {first_line(error)}.") from error
    return _sign(config, organ)


def _by_sigstore(organ: OrganBytes, identity_token: str | None) -> Signature:
    from model_signing import signing

    with reaching_sigstore():
        config = signing.Config().use_sigstore_signer(use_ambient_credentials=True, identity_token=identity_token)
        return _sign(config, organ)


def _check_key(path: Path, password: str | None, *, locked: str = _PASSWORD_MISSING) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = None if password is None else password.encode()
    try:
        key = serialization.load_pem_private_key(read_bounded(path), secret)
    except OSError as error:
        raise TrustError(f"the key {path} can't be read: {error.strerror or error}.") from error
    except TypeError as error:  # cryptography's word for a password that is missing, or one too many
        raise TrustError(
            locked.format(key=path) if password is None else _PASSWORD_NEEDLESS.format(key=path)
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if password is not None and "password" in str(error).lower():
            raise TrustError(f"the password of the key {path} is another one.") from error
        raise TrustError(
            f"{path} is no private key in PEM; make one with: openssl ecparam -name prime256v1 -genkey -noout -out KEY."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise TrustError(
            f"the key {path} is not on one of the curves {', '.join(CURVES)}, which organs are signed with."
        )
