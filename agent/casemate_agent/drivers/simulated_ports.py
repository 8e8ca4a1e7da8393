"""The doors of a simulated machine: what one agent's process holds of it.

What may live here: implementations of :mod:`casemate_agent.drivers.ports` on the state of a
:class:`casemate_agent.drivers.simulated.SimulatedHost`. Every call goes through the :class:`Lease`, which takes time for
it, makes it fail or hang as the machine's faults say, and lets nothing of a dead process through.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from casemate_agent.domain.names import domain_name
from casemate_agent.drivers.ports import (
    DomainEvent,
    DomainFacts,
    DomainFiles,
    DomainPhase,
    DomainStats,
    Drivers,
    ExecRequest,
    ExecSession,
    GuestEvent,
    GuestGone,
    GuestRefused,
    LogRecord,
    MachineFacts,
    NetworkFacts,
    QemuThreads,
    StoredFiles,
)
from casemate_agent.drivers.sideports import ConsoleRefused, ConsoleSession, CopyRequest
from casemate_agent.drivers.simulated_domain import (
    ACTIVE,
    SimulatedDomain,
    defined_facts,
    later,
    simulated_stats,
    tap_name,
)
from casemate_agent.drivers.simulated_functions import SimulatedFunctions
from casemate_agent.drivers.simulated_gpus import VFIO, SimulatedCards, SimulatedGpus, guest_line
from casemate_agent.drivers.simulated_guest import SimulatedExec, SimulatedGuest
from casemate_agent.drivers.simulated_partitions import SimulatedPartitions
from casemate_agent.drivers.simulated_passages import SimulatedPassages
from casemate_agent.drivers.simulated_shares import SimulatedShares
from casemate_agent.drivers.simulated_side import HOST_KEY
from casemate_agent.drivers.simulated_survey import SimulatedSurvey
from casemate_agent.drivers.simulated_tuning import SimulatedTuning
from casemate_agent.drivers.simulated_volumes import SimulatedVolumes, volume_path
from casemate_agent.gpu.shares import shares_of
from casemate_agent.hardware.functions import grant_of
from casemate_core.cpuset import CpuSet
from casemate_core.errors import CallerError, DeadlineExceeded, MachineError, NotFound, Unavailable
from casemate_core.spec.instance import DesiredInstance, HostNetwork, ImageRef, Nic, bridged

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated import SimulatedHost

T = TypeVar("T")


class Lease:
    """What one agent's process holds: while it lives its calls have effects and return."""

    def __init__(self, host: "SimulatedHost") -> None:
        self.host = host
        self.alive = True
        self.attached: set[str] = set()
        self.domain_events: asyncio.Queue[DomainEvent] = asyncio.Queue()
        self.guest_events: asyncio.Queue[GuestEvent] = asyncio.Queue()
        self.fetching: set[str] = set()
        #: Instances that are waited for: what they are to be here, by uid.
        self.waiting: dict[str, DesiredInstance] = {}

    async def call(
        self, port: str, method: str, effect: Callable[[], T], deadline_s: float, takes_s: float | None = None
    ) -> T:
        """One operation: half its time, its effect, the other half."""
        takes_s = self.host.pace.call_s if takes_s is None else takes_s
        await self._pass(port, method, takes_s / 2, deadline_s)
        if port in self.host.faults.defective:
            raise KeyError(method)
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
    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    async def observe(self, deadline_s: float) -> MachineFacts:
        host = self._lease.host
        return await self._lease.call(
            "machine",
            "observe",
            lambda: MachineFacts(host.name, host.boot_id, "simulated", host.topology, partitionable=host.partitionable),
            deadline_s,
        )


