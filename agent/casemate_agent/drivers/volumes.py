"""Volumes as files of this host.

For: ``volumeports.Volumes``. What may live here: the layout of the folder, and making, growing and removing its files.

Layout, below the state folder::

    volumes/<uid>.raw          the disk of a volume, sparse
    volumes/.<uid>.*.part      one that is being made

Theory of operation. A volume is made beside its name, with its file system on it, synced, and linked to its name, which fails
where that is there already: so what has a name is whole, is a volume, and is never written again by us but to make it longer.
An empty file system is made here and nowhere else, on a file that nobody has seen yet; so there is no moment at which
something that holds data could be taken for empty. The format is raw and is told to QEMU: whatever a guest writes to the
first sectors of its disk stays what it is, bytes of that disk. Nothing here reads what a guest has written.
"""

import asyncio
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from casemate_agent.domain.names import check_uid
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.fetch import storage_error
from casemate_agent.drivers.files import UNFINISHED, sync_folder
from casemate_agent.drivers.tool import run_tool
from casemate_agent.drivers.volumeports import StoredVolume
from casemate_core.errors import InternalError, MachineError, NotFound
from casemate_core.quantity import MIB
from casemate_core.spec.instance import VolumeRef

_FILE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.raw\Z", re.ASCII)
#: Features of ext4 that kernels have had since 4.5, named one by one: the host's tools may know newer ones than the guest's
#: kernel does.
FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
#: Where mkfs.ext4 is looked for.
TOOLS = "/usr/sbin:/sbin:/usr/bin:/bin"
#: Characters of a label of ext4.
LABEL_CHARS = 16


class VolumeFailed(MachineError):
    """The file system of a new volume was not made."""

    reason = "VolumeFailed"


class VolumeFiles:
    """``volumeports.Volumes`` in a folder. One event loop; close it with ``close``."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "volumes"
        self._calls = DeadlineExecutor("volumes")
        self._making = asyncio.Lock()
        # QEMU's user passes through and lists nothing.
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        for left in self._folder.glob(f".*{UNFINISHED}"):
            left.unlink(missing_ok=True)  # of an agent that died while it made one: it never had a name

    def close(self) -> None:
        """Let the threads go."""
        self._calls.close()

    def path(self, uid: str) -> str:
        return str(self._folder / f"{check_uid(uid)}.raw")

    async def observe(self, deadline_s: float) -> Mapping[str, StoredVolume]:
        return await self._calls.run("list volumes", self._observe, deadline_s)

    def _observe(self) -> dict[str, StoredVolume]:
        found = {}
        for entry in os.scandir(self._folder):
            match = _FILE.match(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):  # removed since the folder was listed
                facts = entry.stat(follow_symlinks=False)
                found[match[1]] = StoredVolume(entry.path, facts.st_size // MIB, -(-facts.st_blocks * 512 // MIB))
        return found

    async def create(self, volume: VolumeRef, deadline_s: float) -> None:
        async with self._making:
            await self._run("make volume", lambda: self._create(volume, deadline_s), deadline_s)

    def _create(self, volume: VolumeRef, deadline_s: float) -> None:
        if volume.format != "raw":
            raise InternalError(f"volume format {volume.format!r} is not raw")
        target = Path(self.path(volume.uid))
        if target.exists():
            return
        descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{volume.uid}.", suffix=UNFINISHED)
        try:
            os.ftruncate(descriptor, volume.size_mib * MIB)
            _make_file_system(temporary, volume, deadline_s)
            os.fsync(descriptor)
            # Not renamed: a link is refused where the name is taken, by whomever.
            with suppress(FileExistsError):
                os.link(temporary, target)
        finally:
            os.close(descriptor)
            Path(temporary).unlink(missing_ok=True)
        sync_folder(self._folder)

    async def grow(self, volume: VolumeRef, deadline_s: float) -> None:
        def grow() -> None:
            try:
                descriptor = os.open(self.path(volume.uid), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise NotFound("volume", volume.uid) from None
            try:
                if os.fstat(descriptor).st_size < volume.size_mib * MIB:
                    os.ftruncate(descriptor, volume.size_mib * MIB)
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

        await self._run("grow volume", grow, deadline_s)

    async def remove(self, uid: str, deadline_s: float) -> None:
        def remove() -> None:
            Path(self.path(uid)).unlink(missing_ok=True)
            sync_folder(self._folder)

        await self._run("remove volume", remove, deadline_s)

    async def _run(self, what: str, work: Callable[[], None], deadline_s: float) -> None:
        try:
            await self._calls.run(what, work, deadline_s)
        except OSError as error:
            raise storage_error(what, error) from error


def _make_file_system(path: str, volume: VolumeRef, deadline_s: float) -> None:
    """An empty ext4 on a new file: its UUID is the volume's uid, its label the start of its name."""
    argv = ["mkfs.ext4", "-q", "-F", "-O", FEATURES, "-b", "4096", "-I", "256", "-i", "16384", "-m", "0"]
    # Inode tables and journal are holes of a new file, which read as zeros: nothing has to be written.
    argv += ["-U", volume.uid, "-L", volume.name[:LABEL_CHARS]]
    argv += ["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", "--", path]
    # Not by the settings of this host: a volume is the same wherever it is made.
    env = {"PATH": TOOLS, "LANG": "C.UTF-8", "MKE2FS_CONFIG": os.devnull}
    run_tool(argv, "e2fsprogs", VolumeFailed, deadline_s, env)
