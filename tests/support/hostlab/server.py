"""What is installed in an emulated server, and the fleet around it: our agent as a service, a manager on this machine.

Theory of operation. The wheel is built from the working tree, installed by pip into a folder of this machine, compiled by
the server's own Python, and carried over as one archive: pip itself needs most of a minute on an emulated processor. The
units are the ones that are shipped, with their confinement. The host joins by a token, and speaks TLS; it dials the server's
own loopback, and ssh carries those ports to the manager's.
"""

import base64
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fleet import Done, casemate, clean_environment
from support.hostlab import recipe
from support.hostlab.build import PROJECT, LabFailed, Say, build, run, tree_python
from support.hostlab.machine import Machine, Name, Wire, free_port

#: The first server, as a host of the fleet.
HOST = Name().host
CONFIG = "/etc/casemate/agent.toml"
#: Where libvirt keeps what it found out about emulators. It probes them for 10 s on an emulated processor; what was found holds
#: for the same binaries on the same kernel and processor, which libvirt checks itself.
PROBED = "/var/cache/libvirt/qemu"
#: The operator's certificate, for whoever asks the manager from within the server.
OPERATOR = "/root/operator.yaml"
#: What is installed of the working tree beside the packages: as a person would, and as docs/join.md says.
SHIPPED = {
    "casemate-agent.service": "/etc/systemd/system/casemate-agent.service",
    "casemate-relay.service": "/etc/systemd/system/casemate-relay.service",
    "casemate-relay.sysusers.conf": "/usr/lib/sysusers.d/casemate-relay.conf",
    "casemate-agent.modules.conf": "/usr/lib/modules-load.d/casemate-agent.conf",
}
AGENT = """log_level = "info"
stop_grace_s = 20
metrics_listen = "127.0.0.1:9470"
"""
HARDWARE = """
[[ports]]
mac = "@PORT0@"
networks = ["fronthaul"]
vfs = 4

[[ports]]
mac = "@PORT1@"
networks = ["fronthaul"]
vfs = 2

[[devices]]
vendor = "1234"
device = "1111"
labels = { type = "card" }

[[devices]]
vendor = "1b36"
device = "0005"
labels = { type = "probe" }

[gpu]
held_limit_s = 8

[[gpus]]
vendor = "1af4"
device = "1050"
model = "Emulated V1"
memory = "512Mi"

[[gpus]]
vendor = "1234"
device = "11e8"
model = "Emulated E1"

[[gpus]]
vendor = "1af4"
device = "1110"
model = "Emulated M1"
memory = "16Mi"
"""
FLEET = """apiVersion: casemate/v1
kind: Image
metadata: {name: tiny}
spec:
  source: file:///var/lib/casemate/library/empty.img
  digest: "sha256:@DISK@"
  format: raw
  size: 16Mi
  kernel: {source: file:///var/lib/casemate/library/guest.elf, digest: "sha256:@KERNEL@"}
---
apiVersion: casemate/v1
kind: Network
metadata: {name: fronthaul}
spec: {type: physical, subnet: 10.71.0.0/24}
"""
ENVIRONMENT = """apiVersion: casemate/v1
kind: Environment
metadata: {name: @NAME@}
spec:
  cpu: @CPU@
  memory: @MEMORY@
  image: tiny
  disk: {size: 16Mi}
  virtualisation: any
@SPEC@
"""
#: Run in the server: the driver's own look at the functions, as JSON.
LOOK = """
import asyncio, json
from dataclasses import asdict
from pathlib import Path
from casemate_agent.config import load
from casemate_agent.drivers.sriov import HostFunctions
async def look():
    config = load("/etc/casemate/agent.toml", {}, needs_name=False)
    functions = HostFunctions(Path(config.run_dir), config.ports, config.devices)
    try:
        return await functions.observe(30)
    finally:
        await functions.aclose()
print(json.dumps(asdict(asyncio.run(look()))))
"""


#: How long a test waits for what it expects. It is met in seconds on a free machine; a wait ends as soon as it is met, and a
#: machine that is busy with other work may need many times as long.
PATIENCE_S = 900.0
PROGRESS_S = 30.0


@dataclass(slots=True)
class Outside:
    """The manager of the fleet, on this machine."""

    port: int
    enrolment: int
    log: Path
    environ: dict[str, str]


