"""The next-token loss through a frozen head, without ever holding all the logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from neurograft.data import IGNORED_LABEL
from neurograft.sharding import is_spread, whole
from neurograft.surgery import Undo

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Positions whose logits exist at a time. On CPUs the time hardly depends on it from 64 to 1024; the memory does.
CHUNK = 256


class NextTokenLoss:
    """The next-token losses of a causal language model.

    Most models end in a plain linear head. Where that is so, which is found by trying, and the head is frozen, the loss
    and its gradient are computed a few positions at a time: the logits, (B, T, vocabulary), are the largest tensor of a
    training step by far, and they never exist. Everywhere else they do.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.head = _plain_head(model)
        self._caller: Any = model

    @contextmanager
    def through(self, caller: Any) -> Iterator[None]:
        """Call something in the model's place, such as a DistributedDataParallel around it."""
        before, self._caller = self._caller, caller
        try:
            yield
        finally:
            self._caller = before

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        vocabulary: VocabularySample | None = None,
    ) -> torch.Tensor:
        """Return the losses in nats, (B, T), 0 where no loss is wanted.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T), the same with -100 where no loss is wanted; the logits at t predict the label at t + 1.
            attention_mask: (B, T), 0 where padded; left out, nothing is.
            vocabulary: Estimate the losses from these tokens; all labels must be among its text's. Left out, or where
                the head is not plain, losses are over the whole vocabulary.
        """
        arguments, targets = self._arguments(input_ids, labels, attention_mask)
        if self.head is None or any(parameter.requires_grad for parameter in self.head.parameters()):
            logits = self._caller(**arguments).logits  # (B, T, vocabulary)
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
            )
            return losses.view_as(targets)
        with _passing(self.head, spread=is_spread(self.model)):
            hidden = self._caller(**arguments).logits  # (B, T, C)
        wanted = targets != IGNORED_LABEL
        if vocabulary is not None:
            losses = frozen_head_losses(hidden[wanted], *vocabulary.head(), vocabulary.places[targets[wanted]])
        else:
            weight, bias = whole(self.head.weight), None if self.head.bias is None else whole(self.head.bias)
            losses = frozen_head_losses(hidden[wanted], weight, bias, targets[wanted])
        return losses.new_zeros(targets.shape).masked_scatter(wanted, losses)

    def facts(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TokenFacts:
        """Return what the model says of each token that a loss is wanted of, in the order of rows; no gradients.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T); see `__call__`.
            attention_mask: (B, T); see `__call__`.
        """
        arguments, targets = self._arguments(input_ids, labels, attention_mask)
        wanted = targets != IGNORED_LABEL
        with torch.no_grad():
            if self.head is None:
                logits = self._caller(**arguments).logits[wanted]  # (N, vocabulary)
                return _joined(
                    _facts_of(logits[start : start + CHUNK].float(), targets[wanted][start : start + CHUNK])
                    for start in range(0, len(logits), CHUNK)
                )
            with _passing(self.head, spread=is_spread(self.model)):
                hidden = self._caller(**arguments).logits[wanted]  # (N, C)
            weight, bias = whole(self.head.weight), None if self.head.bias is None else whole(self.head.bias)
            return _joined(
                _facts_of(
                    torch.nn.functional.linear(hidden[start : start + CHUNK], weight, bias).float(),
                    targets[wanted][start : start + CHUNK],
                )
                for start in range(0, len(hidden), CHUNK)
            )

    def _arguments(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return what the model is called with, and the right token at each position, (B, T)."""
        device = self.model.device
        arguments: dict[str, Any] = {"input_ids": input_ids.to(device), "use_cache": False}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(device)
        return arguments, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(device)


@dataclass(frozen=True)
class TokenFacts:
    """What a model says of N tokens, each (N,)."""

    losses: torch.Tensor
    """Negative log likelihood of the token that comes, in nats."""
    mean: torch.Tensor
    """Mean log-probability of a token drawn from the model's distribution there, in nats; minus its entropy."""
    deviation: torch.Tensor
    """Standard deviation of the same, in nats."""
    greedy: torch.Tensor
    """Whether the token that comes is the one that greedy decoding would choose."""


def _facts_of(logits: torch.Tensor, targets: torch.Tensor) -> TokenFacts:
    """Return what some logits, (n, V), say of the right tokens, (n,)."""
    logs = torch.log_softmax(logits, dim=1)  # (n, V)
    probabilities = logs.exp()
    logs = logs.clamp_min(torch.finfo(logs.dtype).min)  # a logit of minus infinity times its probability of 0 is no NaN
    mean = (probabilities * logs).sum(1)
    spread = (probabilities * (logs - mean[:, None]).square()).nan_to_num(0.0).sum(1)
    right = logs.gather(1, targets[:, None]).squeeze(1)
    return TokenFacts(-right, mean, spread.sqrt(), logits.argmax(1) == targets)


def _joined(parts: Iterable[TokenFacts]) -> TokenFacts:
    found = list(parts)
    return TokenFacts(*(torch.cat([getattr(part, field.name) for part in found]) for field in fields(TokenFacts)))


class VocabularySample:
    """The tokens of a text, and a few others that stand for all others: a smaller head for one training step.

    The sum over the whole vocabulary in the loss is estimated, without bias, by counting each drawn token as many times
    as it stands for (sampled softmax, arXiv 1412.2007, with every token of the text always in the sample). Domain text
    uses a small part of a vocabulary, and the head is most of what the last layers of a small model cost.

    Args:
        head: The frozen head.
        text: Token ids of all labels that will be asked for.
        others: How many other tokens are drawn for each step.
    """

    def __init__(self, head: nn.Linear, text: torch.Tensor, others: int) -> None:
        self._weight = whole(head.weight).detach()  # (V, C)
        self._bias = None if head.bias is None else whole(head.bias).detach()
        device, size = self._weight.device, len(self._weight)
        self._own = torch.unique(text).to(device)
        left = torch.ones(size, dtype=torch.bool, device=device)
        left[self._own] = False
        self._left = left.nonzero().squeeze(1)
        self._others = min(others, len(self._left))
        self.places = torch.full((size,), -1, device=device)
        """(V,) place of each token of the text in the smaller head."""
        self.places[self._own] = torch.arange(len(self._own), device=device)
        self._own_weight = self._weight[self._own]  # (own, C)
        self.draw(0)

    @property
    def size(self) -> int:
        """Rows of the smaller head."""
        return len(self._own) + self._others

    def draw(self, seed: int) -> None:
        """Choose other tokens; the same seed chooses the same."""
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        picked = torch.randint(max(len(self._left), 1), (self._others,), generator=generator)
        self._picked = self._left[picked.to(self._left.device)]

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smaller head's weight, (own + others, C), and bias, which counts each drawn token as it must."""
        weight = torch.cat([self._own_weight, self._weight[self._picked]])
        bias = weight.new_zeros(len(weight))
        if self._bias is not None:
            bias += self._bias[torch.cat([self._own, self._picked])]
        if self._others:
            bias[len(self._own) :] += math.log(len(self._left) / self._others)
        return weight, bias


def frozen_head_losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of each position under a linear head that gets no gradient, (N,) in nats, float32.

    `torch.nn.functional.linear_cross_entropy` does the same for heads that are trained; on CPUs its chunks cost several
    times what the plain computation does, and these cost less than it.

    Args:
        hidden: (N, C) what enters the head.
        weight: (V, C) of the head.
        bias: (V,) of the head, or `None`.
        targets: (N,) indices of the right classes.
    """
    return _FrozenHeadLosses.apply(hidden, weight, bias, targets)


class _FrozenHeadLosses(torch.autograd.Function):
    """Computes the gradient along with the loss, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        device = hidden.device
        losses = torch.empty(len(hidden), dtype=torch.float32, device=device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        # Rounded once here: left to autocast, every product below would round all of the head anew.
        weight, entering = weight.to(narrow), hidden.to(narrow)
        bias = None if bias is None else bias.to(narrow)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(hidden), CHUNK):
                chunk = slice(start, start + CHUNK)
                logits = torch.nn.functional.linear(entering[chunk], weight, bias).float()  # (n, V)
                if gradient is None:
                    losses[chunk] = torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none")
                    continue
                right = targets[chunk, None]  # (n, 1)
                right_logits, largest = logits.gather(1, right), logits.amax(dim=1, keepdim=True)
                torch.softmax(logits, dim=1, out=logits)
                # The log of the largest probability, unlike that of the right one, can't underflow.
                losses[chunk] = (largest - logits.amax(dim=1, keepdim=True).log() - right_logits).squeeze(1)
                logits.scatter_add_(1, right, torch.full_like(right_logits, -1.0))
                gradient[chunk] = logits.to(narrow) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # (N, C)
        return gradient * outer[0][:, None].to(gradient), None, None, None


def _plain_head(model: Any) -> nn.Linear | None:
    """Return the head if the model's logits are what that linear layer gives and nothing is done to them after it."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return None
    entered: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False).logits  # (1, 4, V)
            plain = len(entered) == 1 and torch.equal(logits, head(entered[0]))
    finally:
        handle.remove()
    return head if plain else None


@contextmanager
def _passing(head: nn.Linear, *, spread: bool) -> Iterator[None]:
    """Let the head return what it is given."""
    undo = Undo()
    # What a module that is spread over processes returns must be no view, or torch warns of what could be done to it.
    undo.set(vars(head), "forward", torch.clone if spread else lambda hidden: hidden)
    try:
        yield
    finally:
        undo.restore()
