"""Ways to adapt a model that are compared with one another: organs, LoRA, DoRA and full fine-tuning.

Each puts something into a loaded model and says what trains; all of them then run through the same training loop.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neurograft.errors import NeurograftError, UsageError
from neurograft.extraction import parse_layers
from neurograft.manifest import Protocol
from neurograft.organ import Organ, read_organ
from neurograft.surgery import Attachment, attach, attach_alone, detach, give_up_originals, tensors_of
from neurograft.training.loop import Trainee
from neurograft.training.low_rank import LowRankChanges
from neurograft.training.options import TrainingOptions
from neurograft.training.search import SHARED_OPTIONS, Choice, Range, Settings, Space

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OrganSettings(_Settings):
    """Which layers an organ has."""

    layers: int | float | str = Field(default=3, union_mode="left_to_right")
    """How many; below 1, their share of the model's; or START:STOP, half-open from 0, and then `position` has no
    meaning."""
    position: float = Field(default=1 / 3, ge=0, le=1)
    """Where they stand: 0 is as far down as they can, 1 as far up."""
    train: Literal["all", "attention", "mlp"] = "all"
    """What of them trains: everything, their attention, or everything but their attention."""

    def range_in(self, layer_count: int) -> range:
        """Return the layers of a model of `layer_count` layers, half-open from 0.

        Raises:
            UsageError: The model has no such layers.
        """
        if isinstance(self.layers, str):
            return parse_layers(self.layers, layer_count)
        count = self.layers
        if 0 < count < 1:
            count = max(1, round(count * layer_count))
        if not 0 < count <= layer_count or count != int(count):
            raise UsageError(f"the search asks for an organ of {count} layers, and the model has {layer_count}.")
        start = round(self.position * (layer_count - count))
        return range(start, start + int(count))


class AdapterSettings(_Settings):
    """The shape of a low-rank adapter."""

    rank: int = Field(default=16, ge=1)
    """Inner width of each pair of matrices."""
    scale: float = Field(default=2.0, gt=0)
    """What the product of the pair is multiplied by: LoRA's alpha over its rank."""


class FullSettings(_Settings):
    """Full fine-tuning has no settings of its own."""


@dataclass(frozen=True)
class Prepared:
    """A model with what is to train in it."""

    trainee: Trainee
    deploy: Callable[[], None]
    """Makes the trained model what would be put to use: weights rounded as they ship, a `standalone` organ put back."""
    ship: Callable[[Path], int]
    """Returns the bytes that leave for another site; may write them into the folder that it is given."""
    curve_counts: bool = True
    """Whether held-out losses during training are those of the model that is put to use."""


@dataclass(frozen=True)
class Method:
    """One way to adapt a model."""

    name: str
    settings: type[_Settings]
    space: Mapping[str, Choice]
    """What is searched unless the user says otherwise."""
    protocol: Protocol | None = None
    """How the organ trains, where it is an organ."""
    package: str | None = None
    """A package of the `compare` extra that it needs."""

    def parse(self, settings: Settings) -> tuple[_Settings, dict[str, Any]]:
        """Divide settings into the method's own and training options.

        Raises:
            UsageError: There is no such setting, or its value is not allowed.
        """
        own: dict[str, Any] = {name: value for name, value in settings.items() if name in self.settings.model_fields}
        options: dict[str, Any] = {name: value for name, value in settings.items() if name not in own}
        for name in options:
            if name not in self.known_settings():
                raise UsageError(
                    f"{name} is no setting that can be searched for {self.name}; there are "
                    f"{', '.join(self.known_settings())}."
                )
        try:
            parsed = self.settings(**own)
            TrainingOptions(**options)
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{self.name}: {first['loc'][0]}: {first['msg']} (it is {first['input']!r}).") from error
        return parsed, options

    def known_settings(self) -> list[str]:
        """Return what can be searched: the method's own settings, then training options."""
        unknown = SHARED_OPTIONS if self.protocol is not None else SHARED_OPTIONS | {"rank"}  # it is the organ's
        return [*self.settings.model_fields, *(n for n in TrainingOptions.model_fields if n not in unknown)]

    def check_space(self, space: Space) -> None:
        """Check every value that a search may try.

        Raises:
            UsageError: One of them is not allowed, or there is no such setting.
        """
        for name, choice in space.items():
            for value in (choice.low, choice.high) if isinstance(choice, Range) else choice:
                self.parse({name: value})


