"""A whole host in memory, behind the same doors as a real one.

What may live here: the simulated machine; its doors are :mod:`casemate_agent.drivers.simulated_ports`. It is shipped:
``casemate-agent --simulated`` gives a fleet without libvirt, and every test of the agent runs on it; it passes the
contract suite of the real drivers.

Theory of operation. :class:`SimulatedHost` is the machine. It outlives agents: ``drivers()`` is what one agent's process
holds, and taking new ones severs the old, whose calls then never return, like those of a process that was killed. An
operation takes simulated time, half before its effect and half after, so that a killed agent leaves either. The machine is
as strict as a real one: a domain does not start without its disk, seed and bridge; a bridge with a running tap is not
removed; what is on the disk fills it. Faults are asked of it by name. Time is the event loop's; ``now`` is the wall clock.
"""

from collections import Counter
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from casemate_agent.drivers.ports import DomainEvent, DomainFacts, DomainPhase, Drivers, GuestEvent, GuestGone
from casemate_agent.drivers.simulated_domain import ACTIVE, SimulatedDomain, later, tap_name, uuid_of
from casemate_agent.drivers.simulated_fabric import SimulatedFabric
from casemate_agent.drivers.simulated_functions import Cards
from casemate_agent.drivers.simulated_gpus import DRIVER, VFIO, Board
from casemate_agent.drivers.simulated_guest import PROGRAMS, SimulatedGuest
from casemate_agent.drivers.simulated_ports import Lease, drivers_of
from casemate_agent.drivers.simulated_volumes import SimulatedVolume
from casemate_agent.gpu.readings import GpuFault
from casemate_agent.gpu.shares import ShareFacts
from casemate_agent.hardware.functions import CLEAN, grant_of
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.instance import HostNetwork, bridged
from casemate_core.topology import Topology

__all__ = ["ACTIVE", "Faults", "SimulatedHost", "SimulatedPace", "tap_name"]


#: Lines of a serial console that are kept.
SERIAL_LINES = 1000


#: The simulated hosts of this process, as long as somebody holds them.
NEIGHBOURS: "MutableMapping[str, SimulatedHost]" = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class SimulatedPace:
    """How long things take on a simulated host, in seconds."""

    call_s: float = 0.002
    fetch_s: float = 0.5
    boot_s: float = 2.0
    pod_start_s: float = 1.0
    power_off_s: float = 0.5
    move_s: float = 1.0


@dataclass(slots=True)
class Faults:
    """What is wrong with the machine at the moment."""

    #: Ports whose calls do not return: ``hypervisor``, ``images``, ``networks``, ``machine``, ``guests``, ``functions``,
    #: ``volumes``, ``cards``, ``gpus``.
    hung: set[str] = field(default_factory=set)
    #: Ports whose driver has a defect: its calls raise what no port may raise.
    defective: set[str] = field(default_factory=set)
    #: Method name -> how many calls of it fail.
    failing: Counter[str] = field(default_factory=Counter)
    disk_full: bool = False
    #: Guests that ignore a request to power off, by uid.
    stubborn: set[str] = field(default_factory=set)
    #: Why the machine has no KVM; empty: guests run as on any simulated host.
    no_kvm: str = ""
    #: What its kernel cannot do of guests' networks.
    no_rules: str = ""
    #: Digests whose source has other content.
    wrong_digests: set[str] = field(default_factory=set)


