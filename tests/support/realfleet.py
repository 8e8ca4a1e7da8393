"""A real fleet of one machine for journeys: manager, agent and a private libvirtd as processes of their own.

What may live here: starting, killing and starting again those three as an operator (or a crash) would, asking the fleet
through `casemate`, and looking at the machine itself for what an instance has left. Everything lies in one short folder
of pytest's, and carries the sandbox's scope. Where a wait is over in vain, the failure tells the ends of all logs and of
the guests' consoles.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from casemate_agent import sandbox as sandboxes
from casemate_agent.domain.names import table_name, tap_name, tap_prefix
from casemate_cli.dev import preflight
from support.fleet import Done, casemate, clean_environment, free_port
from support.instances import digest_of

TAIL = 2500


def free_subnet(port: int) -> str:
    """Addresses for one fleet's instances that this machine has no route to; ``port``, taken already, keeps apart fleets
    that begin at the same time."""
    taken = [route for _, route in preflight.routes() if route.prefixlen]
    for number in range(64):
        subnet = IPv4Network(f"10.{128 + (port + number) % 64}.0.0/16")
        if not any(route.overlaps(subnet) for route in taken):
            return str(subnet)
    pytest.fail("this machine has routes into all of 10.128.0.0/10", pytrace=False)


def tail(path: Path, size: int = TAIL) -> str:
    """The end of a file, for a person."""
    try:
        return f"--- {path}\n{path.read_bytes()[-size:].decode('utf-8', 'replace')}"
    except OSError as error:
        return f"--- {path}: {error.strerror}"


def until(what: str, met: Callable[[], Any], timeout_s: float, tails: Callable[[], str], every_s: float = 0.3) -> Any:
    """What ``met`` answers as soon as it is true; fails the test, with the logs, where it is not in time."""
    give_up_s = time.monotonic() + timeout_s
    while not (answer := met()):
        if time.monotonic() > give_up_s:
            pytest.fail(f"not within {timeout_s:g} s: {what}\n{tails()}", pytrace=False)
        time.sleep(every_s)
    return answer


@dataclass(slots=True)
class Daemon:
    """One process of the fleet; its output goes to the end of ``log``."""

    argv: Sequence[str]
    log: Path
    environ: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert not self.alive
        self.end()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=self.environ
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Send the signal and wait; its exit status (0 where it never ran)."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"{self.argv[2]} did not end within {timeout_s:g} s\n{tail(self.log)}", pytrace=False)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal by now (proc(5), SigCgt): before that it would end it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@dataclass(slots=True)
class RealFleet:
    """One manager, one agent (host ``box``) and their libvirtd in ``folder``."""

    folder: Path
    sandbox: sandboxes.Sandbox
    manager: Daemon
    agent: Daemon
    environ: dict[str, str]
    uids: dict[str, str] = field(default_factory=dict)

    # --- as a user ---

    def run(self, *arguments: str, stdin: str = "", timeout_s: float = 120) -> Done:
        return casemate(*arguments, stdin=stdin, timeout_s=timeout_s, environ=self.environ)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object; empty where there is none."""
        done = self.run("get", kind, name, "-o", "json")
        if done.code == 4:
            return {}
        found: dict[str, Any] = json.loads(done.ok())
        return found

    def apply(self, manifest: dict[str, Any]) -> None:
        self.run("apply", "-f", "-", stdin=json.dumps(manifest)).ok()

    def instance(self, environment: str) -> dict[str, Any]:
        """The first instance of an environment; empty where there is none."""
        found = self.get("instance", f"{environment}-0")
        if found:
            self.uids[environment] = found["metadata"]["uid"]
        return found

    def until_running(self, environment: str, timeout_s: float = 180) -> dict[str, Any]:
        """The instance of an environment once its QEMU runs, as its host tells."""

        def runs() -> dict[str, Any]:
            found = self.instance(environment)
            status = found.get("status", {})
            return found if status.get("phase") in ("Starting", "Running", "Ready") and status.get("pid") else {}

        running: dict[str, Any] = self.until(f"QEMU of {environment} runs", runs, timeout_s)
        return running

    def until_gone(self, environment: str, timeout_s: float = 180) -> None:
        self.until(f"{environment} is gone", lambda: not self.get("environment", environment), timeout_s)

    def until(self, what: str, met: Callable[[], Any], timeout_s: float = 120, every_s: float = 0.3) -> Any:
        return until(what, met, timeout_s, self.tails, every_s)

    def until_host_ready(self, timeout_s: float = 90) -> None:
        def ready() -> bool:
            done = self.run("get", "host", "box", "-o", "json")
            return done.code == 0 and json.loads(done.out)["status"]["phase"] == "Ready"

        self.until("the host is Ready", ready, timeout_s)

    # --- at the machine ---

    @property
    def state(self) -> Path:
        return self.folder / "agent"

    def qemus(self) -> dict[str, int]:
        """Every QEMU of this libvirtd, by the uid of its domain."""
        found: dict[str, int] = {}
        for pid in sandboxes._members(self.sandbox):
            try:
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "qemu-system" in argv[0] and "-uuid" in argv:
                uid = argv[argv.index("-uuid") + 1]
                assert uid not in found, f"{uid} runs twice: {found[uid]} and {pid}\n{self.tails()}"
                found[uid] = pid
        return found

    def virsh(self, *arguments: str) -> str:
        done = subprocess.run(
            ["virsh", "-q", "-c", self.sandbox.uri, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"virsh {' '.join(arguments)}: {done.stderr}\n{self.tails()}"
        return done.stdout

    def domains(self) -> set[str]:
        return set(self.virsh("list", "--all", "--uuid").split())

    def traces_of(self, uid: str) -> list[str]:
        """What the machine still has of an instance: nothing, once it is gone."""
        return traces_of(uid, self.sandbox.scope, self.folder, self.domains(), set(self.qemus()))

    def tails(self) -> str:
        logs = [self.agent.log, self.manager.log, self.folder / "v/libvirtd.log"]
        return "\n".join(map(tail, [*logs, *sorted(self.state.glob("instances/*/console.log"))]))


def traces_of(uid: str, scope: str, folder: Path, domains: set[str], qemus: set[str]) -> list[str]:
    """Everything of an instance that is found on the machine: domain, QEMU, files, sockets, tap, guard."""
    tap = tap_name(scope, uid, 0)
    found = [f"domain {uid}"] if uid in domains else []
    found += [f"QEMU of {uid}"] if uid in qemus else []
    found += [str(path) for path in sorted(folder.rglob(f"*{uid}*"))]
    found += [f"tap {tap}"] if Path("/sys/class/net", tap).exists() else []
    found += [f"guard of {tap}"] if tap in nft("list", "ruleset") else []
    return found


def nft(*arguments: str) -> str:
    """What nft prints."""
    done = subprocess.run(["nft", *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def traces_of_scope(scope: str, folder: Path) -> list[str]:
    """Everything of a whole fleet that is found on the machine: processes, mounts, interfaces, tables, files."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in words:
            found.append(f"process {entry.name}: {words[:100]!r}")
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"{folder}/" in line]
    found += [name for name in os.listdir("/sys/class/net") if name.startswith(tap_prefix(scope))]
    found += [line for line in nft("list", "tables").splitlines() if table_name(scope) in line]
    found += [str(folder)] if folder.exists() else []
    return found


def empty_image(folder: Path) -> dict[str, Any]:
    """Manifest of an image from which QEMU starts and nothing boots."""
    path = folder / "empty.raw"
    path.write_bytes(bytes(1 << 20))
    spec = {"type": "disk", "source": f"file://{path}", "digest": digest_of(path.read_bytes()), "format": "raw"}
    return {"apiVersion": "casemate/v1", "kind": "Image", "metadata": {"name": "empty"}, "spec": spec}


def empty_environment(name: str, **spec: Any) -> dict[str, Any]:
    """Manifest of a small VM on it."""
    small = {"cpu": {"count": 1}, "memory": {"size": "64Mi"}, "image": "empty", "disk": {"size": "64Mi"}}
    return {"apiVersion": "casemate/v1", "kind": "Environment", "metadata": {"name": name}, "spec": small | spec}


@contextmanager
def fleet_in(folder: Path) -> Iterator[RealFleet]:
    """A fleet with its image known and its host Ready; nothing of it is left afterwards, which is checked."""
    port = free_port()
    sources = folder / "src"
    sources.mkdir(parents=True)
    environ = clean_environment(folder, f"127.0.0.1:{port}")
    sandbox = sandboxes.up(folder / "v")
    serve = [sys.executable, "-m", "casemate_manager", "serve", "--state-dir", str(folder / "manager")]
    serve += ["--listen", f"127.0.0.1:{port}", "--default-subnet", free_subnet(port), "--insecure-loopback"]
    manager = Daemon(serve, folder / "manager.log", environ)
    agent = Daemon(agent_argv(folder, sandbox, port), folder / "agent.log", environ)
    fleet = RealFleet(folder, sandbox, manager, agent, environ)
    try:
        manager.start()
        agent.start()
        fleet.until_host_ready()
        fleet.apply(empty_image(sources))
        yield fleet
    finally:
        try:
            fleet.agent.end()
            fleet.manager.end()
        finally:
            sandboxes.down(folder / "v")
    left = [trace for trace in traces_of_scope(sandbox.scope, folder) if trace != str(folder)]
    assert left == []


def agent_argv(folder: Path, sandbox: sandboxes.Sandbox, port: int, program: Sequence[str] = ()) -> list[str]:
    """The agent's command line; ``program`` stands in for ``-m casemate_agent``."""
    argv = [sys.executable, *(program or ("-m", "casemate_agent")), "run", "--name", "box"]
    argv += ["--manager", f"127.0.0.1:{port}", "--state-dir", str(folder / "agent"), "--run-dir", str(folder / "r")]
    argv += ["--libvirt-uri", sandbox.uri, "--scope", sandbox.scope, "--image-folder", str(folder / "src")]
    return [*argv, "--insecure-loopback", "--stop-grace-s", "2", "--log-level", "debug"]


@pytest.fixture
def real_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFleet]:
    """A fleet of the test's own."""
    with fleet_in(tmp_path_factory.mktemp("j")) as fleet:
        yield fleet