_ORGAN_SPACE: Space = {
    "lr": Range(low=2e-4, high=4e-3),
    "layers": [0.1, 1 / 3, 2 / 3],
    "position": [1 / 2, 1.0],
}
_ADAPTER_SPACE: Space = {"lr": Range(low=3e-4, high=1e-2), "rank": [8, 16, 32, 64]}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("organ", OrganSettings, _ORGAN_SPACE, protocol="in_place"),
        Method("insert", OrganSettings, _ORGAN_SPACE, protocol="insert"),
        Method("standalone", OrganSettings, _ORGAN_SPACE, protocol="standalone"),
        Method("lora", AdapterSettings, _ADAPTER_SPACE, package="peft"),
        Method("dora", AdapterSettings, _ADAPTER_SPACE, package="peft"),
        Method("full", FullSettings, {"lr": Range(low=1e-5, high=1e-3)}),
    )
}


def find_methods(names: str | list[str] | tuple[str, ...]) -> list[Method]:
    """Return methods by their names, given as a list or separated by commas.

    Raises:
        UsageError: One is unknown or given twice, or there is none.
        NeurograftError: One needs a package that is not installed.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    if not wanted:
        raise UsageError(f"no method was given; there are {', '.join(METHODS)}.")
    for name in wanted:
        if name not in METHODS:
            raise UsageError(f"there is no method {name}; there are {', '.join(METHODS)}.")
        if wanted.count(name) > 1:
            raise UsageError(f"the method {name} is given twice.")
    for name in wanted:
        package = METHODS[name].package
        if package is not None:
            require_extra(package, f"the method {name}")
    return [METHODS[name] for name in wanted]


def require_extra(package: str, what: str, extra: str = "compare") -> None:
    """Refuse where a package of an extra is missing.

    Args:
        package: Name of the package, as it is imported.
        what: What needs it, to begin a sentence with.
        extra: The extra that brings it.

    Raises:
        NeurograftError: Names the package and the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise NeurograftError(
            f"{what} needs {package}, which is not installed; install it with: pip install 'neurograft[{extra}]'"
        )


