"""The guest helper as a process, and the host's end of its channel, talking the real protocol over a real socket.

podman and crun are played by ``support/fake_podman.py`` on ordinary processes.
"""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from casemate_agent.drivers.guest import GuestChannels, GuestRefused
from casemate_agent.drivers.ports import ExecRequest, GuestEvent, GuestGone, GuestHello, GuestNote, GuestPods
from casemate_agent.guest import archive
from casemate_agent.guest.casemate_guest.containers import backoff
from casemate_agent.guest.casemate_guest.frames import VERSION, Decoder, encode
from casemate_agent.guest.casemate_guest.logs import LOG_KEEP, trim_log
from casemate_agent.guest.casemate_guest.network import instance_env, network_commands
from casemate_core.errors import Unavailable
from casemate_core.spec.instance import ContainerState, PodState

FAKE = Path(__file__).parent.parent / "support/fake_podman.py"
UID = "0d0c9f3a"
T = TypeVar("T")


class Guest:
    """A helper in a folder that stands for its guest, and the host that is connected to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "guest.sock"
        self.channels = GuestChannels()
        self.process: asyncio.subprocess.Process | None = None
        self.seen: list[GuestEvent] = []
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def start_helper(self) -> None:
        helper = self.root / "casemate_guest.py"
        helper.write_bytes(archive.helper())
        tools = []
        for name in ("podman", "crun"):
            tool = self.root / name
            tool.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} {self.root} {name} "$@"\n')
            tool.chmod(0o755)
            tools.append(f"{name}={tool}")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-E", helper, f"root={self.root}", f"socket={self.socket}", *tools
        )

    async def stop_helper(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        code = await self.process.wait()
        assert code == (0 if number == signal.SIGTERM else -number)

    async def connect(self) -> None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        await self.channels.attach(UID, str(self.socket))
        await self.until(lambda: isinstance(self.last(GuestHello), GuestHello) and self._greeted())

    def _greeted(self) -> bool:
        return self.channels._channels[UID].greeted.is_set()

    async def _read(self) -> None:
        async for event in self.channels.events():
            self.seen.append(event)
            self._news.set()

    async def until(self, question: Callable[[], T], timeout_s: float = 20.0) -> T:
        """Wait for news until the question has a true answer."""
        async with asyncio.timeout(timeout_s):
            while not (answer := question()):
                self._news.clear()
                await self._news.wait()
        return answer

    def last(self, kind: type[T]) -> T | None:
        return next((event for event in reversed(self.seen) if isinstance(event, kind)), None)

    def pod(self, name: str) -> PodState | None:
        pods = self.last(GuestPods)
        return next((pod for pod in pods.pods if pod.name == name), None) if pods else None

    def container(self, pod: str, name: str = "app") -> ContainerState | None:
        found = self.pod(pod)
        return next((c for c in found.containers if c.name == name), None) if found else None

    async def apply(self, *pods: dict[str, Any], revision: str = "1", archives: int = 0, **peers: str) -> None:
        await self.channels.apply(UID, pods, archives, revision, peers, 20.0)

    async def running(self, name: str) -> ContainerState:
        def answer() -> ContainerState | None:
            found = self.container(name)
            return found if found is not None and found.ready else None

        got = await self.until(answer)
        assert got is not None
        return got

    def processes(self) -> dict[str, int]:
        """Processes of containers: name -> number."""
        found = {}
        for folder in (self.root / "fake/containers").iterdir():
            facts = json.loads((folder / "facts.json").read_text())
            found[facts["Name"]] = int((folder / "pid").read_text())
        return found

    def calls(self, word: str) -> int:
        return sum(word in line for line in (self.root / "fake/calls").read_text().splitlines())

    async def close(self) -> None:
        await self.channels.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()
        for name in (
            {n.rpartition("-")[0] for n in self.processes()} if (self.root / "fake/containers").exists() else ()
        ):
            words = ["pod", "rm", "--force", "--ignore", "--time", "0", name]
            await (await asyncio.create_subprocess_exec(sys.executable, FAKE, self.root, "podman", *words)).wait()


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    made = Guest(tmp_path)
    try:
        await made.start_helper()
        await made.connect()
        yield made
    finally:
        await made.close()


def pod(
    name: str, script: str, *, policy: str = "Always", image: str = "localhost/app:1", **fields: Any
) -> dict[str, Any]:
    container = {"name": "app", "image": image, "command": ["/bin/sh", "-c", script], **fields}
    spec = {"restartPolicy": policy, "terminationGracePeriodSeconds": 2, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


SLEEP = "exec sleep 1000"


async def collect(guest: Guest, name: str, count: int | None = None, **how: Any) -> list[Any]:
    options = {"follow": False, "tail": -1, "since_s": 0.0} | how
    found = []
    lines = guest.channels.logs(UID, name, "app", **options)
    async with asyncio.timeout(60):
        async for record in lines:
            found.append(record)
            if count is not None and len(found) == count:
                break
    await lines.aclose()  # type: ignore[attr-defined]
    return found


# --- pods -------------------------------------------------------------------------------------------------------------


async def test_a_greeted_helper_tells_its_boot_and_its_pods(guest: Guest) -> None:
    hello = guest.last(GuestHello)
    assert hello is not None
    assert hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert hello.version == VERSION
    assert await guest.until(lambda: guest.last(GuestPods)) == GuestPods(UID, (), "")


async def test_a_pod_runs_is_replaced_and_removed(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP), revision="a")
    await guest.running("web")
    web = guest.pod("web")
    assert web is not None
    assert (web.phase, web.ready) == ("Running", True)
    assert guest.last(GuestPods).revision == "a"  # type: ignore[union-attr]
    before = guest.processes()["web-app"]

    await guest.apply(pod("web", SLEEP), revision="b")  # the same: nothing happens to it
    await guest.until(lambda: guest.last(GuestPods).revision == "b")  # type: ignore[union-attr]
    assert guest.processes()["web-app"] == before
    assert guest.calls("kube play") == 1

    await guest.apply(pod("web", "exec sleep 2000"), pod("two", SLEEP), revision="c")
    await guest.running("two")
    await guest.until(lambda: guest.calls("kube play") == 3)
    await guest.running("web")
    assert guest.processes()["web-app"] != before

    await guest.apply(pod("two", SLEEP), revision="d")
    await guest.until(lambda: guest.pod("web") is None)
    assert set(guest.processes()) == {"two-app"}


@pytest.mark.parametrize(
    ("policy", "code", "phase"),
    [("Never", 0, "Succeeded"), ("Never", 3, "Failed"), ("OnFailure", 0, "Succeeded")],
)
async def test_a_pod_that_ends_for_good(guest: Guest, policy: str, code: int, phase: str) -> None:
    await guest.apply(pod("job", f"exit {code}", policy=policy))
    await guest.until(lambda: (found := guest.pod("job")) and found.phase == phase)
    job = guest.container("job")
    assert job is not None
    assert (job.state, job.exit_code, job.restarts) == ("terminated", code, 0)
    assert job.reason == ("Completed" if code == 0 else "Error")
    assert job.finished_s >= job.started_s > 0


async def test_a_container_that_fails_is_restarted_at_once_and_then_ever_later(guest: Guest) -> None:
    await guest.apply(pod("bad", "echo up; exit 7", policy="OnFailure"))
    await guest.until(lambda: (c := guest.container("bad")) and c.reason == "CrashLoopBackOff")
    bad = guest.container("bad")
    assert bad is not None
    assert (bad.state, bad.exit_code, bad.restarts) == ("waiting", 7, 1)
    assert "next start in 10 s" in bad.message
    found = guest.pod("bad")
    assert found is not None
    assert (found.phase, found.ready) == ("Running", False)
    exits = [e for e in guest.seen if isinstance(e, GuestNote) and e.reason == "ContainerExited"]
    assert [note.severity for note in exits] == ["Warning", "Warning"]
    # both runs are in one log
    assert [record.text for record in await collect(guest, "bad")] == ["up", "up"]


def test_the_back_off_is_that_of_the_kubelet() -> None:
    assert [backoff(n) for n in range(1, 9)] == [0, 10, 20, 40, 80, 160, 300, 300]


async def test_a_killed_container_comes_back(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP))
    await guest.running("web")
    os.kill(guest.processes()["web-app"], signal.SIGKILL)
    await guest.until(lambda: (c := guest.container("web")) and c.restarts == 1 and c.ready)
    web = guest.container("web")
    assert web is not None
    assert (web.exit_code, web.state) == (137, "running")


async def test_a_pod_that_cannot_be_played_says_why_and_is_tried_again(guest: Guest) -> None:
    await guest.apply(pod("lost", SLEEP, image="localhost/missing:1"))
    await guest.until(lambda: (p := guest.pod("lost")) and p.reason == "PlayFailed")
    lost = guest.pod("lost")
    assert lost is not None
    assert (lost.phase, lost.ready) == ("Pending", False)
    assert "image not known" in lost.message
    await guest.apply(pod("lost", SLEEP), revision="2")  # mended: no back-off
    await guest.running("lost")


async def test_readiness_follows_the_probe(guest: Guest) -> None:
    flag = guest.root / "flag"
    probe = {"exec": {"command": ["test", "-e", str(flag)]}, "periodSeconds": 1, "failureThreshold": 1}
    await guest.apply(pod("web", SLEEP, readinessProbe=probe))
    await guest.until(lambda: (c := guest.container("web")) and c.state == "running")
    assert guest.container("web").ready is False  # type: ignore[union-attr]
    flag.touch()
    await guest.running("web")
    flag.unlink()
    await guest.until(lambda: not guest.container("web").ready)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["httpGet", "tcpSocket"])
async def test_readiness_over_the_network(guest: Guest, kind: str) -> None:
    answers = ["500 Broken", "200 OK"]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.read(100)
        assert line == b"" or line.startswith(b"GET /healthz HTTP/1.1\r\n")
        writer.write(f"HTTP/1.1 {answers.pop(0) if len(answers) > 1 else answers[0]}\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        probe: dict[str, Any] = {kind: {"port": port}, "periodSeconds": 1}
        if kind == "httpGet":
            probe[kind]["path"] = "/healthz"
        await guest.apply(pod("web", SLEEP, readinessProbe=probe))
        await guest.running("web")


async def test_archives_are_loaded_before_pods_and_once(guest: Guest) -> None:
    for number in range(2):
        block = guest.root / f"sys/block/vd{'cd'[number]}"
        block.mkdir(parents=True)
        (block / "serial").write_text(f"cm-ar-{number}\n")
        (guest.root / "dev").mkdir(exist_ok=True)
        (guest.root / f"dev/vd{'cd'[number]}").write_text(f"localhost/app:{number}")
    await guest.apply(pod("web", SLEEP), archives=2)
    await guest.running("web")
    await guest.apply(pod("web", SLEEP), archives=2, revision="2")
    verbs = [line.split()[1] for line in (guest.root / "fake/calls").read_text().splitlines()]
    assert verbs[:3] == ["load", "load", "kube"]
    assert verbs.count("load") == 2
    (guest.root / "dev/vdd").write_text("damaged")
    with pytest.raises(GuestRefused, match="podman load of cm-ar-1: Error: payload"):
        await guest.apply(archives=2)
    (guest.root / "dev/vdd").write_text("localhost/app:1")
    with pytest.raises(GuestRefused, match="no disk with the serial number cm-ar-2"):
        await guest.apply(archives=3)


async def test_peers_are_named_in_the_guest(guest: Guest) -> None:
    (guest.root / "etc").mkdir()
    (guest.root / "etc/hosts").write_text("127.0.0.1\tlocalhost\n")
    await guest.apply(b="10.0.0.2", a="10.0.0.1")
    text = (guest.root / "etc/hosts").read_text()
    assert text.startswith("127.0.0.1\tlocalhost\n")
    assert "10.0.0.1\ta\n10.0.0.2\tb\n" in text
    await guest.apply(c="10.0.0.3")
    assert "10.0.0.1" not in (guest.root / "etc/hosts").read_text()


async def test_an_instance_knows_who_it_is_and_who_its_peers_are(guest: Guest) -> None:
    (guest.root / "etc").mkdir()
    (guest.root / "run/casemate/seed").mkdir(parents=True, exist_ok=True)
    meta = {"local-hostname": "hello-1", "casemate-environment": "hello", "casemate-ordinal": 1}
    (guest.root / "run/casemate/seed/meta-data").write_text(json.dumps(meta))
    await guest.apply(**{"hello-0": "10.0.0.1", "hello-2": "10.0.0.3"})
    told = (guest.root / "run/casemate/instance.env").read_text()
    assert told.splitlines() == [
        'CASEMATE_INSTANCE="hello-1"',
        'CASEMATE_ENVIRONMENT="hello"',
        'CASEMATE_ORDINAL="1"',
        'CASEMATE_PEERS="hello-0=10.0.0.1 hello-2=10.0.0.3"',
    ]
    assert instance_env({"local-hostname": 'x"; reboot; "'}, {}).startswith('CASEMATE_ENVIRONMENT=""\n')


# --- restarts ---------------------------------------------------------------------------------------------------------


async def test_pods_outlive_the_helper_and_are_adopted(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP), pod("job", "exit 4", policy="Never"), pod("dies", SLEEP), revision="9")
    await guest.running("web")
    await guest.running("dies")
    await guest.until(lambda: (p := guest.pod("job")) and p.phase == "Failed")
    before = guest.processes()
    await guest.stop_helper(signal.SIGKILL)
    await guest.until(lambda: isinstance(guest.seen[-1], GuestGone))
    os.kill(before["dies-app"], signal.SIGKILL)  # seen by nobody
    guest.seen.clear()
    await guest.start_helper()
    await guest.until(lambda: (c := guest.container("dies")) and c.restarts == 1 and c.ready)
    await guest.until(lambda: (c := guest.container("web")) and c.ready)
    assert guest.processes()["web-app"] == before["web-app"]
    web, job = guest.container("web"), guest.container("job")
    assert web is not None
    assert job is not None
    assert (web.state, web.ready, web.restarts) == ("running", True, 0)
    assert (job.state, job.exit_code) == ("terminated", 4)
    assert guest.last(GuestPods).revision == "9"  # type: ignore[union-attr]
    assert guest.calls("kube play") == 3


async def test_after_a_reboot_of_the_guest_pods_start_without_the_host(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP), pod("job", "exit 0", policy="Never"))
    await guest.running("web")
    await guest.until(lambda: (p := guest.pod("job")) and p.phase == "Succeeded")
    await guest.stop_helper()
    state = json.loads((guest.root / "var/lib/casemate/guest.json").read_text())
    state["boot"] = "another"
    (guest.root / "var/lib/casemate/guest.json").write_text(json.dumps(state))
    os.kill(guest.processes()["web-app"], signal.SIGKILL)
    guest.seen.clear()
    await guest.start_helper()
    await guest.until(lambda: (c := guest.container("web")) and c.restarts == 1 and c.ready)
    assert guest.container("job").restarts == 0  # type: ignore[union-attr]


async def test_the_host_reconnects_in_the_middle_of_a_frame(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP), revision="5")
    await guest.running("web")
    await guest.channels.detach(UID)
    reader, writer = await asyncio.open_unix_connection(guest.socket)
    writer.write(encode({"t": "apply", "revision": "6"}, b"[]" * 500)[:700])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    del reader
    guest.seen.clear()
    await guest.connect()
    await guest.running("web")
    assert guest.last(GuestPods).revision == "5"  # type: ignore[union-attr]


async def test_a_host_that_sends_nonsense_does_not_hurt_the_helper(guest: Guest) -> None:
    await guest.channels.detach(UID)
    reader, writer = await asyncio.open_unix_connection(guest.socket)
    writer.write(os.urandom(100_000) + b"\xff")
    for header in (
        {"t": "hello"},
        {"t": "hello", "session": "s"},
        {"t": "nothing", "id": 1},
        {"t": "apply", "id": 2},
        {"t": "apply", "id": 3, "revision": "1"},
        {"t": "logs", "s": 1, "credit": 5, "pod": "none"},
        {"t": "logs", "s": "x"},
        {"t": "exec", "s": 2, "credit": 5, "argv": []},
        {"t": "exec", "s": 3, "credit": 5, "argv": ["/no/such/program"]},
        {"t": "credit", "s": 99, "n": 5},
        {"t": "load", "id": 4},
        {"t": "power", "id": 5, "action": "explode"},
        {"t": "ping", "id": 6},
    ):
        writer.write(encode(header))
    decoder = Decoder()
    answers: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while not {1, 2, 3, 4, 5, 6} <= {h.get("id") for h in answers}:
            answers += [header for header, _ in decoder.feed(await reader.read(65536))]
    assert {h["id"] for h in answers if h["t"] == "done" and not h["ok"]} >= {1, 2, 3, 4, 5}
    assert {h["s"] for h in answers if h["t"] == "end" and h["error"]} == {1, 2, 3}
    writer.close()
    await writer.wait_closed()
    await guest.connect()


# --- logs -------------------------------------------------------------------------------------------------------------

COUNT = "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; exec sleep 1000"


async def test_logs_come_whole_and_go_on_where_they_stopped(guest: Guest) -> None:
    await guest.apply(pod("web", COUNT))
    await guest.running("web")
    got = await collect(guest, "web", 5000, follow=True)
    assert [record.text for record in got] == [f"line {i}" for i in range(5000)]
    assert [record.sequence for record in got] == sorted({record.sequence for record in got})
    assert {record.lost for record in got} == {0}
    assert all(abs(record.time_s - got[0].time_s) < 60 for record in got)
    rest = await collect(guest, "web", after_sequence=got[4989].sequence)
    assert [record.text for record in rest] == [f"line {i}" for i in range(4990, 5000)]
    assert [record.text for record in await collect(guest, "web", tail=3)] == ["line 4997", "line 4998", "line 4999"]
    assert await collect(guest, "web", tail=0) == []
    assert await collect(guest, "web", since_s=got[-1].time_s + 1) == []


async def test_a_followed_log_goes_on_over_restarts_of_container_helper_and_connection(guest: Guest) -> None:
    await guest.apply(pod("web", "echo begin $$; exec sleep 1000"))
    await guest.running("web")
    found: list[str] = []

    async def follow() -> None:
        async for record in guest.channels.logs(UID, "web", "app", follow=True, tail=-1, since_s=0.0):
            found.append(record.text)
            assert record.lost == 0
            guest._news.set()

    task = asyncio.create_task(follow())
    try:
        await guest.until(lambda: len(found) == 1)
        os.kill(guest.processes()["web-app"], signal.SIGTERM)
        await guest.until(lambda: len(found) == 2)
        await guest.stop_helper(signal.SIGKILL)
        (guest.root / "fake").joinpath("note").touch()
        await guest.start_helper()
        await guest.until(lambda: guest._greeted())
        with next((guest.root / "fake/containers").iterdir()).joinpath("ctr.log").open("a") as log:
            log.write(
                "2026-11-23T00:00:00.0+00:00 stdout P in two \n2026-11-23T00:00:00.0+00:00 stdout F parts\x1b[0m\n"
            )
        await guest.until(lambda: len(found) == 3)
        assert found[2] == "in two parts\\x1b[0m"
        await guest.apply(revision="gone")  # the end of the pod is the end of its log
        async with asyncio.timeout(60):
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert re.fullmatch(r"begin \d+", found[0])
    assert len(found) == 3


async def test_a_trimmed_log_says_what_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "ctr.log"
    line = b"2026-11-23T00:00:00.000000000+00:00 stdout F " + b"x" * 954 + b"\n"
    assert len(line) == 1000
    path.write_bytes(line * 40_000)
    end, lines = trim_log(str(path))
    assert end == (40_000_000 - LOG_KEEP) // 4096 * 4096
    assert lines == end // 1000 + 1
    state = path.stat()
    assert state.st_size == 40_000_000
    assert state.st_blocks * 512 <= LOG_KEEP + 8192
    assert trim_log(str(path)) == (0, 0)


# --- commands ---------------------------------------------------------------------------------------------------------


async def command(
    guest: Guest, *argv: str, stdin: bytes | None = None, **fields: Any
) -> tuple[int | None, bytes, bytes]:
    session = await guest.channels.exec(UID, ExecRequest(argv=argv, **fields), 20.0)

    async def feed() -> None:
        await session.stdin(stdin or b"")
        await session.close_stdin()

    task = asyncio.create_task(feed())
    out = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(60):
        async for channel, data in session.output():
            out[channel] += data
        await task
    await session.close()
    return session.exit_code, out["stdout"], out["stderr"]


async def test_a_command_in_a_container_has_its_environment_and_its_exit_status(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP, env=[{"name": "COLOUR", "value": "blue"}]))
    await guest.running("web")
    script = "echo $COLOUR $MORE; echo problem >&2; exit 9"
    got = await command(guest, "/bin/sh", "-c", script, pod="web", container="app", environment={"MORE": "light"})
    assert got == (9, b"blue light\n", b"problem\n")
    assert await command(guest, "/bin/sh", "-c", "kill -TERM $$", pod="web") == (143, b"", b"")
    with pytest.raises(GuestRefused, match="no pod none"):
        await command(guest, "true", pod="none")
    with pytest.raises(GuestRefused, match="has no container nope, but app"):
        await command(guest, "true", pod="web", container="nope")


async def test_megabytes_go_through_a_command_and_come_back(guest: Guest) -> None:
    data = os.urandom(3_000_000)
    assert await command(guest, "cat", stdin=data) == (0, data, b"")


async def test_a_terminal_has_a_size_and_takes_keys(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP))
    await guest.running("web")
    for where in ({"pod": "web"}, {}):
        prompt = {"PS1": "ready> "}
        request = ExecRequest(argv=("/bin/sh",), tty=True, rows=33, columns=101, environment=prompt, **where)
        session = await guest.channels.exec(UID, request, 20.0)
        text = b""
        output = session.output()
        async with asyncio.timeout(60):
            await session.stdin(b"stty size; test -t 0 && echo a$((1+1))b\n")
            while b"33 101\r\n" not in text or b"a2b\r\n" not in text:
                text += (await anext(output))[1]
            await session.resize(20, 50)
            await session.stdin(b"stty size; cat\nback\n")
            while b"20 50\r\n" not in text or text.count(b"back\r\n") < 2:
                text += (await anext(output))[1]
            await session.stdin(b"\x03")  # interrupts cat, not the shell
            while b"ready> " not in text.partition(b"^C")[2]:
                text += (await anext(output))[1]
            await session.stdin(b"exit 6\n")
            async for _, data in output:
                text += data
        assert session.exit_code == 6


async def test_a_signal_reaches_the_command(guest: Guest) -> None:
    await guest.apply(pod("web", SLEEP))
    await guest.running("web")
    for where in ({"pod": "web"}, {}):
        script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done"
        session = await guest.channels.exec(UID, ExecRequest(argv=("/bin/sh", "-c", script), **where), 20.0)  # type: ignore[arg-type]
        output = session.output()
        async with asyncio.timeout(60):
            assert await anext(output) == ("stdout", b"ready\n")
            await session.signal(signal.SIGUSR1)
            # the whole group gets it: the shell may tell on stderr of the sleep that it ended
            assert [data async for stream, data in output if stream == "stdout"] == [b"caught\n"]
        assert session.exit_code == 5


async def test_a_stream_that_nobody_reads_holds_up_no_other(guest: Guest) -> None:
    flood = await guest.channels.exec(UID, ExecRequest(argv=("yes",)), 20.0)
    await guest.apply(pod("web", COUNT))
    await guest.running("web")
    assert len(await collect(guest, "web", 5000, follow=True)) == 5000
    assert (await command(guest, "echo", "hi"))[1] == b"hi\n"
    kept = sum(len(item.data) for item in guest.channels._channels[UID]._streams[1].items if hasattr(item, "data"))
    assert kept <= 256 * 1024
    await flood.close()
    async with asyncio.timeout(60):
        while "yes" in children(guest):
            await asyncio.sleep(0.05)


def children(guest: Guest) -> list[str]:
    assert guest.process is not None
    pids = Path(f"/proc/{guest.process.pid}/task/{guest.process.pid}/children").read_text().split()
    names = []
    for pid in pids:
        try:
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        except OSError:
            continue
    return names


async def test_what_waits_for_a_guest_fails_when_it_goes(guest: Guest) -> None:
    session = await guest.channels.exec(UID, ExecRequest(argv=("sleep", "100")), 20.0)
    await guest.stop_helper(signal.SIGTERM)
    with pytest.raises(Unavailable):
        async for _ in session.output():
            pass
    with pytest.raises(Unavailable):
        await guest.apply()


# --- what a guest does for itself -------------------------------------------------------------------------------------


def test_the_network_of_the_seed_becomes_commands() -> None:
    mac = Path("/sys/class/net/lo/address").read_text().strip()
    config: dict[str, Any] = {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": mac.upper()},
                "set-name": "eth7",
                "mtu": 1400,
                "addresses": ["10.0.0.5/24"],
                "routes": [{"to": "default", "via": "10.0.0.1"}, {"to": "10.9.0.0/16", "via": "10.0.0.2"}],
                "nameservers": {"addresses": ["10.0.0.1"], "search": ["example"]},
            }
        },
    }
    lines, servers, search = network_commands(json.dumps(config))
    assert lines[0] == "link set lo up"
    assert lines[-5:] == [
        "link set eth7 mtu 1400",
        "link set eth7 up",
        "addr replace 10.0.0.5/24 dev eth7",
        "route replace default via 10.0.0.1 dev eth7 onlink",
        "route replace 10.9.0.0/16 via 10.0.0.2 dev eth7 onlink",
    ]
    assert (servers, search) == (["10.0.0.1"], ["example"])
    config["ethernets"]["eth1"] = {"match": {"macaddress": "02:00:00:00:00:FE"}, "addresses": ["10.0.1.5/24"]}
    with pytest.raises(ValueError, match="no interface has the address 02:00:00:00:00:fe"):
        network_commands(json.dumps(config))
    late: list[str] = []
    assert network_commands(json.dumps(config), late) == (lines, servers, search), "the others do not wait for it"
    assert late == ["02:00:00:00:00:fe"]
    del config["ethernets"]["eth1"]
    config["ethernets"]["eth0"]["addresses"] = ["10.0.0.5/24\nlink set lo down"]
    with pytest.raises(ValueError, match="line break"):
        network_commands(json.dumps(config))


async def test_added_processors_are_brought_online_and_cloud_init_is_told(guest: Guest) -> None:
    await guest.stop_helper()
    for name, online in (("cpu1", "1\n"), ("cpu2", "0\n"), ("cpufreq", "0\n")):
        folder = guest.root / f"sys/devices/system/cpu/{name}"
        folder.mkdir(parents=True)
        (folder / "online").write_text(online)
    cloud = guest.root / "run/cloud-init"
    cloud.mkdir(parents=True)
    guest.seen.clear()
    await guest.start_helper()
    note = await guest.until(lambda: guest.last(GuestNote))
    assert note is not None
    assert (note.reason, note.message) == ("ProcessorOnline", "cpu2")
    assert (guest.root / "sys/devices/system/cpu/cpu2/online").read_text() == "1"
    assert (guest.root / "sys/devices/system/cpu/cpufreq/online").read_text() == "0\n"
    await guest.until(lambda: (hello := guest.last(GuestHello)) and hello.cloud_init == "running")
    (cloud / "result.new").write_text(json.dumps({"v1": {"errors": ["no such module"]}}))
    (cloud / "result.new").rename(cloud / "result.json")
    await guest.until(lambda: (hello := guest.last(GuestHello)) and hello.cloud_init == "error")
    assert (hello := guest.last(GuestHello)) is not None and hello.cloud_init_message == "no such module"
    note = await guest.until(lambda: n if (n := guest.last(GuestNote)) and n.reason == "CloudInitError" else None)
    assert note is not None
    assert (note.message, note.severity) == ("no such module", "Warning")
