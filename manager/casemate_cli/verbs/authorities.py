"""`casemate ca`: the authorities that sign certificates, one after the other."""

from typing import Any

import click

from casemate_cli import options, term
from casemate_cli.columns import Table, age
from casemate_cli.failure import Exit, Failure


@click.group()
def ca() -> None:
    """See, follow and retire the authorities that sign certificates.

    To exchange one: `casemate ca roll`, wait a day until every host has renewed, `casemate ca retire`. No host is dropped:
    the old authority vouches for the new one.
    """


def _ask(ctx: click.Context, method: str, request: Any) -> Any:
    from casemate_cli.client import Client
    from casemate_wire.v1.join_pb2_grpc import HostAccessStub

    with Client(options.settings(ctx)) as client:
        return client.call(getattr(HostAccessStub(client.channel), method), request)


@ca.command("list")
@click.option("--no-trunc", is_flag=True, help="Show whole pins, as casemate-agent trust takes them.")
@options.connection
@click.pass_context
def list_(ctx: click.Context, no_trunc: bool) -> None:
    """List the authorities, and how many hosts have a certificate of each that is still good."""
    from casemate_wire.v1 import join_pb2 as pb

    found = _ask(ctx, "ListAuthorities", pb.ListAuthoritiesRequest()).authorities
    table = Table(("PIN", "NAME", "STATE", "HOSTS", "GOOD", "AGE"))
    table.write(
        (a.pin if no_trunc else a.pin[:16], a.name, a.state, str(a.hosts), str(a.good), age(a.since)) for a in found
    )


@ca.command()
@options.connection
@click.pass_context
def roll(ctx: click.Context) -> None:
    """Begin a new authority. Certificates are signed by it from now on; those of the old one stay good."""
    from casemate_wire.v1 import join_pb2 as pb

    found = _ask(ctx, "ListAuthorities", pb.ListAuthoritiesRequest()).authorities
    signing = next(a.pin for a in found if a.state == "Signing")
    made = _ask(ctx, "RollAuthority", pb.RollAuthorityRequest(pin=signing))
    term.out(f"{term.clean(made.name)} signs now: {made.pin}")


@ca.command()
@click.argument("pin")
@click.option("--force", is_flag=True, help="Also while hosts have certificates of it that are good.")
@options.connection
@click.pass_context
def retire(ctx: click.Context, pin: str, force: bool) -> None:
    """Accept certificates of an authority no more. PIN may be shortened, as `casemate ca list` does."""
    from casemate_wire.v1 import join_pb2 as pb

    found = _ask(ctx, "ListAuthorities", pb.ListAuthoritiesRequest()).authorities
    meant = [a.pin for a in found if a.pin.startswith(pin.lower())] if len(pin) >= 8 else []
    if len(meant) != 1:
        raise Failure(
            f"no authority, or more than one, begins with {pin!r}",
            code=Exit.NOT_FOUND,
            remedy="give at least 8 digits; see casemate ca list",
        )
    done = _ask(ctx, "RetireAuthority", pb.RetireAuthorityRequest(pin=meant[0], force=force))
    term.out(f"{term.clean(done.name)} is retired")
