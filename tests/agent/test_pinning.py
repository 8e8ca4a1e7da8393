"""Dedicated vCPUs stay on their threads: what the kernel says is compared, named, and put right."""

import asyncio
import os
import subprocess
from dataclasses import replace
from pathlib import Path

from casemate_agent.drivers.ports import QemuThreads
from casemate_agent.drivers.simulated_domain import tap_name
from casemate_agent.drivers.threads import ThreadReader
from casemate_agent.ledger.records import Note
from casemate_core.claims import Claim, PlainMemory
from casemate_core.cpuset import CpuSet
from casemate_core.spec.instance import DesiredInstance
from casemate_wire.stream import HostEvent
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


def test_affinity_is_read_from_the_kernel_by_the_names_of_threads(tmp_path: Path) -> None:
    names = {10: "qemu-system-x86", 11: "CPU 0/KVM", 12: "CPU 1/TCG", 13: "IO iothread1"}
    allowed = {10: {0, 1}, 11: {4}, 12: {5, 6}, 13: {1, 2}}
    for task, name in names.items():
        folder = tmp_path / f"10/task/{task}"
        folder.mkdir(parents=True)
        (folder / "comm").write_text(name + "\n")
    reader = ThreadReader(tmp_path, allowed.__getitem__)
    want = QemuThreads((CpuSet.of(4), CpuSet.of(5, 6)), CpuSet.of(0, 1, 2))
    assert reader.look((10, 99)) == {10: want}
    assert want.all == CpuSet.parse("0-2,4-6")
    # a name is read once: what a guest may call its own threads later is nobody's vCPU
    (tmp_path / "10/task/11/comm").write_text("other\n")
    assert reader.look((10,)) == {10: want}
    assert ThreadReader().look((os.getpid(),))[os.getpid()].vcpus == (), "this process is no QEMU"


def test_a_thread_that_has_no_name_yet_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "10/task/11"
    folder.mkdir(parents=True)
    (folder / "comm").write_text("qemu-system-x86\n")
    reader = ThreadReader(tmp_path, lambda task: {4})
    assert reader.look((10,)) == {10: QemuThreads((), CpuSet.of(4))}
    (folder / "comm").write_text("CPU 0/KVM\n")
    assert reader.look((10,)) == {10: QemuThreads((CpuSet.of(4),))}


def test_a_thread_of_this_machine_is_bound_and_read_back() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            allowed = CpuSet.from_ids(os.sched_getaffinity(process.pid))
            reader, one = ThreadReader(), CpuSet.of(allowed.first)
            assert reader.look((process.pid,)) == {process.pid: QemuThreads((), allowed)}
            reader.bind_rest(process.pid, one)
            assert reader.look((process.pid,)) == {process.pid: QemuThreads((), one)}
        finally:
            process.kill()


def test_a_moved_vcpu_is_an_event_and_bound_again_under_the_same_process() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(dedicated(1, 4, 5), instance(2))
        await rig.settle()
        pid = rig.active()[uid(1)]
        domain = rig.host.domains[uid(1)]
        bound = domain.threads
        assert bound.vcpus == (CpuSet.of(4), CpuSet.of(5))
        domain.threads = replace(bound, vcpus=(CpuSet.of(4), CpuSet.parse("0-7")))
        assert rig.agent is not None
        told: list[Note] = []
        rig.agent.note = told.append  # type: ignore[method-assign]
        await asyncio.sleep(5)
        assert [(n.uid, n.reason, n.message) for n in told] == [
            (uid(1), "AffinityChanged", "vCPU 1 may run on 0-7, should be on 5")
        ]
        assert domain.threads == bound and rig.active()[uid(1)] == pid
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
        domain = rig.host.domains[uid(1)]
        domain.threads = replace(domain.threads, vcpus=(CpuSet.of(0), CpuSet.of(5)))
        rig.host.cards.states[key] = replace(rig.host.cards.states[key], mac="02:00:00:00:00:01")
        rig.host.plugs[tap_name(uid(1), 0)] = ""
        rig.broken.clear()
        await rig.start()
        assert rig.agent is not None
        await asyncio.sleep(5)
        # A drift that is put right stands in a report no longer than until the next round; the events of it stay.
        told = [n.reason for _, n in rig.agent.feed.outbox.after(-1) if isinstance(n, HostEvent) and n.instance]
        assert sorted(told) == ["AffinityChanged", "TapMoved", "VfChanged"]
        assert rig.active()[uid(1)] == pid and rig.host.check() == []
        await rig.kill()

    run_virtual(story)
