"""The operators' service: decode → ask → encode. No decisions here.

Changes go through the one writer and are answered after their commit; reads see committed state and the last words of the
hosts. Streams are bounded: a watcher that is slow is resynchronised, never buffered for.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, Protocol

import grpc

from casemate_core import selector as selectors
from casemate_core.cause import cause_of
from casemate_core.errors import (
    CallerError,
    InternalError,
    InvalidSpec,
    NotFound,
    Violation,
)
from casemate_core.spec.secret import Secret
from casemate_core.spec.views import EventView
from casemate_manager.access import Permission
from casemate_manager.api import operate, side
from casemate_manager.api.errors import streaming, unary
from casemate_manager.api.feed import Feed, Subscription, is_event_of, parse_token
from casemate_manager.api.gate import caller
from casemate_manager.api.lookup import Found, Query, Reader
from casemate_manager.api.top import Top
from casemate_manager.fleet.acts import Actor
from casemate_manager.fleet.commands import (
    Answer,
    Applied,
    ApplyAnswer,
    ApplyResources,
    Command,
    DeleteAnswer,
    DeleteResource,
)
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import InstanceRecord, tenant_key
from casemate_manager.fleet.state import State
from casemate_wire import explain as explanations
from casemate_wire import schema
from casemate_wire.codec import resources
from casemate_wire.codec.basics import ref_to_message
from casemate_wire.codec.views import change_to_message
from casemate_wire.v1 import fleet_pb2, meta_pb2, operations_pb2, operators_pb2_grpc, top_pb2
from casemate_wire.v1 import operators_pb2 as pb

PAGE: Final = 500
MAX_PAGE: Final = 1000
MAX_OBJECTS: Final = 2000
BOOKMARK_S: Final = 30.0

Context = grpc.aio.ServicerContext[Any, Any]


class Core(Protocol):
    """The one writer, as the service sees it."""

    @property
    def state(self) -> State:
        """Committed records."""
        ...

    @property
    def observed(self) -> Observed: ...

    @property
    def feed(self) -> Feed: ...

    def sessions_of(self, by: Actor) -> side.SessionLog:
        """Writes down the sessions of one caller."""
        ...

    async def submit(self, command: Command) -> Answer:
        """Carry a command out; returns after its commit. Raises the errors of casemate_core.errors."""
        ...


class Why(Protocol):
    """Why an instance is where it is, or nowhere."""

    async def why(self, state: State, observed: Observed, instance: InstanceRecord, host: str) -> pb.WhyResponse: ...


class FleetService(operators_pb2_grpc.FleetServicer):
    """casemate.v1.Fleet. ``new_seed`` gives randomness for new identities."""

    def __init__(
        self,
        core: Core,
        channels: side.Channels,
        why: Why,
        version: str,
        new_seed: Callable[[], str],
        seal: Callable[[Secret], Secret],
    ) -> None:
        self._seal = seal
        self._core = core
        self._channels = channels
        self._why = why
        self._top = Top()
        self._version = version
        self._new_seed = new_seed

    def _reader(self) -> Reader:
        return Reader(self._core.state, self._core.observed)

    # --- changes ------------------------------------------------------------------------------------------------------

    @unary
    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:
        """Makes or changes objects: all of them or none."""
        if not request.resources:
            raise InvalidSpec((Violation("resources", "", "are missing", "send at least one object"),))
        if len(request.resources) > MAX_OBJECTS:
            raise InvalidSpec(
                (
                    Violation(
                        "resources", str(len(request.resources)), "are too many at once", f"send at most {MAX_OBJECTS}"
                    ),
                )
            )
        # Sealed here: no text of a secret goes any further.
        objects = tuple(self._seal(o) if isinstance(o, Secret) else o for o in _decode_all(request.resources))
        command = ApplyResources(request.request_key, objects, self._new_seed(), request.dry_run)
        answer = await self._core.submit(command)
        if not isinstance(answer, ApplyAnswer):
            raise InternalError(f"apply was answered with {type(answer).__name__}")
        reader = self._reader()
        return pb.ApplyResponse(results=[_result(reader, r) for r in answer.results], revision=answer.revision)

    @unary
    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        """Asks for an object's end."""
        if request.kind in schema.READ_ONLY_KINDS:
            raise InvalidSpec(
                (Violation("kind", request.kind, "is made by the manager", "delete or change its environment"),)
            )
        command = DeleteResource(request.request_key, request.kind, request.tenant, request.name, request.uid)
        answer = await self._core.submit(command)
        if not isinstance(answer, DeleteAnswer):
            raise InternalError(f"delete was answered with {type(answer).__name__}")
        return pb.DeleteResponse(ref=ref_to_message(answer.ref), pending=answer.pending, revision=answer.revision)

    @unary
    async def Operate(self, request: operations_pb2.OperateRequest, context: Context) -> operations_pb2.OperateResponse:
        """Asks for something to be done once to an instance, or to each instance of an environment."""
        return operate.to_response(await self._core.submit(operate.to_command(request, self._new_seed())))

    # --- reads --------------------------------------------------------------------------------------------------------

    @unary
    async def Get(self, request: pb.GetRequest, context: Context) -> pb.Resource:
        """One object."""
        await caller().require_object(request.kind, request.tenant, request.name)
        return caller().shown(self._reader().get(request.kind, request.tenant, request.name))

    @unary
    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """A page of objects of one kind, by key."""
        selector = selectors.parse(request.selector)
        query = Query(request.kind, request.tenant, selector, request.owner, sees=caller().sees, shown=caller().shown)
        size = min(request.page_size if request.page_size > 0 else PAGE, MAX_PAGE)
        token = str(self._core.feed.token)
        reader = self._reader()
        keys = reader.keys(query.kind)
        if request.page_token:
            keys = _after(keys, request.page_token)
        page = pb.ListResponse(resume_token=token)
        previous = ""
        for key in keys:
            if len(page.resources) >= size:
                page.next_page_token = previous
                break
            page.resources.extend(query.shown(f.show()) for f in reader.find(query.kind, key) if query.wants(f))
            previous = key
        return page

    @streaming
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchEvent]:
        """Changes of one kind as they are committed, from a token on."""
        selector = selectors.parse(request.selector)
        query = Query(
            request.kind, request.tenant, selector, name=request.name, sees=caller().sees, shown=caller().shown
        )
        self._reader().keys(query.kind)  # refuses a kind that is not served, before anything is sent
        feed = self._core.feed
        subscription = feed.subscribe(query.kind)
        try:
            watcher = _Watcher(query, subscription)
            for event in watcher.begin(self._reader(), feed, request.resume_token):
                yield event
            while True:
                touched = await subscription.wait(BOOKMARK_S)
                reader = self._reader()
                if subscription.overflowed:
                    yield pb.WatchEvent(type=pb.WatchEvent.RESYNC)
                    subscription.take()
                    events = watcher.snapshot(reader, feed)
                elif touched:
                    events = watcher.changes(reader, subscription.take(), str(feed.token))
                else:
                    events = [pb.WatchEvent(type=pb.WatchEvent.BOOKMARK, resume_token=str(feed.token))]
                for event in events:
                    yield event
        finally:
            feed.unsubscribe(subscription)

    @streaming
    async def Events(self, request: pb.EventsRequest, context: Context) -> AsyncIterator[fleet_pb2.Event]:
        """What happened, oldest first; then as it happens."""

        sees = caller().sees

        causes = (request.cause, cause_of(request.cause)) if request.cause else ()

        def wanted(event: EventView) -> bool:
            if causes and event.cause not in causes:
                return False
            return sees("Event", event.meta) and is_event_of(event, request.kind, request.name, request.tenant)

        feed = self._core.feed
        subscription = feed.subscribe("Event")
        try:
            events = sorted(filter(wanted, self._core.state.events.values()), key=lambda e: e.last_s or e.time_s)
            for event in events:
                yield resources.to_message(event).event
            while request.follow:
                await subscription.wait(BOOKMARK_S)
                for key in subscription.take():
                    touched = self._core.state.events.get(key)
                    if touched is not None and wanted(touched):
                        yield resources.to_message(touched).event
        finally:
            feed.unsubscribe(subscription)

    @streaming
    async def Logs(self, request: pb.LogsRequest, context: Context) -> AsyncIterator[pb.LogLine]:
        """Log lines of a container, from the guest that runs it."""
        async for line in side.logs(self._core.state, self._reader(), self._channels, request):
            yield line

    @streaming
    async def Exec(
        self, request_iterator: AsyncIterator[pb.ExecInput], context: Context
    ) -> AsyncIterator[pb.ExecOutput]:
        """Runs a command in a container, or in the guest itself."""
        log = self._core.sessions_of(caller().actor)
        async for output in side.exec_command(self._core.state, self._reader(), self._channels, request_iterator, log):
            yield output

    # --- explanations -------------------------------------------------------------------------------------------------

    @unary
    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """What a kind or a field is for."""
        found = explanations.explain(request.path)
        return pb.ExplainResponse(
            path=found.path,
            type=found.type,
            doc=found.doc,
            update=found.update,
            words=found.words,
            required=found.required,
            served=found.served,
            fields=[
                pb.ExplainField(
                    name=f.name,
                    type=f.type,
                    doc=f.doc,
                    update=f.update,
                    required=f.required,
                    served=f.served,
                    words=f.words,
                )
                for f in found.fields
            ],
        )

    @unary
    async def Why(self, request: pb.WhyRequest, context: Context) -> pb.WhyResponse:
        """Why an instance was placed where it is, or is not placed."""
        state = self._core.state
        name = f"{request.environment}-{request.ordinal}"
        try:
            instance = self._reader().instance(request.tenant, name)
        except NotFound:
            key = tenant_key(request.tenant, request.environment)
            if key not in state.environments and key not in state.instance_names:
                raise NotFound("Environment", request.environment) from None
            instance = self._reader().instance(request.tenant, request.environment)
        grants = caller().grants
        if request.host and (request.host not in state.hosts or not grants.allows(Permission.READ)):
            raise NotFound("Host", request.host)
        answer = await self._why.why(state, self._core.observed, instance, request.host)
        if not grants.allows(Permission.READ):
            # Hosts by name, and what each of them lacks, are the fleet's business.
            answer.ClearField("nearest")
            for suggestion in answer.suggestions:
                suggestion.host = ""
        return answer

    @unary
    async def Top(self, request: top_pb2.TopRequest, context: Context) -> top_pb2.TopResponse:
        """What a host or the fleet has, what of it is used, and what is free and stranded."""
        return await self._top.top(self._core.state, self._core.observed, request)

    @unary
    async def Version(self, request: pb.VersionRequest, context: Context) -> pb.VersionResponse:
        """The manager's version, epoch and revision."""
        state = self._core.state
        return pb.VersionResponse(version=self._version, epoch=state.epoch, revision=state.revision)


