"""The auditors' service, and what handlers write down: denied attempts, sessions of commands and consoles.

Records are read from the store in parts, on the writer's thread. Who audits one tenant gets the records that concern that
tenant alone; the chain can be verified by who may read all of it.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc

from casemate_core.audit import AuditRecord
from casemate_core.checkpoint import MAX_BYTES, Witnessed, witnessed_from_json
from casemate_core.errors import CasemateError, InvalidSpec, Violation, shown
from casemate_core.spec.access import Scope
from casemate_manager.access import Permission
from casemate_manager.api import side
from casemate_manager.api.errors import streaming, unary
from casemate_manager.api.feed import Feed
from casemate_manager.api.gate import Caller, caller
from casemate_manager.api.support import NO_INSTANCE
from casemate_manager.fleet.acts import Actor, By
from casemate_manager.fleet.auditing import begin_of
from casemate_manager.fleet.commands import NoteAct
from casemate_manager.writer import Writer
from casemate_wire.codec.audit import link_to_message, record_to_message
from casemate_wire.codec.basics import seconds
from casemate_wire.codec.checkpoints import checkpoint_to_message, statement_to_message
from casemate_wire.v1 import audit_pb2 as pb
from casemate_wire.v1 import audit_pb2_grpc, checkpoints_pb2

log = logging.getLogger("casemate.audit")

Context = grpc.aio.ServicerContext[Any, Any]
#: Records that are read at once: bounds how long the writer's thread is held.
PART: Final = 500
MAX_LAST: Final = 100_000
BOOKMARK_S: Final = 30.0
#: So long a host is waited for that says what it has witnessed.
WITNESS_S: Final = 10.0
LONGEST_WITNESS_S: Final = 120.0
WITNESSES_AT_ONCE: Final = 16


class AuditService(audit_pb2_grpc.AuditServicer):
    """casemate.v1.Audit."""

    def __init__(
        self,
        writer: Writer,
        feed: Callable[[], Feed],
        key: str,
        channels: side.Channels,
        hosts: Callable[[], list[str]],
    ) -> None:
        self._writer = writer
        self._feed = feed
        self._key = key
        self._channels = channels
        self._hosts = hosts

    @streaming
    async def Records(self, request: pb.AuditRequest, context: Context) -> AsyncIterator[pb.AuditEntry]:
        """Records, oldest first; then as they are written."""
        if not 0 <= request.last <= MAX_LAST or request.after < 0:
            raise InvalidSpec((Violation("last", str(request.last), "is out of range", f"write 0 to {MAX_LAST}"),))
        asked, feed = caller(), self._feed()
        subscription = feed.subscribe("Audit")
        at = request.after
        try:
            if request.last:
                last: deque[AuditRecord] = deque(maxlen=request.last)
                async for record in self._after(at):
                    at = record.sequence
                    if _wanted(request, record) and _may_see(asked, record):
                        last.append(record)
                for record in last:
                    yield record_to_message(record)
            while True:
                async for record in self._after(at):
                    at = record.sequence
                    if _wanted(request, record) and _may_see(asked, record):
                        yield record_to_message(record)
                if not request.follow:
                    return
                await subscription.wait(BOOKMARK_S)
                subscription.take()
        finally:
            feed.unsubscribe(subscription)

    async def _after(self, sequence: int) -> AsyncIterator[AuditRecord]:
        while True:
            part = await self._writer.audit(sequence, PART)
            for record in part:
                yield record
            if len(part) < PART:
                return
            sequence = part[-1].sequence

    @unary
    async def Ends(self, request: pb.AuditEndsRequest, context: Context) -> pb.AuditEnds:
        """The two ends of the chain."""
        state = self._writer.state
        return pb.AuditEnds(
            begin=link_to_message(begin_of(state)),
            head=link_to_message(state.audit),
            checkpoints=map(checkpoint_to_message, state.checkpoints.values()),
            key=self._key,
        )

    @streaming
    async def Witnesses(
        self, request: checkpoints_pb2.WitnessesRequest, context: Context
    ) -> AsyncIterator[checkpoints_pb2.WitnessStatement]:
        """What each host keeps of the chain's signed places; hosts that are not there are named too."""
        timeout_s = request.host_timeout_s or WITNESS_S
        if not 0 < timeout_s <= LONGEST_WITNESS_S:
            problem = Violation(
                "host_timeout_s", f"{timeout_s:g}", "is out of range", f"write 1 to {LONGEST_WITNESS_S:g}"
            )
            raise InvalidSpec((problem,))
        there = self._hosts()
        for host in sorted(set(self._writer.state.hosts) - set(there)):
            yield checkpoints_pb2.WitnessStatement(host=host, error="the host is not connected")
        slots = asyncio.Semaphore(WITNESSES_AT_ONCE)
        tasks = [asyncio.create_task(self._ask(slots, host, timeout_s), name=f"witness-{host}") for host in there]
        try:
            for answered in asyncio.as_completed(tasks):
                yield await answered
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, slots: asyncio.Semaphore, host: str, timeout_s: float) -> checkpoints_pb2.WitnessStatement:
        """What one host keeps, or why that is not known."""
        async with slots:
            try:
                async with asyncio.timeout(timeout_s):
                    return statement_to_message(host, await self._statement(host))
            except TimeoutError:
                return checkpoints_pb2.WitnessStatement(host=host, error=f"no answer within {timeout_s:g} s")
            except CasemateError as error:
                return checkpoints_pb2.WitnessStatement(host=host, error=shown(str(error)))

    async def _statement(self, host: str) -> Witnessed:
        channel = await self._channels.open(host, "witness", NO_INSTANCE, {})
        data = bytearray()
        try:
            async for frame in channel.frames():
                if frame.WhichOneof("frame") == "stdout":
                    data += frame.stdout
                    if len(data) > MAX_BYTES:
                        break
                elif frame.WhichOneof("frame") == "eof":
                    break
        finally:
            await channel.close()
        return witnessed_from_json(bytes(data))


