"""`casemate start`, `stop`, `pause` and `resume`: levels. Whether the instances of environments should run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import changes, completing, kinds, options, term
from casemate_cli.failure import Failure
from casemate_cli.kinds import Target

if TYPE_CHECKING:
    from casemate_cli.client import Client

#: What an environment with this word comes to.
_GOALS = {"stopped": ("Stopped",), "started": ("Ready", "Running"), "paused": ("Paused", "Stopped")}


def _set_run(
    ctx: click.Context,
    arguments: tuple[str, ...],
    word: str,
    wait: bool,
    timeout_s: float,
    also: "Callable[[Client, Target], None] | None" = None,
) -> None:
    from casemate_cli.client import Client

    wanted = kinds.targets(arguments, default_kind="environment")
    if any(t.kind.name != "Environment" or not t.name for t in wanted):
        raise Failure(
            "only environments are started, stopped and paused", remedy="name environments, for example hello"
        )
    settings = options.settings(ctx)

    def mutate(message: Any) -> None:
        message.spec.run = word

    with Client(settings) as client:
        for target in wanted:
            result = changes.change(client, target, settings.tenant, mutate, f"changing {target}")
            term.out(f"{target} {'will be ' + word if result.action == 'changed' else 'is unchanged'}")
            if also is not None:
                also(client, target)
        if wait:
            from casemate_cli.verbs.wait import Phase, until

            with term.Progress(f"waiting until {wanted[0]} is {word}"):
                until(client, wanted, settings.tenant, Phase(_GOALS[word]), timeout_s)


def _options(function: Any) -> Any:
    for option in (
        options.connection,
        click.option("--timeout", type=options.SPAN, default="5m", help="For --wait: how long.", show_default=True),
        click.option("--wait/--no-wait", default=False, help="Wait until it is so.  [default: --no-wait]"),
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
@click.option("--grace", type=options.SPAN, help="How long the guests have to power off this time.")
@click.option("--force", is_flag=True, help="End them at once, as if the power were cut.")
@_options
@click.pass_context
def stop(
    ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float, grace: float | None, force: bool
) -> None:
    """Stop the instances of environments; disks stay.

    The guests are asked to power off, and ended after their grace (`casemate explain environment.spec.stopGrace`). Places
    and addresses stay reserved, so that a start finds them again.
    """
    if force and grace is not None:
        raise Failure("--force and --grace contradict each other", remedy="leave one of them out")
    grace_s = 0.0 if force else grace

    def hurry(client: "Client", target: Target) -> None:
        from casemate_cli.verbs.operate import ask

        ask(client, target, "stop", grace_s, timeout)

    _set_run(ctx, arguments, "stopped", wait, timeout, hurry if grace_s is not None else None)


@click.command()
@_options
@click.pass_context
def pause(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Freeze the guests of environments where they stand, in memory.

    They hold what they hold, and answer nothing. An instance that does not run is not started.
    """
    _set_run(ctx, arguments, "paused", wait, timeout)


@click.command()
@_options
@click.pass_context
def resume(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Let the frozen guests of environments go on; those that are off are started."""
    _set_run(ctx, arguments, "started", wait, timeout)
