"""A kernel with NVIDIA's vGPU driver, as far as it shows in sysfs: the files, and what writing them does."""

import os
from pathlib import Path

from casemate_agent.drivers.vgpu import CREATABLE, CURRENT, MDEV, PCI, HostShares, ShareFailed

CARD = "0000:17:00.0"
TYPES = {471: ("A100D-40C", 2), 480: ("A100D-20C", 4)}
"""Number, name and how many a board carries; all at one time of one type."""
VGPUS = "471 40960 2 -1 NVIDIA A100D-40C,480 20480 4 -1 NVIDIA A100D-20C"
"""The same, as the mock of the library is told it."""


class Kernel(HostShares):
    """The driver, on a folder: what it writes, a kernel answers. ``dies_at``: the agent's process ends before that write, or
    (negative) after it; ``deaf``: the kernel takes what is written and does nothing."""

    writes = 0
    dies_at = 0
    deaf = False

    def _tell(self, path: Path, text: str) -> None:
        self.writes += 1
        if self.writes == self.dies_at:
            raise KilledError
        if not self.deaf:
            act(self._root, path, text)
        if self.writes == -self.dies_at:
            raise KilledError


class KilledError(BaseException):
    """The process is gone."""


def card(root: Path, vfs: int = 0) -> Path:
    """The GPU's folder, with so many virtual functions; its first files."""
    folder = root / PCI / CARD
    folder.mkdir(parents=True)
    for name, text in (("vendor", "0x10de"), ("class", "0x030200")):
        (folder / name).write_text(text)
    drivers = root / "sys/bus/pci/drivers/nvidia"
    drivers.mkdir(parents=True)
    (folder / "driver").symlink_to(drivers)
    for number in range(vfs):
        function = root / PCI / f"0000:17:00.{number + 4}"
        (function / "nvidia").mkdir(parents=True)
        (function / "physfn").symlink_to(folder)
        (folder / f"virtfn{number}").symlink_to(function)
        (function / CURRENT).write_text("0\n")
    boot = root / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("one")
    return folder


def mediated(root: Path) -> None:
    """The card offers mediated devices."""
    (root / MDEV).mkdir(parents=True)
    for number, (name, _) in TYPES.items():
        kind = root / PCI / CARD / f"mdev_supported_types/nvidia-{number}"
        kind.mkdir(parents=True)
        (kind / "name").write_text(f"NVIDIA {name}\n")
        (kind / "create").write_text("")
    _tell_room(root)


def functions(root: Path) -> None:
    """The card's virtual functions may be vGPUs."""
    _tell_room(root)


def act(root: Path, path: Path, text: str) -> None:
    """What the kernel does when this is written."""
    if path.name == "create":
        if not int((path.parent / "available_instances").read_text()):
            raise ShareFailed(f"{path}: No space left on device")
        device = path.parents[2] / text
        device.mkdir()
        (device / "mdev_type").symlink_to(path.parent)
        (device / "remove").write_text("")
        (root / MDEV / text).symlink_to(device)
    elif path.name == "remove":
        device = Path(os.path.realpath(path.parent))
        (root / MDEV / device.name).unlink()
        for child in device.iterdir():
            child.unlink()
        device.rmdir()
    else:
        path.write_text(f"{text}\n")
    _tell_room(root)


def _tell_room(root: Path) -> None:
    card = root / PCI / CARD
    kinds = [int(os.readlink(d / "mdev_type").rpartition("-")[2]) for d in card.iterdir() if (d / "mdev_type").exists()]
    vfs = [link.resolve() for link in sorted(card.glob("virtfn*"))]
    kinds += [number for vf in vfs if (number := int((vf / CURRENT).read_text()))]
    room = {n: most - len(kinds) if set(kinds) <= {n} else 0 for n, (_, most) in TYPES.items()}
    for number in TYPES:
        if (kind := card / f"mdev_supported_types/nvidia-{number}").exists():
            (kind / "available_instances").write_text(f"{room[number]}\n")
    for vf in vfs:
        free = not int((vf / CURRENT).read_text())
        lines = [f"{n}  : NVIDIA {TYPES[n][0]}" for n in TYPES if free and room[n]]
        (vf / CREATABLE).write_text("\n".join(["ID    : vGPU Name", *lines]) + "\n")
