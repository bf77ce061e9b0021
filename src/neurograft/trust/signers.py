"""Whom a signature is expected from, and whether one is theirs: what `model-signing` checks, and what it leaves out."""

from __future__ import annotations

import datetime
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, model_validator

from neurograft.errors import NeurograftError, TrustError, first_line
from neurograft.files import read_bounded
from neurograft.trust.signature_files import Kind, Signature, names_of, require_library

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_KEYS: dict[str, Kind] = {"key": "key", "certificate": "certificate", "identity": "sigstore"}
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_PARTNERS = {"certificate": "subject", "identity": "issuer"}


class Signer(BaseModel):
    """Somebody whose signatures can be told, in one of three ways."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: Path | None = None
    """Their public key, a PEM file."""
    certificate: Path | None = None
    """Certificates that theirs descends from, a PEM file."""
    subject: str | None = None
    """What their certificate calls them: an e-mail address, host name, URL or common name."""
    identity: str | None = None
    """Who they are to Sigstore, such as an e-mail address."""
    issuer: str | None = None
    """The OpenID Connect issuer that says so, a URL."""

    @model_validator(mode="after")
    def _check(self) -> Signer:
        given = [name for name in (*_KEYS, *_PARTNERS.values()) if getattr(self, name) is not None]
        ways = [name for name in _KEYS if name in given]
        if len(ways) != 1 or set(given) != {ways[0], _PARTNERS.get(ways[0], ways[0])}:
            raise ValueError(
                "a signer has either a key, or a certificate and a subject, or an identity and an issuer, and "
                f"this one has {', '.join(given) or 'nothing'}"
            )
        return self

    @property
    def kind(self) -> Kind:
        """What they sign with."""
        return next(kind for name, kind in _KEYS.items() if getattr(self, name) is not None)

    def __str__(self) -> str:
        """Say who it is, for people."""
        if self.key is not None:
            return f"the key {self.key}"
        return self.subject or f"{self.identity} ({self.issuer})"


class OrganBytes:
    """An organ file whose bytes are digested once, however many signatures are checked.

    Attributes:
        path: The file.
        digest: Its SHA-256.
    """

    def __init__(self, path: Path) -> None:
        require_library()
        from model_signing import hashing

        self.path = path.resolve()  # model-signing follows no links
        self._manifest = hashing.Config().hash(self.path)
        self.digest = str(next(iter(self._manifest.resource_descriptors())).digest.digest_hex)

    def hashing(self) -> Any:
        """Return what model-signing takes for a way to digest files, which gives the digest that was made already."""
        from model_signing import hashing

        known = self._manifest

        class Known(hashing.Config):  # type: ignore[misc, unused-ignore]
            def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
                return known

        return Known()


def is_of(signature: Signature, signer: Signer) -> bool:
    """Whether a signature says that it is this signer's, which proves nothing.

    Raises:
        TrustError: The signer's key, or the certificates that theirs descends from, can't be read.
    """
    if signature.kind != signer.kind:
        return False
    if signer.key is not None:
        return signature.key_hint == key_hint(signer.key)
    if signer.certificate is not None:
        load_certificates(signer.certificate)
    return (signer.subject or signer.identity) in names_of(signature.certificate)


def require_readable(signers: Iterable[Signer]) -> None:
    """Refuse signers whose key or certificates can't be read, before a signature is looked at.

    Raises:
        TrustError: A file is missing, or is not what it should be.
    """
    for signer in signers:
        if signer.key is not None:
            key_hint(signer.key)
        if signer.certificate is not None:
            load_certificates(signer.certificate)


def key_hint(path: Path) -> str:
    """Return the SHA-256 of a public key, as signatures name it.

    Raises:
        TrustError: The file is missing or no public key on a curve that is signed with.
    """
    require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(read_bounded(path))
    except OSError as error:
        raise TrustError(f"the key {path} can't be read: {first_line(error)}.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{path} is no public key in PEM; make one with: openssl ec -in KEY -pubout.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise TrustError(
            f"the key {path} is not on one of the curves {', '.join(CURVES)}, with which organs are signed."
        )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


class Examined(BaseModel):
    """What one signature beside an organ is worth."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    signer: str
    """Whose it says it is."""
    kind: Kind
    name: str | None
    """Which of the expected signers that is; `None` for anybody else, of whom nothing can be said."""
    holds: bool
    """Whether it is theirs, and of this very file."""
    reason: str | None
    """Why it does not hold."""


def examine(organ: OrganBytes, signatures: Sequence[Signature], signers: Mapping[str, Signer]) -> list[Examined]:
    """Check each signature against the signers that it may be from; one signature counts for one of them.

    Args:
        organ: The file.
        signatures: Those beside it.
        signers: Name -> whom a signature is expected from.

    Raises:
        TrustError: A signer's key can't be read.
        NeurograftError: Sigstore can't be reached.
    """
    return [_examine(organ, signature, signers) for signature in signatures]


def _examine(organ: OrganBytes, signature: Signature, signers: Mapping[str, Signer]) -> Examined:
    found: dict[str, Any] = {"signer": signature.signer, "kind": signature.kind}
    failed: tuple[str | None, str] = (None, "it is from nobody whose signature is expected")
    for name, signer in signers.items():
        if is_of(signature, signer):
            try:
                check_signature(organ, signature, signer)
            except TrustError as error:
                failed = (name, str(error))
            else:
                return Examined(**found, name=name, holds=True, reason=None)
    return Examined(**found, name=failed[0], holds=False, reason=failed[1])


