"""PURE. The part of JSONPath that scripts use: `{.status.phase}`, `{.items[*].metadata.name}`, `{.spec.pods[0]['a.b']}`.

A template is text with expressions in braces; an expression is a path of fields, indices (negative from the end), `[*]`, and
quoted keys. Several results stand with a blank between them, as kubectl prints them. `\\n` and `\\t` in the text are a line
end and a tab. A bare path (`.status.phase`, `status.phase`) is taken as one expression. No filters, no scripts.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from casemate_cli.failure import Detail, Failure

Step = str | int | None  # a key, an index, or None for every element

_TOKEN = re.compile(
    r"""\.?(?P<key>[A-Za-z_][A-Za-z0-9_-]*)
      | \[(?P<index>-?[0-9]{1,9})\]
      | (?P<all>\.?\[\*\]|\.\*)
      | \[(?P<quote>['"])(?P<quoted>(?:(?!(?P=quote)).)*)(?P=quote)\]""",
    re.VERBOSE | re.ASCII,
)
_EXPRESSION = re.compile(r"\{([^{}]*)\}")
_ESCAPES = {r"\n": "\n", r"\t": "\t"}


@dataclass(frozen=True, slots=True)
class Template:
    """Literal texts and paths, in turn."""

    parts: tuple[str | tuple[Step, ...], ...]

    def render(self, value: Any) -> str:
        """The template's text for one JSON value."""
        return "".join(
            part if isinstance(part, str) else " ".join(_text(found) for found in walk(value, part))
            for part in self.parts
        )


def parse(template: str) -> Template:
    """Raises Failure where an expression is not understood."""
    if "{" not in template:
        return Template((_path(template),))
    parts: list[str | tuple[Step, ...]] = []
    position = 0
    for match in _EXPRESSION.finditer(template):
        parts += _literal(template, template[position : match.start()])
        inner = match.group(1).strip()
        if len(inner) >= 2 and inner[0] == inner[-1] and inner[0] in "'\"":
            parts.append(_unescape(inner[1:-1]))
        else:
            parts.append(_path(inner))
        position = match.end()
    parts += _literal(template, template[position:])
    return Template(tuple(parts))


def _literal(template: str, text: str) -> list[str]:
    if "{" in text or "}" in text:
        raise _bad(template, "has a brace without its partner")
    return [_unescape(text)] if text else []


def _unescape(text: str) -> str:
    return re.sub(r"\\[nt]", lambda m: _ESCAPES[m.group()], text)


def _path(expression: str) -> tuple[Step, ...]:
    text = expression.strip().removeprefix("$")
    steps: list[Step] = []
    position = 0
    if text in ("", "."):
        return ()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _bad(expression, f"is not understood at {text[position:]!r}")
        if match["key"] is not None:
            steps.append(match["key"])
        elif match["index"] is not None:
            steps.append(int(match["index"]))
        elif match["all"] is not None:
            steps.append(None)
        else:
            steps.append(match["quoted"])
        position = match.end()
    return tuple(steps)


def walk(value: Any, path: tuple[Step, ...]) -> Iterator[Any]:
    """Everything in `value` that `path` leads to; nothing where it leads nowhere."""
    if not path:
        yield value
        return
    step, rest = path[0], path[1:]
    if step is None:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from walk(item, rest)
    elif isinstance(step, int):
        if isinstance(value, list) and -len(value) <= step < len(value):
            yield from walk(value[step], rest)
    elif isinstance(value, dict) and step in value:
        yield from walk(value[step], rest)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _bad(expression: str, problem: str) -> Failure:
    return Failure(
        "the JSONPath is not understood",
        details=[Detail("jsonpath", expression, problem, "write it as {.status.phase} or {.items[*].metadata.name}")],
    )
