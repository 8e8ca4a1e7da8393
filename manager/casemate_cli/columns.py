"""What a table shows of each kind, and the table itself.

A column is a heading and a function from the message to text; wide columns are shown with `-o wide`. Values come from
hosts and guests too, so every cell is cleaned before it is written.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from casemate_cli import term

#: Colour of a phase or status word; words that are not here have none.
WORD_COLOURS = {
    "Ready": "green",
    "Running": "green",
    "Bound": "green",
    "Available": "green",
    "Lost": "red",
    "Succeeded": "green",
    "True": "green",
    "Pending": "yellow",
    "Placed": "yellow",
    "Scheduling": "yellow",
    "Preparing": "yellow",
    "Starting": "yellow",
    "Stopping": "yellow",
    "Degraded": "yellow",
    "Deleting": "yellow",
    "Warning": "yellow",
    "Unknown": "red",
    "NotReady": "red",
    "Failed": "red",
    "Fenced": "red",
    "Quarantined": "red",
    "broken": "red",
    "suspect": "yellow",
    "Sanitising": "yellow",
    "Returned": "yellow",
    "well": "green",
    "Free": "green",
    "Stopped": "dim",
}
#: Text of a cell that has no value: unknown is said, not guessed.
NONE = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a kind's table."""

    heading: str
    value: Callable[[Any], str]
    wide: bool = False


def age(timestamp: Any, now_s: float | None = None) -> str:
    """Time since a protobuf timestamp in at most two units: `42s`, `5m10s`, `3h20m`, `12d`; `-` where it is not set."""
    if not timestamp.seconds:
        return NONE
    return span((time.time() if now_s is None else now_s) - timestamp.seconds - timestamp.nanos / 1e9)


