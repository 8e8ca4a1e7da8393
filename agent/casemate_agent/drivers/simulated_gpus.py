"""GPUs of a simulated machine: those of its topology, well until its faults say otherwise.

What may live here: ``gpuports.Gpus`` on the state of a simulated host. Who holds a GPU follows from its domains, as on a real
one from the driver that the card is bound to.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from casemate_agent.drivers.gpuports import GpuParts
from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import GpuFault, GpuReading
from casemate_core.topology import Gpu

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


class SimulatedGpus:
    """``gpuports.Gpus`` of a host in memory; ``SimulatedHost.xids`` holds what its boards have told."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease

    async def read(self, deadline_s: float) -> tuple[GpuParts, ...]:
        host = self._lease.host
        return await self._lease.call("gpus", "read", lambda: tuple(map(self._one, host.topology.gpus)), deadline_s)

    def _one(self, gpu: Gpu) -> GpuParts:
        host = self._lease.host
        held = any(
            gpu.uuid in domain.desired.placement.claim.gpus
            for domain in host.domains.values()
            if domain.desired is not None and domain.facts.phase in ACTIVE
        )
        reading = None
        if not held:
            memory_mib = gpu.memory_mib
            reading = GpuReading(
                gpu.uuid, gpu.place.address, gpu.model, memory_mib=memory_mib, memory_used_mib=0, temperature_c=30
            )
        link = LinkReading(gpu.place.address, "vfio-pci" if held else "nvidia", 32.0, 32.0, 16, 16, 0, 0, 0)
        return GpuParts(gpu.uuid, reading, link)

    async def faults(self) -> AsyncIterator[GpuFault]:
        told = len(self._lease.host.xids)
        while True:
            for fault in self._lease.host.xids[told:]:
                told += 1
                yield fault
            await asyncio.sleep(0.5)
