"""A tenant that floods the manager is told to wait; whoever runs the fleet, and other tenants, are served meanwhile."""

import asyncio
from collections import Counter

import grpc

from casemate_core.spec.access import FLEET, Scope
from casemate_manager.api.gate import TENANT_STREAMS
from casemate_manager.limits import BURST
from casemate_wire.v1 import operators_pb2 as pb
from casemate_wire.v1.operators_pb2_grpc import FleetStub
from support.gatekeeping import House, as_user, bind, house

LIST = pb.ListRequest(kind="Environment")
#: Calls of the one that floods, and how many of them at once: below what gRPC itself refuses (1,000 that wait).
CALLS, AT_ONCE = 2000, 400


async def listed(stub: FleetStub, user: str) -> grpc.StatusCode:
    """How a list ends."""
    try:
        await stub.List(LIST, metadata=as_user(user), timeout=100)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def own_connection(found: House) -> grpc.aio.Channel:
    """A connection of its own: the bound of streams of one connection is not what is looked at here."""
    target = f"127.0.0.1:{found.manager.port}"
    return grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])


async def test_operators_and_other_tenants_are_served_while_one_floods() -> None:
    # Time all but stands still, so that tokens that are spent do not come back.
    async with house(step_s=0.0001) as found, own_connection(found) as flood, own_connection(found) as calm:
        await found.put(
            bind("a", "tenant-admin", Scope("own"), "ann"),
            bind("b", "viewer", Scope("foreign"), "bob"),
            bind("o", "operator", FLEET, "oda"),
        )

        async def storm() -> list[grpc.StatusCode]:
            return [await listed(FleetStub(flood), "ann") for _ in range(CALLS // AT_ONCE)]

        noisy = [asyncio.create_task(storm()) for _ in range(AT_ONCE)]
        served = []
        while not all(call.done() for call in noisy):
            served += [await listed(FleetStub(calm), user) for user in ("oda", "root")]
        served += [await listed(FleetStub(calm), "bob") for _ in range(20)]
        ends = Counter(code for call in noisy for code in call.result())
        assert set(served) == {grpc.StatusCode.OK} and len(served) >= 3
        assert set(ends) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert ends[grpc.StatusCode.RESOURCE_EXHAUSTED] > 0 and ends[grpc.StatusCode.OK] > 0
        # The buckets are not shared: bob had his own tokens, and operators need none.
        for _ in range(int(BURST) + 50):
            assert await listed(FleetStub(calm), "oda") is grpc.StatusCode.OK


async def test_one_tenants_open_streams_leave_room_for_those_of_others() -> None:
    async with house() as found, own_connection(found) as flood, own_connection(found) as calm:
        await found.put(bind("a", "tenant-admin", Scope("own"), "ann"), bind("b", "viewer", Scope("foreign"), "bob"))

        async def watching(channel: grpc.aio.Channel, user: str) -> tuple[bool, object]:
            stream = FleetStub(channel).Watch(pb.WatchRequest(kind="Environment"), metadata=as_user(user))
            try:
                return await stream.read() is not grpc.aio.EOF, stream
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return False, stream

        opened = [await watching(flood, "ann") for _ in range(TENANT_STREAMS + 20)]
        assert sum(there for there, _ in opened) == TENANT_STREAMS
        others = [await watching(calm, user) for user in ("bob", "root")]
        assert all(there for there, _ in others)
        for _, stream in (*opened, *others):
            stream.cancel()  # type: ignore[attr-defined]
