"""One emulated server: a QEMU process, and ssh into it.

What may live here: the machine's shape, starting, waiting, ending, commands and files over ssh. What is installed in it is
`server`'s.

Theory of operation. q35 with an IOMMU that translates, two sockets of two cores of two threads in two cells, for each cell a
PCIe host bridge of its own with six root ports; behind them two NICs that do SR-IOV (igb, one for each cell), two display
adapters and a test device that stand for cards to be given away, and five more that stand for GPUs (`GPUS`). Its disk is an
overlay that is gone with its folder. Everything listens on loopback. One ssh connection stays up; commands go through it.

Several servers are one image: who each is (name, machine id, UUID of its board, MAC addresses) comes from its number, by the
kernel's command line and by QEMU's. Servers on one ``Wire`` share an Ethernet segment: both ports of each, and one plain NIC
of each for what goes from host to host. The wire is a Unix socket; a server that is switched off and on comes back to it.

``thread=single`` (one host thread emulates all processors) because the other kind lost timers and hit an assertion of
QEMU's in the IOMMU, about once in eight boots.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.guards import LASTING
from support.hostlab import recipe
from support.hostlab.build import LabFailed, Parts

MEMORY_MIB = 6144
BOOT_TIMEOUT_S = 600.0
"""A boot takes about 50 s on two free cores. Whoever waits longer than that waits for other people's work, not for a fault."""
#: What stands for GPUs, each with its root port. The first two have what a GPU has: a driver of the host that makes nodes in
#: /dev/dri, function-level reset, MSI-X, error reporting, a BAR of 64 bits. The third has MSI, and is reset by its bus; the
#: fourth has memory that no reset empties. The fifth hangs behind a PCI bridge beside a function that the host uses: its group
#: can be given to nobody, and nothing resets it.
GPUS = (
    ("virtio-gpu-pci,aer=on,hostmem=512M", "rp04"),
    ("virtio-gpu-pci,aer=on,hostmem=512M", "rp14"),
    ("edu", "rp05"),
    ("ivshmem-plain,memdev=vram", "rp12"),
    ("edu,addr=1.0", "pb15"),
)
GPU_PARTS = (
    "-object memory-backend-ram,id=vram,size=16M,share=on",
    "-device pcie-pci-bridge,id=pb15,bus=rp15",
    "-device virtio-rng-pci,bus=pb15,addr=2.0",
)
ROOT_PORTS = 6