def _decode_all(messages: Iterable[pb.Resource]) -> tuple[resources.Object, ...]:
    """All objects of a request, or every violation in any of them."""
    objects: list[resources.Object] = []
    violations: list[Violation] = []
    subjects: list[str] = []
    for message in messages:
        try:
            objects.append(resources.from_message(message))
        except InvalidSpec as invalid:
            subjects.append(invalid.subject)
            violations += invalid.violations
    if len(subjects) == 1:
        raise InvalidSpec(tuple(violations), subjects[0])
    if violations:
        raise InvalidSpec(tuple(violations), f"{len(subjects)} objects ({', '.join(filter(None, subjects[:5]))})")
    return tuple(objects)


def _result(reader: Reader, applied: Applied) -> pb.ApplyResult:
    result = pb.ApplyResult(
        ref=ref_to_message(applied.ref),
        action=applied.action,
        changes=[change_to_message(c) for c in applied.changes],
        warnings=applied.warnings,
    )
    if applied.object is not None:
        result.resource.CopyFrom(resources.to_message(applied.object))
    else:
        # Not there: deleted meanwhile, or the answer of an earlier request. The reference says what was done.
        with contextlib.suppress(CallerError):
            result.resource.CopyFrom(reader.get(applied.ref.kind, applied.ref.tenant, applied.ref.name))
    return result


