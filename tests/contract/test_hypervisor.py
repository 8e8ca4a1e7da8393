"""What the agent relies on of a hypervisor."""

import asyncio
import json
from dataclasses import replace

import pytest

from casemate_agent.domain.devices import SEED_TARGET
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.ledger.records import from_metadata
from casemate_core.cpuset import CpuSet
from casemate_core.errors import NotFound
from support.contract import UIDS, Bench


async def test_a_domain_from_definition_to_its_end(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    off = await bench.facts(desired.uid)
    assert off is not None
    assert (off.phase, off.owned, off.pid) == (DomainPhase.SHUT_OFF, True, 0)
    assert (off.instance_uid, off.generation) == (desired.uid, desired.generation)
    assert (off.placement_epoch, off.placement_generation) == (3, 7)
    assert off.channel_path
    assert from_metadata(off.record) == desired
    await bench.hypervisor.start(desired.uid, 60)
    running = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)
    assert running.pid > 0
    assert (running.vcpus, running.memory_mib) == (desired.cpus, desired.memory_mib)
    assert from_metadata(running.record) == desired
    await bench.hypervisor.destroy(desired.uid, 20)
    ended = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.SHUT_OFF)
    assert ended.pid == 0
    await bench.hypervisor.undefine(desired.uid, 20)
    assert await bench.facts(desired.uid) is None


async def test_doing_it_again_is_no_error_and_changes_nothing(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    await bench.hypervisor.define(desired, bench.images.files(desired), 20)
    await bench.hypervisor.start(desired.uid, 60)
    pid = (await bench.until(desired.uid, lambda d: d.pid > 0)).pid
    await bench.hypervisor.start(desired.uid, 60)
    again = await bench.facts(desired.uid)
    assert again is not None
    assert again.pid == pid
    for _ in range(2):
        await bench.hypervisor.destroy(desired.uid, 20)
    for _ in range(2):
        await bench.hypervisor.undefine(desired.uid, 20)


async def test_ending_what_is_not_there_is_no_error_and_starting_it_is(bench: Bench) -> None:
    await bench.hypervisor.shutdown(UIDS[0], 20)
    await bench.hypervisor.destroy(UIDS[0], 20)
    await bench.hypervisor.undefine(UIDS[0], 20)
    with pytest.raises(NotFound):
        await bench.hypervisor.start(UIDS[0], 20)


async def test_a_domain_is_defined_anew_from_a_changed_record(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    changed = replace(desired, generation=6, memory_mib=96, pods=({"kind": "Pod", "metadata": {"name": "ü<]]>&"}},))
    await bench.hypervisor.define(changed, bench.images.files(changed), 20)
    facts = await bench.facts(desired.uid)
    assert facts is not None
    assert facts.generation == 6
    assert facts.memory_mib == 96
    assert from_metadata(facts.record) == changed
    assert json.loads(facts.record)["pods"][0]["metadata"]["name"] == "ü<]]>&"


async def test_asking_a_guest_that_hears_nothing_returns(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    await bench.hypervisor.start(desired.uid, 60)
    await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)
    await bench.hypervisor.shutdown(desired.uid, 20)
    assert (await bench.until(desired.uid, lambda d: True)).pid > 0


async def test_a_guest_is_frozen_and_goes_on_in_the_same_process(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    for call in (bench.hypervisor.suspend, bench.hypervisor.resume):
        await call(desired.uid, 20)  # off: nothing to do
    with pytest.raises(NotFound):
        await bench.hypervisor.reset(desired.uid, 20)
    await bench.hypervisor.start(desired.uid, 60)
    pid = (await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)).pid
    for _ in range(2):
        await bench.hypervisor.suspend(desired.uid, 20)
    frozen = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.PAUSED)
    assert (frozen.frozen, frozen.pid) == (True, pid)
    for _ in range(2):
        await bench.hypervisor.resume(desired.uid, 20)
    await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)
    await bench.hypervisor.reset(desired.uid, 20)
    assert (await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)).pid == pid


async def test_a_domain_that_is_started_frozen_runs_once_it_is_resumed(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    await bench.hypervisor.start(desired.uid, 60, frozen=True)
    frozen = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.PAUSED)
    assert frozen.frozen and frozen.pid
    await bench.hypervisor.resume(desired.uid, 20)
    running = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)
    assert (running.frozen, running.pid) == (False, frozen.pid)


