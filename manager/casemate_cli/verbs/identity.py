"""`casemate whoami`, `key` and `token`: who calls, and what programs call with."""

from typing import TYPE_CHECKING

import click

from casemate_cli import options, output, term
from casemate_cli.columns import NONE, Table, age
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import identity_pb2 as pb


@click.command()
@click.option("-o", "--output", "form", type=click.Choice(["text", "json"]), default="text", help="Form of the answer.")
@options.connection
@click.pass_context
def whoami(ctx: click.Context, form: str) -> None:
    """Say who you are to the manager, and what you may do.

    \b
    Examples:
      casemate whoami
      casemate whoami -o json
    """
    from casemate_cli.client import Client
    from casemate_wire import manifest
    from casemate_wire.v1 import identity_pb2, identity_pb2_grpc

    with Client(options.settings(ctx)) as client:
        answer: pb.WhoAmIResponse = client.call(
            identity_pb2_grpc.IdentityStub(client.channel).WhoAmI, identity_pb2.WhoAmIRequest()
        )
    if form == "json":
        term.out(output.to_json(manifest.message_to_plain(answer)))
        return
    term.out(f"user    {term.clean(answer.user)}")
    term.out(f"by      {answer.how}")
    if answer.groups:
        term.out(f"groups  {term.clean(', '.join(answer.groups))}")
    for i, held in enumerate(answer.roles):
        term.out(f"{'may' if i == 0 else '':<7} {held.role} in {term.clean(held.scope)}")
    if not answer.roles:
        term.out("may     nothing: no role is bound to this user")
    if answer.note:
        term.say(answer.note, "yellow")


@click.group()
def key() -> None:
    """Access keys of programs: make, list, rotate, disable, delete."""


def _print_secret(answer: "pb.KeySecret") -> None:
    """The secret alone on standard output, so that it can be piped where it belongs."""
    term.out(answer.secret)
    term.say(f"key {answer.key.id} of {answer.key.user}: this is shown once; keep it where the program finds it")


@key.command("create")
@click.argument("user", default="")
@click.option("--description", default="", help="What it is for.")
@click.option("--lifetime", type=options.SPAN, default=None, metavar="SPAN", help="How long it lives. [default: 2160h]")
@options.connection
@click.pass_context
def create(ctx: click.Context, user: str, description: str, lifetime: float | None) -> None:
    """Make an access key of USER (of yourself where none is named), and print it."""
    from casemate_cli.client import Client, request_key
    from casemate_wire.v1 import identity_pb2, identity_pb2_grpc

    request = identity_pb2.CreateKeyRequest(
        request_key=request_key(), user=user, description=description, lifetime_s=int(lifetime or 0)
    )
    with Client(options.settings(ctx)) as client:
        answer: pb.KeySecret = client.call(identity_pb2_grpc.IdentityStub(client.channel).CreateKey, request)
        _print_secret(answer)
        if answer.key.user and not _is_there(client, answer.key.user):
            term.say(
                f"there is no User {answer.key.user}: this key may do what roles bound to that name allow, and no more; "
                "apply a User where the name is right, or delete the key",
                "yellow",
            )


def _is_there(client: "Client", user: str) -> bool:
    """Whether there is a User of this name; who may not look is not told otherwise."""
    try:
        client.get("User", user, "")
    except Failure as failure:
        return failure.code is not Exit.NOT_FOUND
    return True


@key.command("list")
@click.argument("user", default="")
@options.connection
@click.pass_context
def list_keys(ctx: click.Context, user: str) -> None:
    """List access keys that you may look after."""
    from casemate_cli.client import Client
    from casemate_wire.v1 import identity_pb2, identity_pb2_grpc

    with Client(options.settings(ctx)) as client:
        answer: pb.ListKeysResponse = client.call(
            identity_pb2_grpc.IdentityStub(client.channel).ListKeys, identity_pb2.ListKeysRequest(user=user)
        )
    table = Table(("ID", "USER", "STATE", "AGE", "EXPIRES", "ROTATED", "DESCRIPTION"))
    table.write(
        (
            k.id,
            k.user,
            "disabled" if k.disabled else "enabled",
            age(k.created),
            k.expires.ToJsonString() if k.expires.seconds else NONE,
            age(k.rotated),
            k.description or NONE,
        )
        for k in answer.keys
    )
    if not answer.keys:
        term.say("there is none")


@key.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap", type=options.SPAN, default=3600.0, metavar="SPAN", help="The former is taken so long. [default: 1h]"
)
@options.connection
@click.pass_context
def rotate(ctx: click.Context, key_id: str, overlap: float) -> None:
    """Give the access key ID a new secret, and print it."""
    from casemate_cli.client import Client, request_key
    from casemate_wire.v1 import identity_pb2, identity_pb2_grpc

    request = identity_pb2.RotateKeyRequest(request_key=request_key(), id=key_id, overlap_s=int(overlap))
    with Client(options.settings(ctx)) as client:
        _print_secret(client.call(identity_pb2_grpc.IdentityStub(client.channel).RotateKey, request))


def _change(ctx: click.Context, key_id: str, word: str) -> None:
    from casemate_cli.client import Client, request_key
    from casemate_wire.v1 import identity_pb2, identity_pb2_grpc

    change = identity_pb2.ChangeKeyRequest.Change.Value(word.upper())
    request = identity_pb2.ChangeKeyRequest(request_key=request_key(), id=key_id, change=change)
    with Client(options.settings(ctx)) as client:
        client.call(identity_pb2_grpc.IdentityStub(client.channel).ChangeKey, request)
    term.say(f"key {key_id}: {word}d")


@key.command()
@click.argument("key_id", metavar="ID")
@options.connection
@click.pass_context
def disable(ctx: click.Context, key_id: str) -> None:
    """Take the access key ID no more."""
    _change(ctx, key_id, "disable")


@key.command()
@click.argument("key_id", metavar="ID")
@options.connection
@click.pass_context
def enable(ctx: click.Context, key_id: str) -> None:
    """Take the access key ID again."""
    _change(ctx, key_id, "enable")


@key.command("delete")
@click.argument("key_id", metavar="ID")
@options.connection
@click.pass_context
def delete_key(ctx: click.Context, key_id: str) -> None:
    """Forget the access key ID."""
    _change(ctx, key_id, "delete")


@click.command()
@click.argument("user", default="")
@click.option("--lifetime", type=options.SPAN, default=None, metavar="SPAN", help="At most 1h. [default: 15m]")
@options.connection
@click.pass_context
def token(ctx: click.Context, user: str, lifetime: float | None) -> None:
    """Print a token of the service account USER that ends by itself, for a CI job.

    Put it into the environment as CASEMATE_TOKEN; docs/access.md shows how.
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import identity_pb2, identity_pb2_grpc

    if lifetime is not None and lifetime < 1:
        raise Failure("a token lives for a second at least")
    request = identity_pb2.IssueTokenRequest(user=user, lifetime_s=int(lifetime or 0))
    with Client(options.settings(ctx)) as client:
        answer: pb.Token = client.call(identity_pb2_grpc.IdentityStub(client.channel).IssueToken, request)
    term.out(answer.token)
    term.say(f"good until {answer.expires.ToJsonString()}")
