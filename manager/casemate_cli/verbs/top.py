"""`casemate top`: what hosts have, what is used of it, and what is free and stranded, by cause."""

from typing import TYPE_CHECKING

import click

from casemate_cli import completing, options, output, term

if TYPE_CHECKING:
    from casemate_wire.v1 import top_pb2 as pb

_FORM = click.option(
    "-o", "--output", "form", type=click.Choice(["text", "wide", "json", "yaml"]), default="text", help="Form."
)
#: Hosts that are told with `-o wide`.
WIDE_HOSTS = 100


@click.group()
def top() -> None:
    """Show capacity: what is used, free, and stranded, and why.

    Stranded is what is free and of no use to anybody who wants his resources beside each other: a thread whose sibling is
    held, memory or a GPU in a cell without a free CPU, a GPU around which no NVLink partition is free.
    """


@top.command("fleet")
@click.option("-l", "--selector", default="", metavar="LABELS", help="Only hosts with these labels.")
@click.option("--by", "group_by", default="", metavar="LABEL", help="Sums for each value of this label, too.")
@click.option(
    "--hosts", "count", type=click.IntRange(1, 1000), metavar="N", help="Hosts to name.  [default: 10, wide: 100]"
)
@_FORM
@options.connection
@click.pass_context
def fleet(ctx: click.Context, selector: str, group_by: str, count: int | None, form: str) -> None:
    """Show the sums of all hosts, what is stranded by cause, and the hosts of which most is.

    \b
    Examples:
      casemate top fleet
      casemate top fleet --by rack -l site=fra1
      casemate top fleet -o wide
    """
    from casemate_cli import picture
    from casemate_cli.columns import Table

    wide = form == "wide"
    answer = _ask(ctx, selector=selector, group_by=group_by, hosts=count or (WIDE_HOSTS if wide else 0))
    if _machine_form(form, answer):
        return
    found = answer.fleet
    style = picture.Style.of_output()
    for group in found.groups:
        term.out("\n".join(picture.group_lines(group, found.group_by, style, wide=wide)) + "\n")
    names = list(dict.fromkeys(n.name for h in found.hosts for n in h.amounts if wide or n.name in _NARROW))
    if found.hosts:
        table = Table(["HOST", "STATE", "INSTANCES", *(f"FREE {picture.title(n).upper()}" for n in names), "STRANDED"])
        table.write(picture.host_row(host, names) for host in found.hosts)


_NARROW = ("threads", "memory_mib", "gpus")


@top.command("host")
@click.argument("name", metavar="NAME", shell_complete=completing.names_of("Host"))
@_FORM
@options.connection
@click.pass_context
def host(ctx: click.Context, name: str, form: str) -> None:
    """Draw one host: its cells, caches and cores, one character a thread, and who holds what.

    `-o wide` adds the numbers of the threads and the free NVLink partitions.
    """
    from casemate_cli import picture

    answer = _ask(ctx, host=name.removeprefix("host/"))
    if not _machine_form(form, answer):
        term.out("\n".join(picture.host(answer.host, picture.Style.of_output(), wide=form == "wide")))


def _ask(
    ctx: click.Context, *, host: str = "", selector: str = "", group_by: str = "", hosts: int = 0
) -> "pb.TopResponse":
    from casemate_cli.client import Client
    from casemate_wire.v1 import top_pb2

    request = top_pb2.TopRequest(host=host, selector=selector, group_by=group_by, hosts=hosts)
    with Client(options.settings(ctx)) as client:
        answer: pb.TopResponse = client.call(client.stub.Top, request)
        return answer


def _machine_form(form: str, answer: "pb.TopResponse") -> bool:
    """Write JSON or YAML where that is asked for."""
    if form not in ("json", "yaml"):
        return False
    from casemate_wire import manifest

    message = answer.host if answer.WhichOneof("answer") == "host" else answer.fleet
    plain = manifest.message_to_plain(message)
    term.out(output.to_json(plain) if form == "json" else output.to_yaml(plain), end="\n" if form == "json" else "")
    return True
