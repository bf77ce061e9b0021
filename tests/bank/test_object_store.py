"""A bank in S3, as moto serves it on the loopback; skipped where `make object-store` did not install what it needs."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from saving import save_version

import neurograft
from neurograft.bank.folders import FolderStore
from neurograft.errors import BankAccessError, BankDigestError, BankUnreachableError, NotInBankError, VersionExistsError
from neurograft.organ import Organ

pytestmark = pytest.mark.skipif(
    find_spec("moto") is None or find_spec("s3fs") is None, reason="no moto or s3fs; `make object-store` installs both"
)
BANK = "s3://organs/bank"


@pytest.fixture
def bucket(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serve an empty bucket; yield botocore's client of it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    home = tmp_path_factory.mktemp("home")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "clinic", "AWS_SECRET_ACCESS_KEY": "right", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "NEUROGRAFT_CACHE": home / "cache", "HOME": home,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    urllib.request.urlopen(
        f"http://127.0.0.1:{port}/moto-api/reset", data=b""
    ).close()  # its servers share what they keep
    client = boto3.client("s3")
    client.create_bucket(Bucket="organs")
    yield client
    _forget()
    server.stop()


def _forget() -> None:
    """Let s3fs read users and addresses anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bank_in_a_bucket(bucket: Any, organ: Organ, tmp_path: Path) -> None:
    files = {version: save_version(organ, tmp_path, version) for version in ("1.0.0", "1.2.0")}
    for file in files.values():
        assert not neurograft.push(file, BANK).already_there
    assert neurograft.push(files["1.0.0"], BANK, tags=["stable"]).already_there
    for selector, version in [("", "1.2.0"), ("@1.0", "1.0.0"), ("@stable", "1.0.0")]:
        pulled = neurograft.pull(f"{BANK}:tiny{selector}", output=tmp_path / "out.safetensors", overwrite=True)
        assert pulled.entry.version == version
        assert (tmp_path / "out.safetensors").read_bytes() == files[version].read_bytes()
    neurograft.yank(f"{BANK}:tiny@1.2.0", reason="wrong text")
    assert neurograft.inspect(f"{BANK}:tiny").version == "1.0.0"
    assert [(o.name, o.versions, o.newest) for o in neurograft.list(BANK).organs] == [("tiny", 2, "1.0.0")]
    neurograft.yank(f"{BANK}:tiny@1.2.0", undo=True)
    assert neurograft.versions(f"{BANK}:tiny").newest == "1.2.0"


def test_a_version_never_changes_whoever_is_first(
    bucket: Any, organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (save_version(organ, tmp_path, "1.0.0", word) for word in ("one", "other"))
    neurograft.push(first, BANK)
    with pytest.raises(VersionExistsError, match=r"version 1.0.0 with other bytes"):
        neurograft.push(second, BANK)
    monkeypatch.setattr(FolderStore, "versions", lambda *_: {})  # as if both had looked before either wrote
    with pytest.raises(VersionExistsError, match="was written by someone else at the same time"):
        neurograft.push(second, BANK)
    monkeypatch.undo()


def test_altered_and_absent(bucket: Any, organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = neurograft.push(save_version(organ, tmp_path, "1.0.0"), BANK).entry
    place = f"bank/tiny/files/{entry.sha256}.safetensors"
    content = bytearray(bucket.get_object(Bucket="organs", Key=place)["Body"].read())
    content[-1] ^= 1
    bucket.put_object(Bucket="organs", Key=place, Body=bytes(content))
    with pytest.raises(BankDigestError, match="nothing was kept"):
        neurograft.pull(f"{BANK}:tiny", output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    bucket.put_object(Bucket="organs", Key="bank/tiny/versions/1.0.0.json", Body=b"[" * 100_000)
    with pytest.raises(BankDigestError):
        neurograft.pull(f"{BANK}:tiny", output=tmp_path / "out.safetensors")
    with pytest.raises(NotInBankError, match="has no organ other; it has tiny"):
        neurograft.versions(f"{BANK}:other")
    with pytest.raises(NotInBankError, match="there is no bank at s3://elsewhere/bank"):
        neurograft.list("s3://elsewhere/bank")


def test_without_a_password_and_without_a_server(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(BankAccessError, match="refuses access"):
        neurograft.list("s3://organs/other")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "clinic")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _forget()
    with pytest.raises(BankUnreachableError, match="is there a network"):
        neurograft.list("s3://organs/another")
