"""One guest behind the door of ``ports.Guests``, simulated or real: what the contract suite of guests is run on.

The real one is the helper that runs in guests, as a process in a folder, and the host's end of its channel; podman and
crun are played by ``fake_podman.py``, systemctl by a script that ends the helper as a power-off would.
"""

import asyncio
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from casemate_agent.drivers.guest import GuestChannels
from casemate_agent.drivers.ports import (
    ExecRequest,
    GuestEvent,
    GuestHello,
    GuestNote,
    GuestPods,
    Guests,
    LogRecord,
)
from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_agent.guest import archive
from casemate_core.spec.instance import ContainerState, PodState
from casemate_core.topology_loaders import from_line
from support import fake_podman
from support.agents import IMAGE, instance, uid

FAKE = Path(__file__).parent / "fake_podman.py"
WITHIN_S = 60.0
T = TypeVar("T")


def pod(name: str, *command: str, policy: str = "Always", containers: tuple[str, ...] = ("app",)) -> dict[str, Any]:
    """A v1 Pod whose containers all run ``command``."""
    made = [{"name": c, "image": "localhost/app:1", "command": list(command)} for c in containers]
    spec = {"restartPolicy": policy, "terminationGracePeriodSeconds": 1, "containers": made}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


class GuestBench(ABC):
    """A guest that runs, and the agent's end of its channel. ``seen`` is all that the port told."""

    uid = uid(1)
    path = ""
    guests: Guests

    def __init__(self) -> None:
        self.seen: list[GuestEvent] = []
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @abstractmethod
    def _new_guests(self) -> Guests:
        """What a new process of the agent holds."""

    @abstractmethod
    async def _let_go(self) -> None:
        """The agent's process ends."""

    @abstractmethod
    async def kill(self, pod_name: str, container: str = "app") -> None:
        """Kill a container's process within the guest."""

    @abstractmethod
    async def off(self) -> None:
        """Wait until the guest is off."""

    async def start_agent(self) -> None:
        """A new agent, attached to the guest, which has said hello and told its pods."""
        await self.end_agent()
        self.seen.clear()
        self.guests = self._new_guests()
        self._reader = asyncio.create_task(self._read(), name="reader of guest events")
        await self.guests.attach(self.uid, self.path)
        await self.until(lambda: self.last(GuestHello) and self.last(GuestPods))

    async def end_agent(self) -> None:
        """The agent ends; the guest goes on."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None
            await self._let_go()

    async def _read(self) -> None:
        async for event in self.guests.events():
            self.seen.append(event)
            self._news.set()

    async def until(self, question: Callable[[], T]) -> T:
        """Wait for news until the question has a true answer."""
        async with asyncio.timeout(WITHIN_S):
            while not (answer := question()):
                self._news.clear()
                await self._news.wait()
        return answer

    def last(self, kind: type[T]) -> T | None:
        return next((event for event in reversed(self.seen) if isinstance(event, kind)), None)

    @property
    def pods(self) -> GuestPods:
        found = self.last(GuestPods)
        assert found is not None
        return found

    def pod(self, name: str) -> PodState | None:
        return next((p for p in self.pods.pods if p.name == name), None)

    def container(self, pod_name: str, name: str = "app") -> ContainerState:
        found = self.pod(pod_name)
        assert found is not None
        return next(c for c in found.containers if c.name == name)

    def notes(self, reason: str) -> list[GuestNote]:
        return [event for event in self.seen if isinstance(event, GuestNote) and event.reason == reason]

    async def apply(self, revision: str, *pods: dict[str, Any]) -> None:
        await self.guests.apply(self.uid, pods, 0, revision, {}, WITHIN_S)

    async def ready(self, name: str) -> PodState:
        found = await self.until(lambda: (p := self.pod(name)) and p.ready and p)
        assert found
        return found

    def logs(self, pod_name: str, container: str = "", **how: Any) -> AsyncIterator[LogRecord]:
        options = {"follow": False, "tail": -1, "since_s": 0.0} | how
        return self.guests.logs(self.uid, pod_name, container, **options)

    async def lines(self, pod_name: str, container: str = "", count: int = 0, **how: Any) -> list[LogRecord]:
        """Lines of a log to its end, or the first ``count`` of them."""
        found = []
        async with asyncio.timeout(WITHIN_S), aclosing(self.logs(pod_name, container, **how)) as lines:  # type: ignore[type-var]
            async for line in lines:
                found.append(line)
                if len(found) == count:
                    break
        return found

    async def run(self, *argv: str, stdin: bytes | None = None, **fields: Any) -> tuple[int | None, bytes, bytes]:
        """A command to its end: exit code, output, errors."""
        session = await self.guests.exec(self.uid, ExecRequest(argv, **fields), WITHIN_S)
        if stdin is not None:
            await session.stdin(stdin)
        await session.close_stdin()
        out = {"stdout": b"", "stderr": b""}
        async with asyncio.timeout(WITHIN_S):
            async for name, data in session.output():
                out[name] += data
        await session.close()
        return session.exit_code, out["stdout"], out["stderr"]


class SimulatedGuestBench(GuestBench):
    """A guest of a simulated host."""

    def __init__(self) -> None:
        super().__init__()
        pace = SimulatedPace(call_s=0.0, fetch_s=0.0, boot_s=0.02, pod_start_s=0.02, power_off_s=0.02)
        now = asyncio.get_running_loop().time
        self.host = SimulatedHost("box", from_line("1s 4k/c 2t 16G"), lambda: 1e9 + now(), pace)

    async def boot(self) -> None:
        drivers = self.host.drivers()
        desired = instance(1, nics=())
        await drivers.images.fetch(IMAGE, 1)
        await drivers.images.create_overlay(self.uid, IMAGE, 100, 1)
        await drivers.images.write_seed(desired, 1)
        await drivers.hypervisor.define(desired, drivers.images.files(desired), 1)
        await drivers.hypervisor.start(self.uid, 1)
        self.path = (await drivers.hypervisor.domains(1))[0].channel_path

    def _new_guests(self) -> Guests:
        return self.host.drivers().guests

    async def _let_go(self) -> None:
        self.host.sever()

    async def kill(self, pod_name: str, container: str = "app") -> None:
        guest = self.host.domains[self.uid].guest
        assert guest is not None
        guest.kill(pod_name, container)

    async def off(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            while self.host.domains[self.uid].facts.pid:
                await asyncio.sleep(0.01)


class RealGuestBench(GuestBench):
    """The real helper as a process; ``root`` stands for its guest."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.path = str(root / "guest.sock")
        self.process: asyncio.subprocess.Process | None = None
        self.command: list[str] = []

    async def boot(self) -> None:
        programs = self.root / "bin"
        programs.mkdir(exist_ok=True)
        tools = []
        for name in ("podman", "crun"):
            self._program(name, f'exec {sys.executable} {FAKE} {self.root} {name} "$@"')
            tools.append(f"{name}={programs / name}")
        # Before the machine's own in PATH: it must never be asked to power off. At first it is not there yet, as in a
        # guest that boots: the helper asks again.
        early = f'test -e {self.root}/early || {{ touch {self.root}/early; echo "Host is down" >&2; exit 1; }}'
        self._program("systemctl", f'{early}; echo "$@" > {self.root}/power; kill -TERM "$PPID"')
        (programs / "casemate_guest.py").write_bytes(archive.helper())
        self.command = [
            sys.executable,
            "-I",
            "-S",
            "-E",
            str(programs / "casemate_guest.py"),
            f"root={self.root}",
            f"socket={self.path}",
            *tools,
        ]
        await self._start_helper()

    async def _start_helper(self) -> None:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        self.process = await asyncio.create_subprocess_exec(*self.command, env={"PATH": path})

    async def restart_helper(self) -> None:
        """Kill the helper, start another, and attach to that."""
        assert self.process is not None
        await self.end_agent()
        self.process.kill()
        await self.process.wait()
        await self._start_helper()
        await self.start_agent()

    def _program(self, name: str, line: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def _new_guests(self) -> Guests:
        return GuestChannels()

    async def _let_go(self) -> None:
        assert isinstance(self.guests, GuestChannels)
        await self.guests.close()

    async def kill(self, pod_name: str, container: str = "app") -> None:
        for folder in fake_podman.folders(self.root):
            if fake_podman.facts_of(folder)["Name"] == f"{pod_name}-{container}":
                os.kill(int((folder / "pid").read_text()), signal.SIGKILL)

    async def off(self) -> None:
        assert self.process is not None
        async with asyncio.timeout(WITHIN_S):
            assert await self.process.wait() == 0
        assert (self.root / "power").read_text() == "poweroff\n"

    async def close(self) -> None:
        """End the helper and all its containers."""
        await self.end_agent()
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()
        for name in {fake_podman.facts_of(folder)["Pod"] for folder in fake_podman.folders(self.root)} - {""}:
            words = ["pod", "rm", "--force", "--ignore", "--time", "0", name]
            await (await asyncio.create_subprocess_exec(sys.executable, FAKE, self.root, "podman", *words)).wait()


@asynccontextmanager
async def guest_bench(kind: str, folder: Path) -> AsyncIterator[GuestBench]:
    """A guest that has booted, with an agent attached. ``kind``: simulated or real."""
    if kind == "simulated":
        simulated = SimulatedGuestBench()
        await simulated.boot()
        await simulated.start_agent()
        try:
            yield simulated
        finally:
            await simulated.end_agent()
        return
    real = RealGuestBench(folder)
    try:
        await real.boot()
        await real.start_agent()
        yield real
    finally:
        await real.close()
