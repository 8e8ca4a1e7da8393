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

    Hosts are counted by the reason for which they were refused; the nearest misses are named with their numbers, and then the
    smallest changes with which it would fit, each tried with the scheduler itself.
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
        _tell(answer, wanted[0].name, ordinal)
    return Exit.OK if answer.placed else Exit.UNSCHEDULABLE


def _tell(a: "WhyResponse", name: str, ordinal: int) -> None:
    instance = f"instance {name}-{ordinal}"
    if a.placed:
        term.out(f"{instance} is placed on {term.clean(a.host)}")
    else:
        term.out(
            f"{instance} fits on none of {a.hosts} hosts"
            if a.hosts != 1
            else f"{instance} does not fit on the one host"
        )
    if a.reasons:
        term.out("Refused:" if not a.placed else "Other hosts:")
        for reason in a.reasons:
            hosts = "1 host " if reason.hosts == 1 else f"{reason.hosts} hosts"
            term.out(f"  {hosts:<10} {term.clean(reason.message or reason.reason)}")
    if a.nearest:
        term.out("Nearest:")
        for miss in a.nearest:
            term.out(f"  {term.clean(miss.host)}: {term.clean('; '.join(miss.messages))}")
    if a.suggestions:
        term.out("It would fit if:")
        for suggestion in a.suggestions:
            where = f" (on {suggestion.host})" if suggestion.host else ""
            term.out(f"  {term.clean(suggestion.change + where)}")
            if suggestion.command:
                term.out(f"      {term.clean(suggestion.command)}")
