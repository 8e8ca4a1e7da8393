"""A manager in a process of its own that kills itself at a step, as if the machine had.

Run as a program: ``python manager_process.py STATE_DIR PORT STEP COUNT``. It serves until the step named STEP (see
``casemate_manager.writer``) happens for the COUNT-th time, and then SIGKILLs itself; COUNT 0: it serves until SIGTERM.
"""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from casemate_manager.app import running
from casemate_manager.store.sqlite import SqliteStore


class ManagerProcess:
    """Starts it, and starts it again."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, step: str = "", count: int = 0) -> None:
        """Start it; returns when it serves, or has killed itself already."""
        argv = [sys.executable, __file__, str(self.state_dir), str(self.port), step, str(count)]
        self._child = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert self._child.stdout is not None
        self._child.stdout.readline()
        self._child.stdout.close()

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def kill(self) -> None:
        """As the machine would."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def stop(self) -> int:
        """End it as an operator does; returns its exit status."""
        assert self._child is not None
        self._child.terminate()
        return self._child.wait(20)


async def _serve(state_dir: Path, port: int, step: str, count: int) -> None:
    seen = 0

    def trace(name: str) -> None:
        nonlocal seen
        seen += name == step
        if count and seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    state_dir.mkdir(parents=True, exist_ok=True)
    async with running(
        SqliteStore(state_dir / "fleet.db"),
        f"127.0.0.1:{port}",
        time.time,
        lambda: secrets.token_hex(8),
        version="test",
        default_subnet="10.99.0.0/16",
        trace=trace,
    ):
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
