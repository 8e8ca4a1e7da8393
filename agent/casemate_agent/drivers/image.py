"""The image store: images by digest, and the files made for each instance.

For: ``ports.Images``. What may live here: the layout of the store, and making and removing its files. How files come here
is ``fetch``, what may be in them ``imageformat``, what a seed holds ``seed``.

Layout, below the state folder::

    images/sha256-<hex>            any file known by its digest: disks, kernels, initial RAM disks, archives
    images/.sha256-<hex>.*.part    one under way
    instances/<uid>/root.qcow2     overlay over the image: the root disk; root-<n>.qcow2 after it was rebuilt n times
    instances/<uid>/seed.iso       NoCloud seed
    instances/<uid>/record.json    what the domain was defined with (the hypervisor's driver keeps it)
    instances/<uid>/console.log    what the guest wrote to its serial console (libvirt writes it)

Theory of operation. A file with its final name is whole: it was written beside it, synced and renamed. So what is found
after a crash is either done, or ends in ``.part`` and is a stray. Overlays are made by qemu-img, which owns the format,
with every format named and ``-u``: nothing is opened or probed while it works. The result is read back with our own
reader before it gets its name.
"""

import asyncio
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casemate_agent.domain.names import check_uid
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.fetch import SourceRules, fetch, storage_error
from casemate_agent.drivers.files import UNFINISHED, sync_folder, write_private
from casemate_agent.drivers.http import Download, http_download
from casemate_agent.drivers.imageformat import HEAD_BYTES, ImageInfo, ImageRefused, read_header, read_qcow2
from casemate_agent.drivers.ports import DomainFiles, StoredFiles
from casemate_agent.drivers.seed import build_seed, seed_files
from casemate_agent.drivers.tool import run_tool
from casemate_agent.guest import archive
from casemate_core.errors import DeadlineExceeded, InternalError, MachineError, NotFound, shown
from casemate_core.quantity import MIB, format_mib
from casemate_core.spec.instance import DIGEST, DesiredInstance, File, ImageRef

log = logging.getLogger(__name__)

ROOT = "root.qcow2"
_DISK = re.compile(r"root(?:-([1-9][0-9]{0,8}))?\.qcow2\Z", re.ASCII)
SEED = "seed.iso"
_STORED = re.compile(r"sha256-[0-9a-f]{64}\Z", re.ASCII)
#: A tar archive says so at this offset (POSIX.1-2017, pax, "ustar Interchange Format").
TAR_MAGIC_OFFSET = 257
TAR_MAGIC = b"ustar"


class OverlayFailed(MachineError):
    """qemu-img did not make the overlay."""

    reason = "OverlayFailed"


@dataclass(slots=True, eq=False)
class _Transfer:
    task: "asyncio.Task[None]"
    waiters: int = 0


