"""`casemate label`."""

from typing import Any

import click

from casemate_cli import changes, completing, kinds, options, term
from casemate_cli.failure import Detail, Exit, Failure


def parse(arguments: tuple[str, ...]) -> tuple[list[kinds.Target], dict[str, str | None]]:
    """Objects, and labels to set (text) or remove (None): `env hello tier=web old-`. Raises Failure."""
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
        raise Failure("a label has no key", remedy="write KEY=VALUE to set it, KEY- to remove it")
    if not wanted:
        raise Failure("no label is named", remedy="write KEY=VALUE to set it, KEY- to remove it")
    found = kinds.targets(tuple(named))
    if any(not t.name for t in found):
        raise Failure("no object is named", remedy="write it as KIND NAME or KIND/NAME")
    return found, wanted


@click.command()
@click.argument(
    "arguments",
    nargs=-1,
    required=True,
    metavar="KIND NAME... KEY=VALUE|KEY-...",
    shell_complete=completing.kind_or_name,
)
@click.option("--overwrite", is_flag=True, help="Change labels that have another value.")
@options.connection
@click.pass_context
def label(ctx: click.Context, arguments: tuple[str, ...], overwrite: bool) -> None:
    """Set or remove labels.

    \b
    Examples:
      casemate label env hello tier=web
      casemate label host h1 rack=r1 --overwrite
      casemate label env/hello tier-
    """
    from casemate_cli.client import Client

    wanted_objects, wanted = parse(arguments)
    settings = options.settings(ctx)
    with Client(settings) as client:
        for target in wanted_objects:

            def mutate(message: Any, target: kinds.Target = target) -> None:
                labels = message.metadata.labels
                for key, value in wanted.items():
                    if value is None:
                        labels.pop(key, None)
                    elif not overwrite and key in labels and labels[key] != value:
                        raise Failure(
                            f"{target} has that label with another value",
                            code=Exit.ERROR,
                            details=[
                                Detail(f"metadata.labels.{key}", labels[key], f"is not {value!r}", "add --overwrite")
                            ],
                        )
                    else:
                        labels[key] = value

            result = changes.change(client, target, settings.tenant, mutate, f"labelling {target}")
            term.out(f"{target} {'labelled' if result.action == 'changed' else result.action}")
