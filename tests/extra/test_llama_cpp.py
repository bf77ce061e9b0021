"""A transplanted model, converted to GGUF, run by llama.cpp itself; skipped where `xllamacpp` is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gguf_writer import convert, token_texts
from neurograft import transplant
from neurograft.organ import Organ
from tiny import generate, load, token_ids

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp, llama.cpp as a package, is not here")

# In a process of its own: llama.cpp and torch each bring a runtime for threads.
_PROGRAM = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
answer = server.handle_completions({
    "prompt": json.loads(sys.argv[2]), "n_predict": 12, "temperature": 0, "top_k": 1, "ignore_eos": True,
    "cache_prompt": False, "repeat_penalty": 1.0,
})
print("\\n" + json.dumps(answer))
"""


def test_llama_cpp_generates_what_transformers_does(organ: Organ, recipient: Path, tmp_path: Path) -> None:
    transplant(organ, recipient, at=3, mode="insert", output=tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "out.gguf")
    prompt = [int(token) for token in token_ids(8)[0]]
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "out.gguf"), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    model = load(tmp_path / "out")
    texts = token_texts(model.config.vocab_size)
    assert answer["choices"][0]["text"] == "".join(texts[token] for token in generate(model))
