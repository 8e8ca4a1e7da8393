"""`casemate exec`: a command in a container, or in the VM itself; its exit code is ours."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, options
from casemate_cli.failure import Exit, Failure
from casemate_cli.pipes import Outbox, raw_terminal, read_stdin
from casemate_cli.verbs.logs import parse_name

if TYPE_CHECKING:
    from casemate_wire.v1 import operators_pb2 as pb

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@click.command("exec")
@click.argument(
    "name", metavar="ENVIRONMENT|INSTANCE[.POD]", shell_complete=completing.names_of("Environment", "Instance", "Pod")
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [WORD]...")
@click.option("-p", "--pod", default="", metavar="NAME", help="Pod; needed where the instance has several.")
@click.option("-c", "--container", default="", metavar="NAME", help="Container; needed where the pod has several.")
@click.option("--vm", is_flag=True, help="Run it in the VM itself, in no container.")
@click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Give it our standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option(
    "-e", "--env", "environment", multiple=True, metavar="NAME=VALUE", help="Set a variable; may be repeated."
)
@options.connection
@click.pass_context
def exec_(
    ctx: click.Context,
    name: str,
    command: tuple[str, ...],
    pod: str,
    container: str,
    vm: bool,
    with_stdin: bool,
    tty: bool,
    environment: tuple[str, ...],
) -> int:
    """Run a command in a container, or with --vm in the VM itself.

    The exit code is the command's own; 128 + N where signal N ended it. Signals that we get are passed on.

    \b
    Examples:
      casemate exec hello -- cat /etc/hostname
      casemate exec -it hello-0.web -- sh
      casemate exec --vm hello-0 -- podman ps
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb

    instance, named_pod = parse_name(name)
    settings = options.settings(ctx)
    start = pb.ExecStart(
        tenant=settings.tenant,
        instance=instance,
        pod=pod or named_pod,
        container=container,
        guest=vm,
        argv=command,
        tty=tty,
        environment=_variables(environment),
    )
    if tty:
        start.size.CopyFrom(_size())
    with Client(settings) as client, ExitStack() as stack:
        start.ticket = client.ticket("exec", settings.tenant, instance)
        outbox = Outbox(pb.ExecInput(start=start))
        stack.callback(outbox.end)
        stack.enter_context(_signals_to(outbox, tty))
        raw = tty and with_stdin and sys.stdin.isatty()
        if raw:
            stack.enter_context(raw_terminal())
        if with_stdin:

            def typed(data: bytes) -> bool:
                outbox.put(pb.ExecInput(stdin=data))
                return True

            read_stdin(typed, lambda: outbox.put(pb.ExecInput(close_stdin=True)))
        else:
            outbox.put(pb.ExecInput(close_stdin=True))
        return _run(client.stream(client.stub.Exec, iter(outbox)), raw)


def _variables(pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise Failure(f"{pair!r} is no variable", remedy="write it as --env NAME=VALUE")
        found[key] = value
    return found


def _run(outputs: "Iterator[pb.ExecOutput]", raw: bool) -> int:
    for output in outputs:
        match output.WhichOneof("output"):
            case "stdout":
                _write(sys.stdout.buffer, output.stdout)
            case "stderr":
                # A command on a terminal writes all it has to that; this is a word about it, and ours has no one to
                # begin its lines anew while it is raw.
                _write(sys.stderr.buffer, output.stderr.replace(b"\n", b"\r\n") if raw else output.stderr)
            case "exit_code":
                return output.exit_code
    raise Failure("the command's exit code did not come back", code=Exit.UNREACHABLE)


def _write(stream: Any, data: bytes) -> None:
    """A command's output goes out as it is: that is what was asked for, as with ssh."""
    stream.write(data)
    stream.flush()


def _size() -> "pb.TerminalSize":
    from casemate_wire.v1 import operators_pb2 as pb

    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns, rows = 80, 24
    return pb.TerminalSize(rows=rows or 24, columns=columns or 80)


@contextmanager
def _signals_to(outbox: "Outbox[pb.ExecInput]", tty: bool) -> Iterator[None]:
    """Pass signals on to the command, and the terminal's size where it changes."""
    from casemate_wire.v1 import operators_pb2 as pb

    before = {n: signal.signal(n, lambda number, _: outbox.try_put(pb.ExecInput(signal=number))) for n in _FORWARDED}
    if tty:
        before[signal.SIGWINCH] = signal.signal(
            signal.SIGWINCH, lambda *_: outbox.try_put(pb.ExecInput(resize=_size()))
        )
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
