"""One record of a GPU's health, whoever owns it at the moment. PURE.

What may live here: the join of what is seen from different sides, and the judgement of it. The sides are the PCIe link, which
the host sees at all times; the library's reading, while the host's own driver holds the GPU; the XIDs that the host heard of.
A GPU on vfio-pci has no reading: what a guest does with it is not known to the host, which is said, not guessed.

The judgement is what may be done, not what is done: *broken* is to be held back at its next return, *suspect* is worth a
person's look. Which of them drains a host is for a policy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from casemate_agent.gpu.checks import FATAL_XIDS
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import GpuFault, GpuReading, growth

CORRECTED_A_DAY = 1000
"""Corrected PCIe errors that a link may have in a day before it is worth a look: retries are normal, a stream of them is not."""


class Health(StrEnum):
    """Judgement of a GPU."""

    WELL = "well"
    SUSPECT = "suspect"
    BROKEN = "broken"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What is known of one GPU. ``reasons`` say why it is not well, worst first."""

    uuid: str
    owner: str
    """``host``, ``guest`` (on vfio-pci), or ``nobody`` (no driver)."""
    health: Health
    reasons: tuple[str, ...]
    reading: GpuReading | None
    link: LinkReading | None


def owner_of(link: LinkReading | None, reading: GpuReading | None) -> str:
    """Who holds it, from its driver."""
    if reading is not None:
        return "host"
    if link is None or not link.driver:
        return "nobody"
    return "guest" if link.driver == "vfio-pci" else "host"


def judge(
    uuid: str,
    reading: GpuReading | None,
    link: LinkReading | None,
    faults: Iterable[GpuFault] = (),
    before: LinkReading | None = None,
    since_s: float = 0.0,
    *,
    given: bool = False,
) -> GpuHealth:
    """The record. ``before``: the link ``since_s`` seconds ago, against which its counters are held; ``given``: to a guest."""
    broken: list[str] = []
    suspect: list[str] = []
    if reading is not None and reading.lost:
        broken.append("it has fallen off the bus")
    fatal = dict.fromkeys(f.xid for f in faults if f.uuid == uuid and f.xid in FATAL_XIDS)
    broken += [f"XID {xid}: {FATAL_XIDS[xid]}" for xid in fatal]
    if reading is not None:
        if reading.rows_failed:
            broken.append("a row of its memory could not be remapped")
        if reading.rows_pending:
            suspect.append("a row of its memory waits for a reset to be remapped")
        if reading.ecc_uncorrected:
            suspect.append(f"{reading.ecc_uncorrected} uncorrected ECC errors since the driver was loaded")
    if given and link is not None and not link.driver:
        # The kernel unbinds a card that is pulled, and then waits for whoever has it open (vfio, "Relaying device request").
        suspect.append("it is being pulled out while a guest has it")
    if link is not None:
        _judge_link(link, before, since_s, broken, suspect)
    if broken:
        health = Health.BROKEN
    elif suspect:
        health = Health.SUSPECT
    elif link is None and reading is None:
        health = Health.UNKNOWN
    else:
        health = Health.WELL
    return GpuHealth(uuid, owner_of(link, reading), health, (*broken, *suspect), reading, link)


def _judge_link(
    link: LinkReading, before: LinkReading | None, since_s: float, broken: list[str], suspect: list[str]
) -> None:
    if link.width is not None and link.width_max is not None and link.width < link.width_max:
        suspect.append(f"its link is x{link.width} of x{link.width_max}")
    if fatal := _grown(link.fatal, before.fatal if before else None):
        broken.append(f"{fatal} fatal PCIe errors")
    if nonfatal := _grown(link.nonfatal, before.nonfatal if before else None):
        suspect.append(f"{nonfatal} PCIe errors that were not corrected")
    corrected = _grown(link.corrected, before.corrected if before else None)
    if before is not None and since_s > 0 and corrected > max(1.0, CORRECTED_A_DAY * since_s / 86_400):
        suspect.append(f"{corrected} corrected PCIe errors in {since_s:.0f} s")


def _grown(now: int | None, before: int | None) -> int:
    """Growth of a counter; one that is not told is no sign of anything."""
    return 0 if now is None else growth(now, before)
