"""`casemate fsck host`: what is left of somebody on a host, and its repair."""

from typing import TYPE_CHECKING

import click

from casemate_cli import completing, options, output, term
from casemate_cli.failure import Exit

if TYPE_CHECKING:
    from casemate_wire.v1 import hostcare_pb2 as pb

#: Kinds of findings that are as they should be.
_FINE = ("held", "repaired")
_COLOURS = {"leak": "yellow", "lost": "yellow", "problem": "yellow", "unrepaired": "red", "repaired": "green"}


@click.group()
def fsck() -> None:
    """Show what is left of somebody on a host, and repair it."""


@fsck.command("host")
@click.argument("name", metavar="NAME", shell_complete=completing.names_of("Host"))
@click.option("--repair", is_flag=True, help="Clean what nobody has.")
@click.option(
    "-o", "--output", "form", type=click.Choice(["text", "json", "yaml"]), default="text", help="Form of the output."
)
@options.connection
@click.pass_context
def host(ctx: click.Context, name: str, repair: bool, form: str) -> None:
    """Read every virtual function and device of a host from its kernel, and show whose it is.

    What nobody has and is not clean is a leak: the MAC address, VLAN or binding of somebody who is gone. `--repair` cleans
    it. What somebody has, or a process holds open, is left as it is. The exit code is 3 while anything is left of anybody.

    \b
    Examples:
      casemate fsck host h1
      casemate fsck host h1 --repair
      casemate fsck host h1 -o json
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import hostcare_pb2, hostcare_pb2_grpc

    name = name.removeprefix("host/")
    with Client(options.settings(ctx)) as client:
        # The manager gives up a little before we do, so that it is the one who says why.
        wait_s = max(1.0, client.settings.request_timeout_s - 2)
        request = hostcare_pb2.FsckRequest(host=name, repair=repair, timeout_s=wait_s)
        stub = hostcare_pb2_grpc.HostCareStub(client.channel)
        answer: pb.FsckResponse = client.call(stub.Fsck, request, f"looking at host/{name}")
    if form != "text":
        from casemate_wire import manifest

        value = manifest.message_to_plain(answer)
        json = form == "json"
        term.out(output.to_json(value) if json else output.to_yaml(value), end="\n" if json else "")
    else:
        _text(answer)
    if any(finding.kind not in _FINE for finding in answer.findings) or answer.left_off:
        ctx.exit(Exit.DIFFERENT)


def _text(answer: "pb.FsckResponse") -> None:
    for finding in answer.findings:
        owner = finding.owner or finding.owner_uid
        words = [finding.function, f"by {owner}" if owner else "", finding.detail]
        line = term.clean(", ".join(word for word in words if word))
        term.out(f"{term.paint(f'{finding.kind:10}', _COLOURS.get(finding.kind, ''))} {line}")
    if answer.left_off:
        term.out(f"{answer.left_off} more findings did not fit")
    term.out(f"{answer.virtual_functions} virtual functions, {answer.devices} devices, {answer.free} free")
