"""Train an organ inside a frozen host, or alone between a host's embedding and head."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft import __version__, data, probe, ranks
from neurograft.anatomy import describe
from neurograft.compat import refuse_findings, tokenizer_findings
from neurograft.errors import UsageError
from neurograft.files import combine_digests, tensor_digest
from neurograft.identity import as_identity
from neurograft.layer_values import count_name
from neurograft.layer_weights import load_layers
from neurograft.manifest import Evaluation, LayerAnatomy, Manifest, Mode, Protocol, Redaction, Training
from neurograft.models import ModelDirectory, fingerprint_tokenizer, load_config, load_tokenizer, resolve
from neurograft.organ import (
    Organ,
    check_name,
    check_organ_output,
    check_version,
    clean_name,
    config_to_json,
    dtype_name,
    now,
    organ_path,
    read_organ,
)
from neurograft.privacy.redaction import check_installed, redact_documents
from neurograft.sharding import fill
from neurograft.sketch import make_sketch
from neurograft.steps import check_position
from neurograft.surgery import Attachment, attach, attach_alone, give_up_originals, tensors_of
from neurograft.training.host import check_precision, load_host, pack
from neurograft.training.loop import Batches, ProgressCallback, Texts, Trainee, TrainingRun
from neurograft.training.low_rank import LowRankChanges
from neurograft.training.offloading import skipping
from neurograft.training.options import TrainingOptions, fit_to_model, parse_options
from neurograft.training.privately import PrivateBatches, PrivateRun, check_private, find_secret
from neurograft.training.processes import Processes, one_by_one, whole_weights
from neurograft.training.run_state import forget_state, state_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("neurograft")

# Options that change how long a run takes, and not what it comes to.
NO_EFFECT = {"checkpoint_every", "log_to", "log_dir", "offload"}


def train(
    organ: str | Path | Organ,
    *,
    host: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    name: str | None = None,
    version: str | None = None,
    redact: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Organ:
    """Train an organ on domain text; nothing outside the organ's layers changes, and no text enters its file.

    Args:
        organ: An organ, or the path of its file.
        host: The frozen model around it: a local transformers directory, a `.gguf` file or a Hub id.
        data: Files, folders or a Hub dataset id with the domain's text; see `neurograft.data.read_documents`.
        output: File to write, ending in `.safetensors`; left out, the organ is only returned.
        eval_data: Held-out text; left out, a share of the documents of `data` is kept for it.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        name: Name of the trained organ; left out, the organ's own with the protocol.
        version: Its semantic version; left out, the organ's.
        redact: Whether personal data in the text, also the held-out, is masked before; see `docs/privacy.md`.
        overwrite: Whether an existing file may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called after each optimizer step.
        **options: Fields of `TrainingOptions`, such as `protocol`, `max_tokens`, `lr`, `seed`. With `dp_epsilon` no
            text is held out: `eval_data` is taken not to be private, and without it nothing is measured.

    Returns:
        The trained organ, with the best weights seen on the held-out text; with the last ones if there was none.

    Raises:
        UsageError: An option is wrong, Presidio is not installed, the organ is quantised, the output exists, is the
            organ that is read or lies in the host's directory, or another run left its state beside it.
        DataError: There is no text, or it can't be read.
        IncompatibleError: The organ does not fit the host.
        NeurograftError: The loss is not finite any more; or, with `dp_epsilon`, opacus is not installed, or something
            would be left out of training.
        KeyboardInterrupt: The run was interrupted. It saved its state as `<output>.resume`, from which the same call
            goes on, on CPUs to the same bits as if it had never stopped.
    """
    chosen = parse_options(**options)
    check_precision(chosen.host_precision)
    check_name(name)
    if version is not None:
        check_version(version)
    processes = Processes()
    organ = organ if isinstance(organ, Organ) else organ_path(organ)
    if output is not None:
        used = organ.path if isinstance(organ, Organ) else organ
        inputs = [Path(host), *([used] if used is not None else [])]
        processes.on_first(lambda: check_organ_output(Path(output), overwrite=overwrite, inputs=inputs))
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    if redact:
        check_installed()
    if chosen.dp_epsilon is not None:
        check_private()
    texts, redaction = read_texts(data, eval_data, chosen, reading), None
    if redact:
        texts, redaction = _mask(texts)
        if chosen.dp_epsilon is not None:
            redaction = redaction.model_copy(update={"counts": None, "documents": None})
    resume = None if output is None else state_path(Path(output))
    with whole_weights():
        trained = _train(organ, host, texts, chosen, trust_remote_code, progress, resume)
    training = trained.manifest.training
    names = {
        "training": training and training.model_copy(update={"redaction": redaction}),
        "name": clean_name(name or f"{trained.name.removesuffix(f'-{chosen.protocol}')}-{chosen.protocol}"),
        "version": version or trained.manifest.version,
        "created": now(),
    }
    trained = Organ(trained.manifest.model_copy(update=names), trained.tensors)
    if output is None or resume is None:
        return trained
    return _write(processes, trained, Path(output), resume, overwrite=overwrite)


def _mask(texts: Texts) -> tuple[Texts, Redaction]:
    """Mask personal data in the training and the held-out text."""
    masked, redaction = redact_documents([*texts.training, *texts.held_out])
    count = len(texts.training)
    return Texts(masked[:count], masked[count:]), redaction


def _write(processes: Processes, organ: Organ, output: Path, resume: Path, *, overwrite: bool) -> Organ:
    """Let the first process write the organ; return it as written in all of them."""

    def write() -> tuple[str, dict[str, torch.Tensor]]:
        saved = organ.save(output, overwrite=overwrite)
        forget_state(resume)
        return saved.manifest.model_dump_json(), {}

    text, _ = processes.from_first(write)
    return Organ(Manifest.model_validate_json(text), organ.tensors, output)


def read_texts(paths: Any, eval_paths: Any, options: TrainingOptions, reading: dict[str, Any]) -> Texts:
    """Read the text to train on and the held-out text, which is a share of the former where none is given.

    Args:
        paths: See `neurograft.data.read_documents`.
        eval_paths: The same, or `None`.
        options: Say how large the share is; none is held out for a private training.
        reading: Further arguments of `read_documents`.

    Raises:
        DataError: There is no text, or it can't be read.
        UsageError: A share is asked for that nothing would be held out for.
    """
    if eval_paths is not None and "held_out" in options.model_fields_set:
        raise UsageError("with evaluation data nothing is held out of the training text; leave --held-out out.")
    log.info("reading the text")
    documents = data.read_documents(paths, **reading)
    if eval_paths is not None:
        held_out = data.read_documents(eval_paths, **reading)
        if shared := len(set(held_out) & set(documents)):
            log.warning("%d documents of the evaluation text are in the training text too", shared)
        return Texts(documents, held_out)
    if options.dp_epsilon is not None:
        return Texts(documents, [])
    return Texts(*data.split_documents(documents, held_out=options.held_out, seed=options.seed))


def _train(
    source: str | Path | Organ,
    host: str | Path,
    texts: Texts,
    options: TrainingOptions,
    trust_remote_code: bool,
    progress: ProgressCallback | None,
    resume: Path | None,
) -> Organ:
    organ = source if isinstance(source, Organ) else read_organ(source)
    if organ.manifest.is_packed:
        raise UsageError(
            f"the organ {organ.name} is quantised, and quantised layers can't be trained; extract it from a model with "
            "plain weights."
        )
    with one_by_one():
        directory = resolve(host, trust_remote_code=trust_remote_code)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    options = fit_to_model(options, config, directory.name)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if organ.manifest.tokenizer is not None:
        refuse_findings(
            organ.name,
            directory.name,
            tokenizer_findings(organ.manifest.tokenizer, fingerprint_tokenizer(tokenizer)),
        )
    key = _run_key(organ, directory, texts, options)
    batches = _batches(texts, tokenizer, options, resume, key)
    log.info("loading the host %s", directory.name)
    absent = _absent(organ, config, options) if options.offload else None
    model, below = load_host(directory, absent, options.host_precision, trust_remote_code=trust_remote_code)
    if options.protocol == "in_place" and _was_inserted(organ):
        log.warning(
            "%s was trained to stand between layers, and in_place lets it replace some; see --protocol insert",
            organ.name,
        )
    with skipping(below):
        attachment = _place(model, organ, options)
    organ = organ.without_values()  # they are in the model now, and need not be in memory twice
    if options.host_precision == "nf4":
        pack(model, attachment, below)
    first, changes = attachment.positions[0], None
    trainee = Trainee.of_layers(attachment.layers, first)
    if options.rank is not None:
        changes = LowRankChanges(attachment.layers, options.rank, options.seed)
        trainee = Trainee(changes.parameters, attachment.layers, first)
    kind = PrivateRun if isinstance(batches, PrivateBatches) else TrainingRun
    run = kind(model, trainee, batches, options, progress=progress, resume=resume, key=key, below=below)
    run.train()
    if changes is not None:
        changes.merge()
    trained = _trained_organ(organ, directory.name, model, attachment, texts, run)
    sketch = make_sketch(model, tokenizer, attachment.positions, directory.name)
    return Organ(trained.manifest.model_copy(update={"sketch": sketch}), trained.tensors)


def _batches(texts: Texts, tokenizer: Any, options: TrainingOptions, resume: Path | None, key: str) -> Batches:
    if options.dp_epsilon is None:
        return Batches.build(texts, tokenizer, options)
    return dataclasses.replace(PrivateBatches.build(texts, tokenizer, options), secret=find_secret(resume, key))


def _absent(organ: Organ, config: PreTrainedConfig, options: TrainingOptions) -> range:
    """Return the numbers of the host's layers that need not be in memory: those below the organ, and those it replaces.

    Raises:
        UsageError: The position is out of range, or several processes train together.
    """
    if ranks.several():
        raise UsageError("--offload is for one process; several can spread the host between them (FSDP2).")
    count = int(getattr(config, count_name(config)))
    if options.protocol == "standalone":
        return range(count)
    mode = _mode_of(options.protocol)
    position = _position(organ, options)
    check_position(count, organ.layer_count, at=position, mode=mode)
    return range(position + (organ.layer_count if mode == "replace" else 0))


def _position(organ: Organ, options: TrainingOptions) -> int:
    return organ.manifest.recommended_position if options.at is None else options.at


def tune_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    layers: Sequence[nn.Module],
    progress: ProgressCallback | None = None,
    **options: Any,
) -> None:
    """Train some layers of a loaded model in place, by the same loop as an organ.

    Args:
        model: A causal language model; everything in it but `layers` is frozen afterwards.
        tokenizer: Its tokenizer.
        documents: Text; a share of it is held out, and the best weights on that are kept.
        layers: The modules to train.
        progress: Called after each optimizer step.
        **options: Fields of `TrainingOptions`; `protocol`, `at`, `host_precision` and `offload` have no meaning here.

    Raises:
        UsageError: An option is wrong.
        DataError: There are fewer than two documents.
    """
    chosen = fit_to_model(parse_options(**options), model.config, f"the {model.config.model_type} model")
    texts = Texts(*data.split_documents(documents, held_out=chosen.held_out, seed=chosen.seed))
    batches = Batches.build(texts, tokenizer, chosen)
    TrainingRun(model, Trainee.of_layers(layers, 0), batches, chosen, progress=progress).train()


def _run_key(organ: Organ, host: ModelDirectory, texts: Texts, options: TrainingOptions) -> str:
    """Return a digest of everything that decides what a run comes to."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in host.path.iterdir() if f.is_file())
    parts = {
        "organ": combine_digests({name: tensor_digest(tensor) for name, tensor in organ.tensors.items()}),
        "host": [str(host.path.resolve()), host.revision, files],
        "texts": [data.fingerprint(texts.training), data.fingerprint(texts.held_out)],
        "options": options.model_dump(exclude=NO_EFFECT),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _place(model: PreTrainedModel, organ: Organ, options: TrainingOptions) -> Attachment:
    """Put the organ where it is to be trained."""
    position, dtype = _position(organ, options), torch.float32
    if options.protocol == "insert" and _was_inserted(organ):
        log.warning("%s was trained as an insert, and goes on from there", organ.name)
        attachment = attach(model, organ, at=position, mode="insert", dtype=dtype)
    elif options.protocol == "insert":
        log.info("finding the tensors that make the organ an identity")
        attachment = attach(model, as_identity(organ), at=position, mode="insert", dtype=dtype)
    elif options.protocol == "standalone":
        attachment = attach_alone(model, organ, dtype=dtype)
    else:
        attachment = attach(model, organ, at=position, mode="replace", dtype=dtype)
    give_up_originals(model, attachment)
    return attachment


def _was_inserted(organ: Organ) -> bool:
    return organ.manifest.training is not None and organ.manifest.training.protocol == "insert"


def _trained_organ(
    organ: Organ, host: str, model: PreTrainedModel, attachment: Attachment, texts: Texts, run: TrainingRun
) -> Organ:
    """Take the trained tensors out of the model, in the dtypes that they came in, and say what was done."""
    dtypes = {name: tensor.dtype for name, tensor in organ.tensors.items()}
    tensors = {
        name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors_of(attachment, model).items()
    }
    _load_rounded(model, attachment, organ, tensors)
    options, mode = run.options, _mode_of(run.options.protocol)
    first = attachment.positions[0]
    with skipping(run.below):
        answers = probe.probe_layers(model, describe(model).layers_path)[attachment.positions]
    training = Training(
        protocol=options.protocol,
        position=first,
        host=host,
        steps=run.state.step,
        hyperparameters=hyperparameters_of(run),
        seed=options.seed,
        seconds=round(run.state.seconds, 1),
        **_learnt_from(texts, run),
    )
    anatomy = LayerAnatomy(
        model_type=model.config.model_type,
        config=config_to_json(model.config),
        first_layer=first,
        layer_values=organ.manifest.anatomy.layer_values,
        dtype=dtype_name(tensors),
    )
    update: dict[str, Any] = {
        "anatomy": anatomy,
        "training": training,
        "training_history": organ.manifest.trainings,
        "evaluations": [_evaluation(texts, run)] if texts.held_out else [],
        "scans": [],  # they and the audits were of other weights
        "audits": [],
        "recommended_mode": mode,
        "recommended_position": first if options.protocol != "standalone" else organ.manifest.recommended_position,
        "probe": probe.to_manifest(answers, str(model.dtype).removeprefix("torch.")),
    }
    return Organ(organ.manifest.model_copy(update=update), tensors)


def _learnt_from(texts: Texts, run: TrainingRun) -> dict[str, Any]:
    """Return what a manifest says of the text that was trained on; after a private run, only what the budget covers."""
    if isinstance(run.batches, PrivateBatches):
        spent = run.batches.spent(run.state.step, run.options.clip)
        return {
            "data_fingerprint": None,
            "documents": spent.units,
            "tokens_seen": run.state.step * run.batches.step_size * run.options.sequence_length,
            "versions": versions("opacus"),
            "loss_history": [],
            "privacy": spent,
        }
    return {
        "data_fingerprint": data.fingerprint(texts.training),
        "documents": len(texts.training),
        "tokens_seen": run.state.tokens_seen,
        "versions": versions(),
        "loss_history": [(step, round(loss, 5)) for step, loss in run.state.losses],
    }


def _evaluation(texts: Texts, run: TrainingRun) -> Evaluation:
    return Evaluation(
        data="held-out text",
        documents=len(texts.held_out),
        tokens=run.batches.held_out.tokens,
        before=math.exp(min(run.state.held_out[0][1], 700)),
        after=math.exp(min(run.held_out_loss(), 700)),
    )


def hyperparameters_of(run: TrainingRun) -> dict[str, Any]:
    """Return how a run trained, for its organ's manifest; what was left to be chosen is there as it was chosen."""
    chosen = {
        "lr": run.lr,
        "kernels": run.arithmetic.kernels,
        "attention": run.arithmetic.attention,
        "compiled": bool(run.state.compiled),
    }
    left_out = {"protocol", "seed", *NO_EFFECT}
    if isinstance(run.batches, PrivateBatches):
        left_out |= {"held_out", "patience"}  # nothing is held out of private text
    return {**run.options.model_dump(exclude=left_out), **chosen}


def _mode_of(protocol: Protocol) -> Mode:
    return "replace" if protocol == "in_place" else "insert"


def _load_rounded(
    model: PreTrainedModel, attachment: Attachment, organ: Organ, tensors: dict[str, torch.Tensor]
) -> None:
    """Give the layers in the model the weights that the file will hold, so that what is measured is what ships."""
    carrier = load_layers(
        organ.config(), organ.manifest.anatomy.layer_values, tensors, dtype=torch.float32, name=organ.name
    )
    sources = carrier.get_submodule(describe(carrier).layers_path).children()
    with torch.no_grad():
        for layer, source in zip(attachment.layers, sources, strict=True):
            target = layer.state_dict()
            for name, tensor in source.state_dict().items():
                fill(target[name], tensor)


def versions(*further: str) -> dict[str, str]:
    """Return the versions of the software that computed a result, with further packages."""
    names = ("torch", "transformers", "safetensors", *further)
    return {"neurograft": __version__, **{name: importlib.metadata.version(name) for name in names}}
