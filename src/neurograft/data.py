"""Text: read through `datasets`, split by document, tokenized, packed into sequences."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.errors import DataError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("neurograft")

IGNORED_LABEL = -100  # the label that torch's and transformers' losses pass over

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst")
_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:\w+)?$")


class Documents(tuple[str, ...]):
    """Documents in memory, to be given wherever paths of text are taken."""

    __slots__ = ()


def paths_of(text: str | Path | Sequence[str | Path] | None) -> list[Path]:
    """Return the paths among what was given as text; none where it is in memory."""
    if text is None or isinstance(text, Documents):
        return []
    return [Path(text)] if isinstance(text, str | Path) else list(map(Path, text))


def read_documents(
    paths: str | Path | Sequence[str | Path],
    *,
    text_column: str = "text",
    document_separator: str | None = None,
    encoding: str = "utf-8",
) -> list[str]:
    """Read documents from files, folders or a Hub dataset.

    Everything is read as a stream: `datasets` would otherwise keep a copy of the text in its cache on disk, and the
    text may be private.

    Args:
        paths: One or several of: a `.txt`, `.jsonl`, `.json` or `.parquet` file (the first three also `.gz` or
            `.zst`), a folder of these, or the id of a Hub dataset (`org/name` or `org/name:split`; the split is
            `train` if left out); or `Documents`.
        text_column: Column that holds the text, in tables.
        document_separator: What separates documents in `.txt` files; left out, blank lines do.
        encoding: Encoding of `.txt` and JSON files.

    Returns:
        Documents without surrounding white space, in the order of the files; empty ones are left out.

    Raises:
        DataError: One sentence names the file and says what is wrong with it.
    """
    if document_separator == "":
        raise DataError("the document separator is empty; give what stands between documents, or leave it out.")
    several = [paths] if isinstance(paths, (str, Path)) else list(paths)
    documents: list[str] = []
    if isinstance(paths, Documents):
        several, documents = [], list(_clean(paths))
    for path in several:
        if not str(path):
            raise DataError("a path of text is empty; give a file, a folder or a Hub dataset id.")
        texts = list(_read_path(path, text_column, document_separator, encoding))
        if not texts:
            raise DataError(f"there is no text in {path}.")
        documents.extend(texts)
    if not documents:
        raise DataError("no data was given.")
    return documents


def _read_path(path: str | Path, column: str, separator: str | None, encoding: str) -> Iterator[str]:
    local = Path(path)
    if local.is_dir():
        files = _files_below(local)
        if not files:
            raise DataError(f"the folder {local} holds no {_known_suffixes()} file.")
        for file in files:
            yield from _read_file(file, column, separator, encoding)
    elif local.is_file():
        yield from _read_file(local, column, separator, encoding)
    elif _HUB_ID.match(str(path)) and _suffix(local) not in _BUILDERS:
        yield from _read_hub(str(path), column)
    elif local.exists():
        raise DataError(f"{path} is a pipe or a device; text is read from files and folders.")
    else:
        raise DataError(f"there is no file or folder {path}.")


def _files_below(folder: Path) -> list[Path]:
    """Return the text files in a folder and below, sorted, without hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file() and _suffix(path) in _BUILDERS)
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _suffix(path: Path) -> str:
    """Return the suffix that tells the format: `.jsonl` for both `a.jsonl` and `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _known_suffixes() -> str:
    return ", ".join(_BUILDERS)


def _read_file(path: Path, column: str, separator: str | None, encoding: str) -> Iterator[str]:
    suffix = _suffix(path)
    if suffix not in _BUILDERS:
        raise DataError(f"{path} is of an unknown kind; the known are {_known_suffixes()} (also with .gz or .zst).")
    options: dict[str, Any] = {"data_files": {"train": [str(path.resolve())]}}
    if suffix == ".txt":
        options.update(sample_by="document", encoding=encoding)
    elif suffix in (".json", ".jsonl"):
        options.update(encoding=encoding)
    if path.stat().st_size == 0:
        return
    with _explained(path, encoding):
        for text in _texts(_BUILDERS[suffix], options, "text" if suffix == ".txt" else column, str(path)):
            yield from _split_text(text, separator) if suffix == ".txt" else _clean([text])


@contextmanager
def _explained(path: Path, encoding: str) -> Iterator[None]:
    """Turn whatever a reader raises over one file into one sentence."""
    try:
        yield
    except DataError:
        raise
    except LookupError as error:
        raise DataError(f"{encoding} is no encoding that Python knows ({error}).") from error
    except Exception as error:
        unicode_error = _find_cause(error, UnicodeDecodeError)
        if isinstance(unicode_error, UnicodeDecodeError):
            raise DataError(
                f"{path} is not encoded as {encoding} (byte 0x{unicode_error.object[unicode_error.start]:02x} at "
                f"offset "
                f"{unicode_error.start}); give its encoding with --encoding."
            ) from error
        raise DataError(f"{path} can't be read: {first_line(error)}.") from error


def _find_cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _read_hub(name: str, column: str) -> Iterator[str]:
    dataset, _, split = name.partition(":")
    try:
        yield from _clean(_texts(dataset, {}, column, name, split or "train"))
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} is no local file or folder, and the Hub did not give it: {first_line(error)}."
        ) from error


def _texts(builder: str, options: dict[str, Any], column: str, name: str, split: str = "train") -> Iterator[str]:
    """Yield the text column of a dataset, read as a stream."""
    import datasets

    with _quiet_datasets():
        for record in datasets.load_dataset(builder, split=split, streaming=True, **options):
            if column not in record:
                known = ", ".join(map(str, record))
                raise DataError(f"{name} has no column {column}; it has {known}. Name it with --text-column.")
            text = record[column]
            if text is not None and not isinstance(text, str):
                raise DataError(f"the column {column} of {name} holds {type(text).__name__} values, not text.")
            yield text or ""


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence the progress bars of `datasets`, its log, and the Hub's log of retries; what goes wrong is raised.

    It also counts each file that is read, local ones too, by a request to a server, which is nobody's business.
    """
    import datasets
    from datasets.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    level, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    hub_level = hub_logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    counting, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if not bars:
            datasets.enable_progress_bars()


