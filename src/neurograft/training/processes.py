"""The processes that train one thing together: which share is whose, what they agree on, what is spread over them.

One process is the usual case, and for it nothing here does anything. With several, started by `torchrun` or
`accelerate launch`, every process holds the text and takes its share of each batch; what trains is either held by each
and its gradients averaged (DistributedDataParallel), or spread over all (FSDP2).
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from neurograft import errors, ranks
from neurograft.anatomy import describe
from neurograft.errors import NeurograftError, UsageError
from neurograft.sharding import is_spread

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from torch import nn
    from transformers import PreTrainedModel

Result = TypeVar("Result")
_FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism",
}


class Processes:
    """All processes of a training run, seen from one of them.

    Args:
        log_with: Name of a tracker of `accelerate` to log to.
        log_folder: Where that tracker writes.

    Raises:
        UsageError: The launcher asks for something that neurograft does not do.
    """

    def __init__(self, *, log_with: str | None = None, log_folder: str | None = None) -> None:
        _refuse_foreign()
        self.accelerator = _accelerator(log_with, log_folder)
        if self.accelerator.mixed_precision not in ("no", "bf16"):
            raise UsageError(
                f"the launcher asks for mixed precision {self.accelerator.mixed_precision}; neurograft trains with no "
                "or bf16."
            )
        self.count: int = self.accelerator.num_processes
        self.number: int = self.accelerator.process_index
        if ranks.several() and self.count == 1:
            raise UsageError(
                f"the launcher started several processes, which can't work together on {self.accelerator.device.type} "
                "devices; start one, or set ACCELERATE_USE_CPU=true."
            )
        self.sharded = self.count > 1 and _flag("ACCELERATE_USE_FSDP")
        self._interrupted = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.number == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """Return this process's share of some rows; the shares differ by one row at most."""
        return list(rows[self.number :: self.count])

    def total(self, *values: float) -> list[float]:
        """Add up each value over the processes; all get the same sums."""
        if self.count == 1:
            return list(values)
        summed: Any = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        return [float(value) for value in summed]

    def any(self, flag: bool) -> bool:
        """Whether any process says yes; all get the same answer."""
        return self.total(float(flag))[0] > 0

    def from_first(
        self, make: Callable[[], tuple[str, Mapping[str, torch.Tensor]]]
    ) -> tuple[str, Mapping[str, torch.Tensor]]:
        """Let the first process make a text and tensors, and give them to all, on the CPU.

        Raises:
            NeurograftError: What the first process raised, in all of them.
        """
        if self.count == 1:
            return make()
        tensors: Mapping[str, torch.Tensor] = {}
        header: dict[str, Any] = {}
        if self.first:
            try:
                text, tensors = make()
                header = {"text": text, "tensors": {n: [list(t.shape), str(t.dtype)] for n, t in tensors.items()}}
            except NeurograftError as error:
                header = {"error": type(error).__name__, "text": str(error)}
        header = json.loads(self._broadcast_bytes(json.dumps(header).encode()))
        if "error" in header:
            raise getattr(errors, header["error"], NeurograftError)(header["text"])
        return header["text"], {
            name: self._broadcast(tensors.get(name), shape, getattr(torch, dtype.removeprefix("torch.")))
            for name, (shape, dtype) in header["tensors"].items()
        }

    def on_first(self, action: Callable[[], object]) -> None:
        """Let the first process do something; all wait for it, and raise what it raises."""
        self.only_first(action)

    def only_first(self, action: Callable[[], Result]) -> Result | None:
        """Do what `on_first` does, and return what came of it; `None` in the other processes."""
        results: list[Result] = []

        def act() -> tuple[str, Mapping[str, torch.Tensor]]:
            results.append(action())
            return "", {}

        self.from_first(act)
        return results[0] if results else None

    def _broadcast(self, tensor: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        device = self.accelerator.device
        sent = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
        torch.distributed.broadcast(sent, src=0)
        return sent.cpu()

    def _broadcast_bytes(self, content: bytes) -> bytes:
        size = int(self._broadcast(torch.tensor([len(content)]), [1], torch.int64))
        raw = torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.first else None
        return self._broadcast(raw, [size], torch.uint8).numpy().tobytes()

    def prepare(self, model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
        """Make a model ready to be trained by all processes.

        Args:
            model: A model in which only `parameters` need a gradient. Where the launcher asks for FSDP2, it is spread
                over the processes, in place.
            parameters: What trains.

        Returns:
            What to call instead of the model where gradients are wanted, and the parameters as they are now.

        Raises:
            UsageError: A parameter is not in the model, or the model is spread already.
        """
        if self.count == 1:
            return model, list(parameters)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if any(id(parameter) not in names for parameter in parameters):
            raise UsageError("with several processes, everything that trains must be in the model.")
        if not self.sharded:
            return self._replicate(model, parameters), list(parameters)
        _shard(model, self.accelerator.device)
        return model, [model.get_parameter(names[id(parameter)]) for parameter in parameters]

    def _replicate(self, model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> nn.Module:
        device = self.accelerator.device
        torch.nn.Module.to(model, device)
        return torch.nn.parallel.DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device],
            gradient_as_bucket_view=True,
            find_unused_parameters=_leaves_some_unused(model, parameters),
        )

    @contextmanager
    def passing(self, model: Any, *, last: bool) -> Iterator[None]:
        """Run a forward and a backward pass of a step; the processes exchange gradients in its `last` one."""
        # Where the model is spread, so are its gradients: keeping whole ones until the last pass would need the memory
        # that spreading it saves.
        if last or self.count == 1 or self.sharded:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    @contextmanager
    def noting_interruptions(self) -> Iterator[None]:
        """With several processes, note Ctrl-C and SIGTERM, for `interrupted`, instead of raising in one of them."""
        if self.count == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(_signal: int, _frame: Any) -> None:
            self._interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupted(self) -> bool:
        """Whether some process was to end; all get the same answer."""
        return self.count > 1 and self.any(self._interrupted)


def starting_device() -> torch.device:
    """Return where a model is to be put before it trains: on this process's device, unless it will be spread out."""
    return torch.device("cpu") if spreads() else _state().device


def spreads() -> bool:
    """Whether the launcher asks for the model to be spread over the processes."""
    return _state().num_processes > 1 and _flag("ACCELERATE_USE_FSDP")


@contextmanager
def one_by_one() -> Iterator[None]:
    """Let the first process of each machine go ahead, so that the others find what it leaves on the disk."""
    with _state().local_main_process_first():
        yield


def _state() -> PartialState:
    """Return what `accelerate` knows of the processes; asked for the first time, it lets them find each other."""
    from accelerate import PartialState

    return PartialState(cpu=_on_cpu())


def _on_cpu() -> bool:
    """Whether to compute on CPUs, where `accelerate` joins processes only if told."""
    return _flag("ACCELERATE_USE_CPU") or (ranks.several() and torch.accelerator.current_accelerator() is None)


@contextmanager
def whole_weights() -> Iterator[None]:
    """Let every process load all weights.

    `accelerate launch` asks transformers to load them in one process of each machine and leave them empty in the
    others; but these need them for what neurograft tries out.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _refuse_foreign() -> None:
    for name, what in _FOREIGN.items():
        if _flag(name):
            raise UsageError(f"the launcher asks for {what}; neurograft trains with DDP or FSDP2.")
    if _flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("the launcher asks for FSDP version 1; give accelerate launch --fsdp_version 2.")
    for name, what in (("ACTIVATION_CHECKPOINTING", "activation checkpointing"), ("OFFLOAD_PARAMS", "CPU offload")):
        if _flag("ACCELERATE_USE_FSDP") and _flag(f"FSDP_{name}"):
            raise UsageError(f"the launcher asks for FSDP's {what}, which neurograft does not do; leave it off.")


def _accelerator(log_with: str | None, log_folder: str | None) -> Accelerator:
    """Make an accelerator, and leave as it was what all accelerators of a process share, as far as that goes."""
    from accelerate import Accelerator
    from accelerate.state import GradientState

    shared = GradientState()
    accumulation = shared.plugin_kwargs
    try:
        return Accelerator(cpu=_on_cpu(), log_with=log_with, project_dir=log_folder)
    finally:
        shared.plugin_kwargs = accumulation


def _shard(model: PreTrainedModel, device: torch.device) -> None:
    """Spread a model over the processes: each decoder layer by itself, and the rest, by torch's `fully_shard`.

    `accelerate` does so only on accelerators, and together with an optimizer; its setting of what is given up after a
    forward pass is honoured.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if is_spread(model):
        raise UsageError("this model is spread over the processes already; load it anew to train something else in it.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    gives_up = bool(FullyShardedDataParallelPlugin().reshard_after_forward)
    for layer in model.get_submodule(describe(model).layers_path).children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=gives_up)
    # What is left, embedding and head among it, is needed at both ends of a pass, so it stays whole during one.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _leaves_some_unused(model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> bool:
    """Try whether a pass over one token leaves some parameter without a gradient, as in mixtures of experts."""
    modes = {module: module.training for module in model.modules()}
    model.eval()  # nothing random is drawn
    try:
        caller: Any = model
        logits = caller(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False).logits
        gradients = torch.autograd.grad(logits.float().sum(), list(parameters), allow_unused=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return any(gradient is None for gradient in gradients)
