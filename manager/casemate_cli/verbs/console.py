"""`casemate console`: the serial console of an instance, as one would see it on a cable."""

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from casemate_cli import completing, options, term
from casemate_cli.failure import Exit, Failure
from casemate_cli.pipes import Outbox, Printer, Terminated, raw_terminal, read_stdin
from casemate_cli.verbs.logs import parse_name

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

LEAVE = b"\x1d"
"""Ctrl-], as with telnet and virsh."""


@click.command()
@click.argument("name", metavar="ENVIRONMENT|INSTANCE", shell_complete=completing.names_of("Environment", "Instance"))
@click.option("--log", "kept", is_flag=True, help="Print what was written to it, as far as the host has kept it.")
@click.option(
    "--since", type=options.SPAN, metavar="SPAN", help="For --log: only what was written since, for example 10m."
)
@options.connection
@click.pass_context
def console(ctx: click.Context, name: str, kept: bool, since: float | None) -> int:
    """Sit at the serial console of an instance; Ctrl-] leaves.

    Several may sit there at once: all see the same, and what any of them types is typed. To a terminal the console is
    written as it is; into a pipe or a file its control characters are escaped. It ends by itself when the instance is off.

    \b
    Examples:
      casemate console hello-0
      casemate console hello > boot.txt
      casemate console hello --log --since 10m
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

    instance, pod = parse_name(name)
    if pod:
        raise Failure(f"{name!r} is a pod, and pods have no console", remedy=f"write casemate console {instance}")
    if since is not None and not kept:
        raise Failure("--since speaks of the log", remedy="add --log, or leave --since out")
    settings = options.settings(ctx)
    if kept:
        from casemate_cli.seriallog import print_log

        with Client(settings) as client:
            return print_log(client, instance, since)
    start = pb.ChannelTarget(tenant=settings.tenant, instance=instance)
    with Client(settings) as client:
        start.ticket = client.ticket("console", settings.tenant, instance)
        return _sit(client, pb.ConsoleInput(start=start), instance)


def _sit(client: "Client", first: "pb.ConsoleInput", name: str) -> int:
    import grpc

    from casemate_cli import failure
    from casemate_wire.v1 import channels_pb2 as pb

    outbox, printer, typing = Outbox(first), Printer(), sys.stdin.isatty()
    left = False
    call = client.channels.Console(iter(outbox))

    def typed(data: bytes) -> bool:
        nonlocal left
        before, leave, _ = data.partition(LEAVE) if typing else (data, b"", b"")
        if before:
            outbox.put(pb.ConsoleInput(data=before))
        if leave:
            left = True
            call.cancel()
        return not leave

    with ExitStack() as stack:
        stack.callback(outbox.end)
        stack.callback(call.cancel)
        try:
            for output in call:
                match output.WhichOneof("output"):
                    case "opened":
                        if typing:
                            term.say(f"at the console of {name}; Ctrl-] leaves")
                            stack.enter_context(raw_terminal(catch=True))
                        read_stdin(typed, lambda: None)
                    case "data":
                        printer.write(output.data)
                    case "lost":
                        term.say(f"({output.lost} bytes were lost here)", "yellow")
                    case "closed":
                        stack.close()
                        term.say("the console is gone: the instance is off, or was started anew")
                        return Exit.OK
        except grpc.RpcError as error:
            stack.close()
            if left:
                term.say("")
                return Exit.OK
            if typing:
                term.say("")
            raise failure.from_rpc(error, client.settings.manager, f"console of {name}") from None
        except Terminated as ended:
            return 128 + ended.number
        except KeyboardInterrupt:
            return Exit.INTERRUPTED
    raise Failure(f"console of {name}: the manager ended it without a word", code=Exit.UNREACHABLE)