@dataclass(slots=True)
class Server:
    """An emulated server, a manager, and ``casemate`` between them."""

    machine: Machine
    outside: Outside
    say: Say

    @property
    def host(self) -> str:
        """Its name as a host of the fleet."""
        return self.machine.name.host

    # --- as a user ---

    def casemate(self, *arguments: str, stdin: str = "", timeout_s: float = 120) -> Done:
        return casemate(*arguments, environ=self.outside.environ, stdin=stdin, timeout_s=timeout_s)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object; empty where there is none."""
        done = self.casemate("get", kind, name, "-o", "json")
        if done.code == 4:
            return {}
        found: dict[str, Any] = json.loads(done.ok())
        return found

    def uid(self, instance: str) -> str:
        """Of an instance; its domain's uuid too."""
        return str(self.get("instance", instance)["metadata"]["uid"])

    # --- as an administrator of the server ---

    def settle(self, archive: bytes, hardware: str = HARDWARE) -> None:
        """From a booted server to one whose agent runs under a certificate of its own."""
        probed = self.machine.parts.probed
        if probed.exists():
            self.machine.run(f"tar -x -C {PROBED} -f -", stdin=probed.read_bytes())
        self.machine.run(
            "systemctl start libvirtd; (virsh capabilities > /dev/null 2>&1 < /dev/null &)", timeout_s=PATIENCE_S
        )
        self.install(archive)
        self.configure(hardware)
        self.join()
        self.machine.run("virsh capabilities > /dev/null", timeout_s=PATIENCE_S)
        if not probed.exists():
            found = self.machine.run(f"tar -c -C {PROBED} . | base64")
            write_whole(probed, base64.b64decode(found))
        self.start_agent()

    def install(self, archive: bytes) -> None:
        """The agent of this working tree, as a service that is not started yet."""
        target = f"/usr/local/lib/python{recipe.PYTHON}/dist-packages"
        self.machine.run(f"tar -x -z -C {target} -f -", stdin=archive, timeout_s=120)
        for name, place in SHIPPED.items():
            self.machine.write(place, (PROJECT / "agent" / name).read_bytes())
        for name in ("casemate", "casemate-agent"):
            package = "casemate_cli" if name == "casemate" else "casemate_agent"
            script = f'#!/bin/sh\nexec /usr/bin/python3 -m {package} "$@"\n'
            self.machine.run(f"cat > /usr/bin/{name} && chmod 755 /usr/bin/{name}", stdin=script.encode())
        self.machine.write("/etc/profile.d/casemate.sh", self.profile().encode())
        self.machine.write(OPERATOR, Path(self.outside.environ["CASEMATE_CONFIG"]).read_bytes())
        self.machine.run(f"chmod 600 {OPERATOR}; systemd-sysusers; systemctl daemon-reload")
        self.machine.run("systemctl restart systemd-modules-load", timeout_s=60)

    def profile(self) -> str:
        """What a shell in the server needs to have `casemate` ask the manager."""
        return f"export CASEMATE_CONFIG={OPERATOR}\n"

    def configure(self, hardware: str = HARDWARE) -> None:
        """Settings of the agent; they hold from its next start."""
        for number, mac in enumerate(self.machine.name.ports):
            hardware = hardware.replace(f"@PORT{number}@", mac)
        self.machine.write(CONFIG, (AGENT + hardware).encode())

    def join(self) -> None:
        """Become a host of the fleet, by a token that is good once."""
        token = self.casemate("host", "token", "create", self.host).ok().strip()
        command = f"casemate-agent join --manager 127.0.0.1:{self.outside.enrolment}"
        self.machine.run(command, stdin=token.encode(), timeout_s=PATIENCE_S)

    def start_agent(self) -> None:
        self.machine.run("systemctl start casemate-agent", timeout_s=PATIENCE_S)

    def stop_agent(self) -> None:
        self.machine.run("systemctl stop casemate-agent", timeout_s=PATIENCE_S)

    def kill_agent(self) -> None:
        """SIGKILL; systemd starts it again."""
        self.machine.run("systemctl kill -s SIGKILL casemate-agent")

    def log(self, lines: int = 60) -> str:
        """The end of the agent's log."""
        ask = f"systemctl status 'casemate-*' --no-pager -n 0; journalctl -u 'casemate-*' -n {lines} --no-pager -o cat"
        return self.machine.run(ask, check=False)

    def told(self, reason: str) -> int:
        """How many events about the host have this reason."""
        rows = self.casemate("events", f"host/{self.host}", "-o", "json").ok().splitlines()
        return sum(json.loads(row)["reason"] == reason for row in rows)

    def story(self) -> str:
        """What all of them said last, for whoever reads a failure: agent, relay, kernel, manager. Never raises."""
        try:
            inside = self.log()
        except LabFailed as error:
            inside = f"the server does not say: {error}"
        outside = self.outside.log.read_text(errors="replace")[-2500:]
        return f"--- agent and relay of {self.host}\n{inside}\n--- console\n{self.machine.console()}\n--- manager\n{outside}"

    def make_fleet(self) -> None:
        """The image of the tiny guest and the physical network that the ports reach."""
        digest = self.machine.run("cd /var/lib/casemate/library && sha256sum empty.img guest.elf").split()
        self.casemate("apply", "-f", "-", stdin=FLEET.replace("@DISK@", digest[0]).replace("@KERNEL@", digest[2])).ok()

    def apply(self, name: str, spec: str, cpu: str = "{count: 1}", memory: str = "{size: 64Mi}") -> None:
        """An environment of one instance of the tiny guest."""
        text = ENVIRONMENT.replace("@NAME@", name).replace("@SPEC@", spec)
        self.casemate("apply", "-f", "-", stdin=text.replace("@CPU@", cpu).replace("@MEMORY@", memory)).ok()

    def started(self, name: str) -> dict[str, Any]:
        """The one instance of an environment, once its domain runs."""
        return self.running(f"{name}-0")

    def running(self, instance: str) -> dict[str, Any]:
        """An instance, once its domain runs."""

        def runs() -> dict[str, Any]:
            found = self.get("instance", instance)
            return found if found.get("status", {}).get("pid") else {}

        found: dict[str, Any] = self.until(f"{instance} runs", runs)
        return found

    def deleted(self, name: str) -> None:
        """End an environment, and wait until nothing of it is left."""
        self.casemate("delete", "env", name, "--ignore-not-found", "--no-wait").ok()
        self.until(f"{name} is gone", lambda: not self.get("env", name))

    def functions(self) -> dict[str, Any]:
        """Virtual functions and devices as the agent's own driver reads them, from outside of the agent."""
        found: dict[str, Any] = json.loads(self.machine.run(f"python3 -c {shlex.quote(LOOK)}", timeout_s=60))
        return found

    def until(self, what: str, met: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
        """What ``met`` answers as soon as it is true; says now and then that it waits. Raises LabFailed."""
        began_s = said_s = time.monotonic()
        while not (answer := met()):
            now_s = time.monotonic()
            if now_s - began_s > timeout_s:
                raise LabFailed(f"not within {timeout_s:g} s: {what}")
            if now_s - said_s > PROGRESS_S:
                said_s = now_s
                self.say(f"{now_s - began_s:.0f} s waiting until {what}")
            time.sleep(0.3)
        return answer

    def joined(self) -> bool:
        """Whether the manager hears the host, and the host is ready."""
        return bool(self.get("host", self.host).get("status", {}).get("phase") == "Ready")


def write_whole(path: Path, data: bytes) -> None:
    """A file that others may read at the same time."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.rename(path)


def agent_archive(tree: Path) -> bytes:
    """This working tree's wheel, installed and compiled for the server, as a gzipped tar file."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        python = PROJECT / ".venv/bin/python"
        run([python, "-m", "hatchling", "build", "-t", "wheel", "-d", work], cwd=PROJECT)
        wheel = next(work.glob("*.whl"))
        packages = work / "packages"
        pip: list[str | Path] = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
        ]
        run([*pip, "--no-compile", "--target", packages, wheel])
        shutil.rmtree(packages / "bin", ignore_errors=True)
        tree_python(tree, "-m", "compileall", "-q", "-s", packages, packages)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
            for entry in sorted(packages.iterdir()):
                archive.add(entry, entry.name)
        return buffer.getvalue()


