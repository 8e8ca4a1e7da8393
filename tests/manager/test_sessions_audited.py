"""Sessions with a guest are written down from beginning to end: who, from where, with which client, request and ticket."""

import asyncio
from pathlib import Path
from typing import Any

import grpc

from casemate_core.spec.access import Scope
from casemate_core.spec.instance import Phase
from casemate_manager.tickets import id_of
from casemate_wire.v1 import operators_pb2 as pb
from casemate_wire.v1 import seriallog_pb2
from casemate_wire.v1.channels_pb2_grpc import ChannelsStub
from support.gatekeeping import House, as_user, bind, hosted, house, ticket


async def until_up(found: House) -> None:
    """The guest of ``own`` answers."""
    writer = found.manager.writer
    (uid,) = [i.meta.uid for i in writer.state.instances.values() if i.meta.tenant == "own"]
    async with asyncio.timeout(90):
        while (seen := writer.observed.instances.get(uid)) is None or seen.state.phase is not Phase.READY:
            await asyncio.sleep(0.02)


async def written(found: House, act: str, count: int) -> list[Any]:
    """The records of one kind, once there are so many."""
    async with asyncio.timeout(90):
        while len(found_ := [r for r in await found.manager.writer.audit(0, 10_000) if r.act == act]) < count:
            await asyncio.sleep(0.02)
    return found_


async def test_a_command_and_the_log_of_a_console(tmp_path: Path) -> None:
    async with house() as found, hosted(found, tmp_path, "h1"):
        await found.put(bind("a", "console", Scope("own"), "ann"), bind("b", "viewer", Scope("own"), "vic"))
        await until_up(found)
        word = await ticket(found, "exec", "ann", "own")
        more = as_user("ann", x_request_id="request-7")
        stream = found.stub.Exec(metadata=more, timeout=90)
        start = pb.ExecStart(tenant="own", instance="hello", guest=True, argv=["true", "in-confidence"], ticket=word)
        await stream.write(pb.ExecInput(start=start))
        await stream.done_writing()
        while await stream.read() is not grpc.aio.EOF:
            pass
        began, ended = await written(found, "exec", 2)
        assert (began.actor, began.outcome, began.targets) == ("ann", "done", ("instance/own/hello-0",))
        assert began.detail == f"true; ticket {id_of(word)}" and "in-confidence" not in f"{began}{ended}"
        assert began.address.startswith("ipv4:127.0.0.1:") and began.request == "request-7" and "grpc" in began.client
        assert (ended.outcome, ended.tenants) == ("ended", ("own",)) and ended.detail.startswith("exit code")
        request = seriallog_pb2.ConsoleLogRequest(tenant="own", instance="hello")
        log = ChannelsStub(found.channel).ConsoleLog(request, metadata=as_user("vic"), timeout=90)
        async for _ in log:
            pass
        records = await written(found, "console-log", 2)
        assert [(r.actor, r.outcome) for r in records] == [("vic", "done"), ("vic", "ended")]
        assert await written(found, "denied", 0) == []
