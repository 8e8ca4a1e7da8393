"""What policies need of an expression language: two methods; and how much of it an expression may use. PURE.

May live here: the interface, the bounds, and nothing that knows a library.

Theory of operation. Expressions come from operators and are evaluated for every host, so their cost is bounded before they
are compiled: by length, by nesting, by the number of comprehensions, and by the length of lists written in them. The lists
in facts are bounded where facts are made. An expression that cannot be evaluated raises :class:`EvaluationFailed`; who asks
decides what that means (for rules: no).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Protocol

from casemate_core.errors import CallerError, Violation
from casemate_core.spec.fleet import Policy

MAX_CHARS = 2048
MAX_NESTING = 24
MAX_COMPREHENSIONS = 4
MAX_NESTED_COMPREHENSIONS = 2
#: Elements of all list and map literals together; commas are what is counted.
MAX_ELEMENTS = 256
#: Elements of one list in the facts.
MAX_FACT_ELEMENTS = 64

_STRING = re.compile(r"""[rRbB]{0,2}(?:'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")""", re.DOTALL)
_COMPREHENSION = re.compile(r"\.\s*(?:all|exists|exists_one|existsOne|map|filter|transformList|transformMap)\s*\(")


class EvaluationFailed(CallerError):
    """An expression could not be evaluated, or is not true or false."""

    reason = "ExpressionFailed"


class BadExpression(CallerError):
    """An expression is too large, or no expression at all."""

    reason = "BadExpression"


class Program(Protocol):
    """A compiled expression."""

    def evaluate(self, values: Mapping[str, object]) -> bool:
        """Its value where the names mean these values. Raises EvaluationFailed."""
        ...


class Language(Protocol):
    """Compiles expressions."""

    def compile(self, text: str) -> Program:
        """Raises BadExpression."""
        ...


def check_bounds(text: str) -> None:
    """Raise BadExpression where an expression might cost more than it may."""
    if len(text) > MAX_CHARS:
        raise BadExpression(f"{len(text)} characters, at most {MAX_CHARS} are allowed")
    bare = _STRING.sub("''", text)
    opens = _comprehension_opens(bare)
    if len(opens) > MAX_COMPREHENSIONS:
        raise BadExpression(f"{len(opens)} comprehensions, at most {MAX_COMPREHENSIONS} are allowed")
    depth = inside = commas = 0
    stack: list[bool] = []
    for at, char in enumerate(bare):
        if char in "([{":
            stack.append(at in opens)
            inside += stack[-1]
            depth = max(depth, len(stack))
            if inside > MAX_NESTED_COMPREHENSIONS:
                raise BadExpression(f"comprehensions nested more than {MAX_NESTED_COMPREHENSIONS} deep")
        elif char in ")]}" and stack:
            inside -= stack.pop()
        elif char == ",":
            commas += 1
    if depth > MAX_NESTING:
        raise BadExpression(f"nested {depth} deep, at most {MAX_NESTING} are allowed")
    if commas > MAX_ELEMENTS:
        raise BadExpression(f"{commas} commas, at most {MAX_ELEMENTS} elements are allowed")


def _comprehension_opens(bare: str) -> set[int]:
    return {found.end() - 1 for found in _COMPREHENSION.finditer(bare)}


def check_expressions(language: Language, expressions: Iterator[tuple[str, str]]) -> Iterator[Violation]:
    """Violations for (field path, text) that do not compile or are too large."""
    for path, text in expressions:
        if not text:
            continue
        try:
            language.compile(text)
        except BadExpression as error:
            yield Violation(path, text[:80], f"is no usable expression: {error}", "correct the expression")


def check_policy(language: Language, policy: Policy) -> Iterator[Violation]:
    """Violations of a policy's expressions: each must compile and be small enough."""
    spec = policy.spec
    fields = [("spec.match", spec.match), ("spec.reserve", spec.reserve)]
    fields += [(f"spec.require[{i}]", text) for i, text in enumerate(spec.require)]
    fields += [(f"spec.prefer[{i}].when", preference.when) for i, preference in enumerate(spec.prefer)]
    return check_expressions(language, iter(fields))
