"""`casemate why`: per host and constraint, why an instance is where it is, or is nowhere, and what would help."""

from typing import TYPE_CHECKING

import click

from casemate_cli import completing, kinds, options, output, term
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_wire.v1.operators_pb2 import WhyResponse


@click.command()
@click.argument("name", metavar="ENVIRONMENT", shell_complete=completing.names_of("Environment"))
@click.option("--host", default="", metavar="NAME", help="Only this host.")
@click.option("--ordinal", type=click.IntRange(min=0), default=0, help="Which of the instances.", show_default=True)
@click.option("-o", "--output", "form", type=click.Choice(["text", "json"]), default="text", help="Form.")
@options.connection
@click.pass_context
def why(ctx: click.Context, name: str, host: str, ordinal: int, form: str) -> int:
    """Say why an instance is where it is, or is nowhere; exit 2 if nowhere.

    Of one that is placed: what it holds there, and what keeps it from the other hosts. Of one that waits: hosts are counted by
    the reason for which they were refused; the nearest misses are named with their numbers, and then the smallest changes
    with which it would fit, each tried with the scheduler itself.
    """
    from casemate_cli.client import Client
    from casemate_wire import manifest
    from casemate_wire.v1 import operators_pb2 as pb

    wanted = kinds.targets((name,), default_kind="environment")
    if len(wanted) != 1 or wanted[0].kind.name != "Environment" or not wanted[0].name:
        raise Failure("why is asked of an environment", remedy="name one, for example hello")
    settings = options.settings(ctx)
    request = pb.WhyRequest(tenant=settings.tenant, environment=wanted[0].name, host=host, ordinal=ordinal)
    with Client(settings) as client:
        answer: pb.WhyResponse = client.call(client.stub.Why, request)
    if form == "json":
        term.out(output.to_json(manifest.message_to_plain(answer)))
    else:
        term.out("\n".join(story(answer, f"{wanted[0].name}-{ordinal}")))
    return Exit.OK if answer.placed else Exit.UNSCHEDULABLE


def story(a: "WhyResponse", instance: str) -> list[str]:
    """The answer in lines: where it is, or hosts by what keeps it from them, near misses, and changes that would help."""
    if a.placed:
        lines = [f"instance {instance} is placed on {term.clean(a.host)}"]
        lines += [f"  {term.clean(held)}" for held in a.holds]
    elif a.host:
        return [f"instance {instance} fits on {term.clean(a.host)} now"]
    elif a.hosts == 1:
        lines = [f"instance {instance} does not fit on the one host"]
    else:
        lines = [f"instance {instance} fits on none of {a.hosts} hosts"]
    if a.group:
        lines.append(f"  {term.clean(a.group)}")
    if a.reasons:
        lines.append("Refused:" if not a.placed else "Other hosts:")
    for reason in a.reasons:
        hosts = "1 host" if reason.hosts == 1 else f"{reason.hosts} hosts"
        lines.append(f"  {hosts:<10} {term.clean(reason.reason or reason.message)}")
        if reason.reason and reason.message.startswith("on "):
            lines.append(f"  {'':<10}   {term.clean(reason.message)}")
    if a.nearest:
        lines.append("Nearest:")
    for miss in a.nearest:
        lines.append(f"  {term.clean(miss.host)}")
        lines += [f"    {term.clean(message)}" for message in miss.messages]
    if a.suggestions:
        lines.append("Any one of these, tried with the scheduler, would place it:")
    for suggestion in a.suggestions:
        where = f" (then on {suggestion.host})" if suggestion.host else ""
        lines.append(f"  {term.clean(suggestion.change + where)}")
        if suggestion.command:
            lines.append(f"      {term.clean(suggestion.command)}")
    return lines
