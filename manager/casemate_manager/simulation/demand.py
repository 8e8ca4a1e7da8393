"""What is asked of a simulated fleet: shapes of environments, and how they reach the scheduler.

May live here: the mix of shapes and the placer that reads them. An environment carries the name of its shape as a label.
GPUs, virtual functions, devices and shares that environments cannot ask for yet are added by `ShapePlacer` to the request
that the production placer makes, so that everything behind it (scheduler, claims, records, commits, sessions) is the same.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from casemate_core.claims import HostClaims
from casemate_core.fit import DeviceRequest, Fit, GpuLink, GpuRequest, Near, NicRequest, Request, fit
from casemate_core.spec.environment import Cpu, Environment, EnvironmentSpec, Memory, PlacementRules
from casemate_core.spec.meta import Meta
from casemate_core.topology import Topology
from casemate_manager.fleet.placing import request_of
from casemate_manager.scheduler.placer import FleetPlacer

TENANT = "default"
IMAGE = "debian"
SHAPE = "shape"
GIB_KIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of environment: how often it comes, what its spec says, and what is added to its request."""

    name: str
    weight: int
    cpu: Cpu
    memory: Memory
    gpus: tuple[GpuRequest, ...] = ()
    nics: int = 0
    near: Near = Near.ANY
    devices: tuple[DeviceRequest, ...] = ()
    replicas: tuple[int, ...] = (1,)
    gang: bool = False

    def request(self, request: Request, networks: tuple[str, ...]) -> Request:
        """The request of the spec, with what the spec cannot say. ``networks``: those that VFs reach."""
        nics = tuple(NicRequest(networks[i % len(networks)], self.near) for i in range(self.nics)) if networks else ()
        return replace(request, gpus=self.gpus, nics=nics, devices=self.devices)

    def amounts(self, cpu: Cpu) -> dict[str, int]:
        """What one instance with these CPUs takes, roughly; see `amounts_of`. Amounts of zero are left out."""
        threads = max(cpu.count, cpu.max) * (2 if cpu.threads == "isolate" else 1)
        pages, size = self.memory.hugepages_kib, max(self.memory.size_mib, self.memory.max_mib)
        found = {
            "isolated" if cpu.realtime else "threads": threads,
            f"pages-{pages}" if pages else "memory": size,
            "gpus": sum(1000 * g.count for g in self.gpus),  # slices fragment: counted whole
            "vfs": self.nics,
            "devices": sum(d.count for d in self.devices),
        }
        return {what: n for what, n in found.items() if n}

    def environment(self, name: str, replicas: int, *, run: str = "started", cpu: Cpu | None = None) -> Environment:
        """An environment of this shape."""
        spec = EnvironmentSpec(
            cpu or self.cpu,
            self.memory,
            IMAGE,
            replicas=replicas,
            disk_mib=4096,
            run=run,
            placement=PlacementRules(),
            gang=self.gang,
        )
        return Environment(Meta(name, TENANT, {SHAPE: self.name}), spec)


def _dedicated(count: int, threads: str = "any", **fields: object) -> Cpu:
    return Cpu(count, policy="dedicated", threads=threads, **fields)  # type: ignore[arg-type]


SHAPES = (
    Shape("small", 24, Cpu(1), Memory(512), replicas=(1, 2, 4, 8)),
    Shape("shared", 16, Cpu(4), Memory(4096), replicas=(1, 2, 3)),
    Shape("grow", 4, Cpu(2, max=4), Memory(2048, max_mib=4096)),
    Shape("dedicated", 14, _dedicated(2), Memory(4096), replicas=(1, 2, 4)),
    Shape("cores", 10, _dedicated(4, "require"), Memory(8192, cells="one")),
    Shape("isolated", 6, _dedicated(2, "isolate", emulator="isolate"), Memory(4096)),
    Shape("pages-1g", 8, _dedicated(4, "require"), Memory(4096, hugepages_kib=GIB_KIB, cells="one"), nics=1),
    Shape("pages-2m", 6, Cpu(2), Memory(1024, hugepages_kib=2048)),
    Shape("gang", 2, _dedicated(4), Memory(8192), replicas=(3, 4), gang=True),
    Shape("wide", 2, _dedicated(24), Memory(32768, cells="prefer")),
    Shape(
        "realtime", 4, _dedicated(2, "isolate", realtime=True), Memory(2048, hugepages_kib=GIB_KIB, cells="one"), nics=2
    ),
    Shape("gpu-1", 10, _dedicated(4), Memory(16384), (GpuRequest(1),)),
    Shape("gpu-2", 5, _dedicated(8), Memory(32768), (GpuRequest(2),), nics=1),
    Shape("gpu-4", 2, _dedicated(16), Memory(65536), (GpuRequest(4, link=GpuLink.NVLINK),)),
    Shape("gpu-8", 1, _dedicated(32), Memory(131072), (GpuRequest(8, link=GpuLink.NVLINK),)),
    Shape("gpu-nic", 3, _dedicated(4), Memory(16384), (GpuRequest(1, local=True),), nics=1, near=Near.ROOT),
    Shape(
        "device",
        3,
        _dedicated(2, "require", emulator="isolate"),
        Memory(2048, hugepages_kib=GIB_KIB, cells="one"),
        nics=1,
        devices=(DeviceRequest((("type", "fec"),), local=True),),
    ),
    Shape("gpu-part", 6, Cpu(2), Memory(4096), (GpuRequest(1, share_milli=250),)),
)


def networks_of(machines: Iterable[Topology]) -> tuple[str, ...]:
    """Networks that virtual functions of these machines reach."""
    return tuple(sorted({name for machine in machines for pf in machine.pfs for name in pf.networks}))


def amounts_of(machines: Iterable[Topology]) -> Counter[str]:
    """What a fleet has, by the names of `Shape.amounts`.

    Threads, MiB plain and of each page size, thousandths of GPUs, VFs, devices.
    """
    found: Counter[str] = Counter()
    for machine in machines:
        index = machine.index
        found["threads"] += index.pool.bit_count()
        found["isolated"] += index.isolated.bit_count()
        found["gpus"] += 1000 * len(machine.gpus)
        found["vfs"] += sum(len(pf.vfs) for pf in machine.pfs)
        found["devices"] += len(machine.devices)
        for cell in index.cells:
            found["memory"] += cell.plain_mib
            for page_kib, count in cell.pages.items():
                found[f"pages-{page_kib}"] += count * page_kib // 1024
    return found


def shapes_for(machines: Iterable[Topology], networks: tuple[str, ...]) -> tuple[Shape, ...]:
    """The shapes that at least one of the machines takes while it is empty."""
    kinds = list({id(machine): machine for machine in machines}.values())
    found = []
    for shape in SHAPES:
        request = shape.request(request_of(shape.environment("probe", 1).spec), networks)
        empty = HostClaims.empty()
        if any(isinstance(fit(m, empty, request, owner="probe"), Fit) for m in kinds):
            found.append(shape)
    return tuple(found)


class ShapePlacer(FleetPlacer):
    """The production placer, asked for what the shapes say."""

    networks: tuple[str, ...] = ()
    _shapes: ClassVar = {shape.name: shape for shape in SHAPES}

    def request_for(self, environment: Environment, spec: EnvironmentSpec) -> Request:
        """See `FleetPlacer`."""
        request = super().request_for(environment, spec)
        shape = self._shapes.get(environment.meta.labels.get(SHAPE, ""))
        return request if shape is None else shape.request(request, self.networks)
