"""The signatures beside an organ: `<organ>.sig`, JSON Lines, each line one Sigstore bundle of `model-signing`.

A file with one line is what the library's own command line reads and writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neurograft.errors import NeurograftError, TrustError
from neurograft.files import atomic_file, read_bounded

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

SUFFIX = ".sig"
Kind = Literal["key", "certificate", "sigstore"]
# A bundle has some kilobytes, with a long chain of certificates some tens of them; a file may be anyone's.
LARGEST_FILE = 4 << 20
_MOST_SIGNATURES = 64
_NAMES = ("RFC822Name", "DNSName", "UniformResourceIdentifier")


@dataclass(frozen=True)
class Signature:
    """One signature, as it stands in the file; nothing here is proven until it is checked.

    Attributes:
        text: The bundle: one line of JSON.
        kind: What it was made with.
        digest: SHA-256 of the organ file that it says it is of.
        key_hint: For a key, the SHA-256 of the public key in PEM, 64 hex digits.
        certificates: In DER, the signer's first; none for a key.
    """

    text: str
    kind: Kind
    digest: str
    key_hint: str | None = None
    certificates: tuple[bytes, ...] = ()

    @property
    def signer(self) -> str:
        """Whose it says it is, for people; one signer has one signature of an organ."""
        if self.key_hint is not None:
            return f"key {self.key_hint[:16]}"
        names = names_of(self.certificate)
        shown = names[0] if names else hashlib.sha256(self.certificates[0]).hexdigest()[:16]
        return f"{self.kind} {shown}"

    @property
    def certificate(self) -> Certificate:
        """The signer's certificate.

        Raises:
            TrustError: There is none, or it can't be read.
        """
        return self.chain[0]

    @property
    def chain(self) -> list[Certificate]:
        """The signer's certificate and those above it.

        Raises:
            TrustError: One can't be read.
            NeurograftError: The extra is missing.
        """
        require_library()
        from cryptography import x509

        try:
            return [x509.load_der_x509_certificate(content) for content in self.certificates]
        except (ValueError, x509.InvalidVersion) as error:
            raise TrustError(f"a certificate in the signature can't be read: {error}.") from error


def names_of(certificate: Certificate) -> list[str]:
    """Return what a certificate calls its owner: e-mail addresses, host names and URLs, then common names.

    A part that can't be read, which is only noticed here, names nobody.
    """
    from cryptography import x509

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = [str(value) for kind in _NAMES for value in extension.value.get_values_for_type(getattr(x509, kind))]
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        names = []
    try:
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except ValueError:
        common = []
    return list(dict.fromkeys([*names, *(str(attribute.value) for attribute in common)]))


def require_library() -> None:
    """Refuse where the extra is missing.

    Raises:
        NeurograftError: It is.
    """
    try:
        import model_signing.signing
        import model_signing.verifying  # noqa: F401
    except ImportError as error:
        raise NeurograftError(
            f"signatures need model-signing, which can't be imported ({error}); install it with: pip install "
            "'neurograft[trust]'"
        ) from error


def signature_path(organ: Path) -> Path:
    """Return where an organ's signatures are: beside it, with `.sig` after its whole name."""
    return organ.with_name(organ.name + SUFFIX)


def read_signatures(organ: Path) -> list[Signature]:
    """Read the signatures beside an organ, without checking them; none if there is no such file.

    Raises:
        TrustError: The file is too large, or a line is no signature of one file.
    """
    path = signature_path(organ)
    try:
        text = read_bounded(path, LARGEST_FILE).decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise TrustError(f"{path} can't be read as signatures: {reason}.") from error
    return parse_signatures(text, path)


def parse_signatures(text: str, where: str | Path) -> list[Signature]:
    """Parse the text of a file of signatures.

    Raises:
        TrustError: A line is no signature of one file.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not 0 < len(lines) <= _MOST_SIGNATURES:
        raise TrustError(f"{where} holds {len(lines)} signatures; a file of signatures has 1 to {_MOST_SIGNATURES}.")
    return [parse_signature(line, f"line {number} of {where}") for number, line in lines]


def write_signatures(organ: Path, signatures: Sequence[Signature]) -> Path:
    """Write the signatures beside an organ, atomically, and return where."""
    path = signature_path(organ)
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text("".join(f"{signature.text}\n" for signature in signatures), encoding="utf-8")
    return path


def parse_signature(text: str, where: str) -> Signature:
    """Parse one bundle, which may be spread over several lines, and bring it into one.

    Raises:
        TrustError: It is none of one file, by SHA-256.
    """
    try:
        bundle: dict[str, Any] = json.loads(text)
        material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
        digest = _digest(statement["predicate"]["resources"])
        kind, hint, certificates = _signer(material)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise TrustError(
            f"{where} is no signature of one organ file ({type(error).__name__}: {error}); get the organ's .sig anew."
        ) from error
    line = text.strip() if "\n" not in text.strip() else json.dumps(bundle, separators=(",", ":"))
    return Signature(line, kind, digest, hint, certificates)


def _digest(resources: list[dict[str, Any]]) -> str:
    """Return the digest of the one file that is signed."""
    [resource] = resources
    if resource["name"] != "." or resource["algorithm"] != "sha256":
        raise ValueError(f"{resource['algorithm']} of {resource['name']} was signed, not SHA-256 of the whole file")
    return str(resource["digest"])


def _signer(material: dict[str, Any]) -> tuple[Kind, str | None, tuple[bytes, ...]]:
    if "publicKey" in material:
        return "key", str(material["publicKey"]["hint"]), ()
    if "x509CertificateChain" in material:
        return "certificate", None, _decoded(material["x509CertificateChain"]["certificates"])
    return "sigstore", None, _decoded([material["certificate"]])


def _decoded(certificates: Iterable[dict[str, str]]) -> tuple[bytes, ...]:
    found = tuple(base64.b64decode(certificate["rawBytes"], validate=True) for certificate in certificates)
    if not found:
        raise ValueError("it has no certificate")
    return found
