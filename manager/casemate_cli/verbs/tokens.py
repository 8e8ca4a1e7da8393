"""`casemate host token` and `casemate host revoke`: who may become a host, and who may be one no more."""

from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, options, term
from casemate_cli.columns import Table, age
from casemate_cli.failure import Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import join_pb2 as pb


def _stub(client: "Client") -> Any:
    from casemate_wire.v1.join_pb2_grpc import HostAccessStub

    return HostAccessStub(client.channel)


def create(client: "Client", host: str, **fields: Any) -> "pb.CreateHostTokenResponse":
    """A token for a host. Raises Failure."""
    from casemate_cli.client import request_key
    from casemate_wire.v1 import join_pb2 as pb

    request = pb.CreateHostTokenRequest(request_key=request_key(), host=host, **fields)
    answer: pb.CreateHostTokenResponse = client.call(
        _stub(client).CreateHostToken, request, f"making a token for host {host}"
    )
    return answer


@click.group()
def token() -> None:
    """Let machines become hosts: one token, one machine, one name, within an hour."""


@token.command("create")
@click.argument("host")
@click.option("--print-command", is_flag=True, help="Print the line to run on the machine instead of the token alone.")
@click.option("--for", "life", type=options.SPAN, default="1h", show_default=True, help="How long it can be used.")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label of the host, when it is new.")
@click.option("--taint", "taints", multiple=True, metavar="KEY[=VALUE]", help="Taint of the host, when it is new.")
@click.option("--max-threads", type=click.IntRange(min=1), help="Take no more processor threads of it than this.")
@click.option("--max-memory", metavar="SIZE", help="Take no more memory of it than this, such as 512Gi.")
@click.option("--max-gpus", type=click.IntRange(min=1), help="Take no more GPUs of it than this.")
@options.connection
@click.pass_context
def create_(
    ctx: click.Context,
    host: str,
    print_command: bool,
    life: float,
    labels: tuple[str, ...],
    taints: tuple[str, ...],
    max_threads: int | None,
    max_memory: str | None,
    max_gpus: int | None,
) -> None:
    """Make a token with which one machine becomes HOST.

    The token is shown once and kept nowhere. On the machine, as root, pipe it to `casemate-agent join`: there it is neither
    in the arguments of a process nor in a file.
    """
    from casemate_cli.client import Client
    from casemate_core.quantity import BadQuantity, parse_mib
    from casemate_wire.v1 import join_pb2 as pb

    split = [label.partition("=") for label in labels]
    if wrong := [key for key, equals, _ in split if not key or not equals]:
        raise Failure(f"a label is not KEY=VALUE: {wrong[0]!r}", remedy="write --label site=fra1")
    try:
        memory_mib = parse_mib(max_memory) if max_memory else 0
    except BadQuantity as bad:
        raise Failure(f"--max-memory {max_memory!r} {bad.problem}", remedy=bad.remedy) from None
    settings = options.settings(ctx)
    with Client(settings) as client:
        made = create(
            client,
            host,
            life_s=life,
            labels={key: value for key, _, value in split},
            taints=[pb.HostTokenTaint(key=k, value=v) for k, _, v in (t.partition("=") for t in taints)],
            max_threads=max_threads or 0,
            max_memory_mib=memory_mib,
            max_gpus=max_gpus or 0,
        )
    if not print_command:
        term.out(made.secret)
        return
    address = f"{settings.manager.rpartition(':')[0]}:{made.enrolment_port}"
    term.out(f"echo {made.secret} | casemate-agent join --manager {address}")
    term.say(f"run it as root on the machine that becomes host {host}, once, within {life / 60:g} minutes")


@token.command("list")
@options.connection
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the tokens; their secrets are kept nowhere."""
    from casemate_cli.client import Client
    from casemate_wire.v1 import join_pb2 as pb

    with Client(options.settings(ctx)) as client:
        tokens = client.call(_stub(client).ListHostTokens, pb.ListHostTokensRequest()).tokens
    if not tokens:
        term.say("there are no tokens; make one: casemate host token create HOST")
        return
    table = Table(("ID", "HOST", "STATE", "AGE"))
    table.write((t.id, t.host, t.state, age(t.created)) for t in tokens)


@token.command("revoke")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@options.connection
@click.pass_context
def revoke_token(ctx: click.Context, ids: tuple[str, ...]) -> None:
    """Take tokens back. One that was used already changes nothing: revoke the host."""
    from casemate_cli.client import Client
    from casemate_wire.v1 import join_pb2 as pb

    with Client(options.settings(ctx)) as client:
        for each in ids:
            done = client.call(
                _stub(client).RevokeHostToken, pb.RevokeHostTokenRequest(id=each), f"revoking token {each}"
            )
            term.out(f"token {term.clean(done.id)} for host {term.clean(done.host)}: {done.state}")


@click.command()
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...", shell_complete=completing.names_of("Host"))
@options.connection
@click.pass_context
def revoke(ctx: click.Context, hosts: tuple[str, ...]) -> None:
    """End the identity of hosts: their streams at once, their certificates for good. What runs there goes on.

    A host that was revoked comes back by a new token.
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import join_pb2 as pb

    with Client(options.settings(ctx)) as client:
        for name in hosts:
            client.call(_stub(client).RevokeHost, pb.RevokeHostRequest(host=name), f"revoking host {name}")
            term.out(f"host {name} revoked")
