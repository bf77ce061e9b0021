"""Keys and certificates for tests, made anew each time."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Keys:
    """A pair of keys in files."""

    private: Path
    public: Path


@dataclass(frozen=True)
class Authority:
    """An authority's certificate in a file, and its key."""

    certificate: Path
    key: Any


def make_keys(folder: Path, name: str, curve: Any = None, password: str | None = None) -> Keys:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    return _write_keys(folder, name, key, password)


def _write_keys(folder: Path, name: str, key: Any, password: str | None = None) -> Keys:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    secret: Any = serialization.NoEncryption()
    if password is not None:
        secret = serialization.BestAvailableEncryption(password.encode())
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
    shape = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, shape))
    return Keys(private, public)


def make_authority(folder: Path, name: str) -> Authority:
    authority = Authority(folder / f"{name}.crt", ec.generate_private_key(ec.SECP384R1()))
    renew_authority(authority, days=(-500, 500))
    return authority


def renew_authority(authority: Authority, *, days: tuple[int, int]) -> None:
    """Write a certificate of the same key, valid from and to so many days from now, in the place of the one before."""
    name, key = authority.certificate.stem, authority.key
    certificate = _certificate(name, name, key.public_key(), key, is_authority=True, days=days)
    authority.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_member(
    folder: Path,
    authority: Authority,
    name: str,
    *,
    days: tuple[int, int] = (-10, 10),
    signs: bool = True,
    purpose: x509.ObjectIdentifier | None = None,
) -> tuple[Keys, Path]:
    """Return keys of somebody, and their certificate, valid from and to so many days from now, perhaps for one "
    "purpose."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate.stem
    certificate = _certificate(name, issuer, key.public_key(), authority.key, days=days, signs=signs, purpose=purpose)
    path = folder / f"{name}-{days[1]}.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return _write_keys(folder, f"{name}-{days[1]}", key), path


def _certificate(
    name: str,
    issuer: str,
    public: Any,
    key: Any,
    *,
    days: tuple[int, int],
    is_authority: bool = False,
    signs: bool = True,
    purpose: x509.ObjectIdentifier | None = None,
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=signs and not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not signs,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(f"{name}@example.org")]), critical=False)
    )
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.sign(key, hashes.SHA384())
