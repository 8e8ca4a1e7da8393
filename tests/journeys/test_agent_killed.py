"""An agent that is SIGKILLed at each step of making and of ending a VM, on real QEMU, and started again.

After each death there is exactly one VM or none, nothing is left of a VM that is gone, and one that ran all along keeps its
QEMU. Nothing boots: the steps are the same for a guest that does.
"""

import signal
from dataclasses import replace
from itertools import zip_longest

import pytest

import support.mortal_agent
from support.realfleet import RealFleet, catches, empty_environment

pytestmark = pytest.mark.libvirt

ONCE = ("during-action FetchImage", "during-action EnsureNetwork")
"""What is made once for a host; the bystander's own creation passes them."""
MAKING = (
    "before-intent",
    "after-intent",
    "during-action CreateOverlay",
    "after-action CreateOverlay",
    "after-action WriteSeed",
    "after-action Guard",
    "during-action Define",
    "after-action Define",
    "during-action Start",
    "after-action Start",
    "before-outcome",
    "after-outcome",
    "after-action AttachGuest",
)
ENDING = (
    "before-intent",
    "after-intent",
    "after-action Shutdown",
    "during-action Destroy",
    "after-action Destroy",
    "after-action DetachGuest",
    "during-action Undefine",
    "after-action Undefine",
    "after-action Unguard",
    "during-action RemoveFiles",
    "after-action RemoveFiles",
    "after-action ForgetClaim",
    "after-outcome 2",
)


class Story:
    """A fleet with a VM that must not notice anything, and one that comes and goes while its agent dies."""

    def __init__(self, fleet: RealFleet) -> None:
        self.fleet = fleet
        self.usual = fleet.agent
        self.spared = ""
        self.since = 0
        self.calm: dict[str, int] = {}

    def revive(self, step: str, armed: bool = False) -> None:
        """Start an agent that will die at ``step`` once it is armed; the usual one where that is empty."""
        fleet = self.fleet
        self.since = fleet.agent.log.stat().st_size
        if not step:
            fleet.agent = self.usual
        else:
            # the flags of the usual one, after the interpreter and "-m casemate_agent"
            argv = [self.usual.argv[0], str(support.mortal_agent.__file__), *self.usual.argv[3:]]
            mark = {"CASEMATE_TEST_DIE_AT": step, "CASEMATE_TEST_SPARED": self.spared}
            mark |= {"CASEMATE_TEST_ARMED": "1"} if armed else {}
            fleet.agent = replace(self.usual, argv=argv, environ=self.usual.environ | mark, process=None)
        fleet.agent.start()

    def arm(self) -> None:
        process = self.fleet.agent.process
        assert process is not None
        self.fleet.until("the agent hears", lambda: catches(process.pid, signal.SIGUSR1), 60, every_s=0.02)
        process.send_signal(signal.SIGUSR1)

    def until_dead(self, step: str) -> None:
        fleet = self.fleet
        fleet.until(f"the agent dies at: {step}", lambda: not fleet.agent.alive, 90, every_s=0.05)
        assert fleet.agent.end() == -signal.SIGKILL, f"{step}: it ended otherwise\n{fleet.tails()}"

    def until_said(self, text: str, step: str) -> None:
        """Wait until the agent that was started last has logged this."""
        log = self.fleet.agent.log
        self.fleet.until(f"{step}: {text}", lambda: text.encode() in log.read_bytes()[self.since :], 90, every_s=0.1)

    def victim(self, step: str) -> dict[str, int]:
        """The victim's QEMU, by its uid; one or none."""
        running = self.fleet.qemus()
        assert self.calm.items() <= running.items(), f"{step}: the other VM was touched\n{self.fleet.tails()}"
        others = {uid: pid for uid, pid in running.items() if uid not in self.calm}
        assert len(others) <= 1, f"{step}: {others}\n{self.fleet.tails()}"
        return others

    def until_settled(self, step: str) -> str:
        """Wait until the victim runs and its helper's channel is held; its uid."""
        fleet = self.fleet
        fleet.until(f"{step}: its QEMU runs", lambda: self.victim(step), 90, every_s=0.1)
        ((uid, pid),) = self.victim(step).items()
        self.until_said(f"AttachGuest {uid} done", step)
        assert fleet.domains() == {uid, *self.calm}, step
        assert self.victim(step) == {uid: pid}, f"{step}: started twice"
        return uid


@pytest.mark.timeout(1800)
def test_killed_at_each_step_there_is_one_vm_or_none(real_fleet: RealFleet) -> None:
    fleet, story = real_fleet, Story(real_fleet)
    fleet.agent.end()
    fleet.apply(empty_environment("calm"))
    for step in ONCE:
        story.revive(step, armed=True)
        story.until_dead(step)
    story.revive(MAKING[0])
    story.spared = story.until_settled("the bystander")
    story.calm = fleet.qemus()
    fleet.agent.end()
    story.revive(MAKING[0])
    story.until_said("session open", "the first of all")
    for making, ending in zip_longest(MAKING, ENDING, fillvalue=""):
        if making:
            story.arm()
        fleet.apply(empty_environment("victim"))
        died = f"making, {making or 'undisturbed'}"
        if making:
            story.until_dead(making)
            pid = story.victim(died)
            story.revive(ending)
        uid = story.until_settled(died)
        assert pid in ({}, story.victim(died)), f"{died}: a VM that ran was started anew"
        if ending:
            story.arm()
        fleet.run("delete", "env", "victim", "--no-wait").ok()
        died = f"ending, {ending or 'undisturbed'}"
        if ending:
            story.until_dead(ending)
            story.victim(died)
            follower = MAKING.index(making) + 1 if making else len(MAKING)
            story.revive(MAKING[follower] if follower < len(MAKING) else "")
        fleet.until_gone("victim")
        assert fleet.traces_of(uid) == [], f"{died}\n{fleet.tails()}"
        assert story.victim(died) == {}
    network = fleet.get("network", "default")
    assert network["status"]["addressesUsed"] == 1, "addresses of VMs that are gone are not given back"
    assert fleet.get("instance", "calm-0")["status"]["starts"] == 1
