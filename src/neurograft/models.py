"""From what a user names (a Hub id, a directory, a `.gguf` file) to a transformers directory, a model, a tokenizer."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.errors import ModelError, NeurograftError, UsageError, first_line
from neurograft.files import atomic_directory, combine_digests, file_sha256, read_bounded, require_space
from neurograft.gguf_header import GGUFHeader, read_gguf_header
from neurograft.layer_weights import quiet_transformers
from neurograft.manifest import TokenizerFingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")
# Words, numbers, cases, scripts and white space: tokenizers that agree on it map ordinary text alike.
_SAMPLE_TEXT = (
    "The patient's HbA1c fell from 8.25 % to 6.9 % in 2019; \tcongenital ichthyosis, naïve coöperation.\n\n"
    "def f(x): return x**2  # ÀÉÎÕÜ Ελληνικά русский 中文 العربية हिन्दी 🧠\r\nHELLO hello Hello 1234567890"
)


@dataclass(frozen=True)
class ModelDirectory:
    """A plain transformers directory, and what the user called it."""

    path: Path
    name: str
    """Hub id, or the last part of a local path: fit to be written into files that travel."""
    revision: str | None = None
    """Commit on the Hub, where it came from there."""
    notes: tuple[str, ...] = ()
    """What was done to get a plain directory, such as dequantising a GGUF file."""
    dequantised_from: str | None = None
    """What the weights were stored as, where they were computed from packed ones."""


def cache_directory() -> Path:
    """Return the folder for what can be made again: `$NEUROGRAFT_CACHE`, or `neurograft` in the user's cache folder.

    Raises:
        UsageError: It, or what it would lie in, is a file.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neurograft"
    folder = Path(os.environ.get("NEUROGRAFT_CACHE") or default)
    for path in (folder, *folder.parents):
        if not path.exists():
            continue
        if path.is_dir():
            break
        raise UsageError(f"the cache can't lie in {folder}: {path} is a file; set NEUROGRAFT_CACHE to a folder.")
    return folder


def resolve(reference: str | Path, *, trust_remote_code: bool = False) -> ModelDirectory:
    """Find the model that `reference` names and return it as a plain transformers directory.

    Args:
        reference: A local transformers directory, a `.gguf` file, or a Hub id (`org/name`, `org/name@revision`).
        trust_remote_code: Whether a model whose code lies beside its weights may run that code.

    Raises:
        ModelError: Nothing is found there, or it is no model that neurograft reads.
    """
    text, path = str(reference), Path(reference)
    if not text:
        raise ModelError("the model's name is empty; give a transformers directory, a .gguf file or a Hub id.")
    if path.is_dir():
        directory = ModelDirectory(path.resolve(), path.resolve().name)
    elif path.suffix == ".gguf":
        directory = _from_gguf(path)
    elif path.is_file():
        raise ModelError(f"{path} is a file; a model is a transformers directory, a .gguf file or a Hub id.")
    elif is_hub_id(reference):
        directory = _from_hub(text)
    else:
        raise ModelError(f"there is no model at {text}; give a transformers directory, a .gguf file or a Hub id.")
    refuse_foreign(directory.path, trust_remote_code=trust_remote_code)
    return directory


def refuse_foreign(path: Path, *, trust_remote_code: bool) -> None:
    """Refuse a directory that holds no transformers model, or one that needs code of its own.

    Raises:
        ModelError: One sentence says why.
    """
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(f"{path} holds a PEFT adapter, no model; merge it into its base model first.")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is no transformers model directory.")
    raw = read_raw_config(path)
    if raw.get("auto_map") and not trust_remote_code and not _is_native(str(raw.get("model_type"))):
        raise ModelError(
            f"{path} needs its own Python code ({raw.get('model_type')}), which neurograft runs only with "
            f"--trust-remote-code."
        )


def is_hub_id(reference: str | Path) -> bool:
    """Whether `resolve` would look for a model on the Hub."""
    text, path = str(reference), Path(reference)
    local = path.exists() or path.suffix == ".gguf"
    return not local and bool(_HUB_ID.match(text)) and not text.startswith(".")


