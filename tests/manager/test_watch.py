"""Watching from a token: what happened since then, once, in order; and everything anew where that is no longer known."""

import asyncio
import contextlib
from typing import Any

import grpc

from casemate_wire.v1 import operators_pb2 as pb
from support.gatekeeping import House, as_user, house, of_tenant

KINDS = pb.WatchEvent
#: A resumed watch does not know what its client holds: it may call new what was there, and changed what is new.
UPSERTS = (KINDS.ADDED, KINDS.CHANGED)


async def told(found: House, resume_token: str, *until: int) -> list[tuple[int, str, str]]:
    """Type, name and token of the events of a watch up to the first of these types."""
    request = pb.WatchRequest(kind="Environment", tenant="own", resume_token=resume_token)
    stream: Any = found.stub.Watch(request, metadata=as_user("root"), timeout=60)
    events: list[tuple[int, str, str]] = []
    try:
        async with asyncio.timeout(60):
            while (event := await stream.read()) is not grpc.aio.EOF:
                events.append((event.type, event.resource.environment.metadata.name, event.resume_token))
                if event.type in until:
                    return events
        raise AssertionError(f"the watch ended; until then {events}")
    except TimeoutError:
        raise AssertionError(f"no event of type {until}; until then {events}") from None
    finally:
        stream.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await stream.code()


async def listed(found: House) -> str:
    page = await found.stub.List(pb.ListRequest(kind="Environment", tenant="own"), metadata=as_user("root"), timeout=60)
    return str(page.resume_token)


async def test_a_watch_from_a_lists_token_tells_only_what_came_after_it() -> None:
    async with house() as found:
        token = await listed(found)
        await found.put(of_tenant("own", "first"))
        events = await told(found, token, *UPSERTS)
        assert [name for _, name, _ in events] == ["first"]
        await found.put(of_tenant("foreign", "elsewhere"))
        await found.put(of_tenant("own", "second"))
        events = await told(found, events[-1][2], *UPSERTS)
        assert [name for _, name, _ in events] == ["second"]


async def test_a_token_of_another_life_of_the_manager_brings_everything_anew() -> None:
    async with house() as found:
        await found.put(of_tenant("own", "first"))
        epoch, _, sequence = (await listed(found)).partition(".")
        old = f"{int(epoch) + 7}.{sequence}" if sequence else "7-1"
        events = await told(found, old, KINDS.BOOKMARK)
        assert events[0][0] == KINDS.RESYNC
        assert sorted(name for kind, name, _ in events if kind == KINDS.ADDED) == ["first", "hello"]
        assert events[-1][2] == await listed(found)
