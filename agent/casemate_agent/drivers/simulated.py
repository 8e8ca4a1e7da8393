"""A whole host in memory, behind the same doors as a real one.

What may live here: the simulated machine and its drivers. It is shipped: ``casemate-agent --simulated`` gives a fleet
without libvirt, and every test of the agent runs on it; it passes the contract suite of the real drivers.

Theory of operation. :class:`SimulatedHost` is the machine. It outlives agents: ``drivers()`` is what one agent's process
holds, and taking new ones severs the old, whose calls then never return, like those of a process that was killed. An
operation takes simulated time, half before its effect and half after, so that a killed agent leaves either. The machine is
as strict as a real one: a domain does not start without its disk, seed and bridge; a bridge with a running tap is not
removed; what is on the disk fills it. Faults are asked of it by name. Time is the event loop's; ``now`` is the wall clock.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from casemate_agent.drivers.ports import (
    DomainEvent,
    DomainFacts,
    DomainFiles,
    DomainPhase,
    Drivers,
    ExecRequest,
    ExecSession,
    GuestEvent,
    GuestGone,
    GuestRefused,
    LogRecord,
    MachineFacts,
    NetworkFacts,
    StoredFiles,
)
from casemate_agent.drivers.simulated_guest import PROGRAMS, SimulatedExec, SimulatedGuest
from casemate_agent.records import to_metadata
from casemate_core.errors import CallerError, DeadlineExceeded, MachineError, NotFound, Unavailable
from casemate_core.spec.instance import DesiredInstance, HostNetwork, ImageRef, Nic
from casemate_core.topology import Topology

T = TypeVar("T")

ACTIVE = (DomainPhase.RUNNING, DomainPhase.PAUSED, DomainPhase.SHUTTING_DOWN)


@dataclass(frozen=True, slots=True)
class SimulatedPace:
    """How long things take on a simulated host, in seconds."""

    call_s: float = 0.002
    fetch_s: float = 0.5
    boot_s: float = 2.0
    pod_start_s: float = 1.0
    power_off_s: float = 0.5


@dataclass(slots=True)
class _Domain:
    """A domain of the simulated hypervisor."""

    facts: DomainFacts
    desired: DesiredInstance | None = None
    files: DomainFiles | None = None
    guest: SimulatedGuest | None = None


@dataclass(slots=True)
class Faults:
    """What is wrong with the machine at the moment."""

    #: Ports whose calls do not return: ``hypervisor``, ``images``, ``networks``, ``machine``, ``guests``.
    hung: set[str] = field(default_factory=set)
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
        self.domains: dict[str, _Domain] = {}
        self.images: dict[str, str] = {}
        self.overlays: dict[str, int] = {}
        self.seeds: dict[str, str] = {}
        self.strays: set[str] = set()
        self.bridges: dict[str, HostNetwork] = {}
        self.guards: dict[str, tuple[str, str]] = {}
        self._pids = 1000
        self._guest_boots = 0
        self._lease: _Lease | None = None

    @property
    def boot_id(self) -> str:
        return _uuid(f"{self.name}/boot/{self.boots}")

    def drivers(self) -> Drivers:
        """What an agent's process holds of this machine. The one that held it before is dead."""
        self.sever()
        lease = self._lease = _Lease(self)
        return Drivers(
            machine=_Machine(lease),
            hypervisor=_Hypervisor(lease),
            images=_Images(lease),
            networks=_Networks(lease),
            guests=_Guests(lease),
        )

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
            self._end(uid, DomainPhase.SHUT_OFF, "host rebooted")
        self.bridges.clear()
        self.guards.clear()

    def crash_domain(self, uid: str) -> None:
        """Its QEMU is killed."""
        self._end(uid, DomainPhase.SHUT_OFF, "crashed")

    def vanish_domain(self, uid: str) -> None:
        """Someone ends and undefines it behind our back."""
        self._end(uid, DomainPhase.SHUT_OFF, "destroyed by someone")
        self.domains.pop(uid, None)
        self._tell(uid, "undefined")

    def reboot_guest(self, uid: str) -> None:
        """The guest reboots inside its QEMU, whose process stays."""
        domain = self.domains[uid]
        if domain.guest is not None and domain.facts.phase is DomainPhase.RUNNING:
            domain.guest.end()
            self._push(GuestGone(uid))
            domain.guest = self._boot_guest(uid)

    def add_foreign(self, name: str, vcpus: int = 1, memory_mib: int = 512) -> str:
        """A running VM that is not ours; returns its uuid."""
        uid = _uuid(f"{self.name}/foreign/{name}")
        self._pids += 1
        facts = DomainFacts(
            uid, name, DomainPhase.RUNNING, owned=False, pid=self._pids, vcpus=vcpus, memory_mib=memory_mib
        )
        self.domains[uid] = _Domain(facts)
        return uid

    def check(self) -> list[str]:
        """Every rule that a machine of ours would break, were it to stay as it is."""
        found = []
        for uid, domain in self.domains.items():
            desired = domain.desired
            if desired is None or domain.facts.phase not in ACTIVE:
                continue
            if uid not in self.overlays or uid not in self.seeds:
                found.append(f"{uid} runs without its disk or its seed")
            if desired.image.file.digest not in self.images:
                found.append(f"{uid} runs without its image")
            for index, nic in enumerate(desired.nics):
                if nic.network not in self.bridges:
                    found.append(f"{uid} runs without bridge of network {nic.network}")
                if self.guards.get(tap_name(uid, index)) != (nic.mac, nic.address):
                    found.append(f"{uid} runs with a tap that is not guarded")
        return found

    # --- within ---

    def _boot_guest(self, uid: str) -> SimulatedGuest:
        self._guest_boots += 1
        boot_id = _uuid(f"{self.name}/guest/{uid}/{self._guest_boots}")
        guest = SimulatedGuest(uid, boot_id, self.now, _later, self._push, self.pace.pod_start_s)
        _later(self.pace.boot_s, guest.up)
        return guest

    def _end(self, uid: str, phase: DomainPhase, reason: str) -> None:
        domain = self.domains.get(uid)
        if domain is None or domain.facts.phase not in ACTIVE:
            return
        if domain.guest is not None:
            domain.guest.end()
            domain.guest = None
            self._push(GuestGone(uid))
        domain.facts = replace(domain.facts, phase=phase, pid=0)
        self._tell(uid, reason)

    def _push(self, event: GuestEvent) -> None:
        if self._lease is not None and event.uid in self._lease.attached:
            self._lease.guest_events.put_nowait(event)

    def _tell(self, uid: str, reason: str) -> None:
        if self._lease is not None:
            name = self.domains[uid].facts.name if uid in self.domains else ""
            self._lease.domain_events.put_nowait(DomainEvent(uid, name, reason))

    def _disk_used_mib(self) -> int:
        return 512 * len(self.images) + sum(size // 10 for size in self.overlays.values()) + len(self.seeds)


def tap_name(uid: str, index: int) -> str:
    """Name of a simulated tap."""
    return "cm" + hashlib.sha256(f"{uid}/{index}".encode()).hexdigest()[:11]


def _uuid(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"


def _later(delay_s: float, call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(delay_s, call)


class _Lease:
    """What one agent's process holds: while it lives its calls have effects and return."""

    def __init__(self, host: SimulatedHost) -> None:
        self.host = host
        self.alive = True
        self.attached: set[str] = set()
        self.domain_events: asyncio.Queue[DomainEvent] = asyncio.Queue()
        self.guest_events: asyncio.Queue[GuestEvent] = asyncio.Queue()
        self.fetching: set[str] = set()

    async def call(
        self, port: str, method: str, effect: Callable[[], T], deadline_s: float, takes_s: float | None = None
    ) -> T:
        """One operation: half its time, its effect, the other half."""
        takes_s = self.host.pace.call_s if takes_s is None else takes_s
        await self._pass(port, method, takes_s / 2, deadline_s)
        if self.host.faults.failing[method] > 0:
            self.host.faults.failing[method] -= 1
            raise MachineError(f"{method} failed, as it was asked to")
        value = effect()
        await self._pass(port, method, takes_s / 2, deadline_s)
        return value

    async def _pass(self, port: str, method: str, time_s: float, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.sleep(time_s)
                while port in self.host.faults.hung or not self.alive:
                    if not self.alive:
                        await asyncio.Future()  # the caller is a dead process
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise DeadlineExceeded(f"{method} has not returned in {deadline_s:.0f} s") from None


class _Machine:
    def __init__(self, lease: _Lease) -> None:
        self._lease = lease

    async def observe(self, deadline_s: float) -> MachineFacts:
        host = self._lease.host
        return await self._lease.call(
            "machine", "observe", lambda: MachineFacts(host.name, host.boot_id, "simulated", host.topology), deadline_s
        )


class _Hypervisor:
    def __init__(self, lease: _Lease) -> None:
        self._lease = lease
        self._host = lease.host

    def _call(self, method: str, effect: Callable[[], T], deadline_s: float) -> Awaitable[T]:
        return self._lease.call("hypervisor", method, effect, deadline_s)

    async def domains(self, deadline_s: float) -> tuple[DomainFacts, ...]:
        return await self._call("domains", lambda: tuple(d.facts for d in self._host.domains.values()), deadline_s)

    async def define(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> None:
        await self._call("define", lambda: self._define(desired, files), deadline_s)

    def _define(self, desired: DesiredInstance, files: DomainFiles) -> None:
        host, uid = self._host, desired.uid
        old = host.domains.get(uid)
        clash = [d for d in host.domains.values() if d.facts.name == desired.name and d.facts.uuid != uid]
        if clash:
            raise MachineError(f"a domain named {desired.name!r} exists already with uuid {clash[0].facts.uuid}")
        facts = DomainFacts(
            uuid=uid,
            name=desired.name,
            phase=old.facts.phase if old else DomainPhase.SHUT_OFF,
            owned=True,
            instance_uid=uid,
            generation=desired.generation,
            placement_epoch=desired.placement.epoch,
            placement_generation=desired.placement.generation,
            pid=old.facts.pid if old else 0,
            vcpus=desired.cpus,
            memory_mib=desired.memory_mib,
            taps=tuple(tap_name(uid, index) for index in range(len(desired.nics))),
            files=tuple(f for f in (files.root, files.seed, files.kernel, files.initrd) if f),
            channel_path=f"/simulated/{uid}.sock",
            vcpu_pins=tuple(frozenset({thread}) for thread in desired.placement.claim.vcpus),
            record=to_metadata(desired),
        )
        host.domains[uid] = _Domain(facts, desired, files, old.guest if old else None)
        host._tell(uid, "defined")

    async def start(self, uid: str, deadline_s: float) -> None:
        await self._call("start", lambda: self._start(uid), deadline_s)

    def _start(self, uid: str) -> None:
        host = self._host
        domain = host.domains.get(uid)
        if domain is None or domain.desired is None:
            raise NotFound("domain", uid)
        if domain.facts.phase in ACTIVE:
            return
        desired = domain.desired
        for what, ok in (
            ("its overlay", uid in host.overlays),
            ("its seed", uid in host.seeds),
            ("its image", desired.image.file.digest in host.images),
            *((f"archive {a.name}", a.file.digest in host.images) for a in desired.archives),
            *((f"bridge of network {nic.network}", nic.network in host.bridges) for nic in desired.nics),
        ):
            if not ok:
                raise MachineError(f"{what} does not exist")
        host._pids += 1
        domain.facts = replace(domain.facts, phase=DomainPhase.RUNNING, pid=host._pids)
        domain.guest = host._boot_guest(uid)
        host._tell(uid, "started")

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        await self._call("shutdown", lambda: self._shutdown(uid), deadline_s)

    def _shutdown(self, uid: str) -> None:
        host = self._host
        domain = host.domains.get(uid)
        if domain is None or domain.facts.phase is not DomainPhase.RUNNING:
            return
        pid = domain.facts.pid
        if uid in host.faults.stubborn or domain.guest is None or not domain.guest.booted:
            return  # asked, and not heard
        domain.facts = replace(domain.facts, phase=DomainPhase.SHUTTING_DOWN)
        host._tell(uid, "shutting down")

        def off() -> None:
            if uid in host.domains and host.domains[uid].facts.pid == pid:
                host._end(uid, DomainPhase.SHUT_OFF, "powered off")

        _later(host.pace.power_off_s, off)

    async def destroy(self, uid: str, deadline_s: float) -> None:
        await self._call("destroy", lambda: self._destroy(uid), deadline_s)

    def _destroy(self, uid: str) -> None:
        self._host._end(uid, DomainPhase.SHUT_OFF, "destroyed")
        domain = self._host.domains.get(uid)
        if domain is not None and domain.facts.phase is DomainPhase.CRASHED:
            domain.facts = replace(domain.facts, phase=DomainPhase.SHUT_OFF)

    async def undefine(self, uid: str, deadline_s: float) -> None:
        await self._call("undefine", lambda: self._undefine(uid), deadline_s)

    def _undefine(self, uid: str) -> None:
        domain = self._host.domains.get(uid)
        if domain is None:
            return
        if domain.facts.phase in ACTIVE:
            raise MachineError(f"domain {uid} runs")
        del self._host.domains[uid]
        self._host._tell(uid, "undefined")

    async def events(self) -> AsyncIterator[DomainEvent]:
        while True:
            yield await self._lease.domain_events.get()

    async def virtualisation(self, deadline_s: float) -> str:
        return await self._call(
            "virtualisation", lambda: "tcg" if self._host.faults.no_kvm else "simulated", deadline_s
        )

    @property
    def virtualisation_reason(self) -> str:
        return self._host.faults.no_kvm


class _Images:
    def __init__(self, lease: _Lease) -> None:
        self._lease = lease
        self._host = lease.host

    def _call(
        self, method: str, effect: Callable[[], T], deadline_s: float, takes_s: float | None = None
    ) -> Awaitable[T]:
        return self._lease.call("images", method, effect, deadline_s, takes_s)

    def _room(self) -> None:
        if self._host.faults.disk_full:
            raise MachineError("no space left on device")

    async def observe(self, deadline_s: float) -> StoredFiles:
        return await self._call("observe", self._observe, deadline_s)

    def _observe(self) -> StoredFiles:
        host = self._host
        total_mib = host.topology.disk_mib
        return StoredFiles(
            images=dict(host.images),
            overlays={uid: f"/simulated/overlays/{uid}" for uid in host.overlays},
            seeds=dict(host.seeds),
            strays=tuple(sorted(host.strays - self._lease.fetching)),
            free_mib=0 if host.faults.disk_full else max(0, total_mib - host._disk_used_mib()),
            total_mib=total_mib,
        )

    async def fetch(self, image: ImageRef, deadline_s: float) -> None:
        host, digest = self._host, image.file.digest
        if digest in host.images:
            return
        part = f"{digest}.part"

        def begin() -> None:
            self._room()
            host.strays.add(part)

        def end() -> None:
            self._room()
            host.strays.discard(part)
            if digest in host.faults.wrong_digests:
                raise CallerError(f"{image.file.source} is not {digest}")
            host.images[digest] = f"/simulated/images/{digest}"

        self._lease.fetching.add(part)
        try:
            await self._call("fetch", begin, deadline_s)
            await self._call("fetch", end, deadline_s, host.pace.fetch_s)
        finally:
            self._lease.fetching.discard(part)

    async def create_overlay(self, uid: str, image: ImageRef, size_mib: int, deadline_s: float) -> None:
        def create() -> None:
            self._room()
            if image.file.digest not in self._host.images:
                raise NotFound("image", image.name)
            self._host.overlays.setdefault(uid, size_mib)

        await self._call("create_overlay", create, deadline_s)

    async def write_seed(self, desired: DesiredInstance, deadline_s: float) -> None:
        def write() -> None:
            self._room()
            self._host.seeds[desired.uid] = self.files(desired).seed

        await self._call("write_seed", write, deadline_s)

    def files(self, desired: DesiredInstance) -> DomainFiles:
        image = desired.image

        def path(digest: str) -> str:
            return f"/simulated/images/{digest}"

        return DomainFiles(
            root=f"/simulated/overlays/{desired.uid}",
            root_format="qcow2",
            backing=path(image.file.digest),
            backing_format=image.format,
            seed=f"/simulated/seeds/{desired.uid}",
            archives=tuple(path(a.file.digest) for a in desired.archives),
            kernel=path(image.kernel.digest) if image.kernel else "",
            initrd=path(image.initrd.digest) if image.initrd else "",
            cmdline=image.cmdline,
        )

    async def remove_instance(self, uid: str, deadline_s: float) -> None:
        def remove() -> None:
            domain = self._host.domains.get(uid)
            if domain is not None and domain.facts.phase in ACTIVE:
                raise MachineError(f"files of {uid} are in use")
            self._host.overlays.pop(uid, None)
            self._host.seeds.pop(uid, None)

        await self._call("remove_instance", remove, deadline_s)

    async def remove_strays(self, deadline_s: float) -> None:
        await self._call(
            "remove_strays", lambda: self._host.strays.intersection_update(self._lease.fetching), deadline_s
        )

    async def remove_image(self, digest: str, deadline_s: float) -> None:
        await self._call("remove_image", lambda: self._host.images.pop(digest, None), deadline_s)


class _Networks:
    def __init__(self, lease: _Lease) -> None:
        self._lease = lease
        self._host = lease.host

    def _call(self, method: str, effect: Callable[[], T], deadline_s: float) -> Awaitable[T]:
        return self._lease.call("networks", method, effect, deadline_s)

    async def observe(self, deadline_s: float) -> NetworkFacts:
        host = self._host

        def look() -> NetworkFacts:
            active = [d.facts for d in host.domains.values() if d.facts.phase in ACTIVE]
            return NetworkFacts(
                bridges={name: self.bridge(name) for name in host.bridges},
                guards=dict(host.guards),
                taps=tuple(sorted(tap for facts in active for tap in facts.taps)),
            )

        return await self._call("observe", look, deadline_s)

    async def ensure_network(self, network: HostNetwork, deadline_s: float) -> None:
        await self._call("ensure_network", lambda: self._host.bridges.update({network.name: network}), deadline_s)

    async def remove_network(self, name: str, deadline_s: float) -> None:
        def remove() -> None:
            for domain in self._host.domains.values():
                used = domain.desired is not None and any(nic.network == name for nic in domain.desired.nics)
                if used and domain.facts.phase in ACTIVE:
                    raise MachineError(f"bridge of network {name} is in use")
            self._host.bridges.pop(name, None)

        await self._call("remove_network", remove, deadline_s)

    def tap(self, uid: str, index: int) -> str:
        return tap_name(uid, index)

    def bridge(self, network: str) -> str:
        return "cmbr" + hashlib.sha256(network.encode()).hexdigest()[:8]

    async def guard(self, uid: str, nics: tuple[Nic, ...], deadline_s: float) -> None:
        rules = {tap_name(uid, index): (nic.mac, nic.address) for index, nic in enumerate(nics)}
        await self._call("guard", lambda: self._host.guards.update(rules), deadline_s)

    async def unguard(self, uid: str, deadline_s: float) -> None:
        def remove() -> None:
            for index in range(16):
                self._host.guards.pop(tap_name(uid, index), None)

        await self._call("unguard", remove, deadline_s)

    async def condition(self, deadline_s: float) -> str:
        return await self._call("condition", lambda: self._host.faults.no_rules, deadline_s)


class _Guests:
    def __init__(self, lease: _Lease) -> None:
        self._lease = lease
        self._host = lease.host

    def _guest(self, uid: str) -> SimulatedGuest:
        domain = self._host.domains.get(uid)
        if uid not in self._lease.attached or domain is None or domain.guest is None or not domain.guest.booted:
            raise Unavailable(f"the helper of {uid} is not connected")
        return domain.guest

    async def attach(self, uid: str, channel_path: str) -> None:
        if uid not in self._lease.attached and self._lease.alive:
            self._lease.attached.add(uid)
            domain = self._host.domains.get(uid)
            if domain is not None and domain.guest is not None:
                domain.guest.announce()

    async def detach(self, uid: str) -> None:
        if uid in self._lease.attached:
            self._lease.attached.discard(uid)
            domain = self._host.domains.get(uid)
            if domain is not None and domain.guest is not None and domain.guest.booted:
                self._lease.guest_events.put_nowait(GuestGone(uid))

    def attached(self) -> frozenset[str]:
        return frozenset(self._lease.attached)

    async def events(self) -> AsyncIterator[GuestEvent]:
        while True:
            yield await self._lease.guest_events.get()

    async def apply(
        self,
        uid: str,
        pods: tuple[Mapping[str, Any], ...],
        archives: int,
        revision: str,
        peers: Mapping[str, str],
        deadline_s: float,
    ) -> None:
        await self._lease.call("guests", "apply", lambda: self._guest(uid).apply(pods, revision), deadline_s)

    async def logs(
        self, uid: str, pod: str, container: str, *, follow: bool, tail: int, since_s: float, after_sequence: int = 0
    ) -> AsyncIterator[LogRecord]:
        guest = self._guest(uid)
        found = guest.find(pod, container)
        if not found.started_s:
            raise GuestRefused("the container has not been started yet")
        async for line in guest.follow(
            pod, found.name, follow=follow, tail=tail, since_s=since_s, after_sequence=after_sequence
        ):
            yield line

    async def exec(self, uid: str, request: ExecRequest, deadline_s: float) -> ExecSession:
        guest = self._guest(uid)
        if request.pod:
            found = guest.find(request.pod, request.container)
            if found.state != "running":
                raise GuestRefused(f"container {found.name} is {found.state}")
        if not request.argv:
            raise GuestRefused("argv must be a list of texts")
        if not request.pod and request.argv[0].rsplit("/", 1)[-1] not in PROGRAMS:
            raise GuestRefused(f"{request.argv[0]}: No such file or directory")
        return SimulatedExec(request)

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        self._guest(uid)
        await _Hypervisor(self._lease).shutdown(uid, deadline_s)
