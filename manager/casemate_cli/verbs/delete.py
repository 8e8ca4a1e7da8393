"""`casemate delete`."""

from typing import TYPE_CHECKING

import click

from casemate_cli import completing, kinds, options, term
from casemate_cli.failure import Exit, Failure
from casemate_cli.kinds import Target

if TYPE_CHECKING:
    from casemate_cli.client import Client


@click.command()
@click.argument("arguments", nargs=-1, metavar="[KIND NAME...]", shell_complete=completing.kind_or_name)
@click.option(
    "-f", "--filename", "filenames", multiple=True, metavar="FILE", type=click.Path(), help="What these manifests name."
)
@click.option("-R", "--recursive", is_flag=True, help="Look in the folders below a folder too.")
@click.option("-l", "--selector", default="", metavar="LABELS", help="All objects of KIND with these labels.")
@click.option("--all", "everything", is_flag=True, help="All objects of KIND.")
@click.option("--ignore-not-found", is_flag=True, help="What is not there needs no deletion.")
@click.option("--wait/--no-wait", default=True, help="Wait until the hosts have let go.  [default: --wait]")
@click.option("--timeout", type=options.SPAN, default="5m", show_default=True, help="For --wait: how long.")
@options.connection
@click.pass_context
def delete(
    ctx: click.Context,
    arguments: tuple[str, ...],
    filenames: tuple[str, ...],
    recursive: bool,
    selector: str,
    everything: bool,
    ignore_not_found: bool,
    wait: bool,
    timeout: float,
) -> None:
    """End objects.

    \b
    Examples:
      casemate delete env hello
      casemate delete -f examples/hello.yaml
      casemate delete env -l team=ran --no-wait
    """
    from casemate_cli.client import Client
    from casemate_cli.verbs.wait import Gone, until

    if bool(arguments) == bool(filenames):
        raise Failure("say what to delete", remedy="either KIND NAME… or -f FILE")
    settings = options.settings(ctx)
    with Client(settings) as client:
        wanted = (
            _from_files(filenames, recursive, settings.tenant)
            if filenames
            else _from_words(client, arguments, settings.tenant, selector, everything)
        )
        pending: list[tuple[Target, str]] = []

        def settle() -> None:
            """Wait until all that was asked to end is gone."""
            if not pending:
                return
            with term.Progress(f"waiting for hosts to let go of {pending[0][0]}") as progress:
                for target, tenant in pending:
                    progress.update(f"waiting for hosts to let go of {target}")
                    until(client, [target], tenant, Gone(), timeout)
            for target, _ in pending:
                term.out(f"{term.clean(str(target))} deleted")
            pending.clear()

        for target, tenant in wanted:
            try:
                try:
                    more = _delete(client, target, tenant)
                except Failure as failure:
                    if failure.code is not Exit.CONFLICT or not pending or not wait:
                        raise
                    # What uses it, a volume say, may be among those that are on their way out.
                    settle()
                    more = _delete(client, target, tenant)
                if more:
                    pending.append((target, tenant))
            except Failure as failure:
                if failure.code is not Exit.NOT_FOUND or not ignore_not_found:
                    raise
        if wait:
            settle()


def _delete(client: "Client", target: Target, tenant: str) -> bool:
    """Ask for the end of one object; whether hosts still have to let go of something."""
    from casemate_cli.client import request_key
    from casemate_wire.v1 import operators_pb2 as pb

    request = pb.DeleteRequest(request_key=request_key(), kind=target.kind.name, tenant=tenant, name=target.name)
    answer: pb.DeleteResponse = client.call(client.stub.Delete, request)
    term.out(f"{term.clean(str(target))} {'is being deleted' if answer.pending else 'deleted'}")
    return answer.pending


def _from_words(
    client: "Client", arguments: tuple[str, ...], tenant: str, selector: str, everything: bool
) -> list[tuple[Target, str]]:
    from casemate_wire import schema

    found: list[tuple[Target, str]] = []
    for target in kinds.targets(arguments):
        where = tenant if target.kind.of_tenant else ""
        if target.name:
            found.append((target, where))
            continue
        if not selector and not everything:
            raise Failure(f"which {target.kind.plural}?", remedy="name them, or give -l LABELS or --all")
        for resource in client.listed(target.kind.name, tenant=where, selector=selector):
            found.append((Target(target.kind, schema.object_of(resource).metadata.name), where))  # type: ignore[attr-defined]  # noqa: PERF401
        if not found:
            term.say(f"there are no such {target.kind.plural}")
    return found


def _from_files(filenames: tuple[str, ...], recursive: bool, tenant: str) -> list[tuple[Target, str]]:
    """What the manifests name, users before what they use."""
    from casemate_cli import manifests
    from casemate_wire import schema

    found = []
    for resource in reversed(manifests.load(filenames, recursive=recursive, tenant=tenant)):
        metadata = schema.object_of(resource).metadata  # type: ignore[attr-defined]
        found.append((Target(kinds.BY_NAME[schema.kind_of(resource)], metadata.name), metadata.tenant))
    return found
