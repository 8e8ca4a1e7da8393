"""`casemate describe`: the story of an object, from what was asked through what is so to what happened."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, kinds, options, output, parts, profiles, term
from casemate_cli.columns import NONE, WORD_COLOURS, Table, age, columns
from casemate_cli.failure import Failure
from casemate_cli.kinds import Target

if TYPE_CHECKING:
    from casemate_cli.client import Client

#: The last events of an object are told; older ones are counted.
MAX_EVENTS = 25
#: Free objects of a status that would fill the screen; `get -o json` has them.
_TOO_LONG = frozenset({"topology", "claim", "manifest", "passports"})


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="KIND NAME...", shell_complete=completing.kind_or_name)
@options.connection
@click.pass_context
def describe(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Tell the story of an object: what was asked, what is so, what it consists of, and what happened.

    \b
    Examples:
      casemate describe env hello
      casemate describe inst/hello-0 host/h1
    """
    from casemate_cli.client import Client

    settings = options.settings(ctx)
    wanted = kinds.targets(arguments)
    if any(not t.name for t in wanted):
        raise Failure("no object is named", remedy="write it as KIND NAME or KIND/NAME")
    with Client(settings) as client:
        for i, target in enumerate(wanted):
            if i:
                term.out("")
            _describe(client, target, settings.tenant if target.kind.of_tenant else "")


def _describe(client: "Client", target: Target, tenant: str) -> None:
    from casemate_wire import schema

    resource = client.get(target.kind.name, target.name, tenant)
    message: Any = schema.object_of(resource)
    plain = output.plain(resource)
    metadata = plain.get("metadata", {})
    head = {
        "Name": metadata.get("name", ""),
        "Kind": target.kind.name,
        "Tenant": metadata.get("tenant", ""),
        "Uid": metadata.get("uid", ""),
        "Age": age(message.metadata.created),
        "Generation": metadata.get("generation", ""),
        "Labels": _pairs(metadata.get("labels", {})),
        "Annotations": _pairs(metadata.get("annotations", {})),
        "Deleting": f"for {age(message.metadata.deleting)}" if message.metadata.deleting.seconds else "",
    }
    for key, value in head.items():
        if value:
            term.out(f"{key + ':':<13}{term.clean(str(value))}")
    status = dict(plain.get("status", {}))
    conditions = status.pop("conditions", [])
    for own in ("profile", "certificate"):
        status.pop(own, None)
    _section("Spec", plain.get("spec", {}))
    _section("Status", status)
    _conditions(message, conditions)
    _realtime(message)
    if target.kind.name == "Host" and (topology := parts.topology_of(client, target.name)) is not None:
        term.out(term.paint("Parts:", "bold"))
        for line in parts.summary(topology):
            term.out(f"  {term.clean(line)}")
    if target.kind.name == "GPU":
        _passports(message)
    for kind in {"Environment": ("Instance", "Pod"), "Host": ("Instance",), "Instance": ("Pod",)}.get(
        target.kind.name, ()
    ):
        _parts(client, kind, tenant, target.name)
    _events(client, target, tenant)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(values.items()))


def _section(title: str, values: Any) -> None:
    shown = {k: v for k, v in values.items() if k not in _TOO_LONG} if isinstance(values, dict) else values
    if not shown:
        return
    term.out(term.paint(f"{title}:", "bold"))
    for line in output.to_yaml(shown).splitlines():
        term.out(f"  {term.clean(line)}")


def _conditions(message: Any, plain: list[dict[str, str]]) -> None:
    if not plain:
        return
    term.out(term.paint("Conditions:", "bold"))
    for condition in message.status.conditions:
        status = term.paint(f"{term.clean(condition.status):<8}", WORD_COLOURS.get(condition.status, ""))
        why = ": ".join(w for w in (condition.reason, condition.message) if w)
        term.out(f"  {term.clean(condition.type):<16}{status}{age(condition.since):<8}{term.clean(why)}")


