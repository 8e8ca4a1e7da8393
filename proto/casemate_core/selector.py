"""Label selectors as kubectl writes them: ``a=b,c!=d,e in (f,g),h notin (i),j,!k``. All parts must hold.

Source of the syntax and of its meaning (``!=`` and ``notin`` hold where the key is missing): the Kubernetes
documentation, "Labels and Selectors".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate_core.errors import InvalidSpec, Violation, shown
from casemate_core.spec.meta import LABEL_KEY, LABEL_VALUE

MAX_CHARS: Final = 4096
MAX_PARTS: Final = 64
_SET = re.compile(r"(\S+)\s+(in|notin)\s*\(([^()]*)\)\Z")
_EQUALITY = re.compile(r"([^\s=!]+)\s*(==|=|!=)\s*([^\s=!]*)\Z")
_SPLIT = re.compile(r",(?![^()]*\))")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One part: ``operator`` is ``in``, ``notin``, ``exists`` or ``absent``."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet this part."""
        if self.operator == "exists":
            return self.key in labels
        if self.operator == "absent":
            return self.key not in labels
        return (labels.get(self.key) in self.values) == (self.operator == "in")


@dataclass(frozen=True, slots=True)
class Selector:
    """All of its parts must hold; without parts it selects everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels are selected."""
        return all(r.holds(labels) for r in self.requirements)


def parse(text: str) -> Selector:
    """The selector that ``text`` describes. Raises InvalidSpec with the path ``selector``."""
    if len(text) > MAX_CHARS:
        raise _bad(text, f"is longer than {MAX_CHARS} characters")
    parts = [part.strip() for part in _SPLIT.split(text)] if text.strip() else []
    if len(parts) > MAX_PARTS:
        raise _bad(text, f"has more than {MAX_PARTS} parts")
    return Selector(tuple(_parse_part(part, text) for part in parts))


def _parse_part(part: str, whole: str) -> Requirement:
    if match := _SET.match(part):
        key, operator, listed = match.groups()
        requirement = Requirement(key, operator, frozenset(v.strip() for v in listed.split(",")))
    elif match := _EQUALITY.match(part):
        key, sign, value = match.groups()
        requirement = Requirement(key, "notin" if sign == "!=" else "in", frozenset((value,)))
    elif part.startswith("!"):
        requirement = Requirement(part[1:].strip(), "absent")
    else:
        requirement = Requirement(part, "exists")
    if not LABEL_KEY.match(requirement.key) or not all(LABEL_VALUE.match(v) for v in requirement.values):
        raise _bad(whole, f"is not a label selector at {shown(part)!r}")
    return requirement


def _bad(text: str, problem: str) -> InvalidSpec:
    return InvalidSpec((Violation("selector", shown(text), problem, "write it as tier=web,site in (fra1,ams1),!old"),))
