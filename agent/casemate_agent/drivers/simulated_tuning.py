"""Files by which a simulated host is tuned, and its processes.

What may live here: ``ports.Tuning`` on the state of a simulated machine. ``SimulatedHost.tuning`` holds the files; what is not
there, a host does not have.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from casemate_agent.drivers.ports import ProcessFacts
from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_core.cpuset import CpuSet
from casemate_core.errors import MachineError

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


class SimulatedTuning:
    """``ports.Tuning`` of a host in memory."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease

    async def read(self, patterns: tuple[str, ...], deadline_s: float) -> Mapping[str, str]:
        def read() -> dict[str, str]:
            files = self._lease.host.tuning
            return {path: text for path, text in files.items() if any(fnmatchcase(path, p) for p in patterns)}

        return await self._lease.call("tuning", "read", read, deadline_s)

    async def write(self, path: str, text: str, deadline_s: float) -> None:
        def write() -> None:
            if path not in self._lease.host.tuning:
                raise MachineError(f"/{path}: No such file or directory; {text!r} was to be written")
            self._lease.host.tuning[path] = text

        await self._lease.call("tuning", "write", write, deadline_s)

    async def processes(self, pids: tuple[int, ...], deadline_s: float) -> Mapping[int, ProcessFacts]:
        def look() -> dict[int, ProcessFacts]:
            found = {}
            for domain in self._lease.host.domains.values():
                if domain.facts.pid in pids and domain.facts.phase in ACTIVE and domain.desired is not None:
                    claim = domain.desired.placement.claim
                    pages = {p.cell: p.count * p.page_kib for p in claim.pages}
                    locked = claim.memory_mib * 1024 - sum(pages.values()) if claim.realtime else 0
                    found[domain.facts.pid] = ProcessFacts(locked, None, pages)
            return found

        return await self._lease.call("tuning", "processes", look, deadline_s)

    async def confine(self, quiet: CpuSet, deadline_s: float) -> CpuSet:
        def confine() -> CpuSet:
            online = CpuSet(self._lease.host.topology.index.online)
            return online - quiet or online

        return await self._lease.call("tuning", "confine", confine, deadline_s)
