"""A short recovery at a place before it is measured: what the organ comes to there, not only how it arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neurograft.placement.candidates import Candidate
from neurograft.surgery import attach, detach
from neurograft.training.loop import Batches, Texts, Trainee, TrainingRun
from neurograft.training.options import TrainingOptions

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from neurograft.organ import Organ
    from neurograft.placement.grafts import Weights


@dataclass(frozen=True)
class Recovering:
    """How an organ is trained at each place."""

    texts: Texts
    options: TrainingOptions

    def at(self, model: PreTrainedModel, tokenizer: Any, organ: Organ, candidate: Candidate) -> bytes:
        """Train the organ's layers at a place of a loaded model, which is afterwards as it was.

        Returns:
            The layers' parameters, `{i}.{name}`, as a safetensors file.

        Raises:
            IncompatibleError: The organ can't stand there.
            NeurograftError: The loss is not finite any more.
        """
        from safetensors.torch import save

        attachment = attach(model, organ, at=candidate.position, mode=candidate.mode, verify=False)
        try:
            batches = Batches.build(self.texts, tokenizer, self.options)
            TrainingRun(model, Trainee.of_layers(attachment.layers, candidate.position), batches, self.options).train()
            return save(
                {
                    f"{number}.{name}": parameter.detach().cpu().contiguous()
                    for number, layer in enumerate(attachment.layers)
                    for name, parameter in layer.named_parameters()
                }
            )
        finally:
            detach(model)


class KeptWeights(Mapping[Candidate, "Weights"]):
    """Parameters after recovery, each read when it is asked for: together they may be larger than the memory.

    Args:
        paths: Where those of each place lie.
    """

    def __init__(self, paths: Mapping[Candidate, Path]) -> None:
        self._paths = dict(paths)

    def __getitem__(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self._paths[candidate])

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class SentWeights(Mapping[Candidate, "Weights"]):
    """The same where they come from another machine.

    Args:
        fetch: Returns those of a place as the bytes of a safetensors file.
        candidates: The places.
    """

    def __init__(self, fetch: Callable[[Candidate], bytes], candidates: set[Candidate]) -> None:
        self._fetch, self._candidates = fetch, candidates

    def __getitem__(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        from safetensors.torch import load

        if candidate not in self._candidates:
            raise KeyError(candidate)
        return load(self._fetch(candidate))

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    def __len__(self) -> int:
        return len(self._candidates)
