"""What the agent relies on of the host's network."""

import re

from support.contract import UIDS, Bench
from support.instances import NETWORK, nic


async def test_a_network_is_there_until_it_is_removed(bench: Bench) -> None:
    for _ in range(2):
        await bench.networks.ensure_network(NETWORK, 20)
    facts = await bench.networks.observe(20)
    assert dict(facts.bridges) == {NETWORK.name: bench.networks.bridge(NETWORK.name)}
    for _ in range(2):
        await bench.networks.remove_network(NETWORK.name, 20)
    assert dict((await bench.networks.observe(20)).bridges) == {}


async def test_a_tap_is_guarded_until_it_is_not(bench: Bench) -> None:
    await bench.networks.ensure_network(NETWORK, 20)
    nics = (nic(2), nic(3))
    for _ in range(2):
        await bench.networks.guard(UIDS[0], nics, 20)
    await bench.networks.guard(UIDS[1], (nic(4),), 20)
    facts = await bench.networks.observe(20)
    assert dict(facts.guards) == {
        bench.networks.tap(UIDS[0], 0): (nics[0].mac, nics[0].address),
        bench.networks.tap(UIDS[0], 1): (nics[1].mac, nics[1].address),
        bench.networks.tap(UIDS[1], 0): (nic(4).mac, nic(4).address),
    }
    for _ in range(2):
        await bench.networks.unguard(UIDS[0], 20)
    assert set((await bench.networks.observe(20)).guards) == {bench.networks.tap(UIDS[1], 0)}
    await bench.networks.unguard(UIDS[1], 20)
    assert dict((await bench.networks.observe(20)).guards) == {}


async def test_names_are_the_same_for_life_and_different_for_each(bench: Bench) -> None:
    names = [bench.networks.tap(uid, index) for uid in UIDS for index in range(4)]
    assert len(set(names)) == len(names)
    assert names == [bench.networks.tap(uid, index) for uid in UIDS for index in range(4)]
    assert all(re.fullmatch("cm[0-9a-f]{11}", name) for name in names)
    assert len(bench.networks.bridge("a" * 63)) <= 15
    assert bench.networks.bridge("a") != bench.networks.bridge("b")


async def test_whether_networks_can_be_made_is_answered_and_changes_nothing(bench: Bench) -> None:
    before = await bench.networks.observe(20)
    assert await bench.networks.condition(20) == ""
    assert await bench.networks.observe(20) == before
