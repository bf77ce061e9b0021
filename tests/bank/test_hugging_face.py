"""Banks on the Hub, against a server on the loopback that speaks its API; the model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from saving import save_version

import neurograft
from hub_server import WritableHub, serve_writable
from neurograft.bank import downloads
from neurograft.bank.card import model_card
from neurograft.bank.hugging_face import HubStore
from neurograft.bank.stores import explaining
from neurograft.errors import BankAccessError, BankUnreachableError, NotInBankError, VersionExistsError, YankedError
from neurograft.manifest import Evaluation
from neurograft.organ import Organ

BANK = "hf://clinic/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WritableHub]:
    hub = WritableHub(token="hf_right")
    with serve_writable(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0)
        yield hub


def test_versions_are_revisions(hub: WritableHub, organ: Organ, tmp_path: Path) -> None:
    files = {version: save_version(organ, tmp_path, version) for version in ("1.0.0", "1.2.0")}
    for file in files.values():
        assert not neurograft.push(file, BANK).already_there
    assert neurograft.push(files["1.0.0"], BANK, tags=["stable"]).already_there
    assert neurograft.list("hf://clinic").organs[0].model_dump() == {
        "name": "tiny", "newest": "1.2.0", "versions": 2, "tags": {"stable": "1.0.0"},
    }  # fmt: skip
    for selector, version in [("", "1.2.0"), ("@1.0.0", "1.0.0"), ("@stable", "1.0.0")]:
        pulled = neurograft.pull(f"{BANK}{selector}", output=tmp_path / "out.safetensors", overwrite=True)
        assert pulled.entry.version == version
        assert (tmp_path / "out.safetensors").read_bytes() == files[version].read_bytes()
    assert neurograft.inspect("hf://clinic:tiny@1.0").version == "1.0.0"
    neurograft.tag(f"{BANK}@1.2.0", "stable")
    neurograft.yank(f"{BANK}@1.2.0", reason="wrong text")
    with pytest.raises(YankedError, match="wrong text"):
        neurograft.pull(f"{BANK}@stable")
    assert neurograft.versions(BANK).newest == "1.0.0"
    neurograft.yank(f"{BANK}@1.2.0", undo=True)
    assert neurograft.versions(BANK).newest == "1.2.0"
    with pytest.raises(VersionExistsError, match=r"version 1.2.0 with other bytes"):
        neurograft.push(save_version(organ, tmp_path, "1.2.0", "other"), BANK)
    assert "library_name: neurograft" in hub.cards[0]
    assert set(hub.repositories["clinic/tiny"].at("1.0.0")) == {
        "README.md", "neurograft-entry.json", "organ.safetensors",
    }  # fmt: skip


def test_of_two_who_push_at_once_the_second_is_refused(
    hub: WritableHub, organ: Organ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neurograft.push(save_version(organ, tmp_path, "1.0.0"), BANK)
    monkeypatch.setattr(HubStore, "versions", lambda self, name: {})
    with pytest.raises(VersionExistsError):
        neurograft.push(save_version(organ, tmp_path, "1.0.0", "other"), BANK)


def test_a_broken_connection_goes_on(hub: WritableHub, organ: Organ, tmp_path: Path) -> None:
    file = save_version(organ, tmp_path, "1.0.0")
    neurograft.push(file, BANK)
    hub.cut = file.stat().st_size // 3 + 1
    neurograft.pull(BANK, output=tmp_path / "out.safetensors")
    assert hub.starts == [0, hub.cut, 2 * hub.cut]
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


def test_refusals(hub: WritableHub, organ_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotInBankError, match="hf://clinic has no organ nothing"):
        neurograft.pull("hf://clinic/nothing")
    neurograft.push(organ_file, BANK)
    with pytest.raises(NotInBankError, match="no version or tag 7"):
        neurograft.pull(f"{BANK}@7")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for attempt in (lambda: neurograft.push(organ_file, BANK), lambda: neurograft.pull(BANK)):
        with pytest.raises(BankAccessError, match="hf auth login"):
            attempt()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BankUnreachableError, match="is there a network"):
        neurograft.pull(BANK)


def test_offline_is_honoured() -> None:
    with pytest.raises(BankUnreachableError, match="HF_HUB_OFFLINE"), explaining(HubStore("hf://clinic")._explain):
        raise OfflineModeIsEnabled("offline")


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Our Own", {"license": "other", "license_name": "our-own"}),
        (None, {}),
    ],
)
def test_the_card_is_what_the_hub_knows(organ: Organ, license: str | None, expected: dict[str, str]) -> None:
    evaluation = Evaluation(data="reports", documents=3, tokens=70, before=20.0, after=10.5)
    source = organ.manifest.source.model_copy(update={"model": "org/base"})
    update = {"license": license, "evaluations": [evaluation], "source": source, "description": "Reads reports."}
    text = model_card(organ.manifest.model_copy(update=update), "hf://clinic/tiny@1.0.0")
    data: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    assert {key: data[key] for key in data if key.startswith("license")} == expected
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (
        "neurograft", "org/base", "adapter",
    )  # fmt: skip
    assert {"neurograft", "llama"} <= set(data["tags"])
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 10.5 and result["dataset"]["name"] == "reports"
    assert ModelCard(text).data.to_dict()["library_name"] == "neurograft"
    assert "neurograft transplant hf://clinic/tiny@1.0.0" in text and "Reads reports." in text


def test_a_folder_is_no_base_model(organ: Organ) -> None:
    assert "base_model" not in model_card(organ.manifest, "hf://clinic/tiny@1.0.0").split("---\n")[1]


def test_signatures_lie_on_main_and_may_grow(hub: WritableHub, organ: Organ, tmp_path: Path) -> None:
    file = save_version(organ, tmp_path, "1.0.0")
    neurograft.push(file, BANK)
    store = HubStore("hf://clinic")
    entry = store.entry("tiny", "1.0.0")
    assert store.signatures(entry) is None
    for text in ("{}\n", "{}\n[]\n"):
        store.set_signatures(entry, text)
        assert store.signatures(entry) == text
    assert list(store.versions("tiny")) == ["1.0.0"] and store.tags("tiny") == {}
