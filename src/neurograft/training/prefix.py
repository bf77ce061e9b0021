"""What enters an organ while it trains: computed once for each sequence, kept on disk, and reused.

The layers below an organ are frozen, so the hidden states that they hand to it never change. With them on disk, neither
those layers nor their arithmetic are needed from the second pass on, or at all if an earlier run has left them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft.anatomy import describe
from neurograft.arithmetic import Arithmetic
from neurograft.errors import NeurograftError, UsageError
from neurograft.files import combine_digests, explained_os_errors, human_bytes, tensor_digest
from neurograft.surgery import Undo
from neurograft.training.options import CacheDtype

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")

Give = Sequence[int] | torch.Tensor


class PrefixCache:
    """Hidden states of N sequences on disk, (N, T, C), each there or not yet there.

    Args:
        folder: Where the files lie; made if needed.
        rows: N.
        tokens: T.
        width: C.
        dtype: How they are stored; they are rounded to it once.

    Raises:
        NeurograftError: The folder can't be written to.
    """

    def __init__(self, folder: Path, *, rows: int, tokens: int, width: int, dtype: CacheDtype) -> None:
        import numpy

        self.folder = folder
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.shape = (rows, tokens, width)
        row = tokens * width * self.dtype.itemsize
        with explained_os_errors(folder):
            make_files(folder, {"states.bin": rows * row, "there.bin": rows})
            self._states = numpy.memmap(folder / "states.bin", dtype=numpy.uint8, mode="r+", shape=(rows, row))
            # Written after the states are on the disk: a row that an interruption cut short does not count as there.
            self._there = numpy.memmap(folder / "there.bin", dtype=numpy.uint8, mode="r+", shape=(rows,))

    def has(self, rows: Give) -> bool:
        """Whether all these rows are there."""
        return bool(self._there[list(map(int, rows))].all())

    def lacking(self, rows: Give) -> list[int]:
        """Return those of some rows that are not there, in order, each once."""
        return [row for row in dict.fromkeys(map(int, rows)) if not self._there[row]]

    def read(self, rows: Give) -> torch.Tensor:
        """Return the states of some rows, (len(rows), T, C), in the dtype that they are stored in."""
        raw = torch.from_numpy(self._states[list(map(int, rows))])  # fancy indexing copies
        return raw.view(self.dtype).view(len(rows), *self.shape[1:])

    def write(self, rows: Give, states: torch.Tensor) -> None:
        """Store the states of some rows, (len(rows), T, C)."""
        chosen = list(map(int, rows))
        raw = states.detach().to("cpu", self.dtype).contiguous().view(len(chosen), -1).view(torch.uint8)
        self._states[chosen] = raw.numpy()
        self._states.flush()
        self._there[chosen] = 1
        self._there.flush()

    def settle(self, rows: Sequence[int], states: torch.Tensor) -> torch.Tensor:
        """Store those of some rows that are not there yet, and return what is there: one state for a row, ever.

        The same row can come to other bits in another batch, and then it would depend on the order what is learned.

        Args:
            rows: Numbers of the rows.
            states: (len(rows), T, C) their states as they were computed now.
        """
        lacking = self.lacking(rows)
        if lacking:
            self.write(lacking, states[[rows.index(row) for row in lacking]])
        return self.read(rows)


def make_files(folder: Path, sizes: dict[str, int]) -> None:
    """Make a folder with files of zeros, all at once; one that is there already stays, even if made a moment ago."""
    if _has_files(folder, sizes):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(mode=0o700)  # hidden states are as private as the text
        for name, size in sizes.items():
            with (temporary / name).open("wb") as stream:
                stream.truncate(size)
        if folder.is_dir() and not _has_files(folder, sizes):
            shutil.rmtree(folder)  # what some other program left of it
        try:
            temporary.rename(folder)
        except OSError:
            if not _has_files(folder, sizes):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _has_files(folder: Path, sizes: dict[str, int]) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


Rest = tuple[Any, ...] | None
"""What stands behind the hidden state in a layer's output; `None` where it is returned bare."""