def _is_native(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def read_raw_config(path: Path) -> dict[str, Any]:
    """Return `config.json` of a model directory as it stands.

    Raises:
        ModelError: It is no JSON object.
    """
    try:
        raw = json.loads(read_bounded(path / "config.json").decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path / 'config.json'} can't be read as JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path / 'config.json'} holds no JSON object.")
    return raw


def _from_hub(text: str) -> ModelDirectory:
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except Exception as error:
        raise ModelError(f"{name} is no local directory, and the Hub did not give it: {first_line(error)}.") from error
    return ModelDirectory(path, name, path.name)


def _from_gguf(path: Path) -> ModelDirectory:
    """Dequantise a GGUF file once into a plain directory in the cache, under the digest of its bytes."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}.")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{path} is named .gguf but does not begin like a GGUF file.")
    header = read_gguf_header(path)
    digest = file_sha256(path)
    target = cache_directory() / "gguf" / digest[:32]
    notes = (f"dequantised from {path.name} to float32",)
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target.parent, 8 * path.stat().st_size)
        with atomic_directory(target, overwrite=True) as temporary:
            _dequantise(path, header, temporary)
    return ModelDirectory(target, path.stem, digest, notes, f"GGUF {header.kinds}")


def _dequantise(path: Path, header: GGUFHeader, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_gguf_config(path, header)
    with reading_gguf(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, output_loading_info=True
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        if names := sorted(map(str, report[kind])):
            raise ModelError(f"{path} {what} {len(names)} of its model's tensors, such as {names[0]}; get it anew.")
    # The weights are plain now; with these two left in place, saving would claim that they are quantised.
    vars(model.config).pop("quantization_config", None)
    vars(model)["hf_quantizer"] = None
    model.config._name_or_path = path.stem
    with reading_gguf(path):
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def read_gguf_config(path: Path, header: GGUFHeader) -> PreTrainedConfig:
    """Return the configuration that a GGUF file holds.

    Raises:
        ModelError: There is none, or the model that it describes is larger than the file's tensors.
    """
    from transformers import AutoConfig

    from neurograft.anatomy import build_skeleton

    with reading_gguf(path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    needed = sum(parameter.numel() for parameter in build_skeleton(config).parameters())
    if needed > 2 * header.elements:  # a head that is tied to the embedding is counted twice
        raise ModelError(
            f"{path} describes a model of {needed:,} parameters, and its tensors have {header.elements:,}; get it anew."
        )
    return config


@contextlib.contextmanager
def reading_gguf(path: Path) -> Iterator[None]:
    """Say in one sentence that transformers can't read a GGUF file, and be quiet otherwise.

    Raises:
        ModelError: It can't.
    """
    try:
        # transformers draws the bar of this conversion whatever its logging is set to
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except NeurograftError:
        raise
    except Exception as error:
        raise ModelError(f"transformers can't read {path}: {first_line(error)}.") from error


def load_config(directory: ModelDirectory, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's configuration through transformers, which expands patterns to explicit lists.

    Raises:
        ModelError: transformers does not know the model type, or refuses the configuration.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(directory.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"transformers can't load the configuration of {directory.name}: {first_line(error)}."
        ) from error


def find_not_finite(folder: Path) -> tuple[Path, str, int] | None:
    """Return the first tensor in a folder's safetensors files with values that are NaN or infinite.

    Returns:
        Its file, its name there, and how many such values it has; `None` if all are finite.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 (not a mapping)
                tensor = stream.get_tensor(key)
                if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
                    return path, key, int((~tensor.isfinite()).sum())
    return None


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model takes, by its configuration; `None` if that sets no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = (getattr(config, name, None) for name in names)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def fit_sequence_length(given: int | None, usual: int, config: PreTrainedConfig, name: str) -> int:
    """Return the sequence length to work with: what was asked for, or the usual one as far as the model takes it.

    Args:
        given: Tokens in a sequence; `None` if nothing was asked for.
        usual: What to take then, if the model takes as many positions.
        config: The model's configuration.
        name: The model's name, for the message.

    Raises:
        UsageError: More was asked for than the model has positions.
    """
    limit = position_limit(config)
    if limit is None:
        return usual if given is None else given
    if given is not None and given > limit:
        raise UsageError(
            f"the sequence length is {given}, and {name} takes at most {limit} positions; give --sequence-length "
            f"{limit} or less."
        )
    return min(usual, limit) if given is None else given


def load_model(
    reference: str | Path | ModelDirectory, *, dtype: Any = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        reference: See `resolve`; or what it returned.
        dtype: A torch dtype, or "auto" for the one that the model is stored in.
        trust_remote_code: See `resolve`.

    Raises:
        ModelError: It can't be found or read, is no decoder-only model, or its files lack tensors.
    """
    return load_model_and_unused(reference, dtype=dtype, trust_remote_code=trust_remote_code)[0]


def load_model_and_unused(
    reference: str | Path | ModelDirectory,
    *,
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Do what `load_model` does, and return also the kinds of tensors in the files that the model has no place for.

    A kind is a tensor name with its numbers replaced by `*`. Old checkpoints carry some that do no harm.
    `placement` goes to transformers' `from_pretrained`: where parts of the model are kept; see `neurograft.streaming`.
    """
    from transformers import AutoModelForCausalLM

    from neurograft.anatomy import refuse_unsupported

    directory = (
        reference if isinstance(reference, ModelDirectory) else resolve(reference, trust_remote_code=trust_remote_code)
    )
    refuse_unsupported(load_config(directory, trust_remote_code=trust_remote_code), read_raw_config(directory.path))
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory.path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **(placement or {}),
            )
            model, report = loaded
    except Exception as error:
        raise ModelError(f"transformers can't load the model {directory.name}: {first_line(error)}.") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(str(key) for key in report[kind])
            raise ModelError(
                f"the files of {directory.name} have {len(names)} {kind.replace('_keys', '')} tensors, such as "
                f"{names[0]}."
            )
    return model.eval(), {re.sub(r"\d+", "*", str(key)) for key in report["unexpected_keys"]}


def load_tokenizer(
    reference: str | Path | ModelDirectory, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ModelError: There is none, or transformers can't load it.
    """
    directory = (
        reference if isinstance(reference, ModelDirectory) else resolve(reference, trust_remote_code=trust_remote_code)
    )
    tokenizer = load_tokenizer_if_any(directory, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(
            f"{directory.name} has no tokenizer, and text is to be read; put the tokenizer's files beside the model."
        )
    return tokenizer


def load_tokenizer_if_any(
    directory: ModelDirectory, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load a model's tokenizer, or return `None` if it has none.

    Raises:
        ModelError: There are tokenizer files, and transformers can't load them.
    """
    from transformers import AutoTokenizer

    if not any((directory.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"transformers can't load the tokenizer of {directory.name}: {first_line(error)}.") from error


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerFingerprint:
    """Reduce a tokenizer to what tells whether another one maps text to the same tokens."""
    import hashlib

    vocabulary = tokenizer.get_vocab()
    ids = tokenizer(_SAMPLE_TEXT, add_special_tokens=False)["input_ids"]
    return TokenizerFingerprint(
        vocabulary_size=len(vocabulary),
        vocabulary_digest=combine_digests({token: str(number) for token, number in vocabulary.items()}),
        sample_digest=hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest(),
    )
