"""How a model goes on with a few prompts, before and after: what figures do not show."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurograft.arithmetic import fast_float32
from neurograft.models import load_model, load_tokenizer, resolve

log = logging.getLogger("neurograft")


@dataclass(frozen=True)
class Continuation:
    """One prompt, and what each model makes of it."""

    prompt: str
    answers: dict[str, str]
    """Name of a model -> its text, without the prompt."""


def continue_prompts(
    models: Sequence[tuple[str, str | Path]],
    prompts: Sequence[str],
    *,
    tokens: int,
    trust_remote_code: bool = False,
) -> list[Continuation]:
    """Let models go on with prompts, greedily, one model in memory at a time.

    Args:
        models: Names, and what `neurograft.models.resolve` takes.
        prompts: Texts.
        tokens: At most so many new tokens for each.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        ModelError: A model can't be loaded.
    """
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, model in models:
        log.info("letting %s go on with %d prompts", name, len(prompts))
        for answer, text in zip(answers, _continue(model, prompts, tokens, trust_remote_code), strict=True):
            answer[name] = text
    return [Continuation(prompt, found) for prompt, found in zip(prompts, answers, strict=True)]


def _continue(source: str | Path, prompts: Sequence[str], tokens: int, trust: bool) -> list[str]:
    directory = resolve(source, trust_remote_code=trust)
    tokenizer: Any = load_tokenizer(directory, trust_remote_code=trust)
    model: Any = load_model(directory, dtype=torch.float32, trust_remote_code=trust)
    texts = []
    with torch.no_grad(), fast_float32(model.device):
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt")
            ids = given.input_ids.to(model.device)  # (1, T)
            produced = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )  # fmt: skip
            texts.append(str(tokenizer.decode(produced[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
