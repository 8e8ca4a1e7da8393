"""Whether KVM runs guests on this machine: found out by running one.

For: ``Hypervisor.virtualisation``. What may live here: the probe and its memory on disk.

Theory of operation. /dev/kvm proves nothing: on machines that are themselves guests it may exist, pass every ioctl, and
then never run a guest. So three questions, the cheap ones first: does the processor say vmx or svm; can /dev/kvm be
opened; and does a machine with ``-accel kvm -cpu host`` really execute? The last is a boot sector of nine bytes that
writes one byte to QEMU's exit device, which ends QEMU with a status that nothing else gives. It takes a second at most,
so the answer is kept on disk for as long as kernel, QEMU and boot are the same.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from casemate_agent.drivers.files import write_private

EMULATOR = "qemu-system-x86_64"
EXIT_PORT = 0xF4
EXIT_VALUE = 0x2A
#: QEMU's isa-debug-exit ends it with (value << 1) | 1.
EXIT_STATUS = (EXIT_VALUE << 1) | 1
BOOT_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Virtualisation:
    """``kind`` is ``kvm`` or ``tcg``; ``reason`` says why not KVM."""

    kind: str
    reason: str = ""


def boot_sector() -> bytes:
    """512 bytes that a BIOS starts: mov al, VALUE; mov dx, PORT; out dx, al; hlt; jump back."""
    code = bytes([0xB0, EXIT_VALUE, 0xBA, EXIT_PORT & 0xFF, EXIT_PORT >> 8, 0xEE, 0xF4, 0xEB, 0xFD])
    return code.ljust(510, b"\0") + b"\x55\xaa"


def runs_guest(accelerator: str, cpu: str, deadline_s: float = BOOT_DEADLINE_S) -> str:
    """Boot the sector under ``accelerator``; empty where it ran, else what went wrong."""
    with tempfile.TemporaryDirectory(prefix="casemate-probe-") as folder:
        disk = Path(folder, "boot.img")
        disk.write_bytes(boot_sector())
        # The BIOS refuses a disk that is smaller than one track of its made-up geometry.
        os.truncate(disk, 2**20)
        argv = [
            EMULATOR,
            *("-nodefaults", "-no-user-config", "-display", "none", "-machine", f"q35,accel={accelerator}"),
            *("-cpu", cpu, "-m", "32", "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=0x1"),
            *("-drive", f"file={disk},format=raw,if=virtio"),
        ]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline_s, check=False)
        except subprocess.TimeoutExpired:
            return f"a guest under {accelerator} did not execute within {deadline_s:g} s"
        except OSError as error:
            return f"{EMULATOR}: {error.strerror}"
    if done.returncode == EXIT_STATUS:
        return ""
    text = " ".join(done.stderr.decode(errors="replace").split())[-300:]
    return f"a guest under {accelerator} ended with status {done.returncode}: {text}"


def probe(cache: Path, cpuinfo: Path = Path("/proc/cpuinfo"), device: Path = Path("/dev/kvm")) -> Virtualisation:
    """What guests run on here; from ``cache`` where the machine is still the one that it was written on."""
    key = _key()
    try:
        known = json.loads(cache.read_text())
        if known["key"] == key and known["kind"] in ("kvm", "tcg"):
            return Virtualisation(known["kind"], known["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never written, or not readable: find out again
    found = _probe(cpuinfo, device)
    write_private(cache, json.dumps({"key": key} | asdict(found)).encode(), mode=0o644)
    return found


def probe_now() -> Virtualisation:
    """What guests run on here, found out afresh."""
    return _probe(Path("/proc/cpuinfo"), Path("/dev/kvm"))


def _probe(cpuinfo: Path, device: Path) -> Virtualisation:
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    if not {"vmx", "svm"} & set(flags.group(1).split() if flags else ()):
        return Virtualisation(
            "tcg", "the processor shows neither vmx nor svm (off in the firmware, or a VM without nesting)"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        return Virtualisation("tcg", f"{device} cannot be opened (module kvm_intel or kvm_amd not loaded?)")
    failure = runs_guest("kvm", "host")
    return Virtualisation("tcg", failure) if failure else Virtualisation("kvm")


def _key() -> str:
    """Kernel, boot and QEMU: what the answer depends on."""
    emulator = shutil.which(EMULATOR)
    if emulator is None:
        return "no QEMU"
    stat = os.stat(emulator)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().release} {boot} {emulator} {stat.st_size} {stat.st_mtime_ns}"
