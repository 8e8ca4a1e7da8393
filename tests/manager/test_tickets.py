"""Tickets open one stream each, once, for whom and for what they were given; what is refused is written down."""

import asyncio
import itertools
from typing import Any

import grpc
import pytest

from casemate_core.errors import Unavailable
from casemate_core.spec.access import Scope
from casemate_manager import tickets
from casemate_manager.access import ACTIONS
from casemate_manager.tickets import LIFE_S, MOST_OF_ONE, TicketRefused, Tickets, id_of
from casemate_wire.v1 import channels_pb2 as pb
from casemate_wire.v1 import operators_pb2, tickets_pb2
from casemate_wire.v1.channels_pb2_grpc import ChannelsStub
from support.gatekeeping import House, as_user, bind, house, ticket


class Clock:
    """A time that stands still."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def table() -> tuple[Tickets, Clock]:
    clock, numbers = Clock(), itertools.count()
    return Tickets(clock, lambda: f"word-{next(numbers)}"), clock


def test_a_ticket_is_good_once() -> None:
    found, _ = table()
    word, _ = found.issue("ann", "exec", "uid-1")
    assert found.redeem(word, "ann", "exec", "uid-1") == id_of(word)
    with pytest.raises(TicketRefused):
        found.redeem(word, "ann", "exec", "uid-1")
    assert len(found) == 0


@pytest.mark.parametrize(
    "user, action, instance", [("bob", "exec", "uid-1"), ("ann", "console", "uid-1"), ("ann", "exec", "uid-2")]
)
def test_a_ticket_that_is_shown_for_anything_else_is_refused_and_spent(user: str, action: str, instance: str) -> None:
    found, _ = table()
    word, _ = found.issue("ann", "exec", "uid-1")
    with pytest.raises(TicketRefused):
        found.redeem(word, user, action, instance)
    with pytest.raises(TicketRefused):
        found.redeem(word, "ann", "exec", "uid-1")


def test_a_ticket_ends_by_itself() -> None:
    found, clock = table()
    word, ends_s = found.issue("ann", "exec", "uid-1")
    other, _ = found.issue("ann", "exec", "uid-1")
    assert ends_s == clock.now_s + LIFE_S
    clock.now_s += LIFE_S - 0.001
    assert found.redeem(other, "ann", "exec", "uid-1")
    clock.now_s = ends_s
    with pytest.raises(TicketRefused):
        found.redeem(word, "ann", "exec", "uid-1")


def test_tickets_that_nobody_uses_take_no_more_room_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    found, clock = table()
    words = [found.issue("ann", "exec", "uid-1")[0] for _ in range(MOST_OF_ONE + 1)]
    assert len(found) == MOST_OF_ONE
    with pytest.raises(TicketRefused):  # the oldest gave way
        found.redeem(words[0], "ann", "exec", "uid-1")
    assert found.redeem(words[1], "ann", "exec", "uid-1")
    monkeypatch.setattr(tickets, "MOST", len(found))
    with pytest.raises(Unavailable):
        found.issue("bob", "exec", "uid-1")
    clock.now_s += LIFE_S
    assert found.issue("bob", "exec", "uid-1")
    assert len(found) == 1 and list(found._of) == ["bob"]


@pytest.mark.parametrize("text", ["", "x", "ctk_", "ctk_" + "x" * 10_000, "\ud800"])
def test_what_is_no_ticket_is_refused(text: str) -> None:
    with pytest.raises(TicketRefused):
        table()[0].redeem(text, "ann", "exec", "uid-1")


# --- through the gate -------------------------------------------------------------------------------------------------


async def run(found: House, user: str, word: str, tenant: str = "own") -> tuple[grpc.StatusCode, str]:
    """How a command that shows this ticket ends; the house has no hosts, so it ends as not placed."""
    stream = found.stub.Exec(metadata=as_user(user), timeout=60)
    start = operators_pb2.ExecStart(tenant=tenant, instance="hello", guest=True, argv=["id"], ticket=word)
    try:
        await stream.write(operators_pb2.ExecInput(start=start))
        await stream.read()
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details())
    return await stream.code(), str(await stream.details())


async def records(found: House) -> list[Any]:
    return await found.manager.writer.audit(0, 1000)


async def test_without_a_ticket_nobody_gets_in_and_the_attempt_is_written_down() -> None:
    async with house() as found:
        await found.put(bind("a", "console", Scope("own"), "ann"))
        code, message = await run(found, "ann", "")
        assert code is grpc.StatusCode.PERMISSION_DENIED and "a ticket is needed" in message
        (record,) = [r for r in await records(found) if r.outcome == "denied"]
        assert record.actor == "ann" and record.tenants == ("own",) and "Exec instance/own/hello-0" in record.targets[0]


async def test_a_ticket_that_is_shown_again_is_refused_and_written_down() -> None:
    async with house() as found:
        await found.put(bind("a", "console", Scope("own"), "ann", "bob"))
        word = await ticket(found, "exec", "ann", "own")
        refused = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)
        first, _ = await run(found, "ann", word)
        assert first not in refused
        again, _ = await run(found, "ann", word)
        assert again is grpc.StatusCode.PERMISSION_DENIED
        stolen = await ticket(found, "exec", "ann", "own")
        assert (await run(found, "bob", stolen))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert [r.actor for r in await records(found) if r.outcome == "denied"] == ["ann", "bob"]
        assert not any(word in str(r) or stolen in str(r) for r in await records(found))


async def test_of_fifty_who_show_one_ticket_at_once_one_gets_in() -> None:
    async with house() as found:
        await found.put(bind("a", "console", Scope("own"), "ann"))
        word = await ticket(found, "exec", "ann", "own")
        ends = await asyncio.gather(*(run(found, "ann", word) for _ in range(50)))
        assert sum(code is not grpc.StatusCode.PERMISSION_DENIED for code, _ in ends) == 1


@pytest.mark.parametrize("action", sorted(ACTIONS))
async def test_tickets_are_for_who_may_and_can_be_bound_to_one_environment(action: str) -> None:
    async with house() as found:
        await found.put(
            bind("a", "viewer", Scope("own"), "viewer"),
            bind("b", "operator", Scope("own"), "operator"),
            bind("c", "console", Scope("own", "hello"), "one"),
            bind("d", "console", Scope("own", "other"), "other"),
        )
        got = {u for u in ("viewer", "operator", "one", "other", "nobody") if await ticket(found, action, u, "own")}
        assert got == {"one"}
        assert not await ticket(found, action, "one", "foreign")


async def test_a_role_that_is_taken_away_makes_its_tickets_void() -> None:
    async with house() as found:
        await found.put(bind("a", "console", Scope("own"), "ann"), bind("b", "viewer", Scope("own"), "ann"))
        word = await ticket(found, "exec", "ann", "own")
        request = operators_pb2.DeleteRequest(request_key="d", kind="RoleBinding", name="a")
        await found.stub.Delete(request, metadata=as_user("root"))
        assert (await run(found, "ann", word))[0] is grpc.StatusCode.PERMISSION_DENIED


async def test_an_action_that_does_not_exist_is_refused_by_its_field() -> None:
    async with house() as found:
        request = tickets_pb2.TicketRequest(tenant="own", instance="hello", action="dance")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ChannelsStub(found.channel).Admit(request, metadata=as_user("root"))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_console_takes_no_ticket_for_a_command() -> None:
    async with house() as found:
        await found.put(bind("a", "console", Scope("own"), "ann"))
        target = pb.ChannelTarget(tenant="own", instance="hello", ticket=await ticket(found, "exec", "ann", "own"))
        stream = ChannelsStub(found.channel).Console(metadata=as_user("ann"), timeout=60)
        await stream.write(pb.ConsoleInput(start=target))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