def _after(keys: list[str], token: str) -> list[str]:
    """Keys that follow the one that the last page ended with; an order by name needs its place, not its presence."""
    if token in keys:
        return keys[keys.index(token) + 1 :]
    return [key for key in keys if key > token]


class _Watcher:
    """One watch: what its client holds, so that ends are told and repeats are not."""

    def __init__(self, query: Query, subscription: Subscription) -> None:
        self._query = query
        self._subscription = subscription
        #: key -> name -> digest of what was sent last; None where the client has it from before.
        self._held: dict[str, dict[tuple[str, str], int | None]] = {}

    def begin(self, reader: Reader, feed: Feed, resume_token: str) -> list[pb.WatchEvent]:
        """First events: what changed since the token, or a snapshot."""
        token = parse_token(resume_token) if resume_token else None
        kind = self._query.kind
        touched = feed.since(token, kind) if token else None
        if token is None or touched is None or any(self._may_have_left(reader, key) for key in touched):
            first = [pb.WatchEvent(type=pb.WatchEvent.RESYNC)] if resume_token else []
            return first + self.snapshot(reader, feed)
        for key in reader.keys(kind):
            self._held[key] = {
                _identity(found): None
                for found in reader.find(kind, key)
                if self._query.wants(found) and not feed.is_new(token, kind, key, found.meta.name)
            }
        return self.changes(reader, touched, str(feed.token))

    def _may_have_left(self, reader: Reader, key: str) -> bool:
        """Whether the client may hold what it should not any more, and cannot be told what: its name is not known."""
        found = list(reader.find(self._query.kind, key))
        return not found or any(self._query.wanted_once(f) for f in found)

    def snapshot(self, reader: Reader, feed: Feed) -> list[pb.WatchEvent]:
        """Everything, then a bookmark."""
        self._held.clear()
        token = str(feed.token)
        events = self.changes(reader, tuple(reader.keys(self._query.kind)), "")
        return [*events, pb.WatchEvent(type=pb.WatchEvent.BOOKMARK, resume_token=token)]

    def changes(self, reader: Reader, keys: tuple[str, ...], token: str) -> list[pb.WatchEvent]:
        """What touched keys mean to this client. Only the last event carries the token: resuming between them loses none."""
        events: list[pb.WatchEvent] = []
        for key in keys:
            held = self._held.get(key, {})
            now: dict[tuple[str, str], int | None] = {}
            for found in reader.find(self._query.kind, key):
                if not self._query.wants(found):
                    continue
                resource = self._query.shown(found.show())
                digest = hash(resource.SerializeToString(deterministic=True))
                identity = _identity(found)
                now[identity] = digest
                if identity not in held:
                    events.append(pb.WatchEvent(type=pb.WatchEvent.ADDED, resource=resource))
                elif held[identity] != digest:
                    events.append(pb.WatchEvent(type=pb.WatchEvent.CHANGED, resource=resource))
            for identity in held:
                if identity not in now:
                    gone = _bare(self._query.kind, *identity)
                    events.append(pb.WatchEvent(type=pb.WatchEvent.DELETED, resource=gone))
            if now:
                self._held[key] = now
            else:
                self._held.pop(key, None)
        if events and token:
            events[-1].resume_token = token
        return events


def _identity(found: Found) -> tuple[str, str]:
    return found.meta.tenant, found.meta.name


def _bare(kind: str, tenant: str, name: str) -> pb.Resource:
    """An object of which only the name is left."""
    resource = pb.Resource()
    message: Any = getattr(resource, schema.KIND_FIELDS[kind])
    message.api_version = schema.API_VERSION
    message.kind = kind
    message.metadata.CopyFrom(meta_pb2.Meta(name=name, tenant=tenant))
    return resource
