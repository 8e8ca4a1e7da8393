"""What the agent relies on of serial consoles: a simulated guest's, and a pty as QEMU holds it."""

import asyncio
import os
import tty
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import pytest

from casemate_agent.drivers.console import KEPT, PtyConsoles
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.drivers.sideports import ConsoleRefused, Consoles, ConsoleSession
from support.guest_bench import WITHIN_S, SimulatedGuestBench

UID = SimulatedGuestBench.uid


class Bench(ABC):
    """A console, and the guest behind it, which repeats what is typed."""

    consoles: Consoles

    @abstractmethod
    def print(self, data: bytes) -> None:
        """The guest prints."""

    @abstractmethod
    def off(self) -> None:
        """Its QEMU ends."""

    @abstractmethod
    async def close(self) -> None: ...


class Simulated(Bench):
    async def start(self) -> None:
        self.guest = SimulatedGuestBench()
        await self.guest.boot()
        self.consoles = self.guest.host.drivers().consoles
        await self.guest.host.drivers().hypervisor.start(UID, 1)
        self.consoles = self.guest.host.drivers().consoles

    def print(self, data: bytes) -> None:
        guest = self.guest.host.domains[UID].guest
        assert guest is not None
        guest.console.print(data)

    def off(self) -> None:
        self.guest.host.end(UID, DomainPhase.SHUT_OFF, "off")

    async def close(self) -> None:
        self.guest.host.sever()


class Pty(Bench):
    """The far end of a pty does what QEMU's serial port and a guest with echo do."""

    async def start(self) -> None:
        self.master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        os.close(self._slave)
        os.set_blocking(self.master, False)
        self.asked = 0
        self.reading = True
        asyncio.get_running_loop().add_reader(self.master, self._typed)
        self.consoles = self._ptys = PtyConsoles(self._find)

    async def _find(self, uid: str, deadline_s: float) -> str:
        self.asked += 1
        return self.path

    def _typed(self) -> None:
        try:
            data = os.read(self.master, 4096)
        except OSError:  # nobody holds the other end
            asyncio.get_running_loop().remove_reader(self.master)
            asyncio.get_running_loop().call_later(0.01, self._look_again)
            return
        os.write(self.master, data)

    def _look_again(self) -> None:
        if self.master >= 0:
            asyncio.get_running_loop().add_reader(self.master, self._typed)

    def print(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self.master, data) :]
            except BlockingIOError:
                return

    def off(self) -> None:
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        self.master, self.path = -1, ""

    async def close(self) -> None:
        await self._ptys.aclose()
        if self.master >= 0:
            self.off()


@pytest.fixture(params=[Simulated, Pty])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    made = request.param()
    await made.start()
    yield made
    await made.close()


class Watcher:
    """A session and all that it has seen."""

    def __init__(self, session: ConsoleSession) -> None:
        self.session = session
        self.seen = b""
        self.lost = 0
        self.news = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for item in self.session.output():
            if isinstance(item, int):
                self.lost += item
            else:
                self.seen += item
            self.news.set()

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(WITHIN_S):
            while text not in self.seen:
                self.news.clear()
                await self.news.wait()

    async def ended(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            await self.task

    async def leave(self) -> None:
        await self.session.close()
        await self.ended()


async def test_all_readers_see_the_same_and_what_any_types_is_typed(bench: Bench) -> None:
    first, second = [Watcher(await bench.consoles.open(UID, 5)) for _ in range(2)]
    bench.print(b"\x1b[31mboot\x1b[0m\r\n")
    for watcher in (first, second):
        await watcher.until(b"\x1b[31mboot\x1b[0m\r\n")
    await first.session.input(b"root")
    await second.session.input(b"!\xff\x1b")
    for watcher in (first, second):
        await watcher.until(b"root!\xff\x1b")
    await first.leave()
    bench.print(b"later")
    await second.until(b"later")
    assert b"later" not in first.seen
    await second.leave()
    third = Watcher(await bench.consoles.open(UID, 5))
    await third.session.input(b"again")
    await third.until(b"again")
    await third.leave()


async def test_a_console_ends_with_its_qemu_and_then_there_is_none(bench: Bench) -> None:
    watchers = [Watcher(await bench.consoles.open(UID, 5)) for _ in range(2)]
    bench.print(b"bye")
    for watcher in watchers:
        await watcher.until(b"bye")
    bench.off()
    for watcher in watchers:
        await watcher.ended()
        await watcher.session.close()
    with pytest.raises(ConsoleRefused, match="not running"):
        await bench.consoles.open(UID, 5)


async def test_a_slow_reader_loses_the_oldest_and_is_told_how_much(bench: Bench) -> None:
    quick = Watcher(await bench.consoles.open(UID, 5))
    slow = await bench.consoles.open(UID, 5)
    line = b"x" * 1023 + b"\n"
    for number in range(KEPT // len(line) + 64):
        bench.print(line)
        async with asyncio.timeout(WITHIN_S):
            while len(quick.seen) < (number + 1) * len(line):
                quick.news.clear()
                await quick.news.wait()
    bench.print(b"the end")
    await quick.until(b"the end")
    late = Watcher(slow)
    await late.until(b"the end")
    assert late.lost + len(late.seen) == len(quick.seen)
    assert 0 < len(late.seen) <= KEPT
    await late.leave()
    await quick.leave()


async def test_typing_waits_for_a_guest_that_does_not_take_it() -> None:
    pty = Pty()
    await pty.start()
    asyncio.get_running_loop().remove_reader(pty.master)
    session = await pty.consoles.open(UID, 5)
    typing = asyncio.create_task(session.input(b"y" * 100_000))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not typing.done()
    got = 0
    async with asyncio.timeout(WITHIN_S):
        while got < 100_000:
            try:
                got += len(os.read(pty.master, 65536))
            except BlockingIOError:
                await asyncio.sleep(0.001)
    await typing
    await session.close()
    await pty.close()


async def test_a_pty_that_is_anothers_by_now_is_not_typed_into() -> None:
    pty = Pty()
    await pty.start()
    answers = [pty.path, ""]

    async def find(uid: str, deadline_s: float) -> str:
        return answers.pop(0)

    consoles = PtyConsoles(find)
    with pytest.raises(ConsoleRefused, match="meanwhile"):
        await consoles.open(UID, 5)
    await pty.close()
