"""What has to be undone before an organ can leave a model, and what each layer then was: read off the surgical record.

A layer is known by where it came from, (organ, number there), whatever stands before it now. Transplants and recoveries
change layers one after the other, and only the last change of a layer can be undone exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neurograft.errors import ModelError, UsageError
from neurograft.manifest import Operation, Origin, Recovery, SurgicalRecord

LayerKey = tuple[str | None, int]
Change = tuple[str, set[LayerKey]]
"""Around which organ a recovery was, and what it trained."""
Reasons = dict[str, str]


@dataclass(frozen=True)
class ExplantLayer:
    """One layer in one of the explants beside a model."""

    path: str
    """Relative to the model directory."""
    layer: int


@dataclass(frozen=True)
class OldLayer:
    """One layer of a model without an organ: which layer of the present model it is, or which explant holds it."""

    source: int | ExplantLayer
    origin: Origin


def choose_operation(record: SurgicalRecord, organ: str | None) -> Operation:
    """Find the transplant of an organ by the organ's name, which may be left out where there is only one.

    Raises:
        UsageError: There is none of that name, or there are several and none is named.
    """
    names = [operation.organ for operation in record.operations]
    if organ is None and len(names) == 1:
        return record.operations[0]
    if organ is None:
        raise UsageError(f"the model holds several organs ({', '.join(names)}); say which one with --organ.")
    if organ not in names:
        raise UsageError(f"the model holds no organ named {organ}; it holds {', '.join(names)}.")
    return record.operations[names.index(organ)]


def key_of(origin: Origin) -> LayerKey:
    """Return what a layer is known by."""
    return origin.organ, origin.layer


def label_of(origin: Origin) -> str:
    """Name a layer for people."""
    return f"layer {origin.layer} of {origin.organ}" if origin.organ else f"the original's layer {origin.layer}"


def layers_without(record: SurgicalRecord, operation: Operation) -> list[OldLayer]:
    """Say what each layer of the model would be without one organ.

    Its layers go, or make room for those that they replaced; what was trained around it becomes what it was before.

    Raises:
        UsageError: Another organ has to go first.
        ModelError: The record contradicts itself.
    """
    refuse_blocked_removal(record, operation.organ)
    own = {origin.layer for origin in record.layers if origin.organ == operation.organ}
    if operation.mode == "replace" and own != set(range(len(operation.explant_origins))):
        raise ModelError(f"the surgical record does not list all layers of {operation.organ}.")
    before = _before_recovery(record, operation.organ)
    layers = []
    for position, origin in enumerate(record.layers):
        if origin.organ != operation.organ:
            layers.append(before.get(key_of(origin)) or OldLayer(position, origin))
        elif operation.mode == "replace" and operation.explant is not None:
            layers.append(
                OldLayer(ExplantLayer(operation.explant, origin.layer), operation.explant_origins[origin.layer])
            )
    return layers


def _before_recovery(record: SurgicalRecord, organ: str) -> dict[LayerKey, OldLayer]:
    """Return what the layers that were trained around an organ had been before the first such training."""
    before: dict[LayerKey, OldLayer] = {}
    for recovery in record.recoveries:
        for changed in recovery.changed:
            if recovery.organ == organ and changed.explant is not None:
                old = OldLayer(ExplantLayer(changed.explant, changed.explant_layer), changed.origin)
                before.setdefault(key_of(changed.origin), old)
    return before


def refuse_blocked_removal(record: SurgicalRecord, organ: str) -> None:
    """Refuse to remove an organ before others that were put over it, or trained over what was trained around it.

    Raises:
        UsageError: One sentence names what has to go first, and why.
    """
    inside = {operation.organ for operation in record.operations}
    blockers = _blockers(record.operations, _changes(record), organ, inside)
    if blockers:
        name, reason = next(reversed(blockers.items()))
        raise UsageError(f"{reason}; remove {name} first.")


def refuse_entangled(record: SurgicalRecord, organ: str, origins: Sequence[Origin]) -> None:
    """Refuse a recovery after which some organs could each be removed only after the other.

    Args:
        record: The record as it is.
        organ: Around which organ the recovery would be.
        origins: Every layer that it may change.

    Raises:
        UsageError: One sentence names the organs.
    """
    changes = [*_changes(record), (organ, {key_of(origin) for origin in origins})]
    inside = {operation.organ for operation in record.operations}
    while inside:
        free = {name for name in inside if not _blockers(record.operations, changes, name, inside)}
        if not free:
            raise UsageError(
                f"after this recovery none of {', '.join(sorted(inside))} could be removed before the others, since "
                "each would have been trained over what was trained around another; train fewer neighbours, or "
                "remove one of them and transplant it again."
            )
        inside -= free


def _changes(record: SurgicalRecord) -> list[Change]:
    return [(recovery.organ, {key_of(layer.origin) for layer in recovery.changed}) for recovery in record.recoveries]


def _blockers(operations: Sequence[Operation], changes: Sequence[Change], organ: str, inside: set[str]) -> Reasons:
    """Return which of the organs `inside` have to go before `organ`, each with the reason.

    Args:
        operations: All transplants.
        changes: All recoveries, first to last.
        organ: The organ that is to go.
        inside: The organs that are still there, this one included.
    """
    found: Reasons = {}
    trained: set[LayerKey] = set()  # what has to become again what it was
    for name, changed in ((name, changed) for name, changed in changes if name in inside):
        if name == organ:
            trained |= {key for key in changed if key[0] is None or key[0] in inside - {organ}}
        elif both := trained & changed:
            found[name] = f"the recovery around {name} trained {_name(both)} after that around {organ}"
    for other in (other for other in operations if other.organ in inside - {organ}):
        covered = {key_of(origin) for origin in other.explant_origins}
        if any(owner == organ for owner, _ in covered):
            found[other.organ] = f"the organ {other.organ} replaced layers of {organ}"
        elif both := covered & trained:
            found[other.organ] = (
                f"the organ {other.organ} replaced {_name(both)}, which the recovery around {organ} had trained"
            )
    return found


def _name(keys: set[LayerKey]) -> str:
    owner, layer = min(keys, key=lambda key: (key[0] or "", key[1]))
    return label_of(Origin(organ=owner, layer=layer, digest="0" * 64))


def recoveries_without(record: SurgicalRecord, organ: str) -> list[Recovery]:
    """Return what is left of the recoveries once an organ is out: not those around it, nor what they say of its layers.

    Its name may be used again, and what was said of its layers must not be taken for the new ones.
    """
    return [
        recovery.model_copy(update={"changed": [layer for layer in recovery.changed if layer.origin.organ != organ]})
        for recovery in record.recoveries
        if recovery.organ != organ
    ]


def explants_of(operations: Sequence[Operation], recoveries: Sequence[Recovery]) -> list[str]:
    """Return the paths of the explants that some transplants and recoveries need, each once."""
    paths = [operation.explant for operation in operations]
    paths += [layer.explant for recovery in recoveries for layer in recovery.changed]
    return list(dict.fromkeys(path for path in paths if path is not None))
