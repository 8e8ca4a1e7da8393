"""Processes of a private fleet are found again by identity, and ended."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casemate_cli.dev import processes
from casemate_cli.dev.state import Folder

SLEEPER = [sys.executable, "-c", "import time\nprint('up', flush=True)\ntime.sleep(300)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(300)",
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path / "dev")
    yield folder
    for process in processes.marked(folder):
        processes.end(process, 0)


def until_up(folder: Folder, name: str) -> None:
    give_up_s = time.monotonic() + 10
    while "up" not in processes.tail(folder.log(name)):
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def test_a_process_is_found_again_and_ended(folder: Folder) -> None:
    started = processes.start(folder, "sleeper", SLEEPER)
    until_up(folder, "sleeper")
    assert processes.running(folder, "sleeper") == started
    assert os.getsid(started.pid) == started.pid
    assert processes.end(started, 10)
    assert processes.running(folder, "sleeper") is None
    assert processes.end(started, 10)  # ending what is ended is no error


def test_one_that_will_not_go_is_killed(folder: Folder) -> None:
    started = processes.start(folder, "stubborn", STUBBORN)
    until_up(folder, "stubborn")
    assert not processes.end(started, 0.2)
    assert not processes.alive(started)


def test_a_pid_that_came_again_is_not_ours(folder: Folder) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert bystander.stdin is not None
    try:
        ticks = processes.start_ticks(bystander.pid)
        assert ticks is not None
        ours = processes.Process("old", bystander.pid, ticks - 1, processes.boot_id())
        assert not processes.alive(ours)
        assert processes.end(ours, 0.1)
        assert not processes.alive(replace(ours, start_ticks=ticks, boot_id="another boot"))
        assert bystander.poll() is None
    finally:
        bystander.stdin.close()
        bystander.wait(10)


def test_one_without_a_pid_file_is_found_by_its_mark(folder: Folder) -> None:
    started = processes.start(folder, "lost", SLEEPER)
    until_up(folder, "lost")
    (folder.pids / "lost.json").unlink()
    assert processes.running(folder, "lost") is None
    assert [p.pid for p in processes.marked(folder)] == [started.pid]
    assert processes.marked(Folder(folder.root.with_name("other"))) == []
    processes.end(started, 10)


def test_a_torn_pid_file_is_no_process(folder: Folder) -> None:
    folder.pids.mkdir(parents=True)
    (folder.pids / "x.json").write_text('{"name": "x", "pi')
    assert processes.recorded(folder, "x") is None


def test_the_tail_of_a_log(folder: Folder) -> None:
    folder.logs.mkdir(parents=True)
    folder.log("x").write_text("".join(f"{i}\n" for i in range(10_000)))
    assert processes.tail(folder.log("x"), 3) == ["9997", "9998", "9999"]
    assert processes.tail(folder.log("y")) == []
