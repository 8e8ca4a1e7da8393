"""`casemate apply` and `casemate diff`: what is written in manifests, made so, or compared with what is."""

import json
from typing import TYPE_CHECKING

import click

from casemate_cli import kinds, options, output, term
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import operators_pb2 as pb

#: Objects that a manager takes in one request (its batches are bounded, as those of its stores are).
MAX_AT_ONCE = 60

_SOURCE = click.option(
    "-f",
    "--filename",
    "filenames",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(),
    help="A file, a folder, or - for standard input. May be given several times.",
)
_RECURSIVE = click.option("-R", "--recursive", is_flag=True, help="Look in the folders below a folder too.")


@click.command()
@_SOURCE
@_RECURSIVE
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--prune", is_flag=True, help="Delete objects that -l selects and that are not in the files.")
@click.option("-l", "--selector", default="", metavar="LABELS", help="For --prune: a=b,c!=d,e in (f,g),h,!i.")
@click.option("--wait", "waits", is_flag=True, help="Wait until the environments that should run are Ready.")
@click.option("--timeout", type=options.SPAN, default="5m", show_default=True, help="For --wait: how long.")
@click.option(
    "-o", "--output", "form", type=click.Choice(["text", "json", "yaml", "name"]), default="text", help="Form."
)
@options.connection
@click.pass_context
def apply(
    ctx: click.Context,
    filenames: tuple[str, ...],
    recursive: bool,
    dry_run: bool,
    prune: bool,
    selector: str,
    waits: bool,
    timeout: float,
    form: str,
) -> None:
    """Make or change objects from files, a folder, or standard input.

    Up to 60 objects are made and changed all together, or none of them. The same manifests applied twice change nothing. A
    call that was cut off can be repeated.

    \b
    Examples:
      casemate apply -f examples/hello.yaml
      casemate apply -f examples/hello.yaml --wait --timeout 10m
      casemate get env hello -o yaml | sed 's/count: 2/count: 4/' | casemate apply -f -
      casemate apply -f fleet/ --prune -l team=ran --dry-run
    """
    from casemate_cli import manifests
    from casemate_cli.client import Client, request_key

    if prune and not selector:
        raise Failure(
            "--prune needs a selector", remedy="say with -l which labels the files own, for example -l app=shop"
        )
    if selector and not prune:
        raise Failure("-l has no meaning without --prune", remedy="add --prune, or leave -l away")
    settings = options.settings(ctx)
    resources = manifests.load(filenames, recursive=recursive, tenant=settings.tenant)
    with Client(settings) as client:
        _tell_results(_batches(client, resources, request_key(), dry_run), form, dry_run)
        if prune:
            _prune(client, resources, selector, settings.tenant, dry_run)
        if waits and not dry_run:
            _wait(client, resources, settings.tenant, timeout)


def _wait(client: "Client", resources: "list[pb.Resource]", tenant: str, timeout_s: float) -> None:
    """Wait for the environments that should run, with their stages shown. Raises Failure (TIMEOUT)."""
    from casemate_cli.verbs import wait

    kind = kinds.BY_NAME["Environment"]
    found = [r.environment for r in resources if r.WhichOneof("object") == "environment"]
    targets = [kinds.Target(kind, e.metadata.name) for e in found if e.spec.run != "stopped"]
    if targets:
        wait.shown_until(client, targets, tenant, wait.parse_goal("ready"), timeout_s)
        for target in targets:
            term.say(f"{target} is Ready", "green")


def _batches(client: "Client", resources: "list[pb.Resource]", key: str, dry_run: bool) -> "list[pb.ApplyResult]":
    """Apply in as many requests as are needed; one that fails says what was done before it."""
    parts = [resources[first : first + MAX_AT_ONCE] for first in range(0, len(resources), MAX_AT_ONCE)]
    if len(parts) > 1:
        term.say(
            f"{len(resources)} objects go in {len(parts)} requests, each of which is done as a whole or not at all"
        )
    results: list[pb.ApplyResult] = []
    for i, part in enumerate(parts):
        try:
            results += client.apply(part, key=f"{key}.{i}", dry_run=dry_run).results
        except Failure:
            if results and not dry_run:
                term.say(
                    f"{len(results)} objects before were applied; the same command again goes on from there", "yellow"
                )
            raise
    return results


