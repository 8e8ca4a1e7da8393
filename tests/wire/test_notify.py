"""What systemd hears: readiness, an end, and a watchdog that is fed by progress alone."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate_wire.notify import Notifier
from support.virtual import VirtualLoop, run_virtual


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.setblocking(False)
        yield supervisor


def words(heard: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(heard.recv(4096).decode())
        except BlockingIOError:
            return found


def test_ready_and_stopping_are_told(heard: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": heard.getsockname()})
    notifier.ready("epoch 3")
    notifier.stopping()
    assert words(heard) == ["READY=1\nSTATUS=epoch 3", "STOPPING=1"]


def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("")  # the kernel picks a name
        supervisor.setblocking(False)
        Notifier({"NOTIFY_SOCKET": "@" + supervisor.getsockname()[1:].decode()}).ready()
        assert words(supervisor) == ["READY=1"]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/nonexistent/socket", "WATCHDOG_USEC": "1000000"}])
def test_without_a_supervisor_nothing_fails(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready()
    notifier.stopping()


def test_the_watchdog_is_fed_while_there_is_progress_and_not_longer(heard: socket.socket) -> None:
    async def main(loop: VirtualLoop) -> None:
        notifier = Notifier({"NOTIFY_SOCKET": heard.getsockname(), "WATCHDOG_USEC": "40000000"})
        rounds = 0
        feeding = asyncio.ensure_future(notifier.feed(lambda: rounds))
        for _ in range(10):
            rounds += 1
            await asyncio.sleep(10.0)
        assert 9 <= len(words(heard)) <= 11
        await asyncio.sleep(1.0)
        words(heard)
        await asyncio.sleep(400.0)  # it hangs
        assert words(heard) == []
        rounds += 1
        await asyncio.sleep(10.0)
        assert words(heard) == ["WATCHDOG=1"]
        feeding.cancel()

    run_virtual(main)


def test_a_watchdog_of_another_process_is_not_fed(heard: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": heard.getsockname(), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Notifier(environ).watchdog_s == 0.0
