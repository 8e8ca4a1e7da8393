"""`casemate get`: objects as tables and in the forms of `-o`, once or as they change."""

from typing import TYPE_CHECKING

import click

from casemate_cli import completing, kinds, options, output, parts, term
from casemate_cli.failure import Exit, Failure
from casemate_cli.kinds import Kind, Target

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_cli.columns import Column, Table
    from casemate_wire.v1 import operators_pb2 as pb


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="KIND [NAME]...", shell_complete=completing.kind_or_name)
@click.option(
    "-o", "--output", "form", type=output.FORM, default="table", help="table, wide, json, yaml, name, jsonpath=…"
)
@click.option(
    "-l", "--selector", default="", metavar="LABELS", help="Only objects with these labels: a=b,c!=d,e in (f,g),h,!i."
)
@click.option("--of", "owner", default="", metavar="NAME", help="Only objects of this environment or host.")
@click.option("-w", "--watch", is_flag=True, help="Go on showing changes, until interrupted.")
@click.option("-A", "--all-tenants", is_flag=True, help="Objects of all tenants.")
@click.option("--no-headers", is_flag=True, help="A table without its headings.")
@options.connection
@click.pass_context
def get(
    ctx: click.Context,
    arguments: tuple[str, ...],
    form: str,
    selector: str,
    owner: str,
    watch: bool,
    all_tenants: bool,
    no_headers: bool,
) -> int:
    """Show objects as a table, JSON, YAML, names, or by a path.

    KIND is a kind in singular, plural or short (env, inst, po, img, net), or `all`; or `vfs` or `devices`, which are parts
    of hosts.

    \b
    Examples:
      casemate get env
      casemate get pods --of hello -w
      casemate get env/hello inst/hello-0 -o yaml
      casemate get vfs --of h1 -o wide
      casemate get hosts -l rack=r1 -o jsonpath='{.items[*].metadata.name}'
    """
    from casemate_cli.client import Client

    settings = options.settings(ctx)
    tenant = "" if all_tenants else settings.tenant
    if (what := parts.WORDS.get(arguments[0].lower())) is not None:
        if len(arguments) > 1 or selector or watch:
            raise Failure(f"{what} have no names, labels or changes", remedy=f"write: casemate get {what} --of HOST")
        with Client(settings) as client:
            return parts.show(client, what, owner, form, with_headings=not no_headers)
    if [a.lower() for a in arguments] == ["all"]:
        wanted = [Target(kinds.BY_NAME[kind]) for kind in kinds.ALL]
    else:
        wanted = kinds.targets(arguments)
    named = [t for t in wanted if t.name]
    if named and (selector or owner or all_tenants):
        raise Failure("names and a selection exclude one another", remedy="leave away the names, or -l, --of and -A")
    view = View(form, with_tenant=all_tenants, with_headings=not no_headers, prefixed=len({t.kind for t in wanted}) > 1)
    with Client(settings) as client:
        if watch:
            if len(wanted) > 1:
                raise Failure("only one thing can be watched", remedy="name one kind, or one object")
            return _watch(client, wanted[0], tenant, selector, view)
        if form in ("table", "wide"):
            return _tables(client, wanted, tenant, selector, owner, view)
        if form == "name" and not named:
            return _names(client, wanted, tenant, selector, owner)
        return _whole(client, wanted, tenant, selector, owner, form)


#: Whoever watches without an end is there when the manager is back, as with `logs -f`.
PATIENCE_S = 600.0


class View:
    """How rows are shown: columns and table of each kind, made when its first object comes."""

    def __init__(self, form: str, *, with_tenant: bool, with_headings: bool, prefixed: bool) -> None:
        self.form = form
        self._with_tenant = with_tenant
        self._with_headings = with_headings
        self._prefixed = prefixed
        self._tables: dict[str, tuple[tuple[Column, ...], Table]] = {}

    def rows(self, kind: Kind, resources: "list[pb.Resource]", extra: tuple[str, str] | None = None) -> None:
        """Write one row for each object; `extra` is a leading column as (heading, value)."""
        from casemate_cli.columns import Table, columns
        from casemate_wire import schema

        if not resources:
            return
        if kind.name not in self._tables:
            if self._tables:
                term.out("")
            chosen = columns(
                kind.name,
                wide=self.form == "wide",
                with_tenant=self._with_tenant and kind.of_tenant,
                prefix=f"{kind.word}/" if self._prefixed else "",
            )
            headings = [c.heading for c in chosen]
            if extra is not None:
                headings.insert(0, extra[0].ljust(len("CHANGED")))  # the first row may be of a shorter word
            self._tables[kind.name] = chosen, Table(headings, with_headings=self._with_headings)
        chosen, table = self._tables[kind.name]
        lead = [extra[1]] if extra is not None else []
        objects = [schema.object_of(r) for r in resources]
        table.write([lead + [c.value(o) for c in chosen] for o in objects])


