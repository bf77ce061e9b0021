"""Questions that only transformers can answer, asked in a process of their own: moving bytes never loads torch.

What a configuration means, whether layers may stand elsewhere and what the new configuration must say is found by
building models without weights. That takes torch and transformers: seconds and memory of its own, whatever the size of
the model. The same question always has the same answer, so it is asked in a short-lived process and the answer is kept
in the cache. A process that has loaded torch anyway answers its own questions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from neurograft import __version__, errors, lean_imports
from neurograft.errors import NeurograftError
from neurograft.files import atomic_file, file_sha256
from neurograft.findings import Finding
from neurograft.layer_values import Row
from neurograft.manifest import SCHEMA_VERSION, UNSEALED, Manifest, Mode, TokenizerFingerprint
from neurograft.models import TOKENIZER_FILES, ModelDirectory, cache_directory, load_config, read_raw_config
from neurograft.steps import Step

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Layout = dict[str, tuple[int, ...]]
"""Name inside a layer -> shape, as transformers writes it to disk."""

log = logging.getLogger("neurograft")

_FOLDER = "studies"
_Kind = Literal["skeleton", "tokenizer", "whole"]
"""What a process can answer, besides what it imports: models without weights, tokenizers, or everything."""
_Answer = TypeVar("_Answer", bound=BaseModel)


class _Study(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class ModelStudy(_Study):
    """What transformers makes of a model directory's configuration."""

    model_type: str
    layers_path: str
    layer_count: int
    rows: list[Row]
    config: dict[str, Any]
    """The configuration with every per-layer list explicit, as transformers writes it."""
    layouts: list[Layout] | None
    """The different kinds of layers; `None` for packed (quantised) weights, whose tensors only their files know."""
    layout_of: list[int]
    """For each layer, its place in `layouts`."""

    def layout(self, layer: int) -> Layout | None:
        """Return the tensors that a layer has on disk; `None` if only the files know."""
        return None if self.layouts is None else self.layouts[self.layout_of[layer]]


class GraftStudy(_Study):
    """Whether an organ's layers may stand at a place, and the configuration that lets them."""

    findings: list[Finding]
    expected: list[Layout] | None
    """For each of the organ's layers, the tensors that its own configuration calls for."""
    expected_dtypes: dict[str, str]
    """`layers.{i}.{name}` -> torch's name of the dtype that they have where nothing else is said."""
    config: str | None
    """`config.json` of the result; `None` if something blocks."""


class TokenizerStudy(_Study):
    """What tells a tokenizer from others."""

    fingerprint: TokenizerFingerprint


class OrderStudy(_Study):
    """The configuration of a model whose layers are put in another order."""

    config: str


def study_model(directory: ModelDirectory, *, trust_remote_code: bool = False) -> ModelStudy:
    """Find where a model's layers are, what its configuration says of each, and what its tokenizer does.

    Raises:
        ModelError: It is no model that can be cut into layers.
    """
    return _ask(ModelStudy, "model", directory, trust_remote_code, {})


