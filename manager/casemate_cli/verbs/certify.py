"""`casemate certify`: measure the latency in guests, and show the certificates that there are.

The measurement is an operation (``casemate_cli.verbs.operate``): it is done by the instance's host, which keeps the
certificate with the instance. A certificate is void when what it was measured under has changed, and says so.
"""

from typing import Any

import click

from casemate_cli import completing, kinds, options, term
from casemate_cli.columns import NONE, Table, age
from casemate_cli.failure import Failure
from casemate_cli.verbs.operate import operate

HEADINGS = ["INSTANCE", "MIN", "AVG", "P99", "MAX", "SAMPLES", "MEASURED", "PROFILE", "VALID"]


@click.command()
@options.connection
@click.option("--duration", type=options.SPAN, default="30s", show_default=True, help="How long is measured.")
@click.option("--timeout", type=options.SPAN, help="It is given up after so long.  [default: a minute longer]")
@click.option("--wait/--no-wait", default=True, help="Wait for its end.  [default: --wait]")
@click.option("--show", is_flag=True, help="Measure nothing; show the certificates that there are.")
@click.argument(
    "arguments", nargs=-1, metavar="[ENVIRONMENT|inst/INSTANCE...]", shell_complete=completing.names_of("Environment")
)
@click.pass_context
def certify(
    ctx: click.Context, arguments: tuple[str, ...], duration: float, timeout: float | None, wait: bool, show: bool
) -> None:
    """Measure the latency in guests, as a certificate of it.

    cyclictest is run in the guest, on each of its CPUs, and the real-time profile of instance and host is read back beside it.
    The certificate is kept with the instance (describe inst/NAME shows it whole), until its placement, the host's kernel or the
    profile changes: then it is void. What is measured in an emulated guest says nothing, and is marked so.

    \b
    Examples:
      casemate certify hello --duration 5s
      casemate certify --show
    """
    if not show:
        if not arguments:
            raise Failure("nothing is named", remedy="name an environment or an instance, or give --show")
        operate(ctx, "certify", arguments, wait, timeout or duration + 60, duration_s=duration)
        if not wait:
            return
    _show(ctx, arguments)


def _show(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    from casemate_cli.client import Client
    from casemate_wire import schema

    wanted = kinds.targets(arguments, default_kind="environment") if arguments else []
    settings = options.settings(ctx)
    with Client(settings) as client:
        if wanted:
            found = []
            for target in wanted:
                if target.kind.name == "Instance":
                    found.append(client.get("Instance", target.name, settings.tenant))
                else:
                    found += client.listed("Instance", tenant=settings.tenant, owner=target.name)
        else:
            found = client.listed("Instance", tenant=settings.tenant)
    instances: list[Any] = [schema.object_of(resource) for resource in found]
    certified = [i for i in instances if i.status.HasField("certificate")]
    if not certified:
        term.out("no instance has a certificate: see casemate certify --help")
        return
    table = Table(HEADINGS)
    table.write([row(instance) for instance in certified])


def row(instance: Any) -> list[str]:
    """The certificate of an instance as a row of the table."""
    c = instance.status.certificate
    broken = sum(line.state == "broken" for line in c.profile)
    profile = f"{broken} of {len(c.profile)} broken" if broken else f"{len(c.profile)} lines" if c.profile else NONE
    valid = f"no: MEANINGLESS: {c.meaningless}" if c.meaningless else f"no: {c.void}" if c.void else "yes"
    figures = [f"{us} µs" for us in (c.min_us, c.avg_us, c.p99_us, c.max_us)]
    return [instance.metadata.name, *figures, str(c.samples), age(c.measured), profile, valid]
