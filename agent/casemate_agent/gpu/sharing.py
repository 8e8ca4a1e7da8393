"""Which GPUs may be cut for an instance now, and which may not be touched because they are. PURE.

What may live here: decisions that need the records of GPUs; types and names of slices are :mod:`casemate_agent.gpu.shares`.
"""

from collections.abc import Iterable, Mapping

from casemate_agent.gpu.lifecycle import State
from casemate_agent.gpu.records import GpuEntry
from casemate_agent.gpu.shares import ShareFacts, promised, shares_of
from casemate_core.claims import Claim
from casemate_core.gpu import ASSIGNABLE, GpuPhase
from casemate_core.topology import Topology


def not_ready(
    owner: str, claim: Claim, entries: Mapping[str, GpuEntry], seen: Mapping[str, ShareFacts]
) -> tuple[str, ...]:
    """Slices of a claim that the instance cannot be given yet, each with why. Those that it has already are its own."""
    found = []
    for share in shares_of(owner, claim):
        entry = entries.get(share.gpu)
        if share.id in seen:
            continue
        if entry is None:
            found.append(f"GPU {share.gpu}: this host has not looked at it yet")
        elif entry.condemned:
            found.append(f"GPU {share.gpu} takes nobody any more: {entry.condemned}")
        elif GpuPhase(entry.record.state) not in ASSIGNABLE:
            found.append(f"GPU {share.gpu} is {entry.record.state}, and is cut for nobody until it is clean")
    return tuple(found)


def cut(
    topology: Topology,
    under_way: Iterable[Claim],
    seen: Mapping[str, ShareFacts] | None,
    entries: Mapping[str, GpuEntry],
) -> frozenset[str]:
    """GPUs that carry slices, or may at any moment: those are not given whole, and not reset. ``under_way``: claims of
    instances with an action under way. ``seen`` None: what is on them is not known, so every one is that could be cut."""
    if seen is not None:
        return promised(under_way) | {facts.gpu for facts in seen.values()}
    could = {gpu.uuid for gpu in topology.gpus if gpu.share_profiles or gpu.share_step_milli}
    owned = {uuid for uuid, e in entries.items() if e.record.state in (State.PREPARED, State.ATTACHED)}
    return promised(under_way) | (could - owned)
