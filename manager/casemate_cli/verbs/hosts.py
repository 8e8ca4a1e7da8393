"""`casemate host list`, `cordon` and `uncordon`; `casemate host token` and `revoke` are in :mod:`casemate_cli.verbs.tokens`."""

from typing import Any

import click

from casemate_cli import changes, completing, kinds, options, output, term
from casemate_cli.failure import Failure
from casemate_cli.verbs.tokens import revoke, token


@click.group()
def host() -> None:
    """See the hosts, let machines join, and revoke them."""


@host.command("list")
@click.option(
    "-o", "--output", "form", type=output.FORM, default="table", help="table, wide, json, yaml, name, jsonpath=…"
)
@click.option("-l", "--selector", default="", metavar="LABELS", help="Only hosts with these labels.")
@click.option("-w", "--watch", is_flag=True, help="Go on showing changes, until interrupted.")
@options.connection
@click.pass_context
def list_(ctx: click.Context, form: str, selector: str, watch: bool) -> Any:
    """List the hosts, as `casemate get hosts` does."""
    from casemate_cli.verbs.get import get

    return ctx.invoke(get, arguments=("hosts",), form=form, selector=selector, watch=watch)


host.add_command(token)
host.add_command(revoke)


def _cordon(ctx: click.Context, arguments: tuple[str, ...], wanted: bool) -> None:
    from casemate_cli.client import Client

    targets = kinds.targets(arguments, default_kind="host")
    if any(t.kind.name != "Host" or not t.name for t in targets):
        raise Failure("only hosts are cordoned", remedy="name hosts, for example h1")
    settings = options.settings(ctx)

    def mutate(message: Any) -> None:
        message.spec.cordoned = wanted

    with Client(settings) as client:
        for target in targets:
            result = changes.change(client, target, "", mutate, f"changing {target}")
            done = "cordoned" if wanted else "uncordoned"
            term.out(f"{target} {done if result.action == 'changed' else 'is ' + done + ' already'}")


_HOSTS = click.argument(
    "arguments", nargs=-1, required=True, metavar="HOST...", shell_complete=completing.names_of("Host")
)


@click.command()
@_HOSTS
@options.connection
@click.pass_context
def cordon(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Place nothing new on hosts. What runs there stays."""
    _cordon(ctx, arguments, True)


@click.command()
@_HOSTS
@options.connection
@click.pass_context
def uncordon(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Let hosts take instances again."""
    _cordon(ctx, arguments, False)
