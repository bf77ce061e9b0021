"""Try an organ at every place of a recipient, on the same text, at the price of a few evaluations."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from neurograft import data as text_data
from neurograft.bank.references import is_reference
from neurograft.compat import refuse_findings, tokenizer_findings
from neurograft.data import split_documents
from neurograft.errors import DataError, IncompatibleError, UsageError
from neurograft.evaluation import DEFAULT_LENGTH
from neurograft.files import atomic_file, check_output_file, combine_digests, tensor_digest
from neurograft.models import (
    ModelDirectory,
    fingerprint_tokenizer,
    fit_sequence_length,
    load_config,
    load_tokenizer,
    resolve,
)
from neurograft.organ import Organ, organ_path, read_organ
from neurograft.placement.candidates import Candidate, list_candidates, parse_modes, parse_positions
from neurograft.placement.engines import EngineName, Setup, open_engine, reference_of
from neurograft.placement.grafts import plan_places
from neurograft.placement.recording import record_scan
from neurograft.placement.recovering import Recovering
from neurograft.placement.results import ScanReport
from neurograft.placement.rounds import Budget, Prune, Rounds, ScanProgress, Settings
from neurograft.placement.sampling import draw_sample
from neurograft.placement.scan_report import build_report
from neurograft.placement.scan_state import ScanFolder
from neurograft.training.loop import Texts
from neurograft.training.options import fit_to_model, parse_options
from neurograft.training.protocols import versions

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("neurograft")

Paths = str | Path | Sequence[str | Path]
DEFAULT_TOKENS = 32_768
# A recovery is short, and many small steps get further with few tokens than a few large ones.
_RECOVERY_LENGTH, _RECOVERY_BATCH = 128, 2


def scan(
    organ: str | Path | Organ,
    recipient: str | Path,
    *,
    data: Paths,
    general: Paths | None = None,
    modes: str | Sequence[str] = "replace,insert",
    positions: str | Sequence[int] | None = None,
    prune: Prune = "halving",
    max_tokens: int = DEFAULT_TOKENS,
    budget_seconds: float | None = None,
    budget_tokens: int | None = None,
    recover_tokens: int | None = None,
    recover_data: Paths | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    engine: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    output: str | Path | None = None,
    record: bool = False,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[ScanProgress], None] | None = None,
) -> ScanReport:
    """Measure held-out perplexity with an organ at every position of a recipient, in both modes.

    What the recipient computes below a position is computed once for all places above it. Places are compared on a
    sample of the text that doubles from round to round, and drop out on the way; `prune` says when.

    Args:
        organ: An organ, or the path of its file.
        recipient: A local transformers directory, a `.gguf` file or a Hub id.
        data: Files, folders or a Hub dataset id with text that the organ has not seen; see
            `neurograft.data.read_documents`.
        general: Other text, on which it is measured what the organ costs elsewhere. It has no say in what is best.
        modes: `replace`, `insert` or both.
        positions: `START:STOP`, `START:STOP:STEP` (half-open from 0), `3,5,8` or a list; left out, all.
        prune: `halving`: after each round those that were told apart from the best place drop out, and of the others
            all but the better half of the round's places. `evidence`: only those that were told apart. `never`: all
            places see all of the text.
        max_tokens: About how many tokens of each text are in the whole sample at most.
        budget_seconds: Stop after about so many seconds of measuring, with what there is then.
        budget_tokens: Run at most about so many tokens, each counted once for each place, recovery included.
        recover_tokens: Train the organ at each place on so many tokens before it is measured there.
        recover_data: Text for that; left out, half of the documents of `data`, which are then not measured on.
        sequence_length: Tokens in a window, as in `evaluate`; left out, 512, or as many as the recipient has positions.
        batch_size: Windows in a forward pass.
        seed: Seed of the sample, of the bootstrap and of the recovery.
        engine: `local`: this process; `ray`: workers of a Ray cluster, which need the extra `neurograft[ray]`, and must
            find the recipient under the same name.
        workers: How many Ray workers; left out, as many as this machine has cores.
        address: Of a Ray cluster, such as `auto` or `host:6379`; left out, one is started on this machine.
        output: File to write the report to, as JSON.
        record: Whether the curve and the best place are written into the organ's file, as what it recommends.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        overwrite: Whether an existing `output` may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called after each batch.

    Returns:
        The whole curve, with intervals, and the places that can't be told apart from the best.

    Raises:
        UsageError: An option is wrong, a position is out of range, the output exists, or the budget is too small.
        OrganFileError, ModelError, DataError: An input can't be read or trusted.
        IncompatibleError: The organ fits nowhere in the recipient.
        NeurograftError: The Ray cluster can't be reached, or a worker failed.
        KeyboardInterrupt: Interrupted; the same call goes on from there.
    """
    wanted = parse_modes(modes)
    _check_options(prune, max_tokens, budget_seconds, budget_tokens, recover_tokens, batch_size, seed, engine, workers)
    if recover_data is not None and recover_tokens is None:
        raise UsageError("--recover-data goes with --recover-tokens, which says how much of it.")
    if address is not None and engine != "ray":
        raise UsageError("--address is that of a Ray cluster; add --engine ray.")
    if record and not isinstance(organ, Organ) and is_reference(organ):
        raise UsageError(f"{organ} is in a bank, where versions never change; pull it and record the scan in the file.")
    path = organ.path if isinstance(organ, Organ) else organ_path(organ)
    if record and path is None:
        raise UsageError("the organ has no file that the scan could be recorded in; save it first.")
    organ = organ if isinstance(organ, Organ) else read_organ(str(path))
    if output is not None:
        read = [path for text in (data, general, recover_data) for path in text_data.paths_of(text)]
        inputs = [Path(recipient), *([path] if path is not None else []), *read]
        check_output_file(Path(output), overwrite=overwrite, inputs=inputs)
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    texts = _read(data, general, recover_data, recover_tokens, seed, reading)
    directory = resolve(recipient, trust_remote_code=trust_remote_code)
    case = _Case.open(organ, directory, trust_remote_code)
    candidates = list_candidates(
        case.layer_count,
        organ.layer_count,
        modes=wanted,
        positions=None if positions is None else parse_positions(positions, case.layer_count),
    )
    blocked = case.blocked(candidates)
    length = fit_sequence_length(sequence_length, DEFAULT_LENGTH, case.config, directory.name)
    budget = Budget(budget_seconds, budget_tokens)
    settings = Settings(prune, max_tokens, budget, recover_tokens, length, batch_size, seed)
    samples = [
        draw_sample(name, documents, case.tokenizer, max_tokens=max_tokens, sequence_length=length, seed=seed)
        for name, documents in texts.measured.items()
    ]
    setup = Setup(
        recipient=reference_of(directory, str(recipient)),
        organ=organ,
        candidates=[candidate for candidate in candidates if candidate not in blocked],
        padding=text_data.separator_token(case.tokenizer),
        recovering=_recovering(texts, recover_tokens, seed, case.config, directory.name),
        trust_remote_code=trust_remote_code,
    )
    folder = ScanFolder(_key(setup, directory, texts, settings))
    state = folder.load()
    worker = open_engine(engine, setup, state.kernels, folder, workers=workers, address=address)
    try:
        blocked |= worker.blocked
        left = [candidate for candidate in candidates if candidate not in blocked]
        rounds = Rounds(worker, left, samples, folder, state, settings, progress=progress)
        rounds.run()
    finally:
        worker.close()
    report = build_report(
        rounds,
        blocked,
        organ=organ,
        recipient=directory.name,
        layer_count=case.layer_count,
        fingerprints={name: text_data.fingerprint(documents) for name, documents in texts.measured.items()},
    )
    if output is not None:
        with atomic_file(Path(output), overwrite=overwrite) as temporary:
            temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if record and path is not None:
        record_scan(path, organ, report, directory, trust_remote_code=trust_remote_code)
    folder.clear()
    return report


def _check_options(
    prune: str,
    max_tokens: int,
    budget_seconds: float | None,
    budget_tokens: int | None,
    recover_tokens: int | None,
    batch_size: int,
    seed: int,
    engine: str,
    workers: int | None,
) -> None:
    if prune not in get_args(Prune):
        raise UsageError(f"--prune is {prune!r}; it can be {', '.join(get_args(Prune))}.")
    if engine not in get_args(EngineName):
        raise UsageError(f"--engine is {engine!r}; it can be {', '.join(get_args(EngineName))}.")
    if workers is not None and engine != "ray":
        raise UsageError("--workers counts the workers of a Ray cluster; add --engine ray.")
    least: dict[str, float | None] = {
        "max-tokens": max_tokens, "budget-seconds": budget_seconds, "budget-tokens": budget_tokens,
        "recover-tokens": recover_tokens, "batch-size": batch_size, "workers": workers,
    }  # fmt: skip
    for name, value in least.items():
        if value is not None and not value > 0:
            raise UsageError(f"--{name} is {value}; it must be above 0.")
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must not be negative.")


@dataclass(frozen=True)
class _Texts:
    """Documents that places are measured on, by name, and documents that they recover on."""

    measured: dict[str, list[str]]
    recovery: list[str]


def _read(
    data: Paths,
    general: Paths | None,
    recover_data: Paths | None,
    recover_tokens: int | None,
    seed: int,
    reading: dict[str, Any],
) -> _Texts:
    log.info("reading the text")
    domain = text_data.read_documents(data, **reading)
    recovery: list[str] = []
    if recover_data is not None:
        recovery = text_data.read_documents(recover_data, **reading)
    elif recover_tokens is not None:
        recovery, domain = split_documents(domain, held_out=0.5, seed=seed)
    measured = {"domain": domain}
    if general is not None:
        measured["general"] = text_data.read_documents(general, **reading)
    if recover_tokens is not None and len(recovery) < 2:
        raise DataError("there is too little text to recover on; give more with --recover-data.")
    return _Texts(measured, recovery)


@dataclass(frozen=True)
class _Case:
    """An organ and a recipient, looked at without weights."""

    organ: Organ
    config: Any
    tokenizer: Any
    skeleton: Any
    layer_count: int

    @classmethod
    def open(cls, organ: Organ, directory: ModelDirectory, trust_remote_code: bool) -> _Case:
        """Read what is needed, and refuse an organ that fits nowhere.

        Raises:
            ModelError: The recipient can't be read or cut.
            IncompatibleError: Configurations or tokenizers differ in what matters.
        """
        from neurograft.anatomy import build_skeleton, describe
        from neurograft.compat import config_findings
        from neurograft.models import read_raw_config

        config = load_config(directory, trust_remote_code=trust_remote_code)
        skeleton = build_skeleton(config, read_raw_config(directory.path))
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        findings = config_findings(organ.manifest, config)
        if organ.manifest.tokenizer is not None:
            findings += tokenizer_findings(organ.manifest.tokenizer, fingerprint_tokenizer(tokenizer))
        refuse_findings(organ.name, directory.name, findings)
        return cls(organ, config, tokenizer, skeleton, describe(skeleton).layer_count)

    def blocked(self, candidates: Sequence[Candidate]) -> dict[Candidate, str]:
        """Return the places where the organ can't stand, with the reasons.

        Raises:
            IncompatibleError: It can stand at none.
        """
        plans, blocked = plan_places(self.skeleton, self.organ, candidates)
        if not plans:
            raise IncompatibleError(
                f"the organ {self.organ.name} can stand at none of {len(blocked)} places, at the first since: "
                f"{next(iter(blocked.values()))}"
            )
        return blocked


def _recovering(texts: _Texts, tokens: int | None, seed: int, config: Any, name: str) -> Recovering | None:
    if tokens is None:
        return None
    # Nothing stops early: every place gets the same. Which arithmetic is fastest, each worker would measure for itself,
    # and places that were trained in another one could not be told apart from places that are better.
    options = parse_options(
        max_tokens=tokens, seed=seed, sequence_length=_RECOVERY_LENGTH, batch_size=_RECOVERY_BATCH, evaluations=1,
        eval_tokens=1024, patience=2, precision="float32",
    )  # fmt: skip
    parts = split_documents(texts.recovery, held_out=options.held_out, seed=seed)
    return Recovering(Texts(*parts), fit_to_model(options, config, name))


def _key(setup: Setup, directory: ModelDirectory, texts: _Texts, settings: Settings) -> str:
    """Return a digest of everything that decides what a scan comes to."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in directory.path.iterdir() if f.is_file())
    parts = {
        "organ": combine_digests({name: tensor_digest(tensor) for name, tensor in setup.organ.tensors.items()}),
        "recipient": [str(directory.path), directory.revision, files],
        "texts": {name: text_data.fingerprint(documents) for name, documents in texts.measured.items()},
        "recovery": text_data.fingerprint(texts.recovery),
        "places": [candidate.label for candidate in setup.candidates],
        "settings": asdict(settings),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
