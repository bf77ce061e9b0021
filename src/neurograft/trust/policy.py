"""`trust.toml`: whose organs may be used, by signer and by base model; with it, no other organ is opened for use."""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neurograft.errors import TrustError
from neurograft.files import read_bounded
from neurograft.manifest import Manifest
from neurograft.trust.signature_files import read_signatures, require_library, signature_path
from neurograft.trust.signers import Examined, OrganBytes, Signer, examine

VARIABLE = "NEUROGRAFT_TRUST"
_LARGEST_POLICY = 1 << 20  # bytes


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Part):
    """Some organs that may be used."""

    signers: Annotated[list[str], Field(min_length=1)]
    """Who may sign them, by the names under `signers`."""
    base_models: Annotated[list[str], Field(min_length=1)] = ["*"]
    """What model their layers may come from, as the manifest names it; `*` and `?` stand for any characters."""
    needed: Annotated[int, Field(ge=1)] = 1
    """How many of these signers must have signed."""

    def allows_base(self, model: str) -> bool:
        """Whether organs of this model are meant."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.base_models)


class Policy(_Part):
    """What `trust.toml` says."""

    signers: Annotated[dict[str, Signer], Field(min_length=1)]
    allow: Annotated[list[Rule], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Policy:
        for rule in self.allow:
            unknown = sorted(set(rule.signers) - set(self.signers))
            if unknown:
                known = ", ".join(self.signers)
                raise ValueError(f"a rule names the signer {unknown[0]}, and there are {known}")
            if rule.needed > len(set(rule.signers)):
                raise ValueError(f"a rule needs {rule.needed} signers and names {len(set(rule.signers))}")
        names = list(self.signers)
        for number, name in enumerate(names):
            for other in names[:number]:
                if self.signers[name] == self.signers[other]:  # who would count twice
                    raise ValueError(f"the signers {other} and {name} are the same")
        return self


@dataclass(frozen=True)
class Verdict:
    """What a policy makes of one organ.

    Attributes:
        signatures: What each signature is worth.
        refusal: Why the organ may not be used, as a sentence; `None` if it may.
    """

    signatures: list[Examined]
    refusal: str | None


def policy_path() -> Path | None:
    """Return the `trust.toml` that is in force, `None` if there is none.

    It is the one that `NEUROGRAFT_TRUST` names (or `--trust`, which sets it), else `neurograft/trust.toml` in the
    user's folder of configuration. What lies in the working directory never counts: whoever fills that could say whom
    to trust.

    Raises:
        TrustError: It can't be looked for, or `NEUROGRAFT_TRUST` is empty.
    """
    given = os.environ.get(VARIABLE)
    if given == "":  # from a script whose variable was not set, which must not mean that everybody is trusted
        raise TrustError(f"--trust or {VARIABLE} is empty, so nothing is trusted; name a trust.toml, or leave it out.")
    if given is not None:
        return Path(given)
    path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "neurograft" / "trust.toml"
    try:
        return path if path.exists() else None
    except OSError as error:
        raise TrustError(f"{path} can't be looked at, so nothing is trusted: {error.strerror or error}.") from error


def read_policy(path: Path) -> Policy:
    """Read a `trust.toml`; the files that it names lie relative to it.

    Raises:
        TrustError: It is missing, no TOML, or says something that is not understood.
    """
    try:
        data = tomllib.loads(read_bounded(path, _LARGEST_POLICY).decode())
        policy = Policy.model_validate(data)
    except OSError as error:
        raise TrustError(
            f"{path}, which says whose organs may be used, can't be read ({error.strerror or error}); mend it, or name "
            f"another with --trust or {VARIABLE}."
        ) from error
    except ValidationError as error:
        raise TrustError(f"{path}: {_explain(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise TrustError(f"{path} is no TOML, so nothing is trusted: {error}.") from error
    policy = _from(policy, path.absolute().parent)
    for name, signer in policy.signers.items():
        _require_file(path, name, signer)
    return policy


def _require_file(path: Path, name: str, signer: Signer) -> None:
    """Refuse a signer whose file is not there, before it is needed: the sentence then says which `trust.toml` it is of.

    Raises:
        TrustError: It is not.
    """
    for kind in ("key", "certificate"):
        file = getattr(signer, kind)
        if file is not None and not file.is_file():
            raise TrustError(
                f"{path} names {file} as the {kind} of the signer {name}, and there is no such file; mend the path "
                "there, which is relative to the trust.toml."
            )


def _explain(error: ValidationError) -> str:
    # an unknown key is why another one seems to be missing
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"the key {place} is not known; known are {', '.join(_known(first['loc']))}"
    if first["type"] == "missing":
        return f"it has no {place}; see docs/trust.md for what it needs"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _known(location: Sequence[Any]) -> list[str]:
    """Return the keys that could stand where an unknown one does."""
    kinds: dict[str, type[BaseModel]] = {"signers": Signer, "allow": Rule}
    kind = kinds.get(str(location[0]), Policy) if len(location) > 1 else Policy
    return list(kind.model_fields)


def _from(policy: Policy, folder: Path) -> Policy:
    """Return a policy whose files have whole paths."""

    def whole(signer: Signer) -> Signer:
        files = {name: folder / path for name in ("key", "certificate") if (path := getattr(signer, name)) is not None}
        return signer.model_copy(update=files)

    return policy.model_copy(update={"signers": {name: whole(signer) for name, signer in policy.signers.items()}})


def require_trust(path: Path, manifest: Manifest, *, called: str) -> None:
    """Refuse an organ that the `trust.toml` in force does not let use; without one, every organ may be used.

    Args:
        path: The organ file.
        manifest: Its manifest, which the signature covers like every other byte.
        called: What it was asked for by: its path, or a reference to it in a bank.

    Raises:
        TrustError: It is unsigned, altered, or signed by nobody who may sign such an organ; or `trust.toml` is broken.
        NeurograftError: The extra is missing, or Sigstore can't be reached.
    """
    where = policy_path()
    if where is None:
        return
    verdict = judge(path, manifest, read_policy(where), where, called=called)
    if verdict.refusal is not None:
        raise TrustError(verdict.refusal)


def judge(path: Path, manifest: Manifest, policy: Policy, where: Path, *, called: str) -> Verdict:
    """Say whether a policy lets an organ be used.

    Args:
        path: The organ file.
        manifest: Its manifest.
        policy: What `where` says.
        where: The policy's file, for messages.
        called: See `require_trust`.

    Raises:
        TrustError: The signatures or a signer's key can't be read.
        NeurograftError: The extra is missing, or Sigstore can't be reached.
    """
    require_library()
    signatures, base = read_signatures(path), manifest.source.model
    if not signatures:
        return Verdict([], _unsigned(path, called, policy, where, base))
    examined = examine(OrganBytes(path), signatures, policy.signers)
    holding = {each.name for each in examined if each.holds}
    rules = [rule for rule in policy.allow if rule.allows_base(base)]
    if any(len(set(rule.signers) & holding) >= rule.needed for rule in rules):
        return Verdict(examined, None)
    return Verdict(examined, _refusal(called, examined, rules, where, base))


def _unsigned(path: Path, called: str, policy: Policy, where: Path, base: str) -> str:
    named = dict.fromkeys(name for rule in policy.allow if rule.allows_base(base) for name in rule.signers)
    whom = f"a signature by {' or '.join(named)}" if named else f"no organ of {base} at all"
    if called != str(path):
        return (
            f"{called} is not signed in that bank, and {where} lets it be used with {whom}; ask who keeps it there, or "
            "pull it, sign it with `neurograft sign` and push it again."
        )
    return (
        f"{path} is not signed (there is no {signature_path(path).name} beside it), and {where} lets it be used with "
        f"{whom}; ask for the .sig, or sign it with `neurograft sign`."
    )


def _refusal(called: str, examined: Sequence[Examined], rules: Sequence[Rule], where: Path, base: str) -> str:
    holding = [str(each.name) for each in examined if each.holds]
    failed = [str(each.reason) for each in examined if each.name is not None and not each.holds]
    if failed:
        return failed[0]
    if not holding:
        return (
            f"{called} is signed by {', '.join(each.signer for each in examined)}, whom {where} does not know; add "
            "them there if they are to be trusted."
        )
    if not rules:
        return f"{called} is an organ of {base}, and {where} lets none of these be used, whoever signed it."
    wanted = ", or ".join(f"{rule.needed} of {', '.join(rule.signers)}" for rule in rules)
    return (
        f"{called} is signed by {', '.join(holding)}, and {where} wants for an organ of {base} signatures by {wanted}."
    )
