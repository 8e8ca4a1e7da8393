"""`casemate context`: managers by name, in the file of contexts."""

import dataclasses
from pathlib import Path

import click

from casemate_cli import settings, term
from casemate_cli.columns import NONE, Table
from casemate_cli.failure import Exit, Failure


@click.group()
def context() -> None:
    """Name managers, and choose one.

    Contexts live in $CASEMATE_CONFIG, else in ~/.config/casemate/config.yaml.
    """


@context.command("list")
def list_() -> None:
    """List the contexts; the current one has a star."""
    found = settings.load_contexts(settings.config_path())
    if not found.contexts:
        term.say("there are no contexts; add one: casemate context set NAME --manager HOST:PORT")
    table = Table(("", "NAME", "MANAGER", "TENANT"))
    table.write(
        ("*" if name == found.current else "", name, c.manager or NONE, c.tenant or settings.DEFAULT_TENANT)
        for name, c in sorted(found.contexts.items())
    )


@context.command("set")
@click.argument("name")
@click.option("--manager", metavar="HOST:PORT", help="Address of the manager.")
@click.option("-t", "--tenant", metavar="NAME", help="Tenant to speak for.")
def set_(name: str, manager: str | None, tenant: str | None) -> None:
    """Make or change a context; the first one becomes the current one."""
    path = settings.config_path()
    found = settings.load_contexts(path)
    old = found.contexts.get(name, settings.Context())
    if manager is not None:
        settings.checked_address(manager)
    fresh = dataclasses.replace(
        old, manager=old.manager if manager is None else manager, tenant=old.tenant if tenant is None else tenant
    )
    if not fresh.manager:
        raise Failure(f"context {name} needs a manager", remedy="add --manager HOST:PORT")
    settings.save_contexts(path, settings.Contexts(found.current or name, {**found.contexts, name: fresh}))
    term.out(f"context {term.clean(name)} set")


@context.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", metavar="NAME", help="Name to give it, where the file has one context.")
def import_(file: Path, name: str | None) -> None:
    """Take over contexts from a file, such as `casemate-manager operator` writes; the first becomes the current one."""
    path = settings.config_path()
    found = settings.load_contexts(path)
    given = settings.load_contexts(file).contexts
    if not given:
        raise Failure(f"there are no contexts in {file}")
    if name is not None:
        if len(given) != 1:
            raise Failure(f"{file} has {len(given)} contexts", remedy="leave out --name")
        given = {name: next(iter(given.values()))}
    settings.save_contexts(path, settings.Contexts(found.current or next(iter(given)), {**found.contexts, **given}))
    for each in given:
        term.out(f"context {term.clean(each)} set")


@context.command()
@click.argument("name")
def use(name: str) -> None:
    """Make a context the current one."""
    path = settings.config_path()
    found = settings.load_contexts(path)
    _known(found, name)
    settings.save_contexts(path, dataclasses.replace(found, current=name))
    term.out(f"context {term.clean(name)} is the current one")


@context.command()
@click.argument("name")
def delete(name: str) -> None:
    """Forget a context."""
    path = settings.config_path()
    found = settings.load_contexts(path)
    _known(found, name)
    left = {k: v for k, v in found.contexts.items() if k != name}
    settings.save_contexts(path, settings.Contexts("" if found.current == name else found.current, left))
    term.out(f"context {term.clean(name)} deleted")


def _known(found: settings.Contexts, name: str) -> None:
    if name not in found.contexts:
        known = ", ".join(sorted(found.contexts)) or "none"
        raise Failure(f"there is no context {name!r}", code=Exit.NOT_FOUND, remedy=f"known: {known}")
