"""The instance's volumes: mounted before the pods that use them, and grown."""

from __future__ import annotations

import os

from .children import run
from .files import VOLUMES, read_text
from .loop import Signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .frames import Message
    from .helper import Helper
    from .loop import Loop

VOLUME_AGAIN_S, VOLUME_AGAIN_MAX_S = 1.0, 30.0
VOLUME_QUIET = 3  # tries of a volume that are not worth a warning: its disk may only be on its way


class Volume:
    """A disk that outlives the guest. ``problem`` says why it is not mounted; empty: it is."""

    def __init__(self, name: str, serial: str, read_only: bool, loop: Loop) -> None:
        self.name, self.serial, self.read_only = name, serial, read_only
        self.problem = "is not mounted yet"
        self.growing = False
        self.wake = Signal(loop)


class Volumes:
    """Mounts the instance's volumes, by serial number, before the pods that use them run; grows their file systems.

    Nothing is ever formatted here: a volume comes with a file system. What its owner put there instead is mounted as it is, or
    not at all.
    """

    def __init__(self, helper: Helper) -> None:
        self.helper, self.loop, self.paths = helper, helper.loop, helper.paths
        self.volumes: list[Volume] = []

    def start(self) -> None:
        """Mount what the seed names, and go on trying."""
        for entry in self.helper.meta().get("casemate-volumes") or ():
            name = str(entry["name"])
            if not name.replace("-", "").isalnum() or len(name) > 63:
                self.helper.note("", "", "VolumeNotMounted", f"{name[:64]!r} is not a name", "Warning")
                continue
            volume = Volume(name, str(entry["serial"]), bool(entry["readOnly"]), self.loop)
            self.volumes.append(volume)
            self.loop.start(self._keep(volume))

    def problem(self, manifest: Message) -> str:
        """Why a pod cannot run yet: a volume that it reaches by a path of the guest is not mounted."""
        waiting = [volume for volume in self.volumes if volume.problem]
        if not waiting:
            return ""
        for entry in manifest["spec"].get("volumes") or ():
            path = os.path.normpath(str((entry.get("hostPath") or {}).get("path") or "."))
            for volume in waiting:
                mount = f"{VOLUMES}/{volume.name}"
                if f"{path}/".startswith(f"{mount}/") or f"{mount}/".startswith(f"{path.rstrip('/')}/"):
                    return f"volume {volume.name} {volume.problem}"
        return ""

    def disks_changed(self) -> None:
        """The kernel tells of a disk: one may have come, or have grown."""
        for volume in self.volumes:
            if volume.problem:
                volume.wake.set()
            elif not volume.read_only:
                self.loop.start(self._grow(volume))

    async def _keep(self, volume: Volume) -> None:
        pause_s, tries, told = VOLUME_AGAIN_S, 0, ""
        while problem := await self._mount(volume):
            tries += 1
            if told != problem and (tries >= VOLUME_QUIET or not problem.startswith("has no disk")):
                self.helper.note("", "", "VolumeNotMounted", f"volume {volume.name} {problem}", "Warning")
                told = problem
            if problem != volume.problem:
                volume.problem = problem
                self._tell()
            await volume.wake.wait(pause_s)
            pause_s = min(VOLUME_AGAIN_MAX_S, 2 * pause_s)
        volume.problem = ""
        self._tell()
        if not volume.read_only:
            await self._grow(volume)

    def _tell(self) -> None:
        for pod in self.helper.pods.pods.values():
            pod.wake.set()

    def _mounted(self, target: str) -> bool:
        lines = read_text(self.paths.mounts).splitlines()
        return any(line.split(" ")[1:2] == [target] for line in lines)

    async def _mount(self, volume: Volume) -> str:
        """Why it cannot be mounted; empty where it is."""
        target = f"{self.paths.volumes}/{volume.name}"
        if self._mounted(target):
            return ""
        device = self.helper.disk(volume.serial)
        if not device:
            return f"has no disk with the serial number {volume.serial}"
        try:
            os.makedirs(target, exist_ok=True)
        except OSError as error:
            return f"has no folder: {error}"
        # Blocks that files give up go back to the host.
        options = ["ro", "ro,noload"] if volume.read_only else ["discard", "defaults"]
        reason = ""
        for option in options:
            ended = await run(self.loop, ["mount", "-o", option, device, target])
            if ended.code == 0:
                if option == "ro,noload":
                    # It was not unmounted when it was last written to, and its journal cannot be played without writing.
                    self.helper.note(
                        "", "", "VolumeUnclean", f"volume {volume.name} is read without its journal", "Warning"
                    )
                return ""
            reason = reason or ended.reason()
        return f"is not mounted: {reason}"

    async def _grow(self, volume: Volume) -> None:
        """Have its file system as large as its disk."""
        if volume.growing:
            return
        volume.growing = True
        try:
            device = self.helper.disk(volume.serial)
            while device and file_system_is_smaller(device):
                ended = await run(self.loop, ["resize2fs", device], timeout_s=600.0)
                if ended.code != 0 or file_system_is_smaller(device):
                    text = f"the file system of volume {volume.name} does not grow: {ended.reason()}"
                    self.helper.note("", "", "VolumeNotGrown", text, "Warning")
                    return
                self.helper.note("", "", "VolumeGrown", f"the file system of volume {volume.name} has grown")
        finally:
            volume.growing = False


def file_system_is_smaller(device: str) -> bool:
    """Whether a disk holds an ext4 that leaves a block or more of it unused. False for anything else, and for what is unknown."""
    try:
        with open(device, "rb", buffering=0) as disk:
            disk.seek(1024)
            head = disk.read(1024)
            size = disk.seek(0, os.SEEK_END)
    except OSError:
        return False
    if len(head) < 1024 or head[0x38:0x3A] != b"\x53\xef":
        return False
    low, log_block, incompatible, high = (
        int.from_bytes(head[at : at + 4], "little") for at in (0x04, 0x18, 0x60, 0x150)
    )
    blocks = low | (high << 32 if incompatible & 0x80 else 0)  # the feature 64bit
    return log_block <= 6 and size // (1024 << log_block) > blocks
