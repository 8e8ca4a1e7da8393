"""`casemate events`: what happened, oldest first."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from casemate_cli import completing, kinds, options, output, term
from casemate_cli.columns import NONE, Table, age
from casemate_cli.failure import Exit, Failure, unreachable

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb
    from casemate_wire.v1.fleet_pb2 import Event

#: A manager that went away is waited for so long, as with `logs -f`; and when that is told.
PATIENCE_S = 600.0
TELL_S = 1.0
#: Events whose repetition is recognised: more than a manager keeps of most fleets.
MOST_SEEN = 50_000
_HEADINGS = ("AGE", "SEVERITY", "OBJECT", "REASON", "SOURCE", "MESSAGE")


@click.command()
@click.argument("arguments", nargs=-1, metavar="[KIND NAME]", shell_complete=completing.kind_or_name)
@click.option("-f", "--follow", is_flag=True, help="Go on, until interrupted.")
@click.option(
    "--cause", metavar="ID", default="", help="Only what follows from this request: r-..., or its request key."
)
@click.option("-A", "--all-tenants", is_flag=True, help="Events of all tenants.")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "wide", "json"]),
    default="table",
    help="Form; wide adds the cause, json is a line each.",
)
@options.connection
@click.pass_context
def events(
    ctx: click.Context, arguments: tuple[str, ...], follow: bool, cause: str, all_tenants: bool, form: str
) -> int:
    """Show what happened, oldest first.

    \b
    Examples:
      casemate events
      casemate events env/hello -f
      casemate events --cause r-0123456789ab
    """
    from casemate_cli.client import Client
    from casemate_wire import manifest
    from casemate_wire.v1 import operators_pb2 as pb

    settings = options.settings(ctx)
    request = pb.EventsRequest(tenant="" if all_tenants else settings.tenant, follow=follow, cause=cause)
    if arguments:
        wanted = kinds.targets(arguments)
        if len(wanted) != 1:
            raise Failure("events of one object at a time", remedy="name it as KIND NAME")
        request.kind, request.name = wanted[0].kind.name, wanted[0].name
        if not wanted[0].kind.of_tenant:
            request.tenant = ""
    wide = form == "wide"
    table = Table((*_HEADINGS, "CAUSE") if wide else _HEADINGS)
    timeout_s = None if follow else settings.request_timeout_s
    rows: list[tuple[str, ...]] = []
    with Client(settings) as client:
        try:
            told = (
                _followed(client, request)
                if follow
                else client.stream(client.stub.Events, request, timeout_s=timeout_s)
            )
            for event in told:
                if form == "json":
                    term.out(output.to_json(manifest.message_to_plain(event), indent=None))
                    term.flush()
                    continue
                row = (*_row(event), event.cause or NONE) if wide else _row(event)
                if follow:
                    table.write([row])
                    term.flush()
                else:
                    rows.append(row)
        except KeyboardInterrupt:
            return Exit.OK if follow else Exit.INTERRUPTED
    table.write(rows)
    if not rows and form != "json" and not follow:
        term.say("nothing has happened")
    return Exit.OK


def _followed(client: "Client", request: "pb.EventsRequest") -> "Iterator[Event]":
    """Events, over restarts of the manager: one that is back tells all of them again, and what was seen is left out."""
    seen: dict[str, int] = {}
    broken_since_s: float | None = None
    told = False
    while True:
        try:
            for event in client.stream(client.stub.Events, request):
                broken_since_s, told = None, False
                if seen.get(event.metadata.name) == event.count:
                    continue
                seen.pop(event.metadata.name, None)
                seen[event.metadata.name] = event.count
                if len(seen) > MOST_SEEN:
                    del seen[next(iter(seen))]
                yield event
            broken = unreachable(client.settings.manager, "the stream ended")
        except Failure as failed:
            if failed.code is not Exit.UNREACHABLE:
                raise
            broken = failed
        now_s = time.monotonic()
        broken_since_s = broken_since_s if broken_since_s is not None else now_s
        if now_s - broken_since_s > (PATIENCE_S if seen else client.settings.retry_s):
            raise broken
        if not told and now_s - broken_since_s > TELL_S:
            term.say(f"(the events are interrupted: {broken.what}; waiting for them to go on)", "yellow")
            told = True
        time.sleep(0.2)


def _row(e: "Event") -> tuple[str, ...]:
    times = f" (x{e.count})" if e.count > 1 else ""
    return (
        age(e.last if e.last.seconds else e.time),
        e.severity or NONE,
        f"{e.regarding.kind.lower()}/{e.regarding.name}" if e.regarding.kind else NONE,
        e.reason or NONE,
        e.source or NONE,
        e.message + times,
    )
