"""What a user calls an organ in a bank: `bank/:radiology@1.2`, `hf://org/repo@1.2`, `oci://registry/name:1.2`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from neurograft.errors import UsageError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SELECTOR = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,95}"
_IN_FOLDER = re.compile(rf"(?P<root>.+):(?P<name>{_NAME})(@(?P<selector>{_SELECTOR}))?", re.DOTALL)
# https://github.com/opencontainers/distribution-spec: the last component of a repository's name
_REPOSITORY = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}")
# Markers of the registry's own: see `registries`.
RESERVED_TAG = re.compile(r"(yanked|signed)-\d.*")


@dataclass(frozen=True)
class Reference:
    """A bank, perhaps an organ in it, perhaps one of the organ's versions.

    Attributes:
        root: The bank: a folder, a URL, `hf://org`, `oci://registry/path`.
        name: What the organ is called in it; `None` for the bank as a whole.
        selector: A version, the beginning of one, or a tag; `None` for the newest release.
    """

    root: str
    name: str | None = None
    selector: str | None = None

    def __str__(self) -> str:
        name = "" if self.name is None else f":{self.name}"
        return f"{self.root}{name}{'' if self.selector is None else f'@{self.selector}'}"


def is_reference(text: str | Path) -> bool:
    """Whether an ORGAN argument names an organ in a bank, and no file.

    A path object never does, since it can't hold a URL; nor does the name of a file that exists or ends in
    `.safetensors`.
    """
    if not isinstance(text, str) or Path(text).exists():
        return False
    return "://" in text or (_IN_FOLDER.fullmatch(text) is not None and not text.endswith(".safetensors"))


def parse(text: str | Path) -> Reference:
    """Take a reference apart.

    Args:
        text: `BANK` or `BANK:NAME@SELECTOR`, where BANK is a folder or any URL; also `hf://org/repo@SELECTOR`,
            `oci://registry/path/name:SELECTOR`.

    Raises:
        UsageError: It is not written in one of these forms.
    """
    text = str(text)
    scheme, separator, rest = text.partition("://")
    if not text or (separator and not rest.strip("/")):
        raise UsageError(f"{text!r} names no bank; give a folder, a URL, hf://org/repo or oci://registry/name:tag.")
    if separator and scheme in ("hf", "oci"):
        return _parse_remote(scheme, rest, text)
    match = _IN_FOLDER.fullmatch(text)
    # s3://bucket:radiology names an organ, http://host:8080 a port
    if match is None or (separator and "/" not in rest and match["name"].isdigit()):
        _refuse_bad_name(text)
        return Reference(text)
    return Reference(match["root"], match["name"], match["selector"])


def _refuse_bad_name(text: str) -> None:
    """Refuse what was meant for an organ's name and is none, which would else become part of a folder's.

    Raises:
        UsageError: It is.
    """
    root, colon, name = text.rpartition(":")
    if colon and not root:
        raise UsageError(f"{text} names no bank; write BANK:NAME@VERSION, such as /srv/organs:radiology@1.2.")
    if colon and not name.isdigit() and "/" not in name and not Path(text).exists():
        raise UsageError(
            f"{text}: {name!r} is no organ's name, perhaps with @VERSION; it has letters, digits, dots and dashes. "
            f"Write {root}:radiology, or {root} for the bank as a whole."
        )


def parse_organ(text: str) -> Reference:
    """Take apart a reference that must name an organ.

    Raises:
        UsageError: It names none.
    """
    reference = parse(text)
    if reference.name is None:
        bank, _, name = text.rstrip("/").rpartition("/")
        meant = f"{bank}:{name}" if bank and Path(text, "versions").is_dir() else f"{text.rstrip('/')}:radiology@1.2"
        raise UsageError(f"{text} names no organ; write BANK:NAME@VERSION, such as {meant}.")
    return reference


def parse_root(text: str | Path) -> str:
    """Return the bank as a whole that a reference names, for `list`.

    Raises:
        UsageError: It names an organ in it.
    """
    text = str(text)
    scheme, separator, rest = text.partition("://")
    if separator and scheme in ("hf", "oci") and rest:
        rest = rest.rstrip("/")
        inside = rest if scheme == "hf" else rest.partition("/")[2]  # oci://localhost:5000 has a port
        if "@" in rest or ":" in inside or (scheme == "hf" and "/" in rest):
            raise UsageError(f"{text} names one organ; give the bank that it is in, or ask for its versions.")
        return text.rstrip("/")
    reference = parse(text)
    if reference.name is not None:
        raise UsageError(f"{text} names one organ; give {reference.root}, or ask for the organ's versions.")
    return reference.root


def _parse_remote(scheme: str, rest: str, text: str) -> Reference:
    host = rest.partition("/")[0]
    if scheme == "oci" and "@" in host and "/" in rest:
        address = host.rpartition("@")[2]
        raise UsageError(f"oci:// takes no user and password; leave them out, and run `docker login {address}` once.")
    body, at, selector = rest.partition("@")
    head, slash, last = body.rpartition("/")
    name: str | None
    if not last:  # oci://registry/path/
        root, name = head, None
    elif not slash:  # hf://org, hf://org:name, oci://localhost:5000
        root, colon, after = last.partition(":")
        root, name = (root, after or None) if scheme == "hf" else (last, None)
    else:
        root, (name, colon, after) = head, last.partition(":")
        if colon and at:  # the general form, BANK:NAME@SELECTOR
            root, name = f"{head}/{name}", after
        elif colon:
            selector = after
    if at and name is None:
        raise UsageError(f"{text} gives a version of no organ; write {scheme}://.../NAME@VERSION.")
    reference = Reference(f"{scheme}://{root}", name, selector or None)
    return _checked(reference, scheme, text)


def _checked(reference: Reference, scheme: str, text: str) -> Reference:
    if scheme == "hf" and "/" in reference.root.removeprefix("hf://"):
        raise UsageError(f"{text} is no repository of the Hub; write hf://org/repo or hf://org/repo@VERSION.")
    if reference.name is not None and not re.fullmatch(_NAME, reference.name):
        raise UsageError(f"{text}: {reference.name!r} is no organ's name; it has letters, digits, dots and dashes.")
    if reference.selector is not None and not re.fullmatch(_SELECTOR, reference.selector):
        raise UsageError(f"{text}: {reference.selector!r} is neither a version nor a tag.")
    return reference if reference.name is None else with_name(reference, reference.name)


def with_name(reference: Reference, name: str) -> Reference:
    """Return a reference to the organ `name` in the bank that `reference` names.

    Raises:
        UsageError: An OCI registry can't hold such a name.
    """
    if reference.root.startswith("oci://") and not _REPOSITORY.fullmatch(name):
        raise UsageError(
            f"an OCI registry takes names in lower case only, and {name!r} is none; write "
            f"{reference.root}/{name.lower()}."
        )
    return replace(reference, name=name)


def check_tag(tag: str) -> str:
    """Refuse a tag that could be taken for a version.

    Raises:
        UsageError: It is no tag.
    """
    if RESERVED_TAG.fullmatch(tag):
        raise UsageError(f"the tag {tag!r} is one of those by which banks mark versions themselves; choose another.")
    if not _TAG.fullmatch(tag):
        raise UsageError(
            f"{tag!r} is no tag; it begins with a letter and has letters, digits, dots, dashes and underscores."
        )
    return tag
