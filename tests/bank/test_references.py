"""References to organs in banks, and the version that each means."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurograft.bank.references import Reference, check_tag, is_reference, parse, parse_organ, parse_root
from neurograft.bank.versions import choose, in_order, newest, parse_version
from neurograft.errors import NotInBankError, UsageError, YankedError


@pytest.mark.parametrize(
    ("text", "root", "name", "selector"),
    [
        ("bank/", "bank/", None, None),
        ("bank:radiology", "bank", "radiology", None),
        ("/a b/bank:radiology@1.2", "/a b/bank", "radiology", "1.2"),
        ("s3://bucket/bank", "s3://bucket/bank", None, None),
        ("s3://bucket:radiology@stable", "s3://bucket", "radiology", "stable"),
        ("http://host:8080", "http://host:8080", None, None),
        ("http://host:8080/bank:radiology@1", "http://host:8080/bank", "radiology", "1"),
        ("sftp://me@host/bank:radiology@1.0.0-rc.1", "sftp://me@host/bank", "radiology", "1.0.0-rc.1"),
        ("hf://org", "hf://org", None, None),
        ("hf://org:repo@1.2", "hf://org", "repo", "1.2"),
        ("hf://org/repo", "hf://org", "repo", None),
        ("hf://org/repo@1.2.0", "hf://org", "repo", "1.2.0"),
        ("oci://localhost:5000", "oci://localhost:5000", None, None),
        ("oci://localhost:5000/organs/", "oci://localhost:5000/organs", None, None),
        ("oci://host/organs/radiology:1.2", "oci://host/organs", "radiology", "1.2"),
        ("oci://host/organs/radiology@1.2", "oci://host/organs", "radiology", "1.2"),
        ("oci://host:5000/organs:radiology@1.2", "oci://host:5000/organs", "radiology", "1.2"),
        ("oci://host/radiology", "oci://host", "radiology", None),
    ],
)
def test_references_are_taken_apart(text: str, root: str, name: str | None, selector: str | None) -> None:
    assert parse(text) == Reference(root, name, selector)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no bank"),
        ("hf://", "names no bank"),
        ("hf://a/b/c", "no repository of the Hub"),
        ("oci://host/Radiology", "lower case only, and 'Radiology' is none; write oci://host/radiology"),
        ("oci://host/x:..", "neither a version nor a tag"),
        ("hf://org/re po", "no organ's name"),
        ("oci://host@1.2", "gives a version of no organ"),
        ("bank:", "'' is no organ's name"),
        ("bank:re po", "'re po' is no organ's name, perhaps with @VERSION"),
        ("folder/bank:-x", "Write folder/bank:radiology, or folder/bank for the bank as a whole"),
        ("s3://bucket/bank:ra!dio@1", "'ra!dio@1' is no organ's name"),
    ],
)
def test_what_is_no_reference_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse(text)


def test_an_organ_or_a_whole_bank_is_asked_for_where_one_is_needed() -> None:
    with pytest.raises(UsageError, match="bank names no organ; write BANK:NAME@VERSION, such as bank:radiology"):
        parse_organ("bank")
    for text in ("bank:radiology", "hf://org:repo", "hf://org/repo", "oci://host/radiology:1.0.0"):
        with pytest.raises(UsageError, match="names one organ"):
            parse_root(text)
    assert parse_root("oci://host:5000/organs/") == "oci://host:5000/organs"
    for tag in ("1.2", "", "a/b"):
        with pytest.raises(UsageError, match="is no tag"):
            check_tag(tag)
    with pytest.raises(UsageError, match=r"'yanked-1\.2\.0' is one of those by which banks mark versions themselves"):
        check_tag("yanked-1.2.0")


def test_a_file_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "odd:name@1.2"
    file.touch()
    assert not is_reference(str(file))
    assert not is_reference("missing.safetensors")
    assert not is_reference("odd:missing.safetensors")
    assert not is_reference(Path("bank:radiology"))
    assert is_reference("bank:radiology@1.2") and is_reference("hf://org/repo")


VERSIONS = dict.fromkeys(["1.10.0", "1.2.0", "1.2.1", "1.3.0-rc.1", "2.0.0-beta", "0.9.0"]) | {"1.2.2": "wrong data"}


@pytest.mark.parametrize(
    ("selector", "version"),
    [(None, "1.10.0"), ("1.2", "1.2.1"), ("1", "1.10.0"), ("1.2.0", "1.2.0"), ("2", "2.0.0-beta"), ("stable", "1.2.0")],
)
def test_a_selector_means_a_version(selector: str | None, version: str) -> None:
    assert choose(Reference("bank", "x", selector), VERSIONS, {"stable": "1.2.0"}) == version


def test_what_is_absent_or_yanked_is_refused() -> None:
    tags = {"stable": "1.2.2", "lost": "7.0.0"}
    for selector in ("1.4", "3", "9.9.9", "nightly"):
        with pytest.raises(NotInBankError, match=f"bank:x has no version or tag {selector}; it has .*1.10.0.*stable"):
            choose(Reference("bank", "x", selector), VERSIONS, tags)
    with pytest.raises(NotInBankError, match=r"the tag lost of bank:x stands for 7.0.0, which is not there; there are"):
        choose(Reference("bank", "x", "lost"), VERSIONS, tags)
    for selector in ("1.2.2", "stable"):
        with pytest.raises(YankedError, match=r"bank:x@1.2.2 was yanked \(wrong data\); choose another"):
            choose(Reference("bank", "x", selector), VERSIONS, tags)
        assert choose(Reference("bank", "x", selector), VERSIONS, tags, allow_yanked=True) == "1.2.2"
    with pytest.raises(YankedError, match="every version"):
        choose(Reference("bank", "x"), {"1.0.0": "bad"}, {})


def test_versions_are_semantic() -> None:
    assert in_order(["1.10.0", "1.9.0", "1.10.0-rc.2", "1.10.0-rc.10"])[0] == "1.9.0"
    assert in_order(["1.0.0-rc.10", "1.0.0-rc.2"]) == ["1.0.0-rc.2", "1.0.0-rc.10"]
    assert newest(["1.0.0-rc.1"]) == "1.0.0-rc.1" and newest([]) is None
    for text in ("1.2", "01.0.0", "one", "1.0.0-" + "x" * 80):
        with pytest.raises(UsageError):
            parse_version(text)
