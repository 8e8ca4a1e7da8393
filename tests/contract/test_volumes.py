"""What the agent relies on of volumes: made once, never made anew, never smaller, gone when that is asked for."""

from dataclasses import replace

import pytest

from casemate_agent.drivers.ports import DomainPhase
from casemate_core.errors import NotFound
from casemate_core.spec.instance import VolumeRef
from support.contract import UIDS, Bench

V = VolumeRef("33333333-3333-4333-8333-333333333333", "data", 32)
W = VolumeRef("44444444-4444-4444-8444-444444444444", "logs", 16, read_only=True)


async def test_a_volume_is_made_once_and_stays_as_it_is(bench: Bench) -> None:
    assert dict(await bench.volumes.observe(20)) == {}
    for _ in range(2):
        await bench.volumes.create(V, 20)
    (stored,) = (await bench.volumes.observe(20)).values()
    assert (stored.path, stored.size_mib) == (bench.volumes.path(V.uid), 32)
    assert 0 <= stored.allocated_mib < 32
    await bench.volumes.create(replace(V, size_mib=64), 20)
    assert (await bench.volumes.observe(20))[V.uid].size_mib == 32, "one that is there is not touched"


async def test_it_grows_and_does_not_shrink(bench: Bench) -> None:
    await bench.volumes.create(V, 20)
    for size_mib, then in ((64, 64), (16, 64), (64, 64)):
        await bench.volumes.grow(replace(V, size_mib=size_mib), 20)
        assert (await bench.volumes.observe(20))[V.uid].size_mib == then
    with pytest.raises(NotFound):
        await bench.volumes.grow(W, 20)


async def test_it_is_gone_when_it_is_removed_and_others_are_not(bench: Bench) -> None:
    await bench.volumes.create(V, 20)
    await bench.volumes.create(W, 20)
    for _ in range(2):
        await bench.volumes.remove(V.uid, 20)
    assert set(await bench.volumes.observe(20)) == {W.uid}


async def test_ends_of_instances_and_strays_leave_volumes_alone(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted(volumes=(V, W)))
    await bench.images.remove_strays(20)
    await bench.hypervisor.undefine(desired.uid, 20)
    await bench.images.remove_instance(desired.uid, 20)
    assert set(await bench.volumes.observe(20)) == {V.uid, W.uid}


async def test_a_running_domain_names_its_volumes_and_grows_them(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted(volumes=(V, W)))
    path = bench.volumes.path(V.uid)
    with pytest.raises(NotFound):
        await bench.hypervisor.resize_disk(desired.uid, path, 64, 20)
    await bench.hypervisor.start(desired.uid, 60)
    facts = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)
    assert {path, bench.volumes.path(W.uid)} <= set(facts.files)
    for size_mib in (64, 64, 48):
        await bench.hypervisor.resize_disk(desired.uid, path, size_mib, 20)
        assert (await bench.volumes.observe(20))[V.uid].size_mib == 64
    with pytest.raises(NotFound):
        await bench.hypervisor.resize_disk(desired.uid, bench.volumes.path(UIDS[1]), 64, 20)
    await bench.hypervisor.destroy(desired.uid, 20)
    await bench.hypervisor.undefine(desired.uid, 20)
    assert (await bench.volumes.observe(20))[V.uid].size_mib == 64
