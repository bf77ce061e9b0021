"""Banks in an OCI registry: Debian's docker-registry, open to all, with a password, with bearer tokens."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from saving import save_version

import neurograft
from neurograft.bank import downloads, registries
from neurograft.bank.registries import CONFIG, MODEL, WEIGHTS, RegistryStore
from neurograft.errors import (
    BankAccessError,
    BankDigestError,
    BankError,
    BankUnreachableError,
    NotInBankError,
    UsageError,
    VersionExistsError,
    YankedError,
)
from neurograft.organ import Organ
from token_server import serve_tokens

pytest.importorskip("oras")
PROGRAM = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(PROGRAM is None, reason="no docker-registry; `make registry` installs it")
# htpasswd -Bbn clinic right
USERS = "clinic:$2y$05$l7YIT7KW2R3Gl1wvcwE.aOZkspRMDLfXuki4FBKov.fl.7kazVrKC\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _serve(folder: Path, auth: str = "") -> Iterator[str]:
    """Start a registry that keeps its files in a folder; yield its host and port."""
    port, host = _free_port(), "127.0.0.1"
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '{host}:{port}'}}\n{auth}"
    )
    command = [str(PROGRAM), "serve", str(folder / "config.yml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex((host, port)) == 0:
                    break
            time.sleep(0.05)
        yield f"{host}:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    with _serve(tmp_path) as host:
        yield host


def _log_in(folder: Path, host: str, password: str) -> None:
    auth = base64.b64encode(f"clinic:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def _log_in_at_last(folder: Path, host: str, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Be refused without a password and with a wrong one, and then have the right one."""
    with pytest.raises(BankAccessError, match=f"asks for a (login|password); run `docker login {host}`"):
        work()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    _log_in(folder, host, "wrong")
    with pytest.raises(BankAccessError, match="the user or password is wrong"):
        work()
    _log_in(folder, host, "right")


@needs_registry
def test_versions_are_tags_of_model_packs(
    registry: str, organ: Organ, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {version: save_version(organ, tmp_path, version) for version in ("1.0.0", "1.2.0", "1.2.0+site.2")}
    for file in files.values():
        assert not neurograft.push(file, f"oci://{registry}/organs/").already_there
    assert neurograft.push(files["1.0.0"], f"oci://{registry}/organs/tiny:stable").tags == ["stable"]
    bank = f"oci://{registry}/organs/tiny"
    for selector, version in [("", "1.2.0+site.2"), (":1.0.0", "1.0.0"), ("@stable", "1.0.0"), (":1.2.0", "1.2.0")]:
        pulled = neurograft.pull(f"{bank}{selector}", output=tmp_path / "out.safetensors", overwrite=True)
        assert pulled.entry.version == version
        assert (tmp_path / "out.safetensors").read_bytes() == files[version].read_bytes()
    assert neurograft.inspect(f"oci://{registry}/organs:tiny@1.0").version == "1.0.0"
    listed = neurograft.list(f"oci://{registry}/organs").organs
    assert [(o.name, o.versions, o.tags) for o in listed] == [("tiny", 3, {"stable": "1.0.0"})]
    neurograft.tag(f"{bank}:1.2.0", "stable")
    caplog.clear()
    assert neurograft.list(f"oci://{registry}").organs == []
    assert f"see oci://{registry}/organs" in caplog.text
    neurograft.yank(f"{bank}:1.2.0", reason="wrong text")
    with pytest.raises(YankedError, match="wrong text"):
        neurograft.pull(f"{bank}:stable")
    neurograft.yank(f"{bank}:1.2.0", undo=True)
    assert [v.yanked for v in neurograft.versions(bank).versions] == [None, None, None]
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://{registry}/v2/organs/tiny/manifests/1.0.0", headers={"Accept": registries.MANIFEST}
        )
    ) as response:
        artifact = json.load(response)
    layer = artifact["layers"][0]
    assert (artifact["artifactType"], artifact["config"]["mediaType"], layer["mediaType"]) == (MODEL, CONFIG, WEIGHTS)
    assert json.loads(artifact["annotations"]["org.neurograft.manifest"])["name"] == "tiny"