def span(seconds: float) -> str:
    """A length of time in at most two units."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    minutes, s = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes}m{s}s" if s else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    hours, m = divmod(minutes, 60)
    if hours < 10:
        return f"{hours}h{m}m" if m else f"{hours}h"
    if hours < 72:
        return f"{hours}h"
    return f"{hours // 24}d"


def _text(value: Any) -> str:
    return str(value) if value else NONE


def _labels(o: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(o.metadata.labels.items())) or NONE


def _why(o: Any) -> str:
    """The reason of the first condition that is not as it should be."""
    unmet = next((c for c in o.status.conditions if c.status != "True"), None)
    return NONE if unmet is None else ": ".join(w for w in (unmet.reason or unmet.type, unmet.message) if w)


def _sum(o: Any, used: str, total: Any) -> str:
    return f"{used or '0'}/{total}" if total else NONE


def _quota(o: Any, name: str) -> str:
    """Used of a quota; only used where there is none."""
    used, most = o.status.used.get(name, ""), o.spec.quotas.get(name, "")
    return f"{used or '0'}/{most}" if most else _text(used)


def _environment_phase(o: Any) -> str:
    return "Deleting" if o.metadata.deleting.seconds else _text(o.status.phase)


def _passport(o: Any) -> str:
    """Whether its last hand-over left it clean, and how many steps that took."""
    if not o.status.passports:
        return NONE
    last = o.status.passports[0]
    return f"{'clean' if last.clean else 'held'} ({len(last.steps)} steps)"


_AGE = Column("AGE", lambda o: age(o.metadata.created))
_LABELS = Column("LABELS", _labels, wide=True)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "Environment": (
        Column("PHASE", _environment_phase),
        Column("READY", lambda o: f"{o.status.ready}/{o.status.wanted or (o.spec.replicas or 1)}"),
        Column("CPU", lambda o: _text(o.spec.cpu.count)),
        Column("MEMORY", lambda o: _text(o.spec.memory.size)),
        Column("IMAGE", lambda o: _text(o.spec.image)),
        Column("RUN", lambda o: o.spec.run or "started", wide=True),
        Column("PLACED", lambda o: str(o.status.placed), wide=True),
        Column("RUNNING", lambda o: str(o.status.running), wide=True),
        Column("WHY", _why, wide=True),
        _LABELS,
        _AGE,
    ),
    "Instance": (
        Column("PHASE", lambda o: _text(o.status.phase)),
        Column("HOST", lambda o: _text(o.spec.host)),
        Column("ADDRESS", lambda o: ",".join(n.address for n in o.spec.nics if n.address) or NONE),
        Column("PODS", lambda o: f"{o.status.pods_ready}/{len(o.status.pods)}"),
        Column("CPU", lambda o: _text(o.spec.cpus)),
        Column("MEMORY", lambda o: _text(o.spec.memory)),
        Column("VIRT", lambda o: _text(o.status.virtualisation), wide=True),
        Column("BOOT", lambda o: _text(o.status.boot), wide=True),
        Column("STARTS", lambda o: str(o.status.starts), wide=True),
        Column("PID", lambda o: _text(o.status.pid), wide=True),
        Column("MAC", lambda o: ",".join(n.mac for n in o.spec.nics if n.mac) or NONE, wide=True),
        Column("WHY", _why, wide=True),
        _AGE,
    ),
    "Pod": (
        Column("PHASE", lambda o: _text(o.status.phase)),
        Column("READY", lambda o: f"{sum(c.ready for c in o.status.containers)}/{len(o.status.containers)}"),
        Column("RESTARTS", lambda o: str(sum(c.restarts for c in o.status.containers))),
        Column("INSTANCE", lambda o: _text(o.spec.instance)),
        Column("HOST", lambda o: _text(o.spec.host)),
        Column("CONTAINERS", lambda o: ",".join(c.name for c in o.status.containers) or NONE, wide=True),
        Column("IMAGES", lambda o: ",".join(c.image for c in o.status.containers) or NONE, wide=True),
        Column("WHY", lambda o: ": ".join(w for w in (o.status.reason, o.status.message) if w) or NONE, wide=True),
        Column("AGE", lambda o: age(o.status.started if o.status.started.seconds else o.metadata.created)),
    ),
    "Host": (
        Column("PHASE", lambda o: _text(o.status.phase) + (",Cordoned" if o.spec.cordoned else "")),
        Column("CPUS", lambda o: _sum(o, o.status.cpus_used, o.status.threads)),
        Column("MEMORY", lambda o: _sum(o, o.status.memory_used, o.status.memory)),
        Column("INSTANCES", lambda o: str(o.status.instances)),
        Column("VIRT", lambda o: _text(o.status.virtualisation)),
        Column("CELLS", lambda o: _text(o.status.cells), wide=True),
        Column("CORES", lambda o: _text(o.status.cores), wide=True),
        Column("GPUS", lambda o: str(o.status.gpus), wide=True),
        Column("VFS", lambda o: str(o.status.vfs), wide=True),
        Column("FOREIGN", lambda o: str(o.status.foreign), wide=True),
        Column("DRIFT", lambda o: ",".join(o.status.drift) or NONE, wide=True),
        Column("AGENT", lambda o: _text(o.status.agent_version), wide=True),
        Column("KERNEL", lambda o: _text(o.status.kernel), wide=True),
        Column("HEARD", lambda o: age(o.status.heard), wide=True),
        _LABELS,
        _AGE,
    ),
    "GPU": (
        Column("HOST", lambda o: _text(o.status.host)),
        Column("MODEL", lambda o: _text(o.status.model)),
        Column("PHASE", lambda o: _text(o.status.phase) + (f",{o.status.order}" if o.status.order else "")),
        Column("HEALTH", lambda o: _text(o.status.health)),
        Column("INSTANCE", lambda o: _text(o.status.instance or ",".join(s.instance for s in o.status.slices))),
        Column("MEMORY", lambda o: _text(o.status.memory), wide=True),
        Column("DRIVER", lambda o: _text(o.status.driver), wide=True),
        Column("ADDRESS", lambda o: _text(o.status.pci_address), wide=True),
        Column("PASSPORT", _passport, wide=True),
        Column("LAST-TENANT", lambda o: _text(o.status.tenant), wide=True),
        Column("WHY", lambda o: o.status.reason or "; ".join(o.status.health_reasons) or NONE, wide=True),
        Column("SINCE", lambda o: age(o.status.since)),
    ),
    "Image": (
        Column("TYPE", lambda o: o.spec.type or "disk"),
        Column("FORMAT", lambda o: _text(o.spec.format)),
        Column("DIGEST", lambda o: _text(o.spec.digest[:19])),
        Column("HOSTS", lambda o: str(o.status.hosts)),
        Column("ENVIRONMENTS", lambda o: str(o.status.environments)),
        Column("SOURCE", lambda o: _text(o.spec.source), wide=True),
        _LABELS,
        _AGE,
    ),
    "Network": (
        Column("TYPE", lambda o: _text(o.spec.type)),
        Column("SUBNET", lambda o: _text(o.spec.subnet)),
        Column("ADDRESSES", lambda o: _sum(o, str(o.status.addresses_used), o.status.addresses)),
        Column("GATEWAY", lambda o: _text(o.spec.gateway), wide=True),
        Column("DNS", lambda o: ",".join(o.spec.dns) or NONE, wide=True),
        Column("MTU", lambda o: str(o.spec.mtu or 1500), wide=True),
        _AGE,
    ),
    "Policy": (
        Column("PRECEDENCE", lambda o: str(o.spec.precedence)),
        Column("STRATEGY", lambda o: _text(o.spec.strategy)),
        Column(
            "MATCH", lambda o: o.spec.match or ",".join(f"{k}={v}" for k, v in o.spec.match_labels.items()) or "all"
        ),
        Column("REQUIRE", lambda o: " && ".join(o.spec.require) or NONE, wide=True),
        Column("CPU", lambda o: f"x{o.spec.cpu_overcommit:g}" if o.spec.cpu_overcommit else NONE, wide=True),
        Column("MEMORY", lambda o: f"x{o.spec.memory_overcommit:g}" if o.spec.memory_overcommit else NONE, wide=True),
        _AGE,
    ),
    "Tenant": (
        Column("ENVIRONMENTS", lambda o: _quota(o, "environments")),
        Column("CPUS", lambda o: _quota(o, "cpus")),
        Column("MEMORY", lambda o: _quota(o, "memory")),
        Column("QUOTAS", lambda o: ",".join(f"{k}={v}" for k, v in sorted(o.spec.quotas.items())) or NONE, wide=True),
        _AGE,
    ),
    "Volume": (
        Column("PHASE", lambda o: "Deleting" if o.metadata.deleting.seconds else _text(o.status.phase)),
        Column("SIZE", lambda o: _text(o.spec.size)),
        Column("ALLOCATED", lambda o: _text(o.status.allocated)),
        Column("HOST", lambda o: _text(o.status.host)),
        Column("USED-BY", lambda o: _text(o.status.instance or o.status.environment)),
        Column("DEVICE", lambda o: _text(o.status.device), wide=True),
        Column("MESSAGE", lambda o: _text(o.status.message), wide=True),
        _LABELS,
        _AGE,
    ),
    "Secret": (
        Column("KEYS", lambda o: ",".join(sorted(o.spec.fingerprints)) or NONE),
        _AGE,
    ),
    "User": (
        Column("TYPE", lambda o: o.spec.type or "person"),
        Column("DISABLED", lambda o: "yes" if o.spec.disabled else NONE),
        Column("TENANT", lambda o: _text(o.spec.tenant)),
        _AGE,
    ),
    "RoleBinding": (
        Column("ROLE", lambda o: _text(o.spec.role)),
        Column("SCOPE", lambda o: _text(o.spec.scope)),
        Column("USERS", lambda o: ",".join(o.spec.users) or NONE),
        _AGE,
    ),
    "Placement": (
        Column("INSTANCE", lambda o: _text(o.spec.instance)),
        Column("HOST", lambda o: _text(o.spec.host)),
        Column("ROLE", lambda o: _text(o.spec.role)),
        Column("GENERATION", lambda o: f"{o.spec.epoch}.{o.spec.generation}"),
        _AGE,
    ),
    "Operation": (
        Column("VERB", lambda o: _text(o.spec.verb)),
        Column("TARGET", lambda o: f"{o.spec.target.kind.lower()}/{o.spec.target.name}"),
        Column("PHASE", lambda o: _text(o.status.phase)),
        Column("MESSAGE", lambda o: _text(o.status.message), wide=True),
        _AGE,
    ),
    "Event": (
        Column("SEVERITY", lambda o: _text(o.severity)),
        Column("REASON", lambda o: _text(o.reason)),
        Column("OBJECT", lambda o: f"{o.regarding.kind.lower()}/{o.regarding.name}"),
        Column("SOURCE", lambda o: _text(o.source), wide=True),
        Column("COUNT", lambda o: str(o.count or 1), wide=True),
        Column("LAST", lambda o: age(o.last if o.last.seconds else o.time)),
        Column("MESSAGE", lambda o: _text(o.message)),
    ),
}
_GENERIC: tuple[Column, ...] = (_LABELS, _AGE)


def columns(kind: str, *, wide: bool, with_tenant: bool, prefix: str = "") -> tuple[Column, ...]:
    """The columns of a kind's table; `prefix` stands before each name (`environment/`)."""
    shown = tuple(c for c in COLUMNS.get(kind, _GENERIC) if wide or not c.wide)
    tenant = (Column("TENANT", lambda o: _text(o.metadata.tenant)),) if with_tenant else ()
    return (*tenant, Column("NAME", lambda o: prefix + o.metadata.name), *shown)


