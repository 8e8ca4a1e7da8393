"""An agent's metrics at one moment: what was counted, what the agent knows, and one question to libvirt.

What may live here: reading. Theory of operation: libvirt is asked once a scrape for the statistics of all domains, under a
deadline; where it does not answer, ``libvirt_up`` is 0 and everything of its domains is absent. GPUs are asked in the same
way; of one that a guest holds only its link and the host's judgement are there. What the agent knows of itself is there in
any case.
"""

import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from casemate_agent.agent import Agent
from casemate_agent.drivers.ports import DomainStats
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.metrics import gpu_values
from casemate_agent.metrics import families as m
from casemate_core.errors import CasemateError
from casemate_core.metrics import Family, Rows, drift_kind
from casemate_core.quantity import MIB

if TYPE_CHECKING:
    from casemate_agent.uplink.link import Link

log = logging.getLogger("casemate.agent.scrape")

#: libvirt's answer about a hundred domains takes milliseconds; a scrape has ten seconds in all.
LIBVIRT_DEADLINE_S: Final = 5.0
GPUS_DEADLINE_S: Final = 2.0
NS: Final = 1_000_000_000

Values = dict[Family, dict[tuple[str, ...], float]]


class AgentMetrics:
    """Reads everything when it is asked. ``link`` where the agent has a manager."""

    def __init__(self, agent: Agent, link: "Link | None", version: str) -> None:
        self._agent = agent
        self._link = link
        self._version = version
        self._kinds: set[str] = set()
        #: Of each GPU the link as it was seen first, and when: its counters are held against it.
        self._links: dict[str, tuple[LinkReading | None, float]] = {}

    async def rows(self) -> list[Rows]:
        """What was counted and what is now."""
        found: Values = {m.BUILD: {("agent", self._version): 1}}
        self._of_the_agent(found)
        found |= await self._of_gpus()
        try:
            stats = await self._agent.drivers.hypervisor.stats(LIBVIRT_DEADLINE_S)
        except CasemateError as error:
            log.info("libvirt does not tell statistics: %s", error)
            found[m.UP] = {(): 0}
        else:
            found[m.UP] = {(): 1}
            found[m.DOMAINS] = {(): len(stats)}
            bridges = self._bridges()
            for each in stats:
                domain_values(found, each, bridges)
        return [*self._agent.meter.rows(), *(Rows(family, values) for family, values in found.items() if values)]

    def _of_the_agent(self, found: Values) -> None:
        agent = self._agent
        feed, report = agent.feed, agent.feed.report
        found[m.OUTBOX] = {(): len(feed.outbox)}
        if self._link is not None:
            found[m.CONNECTED] = {(): self._link.connected}
        if not feed.whole:
            return  # not looked yet: nothing is known
        found[m.INSTANCES] = {(word,): n for word, n in Counter(s.phase.value for s in feed.states.values()).items()}
        found[m.FOREIGN] = {(): report.foreign}
        if report.disk_free_mib:
            found[m.DISK_FREE] = {(): report.disk_free_mib * MIB}
        found[m.CONDITIONS] = {(c.type, c.status): 1 for c in report.conditions}
        drift = Counter(map(drift_kind, report.drift))
        self._kinds |= drift.keys()
        found[m.DRIFT] = {(kind,): drift[kind] for kind in self._kinds}
        found[m.DOMAIN_INFO] = {
            (agent.domain_names[uid], uid, r.desired.tenant, r.desired.environment, r.desired.name): 1
            for uid, r in agent.ledger.book.instances.items()
            if uid in agent.domain_names
        }

    async def _of_gpus(self) -> Values:
        agent, now_s = self._agent, self._agent.now()
        try:
            gpus = await agent.drivers.gpus.read(GPUS_DEADLINE_S)
        except (CasemateError, OSError) as error:
            log.info("GPUs are not told: %s", error)
            return {}
        judged = []
        for gpu in gpus:
            first, since_s = self._links.setdefault(gpu.uuid, (gpu.link, now_s))
            judged.append(agent.judged(gpu, first, now_s - since_s))
        return gpu_values(agent.name, judged, {fault.uuid: fault.xid for fault in agent.gpu_faults})

    def _bridges(self) -> dict[str, str]:
        """tap -> the bridge that it hangs on."""
        networks, found = self._agent.drivers.networks, {}
        for uid, record in self._agent.ledger.book.instances.items():
            for index, nic in enumerate(record.desired.nics):
                found[networks.tap(uid, index)] = networks.bridge(nic.network)
        return found


def domain_values(found: Values, stats: DomainStats, bridges: dict[str, str]) -> None:
    """Everything that is known of one domain; what is not is left out."""

    def add(family: Family, value: float | None, *labels: str) -> None:
        if value is not None:
            found.setdefault(family, {})[stats.name, *labels] = value

    number, words = m.STATES[stats.phase.value]
    add(m.STATE, number, words)
    add(m.VCPUS, stats.vcpus)
    add(m.MEMORY, stats.memory_bytes)
    add(m.MAX_MEMORY, stats.max_memory_bytes)
    add(m.CPU, None if stats.cpu_time_ns is None else stats.cpu_time_ns / NS)
    for what, size in stats.memory.items():
        add(m.MEMORY_STATS[what], size)
    for vcpu in stats.vcpu_stats:
        for name, family in m.VCPU.items():
            time_ns = getattr(vcpu, name)
            add(family, None if time_ns is None else time_ns / NS, str(vcpu.number))
    for disk in stats.blocks:
        for name, family in m.BLOCKS.items():
            add(family, getattr(disk, name), disk.path, disk.name)
    for interface in stats.interfaces:
        for name, value in interface.counts.items():
            add(m.INTERFACES[name], value, bridges.get(interface.name, ""), interface.name)
