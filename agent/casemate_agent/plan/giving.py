"""Which functions an instance is given, keeps, or gives back. PURE.

What may live here: the comparison of grants with what the host shows, for one instance; the plan around it is
:mod:`casemate_agent.plan.converge`. Types and contract are :mod:`casemate_agent.hardware.functions`.
"""

from collections.abc import Mapping
from dataclasses import replace

from casemate_agent.hardware.functions import FunctionFacts, Grant, Stamp


def held_by(owner: str, facts: FunctionFacts) -> dict[str, Stamp]:
    """Functions that carry a stamp of this instance."""
    return {key: stamp for key, stamp in facts.stamped().items() if stamp.owner == owner}


def to_give_back(owner: str, keep: Grant | None, facts: FunctionFacts) -> tuple[Stamp, tuple[str, ...]] | None:
    """What the instance holds and should not, and the stamp to take it back under. ``keep`` None: all of it.

    The stamp is the newest that the instance has here: it ends in all its generations.
    """
    held = held_by(owner, facts)
    kept = set(keep.keys) if keep is not None else set()
    keys = tuple(sorted(held.keys() - kept))
    return (max(held[key] for key in keys), keys) if keys else None


def drifted(grant: Grant, facts: FunctionFacts) -> tuple[str, ...]:
    """What of a running instance's functions is not as it was given, by name."""
    told = []
    for granted in grant.vfs:
        vf = facts.vfs.get(granted.key)
        if vf is None:
            told.append(f"VfGone: {granted.key} of a running instance is not there")
            continue
        found = vf.state
        if granted.state.trust:
            # A trusted guest may change its address: then that is no drift.
            found = replace(found, mac=granted.state.mac)
        if differences := granted.state.differences(found):
            told.append(f"VfChanged: {granted.key}: {'; '.join(differences)}")
        if vf.stamp != grant.stamp:
            told.append(f"StampMissing: {granted.key} does not carry the stamp of its instance")
    for identity in grant.devices:
        device = facts.devices.get(identity)
        if device is None:
            told.append(f"DeviceGone: {identity} of a running instance is not there")
        elif device.stamp != grant.stamp:
            told.append(f"StampMissing: {identity} does not carry the stamp of its instance")
    return tuple(told)


def missing(grant: Grant, facts: FunctionFacts) -> tuple[str, ...]:
    """Functions of a grant that this host does not have now."""
    return tuple(key for key in grant.keys if key not in facts.vfs and key not in facts.devices)


def orphans(known: set[str], facts: FunctionFacts) -> Mapping[str, tuple[Stamp, tuple[str, ...]]]:
    """Functions that carry the stamp of an instance which this host does not know, by that instance."""
    owners = {stamp.owner for stamp in facts.stamped().values()} - known
    found = {owner: to_give_back(owner, None, facts) for owner in sorted(owners)}
    return {owner: answer for owner, answer in found.items() if answer is not None}
