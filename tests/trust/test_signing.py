"""Signatures beside an organ: by keys and certificates, several signers, and each reason why one does not hold."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing.signing")

from authorities import Authority, Keys, make_authority, make_keys, make_member, renew_authority
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import neurograft
from neurograft.errors import NeurograftError, OrganFileError, TrustError, UsageError
from neurograft.organ import Organ
from neurograft.trust.signature_files import LARGEST_FILE, read_signatures, signature_path
from neurograft.trust.signers import Signer
from neurograft.trust.signing import sign
from neurograft.trust.verifying import Verification, verify


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "maker")


@pytest.fixture
def other(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "other", ec.SECP521R1())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path, "Example Hospitals")


@pytest.fixture
def signed_twice(organ_file: Path, keys: Keys, authority: Authority) -> tuple[list[Signer], list[str]]:
    """Signers by key and by certificate, and their bundles."""
    member, certificate = make_member(organ_file.parent, authority, "radiology")
    sign(organ_file, key=keys.private)
    by_key = signature_path(organ_file).read_text()
    sign(organ_file, key=member.private, certificate=certificate, overwrite=True)
    signers = [Signer(key=keys.public), Signer(certificate=authority.certificate, subject="radiology")]
    return signers, [by_key, signature_path(organ_file).read_text()]


def check(path: Path, *signers: Signer) -> Verification:
    return verify(path, signers=signers)


def alter(path: Path, organ: Organ) -> None:
    """Write another organ at `path`, whole and with right digests of its own, and leave its signatures."""
    update = {"description": "not what was signed"}
    Organ(organ.manifest.model_copy(update=update), organ.tensors).save(path, overwrite=True)


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_a_key_signs_and_its_public_key_verifies(organ_file: Path, tmp_path: Path, curve: Any) -> None:
    keys = make_keys(tmp_path, "curve", curve())
    signed = sign(organ_file, key=keys.private)
    assert signed.path == f"{organ_file}.sig" and signed.signers == [signed.signer]
    found = check(organ_file, Signer(key=keys.public))
    assert found.passed and found.trusted and [each.holds for each in found.signatures] == [True]


def test_the_file_of_one_signature_is_a_bundle_of_the_library(organ_file: Path, keys: Keys) -> None:
    from model_signing import signing, verifying

    sign(organ_file, key=keys.private)
    verifying.Config().use_elliptic_key_verifier(public_key=keys.public).verify(organ_file, f"{organ_file}.sig")
    signing.Config().use_elliptic_key_signer(private_key=keys.private).sign(organ_file, f"{organ_file}.sig")
    assert check(organ_file, Signer(key=keys.public)).passed


def test_several_signers_sign_one_organ(organ_file: Path, keys: Keys, other: Keys, authority: Authority) -> None:
    member, certificate = make_member(organ_file.parent, authority, "radiology")
    sign(organ_file, key=keys.private)
    sign(organ_file, key=member.private, certificate=certificate)
    signed = sign(organ_file, key=other.private)
    assert len(signed.signers) == 3 and len(signature_path(organ_file).read_text().splitlines()) == 3
    by_certificate = Signer(certificate=authority.certificate, subject="radiology@example.org")
    found = check(organ_file, Signer(key=other.public), by_certificate, Signer(key=keys.public))
    assert found.passed and all(each.holds for each in found.signatures)


def test_signing_again_takes_the_place_of_the_signature_before(organ_file: Path, keys: Keys, other: Keys) -> None:
    sign(organ_file, key=keys.private)
    sign(organ_file, key=other.private)
    assert len(sign(organ_file, key=keys.private).signers) == 2


def test_a_key_with_a_password(organ_file: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path, "locked", password="open sesame")
    with pytest.raises(TrustError, match="has a password; set NEUROGRAFT_KEY_PASSWORD"):
        sign(organ_file, key=keys.private)
    with pytest.raises(TrustError, match=r"the password of the key .*locked.pem is another one"):
        sign(organ_file, key=keys.private, password="wrong")
    sign(organ_file, key=keys.private, password="open sesame")
    assert check(organ_file, Signer(key=keys.public)).passed


def test_a_signature_by_another_key(organ_file: Path, keys: Keys, other: Keys) -> None:
    sign(organ_file, key=keys.private)
    found = check(organ_file, Signer(key=other.public))
    assert not found.passed and found.trusted is False
    assert (
        found.refusal is not None and f"is not signed by the key {other.public}; it is signed by key" in found.refusal
    )


def test_a_forged_signature(organ_file: Path, keys: Keys, other: Keys) -> None:
    """One key's signature that says that it is another's."""
    sign(organ_file, key=other.private)
    forged = json.loads(signature_path(organ_file).read_text())
    sign(organ_file, key=keys.private, overwrite=True)
    honest = json.loads(signature_path(organ_file).read_text())
    forged["verificationMaterial"] = honest["verificationMaterial"]
    signature_path(organ_file).write_text(json.dumps(forged))
    found = check(organ_file, Signer(key=keys.public))
    assert not found.passed and "says that it is from" in str(found.refusal) and "and is not" in str(found.refusal)


def test_an_altered_organ_that_is_whole_in_itself(organ_file: Path, organ: Organ, keys: Keys, other: Keys) -> None:
    sign(organ_file, key=keys.private)
    alter(organ_file, organ)
    found = check(organ_file, Signer(key=keys.public))
    assert not found.passed and "was altered after the key" in str(found.refusal)
    with pytest.raises(TrustError, match=r"of other bytes than .* pass --overwrite"):
        sign(organ_file, key=other.private)
    assert len(sign(organ_file, key=keys.private, overwrite=True).signers) == 1
    assert check(organ_file, Signer(key=keys.public)).passed


def test_an_altered_byte(organ_file: Path, keys: Keys) -> None:
    sign(organ_file, key=keys.private)
    content = bytearray(organ_file.read_bytes())
    content[-1] ^= 1
    organ_file.write_bytes(content)
    with pytest.raises(OrganFileError, match="altered or damaged"):
        check(organ_file, Signer(key=keys.public))


def test_no_signature(organ_file: Path, keys: Keys) -> None:
    found = check(organ_file, Signer(key=keys.public))
    assert not found.passed and "is not signed: there is no organ.safetensors.sig" in str(found.refusal)
    with pytest.raises(UsageError, match="nothing says whose signature"):
        verify(organ_file)


def test_certificates_that_expired(organ_file: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    member, certificate = make_member(organ_file.parent, authority, "radiology", days=(-90, -1))
    with pytest.raises(TrustError, match=r"radiology@example.org expired on .*, so nothing can be signed with it"):
        sign(organ_file, key=member.private, certificate=certificate)
    monkeypatch.setattr(
        "neurograft.trust.signing.refuse_outside_validity", lambda *_: None
    )  # signed while it was valid
    sign(organ_file, key=member.private, certificate=certificate)
    signer = Signer(certificate=authority.certificate, subject="radiology")
    found = check(organ_file, signer)
    assert not found.passed and "ask for a signature with a new one" in str(found.refusal)


def test_certificates_that_are_not_valid_yet(organ_file: Path, authority: Authority) -> None:
    member, certificate = make_member(organ_file.parent, authority, "radiology", days=(5, 10))
    with pytest.raises(TrustError, match=r"is valid from .* on; look at this machine's clock"):
        sign(organ_file, key=member.private, certificate=certificate)


def test_a_root_that_was_renewed(organ_file: Path, authority: Authority) -> None:
    member, certificate = make_member(organ_file.parent, authority, "radiology", days=(-90, 90))
    sign(organ_file, key=member.private, certificate=certificate)
    signer, before = Signer(certificate=authority.certificate, subject="radiology"), authority.certificate.read_bytes()
    renew_authority(authority, days=(-30, 900))
    assert "began only after theirs did" in str(check(organ_file, signer).refusal)
    authority.certificate.write_bytes(authority.certificate.read_bytes() + before)  # as the sentence says
    assert check(organ_file, signer).passed


def test_a_pipe_beside_an_organ(organ_file: Path, keys: Keys) -> None:
    os.mkfifo(signature_path(organ_file))
    with pytest.raises(TrustError, match=r"organ.safetensors.sig can't be read as signatures: it is no ordinary file"):
        check(organ_file, Signer(key=keys.public))


def test_certificates_of_others(organ_file: Path, tmp_path: Path, authority: Authority) -> None:
    impostor = make_authority(tmp_path, "Impostor")
    member, certificate = make_member(tmp_path, impostor, "radiology")
    sign(organ_file, key=member.private, certificate=certificate)
    found = check(organ_file, Signer(certificate=authority.certificate, subject="radiology"))
    assert not found.passed and "descends from none in" in str(found.refusal)
    found = check(organ_file, Signer(certificate=impostor.certificate, subject="cardiology"))
    assert not found.passed and "is not signed by cardiology" in str(found.refusal)


def _assert_refused_all_the_same(
    organ: Path, member: Keys, certificate: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that who signs with it nevertheless, as by other software, is refused."""
    with monkeypatch.context() as patched:
        patched.setattr("neurograft.trust.signing.may_sign", lambda _: True)
        sign(organ, key=member.private, certificate=certificate)
    found = check(organ, Signer(certificate=authority.certificate, subject="server"))
    assert not found.passed and "the certificate of server is not for signing" in str(found.refusal)


