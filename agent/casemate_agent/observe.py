"""Asks every driver once, and returns one frozen observation.

What may live here: the questions, their deadlines, and nothing that decides. A driver that does not answer in time makes
its part of the observation unknown; it never makes the observation fail, and never holds up the event loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import TypeVar

from casemate_agent.domain.devices import SEED_TARGET
from casemate_agent.drivers.ports import (
    DomainFacts,
    DomainStats,
    Drivers,
    MachineFacts,
    PartitionFacts,
    ProcessFacts,
    QemuThreads,
)
from casemate_agent.gpu.health import GpuHealth
from casemate_agent.gpu.readings import CardFacts
from casemate_agent.gpu.shares import ShareFacts
from casemate_agent.hardware.functions import FunctionFacts
from casemate_agent.ledger.records import GuestView, InstanceRecord, Observation
from casemate_agent.plan.drafting import ACTIVE
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import CasemateError

log = logging.getLogger("casemate.agent.observe")

T = TypeVar("T")

NO_HEALTH: Mapping[str, GpuHealth] = MappingProxyType({})

#: Interfaces whose taps are looked for on behalf of an instance of which only files are left.
MOST_NICS = 8

KERNEL_DEADLINE_S = 2.0

NETWORK_CHECK_S = 600.0
"""How long the answer to whether this host can make networks holds: it costs a process, and a kernel rarely changes."""
NETWORK_RECHECK_S = 30.0
"""The same while the answer is no: somebody is mending it."""


@dataclass(slots=True)
class Observer:
    """Observes one host. ``deadline_s`` bounds each driver's answer."""

    drivers: Drivers
    deadline_s: float = 10.0
    #: Kept from the last good answer: a host does not change while its facts cannot be read.
    _machine: MachineFacts | None = None
    _virtualisation: str = ""
    _functions: FunctionFacts | None = None
    #: Look also at VMs whose threads float: they must be off those of others.
    floating: bool = True
    _affinities: dict[int, QemuThreads] = field(default_factory=dict)
    _partitions: PartitionFacts = field(default_factory=PartitionFacts)
    _kernels: frozenset[int] = frozenset()
    #: By file and by process, as they were read last.
    tuning: Mapping[str, str] | None = None
    processes: Mapping[int, ProcessFacts] = field(default_factory=dict)
    agent_threads: CpuSet = EMPTY
    _taps: dict[tuple[str, int], str] = field(default_factory=dict)
    _silent_since_s: dict[str, float] = field(default_factory=dict)
    _network_problem: str | None = None
    _network_checked_s: float = -inf

    async def machine(self) -> MachineFacts:
        """The host's facts. Raises MachineError where they were never read and cannot be now."""
        facts = await asyncio.wait_for(self.drivers.machine.observe(self.deadline_s), self.deadline_s + 1)
        self._machine = facts
        return facts

    async def changed(self) -> bool:
        """Read the machine's facts and its functions again; whether they are others than before. What gives no answer
        holds as it was."""
        machine, functions, affinities, partitions = await asyncio.gather(
            self._ask("machine", self.drivers.machine.observe, self.deadline_s, {}),
            self._ask("functions", self.drivers.functions.observe, self.deadline_s, {}),
            self._look_at_pins(tuple(self._affinities)),
            self._look_at_partitions(tuple(self._affinities)),
        )
        before = self._machine, self._functions, self._affinities, self._partitions
        self._affinities, self._partitions = affinities, partitions
        # The object of equal facts is kept: what is derived from it once is derived once.
        self._machine = machine if machine is not None and machine != self._machine else self._machine
        self._functions = functions if functions is not None else self._functions
        return before != (self._machine, self._functions, self._affinities, self._partitions)

    async def tuned(self, quiet: CpuSet, patterns: tuple[str, ...], pids: tuple[int, ...]) -> bool:
        """Read what the real-time profile is judged from, and keep this agent off the quiet threads; whether it is other than
        before. Nothing is read where there is nothing to judge."""
        before = self.tuning, self.processes, self.agent_threads
        tuning = self.drivers.tuning

        async def files(deadline_s: float) -> Mapping[str, str]:
            return await tuning.read(patterns, deadline_s)

        async def processes(deadline_s: float) -> Mapping[int, ProcessFacts]:
            return await tuning.processes(pids, deadline_s)

        async def confined(deadline_s: float) -> CpuSet:
            return await tuning.confine(quiet, deadline_s)

        if patterns and (read := await self._ask("tuning", files, self.deadline_s, {})) is not None:
            self.tuning = read
        self.processes = (await self._ask("tuning", processes, self.deadline_s, {}) or {}) if pids else {}
        if quiet:
            self.agent_threads = await self._ask("tuning", confined, self.deadline_s, {}) or EMPTY
        return before != (self.tuning, self.processes, self.agent_threads)

    async def _look_at_pins(self, pids: tuple[int, ...]) -> dict[int, QemuThreads]:
        """Where the threads of these processes may run; a process that is gone is left out."""
        if not pids:
            return {}

        async def ask(deadline_s: float) -> Mapping[int, QemuThreads]:
            return await self.drivers.hypervisor.affinities(pids, deadline_s)

        return dict(await self._ask("hypervisor", ask, self.deadline_s, {}) or {})

    async def _look_at_partitions(self, pids: tuple[int, ...]) -> PartitionFacts:
        """The cpusets of these processes' vCPUs, on a host that isolates threads so; empty where there is no answer."""
        if self._machine is None or not self._machine.partitionable:
            return PartitionFacts()

        async def ask(deadline_s: float) -> PartitionFacts:
            return await self.drivers.partitions.look(pids, deadline_s)

        return await self._ask("partitions", ask, self.deadline_s, {}) or PartitionFacts()

    def _watched(self, domain: DomainFacts) -> bool:
        """Whether it matters where the threads of this domain run."""
        pinned = any(len(pin) == 1 for pin in domain.vcpu_pins)
        return domain.owned and bool(domain.pid) and domain.phase in ACTIVE and (pinned or self.floating)

    @property
    def uncut(self) -> bool:
        """Whether a port that is to be cut is not."""
        return self._functions is not None and bool(self._functions.uncut)

    async def observe(
        self,
        now_s: float,
        records: Mapping[str, InstanceRecord],
        guests: Mapping[str, GuestView],
        busy: frozenset[str],
        gpu_health: Mapping[str, GpuHealth] = NO_HEALTH,
    ) -> Observation:
        """Look at everything. ``busy`` are the instances with an action under way at this moment; ``gpu_health`` is how GPUs
        were judged last."""
        drivers, deadline_s, silent = self.drivers, self.deadline_s, dict[str, str]()
        machine = self._machine or await self.machine()
        if not self._virtualisation:
            self._virtualisation = await self._ask("virtualisation", drivers.hypervisor.virtualisation, 60.0, {}) or ""
        looks = asyncio.gather(
            self._ask("hypervisor", drivers.hypervisor.domains, deadline_s, silent),
            self._ask("images", drivers.images.observe, deadline_s, silent),
            self._ask("networks", drivers.networks.observe, deadline_s, silent),
            self._ask("functions", drivers.functions.observe, deadline_s, silent),
            self._ask("volumes", drivers.volumes.observe, deadline_s, silent),
            self._check_network(now_s),
        )
        (domains, files, networks, functions, volumes, _), cards = await asyncio.gather(
            looks, self._look_at_cards(machine, silent)
        )
        shares = await self._look_at_shares(machine, silent)
        self._functions = functions if functions is not None else self._functions
        watched = tuple(filter(None, (d.pid for d in domains or () if self._watched(d))))
        self._affinities = await self._look_at_pins(watched)
        self._partitions = await self._look_at_partitions(watched)
        await self._look_for_kernels(domains or (), guests)
        self._silent_since_s = {port: self._silent_since_s.get(port, now_s) for port in silent}
        guarded: dict[str, tuple[str, ...]] = {}
        if networks is not None and networks.guards:
            uids = {*records, *(files.overlays if files else ()), *(files.seeds if files else ())}
            guarded = self._guarded(uids, networks.guards)
        return Observation(
            time_s=now_s,
            machine=machine,
            domains=None if domains is None else {d.uuid: d for d in domains if d.owned},
            foreign=() if domains is None else tuple(d for d in domains if not d.owned),
            files=files,
            networks=networks,
            functions=functions,
            volumes=volumes,
            cards=cards,
            gpu_health=dict(gpu_health),
            shares=shares,
            affinities=self._affinities,
            partitions=self._partitions.domains,
            set_aside=self._partitions.set_aside,
            kernels=self._kernels,
            tuning=self.tuning,
            processes=self.processes,
            agent_threads=self.agent_threads,
            guarded=guarded,
            guests=dict(guests),
            attached=drivers.guests.attached(),
            virtualisation=self._virtualisation,
            virtualisation_reason=drivers.hypervisor.virtualisation_reason,
            network_problem=self._network_problem,
            busy=busy,
            silent=silent,
            silent_since_s=dict(self._silent_since_s),
        )

    async def _look_for_kernels(self, domains: Iterable[DomainFacts], guests: Mapping[str, GuestView]) -> None:
        """Who of the guests that boot has a kernel at work: the seed is read by nobody before it."""
        active = {d.pid: d.uuid for d in domains if d.owned and d.pid}
        self._kernels &= active.keys()
        unheard = {uid: pid for pid, uid in active.items() if not guests.get(uid, GuestView()).boot_id}
        asked = frozenset(uid for uid, pid in unheard.items() if pid not in self._kernels)
        if not asked:
            return

        async def ask(deadline_s: float) -> tuple[DomainStats, ...]:
            return await self.drivers.hypervisor.stats(deadline_s, asked)

        # One QEMU that hangs must not hold up the whole look.
        for told in await self._ask("hypervisor", ask, min(self.deadline_s, KERNEL_DEADLINE_S), {}) or ():
            if any(disk.name == SEED_TARGET and disk.read_requests for disk in told.blocks):
                self._kernels |= {unheard[told.uuid]}

    async def _look_at_cards(self, machine: MachineFacts, silent: dict[str, str]) -> Mapping[str, CardFacts] | None:
        """Where GPUs are, and what holds them; a host without any is not asked."""
        if not machine.topology.gpus:
            return {}
        return await self._ask("cards", self.drivers.cards.look, self.deadline_s, silent)

    async def _look_at_shares(self, machine: MachineFacts, silent: dict[str, str]) -> Mapping[str, ShareFacts] | None:
        """Slices of GPUs; a host whose GPUs cannot be cut is not asked."""
        if not any(gpu.share_profiles or gpu.share_step_milli for gpu in machine.topology.gpus):
            return {}
        return await self._ask("shares", self.drivers.shares.look, self.deadline_s, silent)

    async def _check_network(self, now_s: float) -> None:
        """Ask whether this host can make networks, where the last answer is old."""
        age_s = now_s - self._network_checked_s
        if 0 <= age_s < (NETWORK_CHECK_S if self._network_problem == "" else NETWORK_RECHECK_S):
            return
        self._network_checked_s = now_s
        self._network_problem = await self._ask("networks", self.drivers.networks.condition, self.deadline_s, {})

    def _guarded(self, uids: Iterable[str], guards: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
        found = {}
        wanted = set(uids)
        for uid in wanted:
            taps = tuple(tap for index in range(MOST_NICS) if (tap := self._tap(uid, index)) in guards)
            if taps:
                found[uid] = taps
        for gone in [key for key in self._taps if key[0] not in wanted]:
            del self._taps[gone]
        return found

    def _tap(self, uid: str, index: int) -> str:
        key = (uid, index)
        if key not in self._taps:
            self._taps[key] = self.drivers.networks.tap(uid, index)
        return self._taps[key]

    @staticmethod
    async def _ask(
        port: str, ask: Callable[[float], Awaitable[T]], deadline_s: float, silent: dict[str, str]
    ) -> T | None:
        try:
            # the driver keeps its own deadline; this one is for a driver that does not
            async with asyncio.timeout(deadline_s + 1):
                return await ask(deadline_s)
        except TimeoutError:
            silent[port] = f"no answer in {deadline_s:.0f} s"
        except CasemateError as error:
            silent[port] = str(error)
        except OSError as error:
            silent[port] = f"{type(error).__name__}: {error}"
        except Exception as error:
            # A driver's defect is that part's, not the host's: its VMs need an agent that goes on with the others.
            silent[port] = f"a defect of the agent: {type(error).__name__}: {error}"
            log.exception("%s: defect", port)
        log.warning("%s does not answer: %s", port, silent[port])
        return None
