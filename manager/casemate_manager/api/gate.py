"""The gate: every call of every service passes here, before its handler: who calls, how often, and whether he may.

Theory of operation. An interceptor wraps each handler. It finds the row of the method (`access.RPCS`; without one nobody
passes), asks `Authenticate` who calls, takes a token and a place in flight for him, and judges what the row can judge:
the scope that the request names, in a stream its first message. Handlers find the caller in `caller()`: changes are judged
again in the fleet's door, lists are filtered by `Visible`. What is denied is written down before the answer leaves.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, Protocol

import grpc

from casemate_core.errors import CasemateError, InternalError, MachineError
from casemate_core.spec.access import FLEET, Scope
from casemate_core.spec.meta import TENANT_KINDS, Meta
from casemate_manager.access import (
    DEVELOPMENT,
    FLEET_KINDS,
    KINDS,
    RPCS,
    Denied,
    Grants,
    Permission,
    Principal,
    Row,
    Unauthenticated,
    Where,
    denied_in,
    grants_of,
    refusal,
)
from casemate_manager.api.errors import abort
from casemate_manager.api.lookup import instance_named
from casemate_manager.api.peer import Nobody, User, peer_of
from casemate_manager.fleet.acts import Actor, object_scope
from casemate_manager.fleet.records import instance_or_environment, tenant_key
from casemate_manager.fleet.state import State
from casemate_manager.limits import Limiter
from casemate_manager.pki import not_after_s
from casemate_manager.tickets import TicketRefused, Tickets
from casemate_wire import schema
from casemate_wire.v1 import operators_pb2 as pb

log = logging.getLogger("casemate.gate")

Context = grpc.aio.ServicerContext[Any, Any]
MAX_CLIENT: Final = 120
MAX_REQUEST_ID: Final = 128
#: Between two looks at who still may have his streams open.
RECHECK_S: Final = 2.0
#: Open streams (watches, logs, commands): of all, and of one tenant.
STREAMS: Final = 8192
TENANT_STREAMS: Final = 256


class OnDenied(Protocol):
    """Writes a denied attempt down: who, at what, why, and the tenants that it concerns."""

    async def __call__(self, by: Actor, what: str, error: CasemateError, tenants: tuple[str, ...] = ()) -> None: ...


class Authenticate(Protocol):
    """Finds out who calls."""

    async def __call__(self, context: Context) -> Principal:
        """Raises Unauthenticated."""
        ...


class RateLimited(MachineError):
    """The caller asks too often; ``retry_after_s`` says when a call would pass."""

    reason = "RateLimited"

    def __init__(self, key: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"too many calls of {key}: try again in {retry_after_s:.1f} s")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes the present call, and what he may do by the committed records."""

    actor: Actor
    state: Callable[[], State]
    admins: frozenset[str]
    on_denied: OnDenied
    #: Id of the ticket that opened the call; empty where it needs none.
    ticket: str = ""

    @property
    def grants(self) -> Grants:
        """As of now: a watch that is open sees what its caller may see today."""
        state = self.state()
        return grants_of(self.actor.principal, state.bindings_of, state.users, self.admins)

    async def require(self, permission: Permission, scope: Scope, kind: str, name: str) -> None:
        """Raises NotFound or Denied where the caller may not, and writes that down."""
        grants = self.grants
        if not grants.allows(permission, scope):
            error = refusal(grants, permission, scope, kind, name)
            await self.on_denied(self.actor, f"{permission} {kind.lower()}/{name} ({scope})", error, _tenants(scope))
            raise error

    async def require_object(self, kind: str, tenant: str, name: str) -> None:
        """As `require`, to read one object."""
        permission = KINDS[kind][0] if kind in KINDS else Permission.READ
        await self.require(permission, object_scope(self.state(), kind, tenant, name), kind, name)

    def sees(self, kind: str, meta: Meta) -> bool:
        """Whether an object may be shown to him."""
        grants = self.grants
        if grants.everything:
            return True
        tenant = meta.tenant if kind in TENANT_KINDS else ""
        return grants.allows(KINDS[kind][0], object_scope(self.state(), kind, tenant, meta.name))

    def shown(self, resource: pb.Resource) -> pb.Resource:
        """A resource without what would tell of others: counts over the whole fleet on what everybody uses."""
        if schema.kind_of(resource) in ("Image", "Network", "Class") and not self.grants.allows(Permission.READ):
            schema.object_of(resource).ClearField("status")
        return resource