def test_a_certificate_for_something_else(
    organ_file: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, certificate = make_member(organ_file.parent, authority, "server", signs=False)
    with pytest.raises(TrustError, match="is not for signing files, so nobody would accept"):
        sign(organ_file, key=member.private, certificate=certificate)
    _assert_refused_all_the_same(organ_file, member, certificate, authority, monkeypatch)


def test_a_web_servers_certificate_signs_no_organs(
    organ_file: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, folder = x509.oid.ExtendedKeyUsageOID, organ_file.parent
    member, certificate = make_member(folder, authority, "server", purpose=kinds.SERVER_AUTH)
    with pytest.raises(TrustError, match="whose extended key usage, if it has one, has codeSigning"):
        sign(organ_file, key=member.private, certificate=certificate)
    _assert_refused_all_the_same(organ_file, member, certificate, authority, monkeypatch)
    member, certificate = make_member(folder, authority, "radiology", purpose=kinds.CODE_SIGNING)
    sign(organ_file, key=member.private, certificate=certificate)
    assert check(organ_file, Signer(certificate=authority.certificate, subject="radiology")).passed


def test_a_key_that_is_not_there_is_no_verdict(organ_file: Path, keys: Keys, authority: Authority) -> None:
    member, certificate = make_member(organ_file.parent, authority, "radiology")
    sign(organ_file, key=member.private, certificate=certificate)
    for path, said in ((organ_file.parent / "none.pub", "can't be read"), (keys.private, "is no public key in PEM")):
        with pytest.raises(TrustError, match=said):
            check(organ_file, Signer(key=path))


def test_files_that_are_no_certificates(organ_file: Path, keys: Keys, authority: Authority) -> None:
    member, certificate = make_member(organ_file.parent, authority, "radiology")
    with pytest.raises(TrustError, match="holds no certificate in PEM"):
        sign(organ_file, key=member.private, certificate=keys.public)
    sign(organ_file, key=member.private, certificate=certificate)
    for path, why in ((keys.public, "holds no certificate in PEM"), (organ_file.parent / "none.crt", "can't be read")):
        with pytest.raises(TrustError, match=why):
            check(organ_file, Signer(certificate=path, subject="radiology"))


def test_a_certificate_whose_key_has_a_password(organ_file: Path, tmp_path: Path, authority: Authority) -> None:
    keys = make_keys(tmp_path, "locked", password="open sesame")
    _, certificate = make_member(tmp_path, authority, "radiology")
    for password in (None, "open sesame"):
        with pytest.raises((TrustError, UsageError), match="give a copy of the key without one"):
            sign(organ_file, key=keys.private, certificate=certificate, password=password)


def test_a_certificate_of_another_key(organ_file: Path, keys: Keys, authority: Authority) -> None:
    _, certificate = make_member(organ_file.parent, authority, "radiology")
    with pytest.raises(TrustError, match="is not the certificate of the key"):
        sign(organ_file, key=keys.private, certificate=certificate)


def test_keys_that_can_not_sign(organ_file: Path, keys: Keys, tmp_path: Path) -> None:
    wrong = make_keys(tmp_path, "wrong", ec.SECP256K1())
    with pytest.raises(TrustError, match="is not on one of the curves secp256r1"):
        sign(organ_file, key=wrong.private)
    with pytest.raises(TrustError, match="is no private key in PEM"):
        sign(organ_file, key=keys.public)
    with pytest.raises(TrustError, match=r"none.pem can't be read: No such file"):
        sign(organ_file, key=tmp_path / "none.pem")
    with pytest.raises(TrustError, match="is no public key in PEM"):
        sign(organ_file, key=keys.private)
        check(organ_file, Signer(key=keys.private))
    with pytest.raises(TrustError, match="is not on one of the curves"):
        check(organ_file, Signer(key=wrong.public))


def test_arguments_that_contradict_each_other(organ_file: Path, keys: Keys) -> None:
    with pytest.raises(UsageError, match="belong to a key"):
        sign(organ_file, certificate=keys.public)
    with pytest.raises(UsageError, match="a chain of certificates ends"):
        sign(organ_file, key=keys.private, chain=[keys.public])
    with pytest.raises(UsageError, match="which needs no key"):
        sign(organ_file, key=keys.private, identity_token="x")
    with pytest.raises(UsageError, match="a recipient and text are for measuring claims"):
        verify(organ_file, recipient="model")
    with pytest.raises(ValueError, match="and this one has key, subject"):
        Signer(key=keys.public, subject="radiology")
    with pytest.raises(ValueError, match="and this one has certificate"):
        Signer(certificate=keys.public)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds 0 signatures"),
        ("{}\n", "line 1 of .* is no signature of one organ file"),
        ("[" * 100_000, "is no signature"),
        ("not JSON", "is no signature"),
        ("{}\n" * 65, "holds 65 signatures"),
        (" " * (LARGEST_FILE + 1), "it has more than 4.2 MB"),
    ],
    ids=["empty", "object", "deep", "text", "many", "large"],
)
def test_files_that_hold_no_signatures(organ_file: Path, keys: Keys, content: str, said: str) -> None:
    signature_path(organ_file).write_text(content)
    with pytest.raises(TrustError, match=said):
        check(organ_file, Signer(key=keys.public))


