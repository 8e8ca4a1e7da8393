"""Watching from a token: what happened since then, once, in order; and everything anew where that is no longer known."""

import asyncio
import contextlib
from typing import Any

import grpc

from casemate_core.spec.environment import Environment
from casemate_core.spec.meta import Meta
from casemate_wire.v1 import operators_pb2 as pb
from support.agents import pod
from support.gatekeeping import House, as_user, house, of_tenant

KINDS = pb.WatchEvent
UPSERTS = (KINDS.ADDED, KINDS.CHANGED)


async def told(
    found: House, resume_token: str, *until: int, kind: str = "Environment", selector: str = ""
) -> list[tuple[int, str, str]]:
    """Type, name and token of the events of a watch up to the first of these types."""
    request = pb.WatchRequest(kind=kind, tenant="own", resume_token=resume_token, selector=selector)
    stream: Any = found.stub.Watch(request, metadata=as_user("root"), timeout=60)
    events: list[tuple[int, str, str]] = []
    try:
        async with asyncio.timeout(60):
            while (event := await stream.read()) is not grpc.aio.EOF:
                events.append((event.type, _name(event), event.resume_token))
                if event.type in until and event.resume_token:  # the last of what is told at once
                    return events
        raise AssertionError(f"the watch ended; until then {events}")
    except TimeoutError:
        raise AssertionError(f"no event of type {until}; until then {events}") from None
    finally:
        stream.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await stream.code()


def _name(event: pb.WatchEvent) -> str:
    which = event.resource.WhichOneof("object")
    return str(getattr(event.resource, which).metadata.name) if which else ""


async def listed(found: House) -> str:
    page = await found.stub.List(pb.ListRequest(kind="Environment", tenant="own"), metadata=as_user("root"), timeout=60)
    return str(page.resume_token)


async def test_a_watch_from_a_lists_token_tells_only_what_came_after_it() -> None:
    async with house() as found:
        token = await listed(found)
        await found.put(of_tenant("own", "first"))
        events = await told(found, token, *UPSERTS)
        assert [(kind, name) for kind, name, _ in events] == [(KINDS.ADDED, "first")]
        await found.put(of_tenant("foreign", "elsewhere"))
        await found.put(of_tenant("own", "second"))
        events = await told(found, events[-1][2], *UPSERTS)
        assert [(kind, name) for kind, name, _ in events] == [(KINDS.ADDED, "second")]


async def test_a_resumed_watch_calls_new_what_was_made_since_and_changed_what_it_has() -> None:
    pods: dict[str, Any] = {"pods": (pod("web"),)}
    async with house() as found:
        await found.put(of_tenant("own", "first", **pods))
        token = await listed(found)
        await found.put(of_tenant("own", "first", pods=(pod("web"), pod("job"))))
        events = await told(found, token, *UPSERTS)
        assert (KINDS.CHANGED, "first") in [(kind, name) for kind, name, _ in events]
        assert KINDS.ADDED not in [kind for kind, _, _ in events]
        # A pod that came into an instance which was there is new, and the other one is not.
        seen: list[tuple[int, str]] = []
        while (KINDS.ADDED, "first-0.job") not in seen:
            events = await told(found, token, *UPSERTS, kind="Pod")
            seen += [(kind, name) for kind, name, _ in events]
            token = events[-1][2] or token
        assert (KINDS.ADDED, "first-0.web") not in seen
        # Instances of an environment that is new are new.
        token = await listed(found)
        await found.put(of_tenant("own", "second", **pods))
        events = await told(found, token, *UPSERTS, kind="Instance")
        assert (KINDS.ADDED, "second-0") in [(kind, name) for kind, name, _ in events]


async def test_what_a_selector_may_have_let_go_brings_everything_anew() -> None:
    """Which objects a watcher held is not known: one that has other labels than before may be among them."""
    async with house() as found:
        spec = of_tenant("own").spec
        for name in ("first", "other"):
            await found.put(Environment(Meta(name, "own", {"tier": "web"}), spec))
        token = await listed(found)
        await found.put(Environment(Meta("first", "own", {"tier": "db"}), spec))
        events = await told(found, token, KINDS.BOOKMARK, selector="tier=web")
        assert [(kind, name) for kind, name, _ in events[:-1]] == [(KINDS.RESYNC, ""), (KINDS.ADDED, "other")]


async def test_a_token_of_another_life_of_the_manager_brings_everything_anew() -> None:
    async with house() as found:
        await found.put(of_tenant("own", "first"))
        epoch, _, sequence = (await listed(found)).partition(".")
        old = f"{int(epoch) + 7}.{sequence}" if sequence else "7-1"
        events = await told(found, old, KINDS.BOOKMARK)
        assert events[0][0] == KINDS.RESYNC
        assert sorted(name for kind, name, _ in events if kind == KINDS.ADDED) == ["first", "hello"]
        assert events[-1][2] == await listed(found)
