"""The capacity of hosts as text: bars, cores and threads, tables. Messages in, lines out; nothing is asked or written here.

A thread is one character, a core a word of them, a last-level cache a paragraph. Letters stand for who holds a thread; the
legend follows. Everything that a manager sent is cleaned. ``Style`` says what the terminal can show.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from casemate_cli import term

if TYPE_CHECKING:
    from casemate_wire.v1 import top_pb2 as pb

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwyz0123456789"
"""Holders in their order; without the x of what is offline. Those beyond share ``*``."""
BAR = 24

CAUSES = {
    "no-cpu": "no CPU is free beside it",
    "no-memory": "no memory is free beside it",
    "odd-core": "the rest of the core is held",
    "partition-hole": "no NVLink partition of two or more is free around it",
    "iommu-group": "another function of its IOMMU group is held",
}
_ONE = {
    "threads": "thread",
    "cores": "core",
    "gpus": "GPU",
    "vfs": "VF",
    "devices": "device",
    "partitions": "partition",
}
_MANY = {"gpus": "GPUs", "vfs": "VFs", "memory_mib": "memory", "disk_mib": "disk", "shared_milli": "shared CPU"}
_STATES = {"free": ".", "shared": "~", "housekeeping": ":", "unusable": "#", "stranded": "!", "offline": "x"}
_RICH = {"free": "·", "shared": "≈", "housekeeping": "▒", "unusable": "▓", "stranded": "!", "offline": "×"}
_COLOURS = {
    "free": "green",
    "shared": "blue",
    "housekeeping": "dim",
    "unusable": "dim",
    "stranded": "red",
    "held": "cyan",
}


@dataclass(frozen=True, slots=True)
class Style:
    """What may be written: lines of so many ``columns``, characters beyond ASCII where ``rich``, colours where ``colour``."""

    columns: int = 100
    rich: bool = False
    colour: bool = False

    @classmethod
    def of_output(cls) -> "Style":
        """As standard output is."""
        columns = 100
        if term.is_terminal(sys.stdout):
            try:
                columns = os.get_terminal_size(sys.stdout.fileno()).columns or columns
            except (OSError, ValueError):
                columns = 80
        encoding = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "")
        return cls(max(columns, 40), encoding == "utf8", term.wants_colour(sys.stdout))

    def sign(self, state: str) -> str:
        """The character of a thread's state."""
        return (_RICH if self.rich else _STATES)[state]

    def paint(self, text: str, colour: str) -> str:
        """``text`` in a colour where there are any."""
        return term.paint(text, colour) if self.colour else text


# --- words ------------------------------------------------------------------------------------------------------------


def size(mib: int) -> str:
    """Memory or disk to three digits: ``64Gi``, ``1.5Ti``, ``300Mi``."""
    value, unit = float(mib), "Mi"
    for bigger in ("Gi", "Ti", "Pi"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.0f}{unit}" if value >= 100 or value == int(value) else f"{value:.1f}{unit}"


def title(name: str) -> str:
    """The name of an amount for people: ``1Gi pages``, ``VFs on dc``."""
    kind, _, rest = name.partition(":")
    if kind == "pages" and rest.isdigit():
        kib = int(rest)
        return f"{size(kib // 1024) if kib >= 1024 else f'{kib}Ki'} pages"
    if kind == "vfs" and rest:
        return f"VFs on {term.clean(rest)}"
    return _MANY.get(kind, term.clean(name))


def number(name: str, amount: int) -> str:
    """An amount of that name, without it: memory in its unit, shared CPU in threads."""
    if name.endswith("_mib"):
        return size(amount)
    if name == "shared_milli":
        return f"{amount / 1000:g}"
    return str(amount)


def some(name: str, amount: int) -> str:
    """An amount with its name: ``1 thread``, ``3 GPUs``, ``12Gi memory``, ``2 pages of 1Gi``."""
    if name.startswith("pages:"):
        return f"{amount} page{'' if amount == 1 else 's'} of {title(name).removesuffix(' pages')}"
    return f"1 {_ONE[name]}" if amount == 1 and name in _ONE else f"{number(name, amount)} {title(name)}"


def bar(amount: "pb.Amount", style: Style) -> str:
    """Used, stranded and free as a bar; what is there is never too little to be seen."""
    full, empty = ("█", "░") if style.rich else ("#", "-")
    if amount.total <= 0:
        return empty * BAR
    used = _part(amount.used, amount.total)
    lost = _part(amount.stranded, amount.total)
    if lost and amount.free == amount.stranded:
        lost = max(1, BAR - used)
    if used + lost > BAR:
        used, lost = (BAR - lost, lost) if used > lost else (used, BAR - used)
    if amount.free > amount.stranded and used + lost == BAR:
        used, lost = (used - 1, lost) if used >= lost else (used, lost - 1)
    return (
        style.paint(full * used, "cyan")
        + style.paint(style.sign("stranded") * lost, "red")
        + empty * (BAR - used - lost)
    )