class SimulatedHost:
    """One simulated machine. Make it within a running event loop, or hand ``later`` in."""

    def __init__(
        self, name: str, topology: Topology, now: Callable[[], float], pace: SimulatedPace | None = None
    ) -> None:
        self.name = name
        self.topology = topology
        self.now = now
        self.pace = pace or SimulatedPace()
        self.faults = Faults()
        self.boots = 1
        self.domains: dict[str, SimulatedDomain] = {}
        self.images: dict[str, str] = {}
        self.overlays: dict[str, int] = {}
        #: Numbers of the root disks of each instance.
        self.disks: dict[str, set[int]] = {}
        self.seeds: dict[str, str] = {}
        self.volumes: dict[str, SimulatedVolume] = {}
        #: How often each was made: more than once is data lost.
        self.volumes_made: Counter[str] = Counter()
        self.strays: set[str] = set()
        self.bridges: dict[str, HostNetwork] = {}
        self.guards: dict[str, tuple[str, str]] = {}
        #: Taps that somebody put on another bridge, or on none ("").
        self.plugs: dict[str, str] = {}
        #: What each guest wrote to its serial console: (time, bytes).
        self.serial: dict[str, list[tuple[float, bytes]]] = {}
        #: What its GPUs have told of themselves.
        self.xids: list[GpuFault] = []
        self.cards = Cards()
        #: What the guest of an instance says when it is asked for its GPUs, where that is not what its boards are.
        self.guest_gpus: dict[str, bytes] = {}
        #: Commands that its guests know.
        self.guest_programs = set(PROGRAMS)
        #: Files of its kernel by which it is tuned, by path.
        self.tuning: dict[str, str] = {}
        #: vGPUs that there are, by name.
        self.vgpus: dict[str, ShareFacts] = {}
        #: Boards that anything was done to, by UUID.
        self.boards: dict[str, Board] = {}
        #: Its board's fabric manager, where there is one. A service of the host: it outlives agents, and not the host.
        self.fabric = SimulatedFabric.of(topology) if topology.partitions else None
        #: Threads that a cpuset partition isolates while a VM has them, and what the slice of VMs may take for itself.
        self.partitionable = EMPTY
        self.permitted = EMPTY
        self._pids = 1000
        self._guest_boots = 0
        self._lease: Lease | None = None
        #: Other simulated hosts of this process by name, to which instances can move.
        self.neighbours: MutableMapping[str, SimulatedHost] = NEIGHBOURS
        self.neighbours[name] = self

    @property
    def lease(self) -> Lease | None:
        """What the agent's process that lives holds."""
        return self._lease

    @property
    def boot_id(self) -> str:
        return uuid_of(f"{self.name}/boot/{self.boots}")

    def board(self, uuid: str) -> Board:
        """A GPU's board."""
        return self.boards.setdefault(uuid, Board())

    def drivers(self) -> Drivers:
        """What an agent's process holds of this machine. The one that held it before is dead."""
        self.sever()
        self._lease = Lease(self)
        return drivers_of(self._lease)

    def sever(self) -> None:
        """The agent's process is dead: none of its calls returns or has an effect any more."""
        if self._lease is not None:
            self._lease.alive = False
            self._lease = None

    # --- what happens to a machine ---

    def reboot(self) -> None:
        """Power cycle: domains are off, the network is bare, the agent is dead; disks stay."""
        self.sever()
        self.boots += 1
        for uid in list(self.domains):
            self.end(uid, DomainPhase.SHUT_OFF, "host rebooted")
        self.bridges.clear()
        self.guards.clear()
        self.plugs.clear()
        self.permitted = EMPTY
        self.cards.reboot()
        for board in self.boards.values():
            board.driver = DRIVER  # what was bound by hand is bound no more; memory of a board may outlive a warm boot
        self.vgpus.clear()  # made by a driver that begins anew
        if self.fabric is not None:
            self.fabric.active.clear()

    def crash_domain(self, uid: str) -> None:
        """Its QEMU is killed."""
        self.end(uid, DomainPhase.SHUT_OFF, "crashed")

    def vanish_domain(self, uid: str) -> None:
        """Someone ends and undefines it behind our back."""
        self.end(uid, DomainPhase.SHUT_OFF, "destroyed by someone")
        self.domains.pop(uid, None)
        self.tell(uid, "undefined")

    def reboot_guest(self, uid: str) -> None:
        """The guest reboots inside its QEMU, whose process stays."""
        domain = self.domains.get(uid)
        if domain is not None and domain.guest is not None and domain.facts.phase in ACTIVE:
            domain.guest.end()
            self.push(GuestGone(uid))
            domain.guest = self.boot_guest(uid)

    def add_foreign(self, name: str, vcpus: int = 1, memory_mib: int = 512) -> str:
        """A running VM that is not ours; returns its uuid."""
        uid = uuid_of(f"{self.name}/foreign/{name}")
        facts = DomainFacts(
            uid, name, DomainPhase.RUNNING, owned=False, pid=self.new_pid(), vcpus=vcpus, memory_mib=memory_mib
        )
        self.domains[uid] = SimulatedDomain(facts)
        return uid

    def check(self) -> list[str]:
        """Every rule that a machine of ours would break, were it to stay as it is."""
        found = []
        for uid, domain in self.domains.items():
            desired = domain.desired
            if desired is None or domain.facts.phase not in ACTIVE:
                continue
            if desired.disk not in self.disks.get(uid, ()) or uid not in self.seeds:
                found.append(f"{uid} runs without its disk or its seed")
            if desired.image.file.digest not in self.images:
                found.append(f"{uid} runs without its image")
            for index, nic in enumerate(bridged(desired.nics)):
                if nic.network not in self.bridges:
                    found.append(f"{uid} runs without bridge of network {nic.network}")
                if self.guards.get(tap_name(uid, index)) != (nic.mac, nic.address):
                    found.append(f"{uid} runs with a tap that is not guarded")
                if tap_name(uid, index) in self.plugs:
                    found.append(f"{uid} runs with a tap that is not on its bridge")
            found += self._check_functions(uid, domain)
            found += self._check_threads(uid, domain)
            found += [f"{uid} runs without its volume {v.name}" for v in desired.volumes if v.uid not in self.volumes]
            found += self._check_gpus(uid, domain)
        for volume in self.volumes:
            if len(users := self.volume_users(volume)) > 1:
                found.append(f"volume {volume} is open in {' and '.join(users)}")
        found += [f"volume {volume} was made {count} times" for volume, count in self.volumes_made.items() if count > 1]
        return found

    def _check_threads(self, uid: str, domain: SimulatedDomain) -> list[str]:
        """Nobody else may run on threads of a domain that runs."""
        assert domain.desired is not None
        claim = domain.desired.placement.claim
        owned, found = claim.owned, []
        alone = EMPTY
        for own in domain.partitions:
            alone |= own
        loud = (CpuSet.from_ids(claim.vcpus[: claim.vcpus_online]) | claim.held) & self.partitionable - alone
        if loud and domain.facts.phase is DomainPhase.RUNNING and not domain.undone:
            found.append(f"{uid} runs and has not {loud} for itself")
        for other, more in self.domains.items():
            if other != uid and more.facts.phase in ACTIVE and (both := more.threads.all & owned):
                found.append(f"{other} may run on {both}, which belong to {uid}, which runs")
        return found

    def in_partitions(self, but: str = "") -> CpuSet:
        """Threads that domains have for themselves, but one domain's."""
        found = EMPTY
        for uid, domain in self.domains.items():
            if uid != but and domain.facts.phase in ACTIVE:
                for cpus in domain.partitions:
                    found |= cpus
        return found

    def undo_partition(self, uid: str, vcpu: int) -> None:
        """Somebody writes ``member`` to the cpuset of a vCPU."""
        domain = self.domains[uid]
        domain.partitions = tuple(EMPTY if number == vcpu else own for number, own in enumerate(domain.partitions))
        domain.undone = True

    def volume_users(self, volume: str) -> list[str]:
        """Running domains that have this volume open."""
        running = [
            (uid, d.desired) for uid, d in self.domains.items() if d.facts.phase in ACTIVE and d.desired is not None
        ]
        return [uid for uid, desired in running if any(v.uid == volume for v in desired.volumes)]

    def _check_functions(self, uid: str, domain: SimulatedDomain) -> list[str]:
        assert domain.desired is not None
        grant, found = grant_of(domain.desired), []
        for key in domain.functions:
            stamp = self.cards.stamps.get(key)
            if stamp is None or stamp.owner != uid:
                found.append(f"{uid} runs with function {key}, stamped {stamp.owner if stamp else 'by nobody'}")
            if key not in self.cards.bound:
                found.append(f"{uid} runs with function {key}, which is not bound")
            for other, more in self.domains.items():
                if other != uid and more.facts.phase in ACTIVE and key in more.functions:
                    found.append(f"{uid} and {other} both run with function {key}")
        for vf in grant.vfs:
            if vf.key in domain.functions:
                told = vf.state.differences(self.cards.states.get(vf.key, CLEAN))
                found += [f"{uid} runs with VF {vf.key}: {line}" for line in told]
        return found

    def _check_gpus(self, uid: str, domain: SimulatedDomain) -> list[str]:
        found = []
        for uuid in domain.gpus:
            board = self.board(uuid)
            if strangers := board.registers - {uid}:
                found.append(f"{uid} runs with GPU {uuid}, which was not reset after {', '.join(sorted(strangers))}")
            if board.driver != VFIO:
                found.append(f"{uid} runs with GPU {uuid}, which is on {board.driver or 'no driver'}")
            for other, more in self.domains.items():
                if other != uid and more.facts.phase in ACTIVE and uuid in more.gpus:
                    found.append(f"{uid} and {other} both run with GPU {uuid}")
        for name in domain.shares:
            facts = self.vgpus.get(name)
            if facts is None or facts.owner != uid:
                found.append(
                    f"{uid} runs with vGPU {name}, which {'is gone' if facts is None else 'is of ' + facts.owner}"
                )
            elif self.board(facts.gpu).driver != DRIVER:
                found.append(f"{uid} runs with vGPU {name}, whose GPU the host's driver has not")
        return found

    # --- for its drivers ---

    def new_pid(self) -> int:
        """Number of a QEMU that starts."""
        self._pids += 1
        return self._pids

    def boot_guest(self, uid: str) -> SimulatedGuest:
        """The guest of a domain begins to boot."""
        self._guest_boots += 1
        boot_id = uuid_of(f"{self.boot_id}/guest/{uid}/{self._guest_boots}")
        guest = SimulatedGuest(uid, boot_id, self.now, later, self.push, self.pace.pod_start_s)
        self.write_serial(uid, f"simulated kernel, boot {boot_id}\r\n")
        later(self.pace.boot_s / 2, guest.kernel_up)
        later(self.pace.boot_s, guest.up)
        return guest

    def write_serial(self, uid: str, text: str) -> None:
        """A guest writes to its serial console; the last lines of it are kept."""
        kept = self.serial.setdefault(uid, [])
        kept.append((self.now(), text.encode()))
        del kept[:-SERIAL_LINES]

    def end(self, uid: str, phase: DomainPhase, reason: str) -> None:
        """A domain's QEMU ends; nothing happens where it does not run."""
        domain = self.domains.get(uid)
        if domain is None or domain.facts.phase not in ACTIVE:
            return
        if domain.guest is not None:
            domain.guest.end()
            domain.guest = None
            self.push(GuestGone(uid))
        domain.facts = replace(domain.facts, phase=phase, pid=0)
        self.tell(uid, reason)

    def push(self, event: GuestEvent) -> None:
        """A helper says something; heard where an agent is attached."""
        if self._lease is not None and event.uid in self._lease.attached:
            self._lease.guest_events.put_nowait(event)

    def tell(self, uid: str, reason: str) -> None:
        """The hypervisor tells of a domain."""
        if self._lease is not None:
            name = self.domains[uid].facts.name if uid in self.domains else ""
            self._lease.domain_events.put_nowait(DomainEvent(uid, name, reason))

    def disk_used_mib(self) -> int:
        """What images, overlays, seeds and volumes take."""
        disks = 512 * len(self.images) + sum(size // 10 for size in self.overlays.values())
        return disks + len(self.seeds) + len(self.volumes)
