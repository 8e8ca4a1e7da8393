"""Live words for a shell's completion: kinds from the table, names from the manager.

A completion must never hang or talk: one short attempt, and nothing where it fails.
"""

from typing import Any

import click
from click.shell_completion import CompletionItem

from casemate_cli import kinds
from casemate_cli.failure import Failure
from casemate_cli.settings import Settings

TIMEOUT_S = 1.0
MAX_NAMES = 500


def _names(ctx: click.Context, kind: str) -> list[str]:
    import dataclasses

    from casemate_cli import options
    from casemate_cli.client import Client
    from casemate_wire import schema
    from casemate_wire.v1 import operators_pb2 as pb

    try:
        settings: Settings = dataclasses.replace(
            options.settings(ctx.find_root()), request_timeout_s=TIMEOUT_S, retry_s=0.0
        )
        tenant = settings.tenant if kinds.BY_NAME[kind].of_tenant else ""
        with Client(settings) as client:
            page = client.call(client.stub.List, pb.ListRequest(kind=kind, tenant=tenant, page_size=MAX_NAMES))
    except Failure:
        return []
    return [schema.object_of(r).metadata.name for r in page.resources]  # type: ignore[attr-defined]


def kind_or_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes `KIND NAME…` and `KIND/NAME`."""
    given = ctx.params.get(param.name or "") or ()
    if "/" in incomplete:
        word = incomplete.partition("/")[0]
        try:
            kind = kinds.find(word)
        except Failure:
            return []
        found = [f"{word}/{name}" for name in _names(ctx, kind.name)]
    elif given and "/" not in given[0]:
        try:
            found = _names(ctx, kinds.find(given[0]).name)
        except Failure:
            return []
    else:
        found = [kind.plural for kind in kinds.KINDS if kind.served]
    return [CompletionItem(word) for word in found if word.startswith(incomplete)]


def names_of(*kinds_: str) -> Any:
    """A completion of names of these kinds; with Pod, of `INSTANCE.POD` too once a dot was typed."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        asked = [kind for kind in kinds_ if (kind == "Pod") == ("." in incomplete)] or list(kinds_[:1])
        found = dict.fromkeys(name for kind in asked for name in _names(ctx, kind))
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete
