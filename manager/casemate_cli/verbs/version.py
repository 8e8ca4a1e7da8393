"""`casemate version`."""

import json

import click

from casemate_cli import options, term
from casemate_cli.failure import Failure


def client_version() -> str:
    """Version of the installed package; `unknown` when it runs from a bare checkout."""
    from importlib import metadata

    try:
        return metadata.version("casemate")
    except metadata.PackageNotFoundError:
        return "unknown"


@click.command()
@click.option("--client", "client_only", is_flag=True, help="Only this program; asks nobody.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the answer.")
@options.connection
@click.pass_context
def version(ctx: click.Context, client_only: bool, output: str) -> None:
    """Show versions of this program and of the manager."""
    told: dict[str, object] = {"client": client_version()}
    unreached: Failure | None = None
    if not client_only:
        from casemate_cli.client import Client
        from casemate_wire.v1 import operators_pb2 as pb

        settings = options.settings(ctx)
        try:
            with Client(settings) as client:
                answer: pb.VersionResponse = client.call(client.stub.Version, pb.VersionRequest())
            told |= {
                "manager": answer.version,
                "address": settings.manager,
                "epoch": answer.epoch,
                "revision": answer.revision,
            }
        except Failure as failure:  # the client's own version is still worth telling
            unreached = failure
    if output == "json":
        term.out(json.dumps(told))
    else:
        for key, value in told.items():
            term.out(f"{key:<9} {term.clean(str(value))}")
    if unreached is not None:
        raise unreached