def _split_text(text: str, separator: str | None) -> Iterator[str]:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    return _clean(text.split(separator) if separator else _BLANK_LINES.split(text))


def _clean(texts: Sequence[str] | Iterator[str]) -> Iterator[str]:
    return (stripped for text in texts if (stripped := text.strip()))


def split_documents(documents: Sequence[str], *, held_out: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split documents into a training part and a held-out part, each with at least one.

    Args:
        documents: The documents.
        held_out: Share of the documents to hold out, between 0 and 1.
        seed: Seed of the choice.

    Raises:
        DataError: There are fewer than two documents, or the share is not between 0 and 1.
    """
    import numpy

    if not 0 < held_out < 1:
        raise DataError(f"the held-out share is {held_out}; it must lie between 0 and 1.")
    if len(documents) < 2:
        raise DataError(
            f"{len(documents)} document can't be split into training and held-out text; give more documents, "
            f"evaluation "
            "data of its own, or a document separator."
        )
    count = min(max(round(held_out * len(documents)), 1), len(documents) - 1)
    chosen = set(numpy.random.default_rng(seed).permutation(len(documents))[:count].tolist())
    parts: tuple[list[str], list[str]] = ([], [])
    for index, document in enumerate(documents):
        parts[index in chosen].append(document)
    return parts


def tokenize_documents(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each document, without special tokens.

    Raises:
        DataError: The tokenizer has no tokens for something in them, or knows nothing of all of it.
    """
    if not documents:
        return []
    try:
        encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False, return_attention_mask=False)
    except Exception as error:  # tokenizers raise nothing more special where a word has no token
        raise DataError(f"the tokenizer can't encode the text: {error}.") from error
    tokens = [list(ids) for ids in encoded["input_ids"]]
    _judge_unknown(tokens, tokenizer)
    return tokens


def _judge_unknown(tokens: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse text of which nothing is known, on which every figure would be about one token; say if it is the half."""
    total = sum(map(len, tokens))
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in tokens) if tokenizer.unk_token_id is not None else 0
    if total and unknown == total:
        raise DataError(
            f"the tokenizer knows nothing of the text: each of its {total:,} tokens is {tokenizer.unk_token}; is it "
            "the tokenizer of this model, and text of a language and script that the model knows?"
        )
    if 2 * unknown > total:
        log.warning("%.0f %% of the text's tokens are unknown to the tokenizer", 100 * unknown / total)


def separator_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a text: end-of-text, or what comes nearest to it.

    Raises:
        DataError: The tokenizer has no such token.
    """
    for name in ("eos_token_id", "bos_token_id", "sep_token_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    raise DataError("the tokenizer has no end-of-text token (nor bos, sep or pad), which must stand between documents.")


@dataclass(frozen=True)
class PackedTokens:
    """Documents packed into sequences of equal length."""

    input_ids: torch.Tensor
    """(N, T) token ids; the last sequence is padded."""
    labels: torch.Tensor
    """(N, T), the same, with -100 where padded. A model's logits at t predict the label at t + 1."""
    tokens: int
    """Tokens that are not padding."""


def pack(token_lists: Sequence[Sequence[int]], *, sequence_length: int, separator_id: int) -> PackedTokens:
    """Join documents, each followed by end-of-text, and cut the result into sequences; nothing is dropped.

    Args:
        token_lists: Token ids of each document.
        sequence_length: T.
        separator_id: The end-of-text token, which also pads the last sequence.

    Raises:
        DataError: There are no tokens.
    """
    import torch

    stream = [token for tokens in token_lists for token in (*tokens, separator_id)]
    if not any(token_lists):
        raise DataError("the tokenizer made no tokens of the text.")
    padding = -len(stream) % sequence_length
    ids = torch.tensor(stream + [separator_id] * padding, dtype=torch.long).view(-1, sequence_length)  # (N, T)
    labels = torch.tensor(stream + [IGNORED_LABEL] * padding, dtype=torch.long).view(-1, sequence_length)  # (N, T)
    return PackedTokens(ids, labels, len(stream))


def pack_apart(token_lists: Sequence[Sequence[int]], *, sequence_length: int, separator_id: int) -> PackedTokens:
    """Give each document a sequence of its own: its beginning, and end-of-text and padding if there is room.

    Args:
        token_lists: Token ids of each document, at least one.
        sequence_length: T.
        separator_id: The end-of-text token, which also pads.

    Raises:
        DataError: There are no tokens.
    """
    import torch

    rows = [[*tokens, separator_id][:sequence_length] for tokens in token_lists if tokens]
    if not rows:
        raise DataError("the tokenizer made no tokens of the text.")
    ids = torch.full((len(rows), sequence_length), separator_id, dtype=torch.long)  # (N, T)
    labels = torch.full_like(ids, IGNORED_LABEL)  # (N, T)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = labels[number, : len(row)] = torch.tensor(row)
    return PackedTokens(ids, labels, sum(map(len, rows)))


def fingerprint(documents: Sequence[str]) -> str:
    """Return a SHA-256 over documents, in order, each preceded by its length."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