def _wanted(request: pb.AuditRequest, record: AuditRecord) -> bool:
    since_s, until_s = seconds(request.since), seconds(request.until)
    return (
        (not request.tenant or request.tenant in record.tenants)
        and (not request.actor or request.actor == record.actor)
        and (not request.act or request.act == record.act)
        and (not request.target or any(request.target in target for target in record.targets))
        and since_s <= record.time_s
        and (not until_s or record.time_s <= until_s)
    )


def _may_see(asked: Caller, record: AuditRecord) -> bool:
    """All of it concerns tenants whose audit the caller may read; what concerns none is the fleet's."""
    grants = asked.grants
    if grants.allows(Permission.AUDIT):
        return True
    return bool(record.tenants) and all(grants.allows(Permission.AUDIT, Scope(tenant)) for tenant in record.tenants)


class SessionScribe:
    """Writes the sessions of one caller down (`casemate_manager.api.side.SessionLog`)."""

    def __init__(self, scribe: "Scribe", by: Actor, ticket: str = "") -> None:
        self._scribe, self._by, self._ticket = scribe, by, ticket

    async def began(self, act: str, tenant: str, instance: str, detail: str) -> None:
        """See `SessionLog`. The ticket that opened the session is written down by its id."""
        detail = f"{detail}; ticket {self._ticket}".removeprefix("; ") if self._ticket else detail
        await self._scribe.began(self._by, act, tenant, instance, detail)

    async def ended(self, act: str, tenant: str, instance: str, detail: str) -> None:
        """See `SessionLog`."""
        await self._scribe.ended(self._by, act, tenant, instance, detail)


class Scribe:
    """Writes down what changes no record of its own."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def denied(self, by: Actor, what: str, error: CasemateError, tenants: tuple[str, ...] = ()) -> None:
        """A denied attempt. Where the store cannot be written the denial stands, and the log has it."""
        log.warning("%s from %s is denied: %s: %s", by.principal.name, by.address, what, str(error))
        with contextlib.suppress(CasemateError):
            await self._writer.submit(By(by, NoteAct("denied", "denied", (what,), tenants, str(error))))

    async def began(self, by: Actor, act: str, tenant: str, instance: str, detail: str) -> None:
        """A session begins. Raises Unavailable where that cannot be written down: then there is no session."""
        target = (f"instance/{tenant}/{instance}",)
        await self._writer.submit(By(by, NoteAct(act, "done", target, (tenant,), detail)))

    async def on_host(self, by: Actor, act: str, host: str, detail: str) -> None:
        """Something is about to be done on a host. Raises Unavailable where that cannot be written down: then it is not done."""
        await self._writer.submit(By(by, NoteAct(act, "done", (f"host/{host}",), (), detail)))

    async def ended(self, by: Actor, act: str, tenant: str, instance: str, detail: str) -> None:
        """A session has ended."""
        with contextlib.suppress(CasemateError):
            target = (f"instance/{tenant}/{instance}",)
            await self._writer.submit(By(by, NoteAct(act, "ended", target, (tenant,), detail)))
