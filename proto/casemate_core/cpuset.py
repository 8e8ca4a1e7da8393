"""Immutable sets of CPU numbers, in the list syntax of the Linux kernel.

What may live here: the set, its parser and its algebra; nothing that knows what a core or a cell is.

Theory of operation. A set is one non-negative integer with bit *n* set when CPU *n* is a member. Union, intersection
and difference are then single machine-word operations on hosts of ordinary size, and a few of them on the largest;
counting is ``int.bit_count``. Callers in hot paths work on ``.mask`` directly and wrap the result once.

The text form is the kernel's "CPU list format" (Documentation/admin-guide/kernel-parameters.rst, "cpu lists"):
comma-separated decimal numbers and inclusive ranges, optionally ``a-b:used/group``. What we print is the canonical
form that the kernel itself prints with ``%*pbl``: ascending, ranges joined, no strides.
"""

import re
from collections.abc import Iterable, Iterator

from casemate_core.plain import BadPlain

MAX_CPU = 8191
"""The highest CPU number accepted: the largest NR_CPUS that a mainline x86-64 or arm64 kernel can be built with."""

_ITEM = re.compile(r"(\d{1,5})(?:-(\d{1,5})(?::(\d{1,5})/(\d{1,5}))?)?", re.ASCII)


class CpuSet:
    """A set of CPU numbers; hashable, ordered iteration, never changed after it was made.

    ``CpuSet(mask)`` takes the bit mask; ``CpuSet.of(3, 4)`` and ``CpuSet.parse("0-3,8")`` are the readable ways in.
    """

    __slots__ = ("_mask",)
    _mask: int

    def __init__(self, mask: int = 0) -> None:
        if mask < 0:
            raise ValueError("a CPU mask cannot be negative")
        object.__setattr__(self, "_mask", mask)

    @classmethod
    def of(cls, *cpus: int) -> "CpuSet":
        """The set of the numbers given."""
        return cls.from_ids(cpus)

    @classmethod
    def from_ids(cls, cpus: Iterable[int]) -> "CpuSet":
        """The set of the numbers of an iterable. Raises ValueError for a number outside 0..MAX_CPU."""
        mask = 0
        for cpu in cpus:
            if not 0 <= cpu <= MAX_CPU:
                raise ValueError(f"CPU number {cpu} is outside 0..{MAX_CPU}")
            mask |= 1 << cpu
        return cls(mask)

    @classmethod
    def parse(cls, text: str) -> "CpuSet":
        """Read the kernel's list syntax; white space around it (sysfs ends its files with a newline) is allowed.

        Raises ValueError naming the item that is wrong.
        """
        stripped = text.strip()
        mask = 0
        for item in stripped.split(",") if stripped else ():
            match = _ITEM.fullmatch(item.strip())
            if match is None:
                raise ValueError(f"{item!r} in CPU list {text!r} is neither a number nor a range")
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if last < first or last > MAX_CPU:
                raise ValueError(f"{item!r} in CPU list {text!r} is not within 0..{MAX_CPU}, ascending")
            if match[3] is None:
                mask |= (1 << (last + 1)) - (1 << first)
                continue
            used, group = int(match[3]), int(match[4])
            if not 0 < used <= group:
                raise ValueError(f"{item!r} in CPU list {text!r} uses {used} of every {group}")
            for start in range(first, last + 1, group):
                mask |= (1 << (min(start + used, last + 1))) - (1 << start)
        return cls(mask)

    def to_dict(self) -> str:
        """The plain form, for :mod:`casemate_core.plain`: the text."""
        return str(self)

    @classmethod
    def from_dict(cls, data: object) -> "CpuSet":
        """Back from the plain form. Raises BadPlain."""
        if not isinstance(data, str):
            raise BadPlain("", f"expected a CPU list, got {type(data).__name__}")
        try:
            return cls.parse(data)
        except ValueError as error:
            raise BadPlain("", str(error)) from error

    @property
    def mask(self) -> int:
        """Bit *n* stands for CPU *n*."""
        return self._mask

    @property
    def first(self) -> int:
        """The lowest number. Raises ValueError on the empty set."""
        if not self._mask:
            raise ValueError("the empty CPU set has no first CPU")
        return (self._mask & -self._mask).bit_length() - 1

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a CpuSet cannot be changed")

    def __reduce__(self) -> tuple[type["CpuSet"], tuple[int]]:
        return CpuSet, (self._mask,)

    def __iter__(self) -> Iterator[int]:
        mask = self._mask
        while mask:
            low = mask & -mask
            yield low.bit_length() - 1
            mask ^= low

    def __len__(self) -> int:
        return self._mask.bit_count()

    def __bool__(self) -> bool:
        return self._mask != 0

    def __contains__(self, cpu: object) -> bool:
        return isinstance(cpu, int) and cpu >= 0 and (self._mask >> cpu) & 1 == 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuSet) and self._mask == other._mask

    def __hash__(self) -> int:
        return hash((CpuSet, self._mask))

    def __or__(self, other: "CpuSet") -> "CpuSet":
        return CpuSet(self._mask | other._mask)

    def __and__(self, other: "CpuSet") -> "CpuSet":
        return CpuSet(self._mask & other._mask)

    def __sub__(self, other: "CpuSet") -> "CpuSet":
        return CpuSet(self._mask & ~other._mask)

    def __xor__(self, other: "CpuSet") -> "CpuSet":
        return CpuSet(self._mask ^ other._mask)

    def __le__(self, other: "CpuSet") -> bool:
        return self._mask & ~other._mask == 0

    def __lt__(self, other: "CpuSet") -> bool:
        return self._mask != other._mask and self <= other

    def isdisjoint(self, other: "CpuSet") -> bool:
        """True when no CPU is in both."""
        return self._mask & other._mask == 0

    def __str__(self) -> str:
        parts: list[str] = []
        mask, base = self._mask, 0
        while mask:
            skip = (mask & -mask).bit_length() - 1
            mask >>= skip
            base += skip
            run = (~mask & (mask + 1)).bit_length() - 1  # how many ones in a row from bit 0 up
            parts.append(str(base) if run == 1 else f"{base}-{base + run - 1}")
            mask >>= run
            base += run
        return ",".join(parts)

    def __repr__(self) -> str:
        return f"CpuSet.parse({str(self)!r})"


EMPTY = CpuSet(0)
"""The set without members."""


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones of a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def lowest(mask: int, count: int) -> int:
    """The mask of the ``count`` lowest ones of ``mask`` (all of them where there are fewer)."""
    if mask.bit_count() <= count:
        return mask
    taken = 0
    for _ in range(count):
        low = mask & -mask
        taken |= low
        mask ^= low
    return taken
