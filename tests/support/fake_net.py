"""Interfaces and networks of the guest in tests: ip and nsenter, as far as the guest helper moves interfaces with them.

Run as ``fake_net.py ROOT ip|nsenter ARGUMENTS``. ``ROOT/fake/net.json`` is a list of links; ``network`` of one is "" for the
guest's own, or the number of the process whose network it is in. As strict as the kernel where the helper could be wrong:
names are unique in a network, and a link that is up is not renamed.
"""

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Link = dict[str, Any]


@contextmanager
def links_of(root: Path) -> Iterator[list[Link]]:
    """All links, kept when the context ends without an error."""
    path = root / "fake/net.json"
    with (root / "fake/net.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        links: list[Link] = json.loads(path.read_text()) if path.exists() else []
        yield links
        path.with_suffix(".new").write_text(json.dumps(links))
        path.with_suffix(".new").rename(path)


def link(name: str, mac: str) -> Link:
    """A link in the guest's own network."""
    return {"ifname": name, "address": mac, "network": "", "up": False, "mtu": 1500, "addresses": []}


def gone(root: Path, pid: int) -> None:
    """The network of a process is gone: its links are in the guest's own, as the kernel has them then."""
    if not (root / "fake/net.json").exists() or not pid:
        return
    with links_of(root) as links:
        for number, each in enumerate(links):
            if each["network"] == str(pid):
                each |= {"ifname": f"dev{number}", "network": "", "up": False, "addresses": []}


class Refused(Exception):
    """What ip would say."""


def act(links: list[Link], network: str, words: list[str]) -> None:
    """One command of a batch."""

    def named(name: str) -> Link:
        for each in links:
            if (each["ifname"], each["network"]) == (name, network):
                return each
        raise Refused(f'Cannot find device "{name}"')

    def free(name: str, where: str) -> str:
        if any((each["ifname"], each["network"]) == (name, where) for each in links):
            raise Refused("RTNETLINK answers: File exists")
        return name

    match words:
        case ["link", "set", name, ("up" | "down") as state]:
            named(name)["up"] = state == "up"
        case ["link", "set", name, "mtu", mtu]:
            named(name)["mtu"] = int(mtu)
        case ["link", "set", name, "name", wanted]:
            if named(name)["up"]:
                raise Refused("RTNETLINK answers: Device or resource busy")
            named(name)["ifname"] = free(wanted, network)
        case ["link", "set", name, "netns", pid]:
            each = named(name)
            free(name, pid)
            each |= {"network": pid, "up": False, "addresses": []}
        case ["addr", "replace", address, "dev", name]:
            each = named(name)
            each["addresses"] = sorted({*each["addresses"], address})
        case ["addr", "flush", "dev", name]:
            named(name)["addresses"] = []
        case _:
            raise Refused(f"fake ip does not know {words}")


def ip(root: Path, network: str, words: list[str]) -> int:
    with links_of(root) as links:
        match words:
            case ["-json", "link", "show"]:
                shown = [
                    {k: v for k, v in each.items() if k != "network"} for each in links if each["network"] == network
                ]
                sys.stdout.write(json.dumps(shown))
            case ["-json", "address"]:
                sys.stdout.write("[]")
            case ["-batch", "-"]:
                for line in sys.stdin.read().splitlines():
                    act(links, network, line.split())
            case _:
                raise Refused(f"fake ip does not know {words}")
    return 0


def main() -> int:
    root, program, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    network = ""
    (root / "fake").mkdir(exist_ok=True)
    if program == "nsenter":
        where, _, *words = words
        network = where.removeprefix("--net=/proc/").removesuffix("/ns/net")
    try:
        return ip(root, network, words)
    except Refused as refused:
        sys.stderr.write(f"{refused}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
