"""The verbs that move organs: push a file into a bank, pull one out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neurograft.bank.downloads import copy_out, fetch
from neurograft.bank.entries import Entry, Pulled, Pushed
from neurograft.bank.references import Reference, check_tag, parse, parse_organ, with_name
from neurograft.bank.resolving import find
from neurograft.bank.signatures import pull_signatures, push_signatures
from neurograft.bank.stores import open_store
from neurograft.bank.versions import is_version, parse_version
from neurograft.errors import UsageError, VersionExistsError
from neurograft.files import atomic_file, check_output_file, file_sha256
from neurograft.organ import check_organ_output, now, organ_path, read_manifest
from neurograft.trust.signature_files import signature_path


def push(organ: str | Path, target: str | Path, *, tags: Sequence[str] = ()) -> Pushed:
    """Put an organ file into a bank, as the version that its manifest gives. Versions never change.

    The signatures beside the file go with it; pushed again, new ones join those that are there.

    Args:
        organ: An organ file, or a reference to one in another bank.
        target: A folder or any fsspec URL, perhaps with `:NAME`; `hf://org/repo`; `oci://registry/name:tag`. What is
            not said there, the manifest says. A tag in it is set as those in `tags` are.
        tags: Tags that shall stand for this version, such as `stable`.

    Raises:
        OrganFileError: The file is no organ, or was altered.
        UsageError: The target or a tag is not written as it should be, or the organ's version is not semantic.
        VersionExistsError: The bank has this version with other bytes.
        TrustError: The signatures beside it are of other bytes.
        BankError: The bank can't be reached, or refuses.
    """
    path, reference = organ_path(organ), parse(target)
    manifest = read_manifest(path)
    _refuse_name_as_tag(reference, manifest.name)
    reference = reference if reference.name is not None else with_name(reference, manifest.name)
    version = str(parse_version(manifest.version))
    wanted = _tags(reference, version, tags)
    store, name = open_store(reference.root), str(reference.name)
    entry = Entry(
        name=name,
        version=version,
        sha256=file_sha256(path),
        size=path.stat().st_size,
        pushed=now(),
        manifest=manifest,
    )
    there, restored = version in store.versions(name), False
    if not there:
        store.add(entry, path)
    known = store.entry(name, version)
    if known.sha256 != entry.sha256:
        raise VersionExistsError(
            f"{reference.root}:{name} has version {version} with other bytes (SHA-256 {known.sha256[:12]}..., the file "
            f"has {entry.sha256[:12]}...), and versions never change; give the organ a new version."
        )
    if there:
        restored = store.restore(known, path)
    push_signatures(store, known, path)
    for tag in wanted:
        store.set_tag(name, tag, version)
    return Pushed(bank=reference.root, entry=known, already_there=there, restored=restored, tags=wanted)


def _refuse_name_as_tag(reference: Reference, name: str) -> None:
    """Refuse a registry's `path:NAME`, which is a tag of `path`, and was meant as in other banks.

    Raises:
        UsageError: It is that.
    """
    if reference.root.startswith("oci://") and reference.selector == name != reference.name:
        path = f"{reference.root}/{reference.name}"
        raise UsageError(
            f"in a registry {path}:{name} is the tag {name} of an organ {path}; to push {name}, write {path}/{name}."
        )


def _tags(reference: Reference, version: str, tags: Sequence[str]) -> list[str]:
    """Return the tags to set; a version in the target must be the organ's."""
    selector = reference.selector
    if selector is None or selector == version:
        return [check_tag(tag) for tag in dict.fromkeys(tags)]
    if is_version(selector) or selector[0].isdigit():
        raise UsageError(f"the target asks for version {selector}, and the organ's manifest says {version}.")
    return [check_tag(tag) for tag in dict.fromkeys([selector, *tags])]


def pull(
    reference: str,
    *,
    output: str | Path | None = None,
    allow_yanked: bool = False,
    overwrite: bool = False,
) -> Pulled:
    """Take an organ file out of a bank; it gets its name once its digest is right. An interrupted pull goes on.

    The signatures that the bank has of it come beside it, as `<output>.sig`.

    Args:
        reference: `BANK:NAME@VERSION`, `hf://org/repo@VERSION`, `oci://registry/name:VERSION`; the version may be the
            beginning of one, or a tag; left out, the newest release.
        output: The file to write (`.safetensors`); left out, `NAME-VERSION.safetensors` in the working directory.
        allow_yanked: Whether a version that was yanked may be pulled, named in full or by a tag.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UsageError: The reference is not written as it should be, or the output exists.
        NotInBankError: There is no such organ, version or tag.
        YankedError: The version was yanked.
        BankDigestError: What the bank gives is not what was pushed.
        BankError: The bank can't be reached, or refuses.
        NeurograftError: The disk is full.
    """
    wanted = parse_organ(reference)
    if output is not None:
        check_organ_output(Path(output), overwrite=overwrite)
    store, entry, yanked = find(wanted, allow_yanked=allow_yanked)
    path = Path(f"{entry.name}-{entry.version}.safetensors" if output is None else output)
    check_organ_output(path, overwrite=overwrite)
    check_output_file(signature_path(path), overwrite=overwrite)
    cached = fetch(store, entry)
    read_manifest(cached)  # what is in a bank may be no organ
    with atomic_file(path, overwrite=overwrite) as temporary:
        copy_out(cached, temporary, entry)
    pull_signatures(store, entry, path)
    return Pulled(bank=wanted.root, entry=entry, path=str(path), yanked=yanked)
