"""The real-time profile: each line held, broken and put right on the files of a made-up host; and what of it a host may apply."""

import asyncio
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from casemate_agent.drivers.ports import DMA_LATENCY, ProcessFacts, QemuThreads
from casemate_agent.drivers.sysfs import HostMachine
from casemate_agent.drivers.tuning import HostTuning, confine
from casemate_agent.plan.drafting import Settings
from casemate_agent.plan.tuning import short_pools, tune
from casemate_agent.realtime.profile import Seen, from_hex, host_lines, instance_lines, patterns, to_hex
from casemate_core.claims import Claim, Pages, PlainMemory
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import MachineError
from casemate_core.spec.realtime import LineState, ProfileLine
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from support.agents import Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual

HOST = from_line("1s 4k/c 2t 16G 2M=512 disk=1T hk=1 iso=2 name=quiet")
QUIET = HOST.isolated
GOOD = {
    "proc/cmdline": f"root=/dev/sda nohz_full={QUIET} rcu_nocbs={QUIET} skew_tick=1 tsc=reliable iommu=pt nosoftlockup",
    "proc/irq/4/effective_affinity_list": "0",
    "proc/irq/4/smp_affinity_list": "0-7",
    "proc/sys/kernel/nmi_watchdog": "0",
    "proc/sys/kernel/numa_balancing": "0",
    "proc/sys/kernel/sched_rt_runtime_us": "-1",
    "proc/sys/kernel/timer_migration": "0",
    "proc/sys/vm/stat_interval": "10",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
    "sys/devices/system/cpu/nohz_full": str(QUIET),
    "sys/devices/virtual/workqueue/cpumask": to_hex(HOST.online - QUIET),
    "sys/devices/virtual/workqueue/writeback/cpumask": to_hex(HOST.online - QUIET),
    "sys/kernel/mm/ksm/run": "0",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    "sys/module/kvm/parameters/kvmclock_periodic_sync": "N",
    "sys/module/kvm_intel/parameters/ple_gap": "0",
    "sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "65535",
    DMA_LATENCY: "0",
    **{f"sys/devices/system/cpu/cpu{t}/cpufreq/scaling_governor": "performance" for t in QUIET},
    **{f"sys/devices/system/machinecheck/machinecheck{t}/ignore_ce": "1" for t in QUIET},
}
FIRST = QUIET.first


def lines(files: dict[str, str] | None, topology: Topology = HOST, quiet: CpuSet = QUIET) -> dict[str, ProfileLine]:
    return {each.line.name: each.line for each in host_lines(files, topology, quiet, dma_entries=100)}


def test_a_host_that_is_as_it_should_be() -> None:
    assert QUIET
    found = lines(GOOD)
    assert {line.state for line in found.values()} == {LineState.HELD}, [x for x in found.values() if x.remedy]
    assert all(
        line.source.startswith("/") and line.found and line.wanted and not line.remedy for line in found.values()
    )


