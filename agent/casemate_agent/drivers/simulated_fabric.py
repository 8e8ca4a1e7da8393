"""A fabric manager in memory, shipped: for simulated hosts and for tests of who decides about partitions.

It keeps what a real one keeps, and refuses what it refuses: two active partitions that share a GPU, a partition that there
is not, anything at all while its version is not the driver's. Its state outlives who speaks with it, as that of a service does.
"""

from dataclasses import dataclass, field

from casemate_agent.drivers.fabricports import FabricBusy, FabricVersionMismatch
from casemate_agent.hardware.fabric import FabricFacts, PartitionState
from casemate_core.errors import NotFound, Unavailable
from casemate_core.topology import Topology


@dataclass(slots=True)
class SimulatedFabric:
    """The manager and its board. ``calls`` has every act that changed something, in order."""

    partitions: dict[int, tuple[int, ...]]
    version: str = "570.86.15"
    driver: str = "570.86.15"
    active: set[int] = field(default_factory=set)
    answers: bool = True
    calls: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def of(cls, topology: Topology) -> "SimulatedFabric":
        """The manager of a host's board: its partitions, by module id."""
        module = {gpu.uuid: gpu.module_id for gpu in topology.gpus}
        return cls({p.id: tuple(sorted(module[uuid] for uuid in p.gpus)) for p in topology.partitions})

    async def observe(self, deadline_s: float) -> FabricFacts:
        self._answer()
        states = tuple(PartitionState(n, modules, n in self.active) for n, modules in sorted(self.partitions.items()))
        return FabricFacts(self.version, self.driver, states)

    async def activate(self, partition: int, deadline_s: float) -> None:
        modules = self._modules(partition)
        if partition in self.active:
            return
        for other in sorted(self.active):
            if set(self.partitions[other]) & set(modules):
                raise FabricBusy(f"partition {partition}: {other} is active and has GPUs of it")
        self.active.add(partition)
        self.calls.append(("activate", partition))

    async def deactivate(self, partition: int, deadline_s: float) -> None:
        self._modules(partition)
        if partition in self.active:
            self.active.remove(partition)
            self.calls.append(("deactivate", partition))

    def _answer(self) -> None:
        if not self.answers:
            raise Unavailable("the fabric manager does not answer")

    def _modules(self, partition: int) -> tuple[int, ...]:
        self._answer()
        if self.version != self.driver:
            raise FabricVersionMismatch(f"fabric manager {self.version}, driver {self.driver}")
        if partition not in self.partitions:
            raise NotFound("fabric partition", str(partition))
        return self.partitions[partition]
