"""`casemate logs`: what containers wrote, once or as they write."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from casemate_cli import completing, failure, kinds, options, term
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb


@click.command()
@click.argument("name", metavar="ENVIRONMENT|INSTANCE[.POD]", shell_complete=completing.names_of("Environment"))
@click.option("-p", "--pod", default="", metavar="NAME", help="Pod; needed where the instance has several.")
@click.option("-c", "--container", default="", metavar="NAME", help="Container; needed where the pod has several.")
@click.option("-f", "--follow", is_flag=True, help="Go on, until interrupted.")
@click.option("--tail", type=click.IntRange(min=1), metavar="LINES", help="Only the last lines.")
@click.option("--since", type=options.SPAN, metavar="SPAN", help="Only lines of the last 90s, 15m, 2h.")
@click.option("--timestamps", is_flag=True, help="Begin each line with its time.")
@click.option("--prefix", is_flag=True, help="Begin each line with its pod and container.")
@options.connection
@click.pass_context
def logs(
    ctx: click.Context,
    name: str,
    pod: str,
    container: str,
    follow: bool,
    tail: int | None,
    since: float | None,
    timestamps: bool,
    prefix: bool,
) -> int:
    """Show what a container wrote.

    Lines that were lost on the way are counted on standard error, never passed over in silence.

    \b
    Examples:
      casemate logs hello
      casemate logs hello-0.web -c httpd -f --tail 20
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb

    instance, named_pod = parse_name(name)
    settings = options.settings(ctx)
    request = pb.LogsRequest(
        tenant=settings.tenant,
        instance=instance,
        pod=pod or named_pod,
        container=container,
        follow=follow,
        tail=tail or 0,
    )
    if since is not None:
        request.since.FromNanoseconds(time.time_ns() - int(since * 1e9))
    hostile_to = sys.stdout.isatty()
    with Client(settings) as client:
        try:
            for line in _lines(client, request):
                if line.lost:
                    term.say(f"({line.lost} lines of {line.container} were lost here)", "yellow")
                lead = f"{line.time.ToJsonString()} " if timestamps else ""
                lead += f"[{line.pod}/{line.container}] " if prefix else ""
                text = term.clean(line.text, keep="\t") if hostile_to else line.text
                term.out((term.clean(lead) if lead else "") + text)
                term.flush()
        except KeyboardInterrupt:
            return Exit.OK if follow else Exit.INTERRUPTED
    return Exit.OK


def parse_name(name: str) -> tuple[str, str]:
    """Instance (or environment) and pod of `hello`, `hello-0`, `hello-0.web`, `env/hello`, `pod/hello-0.web`."""
    word, slash, rest = name.partition("/")
    if slash:
        kind = kinds.find(word)
        if kind.name not in ("Environment", "Instance", "Pod"):
            raise Failure(f"{kind.plural} write no logs", remedy="name an environment, an instance or a pod")
        name = rest
    instance, _, pod = name.partition(".")
    return instance, pod


def _lines(client: "Client", request: "pb.LogsRequest") -> "Iterator[pb.LogLine]":
    """Lines; where one follows, a broken stream is dialled again and goes on behind the last line that was seen."""
    last: dict[tuple[str, str], int] = {}
    broken_since_s: float | None = None
    while True:
        try:
            for line in client.stream(client.stub.Logs, request):
                broken_since_s = None
                key = line.pod, line.container
                if line.sequence and line.sequence <= last.get(key, 0):
                    continue
                last[key] = line.sequence
                request.since.CopyFrom(line.time)
                request.tail = 0
                yield line
            return
        except Failure as broken:
            now_s = time.monotonic()
            broken_since_s = broken_since_s if broken_since_s is not None else now_s
            if (
                not request.follow
                or broken.code is not failure.Exit.UNREACHABLE
                or now_s - broken_since_s > client.settings.retry_s
            ):
                raise
            time.sleep(0.2)
