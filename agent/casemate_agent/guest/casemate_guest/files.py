"""Where things lie in a guest, and small files that are read, written and removed there."""

from __future__ import annotations

import contextlib
import os

VOLUMES = "/volumes"  # where the instance's volumes are mounted


def log(text: str) -> None:
    """One line for the journal."""
    with contextlib.suppress(OSError):
        os.write(2, f"casemate-guest: {text[:2000]}\n".encode(errors="replace"))


def read_text(path: str, limit: int = 1 << 20) -> str:
    """The beginning of a file, or nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""


def write_text(path: str, text: str) -> bool:
    """Write a kernel file; whether it took it."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return False
    return True


def remove_folder(path: str) -> None:
    """Remove a folder of files, as far as it goes."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)


class Paths:
    """Where things lie. Tests give another root."""

    def __init__(self, root: str, podman: str, crun: str) -> None:
        self.podman, self.crun, self.root = podman, crun, root
        self.run = f"{root}/run/casemate"
        self.seed = f"{self.run}/seed"
        self.secrets = f"{self.run}/secrets"  # /run is memory: nothing of it is on a disk
        self.instance = f"{self.run}/instance.env"
        self.state = f"{root}/var/lib/casemate/guest.json"
        self.exits = f"{root}/run/libpod/exits"
        self.cloud = f"{root}/run/cloud-init"
        self.hosts = f"{root}/etc/hosts"
        self.resolv = f"{root}/etc/resolv.conf"
        self.ssh = f"{root}/root/.ssh"
        self.host_keys = f"{root}/etc/ssh"
        self.crun_state = f"{root}/run/crun"
        self.etc_hostname = f"{root}/etc/hostname"
        self.hostname = f"{root}/proc/sys/kernel/hostname"
        self.sys = f"{root}/sys"
        self.ip, self.nsenter = "ip", "nsenter"
        self.dev = f"{root}/dev"
        self.proc = f"{root}/proc"
        self.mounts = f"{root}/proc/self/mounts"
        self.cgroup = f"{root}/sys/fs/cgroup"
        self.cdi, self.run_cdi = f"{root}/etc/cdi", f"{root}/run/cdi"
        self.recipes = f"{root}/etc/casemate/devices.d"
        self.volumes = f"{root}{VOLUMES}"


def remove_tree(path: str) -> None:
    """Remove a folder of our own with all that is in it; nothing where there is none."""
    for folder, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(f"{folder}/{name}")
        for name in folders:
            os.rmdir(f"{folder}/{name}")
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def size_of(path: str) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
