"""GPUs on a simulated host: given, kept through stops, taken back; held back by policy and by word; held by a process."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from casemate_agent.actions import LoseGpu
from casemate_agent.config import BadConfig, load
from casemate_agent.gpu.lifecycle import Event, GpuRecord, State, move
from casemate_agent.gpu.passport import Hygiene, proof_step
from casemate_agent.gpu.planning import GpuLook, plan_gpus, unserved
from casemate_agent.gpu.readings import GpuFault, Proof
from casemate_agent.gpu.records import GpuEntry, GpuPolicy, Response
from casemate_agent.gpu.settings import gpu_policy
from casemate_agent.hardware.rules import GpuRule
from casemate_core.gpu import GpuOrder, GpuVerb, Result
from casemate_core.spec.instance import Phase, Run
from casemate_wire.stream import Desired
from support.agents import Rig, uid
from support.gpus import GPU_SETTINGS, GPUS, HOST, SCRUBBED, gpu_states, told_of, with_gpus
from support.virtual import VirtualLoop, run_virtual

GPU = GPUS[0]


async def until(rig: Rig, condition: Any, within_s: float = 600.0) -> None:
    end = rig.loop.time() + within_s
    while not condition():
        assert rig.loop.time() < end, (gpu_states(rig), rig.states())
        await asyncio.sleep(0.1)


async def rig_of(loop: VirtualLoop, policy: GpuPolicy = SCRUBBED) -> Rig:
    """A host whose GPUs were all looked at, and are the host's own driver's."""
    rig = Rig(loop, HOST, settings=replace(GPU_SETTINGS, gpu=policy))
    await rig.start()
    await until(rig, lambda: gpu_states(rig) == dict.fromkeys(GPUS, "HostOwned"))
    return rig


async def order(rig: Rig, verb: GpuVerb, number: int = 1, reason: str = "") -> None:
    rig.revision += 1
    assert rig.agent is not None
    asked = (GpuOrder(GPU, f"order-{number}", verb, reason),)
    await rig.agent.accept(Desired(rig.epoch, rig.revision, gpu_orders=asked))


def phase(rig: Rig) -> str:
    return gpu_states(rig).get(GPU, "")


def test_a_gpu_of_which_nothing_is_known_is_sanitised_before_it_is_first_given() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = Rig(loop, HOST, settings=GPU_SETTINGS)
        rig.host.board(GPU).memory.add("somebody")
        await rig.start()
        await rig.want(with_gpus(1, GPU))
        await rig.settle()
        assert rig.host.board(GPU).memory == {uid(1)} and rig.broken == []
        assert [s.rung for s in told_of(rig, GPU).passport.steps] == [
            "released", "function-reset", "proved", "scrub", "checks"
        ]  # fmt: skip
        await rig.kill()

    run_virtual(story)


def test_a_gpu_stays_with_its_instance_through_stops_and_comes_back_after_it() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        first = with_gpus(1, GPU)
        await rig.want(first)
        await rig.settle()
        said = told_of(rig, GPU)
        assert (said.phase, said.owner, said.tenant, said.driver) == ("Attached", uid(1), "tenant-1", "vfio-pci")
        assert said.passport.climb == 1
        await rig.want(replace(first, run=Run.STOPPED))
        await rig.settle()
        await rig.want(first)
        await rig.settle()
        assert (told_of(rig, GPU).phase, told_of(rig, GPU).passport.climb) == ("Attached", 1), "the same tenant's still"
        await rig.unwant(uid(1))
        await until(rig, lambda: phase(rig) == "HostOwned")
        said = told_of(rig, GPU)
        assert (said.passport.climb, said.passport.tenant, said.passport.clean, said.owner) == (2, "tenant-1", True, "")
        assert not rig.host.board(GPU).memory and rig.host.board(GPU).driver == "nvidia"
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize("state", State)
def test_a_gpu_that_was_away_is_clean_no_more(state: State) -> None:
    """Pulled and put back, it may have been in another machine, or be another of its kind in the same slot."""
    entry = GpuEntry(GpuRecord(GPU, state))
    found = plan_gpus(GpuLook(there=(), entries={GPU: entry}, running={}), GpuPolicy())
    lost = state in (State.FREE, State.HOST_OWNED, State.PREPARED)
    assert found == ({f"gpu:{GPU}": LoseGpu(GPU, "it is not there")} if lost else {})
    if lost:
        after = move(entry.record, Event.LOSE)
        assert after.dirty and not after.assignable and not after.owner


def test_an_instance_waits_for_a_gpu_that_is_not_clean_yet() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_gpus(1, GPU))
        await rig.settle()
        rig.host.board(GPU).holders = ("stray (77)",)
        await rig.unwant(uid(1))
        await until(rig, lambda: uid(1) not in rig.states())
        await rig.want(with_gpus(2, GPU, generation=2))
        await until(rig, lambda: uid(2) in rig.states() and rig.states()[uid(2)].reason == "GpuNotClean")
        assert "is given to nobody until it is clean" in rig.states()[uid(2)].message
        rig.host.board(GPU).holders = ()
        await rig.settle()
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


def test_a_process_that_holds_on_is_named_after_its_time() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_gpus(1, GPU))
        await rig.settle()
        rig.host.board(GPU).holders = ("nvidia-persiste (4711)",)
        await rig.unwant(uid(1))
        await until(rig, lambda: phase(rig) == "Quarantined")
        assert told_of(rig, GPU).reason == "still held: nvidia-persiste (4711), for 5 s"
        # The next to whom it is given is refused with that word, and a person lets it out.
        await rig.want(with_gpus(2, GPU, generation=2))
        await until(rig, lambda: uid(2) in rig.states() and rig.states()[uid(2)].reason == "PlacementRefused")
        assert f"GPU {GPU} is Quarantined: still held" in rig.states()[uid(2)].message
        rig.host.board(GPU).holders = ()
        await order(rig, GpuVerb.RELEASE)
        await rig.settle()
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"deaf": True}, "it still has what was set before"),
        ({"unscrubbable": True}, "scrub: MachineFailed: the scrubber ended with 1"),
        ({"methods": ("bus",), "strangers": ("0000:17:00.1 (snd)",)}, "would reset others on its bus too: 0000:17:00.1 (snd)"),
        ({"methods": ()}, "the kernel knows no other reset of it"),
        ({"ecc_uncorrected": 3}, "ecc: 3 uncorrected ECC errors"),
        ({"pcie_fatal": 2}, "pcie-fatal: 2 uncorrected PCIe errors"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_sure_holds_it_back(broken: dict[str, Any], said: str) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop, replace(SCRUBBED, broken=Response.TELL))
        await rig.want(with_gpus(1, GPU))
        await rig.settle()
        for name, value in broken.items():
            setattr(rig.host.board(GPU), name, value)
        await rig.unwant(uid(1))
        await until(rig, lambda: phase(rig) == "Quarantined")
        state = told_of(rig, GPU)
        assert said in state.reason and not state.passport.clean and state.passport.reason == state.reason
        await rig.kill()

    run_virtual(story)


def test_an_operators_word_is_taken_once_and_over_the_agents_death() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await order(rig, GpuVerb.SANITISE)
        await until(rig, lambda: told_of(rig, GPU).order == "order-1" and phase(rig) == "HostOwned")
        assert told_of(rig, GPU).passport.climb == 2
        await rig.kill()
        await rig.start()
        await until(rig, lambda: phase(rig) == "HostOwned")
        await asyncio.sleep(60)
        assert told_of(rig, GPU).passport.climb == 2, "not again"
        await order(rig, GpuVerb.QUARANTINE, 2, "smells")
        await until(rig, lambda: phase(rig) == "Quarantined")
        assert told_of(rig, GPU).reason == "smells"
        await order(rig, GpuVerb.RELEASE, 3)
        await until(rig, lambda: phase(rig) == "HostOwned")
        assert told_of(rig, GPU).passport.climb == 3
        await rig.kill()

    run_virtual(story)


def test_a_gpu_in_use_is_held_back_when_it_returns() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_gpus(1, GPU))
        await rig.settle()
        await order(rig, GpuVerb.QUARANTINE, 1, "to be changed")
        await until(rig, lambda: told_of(rig, GPU).order == "order-1")
        assert phase(rig) == "Attached" and rig.active(), "nobody loses it"
        await rig.unwant(uid(1))
        await until(rig, lambda: phase(rig) == "Quarantined")
        assert rig.host.board(GPU).memory == {uid(1)}, "as it came back: an operator lets it out, through the ladder"
        await order(rig, GpuVerb.RELEASE, 2)
        await until(rig, lambda: phase(rig) == "HostOwned")
        assert not rig.host.board(GPU).memory
        await rig.kill()

    run_virtual(story)


def cordoned(rig: Rig) -> bool:
    assert rig.agent is not None
    return any(c.type == "Ready" and c.status == "False" for c in rig.agent.feed.report.conditions)


@pytest.mark.parametrize("response", list(Response))
def test_what_is_done_about_a_broken_board_is_for_the_policy_to_say(response: Response) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop, replace(SCRUBBED, broken=response))
        rig.host.xids.append(GpuFault(GPU, 79))
        await until(rig, lambda: told_of(rig, GPU).health == "broken")
        await asyncio.sleep(30)
        assert phase(rig) == ("HostOwned" if response is Response.TELL else "Quarantined")
        assert cordoned(rig) == (response is Response.CORDON)
        if response is not Response.TELL:
            assert told_of(rig, GPU).reason == "XID 79: the GPU has fallen off the bus"
            await order(rig, GpuVerb.RELEASE)
            await until(rig, lambda: phase(rig) == "HostOwned")
            assert not cordoned(rig)
        await rig.kill()

    run_virtual(story)


def test_a_lost_record_makes_a_gpu_dirty_and_a_running_one_its_domains() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        await rig.want(with_gpus(1, GPU))
        await rig.settle()
        await rig.kill()
        rig.disk.erase()
        await rig.start()
        await until(rig, lambda: len(gpu_states(rig)) == 3 and gpu_states(rig)[GPUS[1]] == "HostOwned")
        said = told_of(rig, GPU)
        assert (said.phase, said.owner, said.tenant) == ("Attached", uid(1), "tenant-1")
        assert told_of(rig, GPUS[1]).passport.climb == 1, "sanitised anew: who had it is not known"
        assert rig.active() and rig.broken == []
        assert rig.states()[uid(1)].phase in (Phase.READY, Phase.RUNNING)
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"gpus": (GPU,), "partition": 0}, "nobody on this host switches fabric partition 0"),
    ],
)
def test_what_no_host_can_give_yet_is_said_and_nothing_is_started(more: dict[str, Any], said: str) -> None:
    found = unserved(replace(with_gpus(1).placement.claim, **more), switches=False)
    assert found == said
    assert unserved(with_gpus(1, GPU).placement.claim, switches=False) == ""
    assert (unserved(replace(with_gpus(1).placement.claim, **more), switches=True) == "") is ("partition" in more)


def test_the_policys_settings(tmp_path: Any) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        '[gpu]\nscrub = ["/usr/local/sbin/scrub", "--all"]\nrequired = ["scrub", "ecc"]\nbroken = "cordon"\nheld_limit_s = 30\n'
        '[[gpus]]\nclass = "0300"\nmodel = "Radeon"\nmemory = "48Gi"\n'
    )
    config = load(str(file), {"name": "h"})
    assert config.gpu == GpuPolicy(
        Hygiene(scrub=True, required=frozenset({"scrub", "ecc"})), Response.CORDON, Response.TELL, 30.0,
        ("/usr/local/sbin/scrub", "--all"),
    )  # fmt: skip
    assert config.gpus == (GpuRule("Radeon", pci_class="0300", memory_mib=49152),)
    assert gpu_policy({}) == GpuPolicy()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu = 1", "gpu: expected a table; begin it with [gpu]"),
        ("[gpu]\nscrap = 1", "gpu.scrap: there is no such setting"),
        ('[gpu]\nscrub = ["scrub"]', "gpu.scrub: 'scrub' is no absolute path"),
        ("[gpu]\nscrub = 1", "gpu.scrub: 1 is not a list of words"),
        ('[gpu]\nscrub_image = "x"', "gpu.scrub_image: a scrubber that runs in a guest is not served"),
        ('[gpu]\nrequired = ["luck"]', "gpu.required: 'luck' is no check and no step"),
        ('[gpu]\nbroken = "burn"', "gpu.broken: 'burn' is not known; write one of tell, quarantine, cordon"),
        ("[gpu]\nheld_limit_s = -1", "gpu.held_limit_s: -1 is not a number of seconds from 0 to 600"),
        ("[gpu]\ndriver_checks = 1", "gpu.driver_checks: 1 is neither true nor false"),
        ('[[gpus]]\nmodel = "x"', "gpus[0]: matches every function of the host"),
        ('[[gpus]]\nclass = "0300"', "gpus[0].model: '' is not the name of a model"),
        ('[[gpus]]\nclass = "0300"\nmodel = "x"\nmemory = "much"', "gpus[0].memory:"),
    ],
)
def test_settings_that_have_no_meaning(tmp_path: Any, text: str, said: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    with pytest.raises(BadConfig) as refused:
        load(str(file), {"name": "h"})
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("proof", "result", "said"),
    [
        (Proof(False, "", "10de:2330"), Result.FAILED, "it does not answer"),
        (Proof(True, "10de:2331", "10de:2330"), Result.FAILED, "it says that it is 10de:2331, and was 10de:2330"),
        (Proof(True, "a:b", "a:b", "address of its MSI (5a)", True), Result.FAILED, "it still has what was set before"),
        (Proof(True, "a:b", "a:b", "address of its MSI (5a)", False), Result.PASSED, "is not set any more"),
        (Proof(True, "a:b", "a:b"), Result.PASSED, "no register of it shows that it was reset"),
    ],
)
def test_what_a_reset_is_proved_by(proof: Proof, result: Result, said: str) -> None:
    found, evidence, checks = proof_step(proof)
    assert found is result and said in evidence
    assert [c.result for c in checks] == (
        [] if result is Result.FAILED else [Result.UNKNOWN if proof.kept is None else found]
    )


def test_one_that_is_hung_in_its_driver_is_looked_for_again() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await rig_of(loop)
        rig.host.faults.hung.add("cards")
        await rig.want(with_gpus(1, GPU))
        await asyncio.sleep(120)
        assert not rig.active()
        rig.host.faults.hung.clear()
        await rig.settle()
        await rig.kill()

    run_virtual(partial(story))
