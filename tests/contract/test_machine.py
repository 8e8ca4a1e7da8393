"""What the agent relies on of the host's facts."""

from casemate_core.topology import check
from support.contract import Bench


async def test_the_facts_of_a_machine_are_the_same_each_time_and_make_sense(bench: Bench) -> None:
    facts = await bench.machine.observe(20)
    assert facts.boot_id
    assert facts.hostname
    assert facts.kernel
    assert check(facts.topology) == []
    assert facts.topology.online
    assert facts.topology.memory_mib > 0
    assert await bench.machine.observe(20) == facts


async def test_virtualisation_is_one_of_the_words(bench: Bench) -> None:
    word = await bench.hypervisor.virtualisation(60)
    assert word in ("kvm", "tcg", "simulated")
    assert await bench.hypervisor.virtualisation(60) == word


async def test_emulation_has_a_reason_and_only_emulation(bench: Bench) -> None:
    word = await bench.hypervisor.virtualisation(60)
    assert (bench.hypervisor.virtualisation_reason != "") == (word == "tcg")