class Table:
    """Rows under headings, in widths that the first rows decide, so that later rows can follow as they come."""

    def __init__(self, headings: Sequence[str], *, with_headings: bool = True) -> None:
        self._headings = tuple(headings)
        self._widths: list[int] | None = None
        self._with_headings = with_headings

    def write(self, rows: Iterable[Sequence[str]]) -> None:
        """Write some rows; the headings stand before the first ones."""
        cells = [[term.clean(cell) for cell in row] for row in rows]
        if not cells:
            return
        lines: list[str] = []
        if self._widths is None:
            heads = [list(self._headings)] if self._with_headings else []
            self._widths = [max(map(len, column)) for column in zip(*heads, *cells, strict=True)]
            if self._with_headings:
                lines.append(self._line(self._headings, bold=True))
        lines += [self._line(row) for row in cells]
        term.out("\n".join(lines))

    def _line(self, row: Sequence[str], *, bold: bool = False) -> str:
        assert self._widths is not None
        colourful = term.wants_colour(sys.stdout)
        shown: list[str] = []
        last = len(row) - 1
        for i, (cell, width) in enumerate(zip(row, self._widths, strict=True)):
            padding = "" if i == last else " " * (width - len(cell))
            if colourful:
                cell = term.paint(cell, "bold" if bold else WORD_COLOURS.get(cell, ""))
            shown.append(cell + padding)
        return "  ".join(shown).rstrip()
