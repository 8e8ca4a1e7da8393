"""cpuset partitions: what is wanted of whom, on the simulated host at every step, and the driver on files that stand for cgroup v2."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from casemate_agent import actions as act
from casemate_agent.config import BadConfig, load
from casemate_agent.drivers.partitions import CgroupPartitions, why_not
from casemate_agent.drivers.ports import Partition, PartitionFacts, PartitionRefused
from casemate_agent.drivers.sysfs import HostMachine
from casemate_agent.execute.executor import Point, Step
from casemate_agent.plan.drafting import Settings
from casemate_agent.plan.partitions import lost, wanted
from casemate_core.claims import Claim, PlainMemory
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.instance import DesiredInstance, Phase, Run
from casemate_core.topology_loaders import from_line
from casemate_wire.stream import HostEvent
from support.agents import SETTINGS, Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual

HOST = from_line("1s 8k/c 2t 64G disk=1T hk=1 iso=4 name=box")
#: Threads of the four isolated cores: 4-7 and their siblings 12-15.
QUIET = HOST.isolated


def cpus(text: str) -> CpuSet:
    return CpuSet.parse(text)


def claim_of(number: int, *threads: int, held: str = "") -> Claim:
    return Claim(
        owner=uid(number),
        vcpus=threads,
        vcpus_online=len(threads),
        vcpus_max=len(threads),
        held=cpus(held),
        emulator=CpuSet(HOST.index.reserved),
        memory=(PlainMemory(0, 1024, 0, 1024),),
        disk_mib=4096,
        realtime=True,
        exclusive_cores=True,
        one_cell=True,
    )


def owner(number: int, *threads: int, held: str = "") -> DesiredInstance:
    return instance(number, claim=claim_of(number, *threads, held=held), cpus=len(threads), cpu_policy="dedicated")


def test_each_vcpu_has_its_thread_and_the_siblings_that_are_held_idle_beside_it() -> None:
    assert cpus("4-7,12-15") == QUIET
    held = claim_of(1, 4, 6, held="12,14")
    assert wanted(held, HOST, QUIET) == (cpus("4,12"), cpus("6,14"))
    assert wanted(claim_of(1, 4, 12), HOST, QUIET) == (cpus("4"), cpus("12")), "its own sibling is a vCPU"
    assert wanted(held, HOST, cpus("6,14")) == (EMPTY, cpus("6,14")), "the others are isolated since boot"
    assert wanted(held, HOST, EMPTY) == () == wanted(instance(1).placement.claim, HOST, QUIET)
    grown = replace(claim_of(1, 4, 5), vcpus_online=1)
    assert wanted(grown, HOST, QUIET) == (cpus("4"),), "room to grow has no thread of QEMU's"


def test_what_is_not_so_is_said_in_the_kernels_words() -> None:
    sets = (cpus("4,12"), EMPTY, cpus("6"))
    good = (Partition("isolated", cpus("4,12")), Partition("member", cpus("1")), Partition("isolated", cpus("6")))
    assert lost(sets, good) == []
    assert lost(sets, (*good[:2], Partition("isolated invalid (Parent is not a partition root)", cpus("6")))) == [
        "vCPU 2 should have 6 for itself; its cpuset is isolated invalid (Parent is not a partition root) on 6"
    ]
    assert lost(sets, good[:1]) == ["vCPU 2 should have 6 for itself; its cpuset is not there"]
    assert lost((cpus("4"),), (Partition("isolated", cpus("5")),)) != [], "isolated elsewhere"


# --- on the simulated host --------------------------------------------------------------------------------------------


def rig_of(loop: VirtualLoop, settings: Settings = SETTINGS) -> Rig:
    rig = Rig(loop, topology=HOST, settings=settings)
    rig.host.partitionable = QUIET
    return rig


def test_a_guest_runs_only_once_its_vcpus_are_isolated_and_the_threads_come_back_with_its_end() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        done: list[str] = []

        def trace(step: Step) -> None:
            if step.uid == uid(9) and step.point is Point.AFTER_ACTION and step.action is not None:
                done.append(act.name(step.action))

        rig.trace = trace
        await rig.start()
        await rig.want(instance(1), owner(9, 4, 6, held="12,14"))
        await rig.settle()
        assert done[done.index("Start") :][:3] == ["Start", "Isolate", "Resume"]
        assert rig.host.domains[uid(9)].partitions == (cpus("4,12"), cpus("6,14"))
        assert rig.states()[uid(9)].phase is Phase.READY
        profile = {line.name: line for line in rig.states()[uid(9)].profile}
        assert profile["isolated"].found == "4,6" and not profile["isolated"].remedy
        await rig.want(replace(owner(9, 4, 6, held="12,14"), run=Run.STOPPED))
        await rig.settle()
        await asyncio.sleep(1)
        assert rig.host.in_partitions() == EMPTY == rig.host.permitted, "nothing is left of it"
        assert rig.broken == [] and rig.agent is not None and rig.agent.feed.report.drift == ()
        await rig.kill()

    run_virtual(story)


def test_one_that_somebody_undid_is_named_within_five_seconds_and_made_again_under_the_same_process() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        await rig.start()
        await rig.want(owner(9, 4, 6, held="12,14"))
        await rig.settle()
        before = rig.active()
        rig.host.undo_partition(uid(9), 1)
        await asyncio.sleep(5)
        assert rig.host.domains[uid(9)].partitions == (cpus("4,12"), cpus("6,14")) and rig.active() == before
        assert rig.agent is not None
        told = [
            n.message
            for _, n in rig.agent.feed.outbox.after(0)
            if isinstance(n, HostEvent) and n.reason == "IsolationLost"
        ]
        assert told == ["vCPU 1 should have 6,14 for itself; its cpuset is member on 6"]
        await rig.kill()

    run_virtual(story)


def test_held_by_policy_it_is_told_and_left() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop, replace(SETTINGS, repair_affinities=False))
        await rig.start()
        await rig.want(owner(9, 4, 6, held="12,14"))
        await rig.settle()
        rig.host.undo_partition(uid(9), 1)
        await asyncio.sleep(6)
        assert rig.agent is not None
        line = "IsolationLost: vCPU 1 should have 6,14 for itself; its cpuset is member on 6"
        assert rig.agent.feed.report.drift == (f"{line} ({uid(9)})",)
        assert rig.host.domains[uid(9)].partitions == (cpus("4,12"), EMPTY)
        profile = {each.name: each for each in rig.states()[uid(9)].profile}
        assert profile["isolated"].found == "4" and profile["isolated"].remedy
        await rig.kill()

    run_virtual(story)


def test_a_guest_whose_partition_the_kernel_refuses_does_not_run_and_says_why() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        rig.host.faults.failing["isolate"] = 2
        await rig.start()
        await rig.want(owner(9, 4, 6, held="12,14"))
        for _ in range(50):
            await asyncio.sleep(0.1)
            if (state := rig.states().get(uid(9))) is not None and state.message.startswith("Isolate:"):
                break
        else:
            raise AssertionError(rig.states())
        assert state.phase is not Phase.READY and rig.host.domains[uid(9)].guest is None
        await rig.settle()
        assert rig.states()[uid(9)].phase is Phase.READY and rig.states()[uid(9)].starts == 1
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


async def _story(rig: Rig) -> None:
    for change in (
        owner(9, 4, 6, held="12,14"),
        replace(owner(9, 4, 6, held="12,14"), run=Run.STOPPED),
        owner(8, 5, held="13"),
        None,
    ):
        await (rig.want(change) if change is not None else rig.unwant(uid(8), uid(9)))
        for _ in range(1500):
            if rig.settled() or rig.dead:
                break
            await asyncio.sleep(0.2)
        if rig.dead:
            return
        assert rig.settled(), rig.states()
    await asyncio.sleep(1)


def test_killed_at_every_step_no_guest_runs_without_its_partitions_and_none_is_left_over() -> None:
    async def count(loop: VirtualLoop) -> int:
        rig = rig_of(loop)
        await rig.start()
        await _story(rig)
        await rig.kill()
        return rig.steps

    steps = run_virtual(count)
    assert steps > 40

    async def story(step: int, loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        rig.kill_at = step
        await rig.start()
        await _story(rig)
        assert rig.dead, f"step {step} was not reached"
        await rig.kill()
        assert rig.host.check() == [], "killed there it leaves a safe state"
        rig.kill_at = 0
        await rig.start()
        await rig.settle()
        await asyncio.sleep(2)
        assert rig.host.check() == [] == rig.broken
        running = [d for d in rig.host.domains.values() if d.facts.uuid in rig.active()]
        assert all(d.guest is not None for d in running), "none waits frozen"
        assert rig.host.permitted == rig.host.in_partitions(), f"left over after step {step}"
        await rig.kill()

    for step in range(1, steps):
        run_virtual(partial(story, step))


# --- settings and the machine -----------------------------------------------------------------------------------------


def test_the_setting_is_a_list_of_threads(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('isolate = "4-7,12"\n')
    assert load(str(path), {}, needs_name=False).isolate == cpus("4-7,12")
    for text in ("[4, 5]", '"four"', "4"):
        path.write_text(f"isolate = {text}\n")
        with pytest.raises(BadConfig, match=r'isolate: .* is no list of threads .*; write isolate = "4-7,12"'):
            load(str(path), {}, needs_name=False)


# --- the driver, on files ---------------------------------------------------------------------------------------------

SCOPE = r"machine.slice/machine-qemu\x2d1\x2da.scope"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files that stand for cgroup v2 with one VM of two vCPUs in it; a file there takes what is written, as the kernel's do."""
    top = tmp_path / "sys/fs/cgroup"
    chain = ["machine.slice", SCOPE, f"{SCOPE}/libvirt", f"{SCOPE}/libvirt/vcpu0", f"{SCOPE}/libvirt/vcpu1"]
    for name in [*chain, f"{SCOPE}/libvirt/emulator", "system.slice"]:
        (top / name).mkdir(parents=True)
        for file, text in (("exclusive", ""), ("partition", "member"), ("effective", "0-7")):
            (top / name / f"cpuset.cpus.{file}").write_text(f"{text}\n")
    (top / "cgroup.controllers").write_text("cpuset cpu memory\n")
    (top / "cpuset.cpus.isolated").write_text("\n")
    (tmp_path / "proc/77").mkdir(parents=True)
    (tmp_path / "proc/77/cgroup").write_text(f"0::/{SCOPE}/libvirt/emulator\n")
    return tmp_path