def prepare(
    model: PreTrainedModel,
    method: Method,
    settings: _Settings,
    *,
    organ: Path | None = None,
    stored: torch.dtype = torch.float32,
    rank: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Put what a method trains into a loaded model.

    Args:
        model: The model; it is changed.
        method: The method.
        settings: Its own settings.
        organ: The caller's own organ file to start from, for methods that train an organ; identities for `insert`.
        stored: The dtype that the model is stored in, in which a fully tuned one ships.
        rank: Train an organ by changes of this rank, see `TrainingOptions.rank`; an adapter's is in its settings.
        seed: Seed of the random start of an adapter or of low-rank changes.

    Raises:
        IncompatibleError: The organ does not fit.
        NeurograftError: peft can't adapt a model of this kind.
    """
    if isinstance(settings, AdapterSettings):
        return _prepare_adapter(model, settings, dora=method.name == "dora", seed=seed)
    if method.protocol is None or organ is None:
        return _prepare_full(model, stored)
    part = settings.train if isinstance(settings, OrganSettings) else "all"
    return _prepare_organ(model, read_organ(organ, for_use=False), method.protocol, rank, seed, part)


def _prepare_adapter(model: Any, settings: AdapterSettings, *, dora: bool, seed: int) -> Prepared:
    """Put a low-rank adapter on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.rank * settings.scale,  # type: ignore[arg-type,unused-ignore] # peft takes fractions too
        target_modules="all-linear",
        lora_dropout=0.0,
        use_dora=dora,
    )
    try:
        with _quiet_peft():
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        kind = "DoRA" if dora else "LoRA"
        raise NeurograftError(f"peft can't put {kind} on this {model.config.model_type} model: {error}") from error
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def ship(folder: Path) -> int:
        with _quiet_peft():
            adapted.save_pretrained(folder, save_embedding_layers=False)
        return sum((folder / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))

    return Prepared(Trainee(parameters, [model], 0), deploy=lambda: None, ship=ship)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence what peft says about choices that it makes rightly by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _prepare_full(model: PreTrainedModel, stored: torch.dtype) -> Prepared:
    """Let every parameter train, those of the embedding and the head too."""
    parameters = list(model.parameters())  # tied ones once

    def ship(_folder: Path) -> int:
        buffers = {id(buffer): buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
        return sum(t.numel() * _size(t, stored) for t in (*parameters, *buffers.values()))

    return Prepared(Trainee(parameters, [model], 0), deploy=lambda: _round(parameters, stored), ship=ship)


def _size(tensor: torch.Tensor, stored: torch.dtype) -> int:
    return stored.itemsize if tensor.is_floating_point() else tensor.element_size()


def _round(parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.to(dtype))


def _prepare_organ(
    model: PreTrainedModel, organ: Organ, protocol: Protocol, rank: int | None, seed: int, part: str
) -> Prepared:
    if protocol not in get_args(Protocol):
        raise UsageError(f"{protocol} is no protocol; there are {', '.join(get_args(Protocol))}.")
    if protocol == "standalone":
        attachment = attach_alone(model, organ)
    else:
        attachment = attach(model, organ, mode="replace" if protocol == "in_place" else "insert")
    manifest = organ.manifest
    if protocol != "standalone":
        give_up_originals(model, attachment)
    del organ  # its tensors are in the model now, and need not be in memory twice
    trained: dict[str, torch.Tensor] = {}
    changes = LowRankChanges(attachment.layers, rank, seed) if rank is not None else None

    def deploy() -> None:
        if changes is not None:
            changes.merge()
        trained.update(_as_shipped(attachment, model))
        if protocol == "standalone":
            detach(model)
            attach(model, Organ(manifest, trained), mode="replace", verify=False)
        else:
            _round_layers(attachment)

    def ship(folder: Path) -> int:
        path = folder / "organ.safetensors"
        # What the layers answered before they were trained says nothing of them now.
        Organ(manifest.model_copy(update={"probe": None, "sketch": None}), trained).save(path)
        return path.stat().st_size

    trainee = Trainee(_parameters_of(attachment.layers, part), attachment.layers, attachment.positions[0])
    if changes is not None:
        trainee = Trainee(changes.parameters, attachment.layers, attachment.positions[0])
    return Prepared(trainee, deploy, ship, curve_counts=protocol != "standalone")


def _parameters_of(layers: list[nn.Module], part: str) -> list[nn.Parameter]:
    """Return the parameters of layers that are in their attention, in anything else, or all of them.

    Raises:
        UsageError: There are none.
    """
    found = []
    for layer in layers:
        for name, parameter in layer.named_parameters():
            module = name.partition(".")[0]
            in_attention = ("attn" in module or "attention" in module) and "norm" not in module
            if part == "all" or in_attention == (part == "attention"):
                found.append(parameter)
    if not found:
        raise UsageError(f"the organ's layers have no {part} that could be trained alone; leave train at all.")
    return found


def _as_shipped(attachment: Attachment, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return an organ's trained tensors in the dtypes that its file has."""
    before = attachment.organ.tensors
    return {name: tensor.to(before[name].dtype) for name, tensor in tensors_of(attachment, model).items()}


def _round_layers(attachment: Attachment) -> None:
    """Give the layers the weights that the organ's file would hold."""
    dtypes = {tensor.dtype for tensor in attachment.organ.tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # where dtypes are mixed, the layers stay as they were trained
        _round([parameter for layer in attachment.layers for parameter in layer.parameters()], dtypes.pop())
