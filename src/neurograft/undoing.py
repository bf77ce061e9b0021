"""What has to be undone before an organ can leave a model, and what each layer then was: read off the surgical record.

A layer is known by where it came from, (organ, number there), whatever stands before it now. Transplants and recoveries
change layers one after the other, and only the last training of a layer can be undone exactly. Transplants can leave in
any order: where one replaced layers of another, it takes over what those stood for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neurograft.errors import ModelError, UsageError
from neurograft.manifest import ExplantLayer, Operation, Origin, Recovery, SurgicalRecord

LayerKey = tuple[str | None, int]
Change = tuple[str, set[LayerKey]]
"""Around which organ a recovery was, and what it trained."""
Reasons = dict[str, str]


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
        raise UsageError(f"the model holds no organ named {organ!r}; it holds {', '.join(names)}.")
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
    _verify_whole(record, operation)
    trained = _before_recovery(record, operation.organ)
    present = (OldLayer(position, origin) for position, origin in enumerate(record.layers))
    return [old for layer in present if (old := _without(layer, operation, trained)) is not None]


def operations_without(record: SurgicalRecord, operation: Operation) -> list[Operation]:
    """Return the other transplants, as they would be had one organ never been put in.

    Where one replaced layers of that organ, or layers that were trained around it, it gets what had been there before.
    """
    trained = _before_recovery(record, operation.organ)
    rest = []
    for other in (other for other in record.operations if other is not operation):
        old = [
            None if item is None else _without(OldLayer(item[1], item[0]), operation, trained)
            for item in other.replaced
        ]
        places = [layer.source if layer and isinstance(layer.source, ExplantLayer) else None for layer in old]
        if places != [item[1] if item else None for item in other.replaced]:
            own = any(place is not None and place.path == other.explant for place in places)
            update = {
                "explant": other.explant if own else None,
                "explant_origins": [layer.origin if layer else None for layer in old],
                "explant_places": places,
            }
            other = other.model_copy(update=update)
        rest.append(other)
    return rest


def _without(layer: OldLayer, operation: Operation, trained: Mapping[LayerKey, OldLayer]) -> OldLayer | None:
    """Return what one layer would be without an organ; `None` if there would be nothing in its place.

    Args:
        layer: What it is.
        operation: The organ's transplant.
        trained: What the layers that were trained around the organ were before; see `_before_recovery`.
    """
    if layer.origin.organ != operation.organ:
        return trained.get(key_of(layer.origin), layer)
    replaced = operation.replaced[layer.origin.layer] if operation.mode == "replace" else None
    return None if replaced is None else OldLayer(replaced[1], replaced[0])


def _verify_whole(record: SurgicalRecord, operation: Operation) -> None:
    """Check that each layer of an organ that replaced others is in the model, or in what another organ replaced.

    Raises:
        ModelError: One is missing.
    """
    kept = [item[0] for other in record.operations for item in other.replaced if item is not None]
    own = {origin.layer for origin in [*record.layers, *kept] if origin.organ == operation.organ}
    if operation.mode == "replace" and own != set(range(len(operation.explant_origins))):
        raise ModelError(f"the surgical record does not list all layers of {operation.organ}.")


def _before_recovery(record: SurgicalRecord, organ: str) -> dict[LayerKey, OldLayer]:
    """Return what the layers that were trained around an organ had been before the first such training."""
    before: dict[LayerKey, OldLayer] = {}
    for recovery in record.recoveries:
        for changed in recovery.changed:
            if recovery.organ == organ and changed.explant is not None:
                place = ExplantLayer(path=changed.explant, layer=changed.explant_layer)
                old = OldLayer(place, changed.origin)
                before.setdefault(key_of(changed.origin), old)
    return before


def refuse_blocked_removal(record: SurgicalRecord, organ: str) -> None:
    """Refuse to remove an organ before others around which what had been trained around it was trained again.

    Raises:
        UsageError: One sentence names what has to go first, and why.
    """
    inside = {operation.organ for operation in record.operations}
    blockers = _blockers(_changes(record), organ, inside)
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
        free = {name for name in inside if not _blockers(changes, name, inside)}
        if not free:
            raise UsageError(
                f"after this recovery none of {', '.join(sorted(inside))} could be removed before the others, since "
                "each would have been trained over what was trained around another; train fewer neighbours, or "
                "remove one of them and transplant it again."
            )
        inside -= free


def _changes(record: SurgicalRecord) -> list[Change]:
    return [(recovery.organ, {key_of(layer.origin) for layer in recovery.changed}) for recovery in record.recoveries]


def _blockers(changes: Sequence[Change], organ: str, inside: set[str]) -> Reasons:
    """Return which of the organs `inside` have to go before `organ`, each with the reason.

    Args:
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
    paths = [item[1].path for operation in operations for item in operation.replaced if item is not None]
    paths += [layer.explant for recovery in recoveries for layer in recovery.changed if layer.explant is not None]
    return list(dict.fromkeys(paths))