@pytest.fixture
async def driver(root: Path) -> AsyncIterator[CgroupPartitions]:
    made = CgroupPartitions(root)
    yield made
    await made.aclose()


def file_of(root: Path, cgroup: str, name: str) -> Path:
    return root / "sys/fs/cgroup" / cgroup / f"cpuset.cpus.{name}"


async def test_a_partition_that_the_kernel_does_not_make_is_refused_in_its_words_and_undone(
    root: Path, driver: CgroupPartitions
) -> None:
    # These files say "isolated" once it was written, and go on to name all threads: as a kernel that made something else.
    with pytest.raises(PartitionRefused, match="threads 4 were asked for; the kernel says isolated on 0-7"):
        await driver.isolate(77, (cpus("4"), EMPTY), 5)
    assert file_of(root, f"{SCOPE}/libvirt/vcpu0", "partition").read_text() == "member"
    assert file_of(root, f"{SCOPE}/libvirt/vcpu0", "exclusive").read_text() == "\n"
    left = await driver.look((77,), 5)
    assert left.set_aside >= cpus("4"), "the permission above it is found again"


async def test_permission_is_given_from_the_top_and_the_state_is_written_last(
    root: Path, driver: CgroupPartitions
) -> None:
    file_of(root, f"{SCOPE}/libvirt/vcpu0", "effective").write_text("4,12\n")
    await driver.isolate(77, (cpus("4,12"), EMPTY), 5)
    for cgroup in ("machine.slice", SCOPE, f"{SCOPE}/libvirt", f"{SCOPE}/libvirt/vcpu0"):
        assert file_of(root, cgroup, "exclusive").read_text().strip() == "4,12"
    assert file_of(root, f"{SCOPE}/libvirt/vcpu1", "exclusive").read_text().strip() == ""
    found = await driver.look((77, 78), 5)
    assert list(found.domains) == [77] and found.domains[77][0] == Partition("isolated", cpus("4,12"))
    assert found.set_aside == EMPTY


