"""Let a transplanted model recover: train an organ, or what is around it, so that the transplant stays removable."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurograft import data as text_data
from neurograft import evaluation, probe
from neurograft.anatomy import describe
from neurograft.errors import ModelError, UsageError
from neurograft.evaluation import DataSetResult
from neurograft.files import atomic_directory, check_output_directory
from neurograft.manifest import ChangedLayer, Evaluation, Recovery, Scope, SurgicalRecord, Training, Unfreeze
from neurograft.models import ModelDirectory, load_config, load_model_and_unused, load_tokenizer, resolve
from neurograft.organ import check_organ_output, now
from neurograft.recovery_files import recovered_organ, take_over_written, write_record, write_recovered
from neurograft.training.loop import ProgressCallback, Texts
from neurograft.training.options import TrainingOptions, fit_to_model, parse_options
from neurograft.training.processes import Processes, one_by_one, starting_device, whole_weights
from neurograft.training.protocols import NO_EFFECT, hyperparameters_of, read_texts, versions
from neurograft.training.recovery import (
    Recovered,
    RecoveryPlan,
    give_values,
    plan_recovery,
    stage_path,
    train_stages,
    trained_values,
)
from neurograft.training.run_state import forget_state
from neurograft.training.search import NO_MEANING_FOR_RECOVERY
from neurograft.transplanted import Transplanted
from neurograft.undoing import refuse_entangled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("neurograft")

Paths = str | Path | Sequence[str | Path]


def recover(
    directory: str | Path,
    *,
    data: Paths,
    output: str | Path,
    organ: str | None = None,
    scope: Scope = "organ",
    neighbours: int | None = None,
    unfreeze: Unfreeze = "at_once",
    eval_data: Paths | None = None,
    general: Paths | None = None,
    save_organ: str | Path | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> SurgicalRecord:
    """Train an organ inside its recipient, or what is around it, for a short while after the transplant.

    The directory is never changed; the result is a new plain transformers directory. Its surgical record says what was
    trained and how, and layers that are not the organ's own are kept as they were, so that `remove` still gives the
    original recipient back to the bit.

    Args:
        directory: A directory that `transplant` or `recover` wrote.
        data: Files, folders or a Hub dataset id with text to train on; see `neurograft.data.read_documents`.
        output: Directory to write.
        organ: Around which organ, by name; may be left out where there is only one.
        scope: `organ`: its layers train. `neighbours`: they and some layers on each side. `seams`: only the vectors
            (weights of norms, biases) with which the organ's first layer and the first layer behind it read what comes
            to them; `neurograft.training.recovery.plan_recovery` says why it is these.
        neighbours: How many layers on each side, for that scope; 1 if left out.
        unfreeze: `at_once`, or `gradual`: first the organ alone, then one more layer on each side a stage, each stage
            with an equal share of the budget.
        eval_data: Held-out text; left out, a share of the documents of `data` is kept for it.
        general: Other text, of which perplexity is measured before and after.
        save_organ: File to which the recovered organ is written as well, so that it can travel.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files, instead of blank lines.
        encoding: Encoding of text files.
        overwrite: Whether existing outputs may be replaced.
        trust_remote_code: See `neurograft.models.resolve`.
        progress: Called after each optimizer step.
        **options: Fields of `TrainingOptions` but `protocol`, `at` and `rank`, such as `max_tokens`, `lr`, `seed`.

    Returns:
        The surgical record of what was written; its last recovery is this one.

    Raises:
        UsageError: An option is wrong, an output exists, there is no such organ, or the organ could not be removed
            exactly afterwards.
        ModelError: The directory holds no transplanted model, or one that was changed by other means since.
        DataError: There is no text, or it can't be read.
        VerificationError: What was written is not what was trained; it was not kept.
        NeurograftError: The loss is not finite any more.
        KeyboardInterrupt: The run was interrupted. It saved its state as `<output>.resume`, from which the same call
            goes on, on CPUs to the same bits as if it had never stopped.
    """
    chosen = _parse(options)
    output, processes = Path(output), Processes()
    with one_by_one():
        source = resolve(directory, trust_remote_code=trust_remote_code)
    processes.on_first(lambda: _check_outputs(output, save_organ, source.path, overwrite=overwrite))
    case = Transplanted.open(source, organ, trust_remote_code)
    chosen = fit_to_model(chosen, load_config(source, trust_remote_code=trust_remote_code), source.name)
    plan = _plan(case, scope, neighbours, unfreeze, alone=save_organ is not None)
    reading = {"text_column": text_column, "document_separator": document_separator, "encoding": encoding}
    texts = read_texts(data, eval_data, chosen, reading)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    log.info("loading %s", source.name)
    model, unused = _load(source, {}, trust_remote_code)
    answers = probe.probe_layers(model, describe(model).layers_path)

    def measure(model: PreTrainedModel) -> DataSetResult | None:
        return None if general is None else _measure(model, tokenizer, general, chosen, reading)

    before = processes.only_first(lambda: measure(model))
    trained = train_stages(
        model,
        plan,
        texts,
        tokenizer,
        chosen,
        output=output,
        key=_run_key(case, plan, texts, chosen),
        progress=progress,
        again=lambda values: _load(source, values, trust_remote_code)[0],
    )
    gathered = trained_values(trained.last.model, plan) if processes.sharded else {}
    with ExitStack() as stack:

        def write() -> tuple[Path, PreTrainedModel, list[ChangedLayer], dict[str, str]]:
            log.info("writing %s", output)
            whole = _load(source, gathered, trust_remote_code)[0] if processes.sharded else trained.last.model
            temporary = stack.enter_context(atomic_directory(output, overwrite=overwrite))
            changed, digests = write_recovered(case, whole, plan, answers, temporary)
            log.info("loading the result to verify it")
            written = ModelDirectory(temporary, output.name)
            take_over_written(whole, case, plan, written, unused, trust_remote_code)
            return temporary, whole, changed, digests

        files = processes.only_first(write)
        _take_over_everywhere(processes, trained.last.model, files and files[1], plan)
        held_out = trained.last.held_out_loss()

        def finish() -> tuple[str, dict[str, torch.Tensor]]:
            assert files is not None
            temporary, whole, changed, digests = files
            recovery = Recovery(
                organ=case.name,
                scope=plan.scope,
                neighbours=plan.neighbours,
                unfreeze=plan.unfreeze,
                stages=trained.stages,
                changed=changed,
                training=_training(case, texts, chosen, trained),
                evaluations=_evaluations(texts, trained, held_out, before, measure(whole)),
                when=now(),
            )
            record = write_record(case, recovery, digests, temporary)
            if save_organ is not None:
                after = probe.probe_layers(whole, describe(whole).layers_path)
                written = ModelDirectory(temporary, output.name)
                recovered_organ(case, record, written, after, trust_remote_code).save(save_organ, overwrite=overwrite)
            return record.model_dump_json(), {}

        text, _ = processes.from_first(finish)
    processes.on_first(lambda: _forget_states(output, len(plan.stages)))
    return SurgicalRecord.model_validate_json(text)


def _check_outputs(output: Path, organ: str | Path | None, source: Path, *, overwrite: bool) -> None:
    check_output_directory(output, overwrite=overwrite, inputs=[source])
    if organ is not None:
        _check_organ_file(Path(organ), output, source, overwrite=overwrite)


def _load(
    source: ModelDirectory, values: Mapping[str, torch.Tensor], trust_remote_code: bool
) -> tuple[PreTrainedModel, set[str]]:
    """Load the transplanted model and give parameters the values that they have by now; see `load_model_and_unused`."""
    with whole_weights():
        model, unused = load_model_and_unused(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    torch.nn.Module.to(model, starting_device())
    give_values(model, values)
    return model, unused


def _take_over_everywhere(
    processes: Processes, model: PreTrainedModel, whole: PreTrainedModel | None, plan: RecoveryPlan
) -> None:
    """Give the model of each process the weights as the first one's are by now, which has them from the files."""
    if processes.count == 1:
        return

    def values() -> tuple[str, dict[str, torch.Tensor]]:
        assert whole is not None
        return "", trained_values(whole, plan)

    give_values(model, processes.from_first(values)[1])


