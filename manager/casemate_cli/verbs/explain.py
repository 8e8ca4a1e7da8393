"""`casemate explain`: what a kind or a field is for, from the comments of the schema. Asks nobody."""

import dataclasses
import shutil
import textwrap
from typing import TYPE_CHECKING

import click

from casemate_cli import kinds, output, term
from casemate_cli.failure import Detail, Exit, Failure

if TYPE_CHECKING:
    from casemate_wire.explain import Explanation

_EFFECTS = {
    "live": "takes effect while the instance runs",
    "restart": "takes effect at the next stop and start",
    "replace": "makes the instance anew; its volumes stay",
    "immutable": "refused: delete the object and create it again",
}


@click.command()
@click.argument("path", metavar="KIND[.FIELD...]")
@click.option("-r", "--recursive", is_flag=True, help="All fields below it, as a tree.")
@click.option("-o", "--output", "form", type=click.Choice(["text", "json"]), default="text", help="Form.")
def explain(path: str, recursive: bool, form: str) -> None:
    """Document a kind or a field.

    \b
    Examples:
      casemate explain environment
      casemate explain env.spec.cpu.threads
    """
    from casemate_wire import explain as schema_explain

    word, dot, rest = path.partition(".")
    try:
        word = kinds.find(word).name.lower()
        found = schema_explain.explain(word + dot + rest)
    except schema_explain.UnknownField as unknown:
        problem, _, remedy = str(unknown).partition("; ")
        raise Failure(
            "there is no such field",
            code=Exit.NOT_FOUND,
            details=[Detail("path", path, problem.partition("' ")[2] or problem, remedy)],
        ) from None
    if form == "json":
        term.out(output.to_json(dataclasses.asdict(found)))
        return
    _text(found)
    if found.fields:
        term.out("")
        term.out(term.paint("FIELDS", "bold"))
    for field in found.fields:
        if recursive:
            _tree(field, "  ")
        else:
            _field(field)


def _text(found: "Explanation") -> None:
    rows = {
        "PATH": found.path,
        "TYPE": found.type,
        "VALUES": ", ".join(found.words),
        "REQUIRED": "yes" if found.required else "",
        "CHANGE": f"{found.update}: {_EFFECTS[found.update]}" if found.update else "",
        "SERVED": "" if found.served else "not by this release: setting it is refused",
    }
    for key, value in rows.items():
        if value:
            term.out(f"{term.paint(f'{key:<9}', 'bold')} {value}")
    if found.doc:
        term.out("")
        _wrapped(found.doc, "")


def _field(field: "Explanation") -> None:
    marks = [field.type]
    if field.words:
        marks = ["|".join(field.words)]
    if field.required:
        marks.append("required")
    if field.update:
        marks.append(field.update)
    if not field.served:
        marks.append("not served")
    term.out(f"  {term.paint(field.name, 'cyan')}  <{', '.join(marks)}>")
    _wrapped(field.doc, "      ")


def _tree(field: "Explanation", indent: str) -> None:
    from casemate_wire import explain as schema_explain

    required = " required" if field.required else ""
    term.out(f"{indent}{field.name}  <{field.type}>{required}{'' if field.served else ' (not served)'}")
    if len(indent) < 20 and "object" in field.type and "free" not in field.type:
        for below in schema_explain.explain(field.path).fields:
            _tree(below, indent + "  ")


def _wrapped(text: str, indent: str) -> None:
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    for line in textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent):
        term.out(line)