def _part(amount: int, total: int) -> int:
    return max(1, amount * BAR // total) if amount > 0 else 0


def _level(name: str, amount: "pb.Amount", style: Style) -> str:
    told = f"{number(name, amount.used)} of {number(name, amount.total)} used, {number(name, amount.free)} free"
    if amount.stranded:
        told += f", {number(name, amount.stranded)} stranded"
    return f"{title(name):<12} {bar(amount, style)} {told}"


# --- one host ---------------------------------------------------------------------------------------------------------


def host(found: "pb.HostCapacity", style: Style, *, wide: bool = False) -> list[str]:
    """The picture of a host. ``wide`` adds the CPU list of each core row and the names of all functions."""
    closed = f", takes nothing new: {term.clean(found.closed)}" if found.closed else ""
    holders = f"{len(found.holders)} holder{'' if len(found.holders) == 1 else 's'}"
    lines = [style.paint(term.clean(found.name), "bold") + f"  {_cells_in_words(found)}, {holders}{closed}"]
    for cell in found.cells:
        lines += _cell(cell, style, wide=wide)
    lines += _functions(found, style, wide=wide)
    disk = next((a.amount for a in found.amounts if a.name == "disk_mib"), None)
    if disk is not None:
        lines += ["", _level("disk_mib", disk, style)]
    lines += ["", *_legend(found, style)]
    return [*lines, *_stranded_on_host(found, style)]


def _cells_in_words(found: "pb.HostCapacity") -> str:
    cores = [core for cell in found.cells for cache in cell.caches for core in cache.cores]
    threads = sum(len(core.threads) for core in cores)
    parts = [(len(found.cells), "cell"), (len(cores), "core"), (threads, "thread")]
    told = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in parts)
    return told + (f", offline {term.clean(found.offline)}" if found.offline else "")


def _cell(cell: "pb.CellCapacity", style: Style, *, wide: bool) -> Iterator[str]:
    if not cell.amounts and not cell.caches:
        return  # a memory cell without memory, as a GPU without its driver brings them by the dozen
    yield ""
    yield style.paint(f"cell {cell.id}", "bold") + (" (memory only)" if cell.kind == "memory" else "")
    for named in cell.amounts:
        if named.name != "cores":
            yield "  " + _level(named.name, named.amount, style)
    for cache in cell.caches:
        yield from _cache(cache, style, alone=len(cell.caches) == 1, wide=wide)


def _cache(cache: "pb.CacheCapacity", style: Style, *, alone: bool, wide: bool) -> Iterator[str]:
    label = "cores" if alone else f"L3 {cache.id}"
    widest = max((len(core.threads) for core in cache.cores), default=1)
    room = (style.columns - 15 - (28 if wide else 0)) // (widest + 1)
    per_row = next((n for n in (32, 16, 8, 4, 2) if n <= room), 1)
    for start in range(0, len(cache.cores), per_row):
        row = cache.cores[start : start + per_row]
        words = [_core(core, style) for core in row]
        text = " ".join(word for word, _ in words)
        if wide:
            length = sum(width for _, width in words) + len(words) - 1
            numbers = ",".join(_ranges(sorted(t.number for core in row for t in core.threads)))
            text += " " * max(2, per_row * (widest + 1) - length + 1) + numbers
        yield f"  {label if start == 0 else '':<12} {text}"


def _core(core: "pb.CoreCapacity", style: Style) -> tuple[str, int]:
    """(the threads of a core, how many characters they take)"""
    text = ""
    for thread in core.threads:
        if thread.holder:
            text += style.paint(_letter(thread.holder), _COLOURS["held"])
        else:
            state = "stranded" if thread.stranded else thread.state if thread.state in _STATES else "unusable"
            text += style.paint(style.sign(state), _COLOURS[state])
    return text, len(core.threads)


def _letter(holder: int) -> str:
    return LETTERS[holder - 1] if 0 < holder <= len(LETTERS) else "*"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    start = last = None
    for value in (*numbers, None):
        if last is not None and value == last + 1:
            last = value
            continue
        if start is not None:
            yield str(start) if start == last else f"{start}-{last}"
        start = last = value


def _functions(found: "pb.HostCapacity", style: Style, *, wide: bool) -> Iterator[str]:
    for name, rows in (("GPUs", found.gpus), ("devices", found.devices)):
        if rows:
            yield from ("", style.paint(name, "bold"))
            for row in rows:
                yield f"  {_where(row.cell):<8} {_state_of(row, style)}  {term.clean(row.what)}  {term.clean(row.id)}"
    if found.partitions:
        yield from ("", style.paint("NVLink partitions", "bold"))
        for gpus in sorted({p.gpus for p in found.partitions}, reverse=True):
            same = [p for p in found.partitions if p.gpus == gpus]
            free = [str(p.id) for p in same if p.free]
            which = f": {', '.join(free)}" if wide and free else ""
            yield f"  of {gpus} GPU{'' if gpus == 1 else 's'}: {len(free)} of {len(same)} free{which}"
    if found.ports:
        yield from ("", style.paint("VFs", "bold"))
        for port in found.ports:
            networks = term.clean(",".join(port.networks))
            who = "".join(_letter(h) for h in port.holders)
            told = f"{port.vfs.used} of {port.vfs.total} used" + (
                f", {port.vfs.stranded} stranded" if port.vfs.stranded else ""
            )
            held = f"  {who}" if who else ""
            yield f"  {_where(port.cell):<8} {term.clean(port.mac)}  {networks}  {bar(port.vfs, style)} {told}{held}"


