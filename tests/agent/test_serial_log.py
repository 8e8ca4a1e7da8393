"""The log of a serial console: marks that say when, bounds of size and time, and reading from a time on."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from casemate_agent.drivers import seriallog
from casemate_agent.drivers.seriallog import MAX_AGE_S, MAX_OLDER, SerialLogFiles, parts, read_marks, turn

UID = "00000000-0000-4000-8000-000000000001"


class Log:
    """The log of one instance, and a clock. Whatever is written is written by appending, as virtlogd and QEMU do."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1_800_000_000.0
        self.folder = folder / UID
        self.folder.mkdir()
        self.files = SerialLogFiles(folder, lambda: self.now_s)

    def write(self, text: str, took_s: float = 10.0) -> None:
        self.now_s += took_s
        with (self.folder / "console.log").open("ab") as file:
            file.write(text.encode())
        os.utime(self.folder / "console.log", (self.now_s, self.now_s))

    async def keep(self) -> None:
        self.now_s += 1
        await self.files.keep(10)

    async def read(self, since_s: float = 0.0) -> str:
        return b"".join([data async for data in self.files.read(UID, since_s, 10)]).decode()


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    made = Log(tmp_path)
    yield made
    made.files.close()


async def test_what_was_written_since_a_time_and_nothing_where_nothing_is(log: Log) -> None:
    assert await log.read() == ""
    await log.keep()
    log.write("one\n")
    await log.keep()
    between_s = log.now_s + 5
    log.write("two\n")
    await log.keep()
    await log.keep()
    assert len(read_marks(log.folder)) == 2, "a mark is made only where something was written"
    assert await log.read() == "one\ntwo\n"
    assert await log.read(between_s) == "two\n"
    assert await log.read(log.now_s + 1) == ""


async def test_after_an_agent_was_away_it_begins_earlier_and_never_later(log: Log) -> None:
    log.write("one\n")
    await log.keep()
    log.write("two\n")  # nobody marks it
    since_s = log.now_s + 1
    log.write("three\n")
    assert await log.read(since_s) == "two\nthree\n"
    log.files.close()
    log.files = SerialLogFiles(log.folder.parent, lambda: log.now_s)
    await log.keep()
    assert await log.read(since_s) == "two\nthree\n"


async def test_a_log_that_virtlogd_renames_keeps_its_times(log: Log) -> None:
    log.write("one\n")
    await log.keep()
    since_s = log.now_s + 5
    log.write("two\n")
    (log.folder / "console.log").rename(log.folder / "console.log.0")
    log.write("three\n")
    await log.keep()
    assert await log.read() == "one\ntwo\nthree\n"
    assert await log.read(since_s) == "two\nthree\n"


async def test_a_log_that_nobody_bounds_is_turned(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seriallog, "TURN_BYTES", 1000)
    held = (log.folder / "console.log").open("ab")  # its writer never lets go of it
    try:
        for number in range(20):
            held.write(f"{number:03d} {'x' * 296}\n".encode())
            held.flush()
            os.utime(log.folder / "console.log", (log.now_s, log.now_s))
            await log.keep()
        sizes = [path.stat().st_size for path in log.folder.glob("console.log*")]
        assert len(sizes) <= 1 + MAX_OLDER
        assert max(sizes) <= 1000 + 301
        kept = [int(line[:3]) for line in (await log.read()).splitlines()]
        assert kept == list(range(kept[0], 20)), "in order, and nothing but the oldest is gone"
        assert len(kept) >= 8
    finally:
        held.close()


async def test_what_is_old_goes(log: Log) -> None:
    log.write("ancient\n")
    await log.keep()
    turn(log.folder, log.now_s)
    os.utime(log.folder / "console.log.0", (log.now_s, log.now_s))
    log.write("old\n")
    await log.keep()
    log.now_s += MAX_AGE_S
    log.write("new\n")
    await log.keep()
    assert "ancient" not in await log.read()
    assert "new" in await log.read()
    log.now_s += MAX_AGE_S + 60
    await log.keep()
    await log.keep()
    assert await log.read() == ""


async def test_marks_that_are_damaged_cost_only_themselves(log: Log) -> None:
    log.write("one\n")
    await log.keep()
    with (log.folder / "console.marks").open("a") as file:
        file.write("garbage\n12 x 3\n1.5")
    assert len(read_marks(log.folder)) == 1
    assert await log.read() == "one\n"
    assert parts(log.folder, 0.0) == [(log.folder / "console.log", 0)]
