"""The Common Expression Language behind the two-method interface.

May live here: what knows the library, and how its errors are told. The only module that imports it.
"""

from collections.abc import Mapping

import cel

from casemate_manager.policy.expressions import BadExpression, EvaluationFailed, Program, check_bounds

MAX_TOLD = 200


class CelProgram:
    """A compiled CEL expression."""

    def __init__(self, text: str) -> None:
        check_bounds(text)
        try:
            self._program = cel.compile(text)
        except Exception as error:
            raise BadExpression(_first_line(error)) from error

    def evaluate(self, values: Mapping[str, object]) -> bool:
        """See ``Program``."""
        try:
            value = self._program.execute(dict(values))
        except Exception as error:
            told = f"no such key {error}" if isinstance(error, KeyError) else _first_line(error)
            raise EvaluationFailed(told) from error
        if not isinstance(value, bool):
            raise EvaluationFailed(f"gives {type(value).__name__}, not true or false")
        return value


class Cel:
    """Compiles CEL."""

    def compile(self, text: str) -> Program:
        """See ``Language``."""
        return CelProgram(text)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:MAX_TOLD]
