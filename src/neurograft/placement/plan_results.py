"""What a plan found, as it is printed and written."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from neurograft.manifest import Mode
from neurograft.placement.costs import Cost


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Proposal(_Result):
    """One organ that could be trained."""

    layers: str
    """`START:STOP`, half-open from 0; of `insert`, where the copies come from."""
    protocol: Literal["in_place", "insert"]
    mode: Mode
    position: int
    cost: Cost
    """What training it on all of the tokens will cost."""
    gradient: float
    """Summed squared gradient of its layers, in nats squared."""
    trial: float | None
    """Held-out perplexity after the longest of its trials; `None` where it was not tried."""
    trial_tokens: int = 0
    """Training tokens of that trial."""

    def show_trial(self) -> str:
        """Write what the longest trial came to, and after how much: `17.25 after 3,072`."""
        return "not tried" if self.trial is None else f"{self.trial:.2f} after {self.trial_tokens:,}"

    @property
    def count(self) -> int:
        """K."""
        start, _, stop = self.layers.partition(":")
        return int(stop) - int(start)


class PlanReport(_Result):
    """What `plan` found."""

    model: str
    layer_count: int
    tokens: int
    """Training tokens that costs are predicted for."""
    steps: int
    trial_tokens: int
    """Training tokens of the trials in the last round, the longest."""
    budget: dict[str, float]
    untrained: float
    """Held-out perplexity of the model as it is."""
    gradients: list[float]
    """For each layer the mean squared norm of its gradient on the text, in nats squared."""
    influence: list[float]
    """For each layer 1 less the mean cosine between what enters and what leaves it."""
    lens: list[float]
    """Loss on the text read off after 0 to L layers, in nats per token; empty where the model does not let it be."""
    best: Proposal
    """The one with the lowest perplexity after the last round."""
    proposals: list[Proposal]
    """All that were tried, those that went furthest first, and of them the best."""
    paper: Proposal
    """The paper's choice, three layers from floor(L/3), for comparison; it may exceed the budget."""
    seconds: float
    """That planning took, loading not counted."""
    commands: list[str]
    """What to run."""