def study_tokenizer(directory: ModelDirectory, *, trust_remote_code: bool = False) -> TokenizerFingerprint | None:
    """Fingerprint a model's tokenizer; `None` if it has none.

    Raises:
        ModelError: There are tokenizer files, and transformers can't load them.
    """
    if not any((directory.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    return _ask(TokenizerStudy, "tokenizer", directory, trust_remote_code, {}).fingerprint


def study_all(
    directory: ModelDirectory, *, trust_remote_code: bool = False
) -> tuple[ModelStudy, TokenizerFingerprint | None]:
    """Ask for a model's study and its tokenizer's fingerprint, both at the same time.

    Raises:
        ModelError: See `study_model` and `study_tokenizer`.
    """
    if _answers_here():
        study = study_model(directory, trust_remote_code=trust_remote_code)
        return study, study_tokenizer(directory, trust_remote_code=trust_remote_code)
    with ThreadPoolExecutor(1) as other:
        tokenizer = other.submit(study_tokenizer, directory, trust_remote_code=trust_remote_code)
        return study_model(directory, trust_remote_code=trust_remote_code), tokenizer.result()


def study_graft(
    directory: ModelDirectory, manifest: Manifest, *, at: int, mode: Mode, trust_remote_code: bool = False
) -> GraftStudy:
    """Find whether an organ's layers would compute the same at a place in a model, by building it without weights.

    Raises:
        ModelError: The model can't be cut into layers.
        OrganFileError: transformers can't use the organ's configuration.
    """
    question = {"manifest": _essence(manifest), "at": at, "mode": mode}
    return _ask(GraftStudy, "graft", directory, trust_remote_code, question)


def study_order(
    directory: ModelDirectory,
    steps: Sequence[Step],
    explanted: Sequence[tuple[Manifest, int]],
    *,
    trust_remote_code: bool = False,
) -> OrderStudy:
    """Find the configuration of a model from which an organ was taken out, with other organs still in it.

    Args:
        directory: The model with the organ.
        steps: Where each layer of the model without it comes from; those of an "organ" are numbered as in `explanted`.
        explanted: For each layer that comes back, the manifest of its explant and its number there.
        trust_remote_code: See `neurograft.models.resolve`.

    Raises:
        IncompatibleError: Some layer would compute something else.
    """
    manifests: list[dict[str, Any]] = []
    places: list[list[int]] = []
    for manifest, layer in explanted:
        if (essence := _essence(manifest)) not in manifests:
            manifests.append(essence)
        places.append([manifests.index(essence), layer])
    question = {
        "steps": [[step.source, step.layer] for step in steps],
        "manifests": manifests,
        "places": places,
    }
    return _ask(OrderStudy, "order", directory, trust_remote_code, question)


def _essence(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest with what no answer depends on left out, so that organs of one kind get one answer."""
    source: dict[str, Any] = {"model": "", "layer_digests": [UNSEALED], "revision": None}
    update: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": "organ",
        "version": "0.1.0",
        "license": None,
        "description": None,
        "created": "",
        "source": manifest.source.model_copy(update=source),
        "training": None,
        "training_history": [],
        "evaluations": [],
        "scans": [],
        "audits": [],
        "merged": None,
        "probe": None,
        "sketch": None,
        "tokenizer": None,
        "tensors_digest": UNSEALED,
        "file_digest": UNSEALED,
    }
    essence: dict[str, Any] = manifest.model_copy(update=update).model_dump(mode="json")
    return essence


def _answer_model(directory: ModelDirectory, trust_remote_code: bool) -> ModelStudy:
    from neurograft.anatomy import build_skeleton, describe
    from neurograft.organ import config_to_json

    raw = read_raw_config(directory.path)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, raw)
    anatomy = describe(skeleton)
    packed = bool(raw.get("quantization_config"))
    layouts, layout_of = ([], []) if packed else _layouts(skeleton, range(anatomy.layer_count))
    return ModelStudy(
        model_type=config.model_type,
        layers_path=anatomy.layers_path,
        layer_count=anatomy.layer_count,
        rows=list(anatomy.rows),
        config=config_to_json(config),
        layouts=None if packed else layouts,
        layout_of=layout_of,
    )


def _answer_tokenizer(directory: ModelDirectory, trust_remote_code: bool) -> TokenizerStudy:
    from neurograft.models import fingerprint_tokenizer, load_tokenizer

    return TokenizerStudy(
        fingerprint=fingerprint_tokenizer(load_tokenizer(directory, trust_remote_code=trust_remote_code))
    )


def _layouts(skeleton: PreTrainedModel, layers: range) -> tuple[list[Layout], list[int]]:
    """Return the different layouts of layers, and which of them each layer has."""
    from neurograft.layer_weights import to_disk

    found: list[Layout] = [{} for _ in layers]
    for name, tensor in to_disk(skeleton, layers).items():
        _, number, inner = name.split(".", 2)
        found[int(number)][inner] = tuple(tensor.shape)
    different: list[Layout] = []
    for layout in found:
        if layout not in different:
            different.append(layout)
    return different, [different.index(layout) for layout in found]


def _answer_graft(
    directory: ModelDirectory, trust_remote_code: bool, manifest: dict[str, Any], at: int, mode: Mode
) -> GraftStudy:
    from neurograft.anatomy import build_skeleton
    from neurograft.compat import config_findings, place_findings
    from neurograft.organ import Organ
    from neurograft.planning import plan_graft

    organ = Organ(Manifest.model_validate(manifest), {})
    raw = read_raw_config(directory.path)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, raw)
    values, places = config_findings(organ.manifest, config), place_findings(organ, skeleton, at=at, mode=mode)
    if any(finding.severity == "blocks" for finding in values):
        # Layers that would compute something else are what such values come to; the values are the cause.
        places = [finding for finding in places if finding.subject != "layers"]
    findings = [*values, *places]
    text = None
    if not any(finding.severity == "blocks" for finding in findings):
        plan = plan_graft(skeleton, organ, at=at, mode=mode)
        text = _config_text(raw, config, plan.skeleton)
    expected, dtypes = _expected_tensors(organ)
    return GraftStudy(findings=findings, expected=expected, expected_dtypes=dtypes, config=text)


def _expected_tensors(organ: Any) -> tuple[list[Layout] | None, dict[str, str]]:
    """Return the tensors of each of an organ's layers, if its configuration tells, and all their dtypes."""
    from neurograft.anatomy import build_skeleton
    from neurograft.layer_weights import to_disk

    config = organ.config()
    if organ.manifest.is_packed:
        return None, {}
    first = organ.manifest.anatomy.first_layer
    skeleton, layers = build_skeleton(config), range(first, first + organ.layer_count)
    different, layout_of = _layouts(skeleton, layers)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in to_disk(skeleton, layers).items()}
    return [different[place] for place in layout_of], dtypes


def _answer_order(
    directory: ModelDirectory,
    trust_remote_code: bool,
    steps: list[list[Any]],
    manifests: list[dict[str, Any]],
    places: list[list[int]],
) -> OrderStudy:
    from neurograft.anatomy import build_skeleton, describe, layer_origins
    from neurograft.organ import Organ
    from neurograft.planning import make_plan, organ_origins

    raw = read_raw_config(directory.path)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, raw)
    organs = [Organ(Manifest.model_validate(manifest), {}) for manifest in manifests]
    known = [organ_origins(organ) for organ in organs]
    rows = {
        "recipient": list(describe(skeleton).rows),
        "organ": [organs[number].manifest.anatomy.layer_values[layer] for number, layer in places],
    }
    origins = {
        "recipient": layer_origins(skeleton, "the model"),
        "organ": [known[number][layer] for number, layer in places],
    }
    order = tuple(Step(source, layer) for source, layer in steps)
    return OrderStudy(config=_config_text(raw, config, make_plan(skeleton, order, rows, origins).skeleton))


def _config_text(raw: dict[str, Any], config: PreTrainedConfig, planned: PreTrainedModel) -> str:
    """Return the `config.json` of a planned model, after reading it back as anyone will.

    Raises:
        VerificationError: It would be read back with other layers than planned.
    """
    from neurograft.anatomy import build_skeleton, describe
    from neurograft.layer_values import changed_values

    rows = list(describe(planned).rows)
    values = {**raw, **json.loads(json.dumps(changed_values(config, rows)))}
    if "num_hidden_layers" in values:
        values["num_hidden_layers"] = len(rows)
    text = json.dumps(values, indent=2) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        written = load_config(ModelDirectory(Path(folder), "the result"))
        if list(describe(build_skeleton(written)).rows) != rows:
            raise errors.VerificationError(
                "the configuration written for the result would be read back with other layers than planned."
            )
    return text


_ANSWERS: dict[str, Any] = {
    "model": _answer_model,
    "tokenizer": _answer_tokenizer,
    "graft": _answer_graft,
    "order": _answer_order,
}


def _answers_here() -> bool:
    """Whether this process has loaded what it takes to answer."""
    return {"torch", "transformers"} <= sys.modules.keys()


def _ask(
    answer: type[_Answer], topic: str, directory: ModelDirectory, trust_remote_code: bool, question: dict[str, Any]
) -> _Answer:
    if _answers_here():
        found: _Answer = _ANSWERS[topic](directory, trust_remote_code, **question)
        return found
    kept = _kept_answer(topic, directory, trust_remote_code, question)
    if kept is not None and _is_file(kept):
        try:
            return answer.model_validate_json(kept.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            kept.unlink(missing_ok=True)
    text = _ask_helpers(
        {
            "topic": topic,
            "path": str(directory.path),
            "name": directory.name,
            "trust_remote_code": trust_remote_code,
            "question": question,
        }
    )
    if kept is not None:
        _keep(kept, text)
    return answer.model_validate_json(text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the cache is somewhere where nobody may look
        return False


def _keep(path: Path, text: str) -> None:
    """Keep an answer for later; where that can't be done, it is asked for anew next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (OSError, NeurograftError) as error:
        log.info("what was learned of the model can't be kept: %s", error)


def _kept_answer(
    topic: str, directory: ModelDirectory, trust_remote_code: bool, question: dict[str, Any]
) -> Path | None:
    """Return where the answer to a question is kept; `None` if it may depend on code beside the model."""
    if trust_remote_code and read_raw_config(directory.path).get("auto_map"):
        return None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    files = {
        name: file_sha256(directory.path / name)
        for name in ("config.json", *TOKENIZER_FILES)
        if (directory.path / name).is_file()
    }
    key = json.dumps([__version__, versions, topic, files, question], sort_keys=True)
    return cache_directory() / _FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


class _Helper:
    """A process that has transformers loaded, and what it needs of torch; asked by lines of JSON."""

    def __init__(self, kind: _Kind) -> None:
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # One thread and one arena: building without weights needs neither the time nor the memory of more.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "neurograft.studies", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment,
            encoding="utf-8",
        )

    def ask(self, question: dict[str, Any]) -> str:
        """Return the answer as JSON.

        Raises:
            NeurograftError: What answering raised, or that the process died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._complaints.seek(0)
            last = self._complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise NeurograftError(f"the process that builds models without weights ended: {''.join(last) or 'killed'}.")
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._complaints.close()


_helpers: list[dict[_Kind, _Helper]] = []


@contextmanager
def studying() -> Iterator[None]:
    """Keep the processes that answer questions, once one is needed, until the block ends."""
    _helpers.append({})
    try:
        yield
    finally:
        for helper in _helpers.pop().values():
            helper.close()


def _ask_helpers(question: dict[str, Any]) -> str:
    """Ask the process that takes least, and one that has everything loaded if that can't answer."""
    lean: _Kind = "tokenizer" if question["topic"] == "tokenizer" else "skeleton"
    if not question["trust_remote_code"]:
        try:
            return _helper(lean).ask(question)
        except NeurograftError:
            _helpers[-1].pop(lean).close()
    return _helper("whole").ask(question)


def _helper(kind: _Kind) -> _Helper:
    if not _helpers:
        raise RuntimeError("a question is asked outside a `studying` block")
    if kind not in _helpers[-1]:
        _helpers[-1][kind] = _Helper(kind)
    return _helpers[-1][kind]


def _import_all() -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401


_IMPORTS = {"skeleton": lean_imports.for_skeletons, "tokenizer": lean_imports.without_torch, "whole": _import_all}


def main() -> None:
    """Answer questions, one a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not look like an answer
    _IMPORTS[sys.argv[1]]()
    for line in sys.stdin:
        question = json.loads(line)
        directory = ModelDirectory(Path(question["path"]), question["name"])
        try:
            found = _ANSWERS[question["topic"]](directory, question["trust_remote_code"], **question["question"])
            answer = {"text": found.model_dump_json()}
        except NeurograftError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