def loader(tree: Path, program: str) -> list[str]:
    """The start of a command that runs a program of the tree on this machine."""
    libraries = f"{tree}/usr/lib/x86_64-linux-gnu:{tree}/usr/lib/x86_64-linux-gnu/pulseaudio"
    return [f"{tree}/lib64/ld-linux-x86-64.so.2", "--library-path", libraries, f"{tree}/usr/bin/{program}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Name:
    """Who a server is: ``number`` counts from 1 and tells it from every other."""

    number: int = 1

    @property
    def host(self) -> str:
        """Its name, also as a host of the fleet: ``lab``, ``lab2``, ``lab3`` …"""
        return recipe.HOSTNAME + (str(self.number) if self.number > 1 else "")

    @property
    def ports(self) -> tuple[str, str]:
        """Permanent addresses of its two NIC ports."""
        return f"52:54:00:10:{self.number:02x}:00", f"52:54:00:10:{self.number:02x}:10"

    @property
    def uuid(self) -> str:
        """Of its board, as firmware says it; libvirt calls the host by it."""
        return f"5a6e0000-1ab0-4000-8000-{self.number:012d}"

    @property
    def machine_id(self) -> str:
        """As systemd says it."""
        return f"1234567890abcdef1234567890abcd{self.number:02x}"

    @property
    def address(self) -> str:
        """On the wire, of the host itself."""
        return f"10.98.0.{self.number}"


#: Permanent addresses of the two ports of the first server.
PORTS = Name().ports


@dataclass(frozen=True, slots=True)
class Wire:
    """An Ethernet segment between two servers: a Unix socket at ``path``, at which the first one listens."""

    path: Path


@dataclass(frozen=True, slots=True)
class Shape:
    """What changes from one boot of the same disk to the next: where its cards are plugged in."""

    ports: tuple[str, ...] = ("rp00", "rp10")
    """Root ports of the NICs (``rpCN``: cell C, port N); one that is left out is a card that is missing."""
    cards: tuple[tuple[str, str], ...] = (("bochs-display", "rp01"), ("bochs-display", "rp11"), ("pci-testdev", "rp02"))
    gpus: tuple[tuple[str, str], ...] = GPUS


@dataclass(slots=True)
class Machine:
    """A server in ``folder``. ``forwards`` are ports of this machine's loopback that it reaches on its own loopback."""

    parts: Parts
    folder: Path
    forwards: tuple[int, ...] = ()
    name: Name = Name()
    wire: Wire | None = None
    ssh_port: int = field(default_factory=free_port)
    #: When it was last switched on, of the monotonic clock.
    powered_s: float = 0.0
    _qemu: subprocess.Popen[bytes] | None = None
    _ssh: subprocess.Popen[bytes] | None = None

    # --- life ---

    def start(self, shape: Shape | None = None) -> None:
        """Switch it on, and return when it is ready. Raises LabFailed."""
        self.power(shape)
        self.wait()

    def power(self, shape: Shape | None = None) -> None:
        """Switch it on, on its disk (a fresh one the first time)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = self.folder / "disk.qcow2"
        if not disk.exists():
            create = ["create", "-q", "-f", "qcow2", "-b", str(self.parts.disk), "-F", "raw", str(disk)]
            subprocess.run([*loader(self.parts.tree, "qemu-img"), *create], check=True, env=self._environment())
        command = [*loader(self.parts.tree, "qemu-system-x86_64"), *self._arguments(shape or Shape())]
        with (self.folder / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), cwd="/"
            )
        LASTING.add(self._qemu.pid)
        self.powered_s = time.monotonic()

    def wait(self) -> None:
        """Until it answers, its devices are settled, and both ports have their driver."""
        give_up_s = time.monotonic() + BOOT_TIMEOUT_S
        probe = [*self._ssh_command(master=False), "-o", "ConnectTimeout=30", "root@127.0.0.1", "true"]
        while subprocess.run(probe, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode != 0:
            if self._qemu is None or self._qemu.poll() is not None:
                raise LabFailed(f"QEMU ended: {self._tail('qemu.log')}")
            if time.monotonic() > give_up_s:
                raise LabFailed(f"no ssh within {BOOT_TIMEOUT_S:.0f} s: {self._tail('console.log')}")
            time.sleep(0.5)
        self._connect()
        self.run("udevadm settle -t 120; systemctl is-system-running --wait || true", timeout_s=180)
        if "rcu" in (console := self._tail("console.log", 20000)) and "stall" in console:
            raise LabFailed(f"its kernel stalled: {console[-2000:]}")
        if self.wire is not None:
            self.run(
                f"n=$(basename $(dirname $(grep -l {self._plain_mac} /sys/class/net/*/address))); ip link set $n name wire0; "
                f"ip addr add {self.name.address}/24 dev wire0; ip link set wire0 up"
            )

    def _connect(self) -> None:
        self._disconnect()
        forwards = [word for port in self.forwards for word in ("-R", f"127.0.0.1:{port}:127.0.0.1:{port}")]
        command = [*self._ssh_command(master=True), "-N", "-o", "ExitOnForwardFailure=yes", *forwards, "root@127.0.0.1"]
        self._ssh = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        LASTING.add(self._ssh.pid)
        give_up_s = time.monotonic() + 60
        while not self._control.exists():
            if self._ssh.poll() is not None or time.monotonic() > give_up_s:
                raise LabFailed("the ssh connection that carries the commands does not come up")
            time.sleep(0.1)

    def _disconnect(self) -> None:
        if self._ssh is not None:
            self._ssh.terminate()
            self._ssh.wait(20)
            LASTING.discard(self._ssh.pid)
            self._ssh = None
        self._control.unlink(missing_ok=True)

    def stop(self) -> None:
        """End it at once, as a power cut does. Its disk stays."""
        self._disconnect()
        if self._qemu is not None:
            self._qemu.send_signal(signal.SIGTERM)
            try:
                self._qemu.wait(20)
            except subprocess.TimeoutExpired:
                self._qemu.kill()
                self._qemu.wait()
            LASTING.discard(self._qemu.pid)
            self._qemu = None

    def reboot(self, shape: Shape | None = None) -> None:
        """Power off properly (what was written is on its disk) and start again, its cards as ``shape`` says."""
        self.run("sync; systemctl poweroff", check=False)
        if self._qemu is not None:
            try:
                self._qemu.wait(60)
            except subprocess.TimeoutExpired:
                pass
        self.stop()
        self.start(shape)

    # --- commands ---

    def run(self, script: str, *, timeout_s: float = 120, check: bool = True, stdin: bytes = b"") -> str:
        """A shell script in the server; its output. Raises LabFailed where it fails and ``check`` is set."""
        command = [*self._ssh_command(master=False), "root@127.0.0.1", script]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LabFailed(f"no end within {timeout_s:.0f} s: {script[:200]}") from None
        if check and done.returncode != 0:
            said = (done.stdout[-1500:] + done.stderr[-1500:]).decode(errors="replace")
            raise LabFailed(f"status {done.returncode}: {script[:300]}\n{said}")
        return done.stdout.decode(errors="replace")

    def shell(self) -> int:
        """A shell for a person, on this terminal."""
        command = [*self._ssh_command(master=False), "-t", "root@127.0.0.1"]
        return subprocess.run(command, check=False).returncode

    def write(self, path: str, data: bytes) -> None:
        self.run(f"mkdir -p {shlex.quote(os.path.dirname(path))} && cat > {shlex.quote(path)}", stdin=data)

    def read(self, path: str) -> str:
        """Text of one file, without white space around it."""
        return self.run(f"cat {shlex.quote(path)}").strip()

    def monitor(self, command: str, **arguments: Any) -> Any:
        """A QMP command to the machine's QEMU; its answer. Raises LabFailed."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(20)
            channel.connect(str(self.folder / "qmp"))
            stream = channel.makefile("rw")
            json.loads(stream.readline())
            for name, given in (("qmp_capabilities", {}), (command, arguments)):
                stream.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline())
                    if "error" in answer:
                        raise LabFailed(f"{name}: {answer['error']}")
                    if "return" in answer:
                        break
            return answer["return"]

    # --- its parts ---

    @property
    def _control(self) -> Path:
        return self.folder / "ssh"

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "QEMU_MODULE_DIR": f"{self.parts.tree}/usr/lib/x86_64-linux-gnu/qemu"}

    def _ssh_command(self, *, master: bool) -> list[str]:
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ControlMaster": "yes" if master else "no",
            "ControlPath": str(self._control),
            "IdentitiesOnly": "yes",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "none", "-i", str(self.parts.key), "-p", str(self.ssh_port), *words]

    def console(self, size: int = 1500) -> str:
        """The end of what its kernel and systemd said, and of what its QEMU said."""
        return f"{self._tail('console.log', size)}\n{self._tail('qemu.log', size)}"

    @property
    def _plain_mac(self) -> str:
        return f"52:54:00:20:{self.name.number:02x}:01"

    def _tail(self, name: str, size: int = 3000) -> str:
        path = self.folder / name
        return path.read_bytes()[-size:].decode(errors="replace") if path.exists() else f"{name} is not there"

    def _arguments(self, shape: Shape) -> Sequence[str]:
        tree, half = self.parts.tree, MEMORY_MIB // 2
        lines = [
            f"-L {tree}/usr/share/qemu -L {tree}/usr/share/seabios -L {tree}/usr/lib/ipxe/qemu",
            "-nodefaults -no-user-config -display none -M q35,kernel-irqchip=off -accel tcg,thread=single,tb-size=512",
            "-cpu max,vendor=GenuineIntel,monitor=off,la57=off -smp 8,sockets=2,cores=2,threads=2",
            f"-m {MEMORY_MIB} -name {self.name.host} -uuid {self.name.uuid}",
            f"-object memory-backend-ram,id=m0,size={half}M -object memory-backend-ram,id=m1,size={half}M",
            "-numa node,nodeid=0,cpus=0-3,memdev=m0 -numa node,nodeid=1,cpus=4-7,memdev=m1 -numa dist,src=0,dst=1,val=21",
            "-device intel-iommu,intremap=on,device-iotlb=on,aw-bits=48",
            f"-kernel {self.parts.kernel} -initrd {self.parts.initrd}",
            f"-serial file:{self.folder}/console.log -qmp unix:{self.folder}/qmp,server,nowait",
            f"-drive if=none,id=d0,file={self.folder}/disk.qcow2,cache=unsafe,discard=unmap",
            "-device virtio-blk-pci,drive=d0,disable-legacy=on -device virtio-rng-pci",
            f"-netdev user,id=u0,restrict=on,hostfwd=tcp:127.0.0.1:{self.ssh_port}-:22",
            f"-device virtio-net-pci,netdev=u0,mac=52:54:00:00:00:{self.name.number:02x},romfile=",
        ]
        if self.wire is not None:
            end = "server=on" if self.name.number == 1 else "server=off,reconnect-ms=500"
            lines += [
                f"-netdev stream,id=wire,{end},addr.type=unix,addr.path={self.wire.path}",
                "-netdev hubport,id=far,hubid=1,netdev=wire",
                "-netdev hubport,id=plain,hubid=1",
                f"-device virtio-net-pci,netdev=plain,mac={self._plain_mac},romfile=",
            ]
        for cell, bus in ((0, "0x20"), (1, "0x60")):
            lines.append(f"-device pxb-pcie,id=pxb{cell},bus=pcie.0,bus_nr={bus},numa_node={cell}")
            lines += [
                f"-device pcie-root-port,id=rp{cell}{n},bus=pxb{cell},chassis={cell + 1},slot={n},addr={n}.0"
                for n in range(ROOT_PORTS)
            ]
        for number, (port, mac) in enumerate(zip(shape.ports, self.name.ports, strict=False)):
            if port:
                lines.append(f"-netdev hubport,id=n{number},hubid=1")
                lines.append(f"-device igb,id=igb{number},bus={port},netdev=n{number},mac={mac},romfile=")
        for number, (kind, port) in enumerate(shape.cards):
            lines.append(f"-device {kind},id=card{number},bus={port}")
        lines += GPU_PARTS if shape.gpus else ()
        for number, (kind, port) in enumerate(shape.gpus):
            lines.append(f"-device {kind},id=gpu{number},bus={port}")
        words = [word for line in lines for word in line.split()]
        who = f"systemd.hostname={self.name.host} systemd.machine_id={self.name.machine_id}"
        return [*words, "-append", f"{recipe.KERNEL_LINE} {who}"]
