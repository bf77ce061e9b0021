"""Layers from the Hub: what is downloaded, from a server on the loopback that speaks its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import COMMIT, serve
from neurograft import extract
from neurograft.organ import read_organ
from tiny import make_model, make_tokenizer

_PROGRAM = """
import json, sys
import torch, transformers
import neurograft
target = sys.argv[1]
for name in ("site/ranges", "site/plain", "site/single"):
    neurograft.extract(name, layers="2:4", output=f"{target}/{name.split('/')[1]}.safetensors")
try:
    neurograft.extract("site/nothing", layers="2:4")
except neurograft.errors.ModelError as error:
    print(json.dumps(str(error)))
"""


def _save(folder: Path, size: str) -> Path:
    model = make_model("llama", seed=0, hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=9000)
    model.save_pretrained(folder, max_shard_size=size)
    make_tokenizer().save_pretrained(folder)
    return folder


_CHECKING = """
import json, sys
import torch, transformers
import neurograft
organ, *names = sys.argv[1:]
for name in names:
    report = neurograft.check(organ, name)
    print(json.dumps([report.recipient, report.matching_position, report.similarity, report.blocked]))
"""


def test_a_check_fetches_headers_and_samples_and_no_weights(tmp_path: Path) -> None:
    sharded, single = _save(tmp_path / "sharded", "700kB"), _save(tmp_path / "single", "9GB")
    extract(sharded, layers="2:4", output=tmp_path / "organ.safetensors")
    repositories = {"site/ranges": sharded, "site/single": single, "site/plain": sharded}
    with serve(repositories, without_ranges=frozenset({"site/plain"})) as (address, log):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "NEUROGRAFT_CACHE": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", _CHECKING, str(tmp_path / "organ.safetensors"), *repositories]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report[0] for report in reports] == list(repositories)
    assert all(report[1] == 2 and report[2] > 0.99 and report[3] is False for report in reports)
    whole = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    for name in repositories:
        sent = sum(count for file, count in log.items() if file.startswith(name) and file.endswith(".safetensors"))
        assert (sent < whole / 2) == (name != "site/plain"), (name, sent, whole)


def test_only_what_holds_the_wanted_layers_is_downloaded(tmp_path: Path) -> None:
    sharded, single = _save(tmp_path / "sharded", "700kB"), _save(tmp_path / "single", "9GB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    holding = {file for name, file in index.items() if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert 1 <= len(holding) < len(set(index.values()))
    repositories = {"site/ranges": sharded, "site/plain": sharded, "site/single": single}
    (tmp_path / "organs").mkdir()
    with serve(repositories, without_ranges=frozenset({"site/plain"})) as (address, log):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "NEUROGRAFT_CACHE": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "organs")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "site/nothing is no local directory, and the Hub did not give it" in json.loads(done.stdout.splitlines()[-1])
    expected = extract(sharded, layers="2:4")
    for name in ("ranges", "plain", "single"):
        organ = read_organ(tmp_path / "organs" / f"{name}.safetensors")
        assert organ.manifest.source.layer_digests == expected.manifest.source.layer_digests
        assert (organ.manifest.source.model, organ.manifest.source.revision) == (f"site/{name}", COMMIT)
    sent = {name: count for name, count in log.items() if name.endswith(".safetensors")}
    assert {name.split("/")[2] for name in sent if "single" not in name} == holding
    wanted = (tmp_path / "organs" / "single.safetensors").stat().st_size
    whole = (single / "model.safetensors").stat().st_size
    assert sent["site/single/model.safetensors"] < wanted + 300_000 < whole / 2
    assert not list((tmp_path / "cache").glob("hub-*"))
