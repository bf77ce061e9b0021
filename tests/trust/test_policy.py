"""`trust.toml`: which one counts, what it may say, and that every verb which would use an organ heeds it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing.signing")

from authorities import Keys, make_authority, make_keys, make_member
from typer.testing import CliRunner, Result

import neurograft
from neurograft import organ as organs
from neurograft.cli import app
from neurograft.errors import NeurograftError, TrustError
from neurograft.organ import Organ, read_manifest, read_organ
from neurograft.training.baselines import METHODS, prepare
from neurograft.trust.policy import VARIABLE, policy_path, read_policy
from neurograft.trust.signature_files import signature_path
from neurograft.trust.signing import sign
from neurograft.trust.verifying import verify
from tiny import load

RULES = """
[signers.maker]
key = "maker.pub"
[signers.reviewer]
key = "reviewer.pub"
[[allow]]
signers = ["maker", "reviewer"]
"""


@pytest.fixture
def maker(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "maker")


@pytest.fixture
def reviewer(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "reviewer")


@pytest.fixture(autouse=True)
def _foreign(organ_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no organ count as this process's own, as it is where another process made it."""
    monkeypatch.setattr(organs, "_written", set())


@pytest.fixture
def trust(tmp_path: Path, maker: Keys, reviewer: Keys, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that writes a trust.toml and puts it in force."""

    def write(text: str) -> Path:
        path = tmp_path / "trust.toml"
        path.write_text(text)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return write


Trust = Callable[[str], Path]


def test_without_a_policy_every_organ_is_used(organ_file: Path) -> None:
    assert policy_path() is None
    read_organ(organ_file)


def test_an_organ_that_is_signed_by_whom_it_should_be(organ_file: Path, trust: Trust, maker: Keys) -> None:
    where = trust(RULES)
    sign(organ_file, key=maker.private)
    read_organ(organ_file)
    found = verify(organ_file)
    assert found.passed and found.policy == str(where) and [each.name for each in found.signatures] == ["maker"]


def test_an_unsigned_organ(organ_file: Path, trust: Trust) -> None:
    where = trust(RULES)
    with pytest.raises(TrustError) as caught:
        read_organ(organ_file)
    assert str(caught.value) == (
        f"{organ_file} is not signed (there is no organ.safetensors.sig beside it), and {where} lets it be used with a "
        "signature by maker or reviewer; ask for the .sig, or sign it with `neurograft sign`."
    )


def test_an_unknown_signer(organ_file: Path, trust: Trust, tmp_path: Path) -> None:
    trust(RULES)
    sign(organ_file, key=make_keys(tmp_path, "stranger").private)
    with pytest.raises(TrustError, match=r"is signed by key [0-9a-f]{16}, whom .* does not know; add them there"):
        read_organ(organ_file)
    found = verify(organ_file)
    assert not found.passed and found.signatures[0].name is None and found.trusted is False


def test_an_altered_organ(organ_file: Path, organ: Organ, trust: Trust, maker: Keys, reviewer: Keys) -> None:
    trust(RULES)
    sign(organ_file, key=maker.private)
    update = {"source": organ.manifest.source.model_copy(update={"model": "another"})}
    Organ(organ.manifest.model_copy(update=update), organ.tensors).save(organ_file, overwrite=True)
    organs._written.clear()
    with pytest.raises(TrustError, match="was altered after the key"):
        read_organ(organ_file)
    sign(organ_file, key=reviewer.private, overwrite=True)
    read_organ(organ_file)


def test_an_expired_certificate(
    organ_file: Path, trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = make_authority(tmp_path, "ca")
    member, certificate = make_member(tmp_path, authority, "radiology", days=(-90, -1))
    with monkeypatch.context() as context:
        context.setattr("neurograft.trust.signing.refuse_outside_validity", lambda *_: None)
        sign(organ_file, key=member.private, certificate=certificate)
    rules = '[signers.r]\ncertificate = "ca.crt"\nsubject = "radiology"\n[[allow]]\nsigners = ["r"]\n'
    trust(rules)
    with pytest.raises(TrustError, match="expired on"):
        read_organ(organ_file)
    renewed, certificate = make_member(tmp_path, authority, "radiology")
    sign(organ_file, key=renewed.private, certificate=certificate)
    read_organ(organ_file)


def test_base_models(organ_file: Path, trust: Trust, maker: Keys) -> None:
    base = read_manifest(organ_file).source.model
    sign(organ_file, key=maker.private)
    trust(RULES + f'base_models = ["elsewhere/*", "{base[:3]}*"]\n')
    read_organ(organ_file)
    trust(RULES + 'base_models = ["elsewhere/*"]\n')
    with pytest.raises(TrustError, match=f"is an organ of {base}, and .* lets none of these be used"):
        read_organ(organ_file)
    trust(RULES.replace('["maker", "reviewer"]', '["reviewer"]'))
    with pytest.raises(TrustError, match=r"is signed by maker, and .* wants .* signatures by 1 of reviewer"):
        read_organ(organ_file)


def test_several_signers_may_be_needed(organ_file: Path, trust: Trust, maker: Keys, reviewer: Keys) -> None:
    trust(RULES + "needed = 2\n")
    sign(organ_file, key=maker.private)
    with pytest.raises(TrustError, match=r"is signed by maker, and .* signatures by 2 of maker, reviewer"):
        read_organ(organ_file)
    line = signature_path(organ_file).read_text()
    signature_path(organ_file).write_text(line * 2)  # one signer counts once
    with pytest.raises(TrustError, match="2 of maker, reviewer"):
        read_organ(organ_file)
    signature_path(organ_file).write_text(line)
    sign(organ_file, key=reviewer.private)
    read_organ(organ_file)


def test_others_may_sign_too(organ_file: Path, trust: Trust, maker: Keys, tmp_path: Path) -> None:
    trust(RULES)
    sign(organ_file, key=make_keys(tmp_path, "stranger").private)
    sign(organ_file, key=maker.private)
    read_organ(organ_file)


USES: dict[str, Callable[[Path, Path, Path], Any]] = {
    "check": lambda organ, model, out: neurograft.check(organ, model),
    "transplant": lambda organ, model, out: neurograft.transplant(organ, model, output=out),
    "merge": lambda organ, model, out: neurograft.merge([organ, organ], output=out.with_suffix(".safetensors")),
    "train": lambda organ, model, out: neurograft.train(organ, host=model, data=out.parent / "text.txt"),
    "scan": lambda organ, model, out: neurograft.scan(organ, model, data=out.parent / "text.txt"),
    "compose": lambda organ, model, out: neurograft.compose(organ, model, data={"d": out.parent / "text.txt"}),
    "attach": lambda organ, model, out: neurograft.attach(load(model), organ),
    "graft": lambda organ, model, out: neurograft.graft(load(model), organ).__enter__(),
}


@pytest.mark.parametrize("verb", USES)
def test_every_verb_that_uses_an_organ_refuses(verb: str, organ_file: Path, recipient: Path, trust: Trust) -> None:
    trust(RULES)
    (organ_file.parent / "text.txt").write_text("one document\n\nanother document\n\n" * 20)
    with pytest.raises(TrustError, match="is not signed"):
        USES[verb](organ_file, recipient, organ_file.parent / "out")
    assert not (organ_file.parent / "out").exists()


def test_an_organ_in_a_bank_is_refused_too(organ_file: Path, recipient: Path, trust: Trust, tmp_path: Path) -> None:
    neurograft.push(organ_file, tmp_path / "bank")
    trust(RULES)
    with pytest.raises(TrustError, match=r"bank:tiny is not signed in that bank.* pull it, sign it with .* and push"):
        neurograft.check(f"{tmp_path}/bank:tiny", recipient)


def test_one_may_look_and_undo(organ_file: Path, recipient: Path, trust: Trust, tmp_path: Path, maker: Keys) -> None:
    neurograft.transplant(organ_file, recipient, output=tmp_path / "model", mode="replace")
    organs._written.clear()
    trust(RULES)
    assert neurograft.inspect(organ_file).name == "tiny"
    assert not verify(organ_file).passed
    neurograft.remove(tmp_path / "model", output=tmp_path / "again")


def test_what_this_process_made_is_its_own(donor: Path, recipient: Path, trust: Trust, tmp_path: Path) -> None:
    trust(RULES)
    path = tmp_path / "own.safetensors"
    neurograft.extract(donor, layers=(1, 2), output=path)
    neurograft.check(path, recipient)


def test_a_comparison_trains_layers_of_its_own(organ_file: Path, donor: Path, trust: Trust) -> None:
    """Each of its runs is a process, which did not make the file that it starts from."""
    trust(RULES)
    settings, _ = METHODS["organ"].parse({})
    assert prepare(load(donor), METHODS["organ"], settings, organ=organ_file).trainee.parameters


def test_which_policy_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trust.toml").write_text("nothing that counts here")
    assert policy_path() is None
    usual = tmp_path / "config" / "neurograft" / "trust.toml"
    usual.parent.mkdir(parents=True)
    usual.touch()
    assert policy_path() == usual
    monkeypatch.setenv(VARIABLE, "other.toml")
    assert policy_path() == Path("other.toml")
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(TrustError, match="is empty, so nothing is trusted"):
        policy_path()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("signers = ", "is no TOML, so nothing is trusted"),
        ("", "it has no signers; see"),
        (RULES.replace("[[allow]]", "[[allowed]]"), "the key allowed is not known; known are signers, allow"),
        (RULES + "base_model = 'x'", "the key allow.0.base_model is not known; known are signers, base_models, needed"),
        (
            RULES.replace("key =", "pgp ="),
            "the key signers.maker.pgp is not known; known are key, certificate, subject",
        ),
        (RULES.replace('"maker",', '"anyone",'), "a rule names the signer anyone, and there are maker, reviewer"),
        (RULES + "needed = 3", "a rule needs 3 signers and names 2"),
        (RULES + "needed = 0", "allow.0.needed: "),
        (RULES.replace("reviewer.pub", "maker.pub"), "the signers maker and reviewer are the same"),
        (RULES.replace('key = "maker.pub"', 'identity = "a@b.c"'), "signers.maker: a signer has either"),
        ("x" * (1 << 20) + "x", "can't be read (it has more than 1.0 MB)"),
    ],
)
def test_a_broken_policy_trusts_nothing(text: str, said: str, organ_file: Path, trust: Trust, maker: Keys) -> None:
    sign(organ_file, key=maker.private)
    where = trust(text)
    with pytest.raises(TrustError) as caught:
        read_organ(organ_file)
    assert str(caught.value).startswith(str(where)) and said in str(caught.value)


def test_a_missing_policy_trusts_nothing(organ_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(TrustError, match=r"can't be read .*; mend it, or name another with --trust"):
        read_organ(organ_file)


def test_keys_of_the_policy_lie_beside_it(trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = read_policy(trust(RULES))
    assert policy.signers["maker"].key == tmp_path / "maker.pub"


def test_a_missing_key_trusts_nothing(organ_file: Path, trust: Trust, maker: Keys) -> None:
    sign(organ_file, key=maker.private)
    trust(RULES)
    maker.public.unlink()
    with pytest.raises(
        TrustError, match=r"trust.toml names .*maker.pub as the key of the signer maker, and there is no such file"
    ):
        read_organ(organ_file)


def test_the_missing_extra_trusts_nothing(organ_file: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    trust(RULES)
    monkeypatch.setitem(__import__("sys").modules, "model_signing.signing", None)
    with pytest.raises(NeurograftError, match=r"neurograft\[trust\]"):
        read_organ(organ_file)


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def test_commands(organ_file: Path, recipient: Path, trust: Trust, tmp_path: Path, maker: Keys) -> None:
    where = trust(RULES)
    unset = pytest.MonkeyPatch()
    unset.delenv(VARIABLE)
    try:
        assert run("check", organ_file, recipient).exit_code == 0
        done = run("--trust", where, "check", organ_file, recipient)
        assert done.exit_code == 2 and "is not signed" in done.stderr
        assert VARIABLE not in os.environ
        done = run("--trust", "", "check", organ_file, recipient)
        assert done.exit_code == 2 and "--trust or NEUROGRAFT_TRUST is empty" in done.stderr
        done = run("verify", organ_file)
        assert done.exit_code == 2 and "nothing says whose signature" in done.stderr
        done = run("--trust", where, "verify", organ_file)
        assert done.exit_code == 1 and "not trusted" in done.stdout
        done = run("sign", organ_file, "--key", maker.private, "--json")
        assert done.exit_code == 0 and len(json.loads(done.stdout)["signers"]) == 1
        done = run("--trust", where, "verify", organ_file, "--json")
        assert done.exit_code == 0 and json.loads(done.stdout)["trusted"] is True
        assert run("--trust", where, "check", organ_file, recipient).exit_code == 0
        assert run("verify", organ_file, "--key", maker.public).exit_code == 0
        assert "give both" in run("verify", organ_file, "--subject", "x").stderr
        assert "give both" in run("verify", organ_file, "--issuer", "x").stderr
    finally:
        unset.undo()


def test_the_password_of_a_key_comes_from_the_environment(
    organ_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = make_keys(tmp_path, "locked", password="open sesame")
    done = run("sign", organ_file, "--key", keys.private)
    assert done.exit_code == 2 and "NEUROGRAFT_KEY_PASSWORD" in done.stderr
    monkeypatch.setenv("NEUROGRAFT_KEY_PASSWORD", "open sesame")
    assert run("sign", organ_file, "--key", keys.private).exit_code == 0