def _forget_states(output: Path, stages: int) -> None:
    for number in range(stages):
        forget_state(stage_path(output, number, stages))


def _parse(options: dict[str, Any]) -> TrainingOptions:
    for name in NO_MEANING_FOR_RECOVERY:
        if options.get(name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} has no meaning here: recovery trains around an organ where it stands."
            )
    return parse_options(**options)


def _check_organ_file(path: Path, output: Path, source: Path, *, overwrite: bool) -> None:
    if output.resolve() in path.resolve().parents:
        raise UsageError(f"{path} lies in {output}, which is written as a whole; choose another place for the organ.")
    check_organ_output(path, overwrite=overwrite, inputs=[source])


def _plan(case: Transplanted, scope: Scope, neighbours: int | None, unfreeze: Unfreeze, *, alone: bool) -> RecoveryPlan:
    """Plan what trains, and refuse what could not be undone.

    Args:
        case: The model.
        scope: See `recover`.
        neighbours: See `recover`.
        unfreeze: See `recover`.
        alone: Whether the organ has to be one contiguous range, to be saved as a file.

    Raises:
        UsageError: The choices do not go together, or some organ could not be removed afterwards.
        ModelError: The layers are quantised, or a layer's tensors have other names on disk than transformers gives them
            today.
    """
    layers, checkpoint = case.record.layers, case.checkpoint
    plan = plan_recovery(case.own, len(layers), organ=case.name, scope=scope, neighbours=neighbours, unfreeze=unfreeze)
    if alone and not case.contiguous:
        raise UsageError(f"other layers stand between those of {case.name}, so it can't be saved as one organ.")
    refuse_entangled(case.record, case.name, [layers[number] for number in plan.layers])
    for number in plan.layers:
        layout = checkpoint.study.layout(number)
        if layout is None:
            raise ModelError(
                f"the layers of {checkpoint.directory.name} are quantised ({checkpoint.packing}), and packed layers "
                "can't be trained; recover in a recipient with plain weights."
            )
        if set(layout) != set(checkpoint.layer_names(number)):
            raise ModelError(
                f"the tensors of layer {number} of {checkpoint.directory.name} have other names than transformers "
                "writes today, so a trained layer could not take their place; load the recipient with transformers and "
                "save it again before the transplant."
            )
    return plan


