"""Mask personal data in text before anything is trained on it, with Presidio."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from neurograft.errors import UsageError
from neurograft.manifest import Redaction
from neurograft.surgery import Undo

log = logging.getLogger("neurograft")

LANGUAGE = "en"
LEAST_SCORE = 0.4  # what Presidio gives a telephone number that nothing around it speaks for
_NEEDS = ("presidio_analyzer", "presidio_anonymizer", "spacy", "tldextract")
_NAMES = "SpacyRecognizer"
_REPORT_EVERY = 500  # documents


def check_installed() -> None:
    """Refuse to mask where Presidio is missing.

    Raises:
        UsageError: The extra is not installed.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--redact needs {missing[0]}; install neurograft[redact].")


def redact_documents(documents: Sequence[str]) -> tuple[list[str], Redaction]:
    """Put the kind of each piece of personal data, such as `<EMAIL_ADDRESS>`, in its place.

    What has a pattern or check digits is found without a model. Names are looked for only where a spaCy model for
    English is installed; none is downloaded, and nothing else asks the network either.

    Args:
        documents: English text.

    Returns:
        The documents, masked, and what was masked, in counts.

    Raises:
        UsageError: Presidio is not installed.
    """
    check_installed()
    from presidio_anonymizer import AnonymizerEngine

    masked, counts, changed = [], Counter[str](), 0
    with _offline():
        analyzer, recognizers, names_by = _make_analyzer()
        anonymizer: Any = AnonymizerEngine()
        for number, document in enumerate(documents):
            if number % _REPORT_EVERY == 0:
                log.info("looking for personal data in document %d of %d", number + 1, len(documents))
            found = analyzer.analyze(document, LANGUAGE, score_threshold=LEAST_SCORE)
            result = anonymizer.anonymize(document, found)
            masked.append(str(result.text))
            counts.update(item.entity_type for item in result.items)
            changed += bool(result.items)
    return masked, Redaction(
        counts=dict(sorted(counts.items())),
        documents=changed,
        recognizers=recognizers,
        names_by=names_by,
        versions={name: importlib.metadata.version(name) for name in ("presidio-analyzer", "presidio-anonymizer")},
    )


def _make_analyzer() -> tuple[Any, list[str], str | None]:
    """Return an analyzer, the names of its recognizers, and the model that finds names, if there is one."""
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    name = next((name for name in sorted(spacy.util.get_installed_models()) if name.startswith(f"{LANGUAGE}_")), None)
    language = spacy.blank(LANGUAGE) if name is None else spacy.load(name)
    language.max_length = 1 << 31  # characters; the limit only warns of memory
    engine: Any = SpacyNlpEngine()
    engine.nlp = {LANGUAGE: language}  # what `load` would fill, after downloading what is missing
    registry: Any = RecognizerRegistry(supported_languages=[LANGUAGE])
    registry.load_predefined_recognizers(languages=[LANGUAGE], nlp_engine=engine)
    if name is None:
        registry.remove_recognizer(_NAMES)
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[LANGUAGE])
    recognizers = sorted(recognizer.name for recognizer in registry.recognizers)
    return analyzer, recognizers, None if name is None else f"{name} {language.meta['version']}"


@contextmanager
def _offline() -> Iterator[None]:
    """Let addresses be checked against the list of domains that tldextract brings along, and not a newer download."""
    import tldextract
    from tldextract import tldextract as module

    undo, logs = Undo(), [logging.getLogger(name) for name in ("presidio-analyzer", "presidio-anonymizer")]
    levels = [logger.level for logger in logs]
    undo.set(vars(module), "TLD_EXTRACTOR", tldextract.TLDExtract(cache_dir=None, suffix_list_urls=()))
    for logger in logs:
        logger.setLevel(logging.ERROR)  # it says which languages have no recognizers
    try:
        yield
    finally:
        undo.restore()
        for logger, level in zip(logs, levels, strict=True):
            logger.setLevel(level)
