"""What the agent relies on of the host's facts."""

from casemate_agent.doctor.verdicts import CHECKS, Verdict, diagnose, required_of
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


async def test_the_doctor_looks_at_everything_and_finds_the_host_fit_but_for_kvm(bench: Bench) -> None:
    survey = await bench.survey.look(60)
    assert survey.hostname == (await bench.machine.observe(20)).hostname
    findings = {finding.check: finding for finding in diagnose(survey, required_of([], ["virtualisation"]))}
    assert list(findings) == list(CHECKS)
    assert not [finding for finding in findings.values() if finding.blocks]
    assert findings["libvirt"].verdict == Verdict.OK
    assert findings["network"].verdict == Verdict.OK
    assert survey.virtualisation is not None
    assert survey.virtualisation.kind == await bench.hypervisor.virtualisation(60)
    # Questions without an answer are named, and there are none but of libraries that a machine need not have.
    assert set(survey.problems) <= {"nvml"}
