"""Side streams are judged as commands are: by the role in the tenant or environment that their first message names."""

from typing import Any

import grpc
import pytest

from casemate_core.spec.access import Scope
from casemate_manager.api import gate
from casemate_wire.v1 import channels_pb2 as pb
from casemate_wire.v1 import seriallog_pb2
from casemate_wire.v1.channels_pb2_grpc import ChannelsStub
from support.gatekeeping import House, as_user, bind, house, ticket

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4"
METHODS = ("Console", "Forward", "Copy", "Authorize")


def first(method: str, tenant: str) -> Any:
    target = pb.ChannelTarget(tenant=tenant, instance="hello")
    match method:
        case "Console":
            return pb.ConsoleInput(start=target)
        case "Forward":
            return pb.ForwardInput(start=pb.ForwardStart(target=target, port=22))
        case "Copy":
            return pb.CopyInput(start=pb.CopyStart(target=target, path="/etc/hostname"))
    return pb.AuthorizeRequest(target=target, public_key=KEY)


async def code(found: House, method: str, user: str, tenant: str) -> grpc.StatusCode:
    """How the call ends; the house has no hosts, so it is never served."""
    call = getattr(ChannelsStub(found.channel), method)
    request = first(method, tenant)
    gate._target(request).ticket = await ticket(found, method.lower(), user, tenant)
    try:
        if method == "Authorize":
            await call(request, metadata=as_user(user), timeout=60)
        else:
            stream = call(metadata=as_user(user), timeout=60)
            await stream.write(request)
            await stream.read()
            return grpc.StatusCode(await stream.code())
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS)
async def test_who_may_run_commands_may_open_channels_and_nobody_else(method: str) -> None:
    refused = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)
    async with house() as found:
        await found.put(
            bind("a", "viewer", Scope("own"), "viewer"),
            bind("b", "console", Scope("own"), "console"),
            bind("c", "console", Scope("own", "hello"), "one"),
            bind("d", "console", Scope("own", "other"), "other"),
            bind("e", "tenant-admin", Scope("foreign"), "foreign"),
        )
        for user in ("nobody", "viewer", "other", "foreign"):
            assert await code(found, method, user, "own") in refused, user
        for user in ("console", "one"):
            assert await code(found, method, user, "own") not in refused, user
            assert await code(found, method, user, "foreign") in refused, user


async def test_who_may_read_logs_may_read_that_of_a_console() -> None:
    refused = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)

    async def ends(found: House, user: str, tenant: str) -> grpc.StatusCode:
        request = seriallog_pb2.ConsoleLogRequest(tenant=tenant, instance="hello")
        stream = ChannelsStub(found.channel).ConsoleLog(request, metadata=as_user(user), timeout=60)
        try:
            await stream.read()
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode(await stream.code())

    async with house() as found:
        await found.put(bind("a", "viewer", Scope("own"), "viewer"))
        assert await ends(found, "viewer", "own") not in refused
        assert await ends(found, "viewer", "foreign") in refused
        assert await ends(found, "nobody", "own") in refused