class _Hypervisor:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._host = lease.host

    def _call(self, method: str, effect: Callable[[], T], deadline_s: float) -> Awaitable[T]:
        return self._lease.call("hypervisor", method, effect, deadline_s)

    async def domains(self, deadline_s: float) -> tuple[DomainFacts, ...]:
        return await self._call("domains", lambda: tuple(d.facts for d in self._host.domains.values()), deadline_s)

    async def descriptions(self, deadline_s: float) -> Mapping[str, str]:
        def told() -> dict[str, str]:
            ours = [d.facts for d in self._host.domains.values() if d.facts.owned]
            return {
                f.name: f"<domain type='simulated'><name>{f.name}</name><uuid>{f.uuid}</uuid></domain>" for f in ours
            }

        return await self._call("descriptions", told, deadline_s)

    async def stats(self, deadline_s: float, uids: frozenset[str] | None = None) -> tuple[DomainStats, ...]:
        def told() -> tuple[DomainStats, ...]:
            return tuple(simulated_stats(d) for uid, d in self._host.domains.items() if uids is None or uid in uids)

        return await self._call("stats", told, deadline_s)

    async def define(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> None:
        await self._call("define", lambda: self._define(desired, files), deadline_s)

    async def expect(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> str:
        return await self._call("expect", lambda: f"<domain><uuid>{desired.uid}</uuid></domain>", deadline_s)

    def _define(self, desired: DesiredInstance, files: DomainFiles) -> None:
        host, uid = self._host, desired.uid
        name = domain_name(desired.environment, desired.name, desired.ordinal, uid)
        old = host.domains.get(uid)
        clash = [d for d in host.domains.values() if d.facts.name == name and d.facts.uuid != uid]
        if clash:
            raise MachineError(f"a domain named {name!r} exists already with uuid {clash[0].facts.uuid}")
        facts = defined_facts(desired, files, name)
        facts = replace(facts, phase=old.facts.phase if old else DomainPhase.SHUT_OFF, pid=old.facts.pid if old else 0)
        new = SimulatedDomain(facts, desired, files, old.guest if old else None)
        if old is not None:
            new.threads, new.functions, new.partitions = old.threads, old.functions, old.partitions
        host.domains[uid] = new
        host.tell(uid, "defined")

    async def affinities(self, pids: tuple[int, ...], deadline_s: float) -> Mapping[int, QemuThreads]:
        def look() -> dict[int, QemuThreads]:
            return {d.facts.pid: d.threads for d in self._host.domains.values() if d.facts.pid in pids}

        return await self._call("affinities", look, deadline_s)

    async def pin(self, uid: str, vcpus: tuple[CpuSet, ...], rest: CpuSet, deadline_s: float) -> None:
        def pin() -> None:
            domain = self._host.domains.get(uid)
            if domain is None:
                raise NotFound("domain", uid)
            if domain.facts.phase in ACTIVE:
                count = domain.facts.vcpus
                each = (vcpus * count if len(vcpus) == 1 else vcpus)[:count]
                domain.threads = replace(domain.threads, vcpus=each, rest=rest)

        await self._call("pin", pin, deadline_s)

    async def start(self, uid: str, deadline_s: float, *, frozen: bool = False) -> None:
        await self._call("start", lambda: self._start(uid, frozen), deadline_s)

    def _start(self, uid: str, frozen: bool) -> None:
        host = self._host
        domain = host.domains.get(uid)
        if domain is None or domain.desired is None:
            raise NotFound("domain", uid)
        if domain.facts.phase in ACTIVE:
            return
        desired = domain.desired
        for what, ok in (
            ("its overlay", desired.disk in host.disks.get(uid, ())),
            ("its seed", uid in host.seeds),
            ("its image", desired.image.file.digest in host.images),
            *((f"archive {a.name}", a.file.digest in host.images) for a in desired.archives),
            *((f"bridge of network {nic.network}", nic.network in host.bridges) for nic in bridged(desired.nics)),
            *((f"volume {v.name}", v.uid in host.volumes) for v in desired.volumes),
            *((f"function {key}, bound for it,", key in host.cards.bound) for key in grant_of(desired).keys),
        ):
            if not ok:
                raise MachineError(f"{what} does not exist")
        facts = host.cards.facts(host.topology)
        places = {key: vf.address for key, vf in facts.vfs.items()}
        places |= {key: device.address for key, device in facts.devices.items()}
        wanted = grant_of(desired).keys
        gpus = desired.placement.claim.gpus
        places |= {gpu.uuid: gpu.place.address for gpu in host.topology.gpus}
        for uuid in gpus:
            if uuid not in places or host.board(uuid).driver != VFIO:
                raise MachineError(f"GPU {uuid} is not bound for a guest")
        given = domain.files.functions if domain.files is not None else ()
        if given != tuple(places[key] for key in (*wanted, *gpus)):
            raise MachineError(f"{uid} was defined with functions at {given}, which is not where they are")
        shares = tuple(share.id for share in shares_of(uid, desired.placement.claim))
        for share in shares:
            if share not in host.vgpus:
                raise MachineError(f"vGPU {share} does not exist")
        if shares != (domain.files.mdevs if domain.files is not None else ()):
            raise MachineError(f"{uid} was defined with other vGPUs than {shares}")
        held = [v.name for v in desired.volumes if host.volume_users(v.uid)]
        if held:
            raise MachineError(f"volume {held[0]} is open in another domain")
        domain.functions, domain.gpus, domain.shares = wanted, gpus, shares
        for uuid in gpus:
            host.board(uuid).registers.add(uid)
            host.board(uuid).memory.add(uid)
        domain.threads = self._threads(domain.facts)
        domain.partitions, domain.undone = (), False
        phase = DomainPhase.PAUSED if frozen else DomainPhase.RUNNING
        domain.facts = replace(domain.facts, phase=phase, pid=host.new_pid(), frozen=frozen, left=False)
        domain.guest = None if frozen else host.boot_guest(uid)
        host.tell(uid, "started")

    def _threads(self, facts: DomainFacts) -> QemuThreads:
        """Where they begin: as the domain was defined."""
        anywhere = CpuSet(self._host.topology.index.online)
        rest = facts.emulator_pin or anywhere
        pins = tuple(CpuSet.from_ids(pin) for pin in facts.vcpu_pins)[: facts.vcpus]
        fifo = frozenset(range(1, len(pins))) if self._realtime(facts.uuid) else frozenset[int]()
        return QemuThreads(pins or (rest,) * facts.vcpus, rest, fifo)

    def _realtime(self, uid: str) -> bool:
        desired = self._host.domains[uid].desired
        return desired is not None and desired.placement.claim.realtime

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
        host.tell(uid, "shutting down")

        def off() -> None:
            if uid in host.domains and host.domains[uid].facts.pid == pid:
                host.end(uid, DomainPhase.SHUT_OFF, "powered off")

        later(host.pace.power_off_s, off)

    async def destroy(self, uid: str, deadline_s: float) -> None:
        await self._call("destroy", lambda: self._destroy(uid), deadline_s)

    def _destroy(self, uid: str) -> None:
        self._host.end(uid, DomainPhase.SHUT_OFF, "destroyed")
        domain = self._host.domains.get(uid)
        if domain is not None and domain.facts.phase is DomainPhase.CRASHED:
            domain.facts = replace(domain.facts, phase=DomainPhase.SHUT_OFF)

    async def suspend(self, uid: str, deadline_s: float) -> None:
        await self._call("suspend", lambda: self._turn(uid, DomainPhase.RUNNING, DomainPhase.PAUSED), deadline_s)

    async def resume(self, uid: str, deadline_s: float) -> None:
        await self._call("resume", lambda: self._turn(uid, DomainPhase.PAUSED, DomainPhase.RUNNING), deadline_s)

    def _turn(self, uid: str, before: DomainPhase, after: DomainPhase) -> None:
        domain = self._host.domains.get(uid)
        if domain is not None and domain.facts.phase is before:
            domain.facts = replace(domain.facts, phase=after, frozen=after is DomainPhase.PAUSED, halted=False)
            if after is DomainPhase.RUNNING and domain.guest is None:
                domain.guest = self._host.boot_guest(uid)  # it was started frozen
            self._host.tell(uid, after.value)

    async def reset(self, uid: str, deadline_s: float) -> None:
        await self._call("reset", lambda: self._reset(uid), deadline_s)

    def _reset(self, uid: str) -> None:
        domain = self._host.domains.get(uid)
        if domain is None or domain.facts.phase not in ACTIVE:
            raise NotFound("running domain", uid)
        self._host.reboot_guest(uid)

    async def resize_disk(self, uid: str, path: str, size_mib: int, deadline_s: float) -> None:
        def resize() -> None:
            domain = self._host.domains.get(uid)
            if domain is None or domain.facts.phase not in ACTIVE or path not in domain.facts.files:
                raise NotFound("disk of a running domain", path)
            for volume, disk in self._host.volumes.items():
                if volume_path(volume) == path:
                    disk.size_mib = max(disk.size_mib, size_mib)

        await self._call("resize_disk", resize, deadline_s)

    async def undefine(self, uid: str, deadline_s: float) -> None:
        await self._call("undefine", lambda: self._undefine(uid), deadline_s)

    def _undefine(self, uid: str) -> None:
        domain = self._host.domains.get(uid)
        if domain is None:
            return
        if domain.facts.phase in ACTIVE:
            raise MachineError(f"domain {uid} runs")
        del self._host.domains[uid]
        self._host.tell(uid, "undefined")

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
    def __init__(self, lease: Lease) -> None:
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
            free_mib=0 if host.faults.disk_full else max(0, total_mib - host.disk_used_mib()),
            total_mib=total_mib,
            disks={uid: tuple(sorted(numbers)) for uid, numbers in host.disks.items()},
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

    async def create_overlay(self, uid: str, image: ImageRef, size_mib: int, deadline_s: float, disk: int = 0) -> None:
        def create() -> None:
            self._room()
            if image.file.digest not in self._host.images:
                raise NotFound("image", image.name)
            self._host.overlays.setdefault(uid, size_mib)
            self._host.disks.setdefault(uid, set()).add(disk)

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
            root=f"/simulated/overlays/{desired.uid}" + (f"-{desired.disk}" if desired.disk else ""),
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
            self._host.disks.pop(uid, None)
            self._host.seeds.pop(uid, None)
            self._host.serial.pop(uid, None)

        await self._call("remove_instance", remove, deadline_s)

    async def remove_disks(self, uid: str, keep: int, deadline_s: float) -> None:
        def remove() -> None:
            domain = self._host.domains.get(uid)
            if domain is not None and domain.facts.phase in ACTIVE:
                raise MachineError(f"files of {uid} are in use")
            if uid in self._host.disks:
                self._host.disks[uid] &= {keep}

        await self._call("remove_disks", remove, deadline_s)

    async def remove_strays(self, deadline_s: float) -> None:
        await self._call(
            "remove_strays", lambda: self._host.strays.intersection_update(self._lease.fetching), deadline_s
        )

    async def remove_image(self, digest: str, deadline_s: float) -> None:
        await self._call("remove_image", lambda: self._host.images.pop(digest, None), deadline_s)


class _Networks:
    def __init__(self, lease: Lease) -> None:
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
                plugged=self._plugged(),
            )

        return await self._call("observe", look, deadline_s)

    def _plugged(self) -> dict[str, str]:
        running = [d for d in self._host.domains.values() if d.desired is not None and d.facts.phase in ACTIVE]
        found = {}
        for domain in running:
            assert domain.desired is not None
            for tap, nic in zip(domain.facts.taps, bridged(domain.desired.nics), strict=False):
                found[tap] = self._host.plugs.get(tap, self.bridge(nic.network))
        return found

    async def plug(self, tap: str, network: str, deadline_s: float) -> None:
        await self._call("plug", lambda: self._host.plugs.pop(tap, None), deadline_s)

    async def ensure_network(self, network: HostNetwork, deadline_s: float) -> None:
        await self._call("ensure_network", lambda: self._host.bridges.update({network.name: network}), deadline_s)

    async def remove_network(self, name: str, deadline_s: float) -> None:
        def remove() -> None:
            for domain in self._host.domains.values():
                used = domain.desired is not None and any(nic.network == name for nic in bridged(domain.desired.nics))
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
    def __init__(self, lease: Lease) -> None:
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
        self,
        uid: str,
        pod: str,
        container: str,
        *,
        follow: bool,
        tail: int,
        since_s: float,
        after_sequence: int = 0,
        log: str = "",
        previous: bool = False,
    ) -> AsyncIterator[LogRecord]:
        guest = self._guest(uid)
        found = guest.find(pod, container)
        if not found.started_s:
            raise GuestRefused("the container has not been started yet")
        async for line in guest.follow(
            pod,
            found.name,
            follow=follow,
            tail=tail,
            since_s=since_s,
            after_sequence=after_sequence,
            of=log,
            previous=previous,
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
        if not request.pod and request.argv[0].rsplit("/", 1)[-1] not in self._host.guest_programs:
            raise GuestRefused(f"{request.argv[0]}: No such file or directory")
        domain = self._host.domains.get(uid)
        told = (guest_line(uuid, self._host.board(uuid)) for uuid in domain.gpus) if domain is not None else ()
        said = self._host.guest_gpus.get(uid)
        return SimulatedExec(request, "".join(told).encode() if said is None else said)

    async def dial(self, uid: str, pod: str, container: str, port: int, deadline_s: float) -> ExecSession:
        return await self._lease.call("guests", "dial", lambda: self._guest(uid).dial(pod, port), deadline_s)

    async def copy(self, uid: str, request: CopyRequest, deadline_s: float) -> ExecSession:
        return await self._lease.call("guests", "copy", lambda: self._guest(uid).copy(request), deadline_s)

    async def authorize(self, uid: str, key: str, deadline_s: float) -> tuple[str, ...]:
        def let_in() -> tuple[str, ...]:
            if not key.strip() or "\n" in key.strip():
                raise GuestRefused("a key is one line")
            guest = self._guest(uid)
            if key not in guest.authorized:
                guest.authorized.append(key)
            return (HOST_KEY,)

        return await self._lease.call("guests", "authorize", let_in, deadline_s)

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        self._guest(uid)
        await _Hypervisor(self._lease).shutdown(uid, deadline_s)

    async def reboot(self, uid: str, deadline_s: float) -> None:
        def reboot() -> None:
            self._guest(uid)
            if uid not in self._host.faults.stubborn:
                later(self._host.pace.power_off_s, lambda: self._host.reboot_guest(uid))

        await self._lease.call("guests", "reboot", reboot, deadline_s)


class _Consoles:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    async def open(self, uid: str, deadline_s: float) -> ConsoleSession:
        def opened() -> ConsoleSession:
            domain = self._lease.host.domains.get(uid)
            if domain is None or domain.guest is None:
                raise ConsoleRefused("the instance is not running, so it has no console")
            return domain.guest.console.open()

        return await self._lease.call("consoles", "open", opened, deadline_s)


class _Serials:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    async def keep(self, deadline_s: float) -> None:
        await self._lease.call("serials", "keep", lambda: None, deadline_s)

    async def read(self, uid: str, since_s: float, deadline_s: float) -> AsyncGenerator[bytes, None]:
        kept = self._lease.host.serial.get(uid, [])
        found = [data for time_s, data in kept if time_s >= since_s]
        for data in await self._lease.call("serials", "read", lambda: found, deadline_s):
            yield data


def drivers_of(lease: Lease) -> Drivers:
    """All the doors of one machine, for the process that holds the lease."""
    return Drivers(
        machine=_Machine(lease),
        gpus=SimulatedGpus(lease),
        cards=SimulatedCards(lease),
        shares=SimulatedShares(lease),
        survey=SimulatedSurvey(lease),
        hypervisor=_Hypervisor(lease),
        images=_Images(lease),
        networks=_Networks(lease),
        guests=_Guests(lease),
        consoles=_Consoles(lease),
        serials=_Serials(lease),
        functions=SimulatedFunctions(lease),
        tuning=SimulatedTuning(lease),
        partitions=SimulatedPartitions(lease),
        volumes=SimulatedVolumes(lease),
        fabric=lease.host.fabric,
        passages=SimulatedPassages(lease),
    )
