"""A whole manager behind its gate, with callers who say who they are in a header: for tests of who may do what."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from casemate_agent.__main__ import run_host
from casemate_agent.config import Config
from casemate_core.spec.access import FLEET, RoleBinding, Scope
from casemate_core.spec.environment import Environment
from casemate_core.spec.meta import Meta
from casemate_manager.access import Principal, Unauthenticated
from casemate_manager.app import Manager, running
from casemate_manager.fleet.commands import ApplyResources, Object
from casemate_manager.simulation.memory import MemoryStore
from casemate_wire.v1 import channels_pb2_grpc, operators_pb2_grpc, tickets_pb2
from support.small_fleet import SMALL, environment, image, network

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web"},
    "spec": {"containers": [{"name": "c", "image": "x"}]},
}


async def by_header(context: Any) -> Principal:
    """Who calls, as he says himself."""
    told = dict(context.invocation_metadata() or ())
    if "x-user" not in told:
        raise Unauthenticated("no user is named")
    return Principal(told["x-user"], "certificate", tuple(filter(None, told.get("x-groups", "").split(","))))


@dataclass
class House:
    """A manager and how to call it."""

    manager: Manager
    channel: grpc.aio.Channel
    stub: Any
    numbers: Any

    async def put(self, *objects: Object) -> None:
        """Apply as the manager itself."""
        n = next(self.numbers)
        await self.manager.writer.submit(ApplyResources(f"house-{n}", objects, f"seed-{n}"))

    def key(self) -> str:
        return f"k-{next(self.numbers)}"


def of_tenant(tenant: str, name: str = "hello", **fields: Any) -> Environment:
    made = environment(name, **{"pods": (POD,), **fields})
    return Environment(Meta(name, tenant), made.spec)


def bind(name: str, role: str, scope: Scope, *users: str) -> RoleBinding:
    return RoleBinding(Meta(name), role, users, scope)


def as_user(name: str, **more: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call."""
    return (("x-user", name), *((k.replace("_", "-"), v) for k, v in more.items()))


async def ticket(found: House, action: str, user: str, tenant: str, instance: str = "hello") -> str:
    """A ticket of that user; none where he gets none."""
    request = tickets_pb2.TicketRequest(tenant=tenant, instance=instance, action=action)
    try:
        answer = await channels_pb2_grpc.ChannelsStub(found.channel).Admit(request, metadata=as_user(user), timeout=10)
    except grpc.aio.AioRpcError:
        return ""
    return str(answer.ticket)


@asynccontextmanager
async def hosted(found: House, folder: Path, *names: str) -> AsyncIterator[None]:
    """Agents of simulated hosts, as their own process would run them; their state is in ``folder``, by name."""
    config = Config(manager=f"127.0.0.1:{found.manager.port}", insecure_loopback=True, simulated=SMALL)
    agents = [asyncio.create_task(run_host(config, name, folder / name, {}, {}), name=f"host-{name}") for name in names]
    try:
        while len(found.manager.sessions) < len(names):
            await asyncio.sleep(0.02)
            for agent in agents:
                assert not agent.done(), agent
        yield
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)


@asynccontextmanager
async def house(
    *,
    store: Any = None,
    authenticate: Callable[[Any], Awaitable[Principal]] = by_header,
    step_s: float = 0.01,
    **more: Any,
) -> AsyncIterator[House]:
    """A manager with two tenants, ``own`` and ``foreign``, an environment ``hello`` in each, and the root user ``root``."""
    numbers = itertools.count(1)
    # Slow against how often it is asked for: a ticket that lives half a minute outlives any test.
    clock = itertools.count(1_800_000_000, step_s)
    async with (
        running(
            store or MemoryStore(),
            "127.0.0.1:0",
            lambda: float(next(clock)),
            lambda: f"s-{next(numbers)}",
            version="test",
            authenticate=authenticate,
            **more,
        ) as manager,
        grpc.aio.insecure_channel(f"127.0.0.1:{manager.port}") as channel,
    ):
        found = House(manager, channel, operators_pb2_grpc.FleetStub(channel), numbers)
        await found.put(
            image(),
            network(),
            of_tenant("own"),
            of_tenant("foreign"),
            bind("root", "platform-admin", FLEET, "root"),
        )
        yield found