def _realtime(message: Any) -> None:
    """The real-time profile, and the certificate, of what has them."""
    status = getattr(message, "status", None)
    if lines := getattr(status, "profile", ()):
        term.out(term.paint("Profile:", "bold"))
        for line in profiles.profile(lines):
            term.out(f"  {term.clean(line)}")
    if status is not None and "certificate" in status.DESCRIPTOR.fields_by_name and status.HasField("certificate"):
        term.out(term.paint("Certificate:", "bold"))
        for line in profiles.certificate(status.certificate):
            term.out(f"  {term.clean(line)}")


def _passports(message: Any) -> None:
    """The hand-overs of a GPU, newest first: the last one step by step."""
    for number, passport in enumerate(message.status.passports):
        state = "clean" if passport.clean else f"held back: {passport.reason}"
        whose = f", after tenant {passport.tenant}" if passport.tenant else ""
        title = f"Passport {passport.generation}.{passport.climb}{whose}: {state}"
        if number:
            term.out(term.clean(title))
            continue
        term.out(term.paint(term.clean(title), "bold"))
        for step in passport.steps:
            head = f"{step.rung:<15} {step.result:<8} {step.took_s:6.1f}s  {age(step.started):<8}"
            term.out(f"  {term.clean(f'{head} {step.evidence}')}")
            for check in step.checks:
                term.out(f"    {term.clean(f'{check.name:<13} {check.result:<8} {check.evidence}')}")
        if passport.not_proven:
            term.out("  Not proven:")
            for line in passport.not_proven:
                term.out(f"    {term.clean(line)}")


def _parts(client: "Client", kind_name: str, tenant: str, owner: str) -> None:
    from casemate_wire import schema

    kind = kinds.BY_NAME[kind_name]
    found = client.listed(kind_name, tenant=tenant, owner=owner)
    if not found:
        return
    term.out(term.paint(f"{kind.plural.capitalize()}:", "bold"))
    chosen = columns(kind_name, wide=False, with_tenant=False)
    table = Table(["  " + chosen[0].heading, *(c.heading for c in chosen[1:])])
    rows = [[c.value(schema.object_of(r)) for c in chosen] for r in found]
    table.write([["  " + row[0], *row[1:]] for row in rows])


def _events(client: "Client", target: Target, tenant: str) -> None:
    from casemate_wire.v1 import operators_pb2 as pb

    request = pb.EventsRequest(tenant=tenant, kind=target.kind.name, name=target.name)
    events = list(client.stream(client.stub.Events, request, timeout_s=client.settings.request_timeout_s))
    events.sort(key=_seconds)
    term.out(term.paint("Events:", "bold") + ("" if events else " none"))
    if len(events) > MAX_EVENTS:
        term.out(f"  ({len(events) - MAX_EVENTS} earlier ones: casemate events {target})")
    for row in story(events[-MAX_EVENTS:]):
        term.out("  " + row)


def _seconds(event: Any) -> float:
    when = event.last if event.last.seconds else event.time
    return float(when.seconds + when.nanos / 1e9)


def story(events: list[Any]) -> Iterator[str]:
    """Events in their order as lines: a heading for each request that some of them follow from, with the time since its
    first one; what happened by itself stands between them with its age."""
    began: dict[str, float] = {}
    told = ""
    for event in events:
        at_s = _seconds(event)
        if event.cause and event.cause not in began:
            began[event.cause] = at_s
        if event.cause != told:
            told = event.cause
            yield term.paint(f"request {term.clean(told)}:" if told else "by itself:", "dim")
        since = f"+{at_s - began[told]:.1f}s" if told else age(event.last if event.last.seconds else event.time)
        times = f" (x{event.count})" if event.count > 1 else ""
        severity = term.paint(f"{event.severity or NONE:<8}", WORD_COLOURS.get(event.severity, ""))
        what = f"{event.regarding.name}: " if event.regarding.kind in ("Instance", "Pod") else ""
        yield (
            f"  {since:<9}{severity}{term.clean(event.reason):<20} "
            f"{term.clean(what + event.message)}{times} ({term.clean(event.source) or NONE})"
        )
