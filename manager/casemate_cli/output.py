"""Objects in the forms of `-o`: table, wide, json, yaml, name, jsonpath=….

JSON and YAML have the shape that `apply` takes. Several objects are a ``kind: List`` in JSON and documents of one stream in
YAML.
"""

import json
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import jsonpath, kinds, term
from casemate_cli.failure import Detail, Failure

if TYPE_CHECKING:
    from casemate_wire.v1 import operators_pb2 as pb

FORMS = ("table", "wide", "json", "yaml", "name")


class Form(click.ParamType[str]):
    """One of the forms, or `jsonpath=TEMPLATE`."""

    name = "form"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if text in FORMS:
            return text
        if text.startswith("jsonpath="):
            jsonpath.parse(text.removeprefix("jsonpath="))
            return text
        raise Failure(
            "the form of output is not known",
            details=[
                Detail("--output", text, "is none of them", f"write one of {', '.join(FORMS)} or jsonpath={{.path}}")
            ],
        )

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(form) for form in (*FORMS, "jsonpath=") if form.startswith(incomplete)]


FORM = Form()


def plain(resource: "pb.Resource") -> dict[str, Any]:
    """The object as plain JSON values."""
    from casemate_wire import manifest

    return _ordered(manifest.to_plain(resource))  # type: ignore[no-any-return]


#: Fields of free JSON (google.protobuf.Struct keeps no order), and the keys that people expect first in a manifest.
_FREE = frozenset({"pods", "manifest", "claim", "topology", "parameters"})
_FIRST = {key: i for i, key in enumerate(("apiVersion", "kind", "metadata", "name", "image", "spec"))}


def _ordered(value: Any, *, free: bool = False) -> Any:
    """The value with its free parts in a fixed order, so that the same object is always shown the same."""
    if isinstance(value, list):
        return [_ordered(item, free=free) for item in value]
    if not isinstance(value, dict):
        return value
    keys = sorted(value, key=lambda k: (_FIRST.get(k, len(_FIRST)), k)) if free else list(value)
    return {key: _ordered(value[key], free=free or key in _FREE) for key in keys}


def name(resource: "pb.Resource") -> str:
    """`environment/hello`."""
    from casemate_wire import schema

    kind = kinds.BY_NAME[schema.kind_of(resource)]
    return f"{kind.word}/{schema.object_of(resource).metadata.name}"  # type: ignore[attr-defined]


def to_yaml(value: Any) -> str:
    """YAML text of plain JSON values: block style, keys as they stand, long texts as blocks."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts of several lines as literal blocks; no aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data and data.isprintable() is False and _only_breaks(data) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Dumper.add_representer(str, text)
    shown = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return shown if _safe(shown) else yaml.dump(value, Dumper=Dumper, sort_keys=False, width=120)


def _only_breaks(data: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in data) and not any(line.endswith(" ") for line in data.split("\n"))


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text; everything that a terminal would obey is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if _safe(text) else json.dumps(value, indent=indent)


def _safe(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def write(resources: "list[pb.Resource]", form: str, *, listed: bool) -> None:
    """Write objects in a form that is no table. `listed`: they are a list even if there is one or none."""
    if form == "name":
        for resource in resources:
            term.out(term.clean(name(resource)))
    elif form == "yaml":
        texts = [to_yaml(plain(resource)) for resource in resources]
        term.out("---\n".join(texts), end="")
    else:
        items = [plain(resource) for resource in resources]
        value: Any = {"apiVersion": "casemate/v1", "kind": "List", "items": items} if listed else items[0]
        if form == "json":
            term.out(to_json(value))
        else:
            template = jsonpath.parse(form.removeprefix("jsonpath="))
            text = template.render(value)
            term.out(term.clean(text, keep="\n\t"), end="" if text.endswith("\n") else "\n")
