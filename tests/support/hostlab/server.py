"""What is installed in an emulated server, and the fleet around it: our agent as a service, a manager on this machine.

Theory of operation. The wheel is built from the working tree, installed by pip into a folder of this machine, compiled by
the server's own Python, and carried over as one archive: pip itself needs most of a minute on an emulated processor. The
units are the ones that are shipped, with their confinement. The host joins by a token, and speaks TLS; it dials the server's
own loopback, and ssh carries those ports to the manager's.
"""

import io
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.fleet import Done, casemate, clean_environment
from support.hostlab import recipe
from support.hostlab.build import PROJECT, LabFailed, Parts, Say, build, run, tree_python
from support.hostlab.machine import PORTS, Machine, free_port

HOST = "lab"
CONFIG = "/etc/casemate/agent.toml"
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
HARDWARE = f"""
[[ports]]
mac = "{PORTS[0]}"
networks = ["fronthaul"]
vfs = 4

[[ports]]
mac = "{PORTS[1]}"
networks = ["fronthaul"]
vfs = 2

[[devices]]
vendor = "1234"
device = "1111"
labels = {{ type = "card" }}

[[devices]]
vendor = "1b36"
device = "0005"
labels = {{ type = "probe" }}
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


@dataclass(slots=True)
class Server:
    """An emulated server, a manager, and ``casemate`` between them."""

    machine: Machine
    folder: Path
    port: int
    enrolment: int
    environ: dict[str, str]
    uids: dict[str, str] = field(default_factory=dict)

    # --- as a user ---

    def casemate(self, *arguments: str, stdin: str = "", timeout_s: float = 60) -> Done:
        return casemate(*arguments, environ=self.environ, stdin=stdin, timeout_s=timeout_s)

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

    def install(self) -> None:
        """The agent of this working tree, as a service that is not started yet."""
        archive = agent_archive(self.machine.parts.tree)
        target = f"/usr/local/lib/python{recipe.PYTHON}/dist-packages"
        self.machine.run(f"tar -x -z -C {target} -f -", stdin=archive, timeout_s=120)
        for name, place in SHIPPED.items():
            self.machine.write(place, (PROJECT / "agent" / name).read_bytes())
        for name in ("casemate", "casemate-agent"):
            package = "casemate_cli" if name == "casemate" else "casemate_agent"
            script = f'#!/bin/sh\nexec /usr/bin/python3 -m {package} "$@"\n'
            self.machine.run(f"cat > /usr/bin/{name} && chmod 755 /usr/bin/{name}", stdin=script.encode())
        self.machine.write("/etc/profile.d/casemate.sh", self.profile().encode())
        self.machine.write(OPERATOR, Path(self.environ["CASEMATE_CONFIG"]).read_bytes())
        self.machine.run(f"chmod 600 {OPERATOR}; systemd-sysusers; systemctl daemon-reload")
        self.machine.run("systemctl restart systemd-modules-load", timeout_s=60)

    def profile(self) -> str:
        """What a shell in the server needs to have `casemate` ask the manager."""
        return f"export CASEMATE_CONFIG={OPERATOR}\n"

    def configure(self, hardware: str = HARDWARE) -> None:
        """Settings of the agent; they hold from its next start."""
        self.machine.write(CONFIG, (AGENT + hardware).encode())

    def join(self) -> None:
        """Become a host of the fleet, by a token that is good once."""
        token = self.casemate("host", "token", "create", HOST).ok().strip()
        command = f"casemate-agent join --manager 127.0.0.1:{self.enrolment}"
        self.machine.run(command, stdin=token.encode(), timeout_s=120)

    def start_agent(self) -> None:
        self.machine.run("systemctl start casemate-agent", timeout_s=300)

    def stop_agent(self) -> None:
        self.machine.run("systemctl stop casemate-agent", timeout_s=60)

    def kill_agent(self) -> None:
        """SIGKILL; systemd starts it again."""
        self.machine.run("systemctl kill -s SIGKILL casemate-agent")

    def log(self, lines: int = 60) -> str:
        """The end of the agent's log."""
        ask = f"systemctl status 'casemate-*' --no-pager -n 0; journalctl -u 'casemate-*' -n {lines} --no-pager -o cat"
        return self.machine.run(ask, check=False)

    def make_fleet(self) -> None:
        """The image of the tiny guest and the physical network that the ports reach."""
        digest = self.machine.run("cd /var/lib/casemate/library && sha256sum empty.img guest.elf").split()
        self.casemate("apply", "-f", "-", stdin=FLEET.replace("@DISK@", digest[0]).replace("@KERNEL@", digest[2])).ok()

    def apply(self, name: str, spec: str, cpu: str = "{count: 1}", memory: str = "{size: 64Mi}") -> None:
        """An environment of one instance of the tiny guest."""
        text = ENVIRONMENT.replace("@NAME@", name).replace("@SPEC@", spec)
        self.casemate("apply", "-f", "-", stdin=text.replace("@CPU@", cpu).replace("@MEMORY@", memory)).ok()

    def started(self, name: str, timeout_s: float = 120) -> dict[str, Any]:
        """The one instance of an environment, once its domain runs."""

        def runs() -> dict[str, Any]:
            found = self.get("instance", f"{name}-0")
            return found if found.get("status", {}).get("pid") else {}

        found: dict[str, Any] = self.until(f"{name} runs", runs, timeout_s)
        return found

    def deleted(self, name: str, timeout_s: float = 120) -> None:
        """End an environment, and wait until nothing of it is left."""
        self.casemate("delete", "env", name, "--ignore-not-found", "--no-wait").ok()
        self.until(f"{name} is gone", lambda: not self.get("env", name), timeout_s)

    def functions(self) -> dict[str, Any]:
        """Virtual functions and devices as the agent's own driver reads them, from outside of the agent."""
        found: dict[str, Any] = json.loads(self.machine.run(f"python3 -c {shlex.quote(LOOK)}", timeout_s=60))
        return found

    def until(self, what: str, met: Callable[[], Any], timeout_s: float = 90) -> Any:
        """What ``met`` answers as soon as it is true. Raises LabFailed, with the agent's log."""
        give_up_s = time.monotonic() + timeout_s
        while not (answer := met()):
            if time.monotonic() > give_up_s:
                raise LabFailed(f"not within {timeout_s:g} s: {what}\n{self.log()}")
            time.sleep(0.5)
        return answer

    def joined(self) -> bool:
        """Whether the manager hears the host, and the host is ready."""
        return bool(self.get("host", HOST).get("status", {}).get("phase") == "Ready")


