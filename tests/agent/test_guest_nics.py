"""Interfaces of a guest that go into a pod's network, through the guest helper as a process.

podman, ip and nsenter are played (`support.fake_podman`, `support.fake_net`), with the kernel's rules for links in networks.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from casemate_agent.drivers.seed import meta_data, network_config
from casemate_agent.guest.casemate_guest.files import Paths
from casemate_agent.guest.casemate_guest.loop import Loop
from casemate_agent.guest.casemate_guest.nics import PodNics
from casemate_core.spec.instance import Nic
from support import fake_net
from support.agents import instance
from support.guest_bench import RealGuestBench, pod

FIRST, SECOND, OWN = "52:54:00:00:00:02", "52:54:00:00:00:03", "52:54:00:00:00:01"
NICS = (
    Nic("default", OWN, "10.1.0.10", 24, "10.1.0.1"),
    Nic("fronthaul", FIRST, "10.71.0.10", 24, "10.71.0.1", mtu=9000, type="sriov", vlan=100, pod="du"),
    Nic("midhaul", SECOND, "10.72.0.10", 24, "10.72.0.1", pod="du"),
)


class Bench(RealGuestBench):
    """A guest with three interfaces, two of them for the pod ``du``."""

    async def boot(self) -> None:
        seed = self.root / "run/casemate/seed"
        seed.mkdir(parents=True)
        (seed / "meta-data").write_text(json.dumps(meta_data(instance(1, nics=NICS))))
        (self.root / "fake").mkdir()
        links = [fake_net.link(f"eth{number}", nic.mac) for number, nic in enumerate(NICS)]
        self.keep([*links, fake_net.link("lo", "00:00:00:00:00:00")])
        (self.root / "bin").mkdir()
        for name in ("ip", "nsenter"):
            self._program(name, f'exec {sys.executable} {fake_net.__file__} {self.root} {name} "$@"')
        await super().boot()

    def keep(self, links: list[fake_net.Link]) -> None:
        (self.root / "fake/net.json").write_text(json.dumps(links))

    def links(self) -> dict[str, fake_net.Link]:
        """By permanent address."""
        found = json.loads((self.root / "fake/net.json").read_text())
        return {each.get("permaddr") or each["address"]: each for each in found}

    def infra(self) -> str:
        """Number of the process that holds the pod's network."""
        for folder in (self.root / "fake/containers").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it comes, or goes
                if json.loads((folder / "facts.json").read_text())["Name"].endswith("-infra"):
                    return (folder / "pid").read_text()
        return ""

    def calls(self) -> list[str]:
        return (self.root / "fake/calls").read_text().splitlines()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    try:
        await made.boot()
        await made.start_agent()
        yield made
    finally:
        await made.close()


def inside(bench: Bench, mac: str, name: str, address: str, mtu: int) -> None:
    """An interface is in the pod, as its network has it to be."""
    found = bench.links()[mac]
    wanted = {"ifname": name, "network": bench.infra(), "up": True, "mtu": mtu, "addresses": [address]}
    assert {key: found[key] for key in wanted} == wanted


def test_the_seed_says_what_goes_into_which_pod_and_the_guest_leaves_it_alone() -> None:
    desired = instance(1, nics=(*NICS, Nic("more", "52:54:00:00:00:09", "10.73.0.9", 24, "10.73.0.1", pod="cu")))
    told = meta_data(desired)["casemate-pod-interfaces"]
    assert [(nic["pod"], nic["name"], nic["mac"], nic["guest-name"]) for nic in told] == [
        ("du", "net1", FIRST, "eth1"),
        ("du", "net2", SECOND, "eth2"),
        ("cu", "net1", "52:54:00:00:00:09", "eth3"),
    ]
    assert told[0]["address"] == "10.71.0.10/24" and told[0]["mtu"] == 9000
    assert list(network_config(desired)["ethernets"]) == ["eth0"]
    assert "casemate-pod-interfaces" not in meta_data(instance(1))


