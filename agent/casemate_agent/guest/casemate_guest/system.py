"""What a guest does for itself: addresses at boot, processors that were added, cloud-init."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time

from .children import run
from .files import read_text, write_text
from .frames import MAX_TEXT
from .kernel import IN_CLOSE_WRITE, IN_MOVED_TO
from .network import network_commands
from .nics import NIC_WAIT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .frames import Message
    from .helper import Helper


class System:
    """Addresses at boot, processors that were added, and the state of cloud-init."""

    def __init__(self, helper: Helper) -> None:
        self.helper, self.loop, self.paths = helper, helper.loop, helper.paths
        self.addresses: list[str] = []
        self.network_error = ""
        self.cloud: Message = {"status": "none", "errors": []}

    def start(self) -> None:
        """Begin to look after the guest."""
        self.online_processors()
        write_text(f"{self.paths.sys}/devices/system/memory/auto_online_blocks", "online")
        with contextlib.suppress(OSError):
            self._listen(15, 1, self._uevents)  # NETLINK_KOBJECT_UEVENT, the kernel's own group
            self._listen(0, 0x10 | 0x100, self._addresses_changed)  # NETLINK_ROUTE, IPv4 and IPv6 addresses
        self._watch_cloud_init()
        self.loop.start(self._network())

    def _listen(self, protocol: int, groups: int, handler: Callable[[list[bytes]], None]) -> None:
        channel = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
        channel.bind((0, groups))

        def ready(_: int) -> None:
            messages = []
            with contextlib.suppress(OSError):  # would block, or some were lost: then we look anyway
                while True:
                    messages.append(channel.recv(65536))
            handler(messages)

        self.loop.watch(channel.fileno(), select.EPOLLIN, ready)
        self._channels = (*getattr(self, "_channels", ()), channel)

    def _uevents(self, messages: list[bytes]) -> None:
        if not messages or any(m.startswith(b"add@/devices/system/cpu/") for m in messages):
            self.online_processors()
        if not messages or any(b"virtio-ports" in m for m in messages):
            self.helper.port_appeared()
        if not messages or any(b"/block/" in m for m in messages):
            self.helper.volumes.disks_changed()

    def online_processors(self) -> None:
        """Bring every processor online that the host added."""
        folder = f"{self.paths.sys}/devices/system/cpu"
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(folder)):
                switch = f"{folder}/{name}/online"
                if name[3:].isdigit() and read_text(switch).strip() == "0" and write_text(switch, "1"):
                    self.helper.note("", "", "ProcessorOnline", name)

    async def _network(self) -> None:
        text, done = read_text(f"{self.paths.seed}/network-config"), f"{self.paths.run}/network-done"
        with contextlib.suppress(ValueError, AttributeError):
            name = json.loads(read_text(f"{self.paths.seed}/meta-data")).get("local-hostname")
            if name and not os.path.exists(done):
                write_text(self.paths.hostname, str(name))
                write_text(self.paths.etc_hostname, f"{name}\n")  # systemd sets it again from here
        if not os.path.exists(done):
            self._keys()
        if text and not os.path.exists(done):
            later: list[str] = []
            if await self._configure(text, later):
                end = time.monotonic() + NIC_WAIT_S
                while later and time.monotonic() < end:
                    await self.loop.sleep(0.5)
                    later.clear()
                    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
                        network_commands(text, later)
                    if not later:
                        await self._configure(text, None)
                if later:
                    await self._configure(text, None)  # which says what is missing
                else:
                    write_text(done, "")
        await self._read_addresses()

    async def _configure(self, text: str, later: list[str] | None) -> bool:
        """Bring about the seed's network-config, for the interfaces that are there; whether it was understood."""
        try:
            lines, servers, search = network_commands(text, later)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            self.network_error = f"network-config: {error}"
            self.helper.note("", "", "NetworkNotConfigured", self.network_error, "Warning")
            return False
        ended = await run(self.loop, ["ip", "-batch", "-"], "\n".join(lines).encode() + b"\n")
        self.network_error = "" if ended.code == 0 else ended.reason()
        if self.network_error:
            self.helper.note("", "", "NetworkNotConfigured", self.network_error, "Warning")
        if servers:
            told = "".join(f"nameserver {s}\n" for s in servers[:3])
            write_text(self.paths.resolv, told + (f"search {' '.join(search)}\n" if search else ""))
        return True

    def _keys(self) -> None:
        """The keys of the seed may log in as root; cloud-init would do the same, much later."""
        with contextlib.suppress(ValueError, AttributeError, TypeError, OSError):
            self.authorize(json.loads(read_text(f"{self.paths.seed}/meta-data")).get("public-keys") or [])

    def authorize(self, keys: list[str]) -> None:
        """Let these keys log in as root. Raises OSError."""
        if not keys:
            return
        os.makedirs(self.paths.ssh, mode=0o700, exist_ok=True)
        path = f"{self.paths.ssh}/authorized_keys"
        old = read_text(path)
        new = "\n" if old and not old.endswith("\n") else ""
        new += "".join(f"{key}\n" for key in map(str, keys) if key not in old)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
            file.write(new)

    def _addresses_changed(self, _: list[bytes]) -> None:
        self.loop.start(self._read_addresses())

    async def _read_addresses(self) -> None:
        ended = await run(self.loop, ["ip", "-json", "address"])
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = []
            for link in json.loads(ended.out):
                found += [f"{link['ifname']}={a['local']}" for a in link.get("addr_info", ()) if a["scope"] == "global"]
            if found != self.addresses:
                self.addresses = found[:64]
                self.helper.tell({"t": "addresses", "addresses": self.addresses})

    def _watch_cloud_init(self) -> None:
        # Our own image runs cloud-init only for the sake of user-data; a stock image runs it, and then us.
        wanted = os.path.exists(f"{self.paths.run}/user-data")
        if not wanted and not os.path.isdir(self.paths.cloud):
            return
        os.makedirs(self.paths.cloud, exist_ok=True)
        self.helper.inotify.add(self.paths.cloud, IN_MOVED_TO | IN_CLOSE_WRITE, lambda _: self.read_cloud_init())
        self.read_cloud_init()

    def read_cloud_init(self) -> None:
        """Tell the host when cloud-init has got further."""
        state: Message = {"status": "running", "errors": []}
        text = read_text(f"{self.paths.cloud}/result.json")
        if text:
            try:
                errors = [str(e)[:MAX_TEXT] for e in json.loads(text)["v1"]["errors"]][:8]
            except (ValueError, KeyError, TypeError):
                return  # half written; the rename that finishes it is seen too
            state = {"status": "error" if errors else "done", "errors": errors}
        if state != self.cloud:
            self.cloud = state
            self.helper.tell({"t": "cloud-init", **state})
            self.helper.cloud_init_changed.set()
