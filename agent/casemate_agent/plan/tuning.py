"""What of the host is to be written for real time, and for pages that were promised. PURE.

What may live here: which broken lines of the profile this host's policy lets the agent put right, and pools of huge pages
that are smaller than what was promised of them. The lines themselves are :mod:`casemate_agent.realtime.profile`'s.
"""

from collections.abc import Mapping

from casemate_agent.actions import Tune
from casemate_agent.plan.drafting import Settings
from casemate_agent.realtime.profile import Line
from casemate_core.claims import Claim
from casemate_core.topology import Topology


def _missing(topology: Topology, claims: Mapping[str, Claim]) -> list[tuple[int, int, int, int]]:
    """(cell, page size in KiB, pages there are, pages promised) of the pools that are short."""
    there = {(cell.id, pool.page_kib): pool.count for cell in topology.cells for pool in cell.pools}
    promised: dict[tuple[int, int], int] = {}
    for claim in claims.values():
        for pages in claim.pages:
            key = pages.cell, pages.page_kib
            promised[key] = promised.get(key, 0) + pages.count + pages.growth
    return [
        (cell, page_kib, there.get((cell, page_kib), 0), count)
        for (cell, page_kib), count in sorted(promised.items())
        if there.get((cell, page_kib), 0) < count
    ]


def short_pools(topology: Topology, claims: Mapping[str, Claim]) -> list[str]:
    """Drift: pools that somebody shrank below what was promised of them."""
    return [
        f"PagePoolShort: cell {cell} has {there} pages of {page_kib} KiB, {count} are promised"
        for cell, page_kib, there, count in _missing(topology, claims)
    ]


def tune(
    settings: Settings,
    profile: tuple[Line, ...],
    topology: Topology,
    claims: Mapping[str, Claim],
    refused: frozenset[str],
) -> tuple[Tune, ...]:
    """What this host's policy lets the agent set. What the kernel refused once is not asked for again."""
    found: list[Tune] = []
    if settings.realtime == "apply":
        found += [Tune(path, text, f"profile: {each.line.name}") for each in profile for path, text in each.writes]
    if settings.repair_pages:
        for cell, page_kib, _, count in _missing(topology, claims):
            path = f"sys/devices/system/node/node{cell}/hugepages/hugepages-{page_kib}kB/nr_hugepages"
            found.append(Tune(path, str(count), "so many pages are promised"))
    return tuple(each for each in found if each.path not in refused)