async def test_a_pod_has_its_interfaces_before_its_first_container_starts(bench: Bench) -> None:
    await bench.apply("1", pod("du", "sleep", "1000"), pod("web", "sleep", "1000"))
    await bench.ready("du")
    await bench.ready("web")
    inside(bench, FIRST, "net1", "10.71.0.10/24", 9000)
    inside(bench, SECOND, "net2", "10.72.0.10/24", 1500)
    assert bench.links()[OWN]["network"] == "" and bench.links()[OWN]["ifname"] == "eth0"
    podman = [line.removeprefix("podman ") for line in bench.calls() if "inspect" not in line]
    du = [line for line in podman if "web" not in line]
    assert "kube play --quiet --start=false -" in du and "kube play --quiet -" in podman
    assert [line for line in du if line.startswith(("start ", "pod start"))][-1] == "pod start du"


async def test_they_come_back_when_the_pod_goes_and_go_into_the_next_one(bench: Bench) -> None:
    await bench.apply("1", pod("du", "sleep", "1000"))
    await bench.ready("du")
    first = bench.infra()
    await bench.apply("2", pod("du", "sleep", "2000"))

    def replaced() -> bool:
        """Its state of before may still be told: the network is the one of the new pod."""
        found = bench.pod("du")
        given = bench.links()[FIRST]["network"] == bench.links()[SECOND]["network"] == bench.infra() not in ("", first)
        return bench.pods.revision == "2" and found is not None and found.ready and given

    await bench.until(replaced)
    inside(bench, FIRST, "net1", "10.71.0.10/24", 9000)
    await bench.apply("3")
    await bench.until(lambda: bench.pod("du") is None)
    for mac, name in ((FIRST, "eth1"), (SECOND, "eth2")):
        found = bench.links()[mac]
        assert (found["ifname"], found["network"], found["up"], found["addresses"]) == (name, "", False, [])
    assert not bench.notes("NicNotBack")


async def test_a_helper_that_comes_back_finds_them_where_they_are(bench: Bench) -> None:
    await bench.apply("1", pod("du", "sleep", "1000"))
    await bench.ready("du")
    links = json.loads((bench.root / "fake/net.json").read_text())
    # Whoever is in the container may give it another address: it is the same interface.
    next(each for each in links if each["address"] == FIRST).update(address="02:00:00:00:00:01", permaddr=FIRST)
    bench.keep(links)
    before = bench.links()
    await bench.restart_helper()
    await bench.ready("du")
    await bench.kill("du")
    await bench.until(lambda: (p := bench.pod("du")) and p.ready and p.containers[0].restarts == 1)
    assert bench.links() == before


async def test_a_missing_interface_holds_the_pod_back_and_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = json.loads((bench.root / "fake/net.json").read_text())
    bench.keep([each for each in links if each["address"] != SECOND])
    await bench.apply("1", pod("du", "sleep", "1000"), pod("web", "sleep", "1000"))
    await bench.ready("web")
    await asyncio.sleep(0)
    assert not (found := bench.pod("du")) or not found.ready, "it does not run without what it was promised"
    # Its driver is late: then it starts.
    bench.keep([*json.loads((bench.root / "fake/net.json").read_text()), fake_net.link("eth2", SECOND)])
    await bench.ready("du")
    inside(bench, SECOND, "net2", "10.72.0.10/24", 1500)


async def test_what_cannot_be_moved_is_told_with_its_reason(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path), "podman", "crun")
    (tmp_path / "run/casemate/seed").mkdir(parents=True)
    (tmp_path / "run/casemate/seed/meta-data").write_text(json.dumps(meta_data(instance(1, nics=NICS))))
    nics = PodNics(Loop(), paths)
    assert [nic["mac"] for nic in nics.of("du")] == [FIRST, SECOND] and not nics.of("web")
    for bad in ("no json", "[]", '{"casemate-pod-interfaces": [{"pod": "du"}]}', '{"casemate-pod-interfaces": 7}'):
        (tmp_path / "run/casemate/seed/meta-data").write_text(bad)
        assert PodNics(Loop(), paths).wanted == []
    entry = {"pod": "du", "mac": FIRST, "name": "net1 up", "guest-name": "eth1", "address": "10.0.0.1/24", "mtu": 1500}
    (tmp_path / "run/casemate/seed/meta-data").write_text(json.dumps({"casemate-pod-interfaces": [entry]}))
    assert PodNics(Loop(), paths).wanted == [], "a name with a space would be a command more"
