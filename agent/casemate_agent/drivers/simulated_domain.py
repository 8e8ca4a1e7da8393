"""A domain of the simulated hypervisor, and the names and timers that the simulated machine and its drivers share.

What may live here: values and small functions that :mod:`casemate_agent.drivers.simulated` and
:mod:`casemate_agent.drivers.simulated_ports` both need.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from casemate_agent.drivers.ports import (
    BlockStats,
    DomainFacts,
    DomainFiles,
    DomainPhase,
    DomainStats,
    InterfaceStats,
    QemuThreads,
    VcpuStats,
)
from casemate_agent.drivers.simulated_guest import SimulatedGuest
from casemate_agent.ledger.desired import to_metadata
from casemate_core.cpuset import CpuSet
from casemate_core.quantity import MIB
from casemate_core.spec.instance import DesiredInstance, bridged

ACTIVE = (DomainPhase.RUNNING, DomainPhase.PAUSED, DomainPhase.SHUTTING_DOWN)


@dataclass(slots=True)
class SimulatedDomain:
    """A domain of the simulated hypervisor."""

    facts: DomainFacts
    desired: DesiredInstance | None = None
    files: DomainFiles | None = None
    guest: SimulatedGuest | None = None
    #: Keys of the functions that it holds open while it runs.
    functions: tuple[str, ...] = ()
    #: UUIDs of the GPUs that it holds open while it runs.
    gpus: tuple[str, ...] = ()
    #: Names of the vGPUs that it holds open while it runs.
    shares: tuple[str, ...] = ()
    #: Where its threads may run, while it runs.
    threads: QemuThreads = field(default_factory=QemuThreads)
    #: What each of its vCPUs has for itself by a cpuset partition.
    partitions: tuple[CpuSet, ...] = ()
    #: Somebody has undone one of them.
    undone: bool = False


def defined_facts(desired: DesiredInstance, files: DomainFiles, name: str) -> DomainFacts:
    """What the hypervisor reports of a domain that was just made from these."""
    return DomainFacts(
        uuid=desired.uid,
        name=name,
        phase=DomainPhase.SHUT_OFF,
        owned=True,
        instance_uid=desired.uid,
        generation=desired.generation,
        placement_epoch=desired.placement.epoch,
        placement_generation=desired.placement.generation,
        vcpus=desired.cpus,
        memory_mib=desired.memory_mib,
        taps=tuple(tap_name(desired.uid, index) for index in range(len(bridged(desired.nics)))),
        files=tuple(f for f in (files.root, files.seed, files.kernel, files.initrd, *files.volumes) if f),
        channel_path=f"/simulated/{desired.uid}.sock",
        vcpu_pins=tuple(frozenset({thread}) for thread in desired.placement.claim.vcpus),
        emulator_pin=files.rest,
        record=to_metadata(desired),
    )


def simulated_stats(domain: SimulatedDomain) -> DomainStats:
    """What is counted of a domain in which nothing runs: it has its size, and its kernel has read each disk once."""
    facts = domain.facts
    size = facts.memory_mib * MIB
    if facts.phase not in ACTIVE:
        return DomainStats(facts.uuid, facts.name, facts.phase, memory_bytes=size, max_memory_bytes=size)
    counts = {f"{way}_{what}": 0 for way in ("receive", "transmit") for what in ("bytes", "packets", "errors", "drops")}
    disks = (domain.files.root, domain.files.seed) if domain.files is not None else ()
    reads = int(domain.guest is not None and domain.guest.kernel)
    return DomainStats(
        uuid=facts.uuid,
        name=facts.name,
        phase=facts.phase,
        cpu_time_ns=0,
        vcpus=facts.vcpus,
        memory_bytes=size,
        max_memory_bytes=size,
        memory={"rss": size},
        vcpu_stats=tuple(VcpuStats(number, 0, 0, 0) for number in range(facts.vcpus)),
        blocks=tuple(
            BlockStats(f"vd{chr(97 + index)}", path, 512 * reads, reads, 0, 0) for index, path in enumerate(disks)
        ),
        interfaces=tuple(InterfaceStats(tap, counts) for tap in facts.taps),
    )


def tap_name(uid: str, index: int) -> str:
    """Name of a simulated tap."""
    return "cm" + hashlib.sha256(f"{uid}/{index}".encode()).hexdigest()[:11]


def uuid_of(text: str) -> str:
    """A uuid made from a text, the same each time."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"


def later(delay_s: float, call: Callable[[], None]) -> None:
    """Call it after a time of the event loop."""
    asyncio.get_running_loop().call_later(delay_s, call)
