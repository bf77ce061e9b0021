"""The documentation says what the code does: help, links, commands, the file format, versions and pins."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pydantic import BaseModel

import neurograft
from neurograft import manifest
from tiny import save_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verbs_page_is_what_help_says() -> None:
    page = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")
    assert page == _load_script("render_cli_help").render(), "docs/verbs.md is stale: run `make cli-docs`"


def test_every_verb_has_a_section() -> None:
    page = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")
    plan, prove = "plan extract train inspect check compose merge scan", "evaluate compare report remove cache demo"
    bank = ["push", "pull", "list", "versions", "tag", "yank", "study cross-domain"]
    for verb in [*plan.split(), "transplant", "recover", *prove.split(), *bank]:
        assert f"\n## {verb}\n" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}, which does not exist"


def _commands(page: Path) -> list[list[str]]:
    """Return the neurograft commands in a page's plain code blocks, split into words."""
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in ("", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("neurograft ")]


def test_commands_in_the_pages_exist() -> None:
    sections = dict(
        re.findall(r"^## ([\w -]+)\n\n```text\n(.*?)```", (ROOT / "docs" / "verbs.md").read_text(), re.M | re.S)
    )
    commands = [words for page in PAGES for words in _commands(page)]
    assert len(commands) > 5
    for _, verb, *words in commands:
        if f"{verb} {words[0] if words else ''}" in sections:
            verb, words = f"{verb} {words[0]}", words[1:]
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"(^|[\s,]){re.escape(option)}\b", sections[verb]), f"neurograft {verb} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_uses_names_that_exist(page: Path) -> None:
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            for node in ast.walk(ast.parse(body)):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "neurograft"
                ):
                    assert node.attr in neurograft.__all__


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_in_the_first_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "my-model", "llama", num_hidden_layers=14)
    neurograft.extract("my-model", layers="10:13", output="trained.safetensors")
    blocks = [
        body for language, body in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if language == "python"
    ]
    assert blocks
    names: dict[str, Any] = {}
    for body in blocks:
        exec(compile(body, page, "exec"), names)


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "neurograft.transplant" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


FORMAT_PARTS = [
    manifest.Manifest,
    manifest.LayerAnatomy,
    manifest.TokenizerFingerprint,
    manifest.Source,
    manifest.Training,
    manifest.Evaluation,
    manifest.Merge,
    manifest.Parent,
    manifest.Probe,
    manifest.Scan,
    manifest.ScanPoint,
    manifest.Sketch,
]


@pytest.mark.parametrize("part", FORMAT_PARTS)
def test_format_page_names_every_field(part: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "organ-format.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
    for field in part.model_fields:
        assert f"`{field}`" in rows, f"docs/organ-format.md does not describe {part.__name__}.{field}"
    assert f"Schema version {manifest.SCHEMA_VERSION}." in page


@pytest.fixture(scope="module")
def organ_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An organ of two layers of a tiny llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("format")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    neurograft.extract(folder / "model", layers="1:3", output=folder / "organ.safetensors")
    return folder / "organ.safetensors"


def test_an_organ_can_be_verified_from_the_format_page_alone(organ_path: Path) -> None:
    """A reader of its own, with json and hashlib, written from docs/organ-format.md, gets the same digests."""
    data = organ_path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["neurograft"]
    said = json.loads(metadata["neurograft"])

    field = rf"\"file_digest\":\"{said['file_digest']}\"".encode()
    start = data[: 8 + length].rindex(field) + len(rb"\"file_digest\":\"")
    zeroed = data[:start] + b"0" * 64 + data[start + 64 :]
    assert hashlib.sha256(zeroed).hexdigest() == said["file_digest"]

    digests = {name: _tensor_digest(entry, data[8 + length :]) for name, entry in header.items()}
    assert _named_digest(digests) == said["tensors_digest"]
    for index, expected in enumerate(said["source"]["layer_digests"]):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): digest for name, digest in digests.items() if name.startswith(prefix)}
        assert layer and _named_digest(layer) == expected
    assert {name.split(".")[1] for name in digests} == {"0", "1"}


def _tensor_digest(entry: dict[str, Any], data: bytes) -> str:
    names = {"BF16": "bfloat16", "F32": "float32"}
    start, stop = entry["data_offsets"]
    shape = ", ".join(map(str, entry["shape"]))
    return hashlib.sha256(f"{names[entry['dtype']]} [{shape}]\n".encode() + data[start:stop]).hexdigest()


def _named_digest(digests: dict[str, str]) -> str:
    return hashlib.sha256(b"".join(f"{name}\0{digests[name]}\n".encode() for name in sorted(digests))).hexdigest()


def test_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {neurograft.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{neurograft.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _pins(name: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("==")[::2] for line in lines if line]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def test_lock_pins_everything_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins, demo = _pins("requirements.lock"), _pins("requirements-demo.lock")
    for text in [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["compare"]]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
    for text in extras["demo"]:
        requirement = Requirement(text)
        assert demo[canonicalize_name(requirement.name)] in requirement.specifier


def test_lock_is_the_same_on_every_machine() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for word in ("://", "--", "@", "nvidia-", "triton"):
        assert word not in text
    assert all(version.local is None for version in _pins("requirements.lock").values())
