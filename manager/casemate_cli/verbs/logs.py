"""`casemate logs`: what containers wrote, once or as they write."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from casemate_cli import completing, kinds, options, term
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb

#: A log that was seen is waited for so long before it is given up.
PATIENCE_S = 600.0
#: What lasts longer is told.
TELL_S = 1.0


@click.command()
@click.argument(
    "name", metavar="ENVIRONMENT|INSTANCE[.POD]", shell_complete=completing.names_of("Environment", "Instance", "Pod")
)
@click.option("-p", "--pod", default="", metavar="NAME", help="Pod; needed where the instance has several.")
@click.option("-c", "--container", default="", metavar="NAME", help="Container; needed where the pod has several.")
@click.option("-f", "--follow", is_flag=True, help="Go on, until interrupted.")
@click.option("--tail", type=click.IntRange(min=1), metavar="LINES", help="Only the last lines.")
@click.option("--since", type=options.SPAN, metavar="SPAN", help="Only lines of the last 90s, 15m, 2h.")
@click.option("--previous", is_flag=True, help="Only lines of the run before the container's last start.")
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
    previous: bool,
    timestamps: bool,
    prefix: bool,
) -> int:
    """Show what a container wrote.

    Lines that were lost on the way are counted on standard error, never passed over in silence. A log that is followed goes on
    behind its last line when the container, the guest's helper, the agent or the manager were restarted.

    \b
    Examples:
      casemate logs hello
      casemate logs hello-0.web -f --tail 20
      casemate logs hello --previous --since 2h
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb

    if previous and follow:
        raise Failure("--previous and --follow exclude one another", remedy="an earlier run is over: leave -f out")
    instance, named_pod = parse_name(name)
    settings = options.settings(ctx)
    request = pb.LogsRequest(
        tenant=settings.tenant,
        instance=instance,
        pod=pod or named_pod,
        container=container,
        follow=follow,
        tail=tail or 0,
        previous=previous,
    )
    if since is not None:
        request.since.FromNanoseconds(time.time_ns() - int(since * 1e9))
    hostile_to = sys.stdout.isatty()
    with Client(settings) as client:
        try:
            for line in _lines(client, request):
                if line.lost:
                    term.say(f"({_lost(line.lost, line.container)})", "yellow")
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


def _lost(count: int, container: str) -> str:
    if count < 0:
        return f"{container} was made anew here; what it had written last may be missing"
    return f"{count} lines of {container} were lost here"


def _lines(client: "Client", request: "pb.LogsRequest") -> "Iterator[pb.LogLine]":
    """Lines; where they are followed, a stream that broke is dialled again and goes on behind the last line that was seen.

    A manager or a host that is away is waited for, and so is a container that is being started, once a line was seen.
    """
    broken_since_s: float | None = None
    told = False
    while True:
        try:
            for line in client.stream(client.stub.Logs, request):
                if told:
                    term.say("(the log goes on)")
                broken_since_s, told = None, False
                if line.log and line.log == request.log and line.sequence <= request.after:
                    continue
                request.log, request.after, request.tail = line.log, line.sequence, 0
                yield line
            return
        except Failure as broken:
            now_s = time.monotonic()
            broken_since_s = broken_since_s if broken_since_s is not None else now_s
            away = broken.code is Exit.UNREACHABLE or (broken.code is Exit.CONFLICT and request.log)
            patience_s = PATIENCE_S if request.log else client.settings.retry_s
            if not request.follow or not away or now_s - broken_since_s > patience_s:
                raise
            if not told and now_s - broken_since_s > TELL_S:
                term.say(f"(the log is interrupted: {broken.what}; waiting for it to go on)", "yellow")
                told = True
            time.sleep(0.2)