def _tell_results(results: "list[pb.ApplyResult]", form: str, dry_run: bool) -> None:
    for result in results:
        for warning in result.warnings:
            term.say(f"warning: {_ref(result)}: {warning}", "yellow")
    if form in ("json", "yaml", "name"):
        shown = [r.resource for r in results if r.resource.WhichOneof("object")]
        output.write(shown, form, listed=len(shown) != 1)
        return
    for result in results:
        would = " (dry run)" if dry_run else ""
        term.out(f"{term.clean(_ref(result))} {term.clean(result.action)}{would}")


def _ref(result: "pb.ApplyResult") -> str:
    return f"{kinds.BY_NAME[result.ref.kind].word}/{result.ref.name}"


def _prune(client: "Client", applied: "list[pb.Resource]", selector: str, tenant: str, dry_run: bool) -> None:
    """Delete what the selector finds, and what is not among the applied; in the tenants that were spoken of."""
    from casemate_cli.client import request_key
    from casemate_wire import schema
    from casemate_wire.v1 import operators_pb2 as pb

    kept = set()
    tenants = {tenant}
    for resource in applied:
        metadata = schema.object_of(resource).metadata  # type: ignore[attr-defined]
        kept.add((schema.kind_of(resource), metadata.tenant, metadata.name))
        if metadata.tenant:
            tenants.add(metadata.tenant)
    for kind_name in kinds.PRUNABLE:
        kind = kinds.BY_NAME[kind_name]
        for where in sorted(tenants) if kind.of_tenant else [""]:
            for resource in client.listed(kind_name, tenant=where, selector=selector):
                metadata = schema.object_of(resource).metadata  # type: ignore[attr-defined]
                if (kind_name, metadata.tenant, metadata.name) in kept or metadata.deleting.seconds:
                    continue
                if not dry_run:
                    client.call(
                        client.stub.Delete,
                        pb.DeleteRequest(
                            request_key=request_key(),
                            kind=kind_name,
                            tenant=metadata.tenant,
                            name=metadata.name,
                            uid=metadata.uid,
                        ),
                        f"pruning {kind.word}/{metadata.name}",
                    )
                term.out(f"{kind.word}/{term.clean(metadata.name)} pruned{' (dry run)' if dry_run else ''}")


@click.command()
@_SOURCE
@_RECURSIVE
@click.option("-o", "--output", "form", type=click.Choice(["text", "json"]), default="text", help="Form.")
@options.connection
@click.pass_context
def diff(ctx: click.Context, filenames: tuple[str, ...], recursive: bool, form: str) -> int:
    """Show what apply would change; exit 3 if anything.

    Each field that differs is shown with what its change would do: take effect live, at the next restart, by replacing the
    instance, or be refused (immutable).
    """
    from casemate_cli import manifests
    from casemate_cli.client import Client, request_key

    settings = options.settings(ctx)
    resources = manifests.load(filenames, recursive=recursive, tenant=settings.tenant)
    with Client(settings) as client:
        results = _batches(client, resources, request_key(), dry_run=True)
    differing = [r for r in results if r.action != "unchanged"]
    if form == "json":
        term.out(output.to_json([_change_plain(r) for r in differing]))
    for result in differing if form == "text" else ():
        sign, colour = ("+", "green") if result.action == "created" else ("~", "yellow")
        term.out(term.paint(f"{sign} {term.clean(_ref(result))}", colour))
        for change in result.changes:
            effect = f"  ({change.effect})" if change.effect else ""
            before, after = _value(change.before), _value(change.after)
            term.out(f"    {term.clean(change.path)}: {before} → {after}{effect}")
    return Exit.DIFFERENT if differing else Exit.OK


def _change_plain(result: "pb.ApplyResult") -> dict[str, object]:
    return {
        "object": _ref(result),
        "action": result.action,
        "changes": [
            {"path": c.path, "before": _json(c.before), "after": _json(c.after), "effect": c.effect}
            for c in result.changes
        ],
    }


def _json(text: str) -> object:
    return json.loads(text) if text else None


def _value(text: str) -> str:
    return term.clean(text) if text else "(none)"
