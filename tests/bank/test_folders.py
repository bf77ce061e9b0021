"""Banks in folders and behind fsspec URLs: versions, tags, yanking, digests, interruptions, references in verbs."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from saving import save_version
from typer.testing import CliRunner

import neurograft
from neurograft.bank import downloads, folders
from neurograft.bank.entries import Entry
from neurograft.bank.folders import FolderStore
from neurograft.bank.references import parse_organ
from neurograft.bank.resolving import download_organ, find
from neurograft.bank.stores import explaining
from neurograft.cli import app
from neurograft.errors import (
    BankAccessError,
    BankDigestError,
    BankError,
    BankUnreachableError,
    NeurograftError,
    NoBankError,
    NotInBankError,
    OrganFileError,
    UsageError,
    VersionExistsError,
    YankedError,
)
from neurograft.files import file_sha256
from neurograft.models import cache_directory
from neurograft.organ import Organ, read_organ

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def save(organ: Organ, tmp_path: Path) -> Save:
    def save(version: str = "1.0.0", description: str | None = None) -> Path:
        return save_version(organ, tmp_path, version, description)

    return save


@pytest.fixture(params=["folder", "memory"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a URL of fsspec's that is no folder."""
    yield str(tmp_path / "bank") if request.param == "folder" else "memory://some/bank"
    fsspec.filesystem("memory").store.clear()


