"""Dedicated vCPUs stay on their threads: what the kernel says is compared, named, and put right."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from casemate_agent.drivers.threads import affinity_of
from casemate_agent.pinning import moved, watched
from casemate_agent.records import Note
from casemate_core.claims import Claim, PlainMemory
from casemate_core.spec.instance import DesiredInstance
from support.agents import Rig, instance, uid
from support.functions import HOST, PORTS, with_functions
from support.virtual import VirtualLoop, run_virtual


def dedicated(number: int, *threads: int) -> DesiredInstance:
    claim = Claim(
        owner=uid(number),
        vcpus=threads,
        vcpus_online=len(threads),
        vcpus_max=len(threads),
        memory=(PlainMemory(0, 1024, 0, 1024),),
        disk_mib=4096,
    )
    return instance(number, claim=claim, cpus=len(threads), cpu_policy="dedicated")


def test_a_vcpu_that_may_run_elsewhere_is_named() -> None:
    claim = dedicated(1, 4, 5).placement.claim
    assert moved(claim, (frozenset({4}), frozenset({5}))) == ()
    assert moved(claim, ()) == (), "what was not asked is not judged"
    assert moved(claim, (frozenset({4, 6, 7}), frozenset({5}))) == (
        "AffinityChanged: vCPU 0 may run on 4,6-7, should be on 4",
    )


def test_affinity_is_read_from_the_kernel_by_the_names_of_threads(tmp_path: Path) -> None:
    for task, name, cpus in (("10", "qemu-system-x86", "0-7"), ("11", "CPU 0/KVM", "4"), ("12", "CPU 1/TCG", "5-6")):
        folder = tmp_path / "10/task" / task
        folder.mkdir(parents=True)
        (folder / "comm").write_text(name + "\n")
        (folder / "status").write_text(f"Name:\t{name}\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n")
    assert affinity_of(10, tmp_path) == (frozenset({4}), frozenset({5, 6}))
    assert affinity_of(99, tmp_path) == ()
    assert affinity_of(os.getpid()) == (), "this process is no QEMU"


def test_a_moved_vcpu_is_an_event_and_bound_again_under_the_same_process() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(dedicated(1, 4, 5), instance(2))
        await rig.settle()
        pid = rig.active()[uid(1)]
        domain = rig.host.domains[uid(1)]
        assert watched(domain.facts) and not watched(rig.host.domains[uid(2)].facts)
        domain.affinity = (frozenset({4}), frozenset(range(8)))
        assert rig.agent is not None
        told: list[Note] = []
        rig.agent.note = told.append  # type: ignore[method-assign]
        await asyncio.sleep(5)
        assert [(n.uid, n.reason, n.message) for n in told] == [
            (uid(1), "AffinityChanged", "vCPU 1 may run on 0-7, should be on 5")
        ]
        assert domain.affinity == () and rig.active()[uid(1)] == pid
        await rig.kill()

    run_virtual(story)


def test_three_things_changed_behind_a_stopped_agent_are_three_named_drifts() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HOST)
        await rig.start()
        wanted = with_functions(1, (0, 0))
        claim = replace(wanted.placement.claim, vcpus=(4, 5), vcpus_online=2, vcpus_max=2, shared=())
        await rig.want(replace(wanted, cpus=2, placement=replace(wanted.placement, claim=claim)))
        await rig.settle()
        pid, key = rig.active()[uid(1)], f"{PORTS[0]}/0"
        await rig.kill()
        rig.host.domains[uid(1)].affinity = (frozenset({0}), frozenset({5}))
        rig.host.cards.states[key] = replace(rig.host.cards.states[key], mac="02:00:00:00:00:01")
        rig.host.guards.clear()
        rig.broken.clear()
        await rig.start()
        assert rig.agent is not None
        drift: set[str] = set()
        for _ in range(500):  # five seconds
            drift.update(rig.agent.feed.report.drift)
            await asyncio.sleep(0.01)
        assert {line.partition(":")[0] for line in drift} == {"AffinityChanged", "VfChanged", "GuardMissing"}
        assert rig.active()[uid(1)] == pid and rig.host.check() == []
        await rig.kill()

    run_virtual(story)
