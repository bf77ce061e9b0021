"""Train one model by one method and measure what that takes; in a process of its own, so that its memory is its own."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from neurograft import data
from neurograft.allocator import give_back_freed_memory, merging_environment
from neurograft.arithmetic import ARITHMETIC_FOLDER, fast_float32
from neurograft.data import PackedTokens
from neurograft.errors import DiskError, NeurograftError
from neurograft.files import atomic_file
from neurograft.loss import NextTokenLoss
from neurograft.models import ModelDirectory, cache_directory, load_config, load_model, load_tokenizer
from neurograft.organ import now
from neurograft.training.baselines import METHODS, prepare
from neurograft.training.loop import Batches, Texts, TrainingProgress, TrainingRun
from neurograft.training.options import parse_options
from neurograft.training.run_state import forget_state, forget_unreadable, state_path
from neurograft.training.search import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("neurograft")
Show = Callable[[str], None]
_ANSWER = "neurograft-answer "
_ENDING = (signal.SIGINT, signal.SIGTERM)
# Seconds, at least, between two saves of a run's state: that of all parameters is four times the model.
_SAVED_EVERY = 600.0


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Job(_Part):
    """What one run needs to know."""

    model: str
    """Path of a transformers directory."""
    method: str | None
    """`None` to evaluate the model as it is."""
    settings: Settings = {}
    options: dict[str, Any] = {}
    """Training options that are the same for every method."""
    organ: str | None = None
    """Path of the organ file that training starts from, where the method trains an organ."""
    training: list[str]
    validation: list[str]
    evaluated: dict[str, list[str]] = {}
    """Documents to evaluate after training, under a name."""
    watched_tokens: int = 0
    """Tokens of the training text whose loss is measured at each held-out evaluation too."""
    trust_remote_code: bool = False
    resume: str | None = None
    """Path of the file that the run's state is kept in, from which it goes on; `None` to keep none."""
    key: str = ""
    """Digest of all that the run depends on."""


class Point(_Part):
    """One held-out evaluation during training."""

    step: int
    seconds: float
    """Of training so far, held-out evaluations not counted."""
    perplexity: float
    """On the validation text."""
    training: float | None = None
    """Perplexity on a sample of the training text, where that is watched."""


class Measured(_Part):
    """What one run came to."""

    perplexity: dict[str, float]
    """On `validation` and on whatever else was to be evaluated, packed, by the model as it is put to use."""
    curve: list[Point] = []
    curve_counts: bool = True
    """Whether the curve's perplexities are those of the model that is put to use; not so for `standalone`."""
    seconds: float = 0.0
    """Of training: caching of hidden states and compiling included, each time that an interrupted run goes on;
    held-out evaluations, saving and loading not."""
    seconds_with_evaluations: float = 0.0
    tokens_seen: int = 0
    steps: int = 0
    memory_beyond_model: int = 0
    """Bytes: the peak while training, less what the process held once the model was loaded."""
    memory_with_model: int = 0
    """Bytes: the peak while training, of the whole process (on GPUs: of what torch allocated)."""
    trainable_parameters: int = 0
    trainable_bytes: int = 0
    shipped_bytes: int = 0
    finished: str | None = None
    """When, in UTC."""

    @property
    def kept_its_start(self) -> bool:
        """Whether no evaluation was better than the one before the first step, so that those weights were kept."""
        points = self.curve if self.curve_counts else []
        return len(points) > 1 and min(point.perplexity for point in points[1:]) >= points[0].perplexity


