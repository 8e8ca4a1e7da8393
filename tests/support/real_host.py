"""A real host for tests: drivers on folders of the test, and the session's private libvirtd (`support.libvirtd`).

``from support.real_host import real_host`` in a conftest.py makes the fixture. Everything carries the sandbox's scope and
lies under pytest's temporary folder, so that what a test forgot is found and removed.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from casemate_agent import sandbox as sandboxes
from casemate_agent.drivers.fetch import SourceRules
from casemate_agent.drivers.image import ImageStore
from casemate_agent.drivers.libvirt import LibvirtHypervisor, LibvirtSettings
from casemate_agent.drivers.network import HostNetworks
from casemate_agent.drivers.survey import HostSurveyor
from casemate_agent.drivers.sysfs import HostMachine
from casemate_agent.drivers.volumes import VolumeFiles
from casemate_core.spec.instance import DesiredInstance
from support.instances import empty_disk, instance


@dataclass(slots=True)
class RealHost:
    """Drivers of one real host. ``folder`` holds its state and, in ``sources``, what images may come from."""

    sandbox: sandboxes.Sandbox
    folder: Path
    hypervisor: LibvirtHypervisor
    images: ImageStore
    networks: HostNetworks
    machine: HostMachine
    survey: HostSurveyor
    volumes: VolumeFiles

    @property
    def sources(self) -> Path:
        return self.folder / "sources"

    async def prepared(self, desired: DesiredInstance) -> DesiredInstance:
        """Have image, overlay and seed of an instance, and its domain defined."""
        await self.images.fetch(desired.image, 60)
        await self.images.create_overlay(desired.uid, desired.image, desired.disk_mib, 20)
        await self.images.write_seed(desired, 20)
        for volume in desired.volumes:
            await self.volumes.create(volume, 20)
        paths = tuple(self.volumes.path(volume.uid) for volume in desired.volumes)
        await self.hypervisor.define(desired, replace(self.images.files(desired), volumes=paths), 20)
        return desired

    def small(self, uid: str, **changes: object) -> DesiredInstance:
        """An instance of 64 MiB on an empty disk: QEMU runs, nothing boots."""
        ref = empty_disk(self.sources / "empty.qcow2")
        return instance(uid, **({"image": ref, "memory_mib": 64, "disk_mib": 16} | changes))

    async def end(self, uid: str) -> None:
        """End and forget an instance, whatever state it is in."""
        await self.hypervisor.destroy(uid, 20)
        await self.hypervisor.undefine(uid, 20)
        await self.networks.unguard(uid, 20)
        await self.images.remove_instance(uid, 20)


@asynccontextmanager
async def drivers_on(sandbox: sandboxes.Sandbox, folder: Path) -> AsyncIterator[RealHost]:
    """All drivers of a host on ``sandbox``, with their state in ``folder``; its domains and networks end with it."""
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        images = ImageStore(folder / "state", SourceRules(folders=(str(folder / "sources"),)))
        stack.push_async_callback(images.aclose)
        volumes = VolumeFiles(folder / "state")
        stack.callback(volumes.close)
        networks = HostNetworks(sandbox.scope)
        stack.push_async_callback(networks.aclose)
        machine = HostMachine(folder / "state")
        stack.push_async_callback(machine.aclose)
        cache = folder / "state/virtualisation.json"
        survey = HostSurveyor(folder / "state", sandbox.uri, sandbox.scope, cache)
        stack.push_async_callback(survey.aclose)
        settings = LibvirtSettings(
            uri=sandbox.uri,
            run_dir=str(Path(sandbox.directory).parent / "r"),
            instances_dir=str(folder / "state/instances"),
            probe_cache=str(cache),
            scope=sandbox.scope,
        )
        hypervisor = await stack.enter_async_context(LibvirtHypervisor(settings))
        host = RealHost(sandbox, folder, hypervisor, images, networks, machine, survey, volumes)
        try:
            yield host
        finally:
            for facts in await hypervisor.domains(20):
                await hypervisor.destroy(facts.uuid, 20)
                await hypervisor.undefine(facts.uuid, 20)
            await networks.remove_all(20)


@pytest.fixture
async def real_host(sandbox: sandboxes.Sandbox, tmp_path: Path) -> AsyncIterator[RealHost]:
    """A real host with nothing on it, left so."""
    async with drivers_on(sandbox, tmp_path) as host:
        yield host
