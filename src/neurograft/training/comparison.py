"""Compare ways to adapt a model: the same start, text, order and evaluation, and as long a search for each."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurograft import data as text_data
from neurograft import ranks
from neurograft.errors import DataError, DiskError, NeurograftError, UsageError
from neurograft.extraction import extract
from neurograft.files import alone_in, atomic_file, explained_os_errors, refuse_overlap
from neurograft.identity import as_identity
from neurograft.models import ModelDirectory, load_config, load_tokenizer, resolve
from neurograft.training import measuring
from neurograft.training.baselines import Method, OrganSettings, find_methods, require_extra
from neurograft.training.comparison_results import Comparison, Run, Trial, summaries
from neurograft.training.loop import Batches, Texts, pack_held_out
from neurograft.training.measuring import Job, Measured
from neurograft.training.options import TrainingOptions, fit_to_model, parse_options
from neurograft.training.protocols import versions
from neurograft.training.search import DECIDED_BY_COMPARE, Settings, Space, read_spaces, settings_to_try
from neurograft.wording import counted

log = logging.getLogger("neurograft")

DEFAULT_METHODS = ("organ", "lora", "dora", "full")
REPORT = "results.json"
_FEW_TOKENS = 100


@dataclass(frozen=True)
class _Text:
    training: list[str]
    validation: list[str]
    evaluated: dict[str, list[str]]

    def parts(self) -> dict[str, list[str]]:
        return {"training": self.training, "validation": self.validation, **self.evaluated}


def compare(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    tokens: int,
    general: str | Path | Sequence[str | Path] | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    methods: str | list[str] | tuple[str, ...] = DEFAULT_METHODS,
    seeds: int = 3,
    trials: int = 6,
    search_tokens: int | None = None,
    search: str | Path | None = None,
    evaluations: int = 12,
    isolated: bool = True,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Comparison:
    """Compare ways to adapt a model to a domain, each tuned as long as the others.

    The text is divided into three parts: one to train on, a validation part, which chooses the settings and, within
    every run, the best weights, and a test part (`domain`), which nothing is chosen by. All methods go through the same
    training loop with the same batches in the same order.

    First each method tries as many settings as the others, each on `search_tokens` tokens, with a learning rate
    schedule of that length; the settings with the lowest validation perplexity win, and every try is in the report.
    Then each method trains on `tokens` tokens once for each seed. Every run has a process and a cache of its own, and
    methods take turns, so that other work on the machine hits all of them. A run that fails, because it diverges or
    memory does not suffice, counts as tried, and is reported.

    What was done is kept in `output`; if the comparison is interrupted, the same call goes on from there.

    Args:
        model: A Hub id, a transformers directory or a `.gguf` file.
        data: Files, folders or a Hub dataset id with the domain's text; see `neurograft.data.read_documents`.
        output: Folder for results.json, results.md, quality.html and quality.svg.
        tokens: Training tokens of each measured run, over as many passes through the text as it takes.
        general: Other text, on which forgetting shows.
        eval_data: The test part; left out, a share of the documents of `data` is kept for it.
        methods: Names from `neurograft.training.baselines.METHODS`: `organ` (trained in place), `insert`, `standalone`,
            `lora`, `dora`, `full`.
        seeds: How many runs of each method, with seeds from 0.
        trials: How many settings are tried for each method; with 1, the middle of each search space is taken untried.
        search_tokens: Training tokens of each trial; left out, a quarter of `tokens`.
        search: YAML or JSON file with search spaces that replace the usual ones of the methods in it.
        evaluations: How many times the validation text is evaluated during a measured run, after the first.
        isolated: Whether every run has a process of its own. Without, peak memory is less exact.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        overwrite: Whether a finished report in `output` may be replaced; runs that both share are not run again.
        trust_remote_code: See `neurograft.models.resolve`.
        **options: Fields of `TrainingOptions` that hold for every method, such as `sequence_length`, `batch_size`.

    Raises:
        UsageError: A method, an option, the search file or the output is wrong.
        DataError: There is too little text, or it can't be read.
        NeurograftError: A package of the `compare` extra is missing, or everything that was tried for a method failed.
        KeyboardInterrupt: Interrupted; the same call goes on from there.
    """
    ranks.refuse_several("compare")
    chosen, folder = find_methods(methods), Path(output)
    require_extra("plotly", "compare")
    shared = _shared_options(options, tokens, evaluations)
    if seeds < 1 or trials < 1:
        raise UsageError(f"there are {seeds} seeds and {trials} trials; at least one of each is needed.")
    spaces = _spaces(chosen, None if search is None else Path(search))
    tries = {method.name: settings_to_try(spaces[method.name], trials, method.name) for method in chosen}
    _check_output(folder, overwrite=overwrite)
    refuse_overlap(
        folder, [Path(model), *(path for text in (data, eval_data, general) for path in text_data.paths_of(text))]
    )
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    text = _read(data, eval_data, general, shared, reading)
    directory = resolve(model, trust_remote_code=trust_remote_code)
    shared = fit_to_model(shared, load_config(directory, trust_remote_code=trust_remote_code), directory.name)
    batches = _check_amount(text, directory, shared, trust_remote_code)
    tries = _with_layers(chosen, tries, directory, trust_remote_code)
    a_step = shared.batch_size * shared.sequence_length
    budget = max(search_tokens or tokens // 4, a_step)
    trained_on, evaluated = _trained_on(text), _evaluated_tokens(text, directory, shared, trust_remote_code)
    total = 1 + len(chosen) * (seeds + (trials if trials > 1 else 0))
    with _Desk(folder, directory, text, shared, total, isolated, trust_remote_code) as desk:
        untrained = desk.run(None, {}, {}, "evaluating the untrained model").perplexity
        found = _search(desk, chosen, tries, budget)
        runs = _measure(desk, chosen, found, seeds)
        report = Comparison(
            model=directory.name,
            tokens=tokens,
            search_tokens=budget,
            trials_each=trials,
            seeds=list(range(seeds)),
            steps=batches.steps,
            passes=round(batches.steps * a_step / batches.training.input_ids.numel(), 3),
            options=shared.model_dump(mode="json", exclude=set(DECIDED_BY_COMPARE)),
            documents={name: len(documents) for name, documents in text.parts().items()},
            trained_on=trained_on,
            evaluated_tokens=evaluated,
            fingerprints={name: text_data.fingerprint(documents) for name, documents in text.parts().items()},
            untrained=untrained,
            methods=summaries(chosen, found, runs),
            trials=found,
            runs=runs,
            versions=installed_versions(),
            machine=machine_name(),
        )
        _write(report, folder)
    return report


def _shared_options(options: dict[str, Any], tokens: int, evaluations: int) -> TrainingOptions:
    for name in options:
        if name in DECIDED_BY_COMPARE:
            raise UsageError(f"compare decides {name} itself; give it with --search if it is to be searched.")
    # Every method sees all of its tokens: none stops early.
    return parse_options(**options, max_tokens=tokens, evaluations=evaluations, patience=evaluations + 1)


def _spaces(methods: list[Method], file: Path | None) -> dict[str, Space]:
    spaces: dict[str, Space] = {method.name: dict(method.space) for method in methods}
    for name, space in (read_spaces(file) if file is not None else {}).items():
        try:
            (method,) = find_methods(name)
            method.check_space(space)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        if name in spaces:  # a file may well serve comparisons of fewer methods
            spaces[name] = space
    return spaces


def _check_output(folder: Path, *, overwrite: bool) -> None:
    if folder.is_file() or (folder.is_symlink() and not folder.exists()):
        what = "a file" if folder.is_file() else "a link to nothing"
        raise UsageError(f"{folder} is {what}; give the name of a folder to write.")
    if (folder / REPORT).exists() and not overwrite:
        raise UsageError(
            f"{folder} holds a finished comparison already; choose another folder or pass --overwrite, which runs only "
            "what is new in it."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "runs").is_dir() and not (folder / REPORT).exists():
        raise UsageError(f"{folder} exists and holds no comparison; choose another folder.")
    if not folder.parent.is_dir():
        raise UsageError(f"the folder {folder.parent} does not exist; create it first.")


def _read(data: Any, eval_data: Any, general: Any, options: TrainingOptions, reading: dict[str, Any]) -> _Text:
    log.info("reading the text")
    documents, share = text_data.read_documents(data, **reading), options.held_out
    if eval_data is not None:
        test = text_data.read_documents(eval_data, **reading)
    elif len(documents) < 3:
        raise DataError(
            f"{len(documents)} documents can't be divided into training, validation and test text; give more "
            "documents, evaluation data of its own, or a document separator."
        )
    else:
        documents, test = text_data.split_documents(documents, held_out=share)
    training, validation = text_data.split_documents(documents, held_out=share)
    evaluated = {"domain": test}
    if general is not None:
        evaluated["general"] = text_data.read_documents(general, **reading)
    return _Text(training, validation, evaluated)


def _trained_on(text: _Text) -> dict[str, int]:
    """Say of each text that is evaluated how many of its documents are trained on too, where that is any."""
    training = set(text.training)
    found = {name: sum(document in training for document in documents) for name, documents in text.parts().items()}
    found = {name: count for name, count in found.items() if count and name != "training"}
    for name, count in found.items():
        verb = "is" if count == 1 else "are"
        log.warning("%s of the %s text %s in the training text too", counted(count, "document"), name, verb)
    return found


def _evaluated_tokens(text: _Text, directory: ModelDirectory, options: TrainingOptions, trust: bool) -> dict[str, int]:
    """Return how many tokens of each text a perplexity is over."""
    tokenizer, tokens = load_tokenizer(directory, trust_remote_code=trust), {}
    for name, documents in text.parts().items():
        if name != "training":
            packed = pack_held_out(Texts([], documents), tokenizer, options)
            tokens[name] = int((packed.labels[:, 1:] != text_data.IGNORED_LABEL).sum())
            if tokens[name] < _FEW_TOKENS:
                log.warning("the %s text has %d tokens, too few for its perplexity to say much", name, tokens[name])
    return tokens


def _check_amount(text: _Text, directory: ModelDirectory, options: TrainingOptions, trust: bool) -> Batches:
    """Refuse text that does not fill one batch; return the batches of a measured run."""
    tokenizer = load_tokenizer(directory, trust_remote_code=trust)
    batches = Batches.build(Texts(text.training, text.validation), tokenizer, options)
    rows = len(batches.training.input_ids)
    if rows < options.batch_size:
        raise DataError(
            f"the text to train on fills {rows} sequences of {options.sequence_length} tokens, and a batch takes "
            f"{options.batch_size}; give more text, a smaller --batch-size or a shorter --sequence-length."
        )
    return batches


def _with_layers(
    methods: list[Method], tries: dict[str, list[Settings]], directory: ModelDirectory, trust: bool
) -> dict[str, list[Settings]]:
    """Say START:STOP in all settings of organs, in place of how many layers and how far up.

    Raises:
        UsageError: The model does not have the layers that some ask for.
    """
    count = _layer_count(directory, trust)
    return {method.name: [_placed(method, settings, count) for settings in tries[method.name]] for method in methods}


def _placed(method: Method, settings: Settings, layer_count: int) -> Settings:
    own, _ = method.parse(settings)
    if not isinstance(own, OrganSettings):
        return settings
    layers = own.range_in(layer_count)
    rest = {name: value for name, value in settings.items() if name not in ("layers", "position")}
    return {"layers": f"{layers.start}:{layers.stop}", **rest}


def _layer_count(directory: ModelDirectory, trust: bool) -> int:
    from neurograft.layer_values import count_name

    config = load_config(directory, trust_remote_code=trust)
    return int(getattr(config, count_name(config)))


class _Desk:
    """Hands out runs one after the other, and keeps what they came to.

    Args:
        folder: The comparison's folder.
        directory: The model.
        text: The text.
        options: The shared training options.
        total: How many runs there will be.
        isolated: Whether each run has a process of its own.
        trust: See `neurograft.models.resolve`.
    """

    def __init__(
        self,
        folder: Path,
        directory: ModelDirectory,
        text: _Text,
        options: TrainingOptions,
        total: int,
        isolated: bool,
        trust: bool,
    ) -> None:
        self.folder, self.directory, self.text, self.options = folder, directory, text, options
        self.isolated, self.trust, self._doing = isolated, trust, "the comparison"
        self.layer_count = _layer_count(directory, trust)
        self._total, self._number = total, 0
        self._alone = ExitStack()

    def __enter__(self) -> _Desk:
        with explained_os_errors(self.folder):
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
            self._alone.enter_context(alone_in(self.folder))
            for left in self.folder.glob(".cache-*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._organs = tempfile.TemporaryDirectory(prefix=".cache-organs-", dir=self.folder)
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.directory.path.iterdir())
        texts = {name: text_data.fingerprint(documents) for name, documents in self.text.parts().items()}
        self._start = {
            "model": [str(self.directory.path), files],
            "texts": texts,
            "on": [installed_versions(), machine_name()],
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._organs.cleanup()
        self._alone.close()
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self._doing} was not finished; the same command goes on from there") from error

    def run(
        self, method: Method | None, settings: Settings, changes: dict[str, Any], title: str, *, final: bool = True
    ) -> Measured:
        """Run something, or take what an earlier run of the same came to.

        Args:
            method: `None` to evaluate the untrained model.
            settings: The method's settings.
            changes: Training options that differ from the shared ones.
            title: What to call it.
            final: Whether the test and general text are evaluated too, and not the validation text alone.

        Raises:
            NeurograftError: It failed.
            KeyboardInterrupt: Interrupted.
        """
        self._doing = title
        options = {**self.options.model_dump(mode="json", exclude_none=True), **changes}
        what = {
            **self._start, "method": None if method is None else method.name, "settings": settings,
            "options": options, "final": final, "isolated": self.isolated,
        }  # fmt: skip
        job = Job(
            model=str(self.directory.path),
            method=None if method is None else method.name,
            settings=settings,
            options=options,
            organ=self._organ(method, settings),
            training=self.text.training,
            validation=self.text.validation,
            evaluated=self.text.evaluated if final else {},
            trust_remote_code=self.trust,
        )
        self._number += 1
        place = f"{title} ({self._number} of {self._total})"
        return measuring.measure_once(job, what, self.folder, place, isolated=self.isolated)

    def _organ(self, method: Method | None, settings: Settings) -> str | None:
        """Write the organ that a method starts from, outside the process that is measured; `None` if it needs none."""
        if method is None or method.protocol is None:
            return None
        own, _ = method.parse(settings)
        if not isinstance(own, OrganSettings):
            return None
        layers = own.range_in(self.layer_count)
        identity = method.protocol == "insert"
        path = Path(self._organs.name) / f"{layers.start}-{layers.stop}-{identity}.safetensors"
        if not path.is_file():
            organ = extract(
                self.directory.path, layers=layers, name="organ", verify="bytes", trust_remote_code=self.trust
            )
            (as_identity(organ) if identity else organ).save(path)
        return str(path)


def _search(desk: _Desk, methods: list[Method], tries: dict[str, list[Settings]], budget: int) -> list[Trial]:
    """Try settings, methods taking turns; mark each method's best.

    Raises:
        NeurograftError: Nothing that was tried for a method worked.
    """
    found: dict[str, list[Trial]] = {method.name: [] for method in methods}
    changes = {"max_tokens": budget, "evaluations": 1, "patience": 1}
    for number in range(len(tries[methods[0].name])):
        for method in _in_turn(methods, number):
            settings = tries[method.name][number]
            if len(tries[method.name]) == 1:
                found[method.name].append(Trial(method=method.name, settings=settings, perplexity=None, seconds=None))
                continue
            title = f"{method.name}, trial {number + 1} of {len(tries[method.name])}"
            measured, error = _try(desk, method, settings, changes, title, final=False)
            found[method.name].append(
                Trial(
                    method=method.name,
                    settings=settings,
                    perplexity=None if measured is None else measured.perplexity["validation"],
                    seconds=None if measured is None else measured.seconds,
                    error=error,
                )
            )
    return [trial for method in methods for trial in _mark_best(found[method.name])]


def _mark_best(trials: list[Trial]) -> list[Trial]:
    worked = [trial for trial in trials if trial.error is None]
    if not worked:
        raise NeurograftError(f"nothing that was tried for {trials[0].method} worked: {trials[0].error}")
    best = min(worked, key=lambda trial: trial.perplexity or 0)
    return [trial.model_copy(update={"chosen": trial is best}) for trial in trials]


def _in_turn(methods: list[Method], number: int) -> list[Method]:
    """Return the methods, another one first in each round."""
    first = number % len(methods)
    return methods[first:] + methods[:first]


def _try(
    desk: _Desk, method: Method, settings: Settings, changes: dict[str, Any], title: str, *, final: bool
) -> tuple[Measured | None, str | None]:
    try:
        return desk.run(method, settings, changes, title, final=final), None
    except DiskError:  # which is no fault of the method
        raise
    except NeurograftError as error:
        log.warning("%s failed: %s", title, str(error).rstrip("."))
        return None, str(error)


def _measure(desk: _Desk, methods: list[Method], trials: list[Trial], seeds: int) -> list[Run]:
    """Run each method with its best settings and each seed, methods taking turns.

    Raises:
        NeurograftError: No run worked.
    """
    best = {trial.method: trial.settings for trial in trials if trial.chosen}
    runs = []
    for seed in range(seeds):
        for method in _in_turn(methods, seed):
            title = f"{method.name}, seed {seed}, run {seed + 1} of {seeds}"
            measured, error = _try(desk, method, best[method.name], {"seed": seed}, title, final=True)
            runs.append(Run(method=method.name, seed=seed, measured=measured, error=error))
    if all(run.error is not None for run in runs):
        raise NeurograftError(f"no run worked: {runs[0].error}")
    return runs


def installed_versions() -> dict[str, str]:
    """Return the versions of what a run's result depends on."""
    found = versions()
    for name in ("peft", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine_name() -> str:
    """Return what computes here, in words."""
    import torch

    device = torch.accelerator.current_accelerator()
    what = counted(torch.get_num_threads(), "thread") if device is None else str(device)
    if device is not None and device.type == "cuda":
        what = torch.cuda.get_device_name()
    return f"{what}, {platform.machine()}, Python {platform.python_version()}"


def _write(report: Comparison, folder: Path) -> None:
    """Write the report and its three renderings; results.json last, so that it is there only if all of them are."""
    from neurograft.training import comparison_report

    files = {
        "results.md": comparison_report.markdown(report),
        "quality.html": comparison_report.html(report),
        "quality.svg": comparison_report.svg(report),
        REPORT: report.model_dump_json(indent=1) + "\n",
    }
    for name, content in files.items():
        with atomic_file(folder / name, overwrite=True) as temporary:
            temporary.write_text(content, encoding="utf-8")