def _run_key(case: Transplanted, plan: RecoveryPlan, texts: Texts, options: TrainingOptions) -> str:
    """Return a digest of everything that decides what a recovery comes to."""
    parts = {
        "model": [case.record.tensors_digest, case.checkpoint.config_digest()],
        "plan": [plan.organ, plan.scope, plan.unfreeze, plan.stages],
        "texts": [text_data.fingerprint(texts.training), text_data.fingerprint(texts.held_out)],
        "options": options.model_dump(exclude={*NO_EFFECT, *NO_MEANING_FOR_RECOVERY}),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    general: Paths,
    options: TrainingOptions,
    reading: dict[str, Any],
) -> DataSetResult:
    """Measure perplexity on general text, in windows as long as the sequences that the model trains on."""
    report = evaluation.evaluate(
        (model, tokenizer),
        data={"general": [general] if isinstance(general, str | Path) else general},
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        max_tokens=options.eval_tokens,
        **reading,
    )
    return report.data["general"]


def _training(case: Transplanted, texts: Texts, options: TrainingOptions, trained: Recovered) -> Training:
    return Training(
        protocol="recovery",
        position=case.own[0],
        host=case.record.recipient,
        data_fingerprint=text_data.fingerprint(texts.training),
        documents=len(texts.training),
        tokens_seen=sum(stage.tokens_seen for stage in trained.stages),
        steps=sum(stage.steps for stage in trained.stages),
        hyperparameters={
            name: value
            for name, value in hyperparameters_of(trained.last).items()
            if name not in NO_MEANING_FOR_RECOVERY
        },
        seed=options.seed,
        versions=versions(),
        seconds=round(trained.seconds, 1),
        loss_history=[(step, round(loss, 5)) for step, loss in trained.losses],
    )


def _evaluations(
    texts: Texts, trained: Recovered, held_out_loss: float, before: DataSetResult | None, after: DataSetResult | None
) -> list[Evaluation]:
    """Return what was measured before and after, the latter with the weights as they were written."""
    held_out = Evaluation(
        data="held-out text",
        documents=len(texts.held_out),
        tokens=trained.last.batches.held_out.tokens,
        before=math.exp(min(trained.before, 700)),
        after=math.exp(min(held_out_loss, 700)),
    )
    if before is None or after is None:
        return [held_out]
    general = Evaluation(
        data="general text",
        documents=after.documents,
        tokens=after.tokens,
        before=before.perplexity,
        after=after.perplexity,
    )
    return [held_out, general]