def test_a_signature_over_something_else_than_the_whole_file(organ_file: Path, keys: Keys) -> None:
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    config.set_hashing_config(hashing.Config().use_file_serialization(hashing_algorithm="blake3"))
    config.sign(organ_file, signature_path(organ_file))
    with pytest.raises(TrustError, match="not SHA-256 of the whole file"):
        read_signatures(organ_file)


ALTERATIONS = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=3)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(alterations=ALTERATIONS, by_certificate=st.booleans(), inside=st.booleans())
def test_altered_signatures_end_in_one_sentence_or_do_not_matter(
    organ_file: Path,
    tmp_path: Path,
    signed_twice: tuple[list[Signer], list[str]],
    alterations: list[tuple[int, bytes]],
    by_certificate: bool,
    inside: bool,
) -> None:
    """Bytes are replaced in the text of a bundle, or in the certificate, payload or signature inside it."""
    signers, bundles = signed_twice
    content = bundles[by_certificate].encode()
    parts = re.findall(rb'"(?:rawBytes|payload|sig)": ?"([^"]+)"', content) if inside else [content]
    part = parts[alterations[0][0] % len(parts)]
    altered = bytearray(base64.b64decode(part) if inside else part)
    for place, replacement in alterations:
        start = place % len(altered)
        altered[start : start + len(replacement)] = replacement
    whole = content.replace(part, base64.b64encode(altered) if inside else bytes(altered))
    signature_path(organ_file).write_bytes(whole)
    try:
        found = check(organ_file, signers[by_certificate])
    except TrustError as error:
        assert "\n" not in str(error)
        return
    if found.passed:  # what was altered is in no part that is signed, such as a certificate that stands there twice
        signed = json.loads(base64.b64decode(json.loads(whole)["dsseEnvelope"]["payload"]))
        assert signed == json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))