async def test_changes_are_told(bench: Bench) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen() -> None:
        async for event in bench.hypervisor.events():
            await heard.put(event.uuid)

    listener = asyncio.create_task(listen())
    try:
        await bench.facts(UIDS[0])
        desired = await bench.prepared(bench.wanted())
        await bench.hypervisor.start(desired.uid, 60)
        async with asyncio.timeout(60):
            while await heard.get() != desired.uid:
                pass
        while not heard.empty():
            heard.get_nowait()
        await bench.hypervisor.destroy(desired.uid, 20)
        async with asyncio.timeout(60):
            while await heard.get() != desired.uid:
                pass
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


async def test_two_domains_are_told_apart(bench: Bench) -> None:
    first, second = await bench.prepared(bench.wanted(0)), await bench.prepared(bench.wanted(1))
    await bench.hypervisor.start(second.uid, 60)
    await bench.until(second.uid, lambda d: d.phase is DomainPhase.RUNNING)
    off = await bench.facts(first.uid)
    assert off is not None
    assert off.phase is DomainPhase.SHUT_OFF
    paths = {d.channel_path for d in await bench.hypervisor.domains(20)}
    assert len(paths) == 2


async def test_statistics_of_a_domain_are_its_size_and_grow_while_it_runs(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    off = {stats.uuid: stats for stats in await bench.hypervisor.stats(20)}[desired.uid]
    assert off.phase is DomainPhase.SHUT_OFF
    assert off.vcpu_stats == ()
    await bench.hypervisor.start(desired.uid, 60)
    facts = await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING)
    on = {stats.uuid: stats for stats in await bench.hypervisor.stats(20)}[desired.uid]
    assert (on.name, on.phase, on.vcpus) == (facts.name, DomainPhase.RUNNING, desired.cpus)
    assert on.max_memory_bytes == desired.memory_mib * 2**20
    assert on.memory["rss"] > 0
    assert [vcpu.number for vcpu in on.vcpu_stats] == list(range(desired.cpus))
    assert on.blocks[0].name == "vda"
    assert on.blocks[0].path in facts.files
    xml = (await bench.hypervisor.descriptions(20))[facts.name]
    assert f"<uuid>{desired.uid}</uuid>" in xml
    assert {interface.name for interface in on.interfaces} == set(facts.taps)
    assert all(len(interface.counts) == 8 for interface in on.interfaces)
    later = {stats.uuid: stats for stats in await bench.hypervisor.stats(20)}[desired.uid]
    assert later.cpu_time_ns is not None and on.cpu_time_ns is not None
    assert later.cpu_time_ns >= on.cpu_time_ns
    assert on.blocks[1].name == SEED_TARGET
    (alone,) = await bench.hypervisor.stats(20, frozenset({desired.uid}))
    assert alone.uuid == desired.uid and alone.blocks[1].read_requests is not None
    assert await bench.hypervisor.stats(20, frozenset({"00000000-0000-8000-8000-00000000dead"})) == ()
    await bench.hypervisor.destroy(desired.uid, 20)
    await bench.hypervisor.undefine(desired.uid, 20)


async def test_threads_of_a_running_domain_are_bound_and_read_back(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    with pytest.raises(NotFound):
        await bench.hypervisor.pin(UIDS[1], (CpuSet.of(0),), CpuSet.of(0), 20)
    await bench.hypervisor.pin(desired.uid, (CpuSet.of(0),), CpuSet.of(0), 20)  # off: nothing to bind
    await bench.hypervisor.start(desired.uid, 60)
    pid = (await bench.until(desired.uid, lambda d: d.phase is DomainPhase.RUNNING and d.pid > 0)).pid
    before = (await bench.hypervisor.affinities((pid,), 20))[pid]
    assert len(before.vcpus) == desired.cpus and before.rest
    one = CpuSet.of(before.all.first)
    await bench.hypervisor.pin(desired.uid, (one,), one, 30)
    bound = (await bench.hypervisor.affinities((pid,), 20))[pid]
    assert set(bound.vcpus) == {one} and bound.rest == one
    await bench.hypervisor.pin(desired.uid, (before.rest,), before.rest, 30)
    assert (await bench.hypervisor.affinities((pid,), 20))[pid] == before, "and back again"
    await bench.hypervisor.destroy(desired.uid, 20)
    await bench.until(desired.uid, lambda d: d.phase is DomainPhase.SHUT_OFF)
    assert pid not in await bench.hypervisor.affinities((pid,), 20)
