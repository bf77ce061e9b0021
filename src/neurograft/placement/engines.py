"""Who runs a scan's batches: this process, or workers of a Ray cluster. The results are the same."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from neurograft.arithmetic import choose_arithmetic
from neurograft.errors import NeurograftError
from neurograft.evaluation import Window
from neurograft.models import ModelDirectory, load_model, load_tokenizer, resolve
from neurograft.organ import Organ
from neurograft.placement.candidates import Candidate
from neurograft.placement.recovering import KeptWeights, Recovering, SentWeights
from neurograft.placement.running import Outcome, Runner
from neurograft.placement.scan_state import ScanFolder

if TYPE_CHECKING:
    from neurograft.arithmetic import Kernels

log = logging.getLogger("neurograft")

EngineName = Literal["local", "ray"]
# Pieces of work for each worker: with one each, all would wait for the slowest.
_PIECES_EACH = 2
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know to make itself ready."""

    recipient: str
    """Directory, or Hub id."""
    organ: Organ
    candidates: list[Candidate]
    padding: int
    recovering: Recovering | None
    trust_remote_code: bool

    def prepare(self, kernels: Kernels | None) -> tuple[Any, Runner]:
        """Load the recipient; return it and what runs text through it."""
        import torch

        directory = resolve(self.recipient, trust_remote_code=self.trust_remote_code)
        log.info("loading %s", directory.name)
        dtype = "auto" if self.recovering is None else torch.float32
        model = load_model(directory, dtype=dtype, trust_remote_code=self.trust_remote_code)
        torch.nn.Module.to(model, torch.accelerator.current_accelerator() or torch.device("cpu"))
        return model, Runner(model, self.organ, self.candidates, padding=self.padding, kernels=kernels)

    def tokenizer(self) -> Any:
        """Return the recipient's tokenizer."""
        return load_tokenizer(self.recipient, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Task:
    """One batch of text at some places."""

    name: str
    windows: list[Window]
    candidates: list[Candidate]


class Engine(Protocol):
    """What a scan asks of whoever runs it."""

    kernels: Kernels
    blocked: dict[Candidate, str]
    """Places where the organ can't stand in a loaded model, with the reasons."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Run batches; yield each with what came of it, in any order."""

    def recover(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, bytes]]:
        """Train the organ at places; yield each with its parameters there, in any order."""

    def close(self) -> None:
        """End what was started."""


class LocalEngine:
    """Runs everything in this process.

    Args:
        setup: What to run.
        kernels: How matrices are multiplied; left out, as is fastest here.
        folder: Where parameters after recovery lie.
    """

    def __init__(self, setup: Setup, kernels: Kernels | None, folder: ScanFolder) -> None:
        self._setup, self._folder = setup, folder
        self._model, self._runner = setup.prepare(kernels)
        self.kernels, self.blocked = self._runner.kernels, self._runner.grafts.blocked

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See `Engine`."""
        for task in tasks:
            weights = _kept(self._setup, self._folder, task)
            yield task, self._runner.run(task.windows, task.candidates, weights=weights)

    def recover(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, bytes]]:
        """See `Engine`."""
        assert self._setup.recovering is not None
        tokenizer = self._setup.tokenizer()
        for candidate in candidates:
            log.info("recovering with the organ in mode %s", candidate.label)
            yield candidate, self._setup.recovering.at(self._model, tokenizer, self._setup.organ, candidate)

    def close(self) -> None:
        """See `Engine`."""


def _kept(setup: Setup, folder: ScanFolder, task: Task) -> KeptWeights | None:
    if setup.recovering is None:
        return None
    return KeptWeights({candidate: folder.weights_path(candidate) for candidate in task.candidates})


class _Worker:
    """What runs in a process of its own, maybe on another machine; Ray makes an actor of it."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def prepare(self, kernels: Kernels | None) -> tuple[Kernels, dict[Candidate, str]]:
        # Not when it is made: what fails there can't be told apart from the end of the process.
        self._model, self._runner = self._setup.prepare(kernels)
        return self._runner.kernels, self._runner.grafts.blocked

    def run(
        self, windows: list[Window], candidates: list[Candidate], recipient: bool, sent: Mapping[Candidate, Any]
    ) -> Outcome:
        import ray

        weights = SentWeights(lambda candidate: ray.get(sent[candidate]), set(sent)) if sent else None
        return self._runner.run(windows, candidates, recipient=recipient, weights=weights)

    def recover(self, candidate: Candidate) -> bytes:
        assert self._setup.recovering is not None
        return self._setup.recovering.at(self._model, self._setup.tokenizer(), self._setup.organ, candidate)


