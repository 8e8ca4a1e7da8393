"""What a host says of itself: derived from an observation, and told by an agent whose machine has something wrong."""

import asyncio
from dataclasses import replace

import pytest

from casemate_agent.drivers.ports import MachineFacts, NetworkFacts, StoredFiles
from casemate_agent.ledger.records import HostRecord, Observation
from casemate_agent.plan.conditions import host_conditions
from casemate_core.spec.views import Condition
from casemate_core.topology_loaders import from_line
from support.agents import Rig, instance, uid
from support.virtual import VirtualLoop, run_virtual

WELL = Observation(
    time_s=1_800_000_000.0,
    machine=MachineFacts("box", "boot-1", "6.1", from_line("1s 8k/c 2t 64G disk=1T")),
    domains={},
    files=StoredFiles({}, {}, {}, free_mib=500_000, total_mib=1_000_000),
    networks=NetworkFacts({}, {}),
    virtualisation="kvm",
    network_problem="",
)
TYPES = ["Ready", "Virtualisation", "Hypervisor", "Network", "Images", "DiskSpace", "Hardware", "LedgerComplete"]


def say(observed: Observation, host: HostRecord | None = None, *damage: str) -> dict[str, Condition]:
    made = host_conditions(host or HostRecord(complete=True), damage, observed, 0.1)
    assert [c.type for c in made] == TYPES
    return {c.type: c for c in made}


def test_a_host_on_which_all_is_well() -> None:
    assert {c.status for c in say(WELL).values()} == {"True"}


@pytest.mark.parametrize(
    ("word", "why", "status", "reason", "says"),
    [
        ("kvm", "", "True", "Kvm", "guests run on KVM"),
        ("tcg", "/dev/kvm cannot be opened", "False", "Emulated", "EMULATED (TCG), many times slower: /dev/kvm cannot"),
        ("simulated", "", "True", "Simulated", "simulated"),
        ("", "", "Unknown", "NotProbed", "not found out"),
    ],
)
def test_emulation_is_told_with_its_reason(word: str, why: str, status: str, reason: str, says: str) -> None:
    told = say(replace(WELL, virtualisation=word, virtualisation_reason=why))["Virtualisation"]
    assert (told.status, told.reason) == (status, reason)
    assert says in told.message


def test_a_silent_part_is_told_with_its_time_and_its_last_words() -> None:
    away = replace(
        WELL,
        domains=None,
        files=None,
        networks=None,
        silent={"hypervisor": "libvirtd ended", "images": "i", "networks": "n"},
        silent_since_s={"hypervisor": 1_800_000_000.0},
    )
    told = say(away)
    assert told["Hypervisor"] == Condition("Hypervisor", "False", "NoAnswer", "libvirtd ended", since_s=1_800_000_000.0)
    assert told["Ready"] == replace(told["Hypervisor"], type="Ready"), "nothing new can be started"
    assert say(replace(away, domains={}))["Ready"].status == "True", "what runs here, and what is placed here, can wait"
    assert (told["Images"].status, told["Images"].message) == ("False", "i")
    assert (told["Network"].status, told["Network"].message) == ("False", "n")
    assert told["DiskSpace"].status == "Unknown"


def test_a_kernel_that_does_not_take_the_rules() -> None:
    assert say(replace(WELL, network_problem="no nf_tables"))["Network"].message == "no nf_tables"
    assert say(replace(WELL, network_problem=None))["Network"].status == "Unknown"


@pytest.mark.parametrize(
    ("free_mib", "status", "reason"), [(100_000, "True", "Enough"), (99_999, "False", "Low"), (0, "False", "Full")]
)
def test_disk_space(free_mib: int, status: str, reason: str) -> None:
    told = say(replace(WELL, files=StoredFiles({}, {}, {}, free_mib=free_mib, total_mib=1_000_000)))["DiskSpace"]
    assert (told.status, told.reason) == (status, reason)
    assert ("of 977 GiB" in told.message) == (status == "False")


def test_the_last_megabyte_of_a_disk_is_no_news() -> None:
    files = [StoredFiles({}, {}, {}, free_mib=f, total_mib=1_000_000) for f in (50_900, 50_100, 500_000, 500_001)]
    low, still_low, enough, more = [say(replace(WELL, files=f))["DiskSpace"] for f in files]
    assert low == still_low
    assert enough == more


def test_a_ledger_that_lost_a_file() -> None:
    told = say(WELL, HostRecord(), "a.json: cut short")["LedgerComplete"]
    assert (told.status, told.message) == ("False", "a.json: cut short")


def test_an_agent_tells_what_happens_to_its_machine() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        rig.host.faults.no_kvm = "the processor shows neither vmx nor svm"
        rig.host.faults.no_rules = "nft is not installed"
        await rig.start()
        assert rig.agent is not None
        feed = rig.agent.feed

        def told(kind: str) -> Condition:
            return next(c for c in feed.report.conditions if c.type == kind)

        await asyncio.sleep(1)
        assert told("Virtualisation").message.endswith("neither vmx nor svm")
        assert told("Network").message == "nft is not installed"
        rig.host.faults.no_rules = ""  # mended: noticed by itself
        await asyncio.sleep(70)
        assert told("Network").status == "True"

        rig.host.faults.hung.add("hypervisor")
        await asyncio.sleep(60)
        first = told("Hypervisor")
        assert (first.status, first.reason) == ("False", "NoAnswer")
        assert 0 < first.since_s <= loop.wall()
        await asyncio.sleep(120)
        assert told("Hypervisor") == first  # the same absence began when it began
        rig.host.faults.hung.clear()
        rig.host.faults.disk_full = True
        await asyncio.sleep(60)
        assert told("Hypervisor").status == "True"
        assert told("DiskSpace").reason == "Full"
        await rig.kill()

    run_virtual(story)


def test_held_back_hardware_is_named_with_its_reason() -> None:
    problem = "PortMissing: no port has the permanent address 52:54:00:00:00:01"
    found = say(replace(WELL, machine=replace(WELL.machine, problems=(problem,))))["Hardware"]
    assert (found.status, found.reason, found.message) == ("False", "PortMissing", problem)


@pytest.mark.parametrize(
    ("port", "kind"),
    [("hypervisor", "Hypervisor"), ("networks", "Network"), ("images", "Images"), ("functions", "Hardware")],
)
def test_a_defect_of_a_driver_is_a_condition_of_its_part_and_ends_no_agent(port: str, kind: str) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop)
        await rig.start()
        await rig.want(instance(1))
        await rig.settle()
        rig.host.faults.defective.add(port)
        await asyncio.sleep(100)
        assert rig.agent is not None

        def told(kind: str) -> Condition:
            assert rig.agent is not None
            return next(c for c in rig.agent.feed.report.conditions if c.type == kind)

        assert (told(kind).status, told(kind).reason) == ("False", "NoAnswer")
        assert told(kind).message.startswith("a defect of the agent: KeyError")
        assert set(rig.active()) == {uid(1)}
        rig.host.faults.defective.clear()
        await asyncio.sleep(100)
        assert told(kind).status == "True"
        await rig.kill()

    run_virtual(story)
