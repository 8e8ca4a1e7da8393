"""YAML documents with limits: what a user or an attacker may hand us.

YAML 1.2's core schema, not 1.1: ``yes``, ``on``, ``22:22`` and ``2026-11-23`` are text. Bounded in size, depth, number of
values (after aliases are followed, so that an alias bomb is refused before it is expanded) and aliases. Duplicate keys, keys
that are not text, tags, and NaN are refused. Every refusal names the line.
"""

import re
from typing import Any, Final

import yaml

from casemate_core.errors import InvalidSpec, Violation

MAX_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 32
MAX_VALUES: Final = 100_000
MAX_DOCUMENTS: Final = 2_000


class _Loader(yaml.SafeLoader):
    """Composes nodes only; values are made below, with limits."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?[0-9]+\Z|0x[0-9a-fA-F]+\Z|0o[0-7]+\Z", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _refuse(source: str, mark: yaml.Mark | None, problem: str, remedy: str = "") -> InvalidSpec:
    where = f"{source}:{mark.line + 1}" if mark else source
    return InvalidSpec((Violation(where, "", problem, remedy),))


def load(text: bytes, source: str) -> list[tuple[str, Any]]:
    """The documents of a stream as plain JSON values, each with where it begins (``file:line``).

    Empty documents are left out. Raises InvalidSpec.
    """
    if len(text) > MAX_BYTES:
        raise _refuse(
            source, None, f"is {len(text)} bytes of YAML", f"split it: at most {MAX_BYTES} bytes are taken at once"
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refuse(source, None, f"is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    documents: list[tuple[str, Any]] = []
    try:
        loader = _Loader(decoded)
        try:
            while loader.check_node():
                node = loader.get_node()
                if node is None:
                    continue
                value = _Builder(source).build(node)
                if value is not None:
                    documents.append((f"{source}:{node.start_mark.line + 1}", value))
                if len(documents) > MAX_DOCUMENTS:
                    raise _refuse(source, node.start_mark, f"has more than {MAX_DOCUMENTS} documents", "split it")
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise _refuse(
            source, error.problem_mark or error.context_mark, f"is not YAML: {problem}", "mend the line"
        ) from None
    except yaml.YAMLError as error:
        raise _refuse(
            source, None, f"is not YAML: {' '.join(str(error).split())}", "write text in YAML or JSON"
        ) from None
    except RecursionError:
        raise _refuse(source, None, f"is nested deeper than {MAX_DEPTH} levels", "flatten it") from None
    return documents


class _Builder:
    """Makes plain values from composed nodes, counting as it goes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values = 0

    def build(self, node: yaml.Node, depth: int = 0) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _refuse(
                self.source, node.start_mark, f"expands to more than {MAX_VALUES} values", "write it without aliases"
            )
        if depth > MAX_DEPTH:
            raise _refuse(self.source, node.start_mark, f"is nested deeper than {MAX_DEPTH} levels", "flatten it")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.build(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._mapping(node, depth)
        raise _refuse(self.source, node.start_mark, f"has the tag {node.tag!r}", "remove the tag")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.build(key_node, depth + 1)
            if not isinstance(key, str):
                raise _refuse(
                    self.source, key_node.start_mark, f"has the key {key!r}, which is not text", "put it in quotes"
                )
            if key in result:
                raise _refuse(self.source, key_node.start_mark, f"has the key {key!r} twice", "keep one of them")
            result[key] = self.build(value_node, depth + 1)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        tag, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
        if tag == "str":
            return text
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag == "int":
            if len(text) > 40:
                raise _refuse(self.source, node.start_mark, "has a number of more than 40 digits", "put it in quotes")
            return int(text, 0) if text.lower().startswith(("0x", "0o")) else int(text)
        if tag == "float":
            return float(text)
        raise _refuse(self.source, node.start_mark, f"has the tag {node.tag!r}", "remove the tag")
