"""Signatures travel with their organ: into a bank, out of it, and to the verb that names the organ there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

pytest.importorskip("model_signing.signing")

from authorities import Keys, make_keys

import neurograft
from neurograft import Signer
from neurograft.bank.entries import Entry
from neurograft.bank.resolving import download_organ
from neurograft.bank.stores import Store, open_store
from neurograft.errors import BankDigestError, TrustError, UsageError
from neurograft.organ import Organ
from neurograft.trust.policy import VARIABLE
from neurograft.trust.signature_files import LARGEST_FILE, signature_path


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "maker")


@pytest.fixture(params=["folder", "memory"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "bank") if request.param == "folder" else "memory://some/bank"
    fsspec.filesystem("memory").store.clear()


def entry_in(bank: str) -> tuple[Store, Entry]:
    store = open_store(bank)
    return store, store.entry("tiny", "0.1.0")


def test_signatures_go_in_and_come_out(bank: str, organ_file: Path, keys: Keys, tmp_path: Path) -> None:
    neurograft.sign(organ_file, key=keys.private)
    neurograft.push(organ_file, bank)
    out = tmp_path / "out.safetensors"
    neurograft.pull(f"{bank}:tiny", output=out)
    assert signature_path(out).read_bytes() == signature_path(organ_file).read_bytes()
    assert neurograft.verify(out, signers=[Signer(key=keys.public)]).passed
    assert neurograft.verify(f"{bank}:tiny", signers=[Signer(key=keys.public)]).passed


def test_what_is_signed_later_joins(bank: str, organ_file: Path, keys: Keys, tmp_path: Path) -> None:
    neurograft.push(organ_file, bank)
    assert not signature_path(download_organ(f"{bank}:tiny")).exists()
    other = make_keys(tmp_path, "other")
    neurograft.sign(organ_file, key=keys.private)
    assert neurograft.push(organ_file, bank).already_there
    neurograft.sign(organ_file, key=other.private, overwrite=True)
    neurograft.push(organ_file, bank)
    neurograft.push(organ_file, bank)
    path = download_organ(f"{bank}:tiny")
    assert len(signature_path(path).read_text().splitlines()) == 2
    store, entry = entry_in(bank)
    store.set_signatures(entry, "garbage\n" + (store.signatures(entry) or ""))
    neurograft.push(organ_file, bank)  # which drops what is none
    assert len(signature_path(download_organ(f"{bank}:tiny")).read_text().splitlines()) == 2
    assert neurograft.verify(path, signers=[Signer(key=keys.public), Signer(key=other.public)]).passed


def test_a_policy_lets_a_signed_organ_in_a_bank_be_used(
    bank: str, organ_file: Path, recipient: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurograft.organ._written", set())
    (tmp_path / "trust.toml").write_text('[signers.maker]\nkey = "maker.pub"\n[[allow]]\nsigners = ["maker"]\n')
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trust.toml"))
    neurograft.push(organ_file, bank)
    with pytest.raises(TrustError, match="is not signed"):
        neurograft.check(f"{bank}:tiny", recipient)
    neurograft.sign(organ_file, key=keys.private)
    neurograft.push(organ_file, bank)
    neurograft.check(f"{bank}:tiny", recipient)


def test_signatures_of_other_bytes_are_not_pushed(bank: str, organ: Organ, organ_file: Path, keys: Keys) -> None:
    neurograft.sign(organ_file, key=keys.private)
    update = {"description": "not what was signed", "version": "0.2.0"}
    Organ(organ.manifest.model_copy(update=update), organ.tensors).save(organ_file, overwrite=True)
    with pytest.raises(TrustError, match=r"of other bytes than .* has; sign it anew"):
        neurograft.push(organ_file, bank)


def test_a_pull_leaves_no_signatures_of_something_else(bank: str, organ_file: Path, keys: Keys, tmp_path: Path) -> None:
    neurograft.push(organ_file, bank)
    out = tmp_path / "out.safetensors"
    signature_path(out).write_text("of an organ that was here before")
    with pytest.raises(UsageError, match=r"out.safetensors.sig exists already"):
        neurograft.pull(f"{bank}:tiny", output=out)
    assert not out.exists()
    neurograft.pull(f"{bank}:tiny", output=out, overwrite=True)
    assert out.exists() and not signature_path(out).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"x" * (LARGEST_FILE + 1), "it has more than 4.2 MB; it was altered"), (b"\xff\xfe", "is no text")],
)
def test_what_is_no_signatures_in_a_bank(content: bytes, said: str, organ_file: Path, tmp_path: Path) -> None:
    bank = str(tmp_path / "bank")
    neurograft.push(organ_file, bank)
    store, entry = entry_in(bank)
    store.set_signatures(entry, "x")
    place = tmp_path / "bank" / "tiny" / "signatures" / f"{entry.sha256}.sig"
    place.write_bytes(content)
    with pytest.raises(BankDigestError, match=said):
        download_organ(f"{bank}:tiny")
    for path in (place, tmp_path / "bank" / "tiny" / "versions" / f"{entry.version}.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(BankDigestError, match=f"{path.name} can't be read: it is no ordinary file"):
            download_organ(f"{bank}:tiny")
