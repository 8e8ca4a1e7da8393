"""The plan of a host, as tables: what is wanted, seen and remembered on the left, what is done and said on the right."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from casemate_agent import actions as act
from casemate_agent.drivers.ports import DomainFacts, DomainPhase, MachineFacts, NetworkFacts, StoredFiles
from casemate_agent.hardware.functions import FunctionFacts
from casemate_agent.ledger.records import (
    Book,
    Failure,
    GuestView,
    HostRecord,
    InstanceRecord,
    Observation,
    Started,
    pods_revision,
    to_metadata,
)
from casemate_agent.plan.converge import ActionOutcome, InstancePlan, Settings, remember
from casemate_agent.plan.reconcile import plan
from casemate_core.claims import Claim, HostClaims, PlainMemory, SharedCpu
from casemate_core.fit import CpuPolicy, CpuRequest, Fit, MemoryRequest, Request, ThreadPolicy, fit
from casemate_core.spec.instance import Phase, Placement, PodState, Run, Virtualisation
from casemate_core.topology_loaders import from_line
from support.agents import IMAGE, NETWORK, instance, pod, uid

NOW_S = 1_800_000_000.0
SETTINGS = Settings(stop_grace_s=10.0, stop_ask_again_s=4.0)
MACHINE = MachineFacts("box", "boot-1", "6.1", from_line("1s 8k/c 2t 64G disk=1T"))
ME = uid(1)
WANTED = instance(1)
HELD = InstanceRecord(WANTED, claim=WANTED.placement.claim, claim_epoch=1, claim_generation=1)
RUNNING = replace(HELD, started=Started("boot-1", NOW_S - 1000), starts=1, phase="Ready", phase_since_s=NOW_S - 900)
GUEST = GuestView(True, "guest-1", "done", (PodState("hello", "Running", ready=True),), pods_revision(WANTED))

MAKING = ["FetchImage", "EnsureNetwork", "CreateOverlay", "WriteSeed", "Guard", "Define", "Start"]
ENDING = ["Undefine", "Unguard", "RemoveFiles", "ForgetClaim"]


def domain(phase: DomainPhase = DomainPhase.RUNNING, **changes: Any) -> DomainFacts:
    facts = DomainFacts(
        ME, "env-1-0", phase, owned=True, pid=77, channel_path="/run/x.sock", record=to_metadata(WANTED), vcpus=1
    )
    return replace(facts, **changes)


def seen(*domains: DomainFacts, made: bool = True, **changes: Any) -> Observation:
    """A machine on which everything of the instance is made, but for its domain; or nothing is."""
    files = StoredFiles(
        images={IMAGE.file.digest: "/i"} if made else {},
        overlays={ME: "/o"} if made else {},
        seeds={ME: "/s"} if made else {},
        free_mib=500_000,
        total_mib=1_000_000,
    )
    observation = Observation(
        time_s=NOW_S,
        machine=MACHINE,
        domains={d.uuid: d for d in domains if d.owned},
        foreign=tuple(d for d in domains if not d.owned),
        files=files,
        networks=NetworkFacts({"default": "cmbr0"} if made else {}, {"cm1": ("", "")} if made else {}),
        guarded={ME: ("cm1",)} if made else {},
        functions=FunctionFacts(),
        virtualisation="kvm",
    )
    return replace(observation, **changes)


def book(*records: InstanceRecord, **host: Any) -> Book:
    known: dict[str, Any] = {"epoch": 1, "revision": 1, "networks": (NETWORK,), "complete": True} | host
    return Book(HostRecord(**known), {r.uid: r for r in records})


def decide(record: InstanceRecord, observation: Observation) -> InstancePlan:
    return plan(book(record), observation, SETTINGS).instances[ME]


def names(actions: tuple[act.Action, ...]) -> list[str]:
    return [act.name(action) for action in actions]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    record: InstanceRecord
    observed: Observation
    actions: list[str]
    phase: Phase
    reason: str = ""
    wakes_in_s: float | None = None
    more: Callable[[InstancePlan], bool] = field(default=lambda _: True)


OFF = DomainPhase.SHUT_OFF
STOP = replace(RUNNING, desired=replace(WANTED, run=Run.STOPPED))
GONE = replace(RUNNING, removed=True)
REFUSED = replace(
    WANTED,
    placement=Placement(Claim(ME, vcpus_online=1, vcpus_max=1, memory=(PlainMemory(0, 1, 0, 10**6),)), 1, 1),
)
FAILED = Failure("Start", 2, NOW_S - 0.1, "HypervisorFailed", "no")

TABLE = [
    # making
    Row("nothing is there", InstanceRecord(WANTED), seen(made=False), MAKING, Phase.PREPARING,
        more=lambda p: p.record.claim == WANTED.placement.claim),
    Row("all but the domain", HELD, seen(), ["WriteSeed", "Guard", "Define", "Start"], Phase.PREPARING),
    Row("defined, not started", HELD, seen(domain(OFF)), ["Start"], Phase.STARTING),
    Row("defined from an older record", replace(HELD, desired=replace(WANTED, generation=2, memory_mib=2048)),
        seen(domain(OFF)), ["WriteSeed", "Guard", "Define", "Start"], Phase.PREPARING),
    Row("the overlay is gone", HELD, seen(domain(OFF), files=StoredFiles({IMAGE.file.digest: "/i"}, {}, {ME: "/s"})),
        ["CreateOverlay", "Start"], Phase.PREPARING),
    Row("needs KVM, has none", replace(HELD, desired=replace(WANTED, virtualisation=Virtualisation.REQUIRE)),
        seen(virtualisation="tcg"), [], Phase.FAILED, "VirtualisationUnavailable"),
    Row("its network is not described", replace(HELD, desired=replace(WANTED, nics=(replace(WANTED.nics[0], network="x"),))),
        seen(), [], Phase.PREPARING, "NetworkUnknown"),
    Row("the store does not answer", HELD, seen(files=None, silent={"images": "hung"}), [], Phase.PREPARING, "Waiting"),
    Row("does not fit", InstanceRecord(REFUSED), seen(), [], Phase.FAILED, "PlacementRefused",
        more=lambda p: p.record.claim is None and p.record.refusal is not None and "1000000 of" in p.state.message),
    # running
    Row("runs, not yet attached", RUNNING, seen(domain()), ["AttachGuest"], Phase.RUNNING, "GuestSilent"),
    Row("boots", replace(RUNNING, phase="Starting"), seen(domain(), attached=frozenset({ME})), [], Phase.STARTING,
        "GuestBooting", 2.0, more=lambda p: not p.state.kernel),
    Row("boots, its kernel seen", replace(RUNNING, phase="Starting"),
        seen(domain(), attached=frozenset({ME}), kernels=frozenset({77})), [], Phase.STARTING, "GuestBooting",
        more=lambda p: p.state.kernel),
    Row("guest works on no pods yet", RUNNING,
        seen(domain(), attached=frozenset({ME}), guests={ME: GuestView(True, "guest-1")}), ["ApplyPods"], Phase.RUNNING,
        "ApplyingPods"),
    Row("ready", RUNNING, seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}), [], Phase.READY,
        more=lambda p: p.record == p.base and p.state.since_s == NOW_S - 900),
    Row("a pod is not ready", RUNNING,
        seen(domain(), attached=frozenset({ME}), guests={ME: replace(GUEST, pods=(PodState("hello", "Pending"),))}), [],
        Phase.RUNNING, "PodsNotReady"),
    Row("other pods are wanted: live", replace(RUNNING, desired=replace(WANTED, generation=2, pods=(pod("new"),))),
        seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}), ["ApplyPods"], Phase.RUNNING, "ApplyingPods"),
    Row("more memory is wanted: at the next start", replace(RUNNING, desired=replace(WANTED, generation=2, memory_mib=9)),
        seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}), [], Phase.READY, "RestartPending"),
    Row("its guard is gone", RUNNING, seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}, guarded={}), ["Guard"],
        Phase.READY, more=lambda p: p.drift[0].startswith("GuardMissing")),
    Row("its tap is off its bridge", RUNNING, seen(domain(), attached=frozenset({ME}), guests={ME: GUEST},
        networks=NetworkFacts({"default": "cmbr0"}, {"cm1": ("", "")}, ("cm1",), {"cm1": ""})), ["Plug"],
        Phase.READY, more=lambda p: p.drift[0].startswith("TapMoved: cm1 is on no bridge, should be on cmbr0")),
    Row("its bridge is gone", RUNNING,
        seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}, networks=NetworkFacts({}, {})), ["EnsureNetwork"],
        Phase.READY, more=lambda p: p.drift[0].startswith("NetworkMissing")),
    Row("paused by the hypervisor", RUNNING, seen(domain(DomainPhase.PAUSED), attached=frozenset({ME})), [], Phase.FAILED,
        "Paused"),
    Row("the guest powers off by itself", RUNNING, seen(domain(DomainPhase.SHUTTING_DOWN), attached=frozenset({ME})), [],
        Phase.STOPPING, "GuestPowersOff"),
    Row("the hypervisor does not answer", RUNNING, seen(domains=None, silent={"hypervisor": "hung"}), [], Phase.UNKNOWN,
        "HypervisorUnreachable"),
    # ended by itself
    Row("ended by itself, the first time", RUNNING, seen(domain(OFF)), [], Phase.STARTING, "BackOff", 1.0,
        more=lambda p: p.record.exits == 1 and p.notes[0].reason == "Exited"),
    Row("back-off over", replace(HELD, exits=1, exited_s=NOW_S - 2), seen(domain(OFF)), ["Start"], Phase.STARTING),
    Row("ended by itself again and again", replace(HELD, exits=4, exited_s=NOW_S), seen(domain(OFF)), [], Phase.FAILED,
        "BackOff", 8.0),
    Row("crashed", replace(HELD, exits=1, exited_s=NOW_S - 2), seen(domain(DomainPhase.CRASHED)), ["Destroy", "Start"],
        Phase.PREPARING),
    Row("vanished", RUNNING, seen(), [], Phase.STARTING, "BackOff", 1.0, more=lambda p: "vanished" in p.notes[0].message),
    Row("the host was rebooted", replace(RUNNING, started=Started("boot-0", NOW_S - 9), exits=5, exited_s=NOW_S),
        seen(domain(OFF)), ["Start"], Phase.STARTING, more=lambda p: p.record.exits == 0),
    # stopping
    Row("asked to stop", STOP, seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}), ["Shutdown"],
        Phase.STOPPING, "", 4.0, more=lambda p: p.record.stop_since_s == NOW_S and p.actions[0].helper),  # type: ignore[union-attr]
    Row("asked to stop by an agent that has just begun", STOP, seen(domain()), ["AttachGuest", "Shutdown"],
        Phase.STOPPING, "", 4.0, more=lambda p: not p.actions[1].helper),  # type: ignore[union-attr]
    Row("asked, waiting", replace(STOP, stop_since_s=NOW_S - 2, stop_asked_s=NOW_S - 2),
        seen(domain(), attached=frozenset({ME})), [],
        Phase.STOPPING, "", 4.0),
    Row("asked again", replace(STOP, stop_since_s=NOW_S - 5, stop_asked_s=NOW_S - 5),
        seen(domain(), attached=frozenset({ME})), ["Shutdown"],
        Phase.STOPPING, "", 4.0),
    Row("asked again as soon as its helper can hear it", replace(STOP, stop_since_s=NOW_S - 2, stop_asked_s=NOW_S - 2),
        seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}), ["Shutdown"],
        Phase.STOPPING, "", 4.0, more=lambda p: p.actions[0].helper),  # type: ignore[union-attr]
    Row("its helper was asked, waiting", replace(STOP, stop_since_s=NOW_S - 2, stop_asked_s=NOW_S - 2, stop_heard=True),
        seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}), [],
        Phase.STOPPING, "", 4.0),
    Row("grace is over", replace(STOP, stop_since_s=NOW_S - 10, stop_asked_s=NOW_S - 1), seen(domain()), ["Destroy"],
        Phase.STOPPING),
    Row("paused cannot power off", STOP, seen(domain(DomainPhase.PAUSED)), ["Destroy"], Phase.STOPPING),
    Row("stopped", STOP, seen(domain(OFF)), [], Phase.STOPPED,
        more=lambda p: p.record.started is None and p.record.exits == 0),
    Row("stopped, still attached", STOP, seen(domain(OFF), attached=frozenset({ME})), ["DetachGuest"], Phase.STOPPING),
    Row("stopped and wanted again while it powers off",
        replace(RUNNING, stop_since_s=NOW_S - 3, stop_asked_s=NOW_S - 3),
        seen(domain(DomainPhase.SHUTTING_DOWN), attached=frozenset({ME})), [], Phase.STOPPING, "GuestPowersOff"),
    # ending
    Row("removed, running", GONE, seen(domain(), attached=frozenset({ME})), ["Shutdown"], Phase.DELETING, "", 4.0),
    Row("removed, grace over", replace(GONE, stop_since_s=NOW_S - 10), seen(domain(), attached=frozenset({ME})),
        ["Destroy", "DetachGuest", *ENDING], Phase.DELETING),
    Row("removed, off", GONE, seen(domain(OFF)), ENDING, Phase.DELETING),
    Row("removed, nothing left", GONE, seen(made=False), ["ForgetClaim"], Phase.DELETING),
    Row("removed, network does not answer", GONE, seen(networks=None, silent={"networks": "hung"}), [], Phase.DELETING,
        "Waiting"),
    # failures
    Row("failed just now", replace(HELD, failure=FAILED), seen(domain(OFF)), [], Phase.STARTING, "HypervisorFailed", 2.0),
    Row("failed a while ago", replace(HELD, failure=replace(FAILED, at_s=NOW_S - 5)), seen(domain(OFF)), ["Start"],
        Phase.STARTING, "HypervisorFailed"),
    Row("failed for good", replace(HELD, failure=replace(FAILED, permanent=True, generation=1)), seen(domain(OFF)), [],
        Phase.FAILED, "HypervisorFailed", 150.0),
    Row("failed for good, then changed",
        replace(HELD, failure=replace(FAILED, permanent=True), desired=replace(WANTED, generation=1)),
        seen(domain(OFF)), ["Start"], Phase.STARTING),
    Row("what comes before the failed action is done", replace(HELD, failure=replace(FAILED, count=3)), seen(),
        ["WriteSeed", "Guard", "Define"], Phase.FAILED, "HypervisorFailed", 4.0),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_table(row: Row) -> None:
    decided = decide(row.record, row.observed)
    assert names(decided.actions) == row.actions
    assert (decided.state.phase, decided.state.reason) == (row.phase, row.reason)
    assert row.more(decided)
    if row.wakes_in_s is None:
        assert decided.wake_s == float("inf")
    else:
        # back-off spreads by a half; other times are exact
        assert NOW_S + row.wakes_in_s / 2 <= decided.wake_s + 0.2
        assert decided.wake_s <= NOW_S + row.wakes_in_s + 0.001
    if decided.actions:
        assert decided.record.intent is not None
        assert list(decided.record.intent.actions) == row.actions
    assert all(action.reason for action in decided.actions)


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_planned_again_from_what_it_wrote_it_says_the_same(row: Row) -> None:
    first = decide(row.record, row.observed)
    second = decide(first.record, row.observed)
    assert second.actions == first.actions
    assert second.state == first.state
    assert second.record == first.record
    assert second.notes == () or second.notes == first.notes


def test_two_placements_that_collide_the_newer_is_refused() -> None:
    def wants(number: int, generation: int) -> InstanceRecord:
        claim = Claim(uid(number), vcpus=(4,), vcpus_online=1, vcpus_max=1, memory=(PlainMemory(0, 64, 0, 64),))
        return InstanceRecord(instance(number, placement=Placement(claim, 1, generation)))

    decided = plan(book(wants(1, 7), wants(2, 3)), seen(made=False), SETTINGS)
    assert decided.instances[uid(2)].state.phase is Phase.PREPARING
    refused = decided.instances[uid(1)]
    assert refused.state.reason == "PlacementRefused"
    assert "4" in refused.state.message
    assert refused.notes[0].reason == "PlacementRefused"
    assert any(entry.startswith("PlacementRefused") for entry in decided.report.drift)


def test_one_wrong_core_of_a_placement_is_refused() -> None:
    """What fit made is taken; with any one core of it exchanged for one that is not its own to take, it is refused."""
    machine = MACHINE.topology
    dedicated = CpuRequest(2, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.ISOLATE)
    request = Request(dedicated, MemoryRequest(64))
    beside = fit(machine, HostClaims.empty(), request, owner=uid(2))
    assert isinstance(beside, Fit)
    mine = fit(machine, HostClaims.of([beside.claim]), request, owner=uid(1))
    assert isinstance(mine, Fit)

    def answer(claim: Claim) -> InstancePlan:
        wanted = (beside.claim, claim)
        records = (
            InstanceRecord(instance(n, placement=Placement(c, 1, n))) for n, c in zip((2, 3), wanted, strict=True)
        )
        held, new = (replace(r, desired=replace(r.desired, uid=c.owner)) for r, c in zip(records, wanted, strict=True))
        return plan(book(held, new), seen(made=False), SETTINGS).instances[claim.owner]

    assert answer(mine.claim).state.phase is Phase.PREPARING
    for position in range(2):
        for thread in range(18):
            if thread in mine.claim.vcpus:
                continue
            vcpus = (*mine.claim.vcpus[:position], thread, *mine.claim.vcpus[position + 1 :])
            wrong = answer(replace(mine.claim, vcpus=vcpus))
            assert wrong.state.reason == "PlacementRefused", thread
            assert wrong.record.claim is None


def test_a_stopped_instance_lets_go_of_what_it_was_placed_on_before() -> None:
    """It was made smaller while it was off, and what it held was given to another that is told with it."""

    def claim(number: int, *threads: int) -> Claim:
        return Claim(uid(number), vcpus=threads, vcpus_online=len(threads), vcpus_max=len(threads))

    smaller = Placement(claim(2, 4), 1, 2)
    off = InstanceRecord(
        instance(2, placement=smaller, run=Run.STOPPED), claim=claim(2, 4, 5), claim_epoch=1, claim_generation=1
    )
    other = InstanceRecord(instance(3, placement=Placement(claim(3, 5), 1, 1)))
    decided = plan(book(off, other), seen(made=False), SETTINGS)
    assert decided.report.drift == ()
    assert decided.instances[uid(2)].record.claim == smaller.claim
    assert decided.instances[uid(2)].state.phase is Phase.STOPPED
    assert decided.instances[uid(3)].record.claim == claim(3, 5)
    # One that never ran needs no claim before it starts.
    fresh = InstanceRecord(instance(2, placement=smaller, run=Run.STOPPED))
    assert plan(book(fresh), seen(made=False), SETTINGS).instances[uid(2)].record.claim is None


def test_foreign_vms_count_as_used_and_are_never_touched() -> None:
    stranger = DomainFacts("f-1", "stranger", DomainPhase.RUNNING, owned=False, vcpus=4, memory_mib=70_000)
    decided = plan(book(InstanceRecord(WANTED)), seen(stranger, made=False), SETTINGS)
    assert decided.report.foreign == 1
    assert decided.report.foreign_claims[0].owner == "foreign:f-1"
    assert decided.report.foreign_claims[0].memory_mib == 70_000
    assert decided.instances[ME].state.reason == "PlacementRefused"
    pinned = replace(stranger, vcpus=2, memory_mib=512, vcpu_pins=(frozenset({2}), frozenset({3})))
    claim = plan(book(), seen(pinned), SETTINGS).report.foreign_claims[0]
    assert claim.vcpus == (2, 3)
    assert claim.shared == ()
    off = plan(book(), seen(replace(stranger, phase=DomainPhase.SHUT_OFF)), SETTINGS).report
    assert (off.foreign, off.foreign_claims) == (1, ()), "a VM that is off uses nothing"


def test_our_domains_without_a_record_are_adopted_as_they_run() -> None:
    decided = plan(Book(), seen(domain()), SETTINGS)
    (record,) = decided.adopt
    assert record.uid == ME
    assert record.claim == WANTED.placement.claim
    assert record.desired == WANTED
    assert not decided.cleaning
    assert not decided.host
    # one that is off may have been stopped since it was defined: it stays off until the manager says
    (record,) = plan(Book(), seen(domain(OFF)), SETTINGS).adopt
    assert record.desired.run is Run.STOPPED


def test_an_adopted_instance_keeps_the_pods_that_its_guest_has() -> None:
    (record,) = plan(Book(), seen(domain(record=to_metadata(replace(WANTED, pods=())))), SETTINGS).adopt
    decided = decide(record, seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}))
    assert decided.actions == ()
    assert decided.state.phase is Phase.READY


@pytest.mark.parametrize("text", ["", "{}", "nonsense", to_metadata(instance(2))])
def test_our_domain_with_an_unreadable_record_is_drift_and_left_alone(text: str) -> None:
    decided = plan(book(), seen(domain(record=text)), SETTINGS)
    assert decided.adopt == ()
    assert decided.instances == {}
    assert decided.report.drift[0].startswith("UnknownDomain")
    assert ME not in decided.cleaning


def test_leftovers_are_cleaned_only_while_the_ledger_is_complete() -> None:
    decided = plan(book(), seen(), SETTINGS)
    assert names(decided.cleaning[ME]) == ["Unguard", "RemoveFiles"]
    assert plan(book(complete=False), seen(), SETTINGS).cleaning == {}
    assert plan(book(), seen(domains=None), SETTINGS).cleaning == {}
    assert plan(book(), seen(busy=frozenset({ME})), SETTINGS).cleaning == {}


def test_housekeeping_waits_until_nothing_else_is_to_be_done() -> None:
    low = StoredFiles({"sha256:old": "/x", IMAGE.file.digest: "/i"}, {ME: "/o"}, {ME: "/s"}, ("p",), 1, 1000)
    bridges = NetworkFacts({"default": "b", "old": "c"}, {})
    ready = seen(domain(), attached=frozenset({ME}), guests={ME: GUEST}, files=low, networks=bridges)
    decided = plan(book(RUNNING), ready, SETTINGS)
    assert names(decided.host) == ["RemoveStrays", "RemoveImage", "RemoveNetwork"]
    assert decided.host[1] == act.RemoveImage("sha256:old", "unused, and the disk is filling up")
    assert decided.host[2] == act.RemoveNetwork("old", "no longer a network of this host")
    assert plan(book(RUNNING), replace(ready, busy=frozenset({uid(9)})), SETTINGS).host == ()
    assert plan(book(HELD), replace(ready, domains={}), SETTINGS).host == ()
    assert plan(book(RUNNING, complete=False), ready, SETTINGS).host == ()


def test_a_busy_instance_is_not_planned_for() -> None:
    assert plan(book(HELD), seen(busy=frozenset({ME})), SETTINGS).instances == {}


def test_broken_invariants_between_ledger_and_machine_are_named() -> None:
    other = InstanceRecord(instance(2), claim=Claim(uid(2), vcpus=(1,), vcpus_online=1, vcpus_max=1))
    third = InstanceRecord(instance(3), claim=Claim(uid(3), vcpus=(1,), vcpus_online=1, vcpus_max=1), claim_epoch=9)
    changed = replace(RUNNING, claim=replace(WANTED.placement.claim, shared=(SharedCpu(0, 5),)))
    drift = plan(book(changed, other, third), seen(domain()), SETTINGS).report.drift
    assert [entry[:2] for entry in drift] == ["A1", "A2", "A3"]


def test_what_is_remembered_of_outcomes() -> None:
    def after(record: InstanceRecord, action: act.Action, reason: str = "", **more: Any) -> InstanceRecord:
        return remember(record, (ActionOutcome(ME, action, NOW_S, reason=reason, message="m", **more),), "boot-1")

    start = act.Start(ME, "r")
    failed = after(HELD, start, "MachineFailed")
    assert failed.failure == Failure("Start", 1, NOW_S, "MachineFailed", "m", False, 1)
    assert after(failed, start, "MachineFailed").failure.count == 2  # type: ignore[union-attr]
    assert after(failed, act.Define(WANTED, "r"), "MachineFailed").failure.count == 1  # type: ignore[union-attr]
    assert after(failed, start, "x", interrupted=True).failure == failed.failure
    started = after(failed, start)
    assert started.failure is None
    assert started.started == Started("boot-1", NOW_S)
    assert started.starts == 1
    assert after(STOP, act.Shutdown(ME, False, "r")).stop_asked_s == NOW_S
    assert [after(STOP, act.Shutdown(ME, helper, "r")).stop_heard for helper in (False, True)] == [False, True]
    # one that was seen running already is not counted twice
    assert decide(started, seen(domain())).record.starts == 1