class _TimedRun(TrainingRun):
    """Notes when each held-out evaluation began, and the peak of memory.

    The clock stands still while an evaluation runs or the state is saved; what saving takes is not in the peak, where
    that can be reset.

    Args:
        memory: The peak of memory.
        watched_tokens: Of the training text, whose loss is noted then too.
        *args: As for `TrainingRun`.
        **kwargs: As for `TrainingRun`.
    """

    def __init__(self, *args: Any, memory: PeakMemory, watched_tokens: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = memory
        self._watched = _some_rows(self.batches.training, watched_tokens)

    def held_out_loss(self) -> float:
        started, step, notes = self._seconds(), self.state.step, self.state.notes
        notes.began.setdefault(step, started - notes.evaluating)
        try:
            loss = super().held_out_loss()
            if self._watched is not None:
                notes.training_losses[step] = _mean_loss(self.loss, self._watched, self.batches.batch_size)
        finally:
            notes.evaluating += self._seconds() - started
        return loss

    def note_memory(self) -> None:
        """Note the peak of memory, if it is higher than what was noted before."""
        notes, peak = self.state.notes, self.memory.peak()
        notes.memory_with_model = max(notes.memory_with_model, peak)
        notes.memory_beyond_model = max(notes.memory_beyond_model, peak - self.memory.before)

    def _save(self) -> None:
        self.note_memory()
        started = time.monotonic()
        try:
            super()._save()
        except DiskError as error:
            log.warning("the run's state is not kept any more: %s", error)
            self.resume = None
        self.memory.restart()
        self._started += time.monotonic() - started

    def _restore(self) -> None:
        super()._restore()
        if self.state.step:
            self.memory.restart()  # what came before the first step was noted the first time


def _some_rows(packed: PackedTokens, tokens: int) -> PackedTokens | None:
    """Return sequences from all over a text, with about as many tokens; `None` for none."""
    if not tokens:
        return None
    rows = torch.randperm(len(packed.input_ids), generator=torch.Generator().manual_seed(0))
    rows = rows[: max(1, tokens // packed.input_ids.shape[1])]
    return PackedTokens(packed.input_ids[rows], packed.labels[rows], packed.input_ids[rows].numel())


def measure(job: Job, show: Show | None = None) -> Measured:
    """Train and evaluate, in this process.

    Args:
        job: What to do.
        show: Called with one line about how far it has come, after each step.

    Raises:
        NeurograftError: Training diverged, or something does not fit.
    """
    directory = ModelDirectory(Path(job.model), Path(job.model).name)
    tokenizer = load_tokenizer(directory, trust_remote_code=job.trust_remote_code)
    model = load_model(directory, dtype=torch.float32, trust_remote_code=job.trust_remote_code)
    torch.nn.Module.to(model, torch.accelerator.current_accelerator() or torch.device("cpu"))
    if job.method is None:
        return Measured(perplexity=_perplexities(model, tokenizer, job))
    method = METHODS[job.method]
    own, searched = method.parse(job.settings)
    options = parse_options(**{**job.options, **searched})
    options = options.model_copy(update={"checkpoint_every": max(options.checkpoint_every, _SAVED_EVERY)})
    batches = Batches.build(Texts(job.training, job.validation), tokenizer, options)
    dtype: Any = load_config(directory, trust_remote_code=job.trust_remote_code).dtype
    memory = PeakMemory(model)
    prepared = prepare(
        model,
        method,
        own,
        organ=None if job.organ is None else Path(job.organ),
        stored=dtype or torch.float32,
        rank=options.rank,
        seed=options.seed,
    )
    trainee = prepared.trainee
    run = _TimedRun(
        model, trainee, batches, options, progress=_shower(show), memory=memory, watched_tokens=job.watched_tokens,
        resume=None if job.resume is None else Path(job.resume), key=job.key,
    )  # fmt: skip
    try:
        run.train()
    except DiskError:
        raise
    except NeurograftError:
        if run.resume is not None:
            forget_state(run.resume)  # going on would come to the same
        raise
    run.note_memory()
    notes = run.state.notes
    prepared.deploy()
    with tempfile.TemporaryDirectory() as folder:
        shipped = prepared.ship(Path(folder))
    return Measured(
        perplexity=_perplexities(model, tokenizer, job),
        curve=[
            Point(
                step=step,
                seconds=notes.began[step],
                perplexity=_perplexity(loss),
                training=_perplexity(notes.training_losses[step]) if step in notes.training_losses else None,
            )
            for step, loss in run.state.held_out
            if math.isfinite(loss)
        ],
        curve_counts=prepared.curve_counts,
        seconds=run.state.seconds - notes.evaluating,
        seconds_with_evaluations=run.state.seconds,
        tokens_seen=run.state.tokens_seen,
        steps=run.state.step,
        memory_beyond_model=notes.memory_beyond_model,
        memory_with_model=notes.memory_with_model,
        trainable_parameters=sum(parameter.numel() for parameter in trainee.parameters),
        trainable_bytes=sum(parameter.nbytes for parameter in trainee.parameters),
        shipped_bytes=shipped,
    )


def _shower(show: Show | None) -> Callable[[TrainingProgress], None] | None:
    from neurograft.progress import training_line

    return None if show is None else lambda progress: show(training_line(progress))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def _perplexities(model: PreTrainedModel, tokenizer: Any, job: Job) -> dict[str, float]:
    """Evaluate the model as it is now on the validation text and the others, packed as in training."""
    options = parse_options(**job.options)
    loss, found = NextTokenLoss(model.eval()), {}
    for name, documents in {"validation": job.validation, **job.evaluated}.items():
        # Held-out text is packed and cut to `eval_tokens` where batches are built, so all of it is done there.
        packed = Batches.build(Texts(documents, documents), tokenizer, options).held_out
        value = _mean_loss(loss, packed, options.batch_size)
        if not math.isfinite(value):
            raise NeurograftError(f"the loss on the {name} text is {value} after training.")
        found[name] = _perplexity(value)
    return found


def _mean_loss(loss: NextTokenLoss, packed: PackedTokens, batch_size: int) -> float:
    """Return the mean loss in nats per token."""
    total, count = 0.0, int((packed.labels[:, 1:] != data.IGNORED_LABEL).sum())
    with torch.no_grad(), fast_float32(loss.model.device):
        for start in range(0, len(packed.input_ids), batch_size):
            rows = slice(start, start + batch_size)
            total += float(loss(packed.input_ids[rows], packed.labels[rows]).double().sum())
    return total / max(count, 1)


class PeakMemory:
    """The largest memory that this process held since a model was loaded.

    On CUDA devices it is what torch allocated there, on Linux the resident size, whose peak can be reset; elsewhere the
    peak since the process began.

    Args:
        model: The model that was just loaded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.cuda = model.device.type == "cuda"
        for parameter in model.parameters():
            parameter.sum()  # weights may lie in mapped files, which are not resident until they are touched
        self.restart()
        self.before = self.peak()

    def restart(self) -> None:
        """Forget the peak so far, where it can be reset."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        give_back_freed_memory()  # what is left of what was freed would hide as much of what comes
        _reset_resident_peak()

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        return torch.cuda.max_memory_allocated() if self.cuda else _resident_peak()


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        log.debug("the peak of the resident size can't be reset here")


def _resident_peak() -> int:
    """Return the largest resident size of this process, in bytes: since the last reset where that is possible."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_once(job: Job, what: dict[str, Any], folder: Path, title: str, *, isolated: bool) -> Measured:
    """Run a job, go on with it if it was interrupted, or take what an earlier run of the same came to.

    Args:
        job: What to do.
        what: All that the result depends on, as JSON can hold it.
        folder: Where results and the run's cache are kept; its folder `runs` is there.
        title: What to call the run.
        isolated: Whether it has a process of its own.

    Raises:
        NeurograftError: It failed.
    """
    key = digest_of(what)
    kept = folder / "runs" / f"{key[:32]}.json"
    measured = _read_kept(kept)
    if measured is not None:
        log.info("%s: done before", title)
        return measured
    log.info("%s", title)
    measure = measure_apart if isolated else measure_here
    job = job.model_copy(update={"resume": str(state_path(kept)), "key": key})
    forget_unreadable(state_path(kept), key)
    with own_cache(folder) as cache:
        measured = measure(job, cache, lambda line: log.info("%s: %s", title, line))
    measured = measured.model_copy(update={"finished": now()})
    with atomic_file(kept, overwrite=True) as temporary:
        temporary.write_text(measured.model_dump_json(indent=1) + "\n", encoding="utf-8")
    forget_state(state_path(kept))
    return measured


def digest_of(what: Any) -> str:
    """Return the SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _read_kept(path: Path) -> Measured | None:
    try:
        return Measured.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[str]:
    """Yield a new cache, gone afterwards: no run profits from what another one has cached.

    Only how fast the machine multiplies matrices is known in all of them, or runs could differ in how they do it.
    """
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=folder) as cache:
        _copy_measured_arithmetic(cache_directory(), Path(cache))
        yield cache
        _copy_measured_arithmetic(Path(cache), cache_directory())


def _copy_measured_arithmetic(source: Path, target: Path) -> None:
    for file in (source / ARITHMETIC_FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, NeurograftError):  # then it is measured anew
            (target / ARITHMETIC_FOLDER).mkdir(parents=True, exist_ok=True)
            with atomic_file(target / ARITHMETIC_FOLDER / file.name, overwrite=False) as temporary:
                temporary.write_bytes(file.read_bytes())


def measure_here(job: Job, cache: str, show: Show) -> Measured:
    """Run a job in this process, with a cache of its own."""
    before = os.environ.get("NEUROGRAFT_CACHE")
    os.environ["NEUROGRAFT_CACHE"] = cache
    try:
        return measure(job, show)
    finally:
        if before is None:
            os.environ.pop("NEUROGRAFT_CACHE", None)
        else:
            os.environ["NEUROGRAFT_CACHE"] = before


def measure_apart(job: Job, cache: str, show: Show) -> Measured:
    """Run a job in a process of its own; the text goes to it through a pipe and is not written anywhere.

    Raises:
        NeurograftError: The job failed, or its process died.
    """
    environment = {**os.environ, **merging_environment(), "NEUROGRAFT_CACHE": cache}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            answer = _converse(process, job, show)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if answer is None:
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[2]
            raise NeurograftError(_explain_death(code, last))
    if "error" in answer:
        raise (DiskError if answer.get("disk") else NeurograftError)(answer["error"])
    return Measured.model_validate(answer)


def _command() -> list[str]:
    return [sys.executable, "-m", "neurograft.training.measuring"]


def _converse(process: subprocess.Popen[str], job: Job, show: Show) -> dict[str, Any] | None:
    """Hand over the job, pass on the lines that tell its progress, return its answer if there is one."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    try:
        with process.stdin as stream:
            stream.write(job.model_dump_json())
    except BrokenPipeError:
        return None
    answer: dict[str, Any] | None = None
    for line in process.stdout:
        if line.startswith(_ANSWER):
            answer = json.loads(line.removeprefix(_ANSWER))
        else:
            show(line.strip())
    return answer


def _explain_death(code: int, last: str) -> str:
    if code < 0:
        return f"the process that trained was ended by signal {-code}; the machine's memory may be too small for it."
    return f"the process that trained ended with status {code}: {last or 'it said nothing'}"


def main() -> None:
    """Read a job from standard input, run it, and answer on standard output."""
    for number in _ENDING:
        signal.signal(number, _interrupt)
    job = Job.model_validate_json(sys.stdin.read())
    try:
        answer = measure(job, _tell).model_dump_json()
    except NeurograftError as error:
        answer = json.dumps({"error": str(error), "disk": isinstance(error, DiskError)})
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        answer = json.dumps({"error": "the disk is full.", "disk": True})
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{_ANSWER}{answer}", flush=True)


def _tell(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the comparison was killed; what was done is to be saved
        raise KeyboardInterrupt from None


def _interrupt(_number: int, _frame: Any) -> None:
    """Take Ctrl-C and the end that the comparison asks for alike, and once: the second must not break off saving."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
