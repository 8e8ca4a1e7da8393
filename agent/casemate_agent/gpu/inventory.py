"""Which GPUs a host has, from what its library tells now and what was seen before. PURE.

What may live here: the join of readings with what is remembered. A GPU's identity is its UUID, and only the vendor's library
tells it, and only while the vendor's driver holds the card. A card that was given to a guest is on vfio-pci, and all that is
seen of it then is a PCI address. Within one boot of the host the address still names the card; over a reboot it may not. So a
GPU is remembered with the boot in which it was seen last:

    told by the library                               it is there, at the address told
    not told, seen in this boot, its address is there it is there; whoever has it, has it
    not told, seen in this boot, no address           gone
    not told, seen in an earlier boot                 held back: what is at that address now may be another card
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from casemate_agent.gpu.readings import GpuReading
from casemate_core.topology_loaders import GpuFacts

VENDOR_DRIVER = "nvidia"


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """A GPU as it was told last, and in which boot of the host."""

    facts: GpuFacts
    boot_id: str


@dataclass(frozen=True, slots=True)
class GpuSight:
    """What a host has: GPUs for its topology; what is to be remembered; what is held back or missing, with the reason."""

    gpus: tuple[GpuFacts, ...] = ()
    known: Mapping[str, KnownGpu] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def facts_of(reading: GpuReading) -> GpuFacts:
    """What of a reading belongs to a topology: what a card is, not how it is."""
    cut = bool(reading.mig or reading.share_alike)  # MIG profiles are told while it is off, too
    return GpuFacts(
        address=reading.address,
        uuid=reading.uuid,
        model=reading.model,
        memory_mib=reading.memory_mib or 0,
        module_id=-1 if reading.module_id is None else reading.module_id,
        share_slots=reading.share_slots if cut else 0,
        share_profiles=reading.share_profiles if cut else (),
        share_alike=reading.share_alike,
    )


def sight(
    readings: Sequence[GpuReading] | None,
    known: Mapping[str, KnownGpu],
    boot_id: str,
    drivers: Mapping[str, str],
) -> GpuSight:
    """The GPUs of a host now. ``readings``: None where the library does not answer. ``drivers``: by address of every PCI
    function there is, the driver that holds it, empty for none."""
    told = {reading.uuid: reading for reading in readings or ()}
    remembered = dict(known)
    there: list[GpuFacts] = []
    problems: list[str] = []
    for uuid in sorted(told.keys() | known.keys()):
        reading, before = told.get(uuid), known.get(uuid)
        if reading is not None and not reading.lost and reading.memory_mib is not None:
            facts = facts_of(reading)
            remembered[uuid] = KnownGpu(facts, boot_id)
            there.append(facts)
        elif before is None:
            problems.append(f"GpuLost: {uuid} is known to its driver and does not answer; it was never seen whole")
        elif reading is not None:
            problems.append(f"GpuLost: {uuid} at {reading.address} has fallen off the bus; it is given to nobody")
        elif before.boot_id != boot_id:
            problems.append(
                f"IdentityUncertain: {uuid} was at {before.facts.address} in an earlier boot and has not been told in "
                "this one; it is held back until its driver tells it"
            )
        elif before.facts.address not in drivers:
            problems.append(f"GpuMissing: {uuid} was at {before.facts.address}, where nothing is now")
        elif readings is not None and drivers[before.facts.address] == VENDOR_DRIVER:
            problems.append(f"GpuMissing: its driver holds {before.facts.address} and does not tell {uuid}")
        else:
            there.append(before.facts)
    return GpuSight(tuple(there), remembered, tuple(problems))