class RayEngine:
    """Spreads batches, and places where there are too few of those, over workers of a Ray cluster.

    Args:
        setup: What to run.
        kernels: How matrices are multiplied; left out, as is fastest on the first worker, which may be elsewhere.
        folder: Where parameters after recovery lie.
        workers: How many.
        address: Of the cluster; left out, one is started on this machine.

    Raises:
        NeurograftError: Ray is not installed, the cluster can't be reached, or a worker failed.
    """

    def __init__(
        self, setup: Setup, kernels: Kernels | None, folder: ScanFolder, *, workers: int, address: str | None
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise NeurograftError(
                "--engine ray needs ray, which is not installed; install it with: pip install 'neurograft[ray]'"
            )
        self._setup, self._folder = setup, folder
        self._own = _connect(address, workers)
        self._sent: dict[Candidate, Any] = {}
        import ray

        try:
            log.info("starting %d workers", workers)
            gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
            make = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
            shared = ray.put(setup)
            self._workers: list[Any] = [make.remote(shared) for _ in range(workers)]
            found: tuple[Kernels, dict[Candidate, str]] = self._get(self._workers[0].prepare.remote(kernels))
            self.kernels, self.blocked = found
            for reference in [worker.prepare.remote(self.kernels) for worker in self._workers[1:]]:
                self._get(reference)
        except BaseException:
            self.close()
            raise

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See `Engine`."""
        pieces = [piece for task in tasks for piece in self._divide(task, len(tasks))]
        found: dict[str, list[Outcome]] = {}
        wanted = {task.name: sum(piece.name == task.name for piece, _ in pieces) for task in tasks}
        whole = {task.name: task for task in tasks}
        calls = [
            (piece.name, "run", (piece.windows, piece.candidates, recipient, self._send(piece.candidates)))
            for piece, recipient in pieces
        ]
        for name, outcome in self._spread(calls):
            found.setdefault(name, []).append(outcome)
            if len(found[name]) == wanted[name]:
                yield whole[name], _joined(found.pop(name))

    def recover(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, bytes]]:
        """See `Engine`."""
        yield from self._spread([(candidate, "recover", (candidate,)) for candidate in candidates])

    def close(self) -> None:
        """See `Engine`."""
        import ray

        for worker in getattr(self, "_workers", []):
            ray.kill(worker)
        if self._own:
            ray.shutdown()

    def _divide(self, task: Task, tasks: int) -> list[tuple[Task, bool]]:
        """Divide a batch's places, if there are too few batches; the first part also runs the recipient alone."""
        parts = max(1, min(-(-_PIECES_EACH * len(self._workers) // tasks), len(task.candidates)))
        size = -(-len(task.candidates) // parts)
        groups = [task.candidates[start : start + size] for start in range(0, len(task.candidates), size)]
        return [(Task(task.name, task.windows, group), number == 0) for number, group in enumerate(groups)]

    def _send(self, candidates: Sequence[Candidate]) -> dict[Candidate, Any]:
        """Put parameters after recovery where every worker finds them, once."""
        import ray

        if self._setup.recovering is None:
            return {}
        for candidate in candidates:
            if candidate not in self._sent:
                self._sent[candidate] = ray.put(self._folder.weights_path(candidate).read_bytes())
        return {candidate: self._sent[candidate] for candidate in candidates}

    def _spread(self, calls: Sequence[tuple[Any, str, tuple[Any, ...]]]) -> Iterator[tuple[Any, Any]]:
        """Call methods of whichever worker is free; yield each call's name and result."""
        import ray

        free, waiting, running = list(self._workers), list(calls), dict[Any, tuple[Any, Any]]()
        while waiting or running:
            while free and waiting:
                name, method, arguments = waiting.pop(0)
                worker = free.pop()
                running[getattr(worker, method).remote(*arguments)] = (name, worker)
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                name, worker = running.pop(reference)
                result = self._get(reference)
                free.append(worker)
                yield name, result

    @staticmethod
    def _get(reference: Any) -> Any:
        """Return what a worker returned, or raise in one sentence what it raised."""
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, NeurograftError):
                raise type(cause)(str(cause)) from error
            raise NeurograftError(f"a Ray worker failed: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise NeurograftError(f"a Ray worker ended: {first}") from error


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    whole = Outcome(None)
    for outcome in outcomes:
        whole.recipient = outcome.recipient if whole.recipient is None else whole.recipient
        whole.places.update(outcome.places)
        whole.passes += outcome.passes
    return whole


def _connect(address: str | None, workers: int) -> bool:
    """Connect to a Ray cluster, or start one on this machine; return whether it has to be ended afterwards.

    Raises:
        NeurograftError: It can't be reached.
    """
    import ray

    if address is None and ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    try:
        if address is None:
            # What it is used for is nobody's business, and a dashboard is a server that nobody asked for.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(num_cpus=workers, include_dashboard=False, **quiet)
        else:
            _knock(address)
            ray.init(address=address, **quiet)
    except Exception as error:
        where = (
            "Ray can't be started on this machine"
            if address is None
            else f"the Ray cluster at {address} can't be reached"
        )
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NeurograftError(f"{where}: {first}") from error
    return True


def _knock(address: str) -> None:
    """Open a connection to where a cluster should be: Ray itself would try for minutes."""
    match = re.match(r"^(?:ray://)?([^:/]+):(\d+)$", address)
    if match is not None:
        socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()


def open_engine(
    name: EngineName,
    setup: Setup,
    kernels: Kernels | None,
    folder: ScanFolder,
    *,
    workers: int | None,
    address: str | None,
) -> Engine:
    """Return the engine that was asked for, ready to run.

    Raises:
        NeurograftError: It can't be had.
    """
    if name == "local":
        return LocalEngine(setup, kernels, folder)
    if kernels is None and address is None:
        import torch

        # What is fastest may be a close call, and on this machine workers should come to what this process would.
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        kernels = choose_arithmetic("float32", device).kernels
    return RayEngine(setup, kernels, folder, workers=workers or os.cpu_count() or 1, address=address)


def reference_of(directory: ModelDirectory, recipient: str) -> str:
    """Return how workers name the recipient: a Hub id as it was given, anything else by where it lies."""
    return recipient if directory.revision is not None and not recipient.endswith(".gguf") else str(directory.path)