def _tables(client: "Client", wanted: list[Target], tenant: str, selector: str, owner: str, view: View) -> int:
    """Tables, page by page; names that are missing are told at the end."""
    missing: list[Failure] = []
    shown = 0
    for target in wanted:
        kind = target.kind
        if target.name:
            try:
                view.rows(kind, [client.get(kind.name, target.name, tenant if kind.of_tenant else "")])
            except Failure as failure:
                if failure.code is not Exit.NOT_FOUND:
                    raise
                missing.append(failure)
            continue
        for page in client.pages(kind.name, tenant=tenant if kind.of_tenant else "", selector=selector, owner=owner):
            view.rows(kind, list(page.resources))
            term.flush()
            shown += len(page.resources)
    if not shown and not any(t.name for t in wanted):
        what = "objects" if len(wanted) > 1 else wanted[0].kind.plural
        where = f" in tenant {tenant}" if tenant and any(t.kind.of_tenant for t in wanted) else ""
        term.say(f"there are no {what}{where}")
    if missing:
        raise _merged(missing)
    return Exit.OK


def _names(client: "Client", wanted: list[Target], tenant: str, selector: str, owner: str) -> int:
    """Names of whole kinds, page by page."""
    for target in wanted:
        where = tenant if target.kind.of_tenant else ""
        for page in client.pages(target.kind.name, tenant=where, selector=selector, owner=owner):
            output.write(list(page.resources), "name", listed=True)
            term.flush()
    return Exit.OK


def _whole(client: "Client", wanted: list[Target], tenant: str, selector: str, owner: str, form: str) -> int:
    """All objects first, then one text: a JSON list has one end."""
    found: list[pb.Resource] = []
    missing: list[Failure] = []
    for target in wanted:
        kind = target.kind
        where = tenant if kind.of_tenant else ""
        if not target.name:
            found += client.listed(kind.name, tenant=where, selector=selector, owner=owner)
            continue
        try:
            found.append(client.get(kind.name, target.name, where))
        except Failure as failure:
            if failure.code is not Exit.NOT_FOUND:
                raise
            missing.append(failure)
    listed = len(wanted) != 1 or not wanted[0].name
    if found or listed:
        output.write(found, form, listed=listed)
    if missing:
        raise _merged(missing)
    return Exit.OK


def _merged(missing: list[Failure]) -> Failure:
    if len(missing) == 1:
        return missing[0]
    return Failure("; ".join(f.what for f in missing), code=Exit.NOT_FOUND)


def _watch(client: "Client", target: Target, tenant: str, selector: str, view: View) -> int:
    """A row for each object, then one for each change, until interrupted."""

    from casemate_wire.v1 import operators_pb2 as pb

    kind = target.kind
    where = tenant if kind.of_tenant else ""
    words = {pb.WatchEvent.ADDED: "ADDED", pb.WatchEvent.CHANGED: "CHANGED", pb.WatchEvent.DELETED: "DELETED"}
    try:
        for event in client.watch(
            kind.name,
            tenant=where,
            selector=selector,
            name=target.name,
            patience_s=PATIENCE_S,
            away=lambda why: term.say(f"(the watch is interrupted: {why}; waiting for it to go on)", "yellow"),
        ):
            if event.type == pb.WatchEvent.RESYNC:
                term.say("resynced: some changes may not have been shown")
            if event.type not in words:
                continue
            if view.form in ("table", "wide"):
                view.rows(kind, [event.resource], ("EVENT", words[event.type]))
            elif view.form == "json":
                term.out(
                    output.to_json({"type": words[event.type], "object": output.plain(event.resource)}, indent=None)
                )
            elif view.form == "yaml":
                term.out("---\n" + output.to_yaml(output.plain(event.resource)), end="")
            else:
                output.write([event.resource], view.form, listed=False)
            term.flush()
    except KeyboardInterrupt:  # the way to end it, not a failure
        return Exit.OK
    return Exit.OK
