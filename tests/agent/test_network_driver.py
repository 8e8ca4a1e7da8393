"""Bridges, NAT and guards on the real kernel. A guest is played by a network namespace at the end of a veth pair whose
host end has a tap's name."""

import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from casemate_agent.domain.names import table_name
from casemate_agent.drivers.network import HostNetworks
from casemate_core.errors import CallerError, Conflict
from casemate_core.spec.instance import HostNetwork
from support.instances import NETWORK, nic

pytestmark = pytest.mark.libvirt

SCOPE = f"t{uuid.uuid4().hex[:8]}"
UID = str(uuid.uuid4())
GATEWAY = NETWORK.gateway
#: A host beyond this one.
OUTSIDE, OUTSIDE_GATEWAY = "10.220.9.2", "10.220.9.1"
CONNECT = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))"
SERVE = (
    "import socket,sys; s=socket.create_server((sys.argv[1], 8080)); print('up', flush=True)\n"
    "while True:\n c, a = s.accept(); print(a[0], flush=True); c.close()"
)


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


@dataclass(slots=True)
class Namespace:
    """A network namespace with one interface ``eth0``; its other end is ``peer`` here."""

    name: str
    peer: str

    def run(self, *argv: str) -> str:
        return run("ip", "netns", "exec", self.name, *argv)

    def reaches(self, address: str, port: int = 8080, timeout_s: float = 0.7) -> bool:
        argv = ["ip", "netns", "exec", self.name, sys.executable, "-c", CONNECT, address, str(port), str(timeout_s)]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def address(self, address: str) -> None:
        self.run("ip", "addr", "flush", "dev", "eth0")
        self.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        self.run("ip", "route", "add", "default", "via", GATEWAY if address.startswith("10.219") else OUTSIDE_GATEWAY)


def namespace(number: int, peer: str, mac: str) -> Namespace:
    made = Namespace(f"{SCOPE}-{number}", peer)
    run("ip", "netns", "add", made.name)
    run("ip", "link", "add", peer, "type", "veth", "peer", "name", "eth0", "netns", made.name, "address", mac)
    made.run("ip", "link", "set", "lo", "up")
    made.run("ip", "link", "set", "eth0", "up")
    run("ip", "link", "set", peer, "up")
    return made


@pytest.fixture
async def networks() -> AsyncIterator[HostNetworks]:
    made = HostNetworks(SCOPE)
    assert await made.condition(20) == ""
    await made.ensure_network(NETWORK, 20)
    yield made
    await made.remove_all(20)
    await made.aclose()


@pytest.fixture
def guest(networks: HostNetworks) -> Iterator[Namespace]:
    made = namespace(1, networks.tap(UID, 0), nic().mac)
    run("ip", "link", "set", made.peer, "master", networks.bridge(NETWORK.name))
    made.address(nic().address)
    yield made
    run("ip", "netns", "del", made.name)