class ImageStore:
    """``ports.Images`` in a folder. One event loop; close it with ``aclose``."""

    def __init__(self, state_dir: Path, rules: SourceRules, download: Download = http_download) -> None:
        self._images = state_dir / "images"
        self._instances = state_dir / "instances"
        self._rules = rules
        self._download = download
        self._helper = archive.helper()
        self._calls = DeadlineExecutor("files")
        self._transfers: dict[str, _Transfer] = {}
        self._making: set[str] = set()
        for folder in (self._images, self._instances):
            # QEMU's user passes through and lists nothing.
            folder.mkdir(mode=0o711, parents=True, exist_ok=True)

    async def aclose(self) -> None:
        """Give up transfers, and let the threads go."""
        for transfer in list(self._transfers.values()):
            transfer.task.cancel()
        await asyncio.gather(*(t.task for t in self._transfers.values()), return_exceptions=True)
        self._calls.close()

    # --- what is there ------------------------------------------------------------------------------------------------

    async def observe(self, deadline_s: float) -> StoredFiles:
        return await self._calls.run("list the store", self._observe, deadline_s)

    def _observe(self) -> StoredFiles:
        images, overlays, seeds, strays = {}, {}, {}, []
        disks: dict[str, tuple[int, ...]] = {}
        for entry in os.scandir(self._images):
            if _STORED.match(entry.name):
                images[entry.name.replace("-", ":", 1)] = entry.path
            elif not self._is_under_way(entry.name):
                strays.append(entry.path)
        for entry in os.scandir(self._instances):
            seed = Path(entry.path, SEED)
            numbers = _disk_numbers(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else ()
            has_root, has_seed = bool(numbers), seed.exists()
            if has_root:
                overlays[entry.name] = str(Path(entry.path, _root_name(numbers[-1])))
                disks[entry.name] = numbers
            if has_seed:
                seeds[entry.name] = str(seed)
            if entry.name in self._making:
                continue
            if not (has_root or has_seed):
                strays.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                strays += [file.path for file in os.scandir(entry.path) if file.name.endswith(UNFINISHED)]
        room = os.statvfs(self._images)
        return StoredFiles(
            images=images,
            overlays=overlays,
            seeds=seeds,
            strays=tuple(sorted(strays)),
            free_mib=room.f_bavail * room.f_frsize // MIB,
            total_mib=room.f_blocks * room.f_frsize // MIB,
            disks=disks,
        )

    def _is_under_way(self, name: str) -> bool:
        return any(name.startswith(f".{_stored_name(digest)}.") for digest in self._transfers)

    def files(self, desired: DesiredInstance) -> DomainFiles:
        image, folder = desired.image, self._folder(desired.uid)
        return DomainFiles(
            root=str(folder / _root_name(desired.disk)),
            root_format="qcow2",
            backing=str(self._path(image.file)),
            backing_format=image.format,
            seed=str(folder / SEED),
            archives=tuple(str(self._path(archive.file)) for archive in desired.archives),
            kernel=str(self._path(image.kernel)) if image.kernel else "",
            initrd=str(self._path(image.initrd)) if image.initrd else "",
            cmdline=image.cmdline,
        )

    def _path(self, file: File) -> Path:
        if not DIGEST.match(file.digest):
            raise ImageRefused(f"digest {shown(file.digest)!r} is not sha256 in hex", "write sha256: and 64 hex digits")
        return self._images / _stored_name(file.digest)

    def _folder(self, uid: str) -> Path:
        return self._instances / check_uid(uid)

    # --- images -------------------------------------------------------------------------------------------------------

    async def fetch(self, image: ImageRef, deadline_s: float) -> None:
        end = asyncio.get_running_loop().time() + deadline_s
        for file in (image.file, image.kernel, image.initrd):
            if file is not None:
                await self._fetch(file, end)
        await self._calls.run("check image", lambda: self._check(image), _left(end, "check image"))

    async def _fetch(self, file: File, end: float) -> None:
        """Join the transfer of this digest, or begin it. It is given up when the last one who waits for it leaves."""
        target = self._path(file)
        loop = asyncio.get_running_loop()
        if target.exists():
            return
        transfer = self._transfers.get(file.digest)
        if transfer is None:
            work = fetch(file, target, self._rules, self._calls, _left(end, "fetch image"), self._download)
            transfer = self._transfers[file.digest] = _Transfer(
                loop.create_task(work, name=f"fetch {file.digest[:19]}")
            )
            transfer.task.add_done_callback(lambda task: self._transferred(file.digest, task))
        transfer.waiters += 1
        try:
            async with asyncio.timeout_at(end):
                await asyncio.shield(transfer.task)
        except TimeoutError:
            raise DeadlineExceeded(f"fetch of {file.digest} is not done in time") from None
        finally:
            transfer.waiters -= 1
            if transfer.waiters == 0 and not transfer.task.done():
                transfer.task.cancel()
                await asyncio.wait([transfer.task])

    def _transferred(self, digest: str, task: "asyncio.Task[None]") -> None:
        self._transfers.pop(digest, None)
        if not task.cancelled():
            # Those who wait get the error; where the last one has just left, nobody asks for it, and asyncio would complain.
            task.exception()

    def _check(self, image: ImageRef) -> None:
        """Refuse, and forget, an image whose header does not keep the rules. Raises ImageRefused."""
        path = self._path(image.file)
        try:
            if image.type == "disk":
                _read_info(path, image.format)
            else:
                _check_archive(path)
        except ImageRefused:
            path.unlink(missing_ok=True)
            raise

    async def remove_image(self, digest: str, deadline_s: float) -> None:
        path = self._path(File("", digest))

        def remove() -> None:
            path.unlink(missing_ok=True)
            sync_folder(self._images)

        await self._calls.run("remove image", remove, deadline_s)

    # --- files of instances -------------------------------------------------------------------------------------------

    async def create_overlay(self, uid: str, image: ImageRef, size_mib: int, deadline_s: float, disk: int = 0) -> None:
        await self._make(
            uid, "make overlay", lambda: self._create_overlay(uid, image, size_mib, disk, deadline_s), deadline_s
        )

    async def remove_disks(self, uid: str, keep: int, deadline_s: float) -> None:
        folder = self._folder(uid)

        def remove() -> None:
            for number in _disk_numbers(folder):
                if number != keep:
                    (folder / _root_name(number)).unlink(missing_ok=True)
            sync_folder(folder)

        await self._calls.run("remove disks", remove, deadline_s)

    async def write_seed(self, desired: DesiredInstance, deadline_s: float) -> None:
        def write() -> None:
            data = build_seed(seed_files(desired, self._helper))
            # It may hold keys and passwords of the tenant: for root (and, by libvirt, its one QEMU) alone.
            write_private(self._folder(desired.uid) / SEED, data)

        await self._make(desired.uid, "write seed", write, deadline_s)

    async def _make(self, uid: str, what: str, work: Callable[[], None], deadline_s: float) -> None:
        self._making.add(uid)
        try:
            await self._calls.run(what, work, deadline_s)
        except OSError as error:
            raise storage_error(what, error) from error
        finally:
            self._making.discard(uid)

    def _create_overlay(self, uid: str, image: ImageRef, size_mib: int, disk: int, deadline_s: float) -> None:
        backing, target = self._path(image.file), self._folder(uid) / _root_name(disk)
        if not backing.exists():
            raise NotFound("image", image.file.digest)
        base = _read_info(backing, image.format)
        size = size_mib * MIB or base.virtual_bytes
        if size < base.virtual_bytes:
            raise ImageRefused(
                f"a disk of {format_mib(size_mib)} is smaller than its image ({base.virtual_bytes} bytes)",
                f"ask for at least {format_mib(-(-base.virtual_bytes // MIB))}",
            )
        if target.exists():
            _check_overlay(target, backing, image.format)
            return
        target.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{ROOT}.", suffix=UNFINISHED)
        try:
            _qemu_img_create(temporary, backing, image.format, size, deadline_s)
            _check_overlay(Path(temporary), backing, image.format)
            os.fsync(descriptor)
            os.rename(temporary, target)
            sync_folder(target.parent)
            sync_folder(self._instances)
        finally:
            os.close(descriptor)
            Path(temporary).unlink(missing_ok=True)

    async def remove_instance(self, uid: str, deadline_s: float) -> None:
        folder = self._folder(uid)

        def remove() -> None:
            if folder.exists():
                # The disk first: without it the folder is a stray, with it an instance.
                for number in _disk_numbers(folder):
                    (folder / _root_name(number)).unlink(missing_ok=True)
                (folder / SEED).unlink(missing_ok=True)
                shutil.rmtree(folder)
                sync_folder(self._instances)

        await self._calls.run("remove files", remove, deadline_s)

    async def remove_strays(self, deadline_s: float) -> None:
        def remove() -> None:
            for name in self._observe().strays:
                path = Path(name)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                log.info("removed stray %s", name)

        await self._calls.run("remove strays", remove, deadline_s)


def _left(end: float, what: str) -> float:
    left = end - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlineExceeded(f"{what}: no time left")
    return left


def _root_name(disk: int) -> str:
    return f"root-{disk}.qcow2" if disk else ROOT


def _disk_numbers(folder: Path) -> tuple[int, ...]:
    """Numbers of the root disks in an instance's folder, in order."""
    try:
        found = [match for name in os.listdir(folder) if (match := _DISK.match(name))]
    except FileNotFoundError:
        return ()
    return tuple(sorted(int(match[1] or 0) for match in found))


def _stored_name(digest: str) -> str:
    return digest.replace(":", "-", 1)


def _read_info(path: Path, declared: str) -> ImageInfo:
    with path.open("rb") as file:
        return read_header(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size, declared)


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    if head[TAR_MAGIC_OFFSET : TAR_MAGIC_OFFSET + len(TAR_MAGIC)] != TAR_MAGIC:
        raise ImageRefused("the archive is no tar file", "write it with podman save, without compression")


def _check_overlay(path: Path, backing: Path, backing_format: str) -> None:
    with path.open("rb") as file:
        info = read_qcow2(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size)
    if (info.backing, info.backing_format) != (str(backing), backing_format):
        raise InternalError(
            f"{path} lies over {shown(info.backing)} ({info.backing_format}), not over {backing} ({backing_format})"
        )


def _qemu_img_create(path: str, backing: Path, backing_format: str, size: int, deadline_s: float) -> None:
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", backing_format, "-b", str(backing)]
    run_tool([*argv, "--", path, str(size)], "qemu-utils", OverlayFailed, deadline_s)
