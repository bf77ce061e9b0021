"""The gradient of each document of a batch by itself, for what trains, through the hooks of opacus."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from neurograft.errors import NeurograftError
from neurograft.training.low_rank import SCALE

Losses = Callable[[torch.Tensor], torch.Tensor]
"""Given numbers of rows, returns a loss for each of them, (n,)."""

_CLOSE = (
    1e-3  # the relative error of float32 sums of another order is a hundredth of that, and lost gradients exceed it
)


@dataclass(frozen=True)
class Stacked:
    """The gradients of a parameter for n documents, as they are."""

    values: torch.Tensor
    """(n, ...) float32."""

    def square_norms(self) -> torch.Tensor:
        """Return the squared norm of each document's gradient, (n,)."""
        return self.values.flatten(1).square().sum(1)

    def stacked(self) -> torch.Tensor:
        """Return all gradients, (n, ...)."""
        return self.values

    def weighted(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the sum of the gradients, each times its share; shares are (n,)."""
        return (self.values.flatten(1).T @ shares).view(self.values.shape[1:])


@dataclass(frozen=True)
class Factored:
    """The gradients of a matrix for n documents, each a sum of outer products over tokens, which are never made.

    Their norms come from products of tokens with each other (arXiv 2110.05679), and their sum is one matrix product.
    """

    left: torch.Tensor
    """(n, T, I) float32."""
    right: torch.Tensor
    """(n, T, J) float32."""

    def square_norms(self) -> torch.Tensor:
        """Return the squared norm of each document's gradient, (n,)."""
        (_, tokens, rows), columns = self.left.shape, self.right.shape[2]
        if tokens * (rows + columns) > rows * columns:
            return Stacked(self.stacked()).square_norms()
        return ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum((1, 2))

    def stacked(self) -> torch.Tensor:
        """Return all gradients, (n, I, J)."""
        return self.left.mT @ self.right

    def weighted(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the sum of the gradients, each times its share; shares are (n,)."""
        return (self.left * shares[:, None, None]).flatten(0, 1).T @ self.right.flatten(0, 1)


Piece = Stacked | Factored


@dataclass(frozen=True)
class Gradients:
    """The gradients of n documents."""

    pieces: Sequence[Piece]
    """For each parameter."""

    def norms(self) -> torch.Tensor:
        """Return the norm of each document's gradient over all parameters, (n,)."""
        return torch.stack([piece.square_norms() for piece in self.pieces]).sum(0).clamp_min(0).sqrt()

    def add_clipped(self, sums: Sequence[torch.Tensor], clip: float) -> torch.Tensor:
        """Add each document's gradient to sums, cut to a norm; return the norms before, (n,)."""
        found = self.norms()
        shares = clip / found.clamp_min(clip)
        for total, piece in zip(sums, self.pieces, strict=True):
            total.add_(piece.weighted(shares))
        return found

    def of(self, number: int) -> list[torch.Tensor]:
        """Return those of one document, one for each parameter."""
        return [piece.stacked()[number] for piece in self.pieces]


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
        self._hooks: Any = None

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
            _close(found.of(number), own.of(0)) for number, own in enumerate(alone)
        )
        return self.together

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let opacus watch the layers inside the block, if documents go through them together."""
        if not self.together:
            yield
            return
        make = _hooks_class(frozenset(type(m) for m in self.modules.modules() if _is_rms_norm(m)))
        try:
            self._hooks = make(self.modules, loss_reduction="sum", strict=False)
            yield
        finally:
            self._unhook()

    def _unhook(self) -> None:
        """Leave the layers as they were; opacus itself leaves something where it refuses, or where a pass failed."""
        self._hooks = None
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

    def take(self, losses: torch.Tensor) -> Gradients:
        """Run the backward pass of some documents' losses, (n,), and return each one's gradients.

        Raises:
            NeurograftError: A parameter has not a gradient for each document.
        """
        if not self.together:
            return self._alone(losses)
        self._hooks.seen.clear()
        with warnings.catch_warnings():
            # What enters an organ needs no gradient, of which torch warns where hooks look at gradients.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        found: dict[int, list[Piece]] = {}
        for module, entering, gradients in self._hooks.seen:
            for parameter, piece in self._hooks.pieces(module, entering, gradients).items():
                found.setdefault(id(parameter), []).append(piece)
        self._hooks.seen.clear()
        for parameter in self.parameters:
            parameter.grad = None
        return Gradients([_joined(found.get(id(p), []), p, len(losses)) for p in self.parameters])

    def _alone(self, losses: torch.Tensor) -> Gradients:
        """Return the gradients of one document's loss, (1,)."""
        if len(losses) != 1:
            raise ValueError("documents pass one at a time here")
        losses.sum().backward()
        pieces = []
        for parameter in self.parameters:
            # An expert that none of its tokens went to has none, which is a gradient of zero.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pieces.append(Stacked(gradient.float()[None]))
            parameter.grad = None
        return Gradients(pieces)

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


def _joined(pieces: list[Piece], parameter: torch.Tensor, count: int) -> Piece:
    """Return a parameter's gradients, which are the sums over all places where it was used.

    Raises:
        NeurograftError: There is none, or not one for each document.
    """
    shapes = [_shape(piece) for piece in pieces]
    if not pieces or any(shape != (count, *parameter.shape) for shape in shapes):
        raise NeurograftError(
            f"a parameter of shape {list(parameter.shape)} should have a gradient for each of {count} documents, and "
            f"there are {', '.join(map(str, shapes)) or 'none'}; nothing private can be trained from that."
        )
    return pieces[0] if len(pieces) == 1 else Stacked(torch.stack([piece.stacked() for piece in pieces]).sum(0))


def _shape(piece: Piece) -> tuple[int, ...]:
    if isinstance(piece, Stacked):
        return tuple(piece.values.shape)
    left, right = piece.left.shape, piece.right.shape
    return (left[0], left[2], right[2]) if left[:2] == right[:2] else (-1,)


def _close(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (found, wanted))
    return float((a - b).norm()) <= _CLOSE * float(b.norm())


@functools.cache
def _hooks_class(norm_types: frozenset[type]) -> Any:
    """Return the hooks of opacus, which know linear maps with low-rank changes, and some classes of norms, as well."""
    from transformers.pytorch_utils import Conv1D

    with quiet_import():
        from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

    class Hooks(GradSampleHooks):
        """Remembers what a backward pass saw, of which opacus would make every document's gradients at once."""

        GRAD_SAMPLERS = {  # noqa: RUF012
            **GradSampleHooks.GRAD_SAMPLERS,
            torch.nn.Linear: _linear_pieces,
            Conv1D: _linear_pieces,
            **dict.fromkeys(norm_types, _rms_norm_samples),
        }

        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.seen: list[tuple[Any, list[torch.Tensor], torch.Tensor]] = []
            super().__init__(*arguments, **named)

        def capture_backprops_hook(self, module: Any, _input: Any, output: Any, **named: Any) -> None:
            entering, gradients = self.rearrange_grad_samples(module=module, backprops=output[0].detach(), **named)
            self.seen.append((module, entering, gradients))
            if not module.activations:
                del module.max_batch_len

        def pieces(self, module: Any, entering: list[torch.Tensor], gradients: torch.Tensor) -> dict[Any, Piece]:
            """Return the gradients of a module's own parameters."""
            sampler = self.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
            made = sampler(module, entering, gradients).items()
            return {p: Stacked(found.float()) if isinstance(found, torch.Tensor) else found for p, found in made}

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


def _linear_pieces(module: Any, activations: list[torch.Tensor], gradients: torch.Tensor) -> dict[Any, Any]:
    """Return the gradients of a linear map, or of the factors of its low-rank change, for each document."""
    entering, leaving = _tokens(activations[0]), _tokens(gradients)  # (n, T, inputs), (n, T, outputs)
    found: dict[Any, Any] = {}
    if module.weight.requires_grad:
        plain = isinstance(module, torch.nn.Linear)
        found[module.weight] = Factored(leaving, entering) if plain else Factored(entering, leaving)
    if module.bias is not None and module.bias.requires_grad:
        found[module.bias] = leaving.sum(1)
    if hasattr(module, "low_rank_a"):
        a, b = module.low_rank_a.detach(), module.low_rank_b.detach()
        found[module.low_rank_a] = Factored(SCALE * (leaving @ b), entering)
        found[module.low_rank_b] = Factored(leaving, SCALE * (entering @ a.T))
    return found


def _tokens(states: torch.Tensor) -> torch.Tensor:
    """Return states as (n, T, C) float32, of any number of dimensions for T."""
    return states.float().flatten(1, -2) if states.dim() > 2 else states.float()[:, None]


def _rms_norm_samples(module: Any, activations: list[torch.Tensor], gradients: torch.Tensor) -> dict[Any, Any]:
    """Return the gradients of the weight of a transformers RMSNorm for each document, also where 1 is added to it."""
    entering = activations[0].float()
    scaled = entering * torch.rsqrt(entering.square().mean(-1, keepdim=True) + _epsilon(module))
    return {module.weight: (scaled * gradients).flatten(1, -2).sum(1)}


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is one of transformers' many classes of root mean square norms, with a weight and no more."""
    own = [name for name, _ in module.named_parameters()]
    return "RMSNorm" in type(module).__name__ and own == ["weight"] and isinstance(_epsilon(module), float)


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