@contextmanager
def serving(address: str, within: Namespace | None = None) -> Iterator[Callable[[], str]]:
    """A server on port 8080, here or in a namespace; the value tells the address of the next one who connects."""
    enter = ["ip", "netns", "exec", within.name] if within else []
    server = subprocess.Popen([*enter, sys.executable, "-c", SERVE, address], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "up\n"
        yield lambda: server.stdout.readline().strip() if server.stdout else ""
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture
def at_gateway(networks: HostNetworks) -> Iterator[None]:
    """A server on the gateway's address."""
    with serving(GATEWAY):
        yield


def dropped() -> int:
    listed = json.loads(run("nft", "-j", "list", "chain", "bridge", table_name(SCOPE), "from_guests"))
    return sum(
        e["counter"]["packets"] for i in listed["nftables"] for e in i.get("rule", {}).get("expr", []) if "counter" in e
    )


async def test_only_the_guests_own_mac_and_address_pass(
    networks: HostNetworks, guest: Namespace, at_gateway: None
) -> None:
    assert not guest.reaches(GATEWAY), "a tap without a guard sends nothing"
    await networks.guard(UID, (nic(),), 20)
    await networks.guard(UID, (nic(),), 20)
    assert guest.reaches(GATEWAY)
    before = dropped()
    guest.address("10.219.7.99")
    assert not guest.reaches(GATEWAY), "another address"
    assert dropped() > before
    guest.address(nic().address)
    assert guest.reaches(GATEWAY)
    guest.run("ip", "link", "set", "eth0", "address", "52:54:00:00:00:77")
    guest.address(nic().address)
    assert not guest.reaches(GATEWAY), "another MAC"
    guest.run("ip", "link", "set", "eth0", "address", nic().mac)
    guest.address(nic().address)
    run("ip", "neigh", "flush", "dev", networks.bridge(NETWORK.name))
    assert guest.reaches(GATEWAY)
    # Changing the guard takes effect at once, and taking it away closes the tap.
    await networks.guard(UID, (nic(9),), 20)
    assert (await networks.observe(20)).guards == {guest.peer: (nic(9).mac, nic(9).address)}
    assert not guest.reaches(GATEWAY)
    await networks.unguard(UID, 20)
    await networks.unguard(UID, 20)
    assert (await networks.observe(20)).guards == {}


SPOOF = """
import socket, sys
kind, mac = sys.argv[1], bytes.fromhex(sys.argv[2].replace(':', ''))
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('eth0', 0))
broadcast = b'\\xff' * 6
if kind == 'arp':  # "the gateway is at my MAC", told to everybody
    gateway = socket.inet_aton(sys.argv[3])
    frame = broadcast + mac + bytes.fromhex('0806000108000604') + b'\\0\\2' + mac + gateway + broadcast + gateway
elif kind == 'ipv6':
    frame = bytes.fromhex('333300000001') + mac + bytes.fromhex('86dd') + b'\\x60' + bytes(39)
elif kind == 'vlan':
    frame = broadcast + mac + bytes.fromhex('81000005') + bytes.fromhex('0800') + b'\\x45' + bytes(40)
else:
    frame = broadcast + mac + bytes.fromhex('88b5') + bytes(46)
for _ in range(5):
    s.send(frame.ljust(60, b'\\0'))
"""


@pytest.mark.parametrize("kind", ["arp", "ipv6", "vlan", "other"])
async def test_frames_that_are_neither_ipv4_nor_honest_arp_are_dropped(
    networks: HostNetworks, guest: Namespace, kind: str
) -> None:
    await networks.guard(UID, (nic(),), 20)
    before = dropped()
    guest.run(sys.executable, "-c", SPOOF, kind, nic().mac, GATEWAY)
    assert dropped() - before >= 5


async def test_guests_go_out_masqueraded_and_nobody_comes_in(networks: HostNetworks, guest: Namespace) -> None:
    await networks.guard(UID, (nic(),), 20)
    outside = namespace(2, f"{SCOPE}o", "52:54:00:00:01:02")
    try:
        run("ip", "addr", "add", f"{OUTSIDE_GATEWAY}/24", "dev", outside.peer)
        outside.address(OUTSIDE)
        with serving(OUTSIDE, outside) as accepted:
            assert guest.reaches(OUTSIDE)
            assert accepted() == OUTSIDE_GATEWAY, "the guest is seen under the host's address"
        with serving(nic().address, guest):
            assert not outside.reaches(nic().address), "a connection from outside"
            run(sys.executable, "-c", CONNECT, nic().address, "8080", "2")  # from the host itself
    finally:
        run("ip", "netns", "del", outside.name)


async def test_networks_are_observed_and_removed(networks: HostNetworks) -> None:
    await networks.ensure_network(NETWORK, 20)
    second = HostNetwork("second", "nat", "10.219.8.0/24", "10.219.8.1", mtu=9000)
    await networks.ensure_network(second, 20)
    seen = await networks.observe(20)
    assert dict(seen.bridges) == {name: networks.bridge(name) for name in ("default", "second")}
    link = json.loads(run("ip", "-j", "addr", "show", networks.bridge("second")))[0]
    assert link["mtu"] == 9000
    assert [a["local"] for a in link["addr_info"]] == ["10.219.8.1"], "and no IPv6 address"
    moved = HostNetwork("second", "nat", "10.219.9.0/24", "10.219.9.1")
    await networks.ensure_network(moved, 20)
    link = json.loads(run("ip", "-j", "addr", "show", networks.bridge("second")))[0]
    assert [a["local"] for a in link["addr_info"]] == ["10.219.9.1"]
    await networks.remove_network("second", 20)
    await networks.remove_network("second", 20)
    assert set((await networks.observe(20)).bridges) == {"default"}


async def test_two_agents_on_one_machine_do_not_see_each_other(networks: HostNetworks) -> None:
    other = HostNetworks(f"{SCOPE}x")
    try:
        await other.guard(UID, (nic(),), 20)
        assert (await other.observe(20)).bridges == {}
        assert (await networks.observe(20)).guards == {}
        await other.remove_all(20)
        assert set((await networks.observe(20)).bridges) == {"default"}
    finally:
        await other.remove_all(20)
        await other.aclose()


async def test_a_subnet_that_is_in_use_is_refused(networks: HostNetworks) -> None:
    with pytest.raises(Conflict, match=r"overlaps 10\.219\.7\.0/24"):
        await networks.ensure_network(HostNetwork("third", "nat", "10.219.0.0/16", "10.219.0.1"), 20)
    with pytest.raises(CallerError, match="not in"):
        await networks.ensure_network(HostNetwork("third", "nat", "10.221.0.0/24", "10.222.0.1"), 20)
    with pytest.raises(CallerError, match="not served"):
        await networks.ensure_network(HostNetwork("third", "vlan", "10.221.0.0/24", "10.221.0.1"), 20)
    assert set((await networks.observe(20)).bridges) == {"default"}


async def test_everything_of_a_scope_goes(networks: HostNetworks) -> None:
    await networks.remove_all(20)
    await networks.remove_all(20)
    assert SCOPE not in run("nft", "list", "tables")
    assert not [link for link in Path("/sys/class/net").iterdir() if link.name == networks.bridge("default")]
