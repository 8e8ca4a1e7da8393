"""One record of a GPU's health, whoever owns it at the moment. PURE.

What may live here: the join of what is seen from different sides, and the judgement of it. The sides are the PCIe link, which
the host sees at all times; the library's reading, while the host's own driver holds the GPU; the XIDs that the host heard of.
A GPU on vfio-pci has no reading of its host's; what the guest that has it tells is read as the word of a guest. What neither
tells is not known, which is said, not guessed.

The judgement is what may be done, not what is done: *broken* is to be held back at its next return, *suspect* is worth a
person's look. What is done about each, and about what a guest alone says, is for a policy; nothing of it ends a guest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from casemate_agent.gpu.checks import FATAL_XIDS, HOT_C
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import GpuFault, GpuReading, growth
from casemate_core.gpu import GpuFigures

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
    own: Health = Health.UNKNOWN
    """The same without what a guest said."""
    told_by: str = ""
    """Who told the reading: ``host`` or ``guest``; empty for nobody."""
    figures: GpuFigures | None = None
    """What people are shown, not older than a minute or so."""


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
    guest: GpuReading | None = None,
    hot_c: int = HOT_C,
    *,
    given: bool = False,
) -> GpuHealth:
    """The record. ``before``: the link ``since_s`` seconds ago, against which its counters are held. ``guest``: what the guest
    that has it tells; the host's own reading comes before it. ``hot_c``: from here on it is too hot. ``given``: to a guest."""
    broken: list[str] = []
    suspect: list[str] = []
    if reading is not None and reading.lost:
        broken.append("it has fallen off the bus")
    fatal = dict.fromkeys(f.xid for f in faults if f.uuid == uuid and f.xid in FATAL_XIDS)
    broken += [f"XID {xid}: {FATAL_XIDS[xid]}" for xid in fatal]
    if reading is not None:
        _judge_board(reading, hot_c, "", broken, suspect)
    if given and link is not None and not link.driver:
        # The kernel unbinds a card that is pulled, and then waits for whoever has it open (vfio, "Relaying device request").
        suspect.append("it is being pulled out while a guest has it")
    if link is not None:
        _judge_link(link, before, since_s, broken, suspect)
    own = _worst(broken, suspect, seen=link is not None or reading is not None)
    if reading is None and guest is not None:
        _judge_board(guest, hot_c, "its guest says: ", broken, suspect)
    return GpuHealth(
        uuid,
        owner_of(link, reading),
        _worst(broken, suspect, seen=link is not None or reading is not None or guest is not None),
        (*broken, *suspect),
        reading or guest,
        link,
        own,
        "host" if reading is not None else "guest" if guest is not None else "",
    )


def _worst(broken: list[str], suspect: list[str], *, seen: bool) -> Health:
    if broken:
        return Health.BROKEN
    if suspect:
        return Health.SUSPECT
    return Health.WELL if seen else Health.UNKNOWN


def _judge_board(reading: GpuReading, hot_c: int, who: str, broken: list[str], suspect: list[str]) -> None:
    if reading.rows_failed:
        broken.append(f"{who}a row of its memory could not be remapped")
    if reading.rows_pending:
        suspect.append(f"{who}a row of its memory waits for a reset to be remapped")
    if reading.ecc_uncorrected:
        suspect.append(f"{who}{reading.ecc_uncorrected} uncorrected ECC errors since the driver was loaded")
    if reading.temperature_c is not None and reading.temperature_c >= hot_c:
        suspect.append(f"{who}it is {reading.temperature_c} °C hot, less than {hot_c} is wanted")


def with_figures(now: GpuHealth, before: GpuHealth | None, at_s: float, every_s: float) -> GpuHealth:
    """With the figures of this moment, or those of before where they are new enough: they are told to the manager, who is not
    to hear of each degree."""
    old = before.figures if before is not None else None
    same = before is not None and (before.health, before.told_by) == (now.health, now.told_by)
    if old is not None and same and 0 <= at_s - old.at_s < every_s:
        return replace(now, figures=old)
    return replace(now, figures=figures(now.reading, now.link, now.told_by, at_s))


def figures(reading: GpuReading | None, link: LinkReading | None, told_by: str, at_s: float) -> GpuFigures:
    """What people are shown of a GPU."""
    r, rows = (
        reading,
        [n for n in (reading.rows_remapped_corrected, reading.rows_remapped_uncorrected) if n is not None]
        if (reading)
        else [],
    )
    errors = [n for n in (link.nonfatal, link.fatal) if n is not None] if link else []
    return GpuFigures(
        told_by=told_by,
        at_s=at_s,
        temperature_c=r.temperature_c if r else None,
        power_w=r.power_mw / 1000 if r and r.power_mw is not None else None,
        gpu_busy_percent=r.gpu_busy_percent if r else None,
        memory_used_mib=r.memory_used_mib if r else None,
        ecc_corrected=r.ecc_corrected if r else None,
        ecc_uncorrected=r.ecc_uncorrected if r else None,
        rows_remapped=sum(rows) if rows else None,
        rows_pending=r.rows_pending if r else None,
        rows_failed=r.rows_failed if r else None,
        link_speed_gts=link.speed if link else None,
        link_speed_max_gts=link.speed_max if link else None,
        link_width=link.width if link else None,
        link_width_max=link.width_max if link else None,
        link_errors=sum(errors) if errors else None,
    )


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
