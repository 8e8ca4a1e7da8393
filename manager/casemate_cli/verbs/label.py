"""`casemate label` and `casemate annotate`: words kept with an object, by key."""

from typing import Any

import click

from casemate_cli import changes, completing, kinds, options, term
from casemate_cli.failure import Detail, Exit, Failure


def parse(arguments: tuple[str, ...], what: str = "a label") -> tuple[list[kinds.Target], dict[str, str | None]]:
    """Objects, and labels (or annotations) to set (text) or remove (None): `env hello tier=web old-`. Raises Failure."""
    wanted: dict[str, str | None] = {}
    named: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            wanted[key] = value
        elif argument.endswith("-"):
            wanted[argument[:-1]] = None
        else:
            named.append(argument)
    if "" in wanted:
        raise Failure(f"{what} has no key", remedy="write KEY=VALUE to set it, KEY- to remove it")
    if not wanted:
        raise Failure(f"no {what.split()[-1]} is named", remedy="write KEY=VALUE to set it, KEY- to remove it")
    found = kinds.targets(tuple(named))
    if any(not t.name for t in found):
        raise Failure("no object is named", remedy="write it as KIND NAME or KIND/NAME")
    return found, wanted


def _options(function: Any) -> Any:
    for option in (
        options.connection,
        click.option("--overwrite", is_flag=True, help="Change those that have another value."),
        click.argument(
            "arguments",
            nargs=-1,
            required=True,
            metavar="KIND NAME... KEY=VALUE|KEY-...",
            shell_complete=completing.kind_or_name,
        ),
    ):
        function = option(function)
    return function


@click.command()
@_options
@click.pass_context
def label(ctx: click.Context, arguments: tuple[str, ...], overwrite: bool) -> None:
    """Set or remove labels.

    \b
    Examples:
      casemate label env hello tier=web
      casemate label host h1 rack=r1 --overwrite
      casemate label env/hello tier-
    """
    _mark(ctx, parse(arguments), overwrite, "labels", "label", "labelled")


@click.command()
@_options
@click.pass_context
def annotate(ctx: click.Context, arguments: tuple[str, ...], overwrite: bool) -> None:
    """Set or remove annotations: free text, by which nothing is selected.

    \b
    Examples:
      casemate annotate env hello owner="the ran team, phone 4711"
      casemate annotate env/hello owner-
    """
    _mark(ctx, parse(arguments, "an annotation"), overwrite, "annotations", "annotation", "annotated")


def _mark(
    ctx: click.Context,
    asked: tuple[list[kinds.Target], dict[str, str | None]],
    overwrite: bool,
    field: str,
    word: str,
    done: str,
) -> None:
    """Set and remove entries of ``metadata.<field>``. Raises Failure."""
    from casemate_cli.client import Client

    wanted_objects, wanted = asked
    settings = options.settings(ctx)
    with Client(settings) as client:
        for target in wanted_objects:

            def mutate(message: Any, target: kinds.Target = target) -> None:
                entries = getattr(message.metadata, field)
                for key, value in wanted.items():
                    if value is None:
                        entries.pop(key, None)
                    elif not overwrite and key in entries and entries[key] != value:
                        raise Failure(
                            f"{target} has that {word} with another value",
                            code=Exit.ERROR,
                            details=[
                                Detail(f"metadata.{field}.{key}", entries[key], f"is not {value!r}", "add --overwrite")
                            ],
                        )
                    else:
                        entries[key] = value

            result = changes.change(client, target, settings.tenant, mutate, f"changing the {field} of {target}")
            term.out(f"{target} {done if result.action == 'changed' else result.action}")
