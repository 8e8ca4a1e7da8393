"""`casemate wait`: until objects are as wanted, by watching, never by polling."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, jsonpath, kinds, options, term
from casemate_cli.failure import Detail, Exit, Failure
from casemate_cli.kinds import Target

if TYPE_CHECKING:
    from casemate_cli.client import Client


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition of the object has this status."""

    type: str
    status: str = "True"

    def met(self, message: Any) -> bool:
        """Whether it is so now."""
        return any(
            c.type.lower() == self.type.lower() and c.status.lower() == self.status.lower()
            for c in message.status.conditions
        )

    def __str__(self) -> str:
        return f"condition {self.type}={self.status}"


@dataclass(frozen=True, slots=True)
class Phase:
    """The object's phase is one of these words."""

    words: tuple[str, ...]

    def met(self, message: Any) -> bool:
        """Whether it is so now, for the present generation of the spec."""
        seen = getattr(message.status, "observed_generation", 0)
        return message.status.phase in self.words and seen in (0, message.metadata.generation)

    def __str__(self) -> str:
        return f"phase {' or '.join(self.words)}"


@dataclass(frozen=True, slots=True)
class Path:
    """What a JSONPath leads to has this text; any text where it is None."""

    template: jsonpath.Template
    wanted: str | None
    text: str

    def met(self, message: Any) -> bool:
        """Whether it is so now."""
        from casemate_wire import manifest

        found = self.template.render(manifest.message_to_plain(message))
        return bool(found) if self.wanted is None else found == self.wanted

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Gone:
    """The object is no more."""

    def met(self, message: Any) -> bool:
        """An object that is there is not gone."""
        return False

    def __str__(self) -> str:
        return "deletion"


Goal = Condition | Phase | Path | Gone


def parse_goal(text: str) -> Goal:
    """`delete`, `ready`, `condition=Ready[=False]`, `phase=Running`, `jsonpath={.path}[=value]`. Raises Failure."""
    word, _, rest = text.partition("=")
    word = word.lower()
    if word in ("delete", "deleted") and not rest:
        return Gone()
    if word == "condition" and rest:
        type_, _, status = rest.partition("=")
        return Condition(type_, status or "True")
    if word == "phase" and rest:
        return Phase(tuple(rest.split(",")))
    if word == "jsonpath" and rest:
        path, brace, wanted = rest.partition("}=")
        return Path(jsonpath.parse(path + "}" if brace else rest), wanted if brace else None, text)
    if word == "ready" and not rest:
        return Phase(("Ready",))
    raise Failure(
        "what to wait for is not understood",
        details=[
            Detail(
                "--for",
                text,
                "is not known",
                "write condition=Ready, phase=Running, delete, or jsonpath={.status.ready}=2",
            )
        ],
    )


def until(
    client: "Client",
    targets: list[Target],
    tenant: str,
    goal: Goal,
    timeout_s: float,
    on_change: Callable[[Target, Any], None] | None = None,
) -> None:
    """Return when every target meets the goal. Raises Failure: TIMEOUT with what was last seen, NOT_FOUND."""
    deadline_s = time.monotonic() + timeout_s
    for target in targets:
        _until_one(client, target, tenant if target.kind.of_tenant else "", goal, deadline_s, timeout_s, on_change)


def shown_until(client: "Client", targets: list[Target], tenant: str, goal: Goal, timeout_s: float) -> None:
    """As `until`, with what is going on shown: the phases of the targets, and how far environments' instances are."""
    from casemate_cli import stages

    said = {"target": "", "stages": ""}
    with term.Progress(f"waiting for {goal}") as progress:

        def show(what: str, text: str) -> None:
            said[what] = text
            parts = [said["target"] or f"waiting for {goal}", said["stages"]]
            progress.update("; ".join(filter(None, parts)))

        environments = {t.name for t in targets if t.kind.name == "Environment"}
        if environments and not isinstance(goal, Gone):
            stages.watch(client, tenant, environments, lambda text: show("stages", text))
        until(
            client,
            targets,
            tenant,
            goal,
            timeout_s,
            lambda t, m: show("target", f"{t}: {_phase(m) or 'seen'}, waiting for {goal}"),
        )