async def test_what_no_vm_has_is_reclaimed_and_what_is_not_ours_stays(root: Path, driver: CgroupPartitions) -> None:
    file_of(root, "machine.slice", "exclusive").write_text("2,4-5\n")
    file_of(root, SCOPE, "exclusive").write_text("5\n")
    file_of(root, f"{SCOPE}/libvirt", "exclusive").write_text("5\n")
    file_of(root, f"{SCOPE}/libvirt/vcpu1", "exclusive").write_text("5\n")
    file_of(root, f"{SCOPE}/libvirt/vcpu1", "partition").write_text("isolated\n")
    file_of(root, "system.slice", "exclusive").write_text("4\n")
    assert (await driver.look((), 5)).set_aside == cpus("2,4")
    await driver.reclaim(cpus("4"), 5)
    assert file_of(root, "machine.slice", "exclusive").read_text() == "2,5"
    assert file_of(root, "system.slice", "exclusive").read_text() == "4\n", "it belongs to somebody else"
    assert await driver.look((), 5) == PartitionFacts({}, cpus("2"))


async def test_a_process_that_is_in_no_cgroup_of_libvirts_is_refused_with_the_setting_that_lacks(
    root: Path, driver: CgroupPartitions
) -> None:
    (root / "proc/77/cgroup").write_text("0::/user.slice\n")
    with pytest.raises(PartitionRefused, match=r"cgroup_controllers in /etc/libvirt/qemu.conf"):
        await driver.isolate(77, (cpus("4"),), 5)
    assert (await driver.look((77,), 5)).domains == {}


def test_why_a_host_makes_no_partitions(root: Path, tmp_path: Path) -> None:
    assert why_not(root) == ""
    top = root / "sys/fs/cgroup"
    (top / "cpuset.cpus.isolated").unlink()
    assert "Linux 6.7" in why_not(root)
    (top / "cgroup.controllers").write_text("memory\n")
    assert "no cpuset controller" in why_not(root)
    (top / "cgroup.controllers").unlink()
    assert "is not cgroup v2" in why_not(root)


async def test_this_machine_says_whether_it_makes_partitions(tmp_path: Path) -> None:
    plain = HostMachine(tmp_path)
    asked = HostMachine(tmp_path, isolate=CpuSet.of(1))
    try:
        before, after = await plain.observe(30), await asked.observe(30)
    finally:
        await plain.aclose()
        await asked.aclose()
    assert before.partitionable == EMPTY and not any("Isolation" in p for p in before.problems)
    if why := why_not(Path("/")):
        assert f"IsolationUnavailable: threads 1: {why}" in after.problems
        assert after.partitionable == EMPTY and after.topology.isolated == before.topology.isolated
    else:
        assert after.topology.isolated == before.topology.isolated | (CpuSet.of(1) & before.topology.online)
