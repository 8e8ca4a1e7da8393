"""A fleet in memory for tests of the manager: the state machine, folded and checked after each command."""

from casemate_core.spec.environment import Cpu, Environment, EnvironmentSpec, Memory
from casemate_core.spec.fleet import Image, ImageSpec, Network, NetworkSpec
from casemate_core.spec.instance import File, InstanceState, Phase
from casemate_core.spec.meta import Meta
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.app import make_rules
from casemate_manager.fleet import desired
from casemate_manager.fleet.commands import (
    Advance,
    Advanced,
    Answer,
    ApplyAnswer,
    ApplyResources,
    Batch,
    Command,
    DeleteAnswer,
    DeleteResource,
    HostFacts,
    HostHello,
    HostInventory,
    Object,
)
from casemate_manager.fleet.machine import apply
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import Put, Record
from casemate_manager.fleet.state import State
from casemate_wire.stream import Facts, Hello, HostReport, Inventory

SMALL = "1s 4k/c 1t 8G disk=100G"
DIGEST = "sha256:" + "0" * 64


def image(name: str = "debian") -> Image:
    return Image(Meta(name), ImageSpec(File("file:///images/x.qcow2", DIGEST), "qcow2", size_mib=1024))


def network(name: str = "default", subnet: str = "10.99.0.0/24") -> Network:
    return Network(Meta(name), NetworkSpec("nat", subnet))


def environment(name: str = "hello", *, cpus: int = 1, memory_mib: int = 512, **fields: object) -> Environment:
    """An environment of tenant ``default``; ``fields`` are those of its spec."""
    spec = EnvironmentSpec(Cpu(cpus), Memory(memory_mib), "debian", **fields)  # type: ignore[arg-type]
    return Environment(Meta(name, "default"), spec)


def topology(line: str = SMALL) -> Topology:
    return from_line(line)


class SmallFleet:
    """Commands in, answers out; every invariant is checked after each, and the indexes against a fresh load."""

    def __init__(self, epoch: int = 1) -> None:
        self.state = State(epoch)
        self.observed = Observed()
        self.rules = make_rules()
        self.now_s = 1_800_000_000.0
        self.counter = 0
        self.records: dict[tuple[str, str], Record] = {}

    def do(self, command: Command) -> Answer:
        """One command; raises what the fleet raises, and then nothing has changed."""
        self.now_s += 1.0
        return self.fold(apply(self.state, self.observed, command, self.now_s, self.rules)).answer

    def fold(self, batch: Batch) -> Batch:
        before = self.state.revision
        self.woken = desired.affected(self.state, batch)
        self.state.fold(batch)
        for sighting in batch.sightings:
            self.observed.fold(sighting)
        assert self.state.revision == before + bool(batch.records)
        assert len(batch.records) <= 128
        assert self.state.check() == []
        return batch

    def settle(self) -> None:
        """The work that follows, to its end."""
        for _ in range(200):
            answer = self.do(Advance("seed"))
            assert isinstance(answer, Advanced)
            if not answer.again:
                return
        raise AssertionError("the work never ends")

    def next(self) -> str:
        self.counter += 1
        return f"key-{self.counter}"

    def apply(self, *objects: Object, key: str = "", settle: bool = True) -> ApplyAnswer:
        answer = self.do(ApplyResources(key or self.next(), objects, f"seed-{self.counter}"))
        assert isinstance(answer, ApplyAnswer)
        if settle:
            self.settle()
        return answer

    def delete(self, kind: str, name: str, key: str = "", uid: str = "") -> DeleteAnswer:
        answer = self.do(DeleteResource(key or self.next(), kind, "default", name, uid))
        assert isinstance(answer, DeleteAnswer)
        self.settle()
        return answer

    def hello(self, name: str, session: int, boot_id: str = "boot") -> Answer:
        return self.do(HostHello(Hello(name, boot_id, 0, 0, "digest", session), f"seed-{name}"))

    def join(self, name: str, session: int = 1, line: str = SMALL) -> None:
        """A host dials and tells everything."""
        self.hello(name, session)
        self.do(HostInventory(name, session, Inventory("digest", topology(line))))
        self.tell(name, session, snapshot=True)
        self.settle()

    def tell(
        self,
        name: str,
        session: int,
        *states: InstanceState,
        gone: tuple[str, ...] = (),
        snapshot: bool = False,
        report: HostReport | None = None,
    ) -> None:
        self.do(HostFacts(name, session, Facts(1, snapshot, states, gone, report or HostReport())))
        self.settle()

    def obey(self, name: str, session: int = 1) -> None:
        """The host does what it should, and says so."""
        keep, end = desired.whole(self.state, name)
        self.tell(name, session, *(told(i.uid, Phase.READY) for i in keep), gone=end)

    def reload(self) -> State:
        """The state as a new manager would load it."""
        tables = (
            self.state.environments,
            self.state.specs,
            self.state.instances,
            self.state.placements,
            self.state.hosts,
            self.state.inventories,
            self.state.requests,
            self.state.tokens,
            self.state.enrolments,
            self.state.images,
            self.state.networks,
            self.state.policies,
            self.state.tenants,
            self.state.users,
            self.state.role_bindings,
            self.state.access_keys,
            self.state.secrets,
            self.state.volumes,
            self.state.events,
            self.state.operations,
            self.state.gpus,
        )
        records: list[Record] = [record for table in tables for record in table.values()]  # type: ignore[attr-defined]
        return State.of(self.state.epoch, self.state.revision, records)


def told(uid: str, phase: Phase, generation: int = 1) -> InstanceState:
    return InstanceState(uid, generation, phase)


__all__ = ["Put", "SmallFleet", "environment", "image", "network", "told", "topology"]