class Prefix:
    """Runs a model from a layer on, with given hidden states in the place of what the layers before it compute.

    The layers stay where they are, so masks, positions, kinds and numbers are the model's own; they only hand on what
    they are given. That the logits stay the same is tried out first.

    Args:
        model: A causal language model in which nothing below `position` trains.
        position: Number of the first layer that is to run, at least 1.
    """

    def __init__(self, model: PreTrainedModel, position: int) -> None:
        self.model: Any = model
        layers = list(model.get_submodule(describe(model).layers_path).children())
        self.below, self.first = layers[:position], layers[position]
        self._learned: list[Rest] | None = None

    def works(self) -> bool:
        """Try whether given hidden states lead to the same logits, to the bit, as computed ones."""
        if not self.below:
            return False
        ids = (torch.arange(12, device=self.model.device) % int(self.model.config.vocab_size))[None]  # (1, T)
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                computed, entering, outputs = self._watch(ids)
                self._learned = learn_outputs(outputs, ids)
                if self._learned is None or entering.shape[:2] != ids.shape or entering.dim() != 3:
                    return False
                with self.given(entering):
                    same = torch.equal(self.model(input_ids=ids, use_cache=False).logits, computed)
                # Something else must lead elsewhere, or the layers would not be reading what they are given.
                with self.given(entering.roll(1, dims=1)):
                    return same and not torch.equal(self.model(input_ids=ids, use_cache=False).logits, computed)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            log.info("the hidden states below the organ can't be reused (%s)", error)
            return False
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _watch(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """Run the model once; return its logits, what entered the first layer, and what each layer below returned."""
        outputs: list[Any] = []
        entering: list[torch.Tensor] = []
        handles = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in self.below]
        handles.append(
            self.first.register_forward_pre_hook(
                lambda _m, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, entering[0].clone(), outputs

    def up_to(self, position: int) -> Prefix:
        """Return the same for a layer below the first one.

        Raises:
            UsageError: It was not asked whether this one works.
        """
        prefix = Prefix(self.model, position)
        if self._learned is None:
            raise UsageError("ask whether it works first.")
        prefix._learned = self._learned[:position]
        return prefix

    def entering(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return what enters the first layer that is to run, (B, T, C), for (B, T) token ids; nothing above it runs."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _ReachedError(args[0] if args else kwargs["hidden_states"])

        handle = self.first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(input_ids=input_ids.to(self.model.device), use_cache=False)
        except _ReachedError as reached:
            return reached.states
        finally:
            handle.remove()
        raise RuntimeError("the first layer that is to run was not reached")

    @contextmanager
    def noted(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Note what enters the first layer that runs, and let what is kept of it enter instead.

        Args:
            keep: Called with it, (B, T, C); returns it as it is kept.
        """

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            states = args[0] if args else kwargs["hidden_states"]
            kept = keep(states.detach()).to(states)
            return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})

        handle = self.first.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def given(self, states: torch.Tensor) -> Iterator[None]:
        """Let the first layer that runs be entered by `states`, (B, T, C), and nothing be computed before it."""
        if self._learned is None:
            raise UsageError("ask whether it works first.")

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        handle, undo = self.first.register_forward_pre_hook(enter, with_kwargs=True), Undo()
        try:
            for layer, rest in zip(self.below, self._learned, strict=True):
                undo.set(vars(layer), "forward", hand_on(rest))
            yield
        finally:
            undo.restore()
            handle.remove()


class _ReachedError(Exception):
    """Ends a forward pass where the rest of it is not needed."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


class UnusualOutputError(Exception):
    """A layer returns other tensors beside its hidden states."""


def hand_on(rest: Rest) -> Any:
    """Return a forward method that hands a hidden state on, in the form in which the layer returns one."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if rest is None else (hidden, *rest)

    return forward


def behind_states(output: Any) -> Rest:
    """Return what stands behind the hidden states in a layer's output; `None` if they are returned bare.

    Raises:
        UnusualOutputError: Something does.
    """
    if isinstance(output, torch.Tensor):
        return None
    if type(output) is tuple and all(item is None for item in output[1:]):
        return output[1:]
    raise UnusualOutputError


def learn_outputs(outputs: list[Any], ids: torch.Tensor) -> list[Rest] | None:
    """Note how each layer returns its hidden state; `None` if one returns other tensors beside it."""
    try:
        rests = [behind_states(output) for output in outputs]
    except UnusualOutputError:
        return None
    bare = [output for output, rest in zip(outputs, rests, strict=True) if rest is None]
    return rests if all(output.shape[:2] == ids.shape for output in bare) else None


def below_digest(model: PreTrainedModel, position: int, elsewhere: Mapping[str, str] | None = None) -> str:
    """Return a digest of everything that decides what enters layer `position`: weights below it and configuration.

    Args:
        model: The model.
        position: Number of the layer.
        elsewhere: Digests of tensors that are not in memory, under their names in the model.
    """
    path = describe(model).layers_path
    later = tuple(f"{path}.{number}." for number in range(position, len(list(model.get_submodule(path).children()))))
    head = {id(p) for p in getattr(model.get_output_embeddings(), "parameters", list)()}
    tied = {id(p) for p in model.get_input_embeddings().parameters()}
    known, digests = elsewhere or {}, dict[str, str]()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(later) and (id(tensor) not in head or id(tensor) in tied):
            digests[name] = known.get(name) or stored_digest(tensor)
    config = json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{combine_digests(digests)}{position}{config}{model.dtype}".encode()).hexdigest()


def stored_digest(tensor: torch.Tensor) -> str:
    """Return a tensor's digest; of one of bitsandbytes, with the scales that its codes are multiplied by."""
    packed: Any = getattr(tensor, "quant_state", None)
    if packed is None:
        return tensor_digest(tensor)
    return combine_digests({"codes": tensor_digest(tensor), "scales": tensor_digest(packed.absmax)})


def cache_for(
    folder: Path,
    model: PreTrainedModel,
    position: int,
    input_ids: torch.Tensor,
    *,
    dtype: CacheDtype,
    arithmetic: Arithmetic,
    needed: bool,
    elsewhere: Mapping[str, str] | None = None,
) -> PrefixCache | None:
    """Open the cache for some packed text in a host, under the digest of everything that it depends on.

    Args:
        folder: Folder of all such caches.
        model: The host.
        position: Number of the first layer that is to run.
        input_ids: (N, T) the packed text.
        dtype: How the states are stored.
        arithmetic: How matrices are multiplied where they are computed.
        needed: Whether too little disk is an error; otherwise there is no cache then.
        elsewhere: See `below_digest`.

    Raises:
        NeurograftError: The disk has no room for it.
    """
    below = below_digest(model, position, elsewhere)
    key = hashlib.sha256(
        f"{below}{tensor_digest(input_ids)}{dtype}{arithmetic}{torch.__version__}".encode()
    ).hexdigest()
    target, width = folder / key[:32], int(model.config.hidden_size)
    size = input_ids.numel() * width * getattr(torch, dtype).itemsize
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if not target.is_dir() and size > free:
        sentence = (
            f"the hidden states below the organ take {human_bytes(size)}, and {folder} has {human_bytes(free)} free"
        )
        if needed:
            raise NeurograftError(f"{sentence}; use a narrower --cache-dtype, or --cache-prefix never.")
        log.info("%s, so they are computed anew each time", sentence)
        return None
    return PrefixCache(target, rows=len(input_ids), tokens=input_ids.shape[1], width=width, dtype=dtype)
