"""What is left of somebody on this host: looked for, repaired, and told.

For: ``casemate-agent fsck`` and the manager's ``fsck host``. What may live here: one look at all functions, the repair of
those that nobody has, and the findings as values. What is a leak is `casemate_agent.hardware.functions`'.

It asks the machine itself and not the agent's plan, so what it tells is what the kernel has. A repair may run beside the
agent: both lock the functions before they touch one, and a stamp (somebody has it) is read under that lock.
"""

from dataclasses import dataclass
from typing import Protocol

from casemate_agent.drivers.ports import PartitionFacts
from casemate_agent.hardware.functions import FunctionFacts
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import CasemateError

DEADLINE_S = 60.0
#: Findings that are told of one host; it has some hundred functions.
MOST = 2000


class Functions(Protocol):
    """What is used of `casemate_agent.drivers.ports.Functions`."""

    async def observe(self, deadline_s: float) -> FunctionFacts: ...

    async def clean(self, key: str, deadline_s: float) -> None: ...


class Partitions(Protocol):
    """What is used of `casemate_agent.drivers.ports.Partitions`."""

    async def look(self, pids: tuple[int, ...], deadline_s: float) -> PartitionFacts: ...

    async def reclaim(self, cpus: CpuSet, deadline_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One function, or threads that partitions left.

    ``kind``: held, lost, leak, problem, repaired, unrepaired. ``owner``: uid of its instance.
    """

    kind: str
    function: str
    detail: str
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """All of one look: after the repair, where there was one."""

    facts: FunctionFacts
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Nothing is left of anybody, and all is as configured."""
        return all(finding.kind in ("held", "repaired") for finding in self.findings)

    @property
    def free(self) -> int:
        """Functions that nobody has."""
        facts = self.facts
        stamps = [vf.stamp for vf in facts.vfs.values()] + [device.stamp for device in facts.devices.values()]
        return stamps.count(None)


async def look(
    functions: Functions,
    partitions: Partitions,
    isolate: CpuSet,
    *,
    repair: bool,
    deadline_s: float = DEADLINE_S,
) -> Found:
    """Look, and repair first where that is asked for. ``isolate``: threads that partitions may have. Raises CasemateError
    where the machine does not answer."""
    facts = await functions.observe(deadline_s)
    done: list[Finding] = []
    if repair:
        for key, vf in sorted(facts.vfs.items()):
            if vf.stamp is not None or vf.is_clean:
                continue
            was = facts.leak(key)
            try:
                await functions.clean(key, deadline_s)
                done.append(Finding("repaired", key, was))
            except CasemateError as error:
                done.append(Finding("unrepaired", key, f"{error.reason}: {error}"))
        if done:
            facts = await functions.observe(deadline_s)
    return Found(facts, (*_findings(facts), *done, *await _left(partitions, isolate, repair, deadline_s)))


async def _left(partitions: Partitions, isolate: CpuSet, repair: bool, deadline_s: float) -> tuple[Finding, ...]:
    """Threads that a slice of VMs may take for itself though no VM of it has them."""
    left = (await partitions.look((), deadline_s)).set_aside & isolate if isolate else EMPTY
    if not left:
        return ()
    what, was = f"threads {left}", "may be taken by a slice of VMs, of which none has them"
    if not repair:
        return (Finding("leak", what, was),)
    try:
        await partitions.reclaim(left, deadline_s)
    except CasemateError as error:
        return (Finding("unrepaired", what, f"{error.reason}: {error}"),)
    return (Finding("repaired", what, was),)


def _findings(facts: FunctionFacts) -> tuple[Finding, ...]:
    lost = facts.lost
    held = [
        Finding("held", key, f"placement {stamp.epoch}.{stamp.generation}", stamp.owner)
        for key, stamp in sorted(facts.stamped().items())
        if key not in lost
    ]
    gone = [Finding("lost", key, "is not on this host any more", stamp.owner) for key, stamp in sorted(lost.items())]
    leaks = [Finding("leak", key, detail) for key, detail in facts.leaking()]
    return (*held, *gone, *leaks, *(Finding("problem", "", problem) for problem in facts.problems))
