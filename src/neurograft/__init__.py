"""neurograft moves trained slices of decoder-only language models between compatible models."""

from __future__ import annotations

import builtins
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neurograft.bank.cataloguing import list_organs
    from neurograft.bank.cataloguing import tag as tag
    from neurograft.bank.cataloguing import versions as versions
    from neurograft.bank.cataloguing import yank as yank
    from neurograft.bank.moving import pull as pull
    from neurograft.bank.moving import push as push
    from neurograft.caching import cache as cache
    from neurograft.compat import check as check
    from neurograft.composition import compose as compose
    from neurograft.demonstration import demo as demo
    from neurograft.deployment.deploying import deploy as deploy
    from neurograft.deployment.rolling_back import history as history
    from neurograft.deployment.rolling_back import rollback as rollback
    from neurograft.evaluation import evaluate as evaluate
    from neurograft.extraction import extract as extract
    from neurograft.merging import merge as merge
    from neurograft.organ import Organ as Organ
    from neurograft.organ import read_manifest
    from neurograft.placement.proposal import plan as plan
    from neurograft.placement.scan import scan as scan
    from neurograft.privacy.auditing import audit as audit
    from neurograft.privacy.canaries import plant as plant
    from neurograft.recovery import recover as recover
    from neurograft.removal import remove as remove
    from neurograft.reporting.writing import report as report
    from neurograft.study.cross_domain import study_cross_domain as study_cross_domain
    from neurograft.study.paper import study_paper as study_paper
    from neurograft.surgery import attach as attach
    from neurograft.surgery import detach as detach
    from neurograft.surgery import graft as graft
    from neurograft.training.comparison import compare as compare
    from neurograft.training.protocols import train as train
    from neurograft.transplantation import transplant as transplant
    from neurograft.trust.describing import card as card
    from neurograft.trust.provenance import provenance as provenance
    from neurograft.trust.signers import Signer as Signer
    from neurograft.trust.signing import sign as sign
    from neurograft.trust.verifying import verify as verify

    inspect = read_manifest
    list = list_organs

# Loaded at first use: torch and transformers take seconds to import, and `neurograft --help` must not.
_HOMES = {
    "Organ": "organ:Organ",
    "Signer": "trust.signers:Signer",
    "attach": "surgery:attach",
    "audit": "privacy.auditing:audit",
    "cache": "caching:cache",
    "card": "trust.describing:card",
    "check": "compat:check",
    "compare": "training.comparison:compare",
    "compose": "composition:compose",
    "demo": "demonstration:demo",
    "deploy": "deployment.deploying:deploy",
    "detach": "surgery:detach",
    "evaluate": "evaluation:evaluate",
    "extract": "extraction:extract",
    "graft": "surgery:graft",
    "history": "deployment.rolling_back:history",
    "inspect": "organ:read_manifest",
    "list": "bank.cataloguing:list_organs",
    "merge": "merging:merge",
    "plan": "placement.proposal:plan",
    "plant": "privacy.canaries:plant",
    "provenance": "trust.provenance:provenance",
    "pull": "bank.moving:pull",
    "push": "bank.moving:push",
    "recover": "recovery:recover",
    "remove": "removal:remove",
    "report": "reporting.writing:report",
    "rollback": "deployment.rolling_back:rollback",
    "scan": "placement.scan:scan",
    "sign": "trust.signing:sign",
    "study_cross_domain": "study.cross_domain:study_cross_domain",
    "study_paper": "study.paper:study_paper",
    "tag": "bank.cataloguing:tag",
    "train": "training.protocols:train",
    "transplant": "transplantation:transplant",
    "verify": "trust.verifying:verify",
    "versions": "bank.cataloguing:versions",
    "yank": "bank.cataloguing:yank",
}
__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module neurograft has no attribute {name}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"neurograft.{module}"), attribute)


def __dir__() -> builtins.list[str]:
    return __all__
