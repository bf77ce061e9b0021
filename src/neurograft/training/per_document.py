"""The gradient of each document of a batch by itself, for what trains, through the hooks of opacus."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from neurograft.errors import NeurograftError
from neurograft.training.low_rank import SCALE

Samples = dict[torch.nn.Parameter, torch.Tensor]
Losses = Callable[[torch.Tensor], torch.Tensor]
"""Given numbers of rows, returns a loss for each of them, (n,)."""

_CLOSE = 1e-3  # the relative error of float32 sums of another order is a hundredth of that, and lost gradients exceed it


class DocumentGradients:
    """Takes the gradient of each document of a batch by itself.

    Most layers keep the documents of a batch apart, and one backward pass gives the gradients of all. Others, such as
    mixtures of experts, throw all tokens together; through them, one document passes at a time. Which of the two it is
    is found by trying.

    Args:
        modules: The layers with what trains in them.
        parameters: What trains.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], parameters: Sequence[torch.nn.Parameter]) -> None:
        self.modules, self.parameters = torch.nn.ModuleList(modules), list(parameters)
        self.together = False

    def try_together(self, losses: Losses, count: int) -> bool:
        """Find out whether one backward pass gives the gradients of several documents, each as if it were alone.

        Args:
            losses: Gives the losses of `count` rows, which nothing random may have a part in.
            count: How many.
        """
        rows = torch.arange(count)
        with self._disturbed(), self._training_alone():
            alone = [self._alone(losses(row[None])) for row in rows]
            self.together = True
            try:
                with self.hooked():
                    found = self.take(losses(rows))
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NeurograftError) as error:
                logging.getLogger("neurograft").info("gradients can't be taken together (%s)", error)
                found = None
        self.together = found is not None and all(
            _close(torch.cat([part[number].flatten() for part in found]), torch.cat([one.flatten() for one in own]))
            for number, own in enumerate(alone)
        )
        return self.together

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let opacus watch the layers inside the block, if documents go through them together."""
        if not self.together:
            yield
            return
        hooks = _hooks_class(frozenset(type(m) for m in self.modules.modules() if _is_rms_norm(m)))
        try:
            hooks(self.modules, loss_reduction="sum", strict=False)
            yield
        finally:
            self._unhook()

    def _unhook(self) -> None:
        """Leave the layers as they were; opacus itself leaves something where it refuses, or where a pass failed."""
        for handle in vars(self.modules).pop("autograd_grad_sample_hooks", ()):
            handle.remove()
        for module in self.modules.modules():
            for name in ("activations", "max_batch_len", "ft_compute_sample_grad"):
                vars(module).pop(name, None)
        for parameter in self.parameters:
            parameter.grad = None
            for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)

    def take(self, losses: torch.Tensor) -> list[torch.Tensor]:
        """Run the backward pass of some documents' losses, (n,), and return each one's gradients.

        Returns:
            For each parameter, (n, ...) in float32.

        Raises:
            NeurograftError: A parameter has not a gradient for each document.
        """
        if not self.together:
            if len(losses) != 1:
                raise ValueError("documents pass one at a time here")
            return [gradient[None] for gradient in self._alone(losses)]
        with warnings.catch_warnings():
            # What enters an organ needs no gradient, of which torch warns where hooks look at gradients.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        taken = []
        for parameter in self.parameters:
            samples: Any = getattr(parameter, "grad_sample", None)
            if not isinstance(samples, torch.Tensor) or samples.shape != (len(losses), *parameter.shape):
                shown = list(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
                raise NeurograftError(
                    f"a parameter of shape {list(parameter.shape)} should have a gradient for each of {len(losses)} "
                    f"documents, and opacus gave {shown}; nothing private can be trained from that."
                )
            taken.append(samples.float())
            parameter.grad_sample, parameter.grad = None, None  # type: ignore[attr-defined]
        return taken

    def _alone(self, losses: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of one document's loss, (1,)."""
        losses.sum().backward()
        gradients = []
        for parameter in self.parameters:
            # An expert that none of its tokens went to has none, which is a gradient of zero.
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float())
            parameter.grad = None
        return gradients

    @contextmanager
    def _disturbed(self) -> Iterator[None]:
        """Move the parameters a little inside the block: where some are zero, so are gradients of others."""
        generator, kept = torch.Generator().manual_seed(0), [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.01)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    @contextmanager
    def _training_alone(self) -> Iterator[None]:
        """Let only modules with parameters of their own be in training mode, as the hooks want it: no dropout is."""
        modes = {module: module.training for module in self.modules.modules()}
        for module in modes:
            module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of each document's gradient over all parameters, (n,), of gradients of (n, ...) each."""
    return torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in gradients]).norm(dim=0)


def add_clipped(sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], clip: float) -> torch.Tensor:
    """Add each document's gradient to sums, cut to a norm; return the norms before, (n,)."""
    found = norms(gradients)
    shares = clip / found.clamp_min(clip)
    for total, part in zip(sums, gradients, strict=True):
        total.view(-1).addmv_(part.flatten(1).T, shares)
    return found


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= _CLOSE * float(b.norm())


@functools.cache
def _hooks_class(norm_types: frozenset[type]) -> Any:
    """Return the hooks of opacus, which know linear maps with low-rank changes, and some classes of norms, as well."""
    from transformers.pytorch_utils import Conv1D

    with quiet_import():
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

    class Hooks(GradSampleHooks):  # type: ignore[misc]
        GRAD_SAMPLERS = {  # noqa: RUF012
            **GradSampleHooks.GRAD_SAMPLERS,
            torch.nn.Linear: _linear_samples,
            Conv1D: _linear_samples,
            **dict.fromkeys(norm_types, _rms_norm_samples),
        }

    return Hooks


@contextmanager
def quiet_import() -> Iterator[None]:
    """Leave logging as it was: opacus configures it for the whole process when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def _linear_samples(module: Any, activations: list[torch.Tensor], gradients: torch.Tensor) -> Samples:
    """Return the gradients of a linear map, or of the factors of its low-rank change, for each document."""
    entering, found = activations[0].to(gradients.dtype), Samples()
    if module.weight.requires_grad:
        order = "nij" if isinstance(module, torch.nn.Linear) else "nji"
        found[module.weight] = torch.einsum(f"n...i,n...j->{order}", gradients, entering)
    if module.bias is not None and module.bias.requires_grad:
        found[module.bias] = torch.einsum("n...i->ni", gradients)
    if hasattr(module, "low_rank_a"):
        a, b = (factor.detach().to(gradients.dtype) for factor in (module.low_rank_a, module.low_rank_b))
        found[module.low_rank_a] = SCALE * torch.einsum("n...r,n...j->nrj", gradients @ b, entering)
        found[module.low_rank_b] = SCALE * torch.einsum("n...i,n...r->nir", gradients, entering @ a.T)
    return found


def _rms_norm_samples(module: Any, activations: list[torch.Tensor], gradients: torch.Tensor) -> Samples:
    """Return the gradients of the weight of a transformers RMSNorm for each document, also where 1 is added to it."""
    entering = activations[0].float()
    scaled = entering * torch.rsqrt(entering.square().mean(-1, keepdim=True) + _epsilon(module))
    return {module.weight: (scaled * gradients).flatten(1, -2).sum(1)}


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is one of transformers' many classes of root mean square norms, with a weight and no more."""
    own = [name for name, _ in module.named_parameters()]
    return "RMSNorm" in type(module).__name__ and own == ["weight"] and isinstance(_epsilon(module), float)


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
