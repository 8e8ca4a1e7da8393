"""Quantities as Kubernetes writes them, to and from whole numbers.

Bytes take binary (``Ki Mi Gi Ti Pi``) and decimal (``k M G T P``) suffixes; CPUs take ``m`` for thousandths; spans take
``s m h d``; rates take ``kbit Mbit Gbit``. Nothing else: ``16GB`` is refused with a remedy, because half of its readers
mean 16 GiB. Source of the syntax: the Kubernetes documentation, "Resource units in Kubernetes".
"""

import re
from fractions import Fraction

from casemate_core.errors import CallerError

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
RATES = {"kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
MIB = 2**20
#: Largest amount of bytes that is taken for meant: 8 EiB would overflow a signed 64-bit count.
MAX_BYTES = 2**62

_NUMBER = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)([A-Za-z]*)\Z", re.ASCII)


class BadQuantity(CallerError):
    """The text is no quantity of this unit; ``problem`` and ``remedy`` are clauses for a violation."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}")


def _parse(text: str, units: dict[str, int], example: str) -> Fraction:
    match = _NUMBER.match(text)
    if match is None:
        if text.lstrip().startswith("-"):
            raise BadQuantity("is negative", f"write a positive amount such as {example}")
        raise BadQuantity("is not a quantity", f"write a number and a unit, such as {example}")
    number, unit = match.groups()
    if unit and unit not in units:
        raise BadQuantity(f"has the unknown unit {unit!r}", _unit_remedy(number, unit, units, example))
    return Fraction(number) * units.get(unit, 1)


def _unit_remedy(number: str, unit: str, units: dict[str, int], example: str) -> str:
    likely = unit.rstrip("Bb").removesuffix("i")
    for candidate in (f"{likely}i", likely, likely.upper() + "i", likely.lower()):
        if candidate in units:
            return f"write {number}{candidate}"
    return f"use one of {' '.join(units)}, such as {example}"


def parse_bytes(text: str) -> int:
    """Bytes of ``"16Gi"``, ``"500M"``, ``"1048576"``. Raises BadQuantity."""
    value = _parse(text, BINARY | DECIMAL, "512Mi or 16Gi")
    if value.denominator != 1:
        raise BadQuantity("is not a whole number of bytes", "write a smaller unit")
    if value > MAX_BYTES:
        raise BadQuantity("is larger than any machine", f"write at most {MAX_BYTES // 2**50}Pi")
    return int(value)


def parse_mib(text: str) -> int:
    """MiB of a byte quantity that must be a multiple of 1 MiB. Raises BadQuantity."""
    size = parse_bytes(text)
    if size % MIB:
        raise BadQuantity("is not a multiple of 1 MiB", f"write {max(1, round(size / MIB))}Mi")
    return size // MIB


def parse_millicpus(text: str) -> int:
    """Thousandths of a CPU of ``"4"``, ``"1500m"``, ``"0.5"``. Raises BadQuantity."""
    if text.endswith("m"):
        value = _parse(text[:-1], {}, "500m or 4")
    else:
        value = _parse(text, {}, "500m or 4") * 1000
    if value.denominator != 1:
        raise BadQuantity("is finer than a thousandth of a CPU", "write whole thousandths, such as 250m")
    return int(value)


def parse_seconds(text: str) -> int:
    """Seconds of ``"90s"``, ``"15m"``, ``"72h"``, ``"7d"``. Raises BadQuantity."""
    value = _parse(text, SPANS, "90s, 15m or 72h")
    if value.denominator != 1:
        raise BadQuantity("is not a whole number of seconds", "write a smaller unit")
    return int(value)


def parse_bits_per_second(text: str) -> int:
    """Bits per second of ``"500Mbit"``, ``"10Gbit"``. Raises BadQuantity."""
    value = _parse(text, RATES, "500Mbit or 10Gbit")
    if value.denominator != 1:
        raise BadQuantity("is not a whole number of bits", "write a smaller unit")
    return int(value)


def format_bytes(size: int) -> str:
    """The shortest exact text of ``size`` bytes: ``16Gi``, ``1536Mi``, ``1000``."""
    for unit, factor in reversed(BINARY.items()):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def format_mib(size_mib: int) -> str:
    """``format_bytes`` of a count of MiB."""
    return format_bytes(size_mib * MIB)


def format_millicpus(milli: int) -> str:
    """``4`` or ``1500m``."""
    return str(milli // 1000) if milli % 1000 == 0 else f"{milli}m"


def format_seconds(seconds: int) -> str:
    """The largest unit that divides it: ``72h``, ``90s``."""
    for unit, factor in reversed(SPANS.items()):
        if seconds and seconds % factor == 0:
            return f"{seconds // factor}{unit}"
    return f"{seconds}s"
