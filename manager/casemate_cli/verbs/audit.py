"""`casemate audit`: what was done, by whom, from where; and whether the chain of records is whole.

The chain is verified here, from digests that are computed from what came over the wire: the manager is not believed.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click

from casemate_cli import options, output, term
from casemate_cli.columns import NONE, Table
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_core.audit import AuditRecord, Link
    from casemate_core.checkpoint import Checkpoint
    from casemate_wire.v1 import audit_pb2 as pb
    from casemate_wire.v1.checkpoints_pb2 import WitnessStatement

#: Of what witnesses say against the chain, the first ones are shown.
MAX_BREAKS = 20
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
    "--key",
    "signed_by",
    default="",
    metavar="HEX",
    help="With --verify: also that this key, noted at an earlier time, signs the chain.",
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
    signed_by: str,
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
    if (since_digest or signed_by) and not verify:
        raise Failure("--since-digest and --key are for --verify", remedy="add --verify")
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
            from casemate_wire.v1 import checkpoints_pb2

            # Witnesses first: what they keep then is not newer than the end that is asked for next.
            said = list(client.stream(stub.Witnesses, checkpoints_pb2.WitnessesRequest()))
            ends = client.call(stub.Ends, audit_pb2.AuditEndsRequest())
            return _verify(client.stream(stub.Records, request), ends, said, noted, signed_by)
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


def _verify(
    entries: "Iterator[pb.AuditEntry]",
    ends: "pb.AuditEnds",
    said: "list[WitnessStatement]",
    noted: "Link | None",
    signed_by: str,
) -> int:
    from casemate_core.audit import verify
    from casemate_core.checkpoint import contradictions
    from casemate_wire.codec.audit import link_from_message, record_from_message
    from casemate_wire.codec.checkpoints import checkpoint_from_message

    begin, head = link_from_message(ends.begin), link_from_message(ends.head)
    signed = [("the manager", checkpoint_from_message(c)) for c in ends.checkpoints]
    signed += [(f"host {s.host}", checkpoint_from_message(c)) for s in said for c in s.kept]
    places = {checkpoint.sequence for _, checkpoint in signed}
    count, met = 0, noted is None or noted == begin
    chain: dict[int, str] = {}

    def records() -> "Iterator[AuditRecord]":
        nonlocal count, met
        for entry in entries:
            record = record_from_message(entry)
            if record.sequence > head.sequence:
                return  # written meanwhile
            count += 1
            met = met or record.link == noted
            if record.sequence in places:
                chain[record.sequence] = record.digest
            yield record

    found = verify(records(), begin, head)
    if noted is not None and not met:
        found.append(f"record {noted.sequence} with the digest that was noted is not part of the chain")
    found += _badly_signed(signed, ends.key, signed_by)
    found += islice(contradictions(chain, begin, head, signed), MAX_BREAKS)
    found += [f"host {s.host} wrote down: {b.reason}" for s in said for b in s.breaks]
    silent = [f"host {s.host} does not say what it keeps: {s.error}" for s in said if s.error]
    for line in silent:
        term.say(term.clean(line), "yellow")
    if found:
        for line in found:
            term.say(term.clean(f"broken: {line}"), "red")
        return Exit.ERROR
    witnesses = {s.host: max(c.sequence for c in s.kept) for s in said if s.kept}
    term.out(f"whole: {count} records")
    term.out(
        f"signed: up to record {max(places, default=0)}, by key {ends.key}" if signed else "signed: no place of it yet"
    )
    upto = f", up to record {max(witnesses.values())}" if witnesses else ""
    term.out(f"witnessed: by {len(witnesses)} of {len(said)} hosts{upto}")
    term.out(f"head:  {head.sequence}:{head.digest}")
    return Exit.OK


def _badly_signed(signed: "list[tuple[str, Checkpoint]]", key: str, expected: str) -> "Iterator[str]":
    """Checkpoints whose signature is not good, and keys that are not the one that is expected."""
    from casemate_wire.signing import is_genuine

    if expected and key != expected:
        yield f"the manager signs with key {key}, and not with the one that was noted"
    for who, checkpoint in dict.fromkeys(signed):
        if not is_genuine(checkpoint):
            yield f"{who} keeps a checkpoint of record {checkpoint.sequence} that is not signed by its key"
        elif checkpoint.key != (expected or key):
            yield f"{who} keeps record {checkpoint.sequence} signed by another key, {checkpoint.key}"
