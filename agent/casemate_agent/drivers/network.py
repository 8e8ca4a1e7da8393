"""Bridges with NAT, and the guard of every tap.

For: ``ports.Networks``. What may live here: netlink (pyroute2), nft, and the few sysctls of a bridge. The rules themselves
are ``nft``, names are ``casemate_agent.domain.names``.

Theory of operation. Nothing is remembered: bridges carry the name of their network as interface alias
(``casemate:<scope>:<network>``), guards are the elements of an nftables set, and both are read back from the kernel.
Making is idempotent and in an order in which an interruption is safe: rules first, then the bridge, then its address; a
guard is in force before its tap exists. libvirt puts taps on the bridge and takes them away with their QEMU.

nft is called with a document on its standard input: one transaction, applied whole or not at all.
"""

import ipaddress
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute, NetlinkError

from casemate_agent.domain.names import bridge_name, check_scope, table_name, tap_name, tap_prefix
from casemate_agent.drivers import nft
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.ports import NetworkFacts
from casemate_core.errors import CallerError, Conflict, MachineError, shown
from casemate_core.spec.instance import HostNetwork, Nic

T = TypeVar("T")
#: Interfaces of one instance (``casemate_core.spec.environment.MAX_NICS``).
MAX_NICS = 16
#: IFALIASZ is 256 with the NUL (linux/if_link.h).
MAX_ALIAS = 255
SYSCTL = Path("/proc/sys/net")


class NetworkFailed(MachineError):
    """The kernel or nft refused."""

    reason = "NetworkFailed"