def _where(cell: int) -> str:
    return f"cell {cell}" if cell >= 0 else "no cell"


def _state_of(row: "pb.FunctionCapacity", style: Style) -> str:
    if row.used_milli:
        who = style.paint("".join(_letter(h) for h in row.holders) or "?", _COLOURS["held"])
        return who if row.used_milli >= 1000 else f"{who} ({row.used_milli}/1000)"
    if row.stranded:
        return style.paint(style.sign("stranded"), _COLOURS["stranded"])
    return style.paint(style.sign("free"), _COLOURS["free"])


def _legend(found: "pb.HostCapacity", style: Style) -> Iterator[str]:
    words = {
        "free": "free",
        "shared": "kept for shared CPUs and emulators",
        "housekeeping": "housekeeping",
        "unusable": "unusable",
        "stranded": "free, stranded",
    }
    seen = {
        "stranded" if t.stranded else t.state
        for cell in found.cells
        for cache in cell.caches
        for core in cache.cores
        for t in core.threads
    } | {"stranded" for f in (*found.gpus, *found.devices) if f.stranded}
    yield "  ".join(f"{style.sign(state)} {text}" for state, text in words.items() if state in seen or state == "free")
    for i, holder in enumerate(found.holders, 1):
        name = f"{holder.tenant}/{holder.instance}" if holder.instance else holder.foreign
        parts = [f"threads {term.clean(holder.threads)}"] if holder.threads else []
        parts += [f"{number('shared_milli', holder.shared_milli)} shared CPU"] if holder.shared_milli else []
        parts += [some("memory_mib", holder.memory_mib)] if holder.memory_mib else []
        parts += [some("gpus", holder.gpus)] if holder.gpus else []
        parts += [some("vfs", holder.vfs)] if holder.vfs else []
        yield f"{style.paint(_letter(i), _COLOURS['held'])} {term.clean(name)}  {', '.join(parts)}".rstrip()


def _stranded_on_host(found: "pb.HostCapacity", style: Style) -> Iterator[str]:
    if not found.stranded:
        return
    yield from ("", style.paint("stranded", "bold"))
    for entry in found.stranded:
        where = f" in {_where(entry.cell)}" if entry.cell >= 0 else ""
        things = f" ({term.clean(', '.join(entry.where))})" if entry.where else ""
        yield f"  {some(entry.name, entry.amount)}{where}: {_cause(entry.cause)}{things}"


def _cause(word: str) -> str:
    return CAUSES.get(word, term.clean(word))


# --- a fleet ----------------------------------------------------------------------------------------------------------


def group_lines(group: "pb.CapacityGroup", label: str, style: Style, *, wide: bool) -> Iterator[str]:
    """The sums of one group: amounts with bars, then what is stranded, by cause."""
    hosts = f"{group.hosts} host{'' if group.hosts == 1 else 's'}"
    apart = [(group.closed, "take nothing new"), (group.unknown, "not known yet")]
    told = "".join(f", {count} {words}" for count, words in apart if count)
    name = (
        "fleet"
        if group.all
        else f"{term.clean(label)}={term.clean(group.value)}"
        if group.value
        else f"no {term.clean(label)}"
    )
    yield style.paint(name, "bold") + f"  {hosts}{told}"
    for named in group.amounts:
        yield "  " + _level(named.name, named.amount, style)
    if wide:
        for kind in group.cells:
            words = {"cpu": "with CPUs", "gpu": "with CPUs and GPUs", "memory": "with memory only"}
            yield f"  cells {words.get(kind.kind, term.clean(kind.kind))}: {kind.cells}"
            yield from ("    " + _level(named.name, named.amount, style) for named in kind.amounts)
    if group.stranded:
        yield "  stranded:"
        for entry in sorted(group.stranded, key=lambda e: (e.cause, e.name)):
            on = "1 host" if entry.hosts == 1 else f"{entry.hosts} hosts"
            yield f"    {some(entry.name, entry.amount)} on {on}: {_cause(entry.cause)}"


def host_row(found: "pb.HostHeadroom", names: Iterable[str]) -> list[str]:
    """One row of the table of hosts: what is free of each amount, and what is stranded."""
    amounts = {named.name: named.amount for named in found.amounts}
    free = [number(name, amounts[name].free) if name in amounts else "-" for name in names]
    lost = "; ".join(f"{some(e.name, e.amount)} {term.clean(e.cause)}" for e in found.stranded)
    return [found.name, found.closed or "open", str(found.instances), *free, lost or "-"]