def _until_one(
    client: "Client",
    target: Target,
    tenant: str,
    goal: Goal,
    deadline_s: float,
    timeout_s: float,
    on_change: Callable[[Target, Any], None] | None,
) -> None:
    from casemate_wire import schema
    from casemate_wire.v1 import operators_pb2 as pb

    try:
        message: Any = schema.object_of(client.get(target.kind.name, target.name, tenant))
    except Failure as failure:
        if failure.code is Exit.NOT_FOUND and isinstance(goal, Gone):
            return None
        raise
    uid = message.metadata.uid
    seen_in_snapshot = False
    try:
        for event in client.watch(target.kind.name, tenant=tenant, name=target.name, deadline_s=deadline_s):
            if event.type == pb.WatchEvent.RESYNC:
                seen_in_snapshot = False
            elif event.type == pb.WatchEvent.BOOKMARK:
                if not seen_in_snapshot:
                    return _gone(target, goal)
            elif event.type == pb.WatchEvent.DELETED:
                return _gone(target, goal)
            else:
                message = schema.object_of(event.resource)
                seen_in_snapshot = True
                if message.metadata.uid != uid and isinstance(goal, Gone):
                    return None  # another object of the same name
                if on_change is not None:
                    on_change(target, message)
                if goal.met(message):
                    return None
    except Failure as failure:
        if failure.code is not Exit.TIMEOUT:
            raise
        raise Failure(
            f"{target} did not reach {goal} within {timeout_s:g} s",
            code=Exit.TIMEOUT,
            details=_story(message),
            remedy=f"see casemate describe {target}",
        ) from None
    return None


def _phase(message: Any) -> str:
    return str(getattr(getattr(message, "status", None), "phase", ""))


def _gone(target: Target, goal: Goal) -> None:
    if not isinstance(goal, Gone):
        raise Failure(f"{target} was deleted while {goal} was waited for", code=Exit.NOT_FOUND)


def _story(message: Any) -> list[Detail]:
    """Phase and unmet conditions, as they were last seen."""
    told = []
    if phase := _phase(message):
        told.append(Detail("status.phase", phase))
    conditions = getattr(getattr(message, "status", None), "conditions", ())
    told += [Detail(f"condition {c.type}", c.status, c.message or c.reason) for c in conditions if c.status != "True"]
    return told


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="KIND NAME...", shell_complete=completing.kind_or_name)
@click.option(
    "--for",
    "goal",
    required=True,
    metavar="GOAL",
    help="condition=TYPE[=STATUS], phase=WORD[,WORD], ready, delete, jsonpath={PATH}[=VALUE].",
)
@click.option(
    "--timeout", type=options.SPAN, default="5m", show_default=True, help="How long, for all of them together."
)
@click.option("-l", "--selector", default="", metavar="LABELS", help="All objects of KIND with these labels.")
@options.connection
@click.pass_context
def wait(ctx: click.Context, arguments: tuple[str, ...], goal: str, timeout: float, selector: str) -> None:
    """Wait until objects are as you want them; exit 6 when they are not in time.

    \b
    Examples:
      casemate wait env/hello --for ready --timeout 3m
      casemate wait env -l app=web --for condition=Ready
      casemate wait env hello --for delete
      casemate wait inst/hello-0 --for jsonpath='{.status.virtualisation}'=kvm
    """
    from casemate_cli.client import Client
    from casemate_wire import schema

    aim = parse_goal(goal)
    settings = options.settings(ctx)
    wanted = kinds.targets(arguments)
    with Client(settings) as client:
        if any(not t.name for t in wanted):
            if not selector or len(wanted) != 1:
                raise Failure("no object is named", remedy="write KIND NAME, or KIND -l LABELS")
            kind = wanted[0].kind
            found = client.listed(kind.name, tenant=settings.tenant if kind.of_tenant else "", selector=selector)
            if not found and not isinstance(aim, Gone):
                raise Failure(f"no {kind.word} has the labels {selector}", code=Exit.NOT_FOUND)
            wanted = [Target(kind, schema.object_of(r).metadata.name) for r in found]  # type: ignore[attr-defined]
        shown_until(client, wanted, settings.tenant, aim, timeout)
    for target in wanted:
        term.out(f"{term.clean(str(target))} has reached {aim}")