def agent_archive(tree: Path) -> bytes:
    """This working tree's wheel, installed and compiled for the server, as a gzipped tar file."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        python = PROJECT / ".venv/bin/python"
        run([python, "-m", "hatchling", "build", "-t", "wheel", "-d", work], cwd=PROJECT)
        wheel = next(work.glob("*.whl"))
        packages = work / "packages"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index"]
        run([*pip, "--no-compile", "--target", packages, wheel])
        shutil.rmtree(packages / "bin", ignore_errors=True)
        tree_python(tree, "-m", "compileall", "-q", "-s", packages, packages)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
            for entry in sorted(packages.iterdir()):
                archive.add(entry, entry.name)
        return buffer.getvalue()


@contextmanager
def manager_beside(folder: Path, port: int, enrolment: int) -> Iterator[Path]:
    """A manager on loopback, as a process; the file of its operator."""
    environ = clean_environment(folder)
    manager = [sys.executable, "-m", "casemate_manager"]
    state, operator = str(folder / "manager"), folder / "operator.yaml"
    run([*manager, "operator", "--state-dir", state, "--manager", f"127.0.0.1:{port}", "--out", operator])
    command = [*manager, "serve", "--state-dir", state]
    command += ["--listen", f"127.0.0.1:{port}", "--listen-enrolment", f"127.0.0.1:{enrolment}"]
    with (folder / "manager.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd="/")
    try:
        yield operator
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def server_up(folder: Path, say: Say, hardware: str = HARDWARE, parts: Parts | None = None) -> Iterator[Server]:
    """A server with our agent in it, joined to a manager; all of it ended afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    port, enrolment = free_port(), free_port()
    machine = Machine(parts or build(say), folder / "machine", forwards=(port, enrolment))
    with manager_beside(folder, port, enrolment) as operator:
        environ = {**clean_environment(folder), "CASEMATE_CONFIG": str(operator)}
        server = Server(machine, folder, port, enrolment, environ)
        try:
            began = time.monotonic()
            machine.start()
            say(f"booted in {time.monotonic() - began:.0f} s")
            server.install()
            server.configure(hardware)
            machine.run("systemctl start libvirtd", timeout_s=120)
            server.join()
            server.start_agent()
            say(f"agent installed after {time.monotonic() - began:.0f} s")
            server.until("the host has joined", server.joined, 300)
            say(f"joined after {time.monotonic() - began:.0f} s")
            yield server
        finally:
            machine.stop()