def test_certificates_of_a_version_that_there_is_not(
    organ_file: Path, authority: Authority, signed_twice: tuple[list[Signer], list[str]]
) -> None:
    _, (_, bundle) = signed_twice

    def damaged(certificate: bytes) -> str:
        """As base64; X.509 counts versions from 0, and 3, which is 2, is the newest one."""
        assert certificate.count(b"\xa0\x03\x02\x01\x02") == 1
        return base64.b64encode(certificate.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01")).decode()

    (first, *_) = re.findall(r'"rawBytes": ?"([^"]+)"', bundle)
    signature_path(organ_file).write_text(bundle.replace(first, damaged(base64.b64decode(first))))
    signer = Signer(certificate=authority.certificate, subject="radiology")
    with pytest.raises(TrustError, match="a certificate in the signature can't be read: 1 is not a valid X509 version"):
        check(organ_file, signer)
    signature_path(organ_file).write_text(bundle)
    lines = authority.certificate.read_text().strip().splitlines()
    content = damaged(base64.b64decode("".join(lines[1:-1])))
    authority.certificate.write_text("\n".join([lines[0], content, lines[-1]]) + "\n")
    with pytest.raises(TrustError, match="holds no certificate in PEM, or one that is damaged"):
        check(organ_file, signer)


def test_an_organ_in_a_bank_is_not_signed_there(organ_file: Path, keys: Keys, tmp_path: Path) -> None:
    neurograft.push(organ_file, tmp_path / "bank")
    with pytest.raises(UsageError, match="pull it, sign the file, and push both"):
        sign(f"{tmp_path}/bank:tiny", key=keys.private)


def test_sigstore_needs_a_network(organ_file: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("no network here")

    monkeypatch.setenv("HOME", str(organ_file.parent))  # where Sigstore caches what it trusts
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(NeurograftError, match=r"Sigstore can't be used here .* keys and certificates do not"):
        sign(organ_file)
    assert not signature_path(organ_file).exists()


def test_the_extra_is_missing(organ_file: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(NeurograftError, match=r"install it with: pip install 'neurograft\[trust\]'"):
        sign(organ_file, key=keys.private)
    with pytest.raises(NeurograftError, match=r"neurograft\[trust\]"):
        check(organ_file, Signer(key=keys.public))
