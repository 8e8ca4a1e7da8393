"""`casemate audit`: what was done, by whom, from where; and whether the chain of records is whole.

The chain is verified here, from digests that are computed from what came over the wire: the manager is not believed.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from casemate_cli import options, output, term
from casemate_cli.columns import NONE, Table
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_core.audit import AuditRecord, Link
    from casemate_wire.v1 import audit_pb2 as pb

_HEADINGS = ("TIME", "ACTOR", "HOW", "ACT", "OUTCOME", "TARGETS", "FROM", "DETAIL")


@click.command()
@click.option("--actor", default="", metavar="NAME", help="Only acts of this user or host.")
@click.option("--act", default="", metavar="WORD", help="Only acts of this kind: apply, delete, exec, denied, drift, …")
@click.option("--target", default="", metavar="TEXT", help="Only acts on objects whose KIND/TENANT/NAME holds this.")
@click.option("--of-tenant", default="", metavar="NAME", help="Only acts that concern this tenant.")
@click.option("--since", "since_s", type=options.SPAN, metavar="SPAN", help="Only the last 90s, 15m, 2h, …")
@click.option("-n", "--last", type=click.IntRange(1, 100_000), metavar="N", help="Only the last N.")
@click.option("-f", "--follow", is_flag=True, help="Go on, until interrupted.")
@click.option("--verify", is_flag=True, help="Check the whole chain instead of showing it; exit 1 where it is broken.")
@click.option(
    "--since-digest",
    default="",
    metavar="SEQUENCE:DIGEST",
    help="With --verify: also that this record, noted at an earlier time, is part of it.",
)
@click.option(
    "-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", help="Form; json is a line each."
)
@options.connection
@click.pass_context
def audit(
    ctx: click.Context,
    actor: str,
    act: str,
    target: str,
    of_tenant: str,
    since_s: float | None,
    last: int | None,
    follow: bool,
    verify: bool,
    since_digest: str,
    form: str,
) -> int:
    """Show what was done, by whom and from where, oldest first.

    `-o json` is the form for export: a line for each record, with all of its fields. Keep the digest that --verify prints
    in another place: nobody can rewrite what came before it without that being found.

    \b
    Examples:
      casemate audit --since 1h
      casemate audit -f
      casemate audit --target environment/ran/du-17 -o json
      casemate audit --verify
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import audit_pb2, audit_pb2_grpc

    settings = options.settings(ctx)
    noted = _noted(since_digest)
    if verify and (actor or act or target or of_tenant or since_s or last or follow):
        raise Failure("the chain is verified as a whole", remedy="leave the filters away")
    request = audit_pb2.AuditRequest(
        actor=actor, act=act, target=target, tenant=of_tenant, follow=follow, last=last or 0
    )
    if since_s:
        import time

        request.since.FromMilliseconds(round((time.time() - since_s) * 1000))
    with Client(settings) as client:
        stub = audit_pb2_grpc.AuditStub(client.channel)
        if verify:
            ends = client.call(stub.Ends, audit_pb2.AuditEndsRequest())
            return _verify(client.stream(stub.Records, request), ends, noted)
        table = Table(_HEADINGS)
        try:
            rows: list[tuple[str, ...]] = []
            for entry in client.stream(stub.Records, request):
                if form == "json":
                    from casemate_wire import manifest

                    term.out(output.to_json(manifest.message_to_plain(entry), indent=None))
                    term.flush()
                elif follow:
                    table.write([_row(entry)])
                    term.flush()
                else:
                    rows.append(_row(entry))
        except KeyboardInterrupt:
            return Exit.OK if follow else Exit.INTERRUPTED
        table.write(rows)
        if not rows and form == "table" and not follow:
            term.say("nothing was done")
    return Exit.OK


def _row(entry: "pb.AuditEntry") -> tuple[str, ...]:
    import datetime

    from casemate_wire.codec.audit import record_from_message

    record = record_from_message(entry)
    stamp = datetime.datetime.fromtimestamp(record.time_s, datetime.UTC)
    return (
        stamp.strftime("%Y-%m-%dT%H:%M:%SZ"),
        record.actor,
        record.how,
        record.act,
        record.outcome,
        ", ".join(record.targets) or NONE,
        record.address or NONE,
        record.detail or NONE,
    )


def _noted(text: str) -> "Link | None":
    from casemate_core.audit import Link

    if not text:
        return None
    number, colon, digest = text.partition(":")
    if not colon or not number.isdecimal() or len(digest) != 64:
        raise Failure("--since-digest is not understood", remedy="write it as --verify printed it: SEQUENCE:DIGEST")
    return Link(int(number), digest)


def _verify(entries: "Iterator[pb.AuditEntry]", ends: "pb.AuditEnds", noted: "Link | None") -> int:
    from casemate_core.audit import verify
    from casemate_wire.codec.audit import link_from_message, record_from_message

    begin = link_from_message(ends.begin)
    head = link_from_message(ends.head)
    count, met = 0, noted is None or noted == begin

    def records() -> "Iterator[AuditRecord]":
        nonlocal count, met
        for entry in entries:
            record = record_from_message(entry)
            if record.sequence > head.sequence:
                return  # written meanwhile
            count += 1
            met = met or record.link == noted
            yield record

    found = verify(records(), begin, head)
    if noted is not None and not met:
        found.append(f"record {noted.sequence} with the digest that was noted is not part of the chain")
    if found:
        for line in found:
            term.say(f"broken: {line}", "red")
        return Exit.ERROR
    term.out(f"whole: {count} records")
    term.out(f"head:  {head.sequence}:{head.digest}")
    return Exit.OK