@pytest.mark.parametrize(
    "name, path, text",
    [
        ("nohz-full", "sys/devices/system/cpu/nohz_full", "(null)"),
        ("rcu-nocbs", "proc/cmdline", f"skew_tick=1 tsc=reliable iommu=pt nosoftlockup rcu_nocbs={FIRST}"),
        ("skew-tick", "proc/cmdline", GOOD["proc/cmdline"].replace("skew_tick=1 ", "")),
        ("tsc", "proc/cmdline", GOOD["proc/cmdline"].replace("tsc=reliable ", "")),
        ("iommu", "proc/cmdline", GOOD["proc/cmdline"].replace("iommu=pt ", "iommu=off ")),
        ("softlockup", "proc/cmdline", GOOD["proc/cmdline"].replace("nosoftlockup", "")),
        ("rt-throttling", "proc/sys/kernel/sched_rt_runtime_us", "950000"),
        ("nmi-watchdog", "proc/sys/kernel/nmi_watchdog", "1"),
        ("numa-balancing", "proc/sys/kernel/numa_balancing", "1"),
        ("timer-migration", "proc/sys/kernel/timer_migration", "1"),
        ("stat-interval", "proc/sys/vm/stat_interval", "1"),
        ("ksm", "sys/kernel/mm/ksm/run", "1"),
        ("thp", "sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never"),
        ("clocksource", "sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet"),
        ("workqueues", "sys/devices/virtual/workqueue/cpumask", "ff"),
        ("writeback", "sys/devices/virtual/workqueue/writeback/cpumask", "ff"),
        ("interrupts", "proc/irq/4/effective_affinity_list", str(FIRST)),
        ("governor", f"sys/devices/system/cpu/cpu{FIRST}/cpufreq/scaling_governor", "powersave"),
        ("machine-checks", f"sys/devices/system/machinecheck/machinecheck{FIRST}/ignore_ce", "0"),
        ("power-states", DMA_LATENCY, "2000000000"),
        ("kvmclock-sync", "sys/module/kvm/parameters/kvmclock_periodic_sync", "Y"),
        ("pause-exits", "sys/module/kvm_intel/parameters/ple_gap", "128"),
        ("dma-mappings", "sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "64"),
    ],
)
def test_one_thing_that_is_otherwise_breaks_its_line_and_no_other(name: str, path: str, text: str) -> None:
    found = lines({**GOOD, path: text})
    broken = [line.name for line in found.values() if line.state is LineState.BROKEN]
    assert broken == [name]
    assert found[name].remedy and found[name].found


def test_what_the_kernel_does_not_have_is_not_applicable_and_what_was_not_read_is_unknown() -> None:
    bare = lines({"proc/cmdline": GOOD["proc/cmdline"]})
    assert bare["ksm"].state is bare["governor"].state is bare["power-states"].state is LineState.NOT_APPLICABLE
    assert [line.state for line in lines(None).values()] == [LineState.UNKNOWN]
    assert lines(GOOD, quiet=EMPTY) == {} and patterns(EMPTY) == ()


def test_threads_that_are_not_isolated_are_named_with_the_kernel_line_that_isolates_them() -> None:
    loose = replace(HOST, isolated=EMPTY)
    found = lines(GOOD, loose, CpuSet.of(FIRST))
    assert (
        found["isolated"].state is LineState.BROKEN
        and f"isolcpus=managed_irq,domain,{FIRST}" in found["isolated"].remedy
    )
    assert found["whole-cores"].state is LineState.BROKEN, "its sibling is not quiet"


def test_threads_that_partitions_isolate_are_held_while_a_vm_has_them_and_nothing_is_said_of_the_rest() -> None:
    boot, parts = "sys/devices/system/cpu/isolated", "sys/fs/cgroup/cpuset.cpus.isolated"

    def line(files: dict[str, str], due: CpuSet) -> ProfileLine:
        found = host_lines({**GOOD, boot: "", **files}, HOST, QUIET, 0, partitionable=QUIET, in_partitions=due)
        return next(each.line for each in found if each.line.name == "isolated")

    free = line({parts: ""}, EMPTY)
    assert (free.state, free.found) == (
        LineState.HELD,
        f"none since boot, none by partitions, {QUIET} once a VM has them",
    )
    core = CpuSet.of(FIRST)
    assert line({parts: str(core)}, core).state is LineState.HELD
    gone = line({parts: ""}, core)
    assert gone.state is LineState.BROKEN and gone.source == f"/{parts}" and "isolate in" in gone.remedy


def test_what_may_be_set_at_run_time_makes_the_line_hold_and_nothing_else_is_written() -> None:
    bad = {
        **GOOD,
        "proc/sys/kernel/sched_rt_runtime_us": "950000",
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never",
        "sys/devices/virtual/workqueue/cpumask": "ff",
        "proc/irq/4/effective_affinity_list": str(FIRST),
        "sys/devices/system/cpu/nohz_full": "",
        DMA_LATENCY: "2000000000",
    }
    profile = host_lines(bad, HOST, QUIET)
    writes = {t.path: t.text for t in tune(Settings(realtime="apply"), profile, HOST, {}, frozenset())}
    assert set(writes) == set(bad) - {p for p in bad if bad[p] == GOOD[p]} - {"sys/devices/system/cpu/nohz_full"} - {
        "proc/irq/4/effective_affinity_list"
    } | {"proc/irq/4/smp_affinity_list"}
    after = {**bad, **writes, "proc/irq/4/effective_affinity_list": writes["proc/irq/4/smp_affinity_list"]}
    assert [x.line.name for x in host_lines(after, HOST, QUIET) if x.line.state is LineState.BROKEN] == ["nohz-full"]
    assert tune(Settings(realtime="report"), profile, HOST, {}, frozenset()) == ()
    once = tune(Settings(realtime="apply"), profile, HOST, {}, frozenset({DMA_LATENCY}))
    assert DMA_LATENCY not in {t.path for t in once}, "what the kernel refused is not asked for again"


@given(st.integers(1, 2**140))
def test_masks_are_read_and_written_as_the_kernel_does(mask: int) -> None:
    text = to_hex(CpuSet(mask))
    assert from_hex(text) == CpuSet(mask)
    assert all(len(group) == 8 for group in text.split(",")[1:])


def test_a_mask_that_is_none_is_none() -> None:
    assert from_hex("no") is None and from_hex("00000000,00000003") == CpuSet.of(0, 1)


RT = Claim(
    owner=uid(1), vcpus=tuple(QUIET)[:2], held=CpuSet.from_ids(tuple(QUIET)[2:]), vcpus_online=2, vcpus_max=2,
    emulator=CpuSet(HOST.index.reserved), disk_mib=4096,
    memory=(PlainMemory(0, 1024, 0, 1024),), exclusive_cores=True, one_cell=True, realtime=True,
)  # fmt: skip


def of(claim: Claim, seen: Seen) -> dict[str, ProfileLine]:
    return {line.name: line for line in instance_lines(claim, seen, claim.emulator, 77, 2048)}


def test_a_real_time_instance_that_is_as_it_should_be_and_each_thing_that_is_not() -> None:
    threads = QemuThreads(tuple(CpuSet.of(t) for t in RT.vcpus), RT.emulator, frozenset({1}))
    process = ProcessFacts(1024 * 1024, None, {})
    good = Seen(threads, process, QUIET)
    assert {line.state for line in of(RT, good).values()} == {LineState.HELD}, of(RT, good)
    for name, seen in {
        "vcpus": replace(good, threads=replace(threads, vcpus=(threads.vcpus[0], CpuSet.of(0, 1)))),
        "emulator": replace(good, threads=replace(threads, rest=CpuSet.parse("0-7"))),
        "scheduler": replace(good, threads=replace(threads, fifo=frozenset())),
        "isolated": replace(good, isolated=EMPTY),
        "memory-locked": replace(good, process=replace(process, locked_kib=12)),
        "memory-lock-limit": replace(good, process=replace(process, lock_limit_kib=64)),
    }.items():
        assert [line.name for line in of(RT, seen).values() if line.state is LineState.BROKEN] == [name]
    blind = of(RT, Seen(isolated=QUIET))
    assert {line.state for line in blind.values()} == {LineState.HELD, LineState.UNKNOWN}
    assert of(instance(2).placement.claim, good) == {}, "who floats has no profile"


def test_pages_are_where_they_were_promised_or_it_is_said() -> None:
    claim = replace(RT, memory=(), pages=(Pages(0, 2048, 512),), realtime=False)
    threads = QemuThreads(tuple(CpuSet.of(t) for t in RT.vcpus), RT.emulator)
    assert of(claim, Seen(threads, ProcessFacts(0, None, {0: 1048576})))["pages"].state is LineState.HELD
    elsewhere = of(claim, Seen(threads, ProcessFacts(0, None, {0: 1024, 1: 1047552})))["pages"]
    assert elsewhere.state is LineState.BROKEN and elsewhere.found == "1 MiB on cell 0, 1023 MiB on cell 1"
    assert of(claim, Seen(threads, ProcessFacts(0, None, None)))["pages"].state is LineState.UNKNOWN


def test_pools_that_somebody_shrank_are_named_and_grown_where_the_host_may() -> None:
    held = {uid(1): replace(RT, pages=(Pages(0, 2048, 500, 100),))}
    assert short_pools(HOST, held) == ["PagePoolShort: cell 0 has 512 pages of 2048 KiB, 600 are promised"]
    assert short_pools(HOST, {uid(1): replace(RT, pages=(Pages(0, 2048, 500),))}) == []
    assert tune(Settings(), (), HOST, held, frozenset()) == ()
    (grown,) = tune(Settings(repair_pages=True), (), HOST, held, frozenset())
    assert (grown.path, grown.text) == ("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "600")


def test_an_agent_applies_what_it_may_tells_the_rest_and_names_what_changes() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HOST, settings=Settings(stop_grace_s=10.0, realtime="apply"))
        rig.host.tuning = {
            **GOOD,
            "proc/sys/kernel/sched_rt_runtime_us": "950000",
            "sys/module/kvm_intel/parameters/ple_gap": "9",
        }
        await rig.start()
        await rig.want(instance(1, claim=RT, cpus=2, cpu_policy="dedicated"))
        await rig.settle()
        await asyncio.sleep(10)
        assert rig.agent is not None
        assert rig.host.tuning["proc/sys/kernel/sched_rt_runtime_us"] == "-1"
        told = {line.name: line for line in rig.agent.feed.report.profile}
        assert [name for name, line in told.items() if line.state is LineState.BROKEN] == ["pause-exits"]
        mine = {line.name: line.state for line in rig.states()[uid(1)].profile}
        assert set(mine.values()) == {LineState.HELD} and {"vcpus", "emulator", "scheduler", "memory-locked"} <= set(
            mine
        )
        # somebody turns it back: it is read again, and set again
        rig.host.tuning["proc/sys/kernel/sched_rt_runtime_us"] = "950000"
        await asyncio.sleep(5)
        assert rig.host.tuning["proc/sys/kernel/sched_rt_runtime_us"] == "-1"
        await rig.kill()

    run_virtual(story)


async def test_files_of_a_host_are_read_written_and_refused(tmp_path: Path) -> None:
    for path, text in (("proc/irq/4/smp_affinity_list", "0-3"), ("proc/sys/kernel/nmi_watchdog", "1")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text + "\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / DMA_LATENCY).write_bytes(b"\x00\x94\x35\x77")
    tuning = HostTuning(tmp_path)
    wanted = ("proc/irq/[0-9]*/smp_affinity_list", "proc/sys/kernel/nmi_watchdog", "proc/none", DMA_LATENCY)
    assert await tuning.read(wanted, 20) == {
        "proc/irq/4/smp_affinity_list": "0-3", "proc/sys/kernel/nmi_watchdog": "1", DMA_LATENCY: "2000000000",
    }  # fmt: skip
    await tuning.write("proc/sys/kernel/nmi_watchdog", "0", 20)
    await tuning.write(DMA_LATENCY, "0", 20)
    assert await tuning.read(wanted[1:], 20) == {"proc/sys/kernel/nmi_watchdog": "0", DMA_LATENCY: "0"}
    with pytest.raises(MachineError, match="/proc/none/file"):
        await tuning.write("proc/none/file", "0", 20)
    folder = tmp_path / "proc/77"
    folder.mkdir()
    (folder / "status").write_text("Name:\tqemu\nVmLck:\t    2048 kB\n")
    (folder / "limits").write_text(
        "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608    8388608   bytes\n"
    )
    (folder / "numa_maps").write_text(
        "7f00 bind:1 file=/dev/hugepages/x huge anon=3 N1=3 kernelpagesize_kB=2048\n7f10 default anon=9 N0=9 kernelpagesize_kB=4\n"
    )
    assert await tuning.processes((77, 78), 20) == {77: ProcessFacts(2048, 8192, {1: 6144})}
    await tuning.aclose()


async def test_this_agent_keeps_off_quiet_threads() -> None:
    tuning = HostTuning()
    own = confine(EMPTY)
    assert own
    assert await tuning.confine(CpuSet.of(8191), 20) == own
    await tuning.aclose()


async def test_the_profile_of_this_machine_says_what_its_files_say(tmp_path: Path) -> None:
    """A real kernel, whatever it is: nothing is presumed of it, and no line says another thing than the file it names."""
    machine, tuning = HostMachine(tmp_path), HostTuning()
    try:
        topology = (await machine.observe(30)).topology
        quiet = CpuSet.of(max(topology.online))
        files = await tuning.read(patterns(quiet), 30)
    finally:
        await machine.aclose()
        await tuning.aclose()
    found = lines(dict(files), topology, quiet)
    assert len(found) > 15 and LineState.UNKNOWN not in {line.state for line in found.values()}
    for line in found.values():
        assert line.found and line.source.startswith("/") and bool(line.remedy) is (line.state is LineState.BROKEN), (
            line
        )
        path = Path(line.source)
        if line.state is LineState.NOT_APPLICABLE:
            assert "*" in line.source or line.source[1:] not in files, line
        elif line.name in (
            "rt-throttling",
            "nmi-watchdog",
            "numa-balancing",
            "timer-migration",
            "ksm",
            "stat-interval",
        ):
            assert line.found == path.read_text().strip()
        elif line.name == "thp":
            assert f"[{line.found}]" in path.read_text()
        elif line.name in ("workqueues", "writeback"):
            mask = from_hex(path.read_text().strip())
            assert mask is not None and (line.state is LineState.HELD) is (not mask & quiet)
        elif line.name == "isolated":
            assert (line.state is LineState.HELD) is (quiet <= topology.isolated)
