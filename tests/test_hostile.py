"""Model directories that are damaged or meant to harm, full disks, and processes that are ended in the middle."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurograft import check, extract, remove, transplant
from neurograft.errors import IncompatibleError, ModelError, NeurograftError, UsageError
from neurograft.files import file_sha256
from neurograft.organ import Organ
from tiny import contents, load, make_model, make_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A recipient with about a layer in each file."""
    make_model("llama", seed=1).save_pretrained(tmp_path / "sharded", max_shard_size="40kB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(data) or data))

    return act


def _name(file: Any) -> Callable[[Path], None]:
    return _index(lambda data: data["weight_map"].update({"model.norm.weight": file}))


def _text(name: str, text: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_text(text)

    return act


def _cut(folder: Path) -> None:
    path = _shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-7])


def _double(folder: Path) -> None:
    first, second = (load_file(path) for path in _shards(folder)[1:3])
    name = next(iter(first))
    save_file({**second, name: first[name]}, _shards(folder)[2], {"format": "pt"})


def _pipe(folder: Path) -> None:
    path = _shards(folder)[0]
    path.unlink()
    os.mkfifo(path)


def _circle(folder: Path) -> None:
    path = _shards(folder)[0]
    path.unlink()
    path.symlink_to(path)


def _setting(**values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **values}))

    return act


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_cut, "and its header describes"),
        (_double, "a tensor is in one file"),
        (_pipe, "which is not there"),
        (_circle, "which is not there"),
        (_name("missing.safetensors"), r"names the shard missing\.safetensors, which is not there"),
        (_name("../sharded/x.safetensors"), "a shard is a .safetensors file beside the index"),
        (_name("/etc/passwd"), "a shard is a .safetensors file beside the index"),
        (_name(["x"]), "a shard is a .safetensors file beside the index"),
        (_name("config.json"), "a shard is a .safetensors file beside the index"),
        (_index(lambda _: {"weight_map": {}}), "names no tensors"),
        (_index(lambda _: {"weight_map": ["x"]}), "is no shard index"),
        (_index(lambda _: {"metadata": {}}), "is no shard index"),
        (_text(INDEX, "[" * 100_000), "is no shard index"),
        (_text("config.json", "[" * 100_000), "can't be read as JSON"),
        (_setting(num_hidden_layers=7), "the tensors of 7 layers were looked for"),
        (_setting(num_hidden_layers=10**8), "more than 2048 are refused"),
        (_setting(num_hidden_layers="6"), "can't load the configuration"),
        (_setting(vocab_size=-5), "can't build this llama model"),
    ],
)
def test_damaged_models_are_refused_in_a_sentence(
    harm: Callable[[Path], None], sentence: str, organ: Organ, sharded: Path, tmp_path: Path
) -> None:
    harm(sharded)
    for verb in (
        lambda: extract(sharded, layers="2:4", verify="bytes", output=tmp_path / "x.safetensors"),
        lambda: transplant(organ, sharded, at=2, mode="insert", verify="bytes", output=tmp_path / "out"),
        lambda: check(organ, sharded, at=2, mode="insert"),
    ):
        with pytest.raises(ModelError, match=sentence):
            verb()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]


