"""One host behind its drivers' doors, simulated or real: what the contract suite is run on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from casemate_agent.drivers.ports import DomainFacts, Hypervisor, Images, Machine, Networks, Survey
from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_agent.drivers.volumeports import Volumes
from casemate_agent.sandbox import Sandbox
from casemate_core.spec.instance import DesiredInstance, ImageRef
from casemate_core.topology_loaders import from_line
from support.instances import empty_disk, instance
from support.real_host import drivers_on

UIDS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")


@dataclass(slots=True)
class Bench:
    """The ports of a host, and an image that it can fetch."""

    hypervisor: Hypervisor
    images: Images
    networks: Networks
    machine: Machine
    survey: Survey
    image: ImageRef
    volumes: Volumes

    def wanted(self, number: int = 0, **changes: object) -> DesiredInstance:
        """A small instance that boots nothing."""
        return instance(
            UIDS[number], **({"image": self.image, "memory_mib": 64, "disk_mib": 16, "name": f"n{number}"} | changes)
        )

    async def prepared(self, desired: DesiredInstance) -> DesiredInstance:
        """Everything made that comes before the start."""
        await self.images.fetch(desired.image, 60)
        await self.images.create_overlay(desired.uid, desired.image, desired.disk_mib, 20)
        await self.images.write_seed(desired, 20)
        for volume in desired.volumes:
            await self.volumes.create(volume, 20)
        paths = tuple(self.volumes.path(volume.uid) for volume in desired.volumes)
        await self.hypervisor.define(desired, replace(self.images.files(desired), volumes=paths), 20)
        return desired

    async def facts(self, uid: str) -> DomainFacts | None:
        """The domain of an instance, as it is listed."""
        return next((d for d in await self.hypervisor.domains(20) if d.uuid == uid), None)

    async def until(self, uid: str, condition: Callable[[DomainFacts], bool], within_s: float = 20.0) -> DomainFacts:
        """Wait until the listed domain is so."""
        async with asyncio.timeout(within_s):
            while (found := await self.facts(uid)) is None or not condition(found):
                await asyncio.sleep(0.05)
        return found


@asynccontextmanager
async def simulated_bench() -> AsyncIterator[Bench]:
    """A host in memory, quick."""
    now = asyncio.get_running_loop().time
    pace = SimulatedPace(call_s=0.0, fetch_s=0.01, boot_s=0.02, pod_start_s=0.02, power_off_s=0.02)
    drivers = SimulatedHost("box", from_line("1s 4k/c 2t 16G"), now, pace).drivers()
    yield Bench(
        drivers.hypervisor,
        drivers.images,
        drivers.networks,
        drivers.machine,
        drivers.survey,
        instance().image,
        drivers.volumes,
    )


@asynccontextmanager
async def real_bench(sandbox: Sandbox, folder: Path) -> AsyncIterator[Bench]:
    """This machine, with a libvirtd of its own."""
    async with drivers_on(sandbox, folder) as host:
        image = empty_disk(host.sources / "empty.qcow2")
        yield Bench(host.hypervisor, host.images, host.networks, host.machine, host.survey, image, host.volumes)