@needs_registry
def test_a_version_never_changes(registry: str, organ: Organ, tmp_path: Path) -> None:
    bank = f"oci://{registry}/tiny"
    neurograft.push(save_version(organ, tmp_path, "1.0.0"), bank)
    with pytest.raises(VersionExistsError, match=r"version 1.0.0 with other bytes"):
        neurograft.push(save_version(organ, tmp_path, "1.0.0", "other"), bank)
    with pytest.raises(NotInBankError, match="has no organ other"):
        neurograft.pull(f"oci://{registry}/other:1.0.0")
    with pytest.raises(NotInBankError, match=r":radiology is a tag of .*, and an organ radiology below it would be"):
        neurograft.pull(f"oci://{registry}/organs:radiology")
    with pytest.raises(UsageError, match=r"to push tiny, write oci://.*/organs/tiny"):
        neurograft.push(save_version(organ, tmp_path, "2.0.0"), f"oci://{registry}/organs:tiny")
    with pytest.raises(NotInBankError, match="no version or tag 3"):
        neurograft.pull(f"{bank}:3")


@needs_registry
def test_an_altered_blob_is_not_kept(registry: str, organ: Organ, tmp_path: Path) -> None:
    entry = neurograft.push(save_version(organ, tmp_path, "1.0.0"), f"oci://{registry}/tiny").entry
    (blob,) = (tmp_path / "data").rglob(f"{entry.sha256}/data")
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BankDigestError, match="nothing was kept"):
        neurograft.pull(f"oci://{registry}/tiny", output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@needs_registry
@pytest.mark.parametrize("left", [0, 900])
def test_a_blob_that_was_cut_off_is_said_to_be(
    left: int, registry: str, organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0)
    file = save_version(organ, tmp_path, "1.0.0")
    entry = neurograft.push(file, f"oci://{registry}/tiny").entry
    (blob,) = (tmp_path / "data").rglob(f"{entry.sha256}/data")
    blob.write_bytes(file.read_bytes()[:left])
    with pytest.raises(BankError, match="cut off"):
        neurograft.pull(f"oci://{registry}/tiny", output=tmp_path / "out.safetensors")
    with pytest.raises(BankDigestError, match=r"has a damaged file of tiny 1.0.0 and keeps it; ask who runs"):
        neurograft.push(file, f"oci://{registry}/tiny")
    shutil.rmtree(blob.parent)  # which they do
    pushed = neurograft.push(file, f"oci://{registry}/tiny")
    assert pushed.already_there and pushed.restored
    neurograft.pull(f"oci://{registry}/tiny", output=tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


@needs_registry
def test_interrupted_transfers_go_on(
    registry: str, organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "_SENT_BYTES", 10_000)
    monkeypatch.setattr(registries, "CHUNK_BYTES", 10_000)
    file, ask, sent = save_version(organ, tmp_path, "1.0.0"), RegistryStore._ask, list[str]()

    def broken(self: RegistryStore, method: str, url: str, **options: object) -> object:
        if method == "PATCH":
            sent.append(options["headers"]["Content-Range"])  # type: ignore[index]
            if len(sent) == 3:
                raise KeyboardInterrupt
        return ask(self, method, url, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RegistryStore, "_ask", broken)
    with pytest.raises(KeyboardInterrupt):
        neurograft.push(file, f"oci://{registry}/tiny")
    assert RegistryStore(f"oci://{registry}").versions("tiny") == {}
    neurograft.push(file, f"oci://{registry}/tiny")
    assert [part.partition("-")[0] for part in sent[:5]] == ["0", "10000", "20000", "20000", "30000"]
    read, starts = RegistryStore.read, list[int]()

    def cut(self: RegistryStore, entry: object, start: int) -> Iterator[bytes]:
        starts.append(start)
        for number, piece in enumerate(read(self, entry, start)):  # type: ignore[arg-type]
            if len(starts) == 1 and number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(RegistryStore, "read", cut)
    with pytest.raises(KeyboardInterrupt):
        neurograft.pull(f"oci://{registry}/tiny", output=tmp_path / "out.safetensors")
    neurograft.pull(f"oci://{registry}/tiny", output=tmp_path / "out.safetensors")
    assert starts == [0, 20_000]
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


@needs_registry
def test_a_registry_with_a_password(organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_version(organ, tmp_path, "1.0.0")
    (tmp_path / "users").write_text(USERS)
    with _serve(tmp_path, f"auth: {{htpasswd: {{realm: registry, path: {tmp_path / 'users'}}}}}\n") as host:
        bank = f"oci://{host}/tiny"
        _log_in_at_last(tmp_path, host, lambda: neurograft.push(file, bank), monkeypatch)
        neurograft.push(file, bank)
        assert neurograft.pull(bank, output=tmp_path / "out.safetensors").entry.version == "1.0.0"


@needs_registry
def test_a_registry_with_bearer_tokens(organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_version(organ, tmp_path, "1.0.0")
    monkeypatch.setattr(registries, "_SENT_BYTES", 10_000)
    with serve_tokens(tmp_path, {"clinic": "right"}) as (auth, given), _serve(tmp_path, auth) as host:
        bank = f"oci://{host}/organs/tiny"
        _log_in_at_last(tmp_path, host, lambda: neurograft.push(file, bank), monkeypatch)
        given.clear()
        neurograft.push(file, bank, tags=["stable"])
        asked = {(user, frozenset(scope.rpartition(":")[2].split(","))) for user, (scope,) in given}
        assert asked == {("clinic", frozenset({"pull"})), ("clinic", frozenset({"pull", "push"}))}
        assert [o.name for o in neurograft.list(f"oci://{host}/organs").organs] == ["tiny"]
        neurograft.yank(f"{bank}:1.0.0", reason="wrong text")
        neurograft.yank(f"{bank}:1.0.0", undo=True)
        monkeypatch.delenv("DOCKER_CONFIG")
        neurograft.pull(f"{bank}:stable", output=tmp_path / "out.safetensors")  # as anybody may
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


@needs_registry
def test_a_token_that_ends_while_a_file_is_sent(organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "_SENT_BYTES", 10_000)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    file, ask = save_version(organ, tmp_path, "1.0.0"), RegistryStore._ask

    def slow(self: RegistryStore, method: str, url: str, **options: object) -> object:
        time.sleep(0.4 if method == "PATCH" else 0)
        return ask(self, method, url, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RegistryStore, "_ask", slow)
    tokens = serve_tokens(tmp_path, {"clinic": "right"}, lasting_seconds=-58)  # the registry allows a minute's leeway
    with tokens as (auth, given), _serve(tmp_path, auth) as host:
        _log_in(tmp_path, host, "right")
        neurograft.push(file, f"oci://{host}/tiny")
        assert len(given) > 2  # one to read, one to write, and another when that ended
        assert neurograft.pull(f"oci://{host}/tiny", output=tmp_path / "out.safetensors").entry.version == "1.0.0"


def test_no_registry_there(organ_file: Path) -> None:
    with pytest.raises(BankUnreachableError, match="is there a network, and a registry"):
        neurograft.push(organ_file, f"oci://127.0.0.1:{_free_port()}/tiny")


@needs_registry
def test_an_artifact_that_is_no_organ(registry: str, organ: Organ, tmp_path: Path) -> None:
    store = RegistryStore(f"oci://{registry}")
    store._send_blob("image", b"{}")
    store._put("image", "1.0.0", {"config": registries._described("text/plain", b"{}"), "layers": []})
    with pytest.raises(BankDigestError, match="is no organ, or was altered"):
        neurograft.pull(f"oci://{registry}/image:1.0.0")
    with pytest.raises(BankError, match="does not do this"):
        store._ask("PUT", f"{store._repository('image')}/manifests/2.0.0", data=b"nonsense")


@needs_registry
def test_signatures_have_a_tag_of_their_own_and_may_grow(registry: str, organ: Organ, tmp_path: Path) -> None:
    file = save_version(organ, tmp_path, "1.0.0+site")
    neurograft.push(file, f"oci://{registry}/organs/")
    store = RegistryStore(f"oci://{registry}/organs")
    entry = store.entry("tiny", "1.0.0+site")
    assert store.signatures(entry) is None
    for text in ("{}\n", "{}\n[]\n"):
        store.set_signatures(entry, text)
        assert store.signatures(entry) == text
    assert store.versions("tiny") == {"1.0.0+site": None} and store.tags("tiny") == {}