def test_a_recipient_whose_layer_lacks_tensors_is_refused(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    for path in _shards(sharded):
        save_file({n: t for n, t in load_file(path).items() if "layers.3.mlp." not in n}, path, {"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"the recipient's files lack mlp\.down_proj\.weight and 2 more"):
        transplant(organ, sharded, at=1, mode="insert", verify="bytes", output=tmp_path / "out")
    assert check(organ, sharded, at=1, mode="insert").blocked


@pytest.mark.parametrize(
    "number", ["²", "01", "٣", "9" * 5000, "-1"], ids=["power", "zero", "arabic", "long", "negative"]
)
def test_what_only_looks_like_the_number_of_a_layer_is_none(
    number: str, organ: Organ, recipient: Path, tmp_path: Path
) -> None:
    odd, name = tmp_path / "odd", f"model.layers.{number}.weight"
    shutil.copytree(recipient, odd)
    tensors = load_file(odd / "model.safetensors")
    save_file({**tensors, name: torch.ones(3)}, odd / "model.safetensors", {"format": "pt"})
    transplant(organ, odd, at=0, mode="insert", output=tmp_path / "out", verify="bytes")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], torch.ones(3))


def test_tensors_that_are_not_as_the_configuration_says(sharded: Path, tmp_path: Path) -> None:
    _setting(intermediate_size=128)(sharded)
    with pytest.raises(ModelError, match=r"has the shape \[64, 32\], and the configuration calls for \[128, 32\]"):
        extract(sharded, layers="2:4", verify="bytes", output=tmp_path / "x.safetensors")


def test_shards_that_are_links_are_followed(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for path in _shards(sharded):  # as the Hub's cache does it
        shutil.move(path, tmp_path / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    before = contents(tmp_path / "blobs")
    transplant(organ, sharded, at=2, mode="replace", link="hard", output=tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    load(tmp_path / "out")
    assert contents(tmp_path / "blobs") == before


def test_outputs_that_would_destroy_an_input(organ_file: Path, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(sharded)
    for output in (sharded, sharded / "inside", tmp_path / "alias", tmp_path / "alias" / "inside", tmp_path):
        with pytest.raises(UsageError, match="overlaps the input"):
            transplant(organ_file, sharded, at=2, mode="insert", output=output, overwrite=True)
    with pytest.raises(UsageError, match="overlaps the input"):
        extract(sharded, layers="2:4", output=sharded / "model-00001-of-00007.safetensors", overwrite=True)


_TRANSPLANT = """
import resource, signal, sys
import neurograft
limit = int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("begins", flush=True)
try:
    neurograft.transplant(sys.argv[1], sys.argv[2], at=1, mode="insert", verify="bytes", output=sys.argv[3])
except neurograft.errors.NeurograftError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_a_file_that_may_not_grow_leaves_nothing(limit: int, organ_file: Path, sharded: Path, tmp_path: Path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == resource.RLIM_INFINITY or soft > limit
    with_cache = {**os.environ, "NEUROGRAFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", _TRANSPLANT, str(organ_file), str(sharded), str(tmp_path / "out")]
    subprocess.run([*command[:-1], str(tmp_path / "first"), "0"], env=with_cache, check=True)  # studied from here on
    shutil.rmtree(tmp_path / "first")
    done = subprocess.run([*command, str(limit)], env=with_cache, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "could not be written: File too large" in done.stderr, done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "sharded", organ_file.name}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A recipient of some 60 MB, an organ for it, and a cache that knows both."""
    folder = tmp_path_factory.mktemp("larger")
    model = make_model("llama", hidden_size=256, intermediate_size=1024, num_attention_heads=4, layers=12)
    model.save_pretrained(folder / "model", max_shard_size="10MB")
    extract(folder / "model", layers="2:4", verify="bytes", output=folder / "organ.safetensors")
    environment = {**os.environ, "NEUROGRAFT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", _TRANSPLANT, str(folder / "organ.safetensors"), str(folder / "model")]
    subprocess.run([*command, str(folder / "out"), "0"], env=environment, check=True)
    shutil.rmtree(folder / "out")
    return folder / "organ.safetensors", folder / "model", folder / "cache"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("after", [0.0, 0.15])
def test_a_process_that_is_ended_leaves_no_output(
    how: signal.Signals, after: float, larger: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    organ, model, cache = larger
    before = contents(model)
    environment = {**os.environ, "NEUROGRAFT_CACHE": str(cache)}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "neurograft", "transplant", str(organ), str(model), "--at", "1", "-o", str(out)]
    command += ["--mode", "insert", "--verify", "bytes"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after)
    process.send_signal(how)
    process.wait(60)
    left = [path.name for path in tmp_path.iterdir()]
    if "out" in left:  # it was faster
        assert left == ["out"] and process.returncode in (0, -how)
        return
    assert process.returncode in (130, -how)
    assert left == [] or (how is signal.SIGKILL and all(name.endswith(".tmp") for name in left))
    assert contents(model) == before
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))  # what is new may be in use
    transplant(organ, model, at=1, mode="insert", verify="bytes", output=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file_sha256(path) for path in out.glob("*.safetensors")}


def test_a_disk_that_fills_up_leaves_nothing(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("file systems can't be mounted here")
    try:
        with pytest.raises(NeurograftError, match="are needed; nothing was written"):
            transplant(organ, sharded, at=1, mode="insert", verify="bytes", output=mount / "out")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("neurograft.model_files.require_space", lambda *_: None)
            with pytest.raises(NeurograftError, match="the disk is full"):
                transplant(organ, sharded, at=1, mode="insert", verify="bytes", output=mount / "out")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_original_is_removed_from_links_too(organ: Organ, sharded: Path, tmp_path: Path) -> None:
    transplant(organ, sharded, at=2, mode="replace", link="hard", output=tmp_path / "out")
    assert remove(tmp_path / "out", output=tmp_path / "back").original_restored
    assert torch.equal(load(tmp_path / "back").lm_head.weight, load(sharded).lm_head.weight)
