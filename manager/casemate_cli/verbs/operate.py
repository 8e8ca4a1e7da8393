"""`casemate restart`, `reboot`, `reset` and `rebuild`: what is done once to instances, and followed to its end.

Each makes operations, one an instance (`casemate get operations`), and waits for their ends unless it is told not to. The
exit code is 1 where one failed, 6 where one has not ended in time.
"""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, kinds, options, term
from casemate_cli.failure import Detail, Exit, Failure
from casemate_cli.kinds import BY_NAME, Target

if TYPE_CHECKING:
    from casemate_cli.client import Client

_ENDED = ("Done", "Failed", "Unknown")


def ask(
    client: "Client",
    target: Target,
    verb: str,
    grace_s: float | None,
    timeout_s: float,
    duration_s: float = 0.0,
    to_host: str = "",
) -> list[Target]:
    """Ask for an operation on an instance or an environment; the operations. Raises Failure."""
    from casemate_cli.client import request_key
    from casemate_wire.v1 import operations_pb2 as pb

    request = pb.OperateRequest(
        request_key=request_key(),
        tenant=client.settings.tenant,
        name=target.name,
        verb=verb,
        grace_s=grace_s,
        timeout_s=timeout_s,
        duration_s=duration_s,
        to_host=to_host,
    )
    answer: pb.OperateResponse = client.call(client.stub.Operate, request, f"{verb} of {target}")
    return [Target(BY_NAME["Operation"], ref.name) for ref in answer.operations]


def operate(
    ctx: click.Context,
    verb: str,
    arguments: tuple[str, ...],
    wait: bool,
    timeout_s: float,
    grace_s: float | None = None,
    duration_s: float = 0.0,
    to_host: str = "",
) -> None:
    """Ask for it, and wait for the ends. Raises Failure where one failed, or has not ended in time."""
    from casemate_cli.client import Client

    wanted = kinds.targets(arguments, default_kind="environment")
    if any(t.kind.name not in ("Environment", "Instance") or not t.name for t in wanted):
        raise Failure(
            f"only environments and instances take a {verb}",
            remedy="name an environment, for example hello, or one instance of it, inst/hello-0",
        )
    with Client(options.settings(ctx)) as client:
        asked = [
            (target, o) for target in wanted for o in ask(client, target, verb, grace_s, timeout_s, duration_s, to_host)
        ]
        if not wait:
            for target, operation in asked:
                term.out(f"{target}: {operation} was asked for")
            return
        failed: list[Detail] = []
        end_s = time.monotonic() + timeout_s
        with term.Progress(f"waiting for {verb} of {wanted[0]}") as progress:
            for _, operation in asked:
                message = _follow(client, operation, end_s, timeout_s, progress)
                name, said = message.spec.target.name, message.status
                if said.phase == "Done":
                    term.out(f"instance/{term.clean(name)}: {verb} done: {term.clean(said.message)}")
                else:
                    failed.append(Detail(f"instance/{name}", said.reason or said.phase, said.message))
    if failed:
        raise Failure(f"{verb} has failed", details=failed, remedy="see casemate get operations")


def _follow(client: "Client", operation: Target, end_s: float, timeout_s: float, progress: term.Progress) -> Any:
    """Watch an operation until it has ended; how it ended. Raises Failure with code TIMEOUT."""
    from casemate_cli.verbs.wait import Phase, until

    last: dict[str, Any] = {}

    def tell(target: Target, message: Any) -> None:
        last["message"] = message
        said = message.status
        more = f": {term.clean(said.message)}" if said.phase == "Running" and said.message else ""
        progress.update(f"{message.spec.target.name}: {message.spec.verb}: {said.phase}{more}")

    # a manager tells the end a little after the deadline that it gave the host
    left_s = max(1.0, end_s - time.monotonic() + 5)
    try:
        until(client, [operation], client.settings.tenant, Phase(_ENDED), left_s, tell)
    except Failure as failure:
        if failure.code is Exit.TIMEOUT:
            raise Failure(
                f"{operation} has not ended within {timeout_s:g} s",
                code=Exit.TIMEOUT,
                details=failure.details,
                remedy=f"it goes on: see casemate get {operation}",
            ) from None
        raise
    return last["message"]


def shared_options(grace: bool) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        found = [
            options.connection,
            click.option(
                "--timeout",
                type=options.SPAN,
                default="10m",
                show_default=True,
                help="It is given up after so long, by the host too.",
            ),
            click.option("--wait/--no-wait", default=True, help="Wait for its end.  [default: --wait]"),
            click.argument(
                "arguments",
                nargs=-1,
                required=True,
                metavar="ENVIRONMENT|inst/INSTANCE...",
                shell_complete=completing.names_of("Environment"),
            ),
        ]
        if grace:
            found.append(click.option("--grace", type=options.SPAN, help="How long the guest has to power off."))
        for option in found:
            function = option(function)
        return function

    return add


@click.command()
@shared_options(grace=True)
@click.pass_context
def restart(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float, grace: float | None) -> None:
    """End the process of instances and start a new one; disks stay.

    The guest is asked to power off, and its process ended after its grace. Of an environment with an update strategy only
    so many instances at a time. It also starts one that was left off, or given up, after it had ended by itself.

    \b
    Examples:
      casemate restart hello
      casemate restart inst/hello-0 --grace 10s
    """
    operate(ctx, "restart", arguments, wait, timeout, grace)


@click.command()
@shared_options(grace=False)
@click.pass_context
def reboot(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Ask guests to boot anew, within the process that they run in.

    Its helper is asked, and it is done when the helper comes back with another boot id.
    """
    operate(ctx, "reboot", arguments, wait, timeout)


@click.command()
@shared_options(grace=False)
@click.pass_context
def reset(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Press the reset button of guests, without asking them. What they have not written is lost."""
    operate(ctx, "reset", arguments, wait, timeout)


@click.command()
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@shared_options(grace=True)
@click.pass_context
def rebuild(
    ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float, grace: float | None, yes: bool
) -> None:
    """Give instances a new root disk, made from their image.

    What is on the old one is lost. Name, uid, MAC and IP addresses, placement and volumes stay. A changed image, sshKeys or
    userData come into force.
    """
    if not yes:
        if not term.is_terminal(sys.stdin):
            raise Failure("the root disks would be lost, and nobody can be asked", remedy="give --yes")
        click.confirm(f"The root disks of {', '.join(arguments)} will be lost. Go on?", abort=True, err=True)
    operate(ctx, "rebuild", arguments, wait, timeout, grace)


@click.command()
@click.option(
    "--to",
    "to_host",
    default="",
    metavar="HOST",
    help="The host to move to; the scheduler chooses one where it is left out.",
    shell_complete=completing.names_of("Host"),
)
@shared_options(grace=False)
@click.pass_context
def migrate(ctx: click.Context, arguments: tuple[str, ...], wait: bool, timeout: float, to_host: str) -> None:
    """Move a running instance to another host; its guest goes on.

    Memory and root disk are sent while the guest runs. It stands still for the end of that, and until the manager has switched
    over. Uid, MAC and addresses stay. What cannot be moved is refused, with the reason, before anything is done: passed
    through devices, volumes on the host's own disk, another kind of CPU at the other host. Where a move does not succeed
    the instance goes on where it is.

    \b
    Examples:
      casemate migrate inst/hello-0
      casemate migrate inst/hello-0 --timeout 30m
    """
    operate(ctx, "migrate", arguments, wait, timeout, to_host=to_host)