def test_versions_tags_and_yanks(bank: str, save: Save, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1"):
        assert not neurograft.push(save(version), bank).already_there
    assert neurograft.push(save("1.2.0"), f"{bank}:tiny@stable", tags=["site-a"]).tags == ["stable", "site-a"]
    listed = neurograft.list(bank).organs
    assert [(o.name, o.newest, o.versions, o.tags) for o in listed] == [
        ("tiny", "1.10.0", 4, {"site-a": "1.2.0", "stable": "1.2.0"})
    ]
    for selector, version in [("", "1.10.0"), ("@1.2", "1.2.0"), ("@stable", "1.2.0"), ("@2.0.0-rc.1", "2.0.0-rc.1")]:
        pulled = neurograft.pull(f"{bank}:tiny{selector}", output=tmp_path / "out.safetensors", overwrite=True)
        assert pulled.entry.version == version
        assert (tmp_path / "out.safetensors").read_bytes() == save(version).read_bytes()
    assert neurograft.tag(f"{bank}:tiny@1.10", "stable").version == "1.10.0"
    neurograft.yank(f"{bank}:tiny@1.10.0", reason="trained on\nthe wrong text")
    with pytest.raises(YankedError, match=r"tiny@1.10.0 was yanked \(trained on the wrong text\)"):
        neurograft.pull(f"{bank}:tiny@stable")
    found = neurograft.versions(f"{bank}:tiny")
    assert [(v.version, v.tags, v.yanked) for v in found.versions] == [
        ("1.0.0", [], None),
        ("1.2.0", ["site-a"], None),
        ("1.10.0", ["stable"], "trained on the wrong text"),
        ("2.0.0-rc.1", [], None),
    ]
    assert found.newest == "1.2.0"
    allowed = neurograft.pull(f"{bank}:tiny@1.10.0", output=tmp_path / "yanked.safetensors", allow_yanked=True)
    assert allowed.yanked == "trained on the wrong text"
    neurograft.yank(f"{bank}:tiny@1.10.0", undo=True)
    assert neurograft.versions(f"{bank}:tiny").newest == "1.10.0"


def test_a_version_never_changes(bank: str, save: Save) -> None:
    first = neurograft.push(save("1.0.0"), bank)
    again = neurograft.push(save("1.0.0"), bank)
    assert again.already_there and again.entry == first.entry
    with pytest.raises(VersionExistsError, match=r"tiny has version 1.0.0 with other bytes .* give the organ a new"):
        neurograft.push(save("1.0.0", "other"), bank, tags=["stable"])
    assert [v.sha256 for v in neurograft.versions(f"{bank}:tiny").versions] == [first.entry.sha256]
    assert neurograft.list(bank).organs[0].tags == {}


def test_two_who_push_a_version_at_once(bank: str, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looked before the first had written: only what the store itself does can stop it."""
    neurograft.push(save("1.0.0"), bank)
    monkeypatch.setattr(FolderStore, "versions", lambda self, name: {})
    with pytest.raises(VersionExistsError, match="other bytes"):
        neurograft.push(save("1.0.0", "other"), bank)


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        (UsageError, ["push", "ORGAN", "bank:tiny@3.0.0"], "asks for version 3.0.0, and the organ's manifest says"),
        (UsageError, ["push", "ORGAN", "bank", "--tag", "2"], "'2' is no tag"),
        (UsageError, ["push", "ORGAN", "no/such/bank"], "no does not exist; create it first|no/such does not exist"),
        (UsageError, ["push", "ORGAN", "nonsense://bank"], "opens no nonsense://bank"),
        (UsageError, ["pull", "bank"], "names no organ"),
        (UsageError, ["pull", "bank:tiny", "-o", "out.bin"], "ends in .safetensors"),
        (UsageError, ["list", "bank:tiny"], "names one organ"),
        (UsageError, ["yank", "bank:tiny"], "does not say which version"),
        (UsageError, ["yank", "bank:tiny@1"], "1 is no whole version; write bank:tiny@1.0.0"),
        (UsageError, ["tag", "bank:tiny", "2.0"], "'2.0' is no tag"),
        (NoBankError, ["list", "nowhere"], "there is no bank at nowhere"),
        (NoBankError, ["pull", "nowhere:tiny"], "there is no bank at nowhere"),
        (UsageError, ["pull", ":tiny"], ":tiny names no bank"),
        (UsageError, ["pull", "bank/tiny"], "write BANK:NAME@VERSION, such as bank:tiny"),
        (UsageError, ["push", "ORGAN", "file.txt"], "file.txt is a file; give a folder"),
        (UsageError, ["yank", "bank:tiny@1.0.0", "--reason", "x" * 501], "the reason has 501 characters"),
        (UsageError, ["yank", "bank:tiny@1.0.0", "--undo"], "bank:tiny@1.0.0 is not yanked"),
        (UsageError, ["push", "ORGAN", "bank:ti ny"], "'ti ny' is no organ's name"),
        (NotInBankError, ["pull", "bank:other"], "bank has no organ other; it has tiny."),
        (NotInBankError, ["versions", "bank:other"], "bank has no organ other; it has tiny."),
        (NotInBankError, ["tag", "bank:other@1", "stable"], "bank has no organ other; it has tiny."),
        (NotInBankError, ["tag", "bank:tiny@4", "stable"], "bank:tiny has no version or tag 4; it has (1.0.0)"),
        (NotInBankError, ["inspect", "bank:tiny@nightly"], "no version or tag nightly"),
        (OrganFileError, ["push", "missing.safetensors", "bank"], "there is no organ file"),
    ],
)
def test_refusals_are_one_sentence(
    kind: type[NeurograftError],
    words: list[str],
    sentence: str,
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    neurograft.push(save(), "bank")
    (tmp_path / "file.txt").touch()
    result = CliRunner().invoke(app, [str(save()) if word == "ORGAN" else word for word in words] + ["--json"])
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 2 and error["kind"] == kind.__name__
    assert any(part in error["message"] for part in sentence.split("|")), error["message"]
    assert error["message"].endswith(".") and "\n" not in error["message"]


def test_the_commands(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps: list[tuple[list[Any], str]] = [
        (["push", save(), "bank", "--tag", "stable"], "1.0.0, pushed"),
        (["push", save(), "bank"], "was there already"),
        (["list", "bank"], "stable = 1.0.0"),
        (["versions", "bank:tiny"], "stable"),
        (["pull", "bank:tiny@stable"], "tiny-1.0.0.safetensors"),
        (["inspect", "bank:tiny"], "organ tiny"),
        (["tag", "bank:tiny@1.0.0", "site-a"], "site-a stands for tiny 1.0.0 in bank"),
        (["yank", "bank:tiny@1.0.0", "--reason", "no licence"], "was yanked: no licence"),
        (["yank", "bank:tiny@1.0.0", "--undo"], "may be taken again"),
    ]
    for words, expected in steps:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        assert expected in result.stdout
    assert (tmp_path / "tiny-1.0.0.safetensors").read_bytes() == save().read_bytes()


def test_every_verb_takes_a_reference(
    save: Save, donor: Path, recipient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    neurograft.push(save(), "bank")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"report {number}: nothing to be seen, patient well" for number in range(12)))
    reference = "bank:tiny@1.0"
    assert read_organ(reference).name == "tiny"
    data = ["--data", str(text), "--sequence-length", "16"]
    steps: list[list[Any]] = [
        ["inspect", reference],
        ["check", reference, recipient],
        ["transplant", reference, recipient, "-o", "grafted"],
        ["train", reference, "--host", donor, "-o", "trained.safetensors", "--steps", "1", *data],
        ["scan", reference, recipient, "--modes", "replace", "--positions", "2", "--max-tokens", "256", *data],
        ["report", reference, "-o", "report.html"],
        ["push", reference, "other-bank"],
    ]
    for words in steps:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, (words, result.output)
    assert "tiny" in (tmp_path / "report.html").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["scan", reference, str(recipient), "--record", *data])
    assert result.exit_code == 2 and "versions never change; pull it" in " ".join(result.stderr.split())


def test_an_altered_file_is_not_kept(bank: str, save: Save, tmp_path: Path) -> None:
    entry = neurograft.push(save(), bank).entry
    path = f"{bank}/tiny/files/{entry.sha256}.safetensors"
    content = bytearray(save().read_bytes())
    content[-1] ^= 1
    with fsspec.open(path, "wb") as stream:
        stream.write(bytes(content))
    with pytest.raises(BankDigestError, match=r"was altered: its SHA-256 is .* was pushed; nothing was kept"):
        neurograft.pull(f"{bank}:tiny", output=tmp_path / "out.safetensors")
    with fsspec.open(path, "wb") as stream:
        stream.write(bytes(content) + b"more")
    with pytest.raises(BankDigestError, match="gives more than"):
        neurograft.pull(f"{bank}:tiny", output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert not [file for file in cache_directory().rglob("*") if file.suffix in (".safetensors", ".part")]


@pytest.mark.parametrize("altered", ["[]", '{"schema_version": 1}', "", "\x00", '{"version": 3}', "[" * 100_000])
def test_an_altered_catalogue_is_refused(bank: str, save: Save, altered: str) -> None:
    neurograft.push(save(), bank)
    with fsspec.open(f"{bank}/tiny/versions/1.0.0.json", "w") as stream:
        stream.write(altered)
    with pytest.raises(BankDigestError, match="altered"):
        neurograft.versions(f"{bank}:tiny")


def test_a_broken_mark_keeps_nobody_from_the_rest(bank: str, save: Save, tmp_path: Path) -> None:
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        neurograft.push(save(version), bank)
    neurograft.tag(f"{bank}:tiny@1.0.0", "stable")
    neurograft.yank(f"{bank}:tiny@2.0.0", reason="wrong text")
    for place in ("tags/stable", "yanked/2.0.0", "versions/3.0.0"):
        with fsspec.open(f"{bank}/tiny/{place}.json", "w") as stream:
            stream.write("garbage")
    assert [(v.version, v.yanked) for v in neurograft.versions(f"{bank}:tiny").versions] == [
        ("1.0.0", None), ("2.0.0", "the reason can't be read")
    ]  # fmt: skip
    assert [organ.name for organ in neurograft.list(bank).organs] == ["tiny"]
    neurograft.pull(f"{bank}:tiny@1.0.0", output=tmp_path / "out.safetensors")
    with pytest.raises(YankedError, match="the reason can't be read"):
        neurograft.pull(f"{bank}:tiny@2.0.0", output=tmp_path / "out.safetensors", overwrite=True)
    neurograft.tag(f"{bank}:tiny@1.0.0", "stable")
    neurograft.yank(f"{bank}:tiny@2.0.0", undo=True)
    assert neurograft.pull(f"{bank}:tiny@stable", output=tmp_path / "again.safetensors").entry.version == "1.0.0"
    assert neurograft.pull(f"{bank}:tiny@2", output=tmp_path / "two.safetensors").entry.version == "2.0.0"


def test_a_lost_or_damaged_file_is_sent_again(bank: str, save: Save, tmp_path: Path) -> None:
    file = save()
    entry = neurograft.push(file, bank).entry
    place, content = f"{bank}/tiny/files/{entry.sha256}.safetensors", file.read_bytes()
    assert not neurograft.push(file, bank).restored
    damaged = bytes([content[0] ^ 1]) + content[1:]
    for left in (content[:1000], damaged) if "memory" not in bank else (content[:1000],):
        with fsspec.open(place, "wb") as stream:
            stream.write(left)
        pushed = neurograft.push(file, bank)
        assert pushed.already_there and pushed.restored
        pulled = neurograft.pull(f"{bank}:tiny", output=tmp_path / "out.safetensors", overwrite=True)
        assert Path(pulled.path).read_bytes() == content
        shutil.rmtree(cache_directory())


def test_a_file_that_was_cut_off_is_said_to_be(bank: str, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0)
    file = save()
    entry = neurograft.push(file, bank).entry
    with fsspec.open(f"{bank}/tiny/files/{entry.sha256}.safetensors", "wb") as stream:
        stream.write(file.read_bytes()[:1000])
    with pytest.raises(BankDigestError, match=r"was cut off: it has 1,000 of its .* bytes; push the organ again"):
        neurograft.pull(f"{bank}:tiny")


def test_what_strangers_wrote_does_not_steer_a_terminal(bank: str, save: Save) -> None:
    neurograft.push(save("1.0.0", "fine\x1b[2K\x1b[32mtrusted \u202efdp"), bank)
    neurograft.yank(f"{bank}:tiny@1.0.0", reason="bad\x1b[2Kgood")
    words = (["inspect", str(save("1.0.0", "fine\x1b[2K\x1b[32mtrusted \u202efdp"))], ["versions", f"{bank}:tiny"])
    for command in (*words, ["pull", f"{bank}:tiny@1.0.0"], ["card", words[0][1]]):
        result = CliRunner().invoke(app, command)
        shown = result.stdout + result.stderr
        assert "\x1b" not in shown and "\u202e" not in shown and "\\x1b[2K" in shown
    result = CliRunner().invoke(app, [*words[0], "--json"])
    assert "\u202e" not in result.stdout
    assert json.loads(result.stdout)["description"] == "fine\x1b[2K\x1b[32mtrusted \u202efdp"


def test_what_looks_like_an_emoji_is_a_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", f"{tmp_path}/a:bone:b.safetensors", str(tmp_path)])
    assert ":bone:" in result.stderr


def test_an_entry_about_another_version_is_refused(tmp_path: Path, save: Save) -> None:
    neurograft.push(save("1.0.0"), tmp_path / "bank")
    folder = tmp_path / "bank" / "tiny" / "versions"
    (folder / "2.0.0.json").write_bytes((folder / "1.0.0.json").read_bytes())
    with pytest.raises(BankDigestError, match=r"is about tiny 1.0.0, not tiny 2.0.0"):
        neurograft.pull(f"{tmp_path / 'bank'}:tiny")


def test_an_interrupted_pull_goes_on(bank: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = neurograft.push(save(), bank).entry
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(folders, "CHUNK_BYTES", 1000)
    whole, starts = FolderStore.read, list[int]()

    def broken(self: FolderStore, entry: Entry, start: int) -> Iterator[bytes]:
        starts.append(start)
        for number, piece in enumerate(whole(self, entry, start)):
            if number == 3 and len(starts) != 2:
                raise KeyboardInterrupt if len(starts) == 1 else BankUnreachableError("the line broke")
            if number == 2 and len(starts) == 2:
                return  # as a server does that closes early
            yield piece

    monkeypatch.setattr(FolderStore, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        neurograft.pull(f"{bank}:tiny", output=tmp_path / "out.safetensors")
    neurograft.pull(f"{bank}:tiny", output=tmp_path / "out.safetensors")
    assert starts[:4] == [0, 3000, 5000, 8000]
    assert file_sha256(tmp_path / "out.safetensors") == entry.sha256


def test_a_damaged_part_is_fetched_anew(tmp_path: Path, save: Save) -> None:
    neurograft.push(save(), tmp_path / "bank")
    path = download_organ(f"{tmp_path / 'bank'}:tiny")
    content = path.read_bytes()
    path.with_suffix(".part").write_bytes(b"\0" * 500)
    path.unlink()
    assert download_organ(f"{tmp_path / 'bank'}:tiny").read_bytes() == content
    path.write_bytes(content[:-1] + b"\0")  # in the cache, after it was verified
    assert download_organ(f"{tmp_path / 'bank'}:tiny").read_bytes() == content
    assert neurograft.cache().entries[0].kind == "organs"
    assert neurograft.cache(clear="organs").cleared and not neurograft.cache().entries


def test_a_bank_that_breaks_says_what_to_do(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    neurograft.push(save(), tmp_path / "bank")
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0)

    def broken(self: FolderStore, entry: Entry, start: int) -> Iterator[bytes]:
        yield from [b"12345"] if start == 0 else []
        raise BankUnreachableError("no route")

    monkeypatch.setattr(FolderStore, "read", broken)
    with pytest.raises(BankUnreachableError, match=r"gave 5 of the .* \(no route\); the same command goes on"):
        neurograft.pull(f"{tmp_path / 'bank'}:tiny")


def test_an_interrupted_push_goes_on(tmp_path: Path, save: Save) -> None:
    file, bank = save(), tmp_path / "bank"
    files = bank / "tiny" / "files"
    files.mkdir(parents=True)
    part = files / f"{file_sha256(file)}.part"
    part.write_bytes(file.read_bytes()[:1000])
    assert neurograft.list(bank).organs == []  # a version is there once its file is
    neurograft.push(file, bank)
    assert not part.exists()
    part.write_bytes(b"something else")
    part.with_suffix(".safetensors").unlink()
    (bank / "tiny" / "versions" / "1.0.0.json").unlink()
    with pytest.raises(BankDigestError, match="push it again"):
        neurograft.push(file, bank)
    neurograft.push(file, bank)
    assert file_sha256(part.with_suffix(".safetensors")) == file_sha256(file)


def _pull(reference: str, cache: str, queue: Any) -> None:
    os.environ["NEUROGRAFT_CACHE"] = cache
    read = FolderStore.read

    def counted(self: FolderStore, entry: Entry, start: int) -> Iterator[bytes]:
        queue.put(os.getpid())
        return read(self, entry, start)

    FolderStore.read = counted  # type: ignore[method-assign]
    download_organ(reference)


def test_processes_share_one_download(tmp_path: Path, save: Save) -> None:
    neurograft.push(save(), tmp_path / "bank")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (f"{tmp_path / 'bank'}:tiny", str(cache_directory()), queue)
    workers = [context.Process(target=_pull, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    queue.get(timeout=10)
    assert queue.empty()


def test_what_fsspec_raises_becomes_a_sentence(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path))
    named = type("NoCredentialsError", (Exception,), {})("no keys")
    for raised, kind, sentence in [
        (PermissionError("denied"), BankAccessError, "refuses access"),
        (named, BankAccessError, "check the rights, or the user and password"),
        (NotImplementedError(), BankAccessError, "can't be written to"),
        (ConnectionRefusedError("refused"), BankUnreachableError, "is there a network"),
        (TimeoutError(), BankUnreachableError, "can't be reached"),
        (RuntimeError("odd"), BankError, "can't be used: RuntimeError: odd"),
    ]:
        with pytest.raises(kind, match=sentence), explaining(store._explain):
            raise raised


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, save: Save) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    bank = tmp_path / "bank"
    bank.mkdir(mode=0o500)
    with pytest.raises(BankAccessError, match="refuses access"):
        neurograft.push(save(), bank)


def test_the_newest_is_found_through_other_files(tmp_path: Path, save: Save) -> None:
    neurograft.push(save("1.0.0"), tmp_path / "bank")
    (tmp_path / "bank" / "notes.txt").write_text("nothing of ours")
    (tmp_path / "bank" / "tiny" / "versions" / "README.json").write_text("{}")
    assert find(parse_organ(f"{tmp_path / 'bank'}:tiny"))[1].version == "1.0.0"
    assert [organ.name for organ in neurograft.list(tmp_path / "bank").organs] == ["tiny"]


def test_an_organ_without_a_semantic_version_is_not_pushed(tmp_path: Path, organ: Organ) -> None:
    path = tmp_path / "old.safetensors"
    Organ(organ.manifest.model_copy(update={"version": "01.0.0"}), organ.tensors).save(path)
    with pytest.raises(UsageError, match=r"'01.0.0' is no semantic version"):
        neurograft.push(path, tmp_path / "bank")
