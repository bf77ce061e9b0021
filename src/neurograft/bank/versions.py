"""Which version a reference means: semantic versions in their order, tags, and what was yanked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import semver

from neurograft.bank.references import Reference
from neurograft.errors import NotInBankError, UsageError, YankedError

_PARTIAL = re.compile(r"\d+(\.\d+)?")
# A registry's tag has at most 128 characters, a file's name 255 bytes.
_LONGEST_VERSION = 64
_SHOWN = 8


def parse_version(text: str) -> semver.Version:
    """Parse a semantic version.

    Raises:
        UsageError: It is none, as https://semver.org has it, or too long for a bank.
    """
    try:
        version = semver.Version.parse(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no semantic version, which a bank asks for; write one such as 1.0.2.") from error
    if len(text) > _LONGEST_VERSION:
        raise UsageError(f"the version {text!r} is longer than the {_LONGEST_VERSION} characters that a bank takes.")
    return version


def is_version(text: str) -> bool:
    """Whether `text` is a whole semantic version."""
    return semver.Version.is_valid(text)


def in_order(versions: Iterable[str]) -> list[str]:
    """Return versions from the oldest to the newest, by semantic precedence."""
    return sorted(versions, key=lambda version: (semver.Version.parse(version), version))


def newest(versions: Iterable[str]) -> str | None:
    """Return the newest release; the newest pre-release if there is no release; `None` if there is nothing."""
    ordered = in_order(versions)
    releases = [version for version in ordered if not semver.Version.parse(version).prerelease]
    return (releases or ordered)[-1] if ordered else None


def choose(
    reference: Reference, versions: Mapping[str, str | None], tags: Mapping[str, str], *, allow_yanked: bool = False
) -> str:
    """Return the version that a reference means.

    Args:
        reference: With the selector: a version, the beginning of one (`1`, `1.2`), a tag, or none, the newest release.
        versions: Every version of the organ, at least one, with the reason if it was yanked, else `None`.
        tags: Tag -> version.
        allow_yanked: Whether a version that is named in full, or by a tag, may have been yanked.

    Raises:
        NotInBankError: There is no such version or tag.
        YankedError: It was yanked.
    """
    selector, good = reference.selector, [version for version, reason in versions.items() if reason is None]
    if selector is None:
        chosen = newest(good)
    elif selector in versions or selector in tags:
        chosen = selector if selector in versions else tags[selector]
    elif _PARTIAL.fullmatch(selector):
        chosen = newest(version for version in good if version.startswith(f"{selector}."))
    else:
        chosen = None
    if chosen is None or chosen not in versions:
        raise _absent(reference, chosen, versions, tags, good)
    reason = versions[chosen]
    if reason is not None and not allow_yanked:
        raise YankedError(
            f"{reference.root}:{reference.name}@{chosen} was yanked ({reason}); choose another version"
            f"{_list(good)}, or pull it with --allow-yanked."
        )
    return chosen


def _absent(
    reference: Reference,
    chosen: str | None,
    versions: Mapping[str, str | None],
    tags: Mapping[str, str],
    good: list[str],
) -> NotInBankError | YankedError:
    where = f"{reference.root}:{reference.name}"
    if not good:
        return YankedError(f"every version of {where} was yanked{_list(versions)}.")
    if chosen is not None:
        return NotInBankError(
            f"the tag {reference.selector} of {where} stands for {chosen}, which is not there; there are{_list(good)}."
        )
    known = f"{_list(good)}{_list(tags)}"
    return NotInBankError(f"{where} has no version or tag {reference.selector}; it has{known}.")


def _list(words: Iterable[str]) -> str:
    """Return the last of some words, in brackets."""
    words = in_order(words) if all(map(is_version, words := list(words))) else sorted(words)
    return f" ({', '.join([*(['...'] if len(words) > _SHOWN else []), *words[-_SHOWN:]])})" if words else ""