def check_signature(organ: OrganBytes, signature: Signature, signer: Signer) -> None:
    """Check that a signature is a signer's, and of this very organ file.

    Args:
        organ: The file.
        signature: One of those beside it, that says it is this signer's.
        signer: Who it should be from.

    Raises:
        TrustError: The organ was altered after it was signed, the signature is not theirs, or their certificate
            expired, is for something else, or descends from none that is trusted.
        NeurograftError: Sigstore can't be reached.
    """
    with _failing(organ.path, signer), tempfile.TemporaryDirectory() as folder:
        if signer.certificate is not None:
            _refuse_expired(signature, signer.certificate, str(signer))
            if not may_sign(signature.certificate):
                raise TrustError(
                    f"the certificate of {signer} is not for signing files (its extended key usage, where it has one, "
                    "has to have codeSigning, else its key usage digitalSignature); ask for a signature with one that "
                    "is."
                )
        bundle = Path(folder) / "bundle"
        bundle.write_text(signature.text, encoding="utf-8")
        _verifier(signer).set_hashing_config(organ.hashing()).verify(organ.path, bundle)


def _verifier(signer: Signer) -> Any:
    from model_signing import verifying

    config = verifying.Config()
    if signer.key is not None:
        return config.use_elliptic_key_verifier(public_key=signer.key)
    if signer.certificate is not None:
        return config.use_certificate_verifier(certificate_chain=[signer.certificate])
    with reaching_sigstore():
        return config.use_sigstore_verifier(identity=signer.identity or "", oidc_issuer=signer.issuer or "")


@contextmanager
def _failing(path: Path, signer: Signer) -> Iterator[None]:
    """Say in one sentence why a signature does not hold; the library has a kind of error for each reason."""
    try:
        yield
    except NeurograftError:
        raise
    except Exception as error:
        if str(error).startswith("Signature mismatch"):  # it is theirs, and of other bytes
            raise TrustError(
                f"{path} was altered after {signer} signed it: its bytes are not those that were signed; get it anew, "
                "or have it signed again."
            ) from error
        if signer.certificate is not None and "not yet valid" in str(error):
            raise TrustError(
                f"the signature of {path} by {signer} can't be checked: a certificate in {signer.certificate} began "
                "only after theirs did, for which it has to vouch; if it was renewed, keep the older one there as "
                "well, or ask for a signature with a certificate that is younger than it."
            ) from error
        if signer.certificate is not None and type(error).__name__ == "X509StoreContextError":
            raise TrustError(
                f"the certificate of {signer} that {path} is signed with descends from none in {signer.certificate} "
                f"({first_line(error)}); give the root that theirs descends from, or ask whose it is."
            ) from error
        raise TrustError(
            f"a signature of {path} says that it is from {signer} and is not ({first_line(error)}); get the organ and "
            "its .sig anew from whom they come."
        ) from error


@contextmanager
def reaching_sigstore() -> Iterator[None]:
    """Say in one sentence that Sigstore can't be reached: it is asked for what it trusts at present.

    Raises:
        NeurograftError: It can't be.
    """
    try:
        yield
    except NeurograftError:
        raise
    except Exception as error:
        raise NeurograftError(
            f"Sigstore can't be used here ({type(error).__name__}: {first_line(error)}); it needs a network, and keys "
            "and certificates do not."
        ) from error


def _refuse_expired(signature: Signature, roots: Path, signer: str) -> None:
    """Refuse certificates that are not valid today.

    model-signing looks at the day on which the signer's certificate began, since nothing proves when it was signed.
    """
    known, chain = load_certificates(roots), signature.chain
    issuers = {certificate.issuer for certificate in chain}
    for certificate in [*chain, *(root for root in known if root.subject in issuers)]:
        refuse_outside_validity(
            certificate, f"what {signer} signed with it no longer counts; ask for a signature with a new one"
        )


def load_certificates(path: Path) -> list[Certificate]:
    """Read certificates in PEM.

    Raises:
        TrustError: There is none in the file, or one can't be read.
    """
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(read_bounded(path))
    except OSError as error:
        raise TrustError(f"the certificates {path} can't be read: {first_line(error)}.") from error
    except (ValueError, x509.InvalidVersion) as error:  # whose text is about files of Python's
        raise TrustError(f"{path} holds no certificate in PEM, or one that is damaged; give another file.") from error


def may_sign(certificate: Certificate) -> bool:
    """Whether a certificate says of its key that it may sign files.

    model-signing asks for a key usage that has digitalSignature, or an extended one that has codeSigning. That of a
    web server has the former; but where a certificate says what for its key is, it is for nothing else (RFC 5280,
    4.2.1.12).
    """
    from cryptography import x509

    extensions, kinds = certificate.extensions, x509.oid.ExtendedKeyUsageOID
    try:
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        return kinds.CODE_SIGNING in usages or kinds.ANY_EXTENDED_KEY_USAGE in usages
    except x509.ExtensionNotFound:
        pass
    try:
        return bool(extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature)
    except x509.ExtensionNotFound:
        return False


def refuse_outside_validity(certificate: Certificate, consequence: str) -> None:
    """Refuse a certificate that is not valid today.

    Args:
        certificate: One of a chain.
        consequence: What follows if it expired, to end the sentence with.

    Raises:
        TrustError: It expired, or is not valid yet.
    """
    today = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc < today:
        raise TrustError(
            f"the certificate of {_name(certificate)} expired on {certificate.not_valid_after_utc:%Y-%m-%d}, so "
            f"{consequence}."
        )
    if certificate.not_valid_before_utc > today:
        raise TrustError(
            f"the certificate of {_name(certificate)} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} on; "
            "look at this machine's clock, or wait."
        )


def _name(certificate: Certificate) -> str:
    return next(iter(names_of(certificate)), certificate.subject.rfc4514_string() or "an unnamed owner")
