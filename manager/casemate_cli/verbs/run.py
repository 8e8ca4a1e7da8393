"""`casemate start` and `casemate stop`: whether the instances of environments should run."""

from typing import Any

import click

from casemate_cli import changes, completing, kinds, options, term
from casemate_cli.failure import Failure


def _set_run(ctx: click.Context, arguments: tuple[str, ...], word: str, wait: bool, timeout_s: float) -> None:
    from casemate_cli.client import Client

    wanted = kinds.targets(arguments, default_kind="environment")
    if any(t.kind.name != "Environment" or not t.name for t in wanted):
        raise Failure("only environments are started and stopped", remedy="name environments, for example hello")
    settings = options.settings(ctx)

    def mutate(message: Any) -> None:
        message.spec.run = word

    with Client(settings) as client:
        for target in wanted:
            result = changes.change(client, target, settings.tenant, mutate, f"changing {target}")
            term.out(f"{target} {'will be ' + word if result.action == 'changed' else 'is unchanged'}")
        if wait:
            from casemate_cli.verbs.wait import Phase, until

            goal = Phase(("Stopped",)) if word == "stopped" else Phase(("Ready", "Running"))
            until(client, wanted, settings.tenant, goal, timeout_s)


def _options(function: Any) -> Any:
    for option in (
        options.connection,
        click.option("--timeout", type=options.SPAN, default="5m", help="For --wait: how long.", show_default=True),
        click.option("--wait", is_flag=True, help="Wait until it is so."),
        click.argument(
            "arguments",
            nargs=-1,
            required=True,
            metavar="ENVIRONMENT...",
            shell_complete=completing.names_of("Environment"),
        ),
    ):
        function = option(function)
    return function


@click.command()
@_options
@click.pass_context
def start(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Start the instances of environments."""
    _set_run(ctx, arguments, "started", wait, timeout)


@click.command()
@_options
@click.pass_context
def stop(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Stop the instances of environments; disks stay.

    The guests are asked to power off. Places and addresses stay reserved, so that a start finds them again.
    """
    _set_run(ctx, arguments, "stopped", wait, timeout)