_CALLER: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the present call. Raises InternalError outside of one: nothing is served that did not pass the gate."""
    try:
        return _CALLER.get()
    except LookupError:
        raise InternalError("a handler was reached past the gate") from None


def actor() -> Actor | None:
    """Who makes the present call; None for the manager's own work."""
    found = _CALLER.get(None)
    return found.actor if found else None


def ticket_id() -> str:
    """Id of the ticket that opened the present call; empty where it needed none."""
    found = _CALLER.get(None)
    return found.ticket if found else ""


@dataclass(slots=True, eq=False)
class _Open:
    """A stream that is open: who opened it and with what, and why it must end."""

    found: Caller
    context: Context
    method: str
    row: Row
    scope: Scope | None
    task: "asyncio.Task[Any]"
    ended: CasemateError | None = None


class Gate(grpc.aio.ServerInterceptor):
    """See the module. ``clock`` gives seconds, for the rate of calls."""

    def __init__(
        self,
        state: Callable[[], State],
        authenticate: Authenticate,
        on_denied: OnDenied,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        admins: frozenset[str] = frozenset(),
        limiter: Limiter | None = None,
        tickets: Tickets | None = None,
    ) -> None:
        self._state = state
        self._authenticate = authenticate
        self._on_denied = on_denied
        self._clock = clock
        self._new_id = new_id
        self._admins = admins
        self._tickets = Tickets(clock) if tickets is None else tickets
        self._limiter = limiter or Limiter()
        self._open: dict[_Open, None] = {}
        self._scopes: dict[Context, Scope] = {}
        self._streams = Limiter(
            in_flight=STREAMS, tenants_in_flight=STREAMS - STREAMS // 8, tenant_in_flight=TENANT_STREAMS
        )

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        row = RPCS.get(details.method)
        if handler is None or (row is not None and row.permission in (Permission.ANYONE, Permission.HOST)):
            return handler
        return self._wrapped(handler, details.method, row)

    def _wrapped(self, handler: Any, method: str, row: Row | None) -> Any:
        if handler.response_streaming:

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                request, place = await self._enter(request, context, method, row, handler)
                task = asyncio.current_task()
                assert task is not None and row is not None  # _enter lets nobody in without
                opened = _Open(caller(), context, method, row, self._scopes.pop(context, None), task)
                self._open[opened] = None
                try:
                    async with place:
                        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
                        async with contextlib.aclosing(inner(request, context)) as items:
                            async for item in items:
                                yield item
                except asyncio.CancelledError:
                    if opened.ended is None:
                        raise
                    task.uncancel()
                    await abort(context, opened.ended)
                finally:
                    self._open.pop(opened, None)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)

        async def unary(request: Any, context: Context) -> Any:
            request, place = await self._enter(request, context, method, row, handler)
            async with place:
                inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
                return await inner(request, context)

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(unary, handler.request_deserializer, handler.response_serializer)

    async def end_what_may_no_more(self, every_s: float = RECHECK_S) -> None:
        """Ask again and again of every open stream who calls and whether he may, until cancelled; end it where not.

        So a certificate or token that has expired, a key or user that was disabled, and a role that was taken away end what
        they opened.
        """
        while True:
            await asyncio.sleep(every_s)
            for opened in list(self._open):
                error = await self._ended(opened)
                if error is not None and opened in self._open:
                    opened.ended = error
                    opened.task.cancel()
                    what = f"{opened.method}: the open stream was ended"
                    await self._on_denied(opened.found.actor, what, error, _tenants(opened.scope or FLEET))

    async def _ended(self, opened: "_Open") -> CasemateError | None:
        """Why a stream may not go on; None where it may, or where that cannot be found out now."""
        try:
            principal = await self._authenticate(opened.context)
        except Unauthenticated as error:
            return error
        except CasemateError as error:
            log.warning("whether %s still calls is not known: %s", opened.found.actor.principal.name, error)
            return None
        grants = replace(opened.found, actor=replace(opened.found.actor, principal=principal)).grants
        permission, scope = opened.row.permission, opened.scope
        if scope is not None and not grants.allows(permission, scope):
            return denied_in(grants, permission, scope)
        if opened.row.where is Where.FLEET and not grants.allows(permission):
            return denied_in(grants, permission, FLEET)
        if opened.row.where is Where.VISIBLE and not grants.anywhere(permission, ""):
            return denied_in(grants, permission, FLEET)
        return None

    # --- one call -----------------------------------------------------------------------------------------------------

    async def _enter(
        self, request: Any, context: Context, method: str, row: Row | None, handler: Any
    ) -> tuple[Any, contextlib.AsyncExitStack]:
        """The request (a stream's with its first message read) and the place in flight to give back; or the call's end."""
        place = contextlib.AsyncExitStack()
        try:
            principal = await self._authenticate(context)
            found = Caller(self._actor(principal, context), self._state, self._admins, self._on_denied)
            self._count(found, handler.response_streaming, place)
            first = request
            if handler.request_streaming and row is not None and row.where is Where.NAMED:
                first = await _read(context)
                request = _chained(first, context)
                place.push_async_callback(request.aclose)
            if row is None:
                raise Denied(
                    principal.name, Permission.MANAGE, f"call {method}, which has no row in the table of access"
                )
            scope = await self._judge(found, method, row, first)
            if scope is not None and handler.response_streaming:
                self._scopes[context] = scope
            if row.ticket:
                found = replace(found, ticket=await self._redeem(found, method, row.ticket, first))
        except Exception as error:
            await place.aclose()
            await abort(context, error)
        _CALLER.set(found)
        return request, place

    def _actor(self, principal: Principal, context: Context) -> Actor:
        beside = told(context)
        request = beside.get("x-request-id", "")
        if not 0 < len(request) <= MAX_REQUEST_ID or not request.isprintable():
            request = self._new_id()
        client = "".join(c for c in beside.get("user-agent", "") if c.isprintable())[:MAX_CLIENT]
        return Actor(principal, context.peer(), client, request)

    async def _judge(self, found: Caller, method: str, row: Row, request: Any) -> Scope | None:
        """The scope that the request names, where it names one. Raises what `Denied` and `Hidden` are."""
        grants = found.grants
        if row.where is Where.FLEET and not grants.allows(row.permission):
            await self._deny(found, method, denied_in(grants, row.permission, FLEET))
        if row.where is Where.VISIBLE:
            kind = getattr(request, "kind", "")
            tenant = getattr(request, "tenant", "")
            permission = KINDS[kind][0] if kind in KINDS else row.permission
            of_fleet = kind in FLEET_KINDS and not grants.allows(permission)
            if of_fleet or not grants.anywhere(permission, tenant):
                await self._deny(
                    found, method, denied_in(grants, permission, FLEET if of_fleet else Scope(tenant)), Scope(tenant)
                )
        if row.where is Where.NAMED:
            tenant, name = named(request)
            scope = Scope(tenant, self._environment(tenant, name))
            if not grants.allows(row.permission, scope):
                kind = instance_or_environment(name)
                await self._deny(
                    found,
                    f"{method} {kind.lower()}/{tenant}/{name}",
                    refusal(grants, row.permission, scope, kind, name),
                    scope,
                )
            return scope
        return None

    async def _redeem(self, found: Caller, method: str, action: str, request: Any) -> str:
        """Use up the ticket that the first message shows; its id."""
        (tenant, name), ticket = named(request), shown_ticket(request)
        instance = instance_named(self._state(), tenant, name)
        try:
            return self._tickets.redeem(ticket, found.actor.principal.name, action, instance.meta.uid)
        except TicketRefused as error:
            await self._deny(found, f"{method} instance/{tenant}/{instance.meta.name}", error, Scope(tenant))

    async def _deny(self, found: Caller, what: str, error: CasemateError, scope: Scope = FLEET) -> NoReturn:
        await self._on_denied(found.actor, what, error, _tenants(scope))
        raise error

    def _environment(self, tenant: str, name: str) -> str:
        """The environment that a name of an environment or instance leads to: itself, where it leads nowhere."""
        state = self._state()
        uid = state.instance_names.get(tenant_key(tenant, name))
        return state.instances[uid].environment if uid else name

    # --- how often ----------------------------------------------------------------------------------------------------

    def _lane(self, found: Caller) -> tuple[str, bool]:
        """Whose bucket a call is counted in, and whether he runs the fleet: he is in no tenant's way, and none in his."""
        grants = found.grants
        if grants.allows(Permission.OPERATE):
            return found.actor.principal.name, True
        tenants = sorted({scope.tenant for _, scope in grants.roles})
        return (f"tenant {tenants[0]}" if tenants else f"user {found.actor.principal.name}"), False

    def _count(self, found: Caller, streaming: bool, place: contextlib.AsyncExitStack) -> None:
        """Take a token and a place in flight. Raises RateLimited."""
        key, operator = self._lane(found)
        if not operator and (wait_s := self._limiter.wait_s(key, self._clock())):
            raise RateLimited(key, wait_s)
        places = self._streams if streaming else self._limiter
        if not places.enter(key, operator=operator):
            raise RateLimited(key, 1.0)
        place.callback(places.leave, key, operator=operator)


