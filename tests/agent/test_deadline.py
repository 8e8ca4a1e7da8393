"""Blocking calls with a deadline: what hangs holds up nobody, and is bounded."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_core.errors import DeadlineExceeded, Unavailable


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hung calls of a test wait for; opened at its end, so that their threads end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def calls(gate: threading.Event) -> Iterator[DeadlineExecutor]:
    executor = DeadlineExecutor("test", threads=2, max_stuck=3)
    yield executor
    executor.close()


def hanging(gate: threading.Event) -> tuple[Callable[[], None], threading.Semaphore]:
    """A call that hangs until the gate opens, and what is released as each one begins."""
    begun = threading.Semaphore(0)

    def call() -> None:
        begun.release()
        gate.wait()

    return call, begun


async def test_a_call_returns_or_raises_what_it_does(calls: DeadlineExecutor) -> None:
    assert await calls.run("one", lambda: 1, 60) == 1
    with pytest.raises(ZeroDivisionError):
        await calls.run("two", lambda: 1 // 0, 60)
    with pytest.raises(TimeoutError) as own:
        await calls.run("three", lambda: (_ for _ in ()).throw(TimeoutError("mine")), 60)
    assert str(own.value) == "mine"


async def test_calls_run_side_by_side(calls: DeadlineExecutor) -> None:
    both = threading.Barrier(2)
    await asyncio.gather(calls.run("a", lambda: both.wait(60), 60), calls.run("b", lambda: both.wait(60), 60))


async def test_a_hung_call_costs_its_deadline_and_never_the_loop(
    calls: DeadlineExecutor, gate: threading.Event
) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"hang: no answer of test within 0\.2 s"):
        await calls.run("hang", gate.wait, 0.2)
    assert time.monotonic() - began < 60
    assert ticks >= 5
    assert calls.stuck == 1
    ticker.cancel()


async def test_hung_threads_are_replaced_up_to_a_bound(calls: DeadlineExecutor, gate: threading.Event) -> None:
    for number in range(3):
        with pytest.raises(DeadlineExceeded):
            await calls.run("hang", gate.wait, 0.5)
        assert calls.stuck == number + 1
        if number < 2:
            assert await calls.run("still served", lambda: "yes", 60) == "yes"
    with pytest.raises(Unavailable, match="3 calls of test hang already"):
        await calls.run("one too many", lambda: None, 60)
    gate.set()
    while calls.stuck:
        await asyncio.sleep(0.01)
    assert await calls.run("well again", lambda: "yes", 60) == "yes"


async def test_what_an_abandoned_call_returns_is_given_to_discard(
    calls: DeadlineExecutor, gate: threading.Event
) -> None:
    given: list[str] = []
    done = threading.Event()

    def discard(result: str) -> None:
        given.append(result)
        done.set()

    def late() -> str:
        gate.wait()
        return "connection"

    with pytest.raises(DeadlineExceeded):
        await calls.run("late", late, 0.5, discard)
    gate.set()
    assert await asyncio.to_thread(done.wait, 60) and given == ["connection"]


async def test_a_cancelled_wait_abandons_the_call(calls: DeadlineExecutor, gate: threading.Event) -> None:
    hang, begun = hanging(gate)
    waiting = asyncio.create_task(calls.run("hang", hang, 60))
    assert await asyncio.to_thread(begun.acquire, timeout=60)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert calls.stuck == 1


async def test_a_call_abandoned_in_the_queue_never_runs(gate: threading.Event) -> None:
    calls = DeadlineExecutor("narrow", threads=1, max_stuck=1)
    ran: list[int] = []
    hang, begun = hanging(gate)
    first = asyncio.create_task(calls.run("long", hang, 60))
    assert await asyncio.to_thread(begun.acquire, timeout=60)
    with pytest.raises(DeadlineExceeded):
        await calls.run("queued", lambda: ran.append(1), 0.05)
    assert calls.stuck == 0
    gate.set()
    await first
    assert await calls.run("after", lambda: 1, 60) == 1
    assert ran == []
    calls.close()


async def test_a_closed_executor_refuses(calls: DeadlineExecutor) -> None:
    calls.close()
    with pytest.raises(Unavailable, match="closed"):
        await calls.run("late", lambda: None, 1)


async def test_it_is_told_when_a_call_never_begins(calls: DeadlineExecutor, gate: threading.Event) -> None:
    told: list[str] = []
    hang, begun = hanging(gate)
    hung = [asyncio.create_task(calls.run(f"hang {n}", hang, 60)) for n in range(2)]
    for _ in hung:
        assert await asyncio.to_thread(begun.acquire, timeout=60)
    with pytest.raises(DeadlineExceeded):
        await calls.run("late", lambda: told.append("ran"), 0.05, unused=lambda: told.append("unused"))
    gate.set()
    await asyncio.gather(*hung)
    assert await calls.run("one", lambda: 1, 60, unused=lambda: told.append("wrong")) == 1
    assert told == ["unused"]
    calls.close()
    with pytest.raises(Unavailable):
        await calls.run("closed", lambda: 1, 5, unused=lambda: told.append("closed"))
    assert told == ["unused", "closed"]
