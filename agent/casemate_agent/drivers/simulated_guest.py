"""The inside of a simulated VM: its helper, its pods, their logs, and a handful of commands.

What may live here: what a guest does by itself, in memory. The host around it is :mod:`casemate_agent.drivers.simulated`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from casemate_agent.drivers.ports import ExecRequest, GuestEvent, GuestHello, GuestPods, LogRecord
from casemate_core.spec.instance import ContainerState, PodState

#: Lines kept of each container's log.
KEPT_LINES = 1000


@dataclass(slots=True)
class SimulatedLog:
    """The log of one container: the last lines, and who follows it."""

    lines: deque[LogRecord] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    count: int = 0
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def add(self, time_s: float, pod: str, container: str, text: str, stream: str = "stdout") -> None:
        self.count += 1
        self.lines.append(LogRecord(time_s, pod, container, self.count, text, stream))
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()


class SimulatedGuest:
    """One boot of a guest. ``later(seconds, call)`` is the machine's timer, ``push`` takes what the helper says."""

    def __init__(
        self,
        uid: str,
        boot_id: str,
        now: Callable[[], float],
        later: Callable[[float, Callable[[], None]], None],
        push: Callable[[GuestEvent], None],
        pod_start_s: float,
    ) -> None:
        self.uid = uid
        self.boot_id = boot_id
        self.booted = False
        self.revision = ""
        self.pods: tuple[PodState, ...] = ()
        self.logs: dict[tuple[str, str], SimulatedLog] = {}
        self._now = now
        self._later = later
        self._push = push
        self._pod_start_s = pod_start_s
        self._ended = False

    def up(self) -> None:
        """The helper runs."""
        if not self._ended:
            self.booted = True
            self.announce()

    def end(self) -> None:
        """The guest is off: nothing of it happens any more."""
        self._ended = True
        self.booted = False
        for log in self.logs.values():
            log.end()

    def announce(self) -> None:
        """What the helper says to whoever connects: hello, then the pods as they are."""
        if self.booted:
            self._push(GuestHello(self.uid, self.boot_id, "simulated", "done"))
            self._push(GuestPods(self.uid, self.pods, self.revision))

    def apply(self, manifests: tuple[Mapping[str, Any], ...], revision: str) -> None:
        """Make these the pods; those whose manifest is the same by name go on as they are."""
        if revision == self.revision:
            return
        self.revision = revision
        kept = {pod.name: pod for pod in self.pods}
        pods = []
        for manifest in manifests:
            name = str(manifest["metadata"]["name"])
            containers = manifest["spec"]["containers"]
            fresh = PodState(
                name,
                "Pending",
                containers=tuple(ContainerState(str(c["name"]), str(c["image"]), "waiting") for c in containers),
            )
            old = kept.get(name)
            same = old is not None and [(c.name, c.image) for c in old.containers] == [
                (c.name, c.image) for c in fresh.containers
            ]
            pods.append(old if same and old is not None else fresh)
        self.pods = tuple(pods)
        self._push(GuestPods(self.uid, self.pods, self.revision))
        self._later(self._pod_start_s, lambda: self._pods_run(revision))

    def _pods_run(self, revision: str) -> None:
        if self._ended or revision != self.revision:
            return
        now_s = self._now()
        pods = []
        for pod in self.pods:
            if pod.ready:
                pods.append(pod)
                continue
            running = tuple(replace(c, state="running", ready=True, started_s=now_s) for c in pod.containers)
            pods.append(replace(pod, phase="Running", ready=True, started_s=now_s, containers=running))
            for container in running:
                self.log(pod.name, container.name).add(now_s, pod.name, container.name, f"{container.name} started")
        self.pods = tuple(pods)
        self._push(GuestPods(self.uid, self.pods, self.revision))

    def log(self, pod: str, container: str) -> SimulatedLog:
        return self.logs.setdefault((pod, container), SimulatedLog())

    async def follow(
        self, pod: str, container: str, *, follow: bool, tail: int, since_s: float, after_sequence: int
    ) -> AsyncIterator[LogRecord]:
        """Lines of a container, then the new ones while it is followed. ``tail`` below 0: all that are kept."""
        log = self.log(pod, container)
        last = after_sequence
        first = True
        while True:
            grown = log.grown
            lines = [line for line in log.lines if line.sequence > last and line.time_s >= since_s]
            if first and tail >= 0:
                lines = lines[len(lines) - min(tail, len(lines)) :]
            for line in lines:
                lost = line.sequence - last - 1 if last and line.sequence > last + 1 else 0
                last = line.sequence
                yield replace(line, lost=lost)
            first = False
            if not follow or log.ended:
                return
            await grown.wait()


class SimulatedExec:
    """A command in a simulated container: ``echo``, ``cat``, ``true``, ``false``, ``sleep``; any other is not found."""

    def __init__(self, request: ExecRequest) -> None:
        self._request = request
        self._stdin: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._killed = asyncio.Event()
        self._signal = 0
        self._exit_code: int | None = None

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        program, *arguments = self._request.argv
        match program.rsplit("/", 1)[-1]:
            case "echo":
                yield "stdout", (" ".join(arguments) + "\n").encode()
                self._exit_code = 0
            case "cat":
                while (data := await self._next_input()) is not None:
                    yield "stdout", data
                self._exit_code = self._ended()
            case "true":
                self._exit_code = 0
            case "false":
                self._exit_code = 1
            case "sleep":
                try:
                    async with asyncio.timeout(float(arguments[0]) if arguments else 0.0):
                        await self._killed.wait()
                except TimeoutError:
                    pass
                self._exit_code = self._ended()
            case other:
                yield "stderr", f"{other}: not found in a simulated container\n".encode()
                self._exit_code = 127

    def _ended(self) -> int:
        return 128 + self._signal if self._signal else 0

    async def _next_input(self) -> bytes | None:
        get = asyncio.ensure_future(self._stdin.get())
        killed = asyncio.ensure_future(self._killed.wait())
        try:
            await asyncio.wait({get, killed}, return_when=asyncio.FIRST_COMPLETED)
            return get.result() if get.done() else None
        finally:
            get.cancel()
            killed.cancel()

    async def stdin(self, data: bytes) -> None:
        self._stdin.put_nowait(data)

    async def close_stdin(self) -> None:
        self._stdin.put_nowait(None)

    async def resize(self, rows: int, columns: int) -> None:
        """A simulated terminal has any size."""

    async def signal(self, number: int) -> None:
        self._signal = number
        self._killed.set()

    async def close(self) -> None:
        if self._exit_code is None:
            await self.signal(9)
