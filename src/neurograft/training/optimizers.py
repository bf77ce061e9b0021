"""How an organ's weights are updated: the optimizers, and averages of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from neurograft.sharding import spread_like
from neurograft.training.schedules import OptimizerName

_BETAS = (0.9, 0.95)


class Optimizers:
    """The optimizers of one run, stepped together.

    Args:
        parameters: What trains, float32.
        name: `adamw`: AdamW for all of it (arXiv 1711.05101). `muon`: orthogonalised momentum for matrices, its step
            scaled to the size of AdamW's (arXiv 2502.16982), and AdamW for everything else. `adafactor`: second moments
            by rows and columns alone, steps relative to the size of each matrix (arXiv 1804.04235).
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], *, name: OptimizerName, lr: float, weight_decay: float
    ) -> None:
        self.lr, self.parameters = lr, list(parameters)
        matrices = [parameter for parameter in parameters if parameter.ndim == 2] if name == "muon" else []
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in parameters if id(parameter) not in chosen]
        self.each: list[torch.optim.Optimizer] = []
        if matrices:
            self.each.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if name == "adafactor":
            self.each.append(torch.optim.Adafactor(others, lr=lr, weight_decay=weight_decay))
        elif others:
            self.each.append(_adamw(others, lr=lr, weight_decay=weight_decay))

    def step(self, share: float) -> None:
        """Update the parameters with this share of the peak learning rate, and drop their gradients."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what the optimizers remember, as `NUMBER.NAME` with the number of the parameter, and the tensor."""
        for number, parameter in enumerate(self.parameters):
            for optimizer in self.each:
                for name, value in optimizer.state.get(parameter, {}).items():
                    yield f"{number}.{name}", value

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave, whole where parameters are spread over processes."""
        remembered: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            parameter = self.parameters[int(number)].detach()
            value = spread_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
            remembered.setdefault(int(number), {})[name] = value
        for optimizer in self.each:
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
            states = {place: remembered.get(numbers[id(parameter)], {}) for place, parameter in enumerate(own)}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": {n: s for n, s in states.items() if s}, "param_groups": groups})


def _adamw(parameters: list[torch.nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW that updates each parameter in one pass over its memory, where torch can do that."""
    try:
        return torch.optim.AdamW(parameters, lr=lr, betas=_BETAS, weight_decay=weight_decay, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(parameters, lr=lr, betas=_BETAS, weight_decay=weight_decay)


class Average:
    """A moving average of weights, which lags behind them and is smoother.

    Args:
        parameters: What is averaged.
        decay: Share of the average that each step keeps, once there were some steps.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` steps; early ones count less, or the start would stay in it."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def swap(self) -> None:
        """Exchange the weights and the average, in place; done twice, nothing has changed."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(kept)


def pull_back(parameters: Sequence[torch.Tensor], start: Sequence[torch.Tensor], amount: float) -> None:
    """Move weights a share of the way back to where they started (decoupled L2-SP, arXiv 1802.01483)."""
    with torch.no_grad():
        torch._foreach_lerp_(list(parameters), list(start), amount)
