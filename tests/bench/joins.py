"""Agents that join, stream and come back, over mutual TLS, on loopback: what one manager admits, and what a stream costs.

    python tests/bench/joins.py [--agents 1000] [--seconds 15] [--rate 300] [--only-back]

A manager runs in a process of its own, started as a person does. The agents are small: the shipped protocol, transport and
identities, each with its own key, certificate and connection, without machines behind them; all of them live in this process,
which is why the manager's figures are given per second of its own CPU too.

1. enrol: each agent makes a key and asks for its certificate by a token of its own.
2. join: all dial at once; a join is done when its whole state is taken. Memory of a host is the manager's growth.
3. deltas: agents tell of changes at a steady rate; from the telling to the acknowledgement, which leaves when the manager's
   state has it (so the way back is included). Then as many as go, for the cost of one: each told when the one before is
   acknowledged, and told without waiting.
4. kill -9 of the manager, and a new one at once: agents come back with full jitter over the window that the manager states.
   Meanwhile an operator asks for the version twenty times a second. Memory of a stream is what this manager has grown by,
   over one that has loaded the same state and has no stream.
   `--only-back` leaves out everything that this does not need, as for ten thousand agents.
5. environments with instances on these hosts: changes of as many instances together as a message carries.

Prints a table, then one line of JSON; exits 0.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from casemate_agent.enrolment.enrol import new_key, request_for
from casemate_agent.enrolment.identity import Identity
from casemate_agent.uplink.link import LONGEST_WINDOW_S, WINDOW_S, inventory_digest
from casemate_agent.uplink.transport import GrpcTransport, Stream
from casemate_core.errors import CasemateError
from casemate_core.spec.instance import DesiredInstance, InstanceState, Phase
from casemate_core.topology_loaders import from_line
from casemate_wire.session import HostEnd, Outbox, Refused
from casemate_wire.stream import Desired, FactsAck, FromHost, Hello, HostReport, Inventory, ToHost, Welcome
from casemate_wire.tls import TARGET_NAME
from casemate_wire.token import parse

TOPOLOGY = from_line("2s 32k/c 2t 256G disk=4T")
DIGEST = inventory_digest(TOPOLOGY)
#: Enrolments in flight: what an operator's script would do.
ENROLLING = 32
#: Changes that an agent tells before it waits for an acknowledgement, where it does not wait for each.
AHEAD = 32
#: Replicas of one environment; an environment for each agent.
ENVIRONMENT = """apiVersion: casemate/v1
kind: Environment
metadata: {name: e@N@}
spec: {cpu: {count: 1}, memory: {size: 64Mi}, image: i, disk: {size: 1Gi}, replicas: @REPLICAS@, virtualisation: any}
"""
IMAGE = """apiVersion: casemate/v1
kind: Image
metadata: {name: i}
spec: {source: "file:///srv/i.img", digest: "sha256:@DIGEST@", format: raw, size: 1Gi}
""".replace("@DIGEST@", "0" * 64)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def running_state(instance: DesiredInstance) -> InstanceState:
    placement = instance.placement
    return InstanceState(
        instance.uid,
        instance.generation,
        Phase.RUNNING,
        starts=1,
        pid=4242,
        placement_epoch=placement.epoch,
        placement_generation=placement.generation,
    )


class Manager:
    """The process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.enrolment = free_port(), free_port()
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", "casemate_manager", "serve", "--state-dir", str(self.folder / "m")]
        argv += ["--listen", f"127.0.0.1:{self.port}", "--listen-enrolment", f"127.0.0.1:{self.enrolment}"]
        with (self.folder / "manager.log").open("ab") as log:
            self._child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, number: int = signal.SIGTERM) -> None:
        if self._child is not None:
            self._child.send_signal(number)
            self._child.wait(60)
            self._child = None

    def apply(self, text: str) -> None:
        """As its operator does."""
        environ = {**os.environ, "CASEMATE_CONFIG": str(self.folder / "operator.yaml")}
        argv = [sys.executable, "-m", "casemate_cli", "apply", "-f", "-"]
        subprocess.run(argv, input=text, text=True, check=True, capture_output=True, timeout=300, env=environ)

    def memory_kb(self) -> float:
        """Memory of its own (RssAnon)."""
        assert self._child is not None
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return float(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

    def cpu_s(self) -> float:
        assert self._child is not None
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def operator(self) -> Any:
        """A channel of the fleet's operator."""
        import grpc.aio
        import yaml

        out = self.folder / "operator.yaml"
        if not out.exists():
            argv = [sys.executable, "-m", "casemate_manager", "operator", "--state-dir", str(self.folder / "m")]
            argv += ["--manager", f"127.0.0.1:{self.port}", "--out", str(out)]
            subprocess.run(argv, check=True, capture_output=True, timeout=60)
        me = yaml.safe_load(out.read_text())["contexts"]["admin"]
        credentials = grpc.ssl_channel_credentials(me["roots"].encode(), me["key"].encode(), me["certificate"].encode())
        self.roots = me["roots"]
        options = [TARGET_NAME, ("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 50)]
        return grpc.aio.secure_channel(me["manager"], credentials, options=options)


class Agent:
    """The protocol of one host, and when it dials: as casemate_agent.uplink.link does."""

    def __init__(self, identity: Identity, random: Random) -> None:
        self.identity = identity
        self.joined = asyncio.Event()
        self.counter = 0
        #: When the facts that wait for their acknowledgement were told, and how many changes they carry.
        self.told: deque[tuple[float, int]] = deque()
        #: Instances that the manager wants here, by uid.
        self.wanted: dict[str, InstanceState] = {}
        self.took_ms: list[float] = []
        self.acked = 0
        self._random = random
        self._window_s = WINDOW_S
        self._failures = 0
        self._end: HostEnd | None = None
        self._acked_to = 0
        self._waiting: tuple[FromHost, ...] = ()
        self._woken = asyncio.Event()
        self._transport = GrpcTransport(identity.manager, self._current)

    async def _current(self) -> Identity:
        return self.identity

    async def run(self) -> None:
        try:
            while True:
                stream = None
                try:
                    stream = await self._transport.session()
                    refused = await self._converse(stream)
                    if refused is not None and refused.retry_after_s < 0:
                        raise SystemExit(f"{self.identity.host} is refused: {refused.message}")
                    wait_s = self._random.uniform(0, self._window_s) + (refused.retry_after_s if refused else 0)
                except CasemateError:
                    window_s = max(
                        self._window_s, min(LONGEST_WINDOW_S, self._window_s * 2.0 ** min(self._failures, 8))
                    )
                    wait_s = self._random.uniform(0, window_s)
                    self._failures += 1
                finally:
                    self.joined.clear()
                    self._end = None
                    self.told.clear()
                    if stream is not None:
                        await stream.close()
                await asyncio.sleep(wait_s)
        finally:
            await self._transport.close()

    async def _converse(self, stream: Stream[FromHost, ToHost]) -> Refused | None:
        self.counter += 1
        end = HostEnd(
            Hello(self.identity.host, "boot", 0, 0, DIGEST, self.counter, virtualisation="simulated"), Outbox()
        )
        self._end, self._waiting = end, ()
        sender = asyncio.create_task(self._send(end, stream))
        try:
            while (message := await stream.receive()) is not None:
                if isinstance(message, FactsAck):
                    self._taken(message.sequence)
                match end.receive(message):
                    case Welcome() as welcome:
                        self._window_s, self._failures = welcome.reconnect_window_s, 0
                        if welcome.send_inventory:
                            end.tell_inventory(Inventory(DIGEST, TOPOLOGY))
                        end.whole(self.wanted.values(), HostReport(disk_free_mib=1))
                        self._acked_to = 0
                        self.told.append((time.perf_counter(), 1))
                    case Desired() as desired:
                        for instance in desired.instances:
                            self.wanted[instance.uid] = running_state(instance)
                        end.persisted(desired.revision)
                        end.consumed()
                    case Refused() as refused:
                        return refused
                    case None:
                        pass
                    case _:
                        end.consumed()
                self._woken.set()
            return None
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send(self, end: HostEnd, stream: Stream[FromHost, ToHost]) -> None:
        while True:
            self._woken.clear()
            waiting, self._waiting = (*self._waiting, *end.take()), ()
            for message in waiting:
                await stream.send(message)
            if not self._waiting:
                await self._woken.wait()

    def _taken(self, sequence: int) -> None:
        """An acknowledgement is of all facts up to its number."""
        while self.told and self._acked_to < sequence:
            self._acked_to += 1
            told, count = self.told.popleft()
            self.acked += count
            if self.joined.is_set():
                self.took_ms.append((time.perf_counter() - told) * 1000)
        self.joined.set()

    def change(self, ahead: int = 1) -> bool:
        """Tell of something new of the host, where less than ``ahead`` changes wait for their acknowledgement."""
        if self._end is None or not self.joined.is_set() or len(self.told) >= ahead:
            return False
        self._end.changed((), (), HostReport(disk_free_mib=self._random.randrange(1 << 20)))
        self._tell(1)
        return True

    def change_all(self, count: int) -> bool:
        """The same of so many instances at once."""
        if self._end is None or not self.joined.is_set() or self.told:
            return False
        changed = [replace(state, starts=state.starts + 1) for state in list(self.wanted.values())[:count]]
        self.wanted |= {state.uid: state for state in changed}
        self._end.changed(changed)
        self._tell(len(changed))
        return True

    def _tell(self, count: int) -> None:
        """One message, at once: what is told later is another."""
        self.told.append((time.perf_counter(), count))
        assert self._end is not None
        self._waiting += self._end.take()
        self._woken.set()


def at(values: list[float], part: float) -> float:
    """The value below which this part of them lies; 0 where there are none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else 0.0


async def until(met: Callable[[], bool], limit_s: float, what: str) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while not met():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise SystemExit(f"{what}: not within {limit_s:g} s") from None


async def answered(call: Callable[[], Awaitable[Any]], limit_s: float) -> Any:
    import grpc.aio

    give_up_s = time.monotonic() + limit_s
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError:
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(0.05)


async def enrol_all(manager: Manager, channel: Any, count: int) -> list[Identity]:
    """Tokens and certificates for all; each on its own key."""
    import grpc.aio

    from casemate_wire.v1 import enrolment_pb2, join_pb2
    from casemate_wire.v1.enrolment_pb2_grpc import EnrolmentStub
    from casemate_wire.v1.join_pb2_grpc import HostAccessStub

    access, places = HostAccessStub(channel), asyncio.Semaphore(ENROLLING)
    address = f"127.0.0.1:{manager.enrolment}"
    credentials = grpc.ssl_channel_credentials(manager.roots.encode())

    async def one(number: int) -> Identity:
        name = f"h{number:05d}"
        async with places:
            made = await access.CreateHostToken(
                join_pb2.CreateHostTokenRequest(request_key=f"{number}", host=name), timeout=30
            )
            token, key = parse(made.secret), new_key()
            options = [TARGET_NAME, ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(address, credentials, options=options) as own:
                got = await EnrolmentStub(own).Enrol(
                    enrolment_pb2.EnrolRequest(
                        token=token.id, secret=token.secret, certificate_request=request_for(key)
                    ),
                    timeout=30,
                )
        return Identity(
            name,
            f"127.0.0.1:{manager.port}",
            address,
            key.decode(),
            got.certificate.decode(),
            got.roots.decode(),
            got.not_before,
            got.not_after,
        )

    return list(await asyncio.gather(*map(one, range(count))))


async def changes(agents: list[Agent], seconds: float, rate: float) -> list[float]:
    """Tell of changes at a steady rate, round the agents; milliseconds to each acknowledgement."""
    for agent in agents:
        agent.took_ms.clear()
    begin, sent, turn = time.perf_counter(), 0, 0
    while (now := time.perf_counter() - begin) < seconds:
        while sent < now * rate:
            sent += 1
            turn += 1
            agents[turn % len(agents)].change()
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.5)
    return [ms for agent in agents for ms in agent.took_ms]


async def flood(
    agents: list[Agent], manager: Manager, seconds: float, change: Callable[[Agent], bool]
) -> tuple[float, float]:
    """Every agent tells what it may, all the time: deltas a second, and a second of the manager's CPU."""
    before, cpu = sum(a.acked for a in agents), manager.cpu_s()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for agent in agents:
            change(agent)
        await asyncio.sleep(0.001)
    took, done = time.perf_counter() - begin, sum(a.acked for a in agents) - before
    return done / took, done / max(manager.cpu_s() - cpu, 0.01)


async def floods(agents: list[Agent], manager: Manager, seconds: float) -> dict[str, Any]:
    """Deltas of hosts for a second of the manager's CPU: each acknowledged before the next, and told ahead."""
    _, each = await flood(agents, manager, seconds, Agent.change)
    _, ahead = await flood(agents, manager, seconds, lambda agent: agent.change(AHEAD))
    for agent in agents:
        await until(lambda agent=agent: not agent.told, 60, "acknowledged")  # type: ignore[misc]
    return {"deltas_each_acked_per_manager_cpu_s": round(each), "deltas_ahead_per_manager_cpu_s": round(ahead)}


async def together(agents: list[Agent], manager: Manager, seconds: float, instances: int) -> dict[str, Any]:
    """The same of instances that change together, as many as a message carries."""
    manager.apply(IMAGE + "".join("---\n" + _environment(n, instances) for n in range(len(agents))))
    await until(lambda: sum(len(a.wanted) for a in agents) >= len(agents) * instances, 300, "instances placed")
    full = [agent for agent in agents if len(agent.wanted) >= instances] or agents
    per_s, many = await flood(full, manager, seconds, lambda agent: agent.change_all(instances))
    return {
        "deltas_a_message": instances,
        "flood_deltas_per_s": round(per_s),
        "deltas_per_manager_cpu_s": round(many),
    }


def _environment(number: int, instances: int) -> str:
    return ENVIRONMENT.replace("@N@", str(number)).replace("@REPLICAS@", str(instances))


class Operator:
    """Asks for the version, and notes how long it took and when it did not work."""

    def __init__(self, channel: Any) -> None:
        self.took_ms: list[float] = []
        self.failed_at: list[float] = []
        self._channel = channel

    async def run(self) -> None:
        import grpc.aio

        from casemate_wire.v1 import operators_pb2, operators_pb2_grpc

        stub = operators_pb2_grpc.FleetStub(self._channel)
        while True:
            begin = time.perf_counter()
            try:
                await stub.Version(operators_pb2.VersionRequest(), timeout=10)
                self.took_ms.append((time.perf_counter() - begin) * 1000)
            except grpc.aio.AioRpcError:
                self.failed_at.append(time.perf_counter())
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(coroutines: "list[Coroutine[Any, Any, None]]") -> AsyncIterator[None]:
    tasks = [asyncio.create_task(c) for c in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(
    manager: Manager, count: int, seconds: float, rate: float, instances: int, *, only_back: bool
) -> dict[str, Any]:
    from casemate_wire.v1 import operators_pb2, operators_pb2_grpc

    channel = manager.operator()
    manager.start()
    stub = operators_pb2_grpc.FleetStub(channel)
    await answered(lambda: stub.Version(operators_pb2.VersionRequest(), timeout=5), 60)
    result: dict[str, Any] = {"agents": count}

    begin, cpu = time.perf_counter(), manager.cpu_s()
    identities = await enrol_all(manager, channel, count)
    took, used = time.perf_counter() - begin, manager.cpu_s() - cpu
    result |= {"enrolments_per_s": round(count / took), "enrolments_per_manager_cpu_s": round(count / max(used, 0.01))}

    limit_s = max(120.0, count / 10)
    agents = [Agent(identity, Random(number)) for number, identity in enumerate(identities)]
    memory, begin, cpu = manager.memory_kb(), time.perf_counter(), manager.cpu_s()
    async with running([a.run() for a in agents]):
        await until(lambda: all(a.joined.is_set() for a in agents), limit_s, "agents joined")
        took, used = time.perf_counter() - begin, manager.cpu_s() - cpu
        await asyncio.sleep(1.0)
        stream_kb = (manager.memory_kb() - memory) / count
        result |= {
            "joins_per_s": round(count / took),
            "joins_per_manager_cpu_s": round(count / max(used, 0.01)),
            "kb_per_new_host": round(stream_kb, 1),
        }
        if not only_back:
            took_ms = await changes(agents, seconds, rate)
            result |= {
                "delta_rate_per_s": rate,
                "deltas": len(took_ms),
                "delta_p50_ms": round(statistics.median(took_ms), 2) if took_ms else None,
                "delta_p99_ms": round(at(took_ms, 0.99), 2),
            }
            result |= await floods(agents, manager, min(seconds, 5.0))

        operator = Operator(channel)
        async with running([operator.run()]):
            await asyncio.sleep(0.2)
            cpu_here = time.process_time()
            killed = time.perf_counter()
            manager.end(signal.SIGKILL)
            manager.start()
            # Each that comes back has dialled since: one that has not noticed yet does not count.
            before = [a.counter for a in agents]
            await until(
                lambda: all(a.joined.is_set() and a.counter > b for a, b in zip(agents, before, strict=True)),
                limit_s,
                "agents came back",
            )
            back_s = time.perf_counter() - killed
            back_cpu, back_cpu_here = manager.cpu_s(), time.process_time() - cpu_here
            await asyncio.sleep(1.0)
            with_streams_kb = manager.memory_kb()
            served_s = (operator.failed_at[-1] if operator.failed_at else killed) - killed
        result |= {
            "all_back_s": round(back_s, 1),
            "manager_cpu_s_of_it": round(back_cpu, 1),
            "agents_cpu_s_of_it": round(back_cpu_here, 1),
            "manager_away_s": round(served_s, 1),
            "operator_p99_ms": round(at(operator.took_ms, 0.99), 1),
            "operator_calls": len(operator.took_ms),
        }
    manager.end()
    manager.start()
    await answered(lambda: stub.Version(operators_pb2.VersionRequest(), timeout=5), 60)
    await asyncio.sleep(2.0)
    result["kb_per_stream"] = round((with_streams_kb - manager.memory_kb()) / count, 1)
    await channel.close()
    if only_back:
        return result
    # Last, since a host with instances takes more memory than a stream.
    async with running([a.run() for a in agents]):
        await until(lambda: all(a.joined.is_set() for a in agents), 120, "agents joined again")
        return result | await together(agents, manager, min(seconds, 5.0), instances)


def table(result: dict[str, Any]) -> None:
    goals = {
        "kb_per_stream": "goal < 100",
        "delta_p99_ms": "goal < 50",
        "deltas_per_manager_cpu_s": "goal >= 20000",
        "all_back_s": "goal <= 60 (of 10,000)",
        "operator_p99_ms": "goal < 1000, while agents come back",
    }
    for name, value in result.items():
        print(f"{name:32} {value:>10}  {goals.get(name, '')}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=int(os.environ.get("AGENTS", "1000")))
    parser.add_argument("--seconds", type=float, default=15.0, help="of steady changes")
    parser.add_argument("--rate", type=float, default=300.0, help="changes a second, of all agents together")
    parser.add_argument("--instances", type=int, default=20, help="of each host, that change together")
    parser.add_argument("--only-back", action="store_true", help="joins, a killed manager, and all back; no changes")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as name:
        manager = Manager(Path(name))
        try:
            result = asyncio.run(
                measure(
                    manager,
                    options.agents,
                    options.seconds,
                    options.rate,
                    options.instances,
                    only_back=options.only_back,
                )
            )
        finally:
            with suppress(ProcessLookupError):
                manager.end()
    table(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