def _tenants(scope: Scope) -> tuple[str, ...]:
    return (scope.tenant,) if scope.tenant else ()


async def _read(context: Context) -> Any:
    """The next message of a stream of requests; None at its end.

    Read by the context: the iterator that gRPC gives, once begun and not read to its end, keeps the call alive for ever.
    """
    message = await context.read()
    return None if message is grpc.aio.EOF else message


async def _chained(message: Any, context: Context) -> AsyncGenerator[Any, None]:
    while message is not None:
        yield message
        message = await _read(context)


def named(request: Any) -> tuple[str, str]:
    """Tenant and name of the environment or instance that a request is about."""
    if request is None:
        return "", ""
    request = _target(request)
    fields = request.DESCRIPTOR.fields_by_name
    name = next((getattr(request, f) for f in ("instance", "environment", "name") if f in fields), "")
    return getattr(request, "tenant", ""), str(name)


def shown_ticket(request: Any) -> str:
    """The ticket that a request shows; empty where it shows none."""
    return "" if request is None else str(getattr(_target(request), "ticket", ""))


def _target(request: Any) -> Any:
    """The message within a request that says which instance is meant."""
    if "start" in request.DESCRIPTOR.fields_by_name and "input" in request.DESCRIPTOR.oneofs_by_name:
        request = request.start
    return request.target if "target" in request.DESCRIPTOR.fields_by_name else request


def told(context: Context) -> dict[str, str]:
    """What the caller sent beside the request, as text."""
    return {str(k): v for k, v in context.invocation_metadata() or () if isinstance(v, str)}


class ByTokenOrCertificate:
    """Who shows a key or token is meant by it; else the certificate says who calls."""

    def __init__(self, read: Callable[[str], Awaitable[Principal]], clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock

    async def __call__(self, context: Context) -> Principal:
        """See `Authenticate`."""
        if (shown := told(context).get("authorization")) is not None:
            return await self._read(shown)
        return await by_certificate(context, self._clock())


async def by_certificate(context: Context, now_s: float = 0.0) -> Principal:
    """See `Authenticate`. Plaintext on loopback is development mode: whoever dials is on this machine, and its administrator.

    A connection outlives the certificate with which it was made: gRPC looks at that once, and we at each call.
    """
    match peer_of(context):
        case User(name, certificate):
            if now_s >= not_after_s(certificate):
                raise Unauthenticated("the certificate has expired: have another made")
            return Principal(name, "certificate")
        case Nobody(secure=False):
            return DEVELOPMENT
        case _:
            raise Unauthenticated("no user is named: show a user's certificate or a token")
