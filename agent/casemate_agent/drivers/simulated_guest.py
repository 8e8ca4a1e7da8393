"""The inside of a simulated VM: its helper, its pods, their logs, and a handful of commands.

What may live here: what a guest does by itself, in memory. The host around it is :mod:`casemate_agent.drivers.simulated`.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from casemate_agent.drivers.ports import (
    UNKNOWN,
    ExecRequest,
    GuestEvent,
    GuestHello,
    GuestNote,
    GuestPods,
    GuestRefused,
    LogRecord,
)
from casemate_agent.drivers.sideports import CopyRequest
from casemate_agent.drivers.simulated_side import (
    BANNER,
    SSH_PORT,
    SimulatedConsole,
    SimulatedCopy,
    SimulatedFiles,
    SimulatedTunnel,
)
from casemate_agent.guest.casemate_guest.containers import BACKOFF_FORGET_S, backoff, restarts_after
from casemate_core.spec.instance import ContainerState, PodState

#: Lines kept of each container's log.
KEPT_LINES = 1000

PROGRAMS = ("echo", "cat", "true", "false", "sleep", "uname", "cyclictest", "nvidia-smi")
"""Commands that a simulated guest knows."""
SIMULATED_LATENCY = b"""# Histogram
000000 000100
# Total: 000000100
# Min Latencies: 00000
# Avg Latencies: 00000
# Max Latencies: 00000
# Histogram Overflows: 00000
"""


@dataclass(slots=True)
class SimulatedLog:
    """The log of one container: the last lines, and who follows it. ``starts`` are the counts at which it was started."""

    name: str = ""
    starts: list[int] = field(default_factory=list)

    lines: deque[LogRecord] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    count: int = 0
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def add(self, time_s: float, pod: str, container: str, text: str, stream: str = "stdout") -> None:
        self.count += 1
        self.lines.append(LogRecord(time_s, pod, container, self.count, text, stream, log=self.name))
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()


def _pending(name: str, manifest: Mapping[str, Any]) -> PodState:
    containers = manifest["spec"]["containers"]
    return PodState(
        name,
        "Pending",
        containers=tuple(
            ContainerState(str(c["name"]), str(c["image"]), "waiting", reason="ContainerCreating") for c in containers
        ),
    )


def _program(container: Mapping[str, Any]) -> tuple[list[str], float | None, int]:
    """What a container does: the lines it writes, the seconds until it ends by itself (None: never), its exit code."""
    words = [str(word) for word in (*container.get("command", ()), *container.get("args", ()))]
    program = words[0].rsplit("/", 1)[-1] if words else ""
    match program:
        case "true" | "false":
            return [], 0.0, 0 if program == "true" else 1
        case "echo":
            return [" ".join(words[1:])], 0.0, 0
        case "sleep" if len(words) == 2 and words[1].isdecimal():
            return [], float(words[1]), 0
    return [f"{container['name']} started"], None, 0


def _pinging(container: Mapping[str, Any]) -> float | None:
    """Seconds between the lines of ``ping -i SECONDS HOST``; None for another program."""
    match [str(word) for word in (*container.get("command", ()), *container.get("args", ()))]:
        case [program, "-i", seconds, _] if program.rsplit("/", 1)[-1] == "ping":
            return max(0.001, float(seconds))
    return None


class SimulatedGuest:
    """One boot of a guest. ``later(seconds, call)`` is the machine's timer, ``push`` takes what the helper says.

    Containers run the few programs that a simulation needs, named by their manifest's ``command``: ``true``, ``false``,
    ``echo`` and ``sleep`` do what they say and end; ``ping -i SECONDS HOST`` writes a numbered line that often; all others
    run until they are stopped. Their ends, restarts and back-off follow the rules of the real helper, which are called here.
    """

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
        #: Its kernel has begun.
        self.kernel = False
        self.booted = False
        self.revision = ""
        self.pods: tuple[PodState, ...] = ()
        self.logs: dict[tuple[str, str], SimulatedLog] = {}
        self._logs_made = 0
        self._now = now
        self._later = later
        self._push = push
        self._pod_start_s = pod_start_s
        self._ended = False
        self._manifests: dict[str, Mapping[str, Any]] = {}
        #: Pod -> number of its present play: what an earlier one still had to do is void.
        self._plays: dict[str, int] = {}
        #: Failures in a row, and runs, of each container; those that are about to be started again.
        self._failures: Counter[tuple[str, str]] = Counter()
        self._runs: Counter[tuple[str, str]] = Counter()
        self._again: set[tuple[str, str]] = set()
        self.console = SimulatedConsole(uid[:8])
        #: Trees of files by pod and container; of the guest itself where both are empty.
        self._files: dict[tuple[str, str], SimulatedFiles] = {}
        self.authorized: list[str] = []

    def kernel_up(self) -> None:
        """Its kernel begins, and looks at the disks."""
        self.kernel = True

    def up(self) -> None:
        """The helper runs."""
        if not self._ended:
            self.booted = True
            self.announce()

    def moved(self, push: Callable[[GuestEvent], None]) -> None:
        """It goes on at another host, which takes what its helper says."""
        self._push = push

    def end(self) -> None:
        """The guest is off: nothing of it happens any more."""
        self._ended = True
        self.booted = False
        self.console.end()
        for log in self.logs.values():
            log.end()

    def dial(self, pod: str, port: int) -> SimulatedTunnel:
        """A connection: to a port that a container of the pod (or of any, for the guest itself) names, or to SSH."""
        chosen = [m for name, m in self._manifests.items() if not pod or name == pod]
        if pod and not chosen:
            raise GuestRefused(f"no pod {pod}")
        named = {int(p["containerPort"]) for m in chosen for c in m["spec"]["containers"] for p in c.get("ports", ())}
        if not pod and port == SSH_PORT:
            return SimulatedTunnel(BANNER)
        if port not in named:
            raise GuestRefused(f"port {port}: Connection refused")
        return SimulatedTunnel()

    def copy(self, request: CopyRequest) -> SimulatedCopy:
        """Files of a container that runs, or of the guest itself."""
        key = ("", "")
        if request.pod:
            found = self.find(request.pod, request.container)
            if found.state != "running":
                raise GuestRefused(f"container {found.name} is {found.state}")
            key = (request.pod, found.name)
        return SimulatedCopy(request, lambda: self._files.setdefault(key, SimulatedFiles()))

    def announce(self) -> None:
        """What the helper says to whoever connects: hello, then the pods as they are."""
        if self.booted:
            self._push(GuestHello(self.uid, self.boot_id, "simulated", "done"))
            self._push(GuestPods(self.uid, self.pods, self.revision))

    def apply(self, manifests: tuple[Mapping[str, Any], ...], revision: str) -> None:
        """Make these the pods; those whose manifest is the same by name go on as they are. Raises GuestRefused."""
        names = [str(manifest["metadata"]["name"]) for manifest in manifests]
        if len(set(names)) != len(names):
            raise GuestRefused("apply: pods need names of their own")
        if revision == self.revision:
            return
        self.revision = revision
        wanted = dict(zip(names, manifests, strict=True))
        for name in set(self._manifests) - {n for n, m in wanted.items() if self._manifests.get(n) == m}:
            self._remove(name)
        kept = {pod.name: pod for pod in self.pods if pod.name in self._manifests}
        fresh = [name for name in names if name not in kept]
        for name in fresh:
            kept[name] = _pending(name, wanted[name])
            self._plays[name] = self._plays.get(name, 0) + 1
        self._manifests = wanted
        self.pods = tuple(kept[name] for name in names)
        self._push(GuestPods(self.uid, self.pods, self.revision))
        for name in fresh:
            self._later(self._pod_start_s, partial(self._play, name, self._plays[name]))

    def _remove(self, name: str) -> None:
        for container in self._manifests.pop(name)["spec"]["containers"]:
            key = (name, str(container["name"]))
            self._failures.pop(key, None)
            self._again.discard(key)
            if (log := self.logs.pop(key, None)) is not None:
                log.end()
        self._plays[name] += 1

    def _play(self, name: str, play: int) -> None:
        if self._ended or self._plays.get(name) != play:
            return
        for container in self._manifests[name]["spec"]["containers"]:
            self._start(name, play, container, restart=False)

    def _start(self, pod: str, play: int, container: Mapping[str, Any], *, restart: bool) -> None:
        name = str(container["name"])
        key = (pod, name)
        if self._ended or self._plays.get(pod) != play or (restart and key not in self._again):
            return
        self._again.discard(key)
        self._runs[key] += 1
        old = self._container(pod, name)
        now_s = self._now()
        restarts = old.restarts + 1 if restart else 0
        self._set(
            pod, replace(old, state="running", reason="", message="", ready=True, started_s=now_s, restarts=restarts)
        )
        if restart:
            self._note(pod, name, "ContainerRestarted", f"restart {restarts}")
        lines, lasts_s, code = _program(container)
        self.log(pod, name).starts.append(self.log(pod, name).count)
        if (every_s := _pinging(container)) is not None:
            self._later(every_s, partial(self._ping, pod, name, play, self._runs[key], every_s, 1))
        for line in lines:
            self.log(pod, name).add(now_s, pod, name, line)
        if lasts_s is not None:
            run = self._runs[key]
            self._later(lasts_s, lambda: self._exit(pod, name, play, run, code))

    def _ping(self, pod: str, name: str, play: int, run: int, every_s: float, number: int) -> None:
        """A line now, and the next one later, for as long as this run of the container lasts."""
        if self._ended or self._plays.get(pod) != play or self._runs[(pod, name)] != run:
            return
        if self._container(pod, name).state == "running":
            self.log(pod, name).add(self._now(), pod, name, f"seq={number}")
            self._later(every_s, partial(self._ping, pod, name, play, run, every_s, number + 1))

    def kill(self, pod: str, container: str, code: int = 137) -> None:
        """The container's process is killed within the guest."""
        self._exit(pod, container, self._plays[pod], self._runs[(pod, container)], code)

    def _exit(self, pod: str, name: str, play: int, run: int, code: int) -> None:
        key = (pod, name)
        if self._ended or self._plays.get(pod) != play or self._runs[key] != run:
            return
        old, now_s, spec = self._container(pod, name), self._now(), self._manifests[pod]["spec"]
        if old.state != "running":
            return
        self._failures[key] = 1 if now_s - old.started_s > BACKOFF_FORGET_S else self._failures[key] + 1
        last = "Completed" if code == 0 else "Error"
        state, reason, message = "terminated", last, ""
        if restarts_after(str(spec.get("restartPolicy", "Always")), code):
            self._again.add(key)
            delay_s = backoff(self._failures[key])
            if delay_s:
                state, reason = "waiting", "CrashLoopBackOff"
                message = f"{last} with exit code {code}; next start in {delay_s:.0f} s"
            container = next(c for c in spec["containers"] if c["name"] == name)
            self._later(max(delay_s, 0.001), partial(self._start, pod, play, container, restart=True))
        else:
            self.log(pod, name).end()
        self._set(
            pod,
            replace(old, state=state, reason=reason, message=message, ready=False, exit_code=code, finished_s=now_s),
        )
        severity = "Normal" if code == 0 else "Warning"
        self._note(pod, name, "ContainerExited", f"{last} with exit code {code}", severity)

    def _container(self, pod: str, name: str) -> ContainerState:
        return next(c for p in self.pods if p.name == pod for c in p.containers if c.name == name)

    def _set(self, pod: str, changed: ContainerState) -> None:
        """Put a container's state in place, and the pod's that follows from all of them; say so."""
        self.pods = tuple(self._with(p, changed) if p.name == pod else p for p in self.pods)
        self._push(GuestPods(self.uid, self.pods, self.revision))

    def _with(self, pod: PodState, changed: ContainerState) -> PodState:
        containers = tuple(changed if c.name == changed.name else c for c in pod.containers)
        over = all(c.state == "terminated" and (pod.name, c.name) not in self._again for c in containers)
        if not all(c.started_s for c in containers):
            phase = "Pending"
        elif over:
            phase = "Succeeded" if all(c.exit_code == 0 for c in containers) else "Failed"
        else:
            phase = "Running"
        ready = phase == "Running" and all(c.ready for c in containers)
        return replace(
            pod, phase=phase, ready=ready, started_s=pod.started_s or changed.started_s, containers=containers
        )

    def _note(self, pod: str, container: str, reason: str, message: str, severity: str = "Normal") -> None:
        self._push(GuestNote(self.uid, pod, reason, f"{container}: {message}", severity, self._now()))

    def find(self, pod: str, container: str) -> ContainerState:
        """A container by name; the only one where no name is given. Raises GuestRefused."""
        found = {c.name: c for p in self.pods if p.name == pod for c in p.containers}
        if not found:
            raise GuestRefused(f"no pod {pod}")
        if not container and len(found) == 1:
            return next(iter(found.values()))
        if container not in found:
            raise GuestRefused(f"pod {pod} has no container {container}, but {', '.join(found)}")
        return found[container]

    def log(self, pod: str, container: str) -> SimulatedLog:
        if (pod, container) not in self.logs:
            self._logs_made += 1
            self.logs[(pod, container)] = SimulatedLog(f"{self.boot_id[:8]}-{self._logs_made}")
        return self.logs[(pod, container)]

    async def follow(
        self,
        pod: str,
        container: str,
        *,
        follow: bool,
        tail: int,
        since_s: float,
        after_sequence: int,
        of: str = "",
        previous: bool = False,
    ) -> AsyncIterator[LogRecord]:
        """Lines of a container, then the new ones while it is followed. See `ports.Guests.logs`; ``of`` is its ``log``."""
        log = self.log(pod, container)
        if previous:
            if len(log.starts) < 2:
                raise GuestRefused(f"container {container} was started once: there is no earlier run")
            begin, end = log.starts[-2:]
            chosen = [line for line in log.lines if begin < line.sequence <= end and line.time_s >= since_s]
            for line in chosen[len(chosen) - min(tail, len(chosen)) :] if tail >= 0 else chosen:
                yield line
            return
        anew = bool(of) and of != log.name
        last = 0 if anew else after_sequence
        first = True
        while True:
            grown = log.grown
            lines = [line for line in log.lines if line.sequence > last and line.time_s >= since_s]
            if first and tail >= 0:
                lines = lines[len(lines) - min(tail, len(lines)) :]
            for line in lines:
                lost = line.sequence - last - 1 if last and line.sequence > last + 1 else 0
                last = line.sequence
                yield replace(line, lost=UNKNOWN if anew else lost)
                anew = False
            first = False
            if not follow or log.ended:
                return
            await grown.wait()


class SimulatedExec:
    """A command in a simulated container: ``echo``, ``cat``, ``true``, ``false``, ``sleep``; any other is not found. In the guest
    itself there are ``uname`` and ``cyclictest`` too, which takes its time and measures nothing."""

    def __init__(self, request: ExecRequest, gpus: bytes = b"") -> None:
        self._request = request
        self._gpus = gpus
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
            case "uname":
                yield "stdout", b"simulated\n"
                self._exit_code = 0
            case "cyclictest":
                await self._sleep(next(float(a.partition("=")[2]) for a in arguments if a.startswith("--duration=")))
                yield "stdout", SIMULATED_LATENCY
                self._exit_code = self._ended()
            case "nvidia-smi":
                yield "stdout", self._gpus
                self._exit_code = 0
            case "cat" if arguments:
                yield "stdout", b"0.00 0.00 0.00 1/1 1\n"
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
                await self._sleep(float(arguments[0]) if arguments else 0.0)
                self._exit_code = self._ended()
            case other:
                yield "stderr", f"executable file `{other}` not found in a simulated container\n".encode()
                self._exit_code = 127

    async def _sleep(self, time_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(time_s):
                await self._killed.wait()

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
