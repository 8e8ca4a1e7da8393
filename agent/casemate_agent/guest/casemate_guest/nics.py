"""Interfaces of the guest that go into a pod's network."""

from __future__ import annotations

import contextlib
import json
import time

from .children import run
from .files import read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .files import Paths
    from .frames import Message
    from .loop import Loop

NIC_WAIT_S = 60.0  # for an interface to appear: an emulated guest loads its driver late
NIC_BACK_S = 10.0  # for it to come back out of a network that is gone: the kernel does so a moment later


class PodNics:
    """Interfaces of the guest that go into the network of a pod: a virtual function, or any other, known by its MAC address.

    The seed says which, for it is of the domain that runs. An interface is given before the pod's first container starts, and
    again wherever the pod's network was made anew (the guest was rebooted). It comes back by itself: when the network of a
    pod goes, the kernel moves what is hardware in it to the guest's own (net/core/dev.c, default_device_exit_net). In its pod
    it is looked for by its permanent address too, for a container may give it another one.
    """

    def __init__(self, loop: Loop, paths: Paths) -> None:
        self.loop, self.paths = loop, paths
        self.wanted: list[Message] = []
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
            for entry in json.loads(read_text(f"{paths.seed}/meta-data")).get("casemate-pod-interfaces") or []:
                fields = {key: str(entry[key]) for key in ("pod", "mac", "name", "guest-name", "address")}
                if not any(c.isspace() for value in fields.values() for c in value):
                    self.wanted.append({**fields, "mac": fields["mac"].lower(), "mtu": int(entry["mtu"])})

    def of(self, pod: str) -> list[Message]:
        """Those of one pod, in their order."""
        return [nic for nic in self.wanted if nic["pod"] == pod]

    async def give(self, pod: str, pid: int) -> str:
        """Have the pod's interfaces in the network of this process; why not, or nothing. Done again it changes nothing."""
        for nic in self.of(pod):
            inside = f"--net=/proc/{pid}/ns/net"
            name = await self._find(nic, [self.paths.nsenter, inside])
            if not name:
                name = await self._await(nic, NIC_WAIT_S)
                if not name:
                    return (
                        f"interface {nic['mac']} of pod {pod} has not appeared in the guest: is there a driver for it?"
                    )
                # Under a name of its own on the way: the pod's network has an eth0 already.
                moving = f"to-{nic['guest-name']}"
                lines = [f"link set {name} down", f"link set {name} name {moving}", f"link set {moving} netns {pid}"]
                if problem := await self._ip([], lines):
                    return f"interface {nic['mac']} cannot be moved into pod {pod}: {problem}"
                name = moving
            lines = [] if name == nic["name"] else [f"link set {name} down", f"link set {name} name {nic['name']}"]
            lines += [f"link set {nic['name']} mtu {nic['mtu']}", f"addr replace {nic['address']} dev {nic['name']}"]
            if problem := await self._ip([self.paths.nsenter, inside], [*lines, f"link set {nic['name']} up"]):
                return f"interface {nic['mac']} in pod {pod}: {problem}"
        return ""

    async def take_back(self, pod: str) -> str:
        """The pod is gone: have its interfaces in the guest again, down and by their names; which is not, or nothing."""
        for nic in self.of(pod):
            name = await self._await(nic, NIC_BACK_S)
            if not name:
                return f"interface {nic['mac']} has not come back from pod {pod}"
            lines = [f"link set {name} down", f"addr flush dev {name}"]
            lines += [] if name == nic["guest-name"] else [f"link set {name} name {nic['guest-name']}"]
            if problem := await self._ip([], lines):
                return f"interface {nic['mac']}, back from pod {pod}: {problem}"
        return ""

    async def _await(self, nic: Message, wait_s: float) -> str:
        """Name of an interface in the guest's own network once it is there: its driver, or the end of a pod, takes a moment."""
        end = time.monotonic() + wait_s
        while not (name := await self._find(nic, [])) and time.monotonic() < end:
            await self.loop.sleep(0.25)
        return name

    async def _find(self, nic: Message, prefix: list[str]) -> str:
        """Name of an interface in a network; nothing where it is elsewhere."""
        ended = await run(self.loop, [*prefix, self.paths.ip, "-json", "link", "show"])
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            for link in json.loads(ended.out):
                # Where the address was changed, the permanent one is told beside it.
                if str(link.get("permaddr") or link.get("address")).lower() == nic["mac"]:
                    return str(link["ifname"])
        return ""

    async def _ip(self, prefix: list[str], lines: list[str]) -> str:
        """Commands of ip, in one go; what went wrong, or nothing."""
        words = [*prefix, self.paths.ip, "-batch", "-"]
        ended = await run(self.loop, words, "\n".join(lines).encode() + b"\n")
        return "" if ended.code == 0 else ended.reason()
