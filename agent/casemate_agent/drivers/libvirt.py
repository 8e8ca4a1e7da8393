"""libvirt as the agent's hypervisor.

For: ``ports.Hypervisor``. What may live here: calls of libvirt-python, the one connection and its events, the translation
of errors. What a domain looks like is ``casemate_agent.domain``; what to do with it is decided elsewhere.

Theory of operation. Connections, their one call at a time, deadlines and the ways in which libvirtd can be away are in
``virtlines``. What is here asks and reads: lifecycle events become ``DomainEvent``; when connections are back after a loss,
one event with an empty uuid says: look at everything again.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeVar
from xml.etree.ElementTree import fromstring

import libvirt

from casemate_agent.domain import HostShape, domain_xml, parse_domain
from casemate_agent.domain.facts import machine_type, serial_path
from casemate_agent.domain.metadata import full_record, record_digest
from casemate_agent.domain.moved import moved_xml
from casemate_agent.domain.names import channel_path, check_uid
from casemate_agent.domain.stats import parse_stats
from casemate_agent.drivers.deadline import DeadlineExecutor, Observe, unobserved
from casemate_agent.drivers.files import write_private
from casemate_agent.drivers.kvm import Virtualisation, probe
from casemate_agent.drivers.pciplaces import read_places
from casemate_agent.drivers.ports import DomainEvent, DomainFacts, DomainFiles, DomainPhase, DomainStats, QemuThreads
from casemate_agent.drivers.threads import ThreadReader
from casemate_agent.drivers.virtlines import (
    KEEPALIVE_COUNT,
    KEEPALIVE_INTERVAL_S,
    HypervisorFailed,
    Lines,
    Remaining,
)
from casemate_core.cpuset import CpuSet
from casemate_core.errors import CasemateError, DeadlineExceeded, InternalError, MachineError, NotFound
from casemate_core.quantity import MIB
from casemate_core.spec.instance import DesiredInstance

T = TypeVar("T")
log = logging.getLogger(__name__)

DEFAULT_URI = "qemu:///system"
#: Events kept for a reader that is slow; beyond it they become one "look at everything".
MAX_QUEUED_EVENTS = 1024
#: A migration that is given up has so long to end, in seconds.
ABORT_S = 30.0

PHASES = {
    libvirt.VIR_DOMAIN_NOSTATE: DomainPhase.SHUT_OFF,
    libvirt.VIR_DOMAIN_RUNNING: DomainPhase.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainPhase.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainPhase.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainPhase.SHUTTING_DOWN,
    libvirt.VIR_DOMAIN_SHUTOFF: DomainPhase.SHUT_OFF,
    libvirt.VIR_DOMAIN_CRASHED: DomainPhase.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainPhase.PAUSED,
}
EVENT_WORDS = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "suspended by the guest",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}
STOPPED_WORDS = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "the guest powered off",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "QEMU ended unexpectedly",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "migrated away",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: "saved",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "failed to start",
}


@dataclass(frozen=True, slots=True)
class LibvirtSettings:
    """Where libvirt and our folders are. ``probe_cache`` is the file that remembers whether KVM works."""

    uri: str = DEFAULT_URI
    run_dir: str = "/run/casemate"
    instances_dir: str = "/var/lib/casemate/instances"
    probe_cache: str = "/var/lib/casemate/virtualisation.json"
    scope: str = "main"


class LibvirtHypervisor:
    """``ports.Hypervisor`` on one libvirtd. Use as ``async with``; one event loop."""

    def __init__(self, settings: LibvirtSettings, observe: Observe = unobserved) -> None:
        self._settings = settings
        self._calls = DeadlineExecutor("libvirt", observe=observe)
        #: Migrations take as long as they take, and keep nobody else from a thread.
        self._moves = DeadlineExecutor("libvirt-moves", threads=4, observe=observe)
        self._lines = Lines(settings.uri, self._calls, self._on_lifecycle, self._on_back)
        self._readers: set[asyncio.Queue[DomainEvent]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shape: HostShape | None = None
        self._virtualisation: Virtualisation | None = None
        self._probing = asyncio.Lock()
        self._pids: dict[tuple[str, int], int] = {}
        self._threads = ThreadReader()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._lines.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._lines.end()
        self._calls.close()
        self._moves.close()

    # --- the port -----------------------------------------------------------------------------------------------------

    async def domains(self, deadline_s: float) -> tuple[DomainFacts, ...]:
        return await self._lines.call("list domains", self._domains, deadline_s)

    async def descriptions(self, deadline_s: float) -> Mapping[str, str]:
        return await self._lines.call("domain descriptions", self._descriptions, deadline_s)

    async def stats(self, deadline_s: float, uids: frozenset[str] | None = None) -> tuple[DomainStats, ...]:
        return await self._lines.call("domain statistics", lambda c: self._stats(c, uids), deadline_s)

    async def define(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> None:
        async with Remaining(deadline_s) as left:
            shape = await self.shape(left())
            placed = replace(files, places=read_places(files.functions))
            await self._lines.call("define domain", lambda c: self._define(c, desired, placed, shape), left())

    async def expect(self, desired: DesiredInstance, files: DomainFiles, deadline_s: float) -> str:
        async with Remaining(deadline_s) as left:
            shape = await self.shape(left())
            write_private(self._record_path(desired.uid), full_record(desired).encode())
            return domain_xml(desired, replace(files, places=read_places(files.functions)), shape)

    async def migrate(self, uid: str, xml: str, *, virt: str, memory: str, disk: str, deadline_s: float) -> None:
        """``passages.Migrates``."""
        call = partial(_migrate, self._settings.uri, f"qemu+unix:///system?socket={virt}", uid, xml, memory, disk)
        work = asyncio.ensure_future(self._moves.run("migrate", call, deadline_s + ABORT_S))
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(work)
        except (asyncio.CancelledError, TimeoutError) as error:
            if not work.done():
                await self._give_up(uid, work)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"not sent within {deadline_s:.0f} s") from None
            raise

    async def _give_up(self, uid: str, work: "asyncio.Future[None]") -> None:
        """Have a migration end: it is asked to, until it has, whoever has lost patience meanwhile."""

        def abort(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is not None and domain.isActive():
                domain.abortJob()

        end_s = asyncio.get_running_loop().time() + ABORT_S
        while not work.done() and asyncio.get_running_loop().time() < end_s:
            with suppress(asyncio.CancelledError, CasemateError):
                await self._lines.call("abort a migration", abort, 5.0)
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work}, timeout=1.0)
        if work.done():
            with suppress(CasemateError, asyncio.CancelledError):
                work.result()
        else:
            work.cancel()

    async def affinities(self, pids: tuple[int, ...], deadline_s: float) -> Mapping[int, QemuThreads]:
        # In the loop: no call of it waits for anything, and a hundred VMs take a few milliseconds.
        return self._threads.look(pids)

    async def pin(self, uid: str, vcpus: tuple[CpuSet, ...], rest: CpuSet, deadline_s: float) -> None:
        def pin(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is None:
                raise NotFound("domain", uid)
            if not domain.isActive():
                return
            live = libvirt.VIR_DOMAIN_AFFECT_LIVE
            # The others first: they are as many as they like, a vCPU is never left without a place.
            domain.pinEmulator(_map(rest), live)
            for thread in domain.ioThreadInfo(live):
                domain.pinIOThread(thread[0], _map(rest), live)
            for vcpu in range(domain.vcpusFlags(live)):
                wanted = vcpus[0] if len(vcpus) == 1 else vcpus[vcpu]
                domain.pinVcpuFlags(vcpu, _map(wanted), live)
            pid, reader = _qemu_pid(uid), ThreadReader()
            reader.bind_rest(pid, rest)
            found = reader.look((pid,)).get(pid)
            if found is None:
                return  # it has ended meanwhile
            for vcpu, cpus in enumerate(found.vcpus):
                wanted = vcpus[0] if len(vcpus) == 1 else vcpus[vcpu]
                if cpus - wanted:
                    raise MachineError(f"vCPU {vcpu} was bound to {wanted}, and may still run on {cpus}")
            if found.rest - rest:
                raise MachineError(f"threads of its emulator were bound to {rest}, and may still run on {found.rest}")

        await self._lines.call("pin threads", pin, deadline_s)

    async def start(self, uid: str, deadline_s: float, *, frozen: bool = False) -> None:
        def start(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is None:
                raise NotFound("domain", uid)
            if not domain.isActive():
                Path(self._settings.run_dir).mkdir(mode=0o711, parents=True, exist_ok=True)
                try:
                    domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if frozen else 0)
                except libvirt.libvirtError:
                    # Two starts may meet; what counts is that it runs.
                    if not domain.isActive():
                        raise

        await self._lines.call("start domain", start, deadline_s)

    async def shutdown(self, uid: str, deadline_s: float) -> None:
        def shutdown(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is not None and domain.isActive():
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)

        await self._lines.call("shut down domain", shutdown, deadline_s)

    async def destroy(self, uid: str, deadline_s: float) -> None:
        def destroy(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is not None and domain.isActive():
                try:
                    domain.destroy()
                except libvirt.libvirtError:
                    if domain.isActive():
                        raise

        await self._lines.call("destroy domain", destroy, deadline_s)

    async def suspend(self, uid: str, deadline_s: float) -> None:
        def suspend(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is not None and domain.isActive() and domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
                domain.suspend()

        await self._lines.call("suspend domain", suspend, deadline_s)

    async def resume(self, uid: str, deadline_s: float) -> None:
        def resume(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is not None and domain.isActive() and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()

        await self._lines.call("resume domain", resume, deadline_s)

    async def reset(self, uid: str, deadline_s: float) -> None:
        def reset(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is None or not domain.isActive():
                raise NotFound("running domain", uid)
            domain.reset()

        await self._lines.call("reset domain", reset, deadline_s)

    async def resize_disk(self, uid: str, path: str, size_mib: int, deadline_s: float) -> None:
        def resize(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if (
                domain is None
                or not domain.isActive()
                or path not in parse_domain(domain.XMLDesc(), DomainPhase.RUNNING)[0].files
            ):
                raise NotFound("disk of a running domain", path)
            if domain.blockInfo(path)[0] < size_mib * MIB:
                domain.blockResize(path, size_mib * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

        await self._lines.call("resize disk", resize, deadline_s)

    async def undefine(self, uid: str, deadline_s: float) -> None:
        def undefine(connection: Any) -> None:
            domain = _lookup(connection, uid)
            if domain is not None:
                domain.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                )
            # After the domain: as long as there is one, its record must be found.
            self._record_path(uid).unlink(missing_ok=True)
            Path(channel_path(self._settings.run_dir, uid)).unlink(missing_ok=True)

        await self._lines.call("undefine domain", undefine, deadline_s)

    def events(self) -> AsyncIterator[DomainEvent]:
        # Registered now, not when the first event is asked for: nothing in between is missed.
        reader: asyncio.Queue[DomainEvent] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._readers.add(reader)
        return self._read(reader)

    async def virtualisation(self, deadline_s: float) -> str:
        async with Remaining(deadline_s) as left, self._probing:
            if self._virtualisation is None:
                cache = Path(self._settings.probe_cache)
                # Not on the connection's threads: it runs QEMU, and nothing of libvirt.
                self._virtualisation = await self._calls.run("probe KVM", lambda: probe(cache), left())
                if self._virtualisation.kind != "kvm":
                    log.warning("KVM is not usable, guests are emulated: %s", self._virtualisation.reason)
        return self._virtualisation.kind

    @property
    def virtualisation_reason(self) -> str:
        """Why ``virtualisation`` said what it said, for the host's conditions."""
        return self._virtualisation.reason if self._virtualisation else ""

    async def capabilities(self, deadline_s: float) -> str:
        """libvirt's XML about the host."""
        return await self._lines.call("read capabilities", lambda c: str(c.getCapabilities()), deadline_s)

    async def console_path(self, uid: str, deadline_s: float) -> str:
        """The pty of a running domain's serial port; empty where it does not run, or has none."""

        def look(connection: Any) -> str:
            domain = _lookup(connection, uid)
            if domain is None or not domain.isActive():
                return ""
            return serial_path(domain.XMLDesc(0))

        return await self._lines.call("find the console", look, deadline_s)

    # --- what domains here are made with ------------------------------------------------------------------------------

    async def shape(self, deadline_s: float) -> HostShape:
        """What of this host the XML of its domains depends on; asked of libvirt once."""
        if self._shape is None:
            async with Remaining(deadline_s) as left:
                kind = "kvm" if await self.virtualisation(left()) == "kvm" else "qemu"
                machine, emulator = await self._lines.call("read capabilities", lambda c: _machine(c, kind), left())
                cells = await self._lines.call("read capabilities", _cells, left())
            self._shape = HostShape(
                kind=kind,
                machine=machine,
                emulator=emulator,
                run_dir=self._settings.run_dir,
                instances_dir=self._settings.instances_dir,
                scope=self._settings.scope,
                numa=cells > 1,
            )
        return self._shape

    def _record_path(self, uid: str) -> Path:
        return Path(self._settings.instances_dir) / check_uid(uid) / "record.json"

    def _define(self, connection: Any, desired: DesiredInstance, files: DomainFiles, shape: HostShape) -> None:
        existing = _lookup(connection, desired.uid)
        if existing is not None:
            # A guest keeps the machine that it was installed on, whatever QEMU is here now.
            machine = machine_type(existing.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
            shape = replace(shape, machine=machine or shape.machine)
        # Before the domain, whose metadata has its digest: a domain without its record says nothing of its pods.
        write_private(self._record_path(desired.uid), full_record(desired).encode())
        connection.defineXMLFlags(domain_xml(desired, files, shape), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _domains(self, connection: Any) -> tuple[DomainFacts, ...]:
        found = []
        pids: dict[tuple[str, int], int] = {}
        for domain in connection.listAllDomains():
            try:
                state, why = domain.state()
                xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
                number = domain.ID() if domain.isActive() else -1
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    continue  # gone since the list was made
                raise
            pid = 0
            # Where the threads of a QEMU may run means nothing before libvirt has bound them, and until the guest's first
            # instruction libvirt lets nobody else bind them.
            starting = state == libvirt.VIR_DOMAIN_PAUSED and why == libvirt.VIR_DOMAIN_PAUSED_STARTING_UP
            if number >= 0 and not starting:
                key = (domain.UUIDString(), number)
                pid = self._pids.get(key) or _qemu_pid(key[0])
                pids[key] = pid
            facts, owner = parse_domain(xml, PHASES.get(state, DomainPhase.CRASHED), pid)
            frozen = state == libvirt.VIR_DOMAIN_PAUSED and why == libvirt.VIR_DOMAIN_PAUSED_USER
            if frozen:
                facts = replace(facts, frozen=True)
            elif state == libvirt.VIR_DOMAIN_PAUSED and why == libvirt.VIR_DOMAIN_PAUSED_MIGRATION:
                facts = replace(facts, halted=True)
            elif state == libvirt.VIR_DOMAIN_SHUTOFF and why == libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED:
                facts = replace(facts, left=True)
            if owner is not None:
                facts = replace(facts, record=self._record(owner.uid, owner.record, owner.digest))
            found.append(facts)
        self._pids = pids
        return tuple(sorted(found, key=lambda facts: facts.uuid))

    @staticmethod
    def _descriptions(connection: Any) -> dict[str, str]:
        found = {}
        for domain in connection.listAllDomains():
            try:
                xml = domain.XMLDesc()
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    continue  # gone since the list was made
                raise
            if parse_domain(xml, DomainPhase.RUNNING)[1] is not None:
                found[domain.name()] = xml
        return found

    @staticmethod
    def _stats(connection: Any, uids: frozenset[str] | None) -> tuple[DomainStats, ...]:
        wanted = (
            libvirt.VIR_DOMAIN_STATS_STATE
            | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
            | libvirt.VIR_DOMAIN_STATS_BALLOON
            | libvirt.VIR_DOMAIN_STATS_VCPU
            | libvirt.VIR_DOMAIN_STATS_INTERFACE
            | libvirt.VIR_DOMAIN_STATS_BLOCK
        )
        # A domain that is busy (a job on its monitor) tells what can be told without asking its QEMU.
        at_once = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
        if uids is None:
            told = connection.getAllDomainStats(wanted, at_once)
        else:
            some = [domain for domain in connection.listAllDomains(0) if domain.UUIDString() in uids]
            told = connection.domainListGetStats(some, wanted, at_once) if some else []
        found = []
        for domain, record in told:
            phase = PHASES.get(record.get("state.state", -1), DomainPhase.CRASHED)
            found.append(parse_stats(domain.UUIDString(), domain.name(), phase, record))
        return tuple(sorted(found, key=lambda stats: stats.uuid))

    def _record(self, uid: str, public: str, digest: str) -> str:
        """The record that the domain was defined with: the private file where it is that one, else the public part.

        Where the file is lost and held more than the metadata, nothing: half a record would take a guest's pods away.
        """
        with suppress(OSError, UnicodeDecodeError, InternalError):
            text = self._record_path(uid).read_text()
            if record_digest(text) == digest:
                return text
        return public if record_digest(public) == digest else ""

    # --- events -------------------------------------------------------------------------------------------------------

    async def _read(self, reader: "asyncio.Queue[DomainEvent]") -> AsyncIterator[DomainEvent]:
        try:
            while True:
                yield await reader.get()
        finally:
            self._readers.discard(reader)

    def _publish(self, event: DomainEvent) -> None:
        for reader in self._readers:
            if reader.full():
                while not reader.empty():
                    reader.get_nowait()
                reader.put_nowait(DomainEvent("", "", "events were lost: the reader is slow"))
            reader.put_nowait(event)

    def _on_lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        """In libvirt's thread."""
        words = EVENT_WORDS.get(event, f"event {event}")
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            words = f"{words}: {STOPPED_WORDS.get(detail, detail)}"
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._publish, DomainEvent(domain.UUIDString(), domain.name(), words))

    def _on_back(self) -> None:
        self._publish(DomainEvent("", "", "the connection to libvirt is back"))


def _migrate(here: str, there: str, uid: str, xml: str, memory: str, disk: str) -> None:
    """In a thread, with connections of its own: one migration, to its end. What it leaves is frozen there and off here.

    This process is libvirt's client at both hosts. Were it to die, both connections would close, and libvirt itself would end
    what is half there and let the source go on.
    """
    source = target = None
    try:
        source = libvirt.open(here)
        target = libvirt.open(there)
        for each in (source, target):
            each.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        domain = _lookup(source, uid)
        if domain is None:
            raise NotFound("domain", uid)
        made = moved_xml(xml, domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE))
        flags = (
            libvirt.VIR_MIGRATE_LIVE
            # It goes on when the manager has switched over, and not because libvirt thinks that it has arrived.
            | libvirt.VIR_MIGRATE_PAUSED
            | libvirt.VIR_MIGRATE_PERSIST_DEST
            | libvirt.VIR_MIGRATE_NON_SHARED_INC
            | libvirt.VIR_MIGRATE_AUTO_CONVERGE
            | libvirt.VIR_MIGRATE_ABORT_ON_ERROR
        )
        parameters = {
            libvirt.VIR_MIGRATE_PARAM_URI: f"unix://{memory}",
            libvirt.VIR_MIGRATE_PARAM_DISKS_URI: f"unix://{disk}",
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: made,
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: made,
        }
        domain.migrate3(target, parameters, flags)
    except libvirt.libvirtError as error:
        text = error.get_error_message() or str(error)
        # ``from None``: the traceback holds libvirt's objects, and they must not leave this thread.
        raise HypervisorFailed("migrate", text, error.get_error_code()) from None
    finally:
        for each in (target, source):
            if each is not None:
                with suppress(libvirt.libvirtError):
                    each.close()


def _lookup(connection: Any, uid: str) -> Any:
    try:
        return connection.lookupByUUIDString(uid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _map(cpus: CpuSet) -> tuple[bool, ...]:
    """As libvirt takes it: one word for each thread of the host, the last one that is true ends it."""
    return tuple(number in cpus for number in range(cpus.mask.bit_length()))


def _machine(connection: Any, kind: str) -> tuple[str, str]:
    """(versioned machine type of q35, path of the emulator) for guests of this kind."""
    element = fromstring(connection.getDomainCapabilities(None, "x86_64", "q35", kind, 0))
    return element.findtext("machine", "q35"), element.findtext("path", "/usr/bin/qemu-system-x86_64")


def _cells(connection: Any) -> int:
    """How many NUMA cells libvirt sees."""
    return len(fromstring(connection.getCapabilities()).findall("host/topology/cells/cell"))


def _qemu_pid(uuid: str) -> int:
    """Process of the domain's QEMU: libvirt gives it the uuid as an argument. 0 where there is none (yet)."""
    wanted = uuid.encode()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            arguments = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        for flag, value in pairwise(arguments):
            if flag == b"-uuid" and value == wanted:
                return int(name)
    return 0
