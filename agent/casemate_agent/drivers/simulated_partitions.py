"""cpuset partitions of a simulated host.

What may live here: ``ports.Partitions`` on the state of a simulated machine. ``SimulatedHost.permitted`` is what its slice of VMs
may take; a domain's partitions end with its process, and the permission does not, as with the kernel's.
"""

from typing import TYPE_CHECKING

from casemate_agent.drivers.ports import Partition, PartitionFacts, PartitionRefused
from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_core.cpuset import EMPTY, CpuSet

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


class SimulatedPartitions:
    """``ports.Partitions`` of a host in memory."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease

    async def look(self, pids: tuple[int, ...], deadline_s: float) -> PartitionFacts:
        def look() -> PartitionFacts:
            host = self._lease.host
            domains = {
                d.facts.pid: tuple(
                    Partition("isolated", own) if own else Partition("member", cpus)
                    for own, cpus in zip(d.partitions or (EMPTY,) * d.facts.vcpus, d.threads.vcpus, strict=False)
                )
                for d in host.domains.values()
                if d.facts.pid in pids and d.facts.phase in ACTIVE
            }
            return PartitionFacts(domains, host.permitted - host.in_partitions())

        return await self._lease.call("partitions", "look", look, deadline_s)

    async def isolate(self, pid: int, sets: tuple[CpuSet, ...], deadline_s: float) -> None:
        def isolate() -> None:
            host = self._lease.host
            for uid, domain in host.domains.items():
                if domain.facts.pid != pid or domain.facts.phase not in ACTIVE:
                    continue
                for cpus in sets:
                    host.permitted |= cpus
                    if taken := cpus & host.in_partitions(but=uid):
                        raise PartitionRefused(f"threads {taken} are in another partition")
                domain.partitions, domain.undone = sets, False

        await self._lease.call("partitions", "isolate", isolate, deadline_s)

    async def reclaim(self, cpus: CpuSet, deadline_s: float) -> None:
        def reclaim() -> None:
            host = self._lease.host
            host.permitted -= cpus - host.in_partitions()

        await self._lease.call("partitions", "reclaim", reclaim, deadline_s)