class HostNetworks:
    """``ports.Networks`` in the network namespace of this process."""

    def __init__(self, scope: str = "main") -> None:
        self._scope = check_scope(scope)
        # One thread: changes of the network are few, and ordered.
        self._calls = DeadlineExecutor("network", threads=1)

    async def aclose(self) -> None:
        """Let the thread go."""
        self._calls.close()

    def tap(self, uid: str, index: int) -> str:
        return tap_name(self._scope, uid, index)

    def bridge(self, network: str) -> str:
        return bridge_name(self._scope, network)

    async def observe(self, deadline_s: float) -> NetworkFacts:
        return await self._run("observe networks", self._observe, deadline_s)

    async def ensure_network(self, network: HostNetwork, deadline_s: float) -> None:
        await self._run("make network", lambda: self._ensure(network, deadline_s), deadline_s)

    async def remove_network(self, name: str, deadline_s: float) -> None:
        await self._run("remove network", lambda: self._remove(name, deadline_s), deadline_s)

    async def guard(self, uid: str, nics: tuple[Nic, ...], deadline_s: float) -> None:
        wanted = {self.tap(uid, index): nic for index, nic in enumerate(nics)}
        await self._run("guard taps", lambda: self._guard(uid, wanted, deadline_s), deadline_s)

    async def plug(self, tap: str, network: str, deadline_s: float) -> None:
        await self._run("plug a tap", lambda: self._plug(tap, network), deadline_s)

    async def unguard(self, uid: str, deadline_s: float) -> None:
        await self._run("unguard taps", lambda: self._guard(uid, {}, deadline_s), deadline_s)

    async def remove_all(self, deadline_s: float) -> None:
        """Everything of this scope: bridges and tables. For the end of a sandbox."""
        await self._run("remove networks", lambda: remove_scope(self._scope, deadline_s), deadline_s)

    async def condition(self, deadline_s: float) -> str:
        """Empty where the kernel takes our rules (in a transaction that is only checked); else what it lacks."""
        try:
            await self._run("check rules", lambda: self._check(deadline_s), deadline_s)
        except MachineError as error:
            return f"this kernel or nft cannot do what guests' networks need: {error}"
        return ""

    async def _run(self, what: str, call: Callable[[], T], deadline_s: float) -> T:
        def translated() -> T:
            try:
                return call()
            except NetlinkError as error:
                raise NetworkFailed(f"{what}: {error}") from error
            except OSError as error:
                raise NetworkFailed(f"{what}: {error.strerror or error}") from error

        return await self._calls.run(what, translated, deadline_s)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _check(self, deadline_s: float) -> None:
        _nft(nft.base_rules(self._scope), deadline_s, "--check")

    def _observe(self) -> NetworkFacts:
        bridges, masters, names = {}, {}, {}
        with IPRoute() as ip:
            for link in ip.get_links():
                name, network = link.get_attr("IFLA_IFNAME"), _network_of(link, self._scope)
                names[link["index"]] = name
                if network is not None:
                    bridges[network] = name
                elif name.startswith(tap_prefix(self._scope)):
                    masters[name] = link.get_attr("IFLA_MASTER")
        plugged = {tap: names.get(master, "") for tap, master in masters.items()}
        return NetworkFacts(bridges, self._guards(), tuple(sorted(masters)), plugged)

    def _plug(self, tap: str, network: str) -> None:
        with IPRoute() as ip:
            for name in (tap, bridge := self.bridge(network)):
                if not ip.link_lookup(ifname=name):
                    raise NetworkFailed(f"{tap} cannot be put on {bridge}: {name} is not there")
            master = ip.link_lookup(ifname=bridge)[0]
            ip.link("set", index=ip.link_lookup(ifname=tap)[0], master=master, state="up")

    def _guards(self) -> dict[str, tuple[str, str]]:
        argv = ["nft", "-j", "list", "set", "bridge", table_name(self._scope), nft.GUARD_SET]
        done = _run(argv, "", 10.0)
        if done.returncode != 0:
            if "No such file or directory" in done.stderr:
                return {}  # no table yet
            raise NetworkFailed(f"nft: {shown(' '.join(done.stderr.split()))}")
        return nft.read_guards(json.loads(done.stdout))

    def _ensure(self, network: HostNetwork, deadline_s: float) -> None:
        if network.type != "nat":
            raise CallerError(f"network {network.name}: type {network.type!r} is not served; use nat")
        subnet = ipaddress.IPv4Network(network.subnet)
        gateway = ipaddress.IPv4Address(network.gateway)
        if gateway not in subnet:
            raise CallerError(f"network {network.name}: gateway {gateway} is not in {subnet}")
        bridge = self.bridge(network.name)
        with IPRoute() as ip:
            self._refuse_overlap(ip, bridge, network, subnet)
            _nft([*nft.base_rules(self._scope), *nft.add_network(self._scope, network, bridge)], deadline_s)
            if not ip.link_lookup(ifname=bridge):
                ip.link("add", ifname=bridge, kind="bridge", br_stp_state=0, br_forward_delay=0)
            index = ip.link_lookup(ifname=bridge)[0]
            # No IPv6 on it before it comes up, so that it never has a link-local address.
            _sysctl(f"ipv6/conf/{bridge}/disable_ipv6", "1", optional=True)
            alias = f"casemate:{self._scope}:{network.name}"[:MAX_ALIAS]
            ip.link("set", index=index, state="up", mtu=network.mtu, ifalias=alias)
            self._address(ip, index, str(gateway), subnet.prefixlen)
        _sysctl("ipv4/ip_forward", "1")

    @staticmethod
    def _address(ip: Any, index: int, gateway: str, prefix_length: int) -> None:
        """Exactly this address on the bridge."""
        have = set()
        for entry in ip.get_addr(index=index, family=2):
            address, length = entry.get_attr("IFA_ADDRESS"), entry["prefixlen"]
            if (address, length) == (gateway, prefix_length):
                have.add(address)
            else:
                ip.addr("del", index=index, address=address, prefixlen=length)
        if not have:
            ip.addr("add", index=index, address=gateway, prefixlen=prefix_length)

    @staticmethod
    def _refuse_overlap(ip: Any, bridge: str, network: HostNetwork, subnet: ipaddress.IPv4Network) -> None:
        """A subnet that is on another interface already would cut that one off. Raises Conflict."""
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ip.get_links()}
        for entry in ip.get_addr(family=2):
            there = ipaddress.IPv4Network((entry.get_attr("IFA_ADDRESS"), entry["prefixlen"]), strict=False)
            other = names.get(entry["index"], "?")
            if other != bridge and there.prefixlen > 0 and there.overlaps(subnet):
                raise Conflict(
                    f"network {network.name}: {subnet} overlaps {there} of interface {other}; give it another subnet"
                )

    def _remove(self, name: str, deadline_s: float) -> None:
        bridge = self.bridge(name)
        with IPRoute() as ip:
            found = ip.link_lookup(ifname=bridge)
            subnet = ""
            for index in found:
                for entry in ip.get_addr(index=index, family=2):
                    there = ipaddress.IPv4Network((entry.get_attr("IFA_ADDRESS"), entry["prefixlen"]), strict=False)
                    subnet = str(there)
                ip.link("del", index=index)
        _nft([*nft.base_rules(self._scope), *nft.remove_network(self._scope, subnet, bridge)], deadline_s)

    def _guard(self, uid: str, wanted: dict[str, Nic], deadline_s: float) -> None:
        mine = {self.tap(uid, index) for index in range(MAX_NICS)}
        there = self._guards()
        old = {tap: held for tap, held in there.items() if tap in mine}
        if old == {tap: (nic.mac, nic.address) for tap, nic in wanted.items()}:
            return
        _nft([*nft.base_rules(self._scope), *nft.replace_guards(self._scope, old, wanted)], deadline_s)


def remove_scope(scope: str, deadline_s: float = 10.0) -> None:
    """Remove the bridges and the tables of a scope. ip_forward stays as it is: others may rely on it by now."""
    check_scope(scope)
    with IPRoute() as ip:
        for link in ip.get_links():
            if _network_of(link, scope) is not None:
                ip.link("del", index=link["index"])
    _nft(nft.delete_tables(scope), deadline_s)


def _network_of(link: Any, scope: str) -> str | None:
    """Name of the network whose bridge ``link`` is, where it is one of this scope."""
    alias, prefix = link.get_attr("IFLA_IFALIAS") or "", f"casemate:{scope}:"
    return alias.removeprefix(prefix) if alias.startswith(prefix) else None


def _nft(commands: list[nft.Command], deadline_s: float, *options: str) -> None:
    done = _run(["nft", "-j", *options, "-f", "-"], json.dumps(nft.document(commands)), deadline_s)
    if done.returncode != 0:
        raise NetworkFailed(f"nft: {shown(' '.join((done.stderr or done.stdout).split()))}")


def _run(argv: list[str], text: str, deadline_s: float) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            argv,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise NetworkFailed("nft is not installed (package nftables)") from None
    except subprocess.TimeoutExpired:
        raise NetworkFailed(f"nft did not end within {deadline_s:g} s") from None


def _sysctl(name: str, value: str, optional: bool = False) -> None:
    path = SYSCTL / name
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except FileNotFoundError:
        if not optional:
            raise
