"""Passages of a real host: the hypervisor's own migration, through Unix sockets and the streams between two hosts.

What may live here: the sockets that libvirt and QEMU see, what is at the other end of each, and the order in which they are
made. The migration itself is libvirt's (``LibvirtHypervisor.migrate``); bytes are passed on, and not read.

Theory of operation. Neither libvirtd nor QEMU has anything to do with a network here. Four streams make a migration:

    xml     the target's description of the domain, as it would make it itself
    virt    libvirt's client at the source to libvirtd at the target, for the handshake of a migration
    mem     QEMU to QEMU: the memory
    disk    QEMU to QEMU: the root disk, by NBD

At the source each of the last three is a Unix socket in a folder of this migration, which libvirt and QEMU dial; what dials
it is carried to the target, and there into the socket that libvirtd or QEMU listens on. libvirt uses one path for both hosts,
so the folder's name follows from the order. The folder goes when the passage is closed, or the transfer has ended.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from casemate_agent.drivers.passageports import Bytes, Crossings, Listening, Passage, PassageFailed
from casemate_core.errors import CasemateError
from casemate_core.spec.instance import DesiredInstance
from casemate_core.spec.operation import Order

log = logging.getLogger(__name__)

#: As libvirt and QEMU see it: a folder that both may use by the distribution's rules.
VIRT_DIR: Final = "/var/lib/libvirt/qemu/casemate"
VIRT, MEMORY, DISK, XML = "virt", "mem", "disk", "xml"
PIECE: Final = 1 << 18
MAX_XML: Final = 1 << 20
#: QEMU listens when libvirt has told it to; a stream may be a little earlier.
DOOR_S: Final = 15.0
XML_S: Final = 20.0


class Migrates(Protocol):
    """What is asked of the hypervisor."""

    async def migrate(self, uid: str, xml: str, *, virt: str, memory: str, disk: str, deadline_s: float) -> None:
        """Send a running domain, with its root disk: ``virt`` is the path of a socket that leads to the target's libvirtd,
        ``memory`` and ``disk`` are paths as libvirt sees them, at both hosts. Returns when it is off here and frozen there.
        Cancelled, it has given up before it ends."""
        ...


@dataclass(slots=True)
class _Open:
    order: Order
    xml: str
    folder: Path
    listening: Listening | None = None


class HostPassages:
    """``passageports.Passages``. ``folder`` is VIRT_DIR as this process sees it; ``socket`` that of this host's libvirtd."""

    def __init__(self, crossings: Crossings, hypervisor: Migrates, socket: str, folder: Path, cpu: str) -> None:
        self._crossings = crossings
        self._hypervisor = hypervisor
        self._socket = socket
        self._folder = folder
        self._open: dict[str, _Open] = {}
        self.cpu = cpu

    @property
    def where(self) -> str:
        return self._crossings.where

    def opened(self) -> Mapping[str, Passage]:
        return {
            uid: Passage(each.order.uid, each.listening.address)
            for uid, each in self._open.items()
            if each.listening is not None
        }

    async def aclose(self) -> None:
        """All of them."""
        for uid in list(self._open):
            await self.close(uid)

    async def open(self, desired: DesiredInstance, xml: str, deadline_s: float) -> None:
        await self.close(desired.uid)
        order = _order(desired)
        opened = _Open(order, xml, self._make_folder(order))
        self._open[desired.uid] = opened
        try:
            async with asyncio.timeout(deadline_s):
                opened.listening = await self._crossings.listen(
                    order, lambda name, stream: self._serve(opened, name, stream)
                )
        except BaseException:
            await self.close(desired.uid)
            raise

    async def close(self, uid: str) -> None:
        opened = self._open.pop(uid, None)
        if opened is None:
            return
        if opened.listening is not None:
            await opened.listening.close()
        shutil.rmtree(opened.folder, ignore_errors=True)

    async def _serve(self, opened: _Open, name: str, stream: Bytes) -> None:
        """What the source has opened, to its end."""
        if name == XML:
            await stream.write(opened.xml.encode())
            return
        paths = {VIRT: Path(self._socket), MEMORY: opened.folder / MEMORY, DISK: opened.folder / DISK}
        if name not in paths:
            raise PassageFailed(f"no stream is called {name!r}")
        reader, writer = await _door(paths[name])
        await _both_ways(stream, reader, writer)

    # --- sending ------------------------------------------------------------------------------------------------------

    async def send(self, desired: DesiredInstance, deadline_s: float) -> None:
        order = _order(desired)
        xml = await self._ask_xml(order)
        folder = self._make_folder(order)
        name = folder.name
        try:
            async with self._doors(order, folder):
                await self._hypervisor.migrate(
                    desired.uid,
                    xml,
                    virt=str(folder / VIRT),
                    memory=f"{VIRT_DIR}/{name}/{MEMORY}",
                    disk=f"{VIRT_DIR}/{name}/{DISK}",
                    deadline_s=deadline_s,
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _ask_xml(self, order: Order) -> str:
        stream = await self._crossings.dial(order, XML)
        found = b""
        try:
            async with asyncio.timeout(XML_S):
                while piece := await stream.read(PIECE):
                    found += piece
                    if len(found) > MAX_XML:
                        raise PassageFailed(f"the target's description has more than {MAX_XML} bytes")
        except TimeoutError:
            raise PassageFailed(f"the target does not say within {XML_S:g} s what it expects") from None
        finally:
            await stream.close()
        return found.decode("utf-8", "replace")

    @asynccontextmanager
    async def _doors(self, order: Order, folder: Path) -> AsyncIterator[None]:
        """Sockets that lead to the target, while the context is open."""
        tasks: set[asyncio.Task[None]] = set()
        failures: list[str] = []

        async def carry(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await _both_ways(await self._crossings.dial(order, name), reader, writer)
            except (CasemateError, OSError) as error:
                failures.append(f"{name}: {error}")
                log.warning("stream %s of migration %s: %s", name, order.uid, error)
            except asyncio.CancelledError:
                pass  # it has ended; asyncio would report it as an error of this callback
            finally:
                tasks.discard(task)
                writer.close()

        servers = []
        try:
            for name in (VIRT, MEMORY, DISK):
                server = await asyncio.start_unix_server(
                    lambda r, w, name=name: carry(name, r, w),  # type: ignore[misc]
                    str(folder / name),
                )
                servers.append(server)
                # QEMU may be another user; the folder lets in nobody but that one and root.
                os.chmod(folder / name, 0o666)
            yield
        except CasemateError as error:
            if failures:
                # What the hypervisor saw is a socket that closed; why, is known here.
                raise PassageFailed(f"{'; '.join(failures[:3])} ({error})") from None
            raise
        finally:
            for server in servers:
                server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in servers:
                await server.wait_closed()

    def _make_folder(self, order: Order) -> Path:
        """An empty folder for a migration, which QEMU's user may use."""
        folder = self._folder / hashlib.sha256(order.uid.encode()).hexdigest()[:12]
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._folder.mkdir(mode=0o755, exist_ok=True)
            folder.mkdir(mode=0o700)
            owner = self._folder.parent.stat()
            os.chown(folder, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise PassageFailed(f"{folder}: {error.strerror}") from None
        return folder


def _order(desired: DesiredInstance) -> Order:
    if desired.order is None or desired.order.move is None:
        raise PassageFailed(f"instance {desired.uid} has no order to move")
    return desired.order


async def _door(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Dial a socket that is there, or will be."""
    end_s = asyncio.get_running_loop().time() + DOOR_S
    while True:
        try:
            return await asyncio.open_unix_connection(str(path))
        except OSError as error:
            if asyncio.get_running_loop().time() > end_s:
                raise PassageFailed(f"nobody listens on {path}: {error.strerror}") from None
        await asyncio.sleep(0.05)


async def _both_ways(stream: Bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes both ways until either end closes."""

    async def out() -> None:
        while piece := await reader.read(PIECE):
            await stream.write(piece)

    async def back() -> None:
        while piece := await stream.read(PIECE):
            writer.write(piece)
            await writer.drain()

    ways = [asyncio.ensure_future(out()), asyncio.ensure_future(back())]
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in done:
            with contextlib.suppress(ConnectionError):
                way.result()
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        with contextlib.suppress(OSError):
            writer.close()
        await stream.close()


def cpu_name(cpuinfo: str) -> str:
    """Names the CPU that /proc/cpuinfo describes: its model, and a digest of what it can do."""
    words: dict[str, str] = {}
    for line in cpuinfo.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        words[key.strip()] = value.strip()
    flags = hashlib.sha256(" ".join(sorted(words.get("flags", "").split())).encode()).hexdigest()[:8]
    return f"{words.get('model name', 'unknown CPU')}, {flags}"[:128]
