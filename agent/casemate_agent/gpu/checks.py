"""Whether a GPU is fit to be given to somebody, judged from a reading. PURE.

What may live here: verdicts on values. The checks need the host's own driver to hold the GPU; what it holds them against is
a reading of the same GPU from before, where there is one.

Three results, and no fourth: ``passed``, ``failed``, ``unknown``. What a GPU does not tell is unknown and is said so in the
passport; whether unknown is good enough is for a policy to say (``required``), not for a check to guess.
"""

from collections.abc import Iterable

from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import GpuFault, GpuReading, growth
from casemate_core.gpu import Check, Result

__all__ = ["FATAL_XIDS", "HOT_C", "IDLE_MIB", "Check", "Result", "checks", "link_checks", "verdict"]

HOT_C = 87
"""Slow-down begins at about 87 to 92 degrees on data-centre boards: an idle GPU that is so hot is not cooled."""
IDLE_MIB = 1024
"""What the driver itself keeps of a GPU that nobody uses; on boards of today some hundreds of MiB."""

FATAL_XIDS = {
    48: "uncorrectable double-bit ECC error",
    63: "a row of memory is to be remapped",
    64: "a row of memory could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many corrected ECC errors",
    94: "contained uncorrectable ECC error",
    95: "uncontained uncorrectable ECC error",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor failed",
    140: "unrecovered ECC error",
}
"""XIDs that speak of the board rather than of a program on it (NVIDIA, "XID Errors", table of XIDs)."""


def checks(now: GpuReading, before: GpuReading | None = None, faults: Iterable[GpuFault] = ()) -> tuple[Check, ...]:
    """All checks of one GPU, always the same ones in the same order. ``before``: the reading at the last hand-over;
    ``faults``: XIDs since then."""
    if before is not None and before.uuid != now.uuid:
        raise ValueError(f"readings of two GPUs: {before.uuid} and {now.uuid}")
    if now.lost:
        return (Check("reachable", Result.FAILED, "it has fallen off the bus"),)
    return (
        Check("reachable", Result.PASSED, f"{now.model}, {now.uuid}"),
        _xids(now, faults),
        _grown("ecc", now.ecc_uncorrected, before.ecc_uncorrected if before else None, "uncorrected ECC errors"),
        _rows(now),
        _link(now.link_width, now.link_width_max),
        _grown("pcie-replays", now.pcie_replays, before.pcie_replays if before else None, "PCIe replays", most=1000),
        _below("temperature", now.temperature_c, HOT_C, "°C"),
        _idle(now),
    )


def link_checks(now: LinkReading, before: LinkReading | None = None) -> tuple[Check, ...]:
    """What the host sees of a card whatever driver holds it. ``before``: its link at the last hand-over."""
    found = [_link(now.width, now.width_max)]
    for name, counted, then in (
        ("pcie-fatal", now.fatal, before.fatal if before else None),
        ("pcie-nonfatal", now.nonfatal, before.nonfatal if before else None),
    ):
        found.append(_grown(name, counted, then, "uncorrected PCIe errors"))
    return tuple(found)


def verdict(found: Iterable[Check], required: Iterable[str] = ()) -> tuple[Check, ...]:
    """The checks for which a GPU is held back: those that failed, and those required that are not known to have passed."""
    wanted = frozenset(required)
    there = tuple(found)
    missing = wanted - {c.name for c in there}
    never = tuple(Check(name, Result.UNKNOWN, "was not made") for name in sorted(missing))
    return (
        *(c for c in there if c.result is Result.FAILED or (c.result is Result.UNKNOWN and c.name in wanted)),
        *never,
    )


def _xids(now: GpuReading, faults: Iterable[GpuFault]) -> Check:
    fatal = [f.xid for f in faults if f.uuid == now.uuid and f.xid in FATAL_XIDS]
    if fatal:
        return Check("xid", Result.FAILED, "; ".join(f"XID {xid}: {FATAL_XIDS[xid]}" for xid in dict.fromkeys(fatal)))
    return Check("xid", Result.PASSED, "none that speaks of the board")


def _grown(name: str, now: int | None, before: int | None, what: str, most: int = 0) -> Check:
    """A counter since the last reading."""
    if now is None:
        return Check(name, Result.UNKNOWN, f"{what}: not told")
    since = growth(now, before)
    result = Result.FAILED if since > most else Result.PASSED
    return Check(name, result, f"{since} {what}{f', {most} are tolerated' if most else ''}")


def _rows(now: GpuReading) -> Check:
    if now.rows_failed is None or now.rows_pending is None:
        return Check("rows", Result.UNKNOWN, "remapped rows: not told")
    remapped = f"{now.rows_remapped_uncorrected} rows remapped for uncorrected errors"
    if now.rows_failed:
        return Check("rows", Result.FAILED, f"a row could not be remapped; {remapped}")
    if now.rows_pending:
        return Check("rows", Result.FAILED, f"a row waits for a reset to be remapped; {remapped}")
    return Check("rows", Result.PASSED, remapped)


def _link(width: int | None, most: int | None) -> Check:
    """Only the width: the generation falls while a GPU idles, to save power."""
    if width is None or most is None:
        return Check("link-width", Result.UNKNOWN, "width of its PCIe link: not told")
    return Check("link-width", Result.PASSED if width >= most else Result.FAILED, f"x{width} of x{most}")


def _below(name: str, value: int | None, bound: int, unit: str) -> Check:
    if value is None:
        return Check(name, Result.UNKNOWN, "not told")
    return Check(name, Result.PASSED if value < bound else Result.FAILED, f"{value} {unit}, less than {bound} wanted")


def _idle(now: GpuReading) -> Check:
    if now.processes is None or now.memory_used_mib is None:
        return Check("idle", Result.UNKNOWN, "who uses it: not told")
    if now.processes:
        return Check("idle", Result.FAILED, f"held by processes {', '.join(map(str, now.processes[:8]))}")
    if now.memory_used_mib > IDLE_MIB:
        return Check("idle", Result.FAILED, f"{now.memory_used_mib} MiB in use by nobody, {IDLE_MIB} are tolerated")
    return Check("idle", Result.PASSED, f"no process, {now.memory_used_mib} MiB in use")