@contextmanager
def manager_beside(folder: Path) -> Iterator[Outside]:
    """A manager on loopback, as a process, and the environment of its operator."""
    folder.mkdir(parents=True, exist_ok=True)
    port, enrolment = free_port(), free_port()
    environ = clean_environment(folder)
    manager = [sys.executable, "-m", "casemate_manager"]
    state, operator = str(folder / "manager"), folder / "operator.yaml"
    run([*manager, "operator", "--state-dir", state, "--manager", f"127.0.0.1:{port}", "--out", operator])
    command = [*manager, "serve", "--state-dir", state]
    command += ["--listen", f"127.0.0.1:{port}", "--listen-enrolment", f"127.0.0.1:{enrolment}"]
    path = folder / "manager.log"
    with path.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd="/")
    try:
        yield Outside(port, enrolment, path, {**environ, "CASEMATE_CONFIG": str(operator)})
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def servers_up(folder: Path, say: Say, count: int = 1, hardware: str = HARDWARE) -> Iterator[list[Server]]:
    """Servers with our agent in them, joined to one manager, on one wire if they are two; all of it ended afterwards."""
    parts = build(say)
    wire = Wire(folder / "wire") if count > 1 else None
    with manager_beside(folder) as outside, ExitStack() as ends:
        servers = []
        for number in range(1, count + 1):
            name = Name(number)
            machine = Machine(parts, folder / name.host, (outside.port, outside.enrolment), name, wire)
            servers.append(Server(machine, outside, say))
            ends.callback(machine.stop)
            machine.power()
        archive = agent_archive(parts.tree)  # while they boot
        for server in servers:
            began = time.monotonic()
            server.machine.wait()
            say(f"{server.host}: booted in {time.monotonic() - server.machine.powered_s:.0f} s")
            try:
                server.settle(archive, hardware)
                say(f"{server.host}: agent installed and started in {time.monotonic() - began:.0f} s")
                server.until(f"{server.host} has joined", server.joined)
            except LabFailed as error:
                raise LabFailed(f"{error}\n{server.story()}") from error
            say(f"{server.host}: joined after {time.monotonic() - began:.0f} s")
        yield servers


@contextmanager
def server_up(folder: Path, say: Say) -> Iterator[Server]:
    """One server."""
    with servers_up(folder, say) as servers:
        yield servers[0]
