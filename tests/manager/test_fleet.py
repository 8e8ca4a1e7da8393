"""The fleet's state machine: what each command does, and that no order of commands breaks an invariant."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from casemate_core.errors import Conflict, InvalidSpec, NotFound
from casemate_core.spec.environment import Environment, NicSpec, UpdateStrategy
from casemate_core.spec.fleet import Host, HostSpec, Taint
from casemate_core.spec.instance import Phase, Run
from casemate_core.spec.meta import Meta
from casemate_core.spec.operation import OrderPhase, OrderState, Verb
from casemate_core.spec.views import Condition
from casemate_manager import views
from casemate_manager.fleet import desired
from casemate_manager.fleet.commands import (
    Advance,
    ApplyAnswer,
    ApplyResources,
    Due,
    EndSession,
    Expire,
    HostFacts,
    HostGone,
    HostInventory,
    HostNote,
    OperateInstances,
    Turned,
    Welcomed,
)
from casemate_manager.fleet.machine import REQUEST_KEPT_S, apply, is_crowded
from casemate_manager.fleet.requests import KeyReused
from casemate_wire.stream import Facts, HostEvent, HostReport, Inventory, Outcome
from support.small_fleet import SMALL, SmallFleet, environment, image, network, told, topology


@pytest.fixture
def fleet() -> SmallFleet:
    fleet = SmallFleet()
    fleet.apply(image(), network())
    return fleet


def reasons(fleet: SmallFleet) -> list[str]:
    return [e.reason for e in fleet.state.events.values()]


def only(fleet: SmallFleet, name: str = "hello") -> str:
    return fleet.state.instance_names[f"default/{name}-0"]


def test_apply_makes_instances_with_addresses_and_places_them(fleet: SmallFleet) -> None:
    fleet.join("h1")
    answer = fleet.apply(environment(replicas=2))
    assert [r.action for r in answer.results] == ["created"]
    instances = list(fleet.state.instances.values())
    assert [i.meta.name for i in instances] == ["hello-0", "hello-1"]
    assert {i.nics[0].address for i in instances} == {"10.99.0.2", "10.99.0.3"}
    keep, end = desired.whole(fleet.state, "h1")
    assert len(keep) == 2 and not end
    one = keep[0]
    assert (one.placement.epoch, one.placement.generation, one.placement.claim.owner) == (1, 1, one.uid)
    assert one.peers[0].name in ("hello-0", "hello-1") and one.peers[0].name != one.name


def test_the_same_key_has_one_effect_and_one_answer(fleet: SmallFleet) -> None:
    first = fleet.apply(environment(), key="k")
    revision = fleet.state.revision
    assert fleet.apply(environment(), key="k", settle=False) == first
    assert fleet.state.revision == revision
    with pytest.raises(KeyReused):
        fleet.apply(environment("other"), key="k")


def test_a_request_is_forgotten_after_a_day(fleet: SmallFleet) -> None:
    fleet.apply(environment(), key="k")
    fleet.now_s += 86_000
    fleet.do(Expire())
    assert "k" in fleet.state.requests
    fleet.now_s += 500
    fleet.do(Expire())
    assert "k" not in fleet.state.requests


def test_a_dry_run_answers_and_changes_nothing(fleet: SmallFleet) -> None:
    revision = fleet.state.revision
    answer = fleet.do(ApplyResources("", (environment(),), "s", dry_run=True))
    assert isinstance(answer, ApplyAnswer) and answer.revision == 0
    assert answer.results[0].action == "created" and answer.results[0].object is not None
    assert fleet.state.revision == revision


def test_the_same_object_again_is_unchanged(fleet: SmallFleet) -> None:
    fleet.apply(environment())
    assert fleet.apply(environment()).results[0].action == "unchanged"
    assert fleet.state.environments["default/hello"].environment.meta.generation == 1


def test_optimistic_concurrency(fleet: SmallFleet) -> None:
    fleet.apply(environment())
    version = fleet.state.environments["default/hello"].environment.meta.resource_version
    wanted = environment(replicas=2)
    with pytest.raises(Conflict, match="version"):
        fleet.apply(replace(wanted, meta=replace(wanted.meta, resource_version=version + 1)))
    fleet.apply(replace(wanted, meta=replace(wanted.meta, resource_version=version)))
    assert len(fleet.state.instances) == 2


@pytest.mark.parametrize(
    ("env", "path"),
    [
        (replace(environment(), spec=replace(environment().spec, image="nope")), "spec.image"),
        (environment(archives=("debian",)), "spec.archives[0]"),
        (environment(nics=(NicSpec("nope"),)), "spec.nics[0].network"),
        (environment("x" * 63), "metadata.name"),
    ],
)
def test_references_are_checked_with_their_path(fleet: SmallFleet, env: Environment, path: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        fleet.apply(env)
    assert [v.path for v in error.value.violations] == [path]
    assert error.value.violations[0].remedy
    assert not fleet.state.environments


def test_networks_do_not_overlap(fleet: SmallFleet) -> None:
    with pytest.raises(InvalidSpec, match="overlaps"):
        fleet.apply(network("other", "10.99.0.128/25"))


def test_all_or_nothing(fleet: SmallFleet) -> None:
    with pytest.raises(InvalidSpec):
        fleet.apply(environment("good"), environment("bad", nics=(NicSpec("nope"),)))
    assert not fleet.state.environments


def test_gang_is_immutable(fleet: SmallFleet) -> None:
    fleet.apply(environment())
    with pytest.raises(InvalidSpec, match="cannot be changed"):
        fleet.apply(environment(gang=True))


def test_addresses_run_out_and_are_returned(fleet: SmallFleet) -> None:
    fleet.apply(network("tiny", "10.1.0.0/29"))
    fleet.apply(environment(nics=(NicSpec("tiny"),), replicas=7))
    assert len(fleet.state.instances) == 5  # 8 less network, broadcast and gateway
    assert "AddressesExhausted" in reasons(fleet)
    fleet.delete("Environment", "hello")
    assert fleet.state.addresses["tiny"] == {}
    fleet.apply(environment("again", nics=(NicSpec("tiny"),), replicas=5))
    assert len(fleet.state.instances) == 5


def test_delete_waits_for_the_host_to_let_go(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment())
    uid = only(fleet)
    answer = fleet.delete("Environment", "hello")
    assert answer.pending
    assert desired.whole(fleet.state, "h1") == ((), (uid,))
    fleet.do(HostGone("h1", 1, ""))
    fleet.settle()
    assert fleet.state.environments and fleet.state.addresses["default"]
    fleet.join("h1", 2)
    fleet.tell("h1", 2, gone=(uid,))
    assert not fleet.state.environments and not fleet.state.addresses["default"] and not fleet.state.placements


def test_delete_with_the_wrong_uid_or_of_nothing(fleet: SmallFleet) -> None:
    fleet.apply(environment())
    with pytest.raises(Conflict):
        fleet.delete("Environment", "hello", uid="other")
    with pytest.raises(NotFound):
        fleet.delete("Environment", "nope")
    with pytest.raises(InvalidSpec):
        fleet.delete("Instance", "hello-0")


def test_what_is_used_is_not_deleted(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment())
    for kind, name in (("Image", "debian"), ("Network", "default"), ("Host", "h1")):
        with pytest.raises(Conflict):
            fleet.delete(kind, name)
    fleet.delete("Environment", "hello")
    fleet.obey("h1")
    fleet.delete("Image", "debian")
    fleet.delete("Network", "default")
    with pytest.raises(Conflict, match="connected"):
        fleet.delete("Host", "h1")
    fleet.do(HostGone("h1", 1, ""))
    fleet.delete("Host", "h1")
    assert not fleet.state.hosts and not fleet.state.inventories


def test_a_gone_that_nobody_asked_for_changes_no_record(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment())
    revision = fleet.state.revision
    fleet.tell("h1", 1, gone=(only(fleet),))
    assert fleet.state.revision == revision and fleet.state.placements


def test_an_unknown_hosts_instances_are_not_replaced_elsewhere(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment())
    fleet.join("h2")
    fleet.do(HostGone("h1", 1, "cut"))
    fleet.settle()
    assert [p.host for p in fleet.state.placements.values()] == ["h1"]


def test_nothing_fits_is_told_once_and_tried_again_when_a_host_joins(fleet: SmallFleet) -> None:
    fleet.apply(environment())
    fleet.settle()
    assert reasons(fleet).count("Unschedulable") == 1
    fleet.join("h1")
    assert [p.host for p in fleet.state.placements.values()] == ["h1"]
    assert only(fleet) not in fleet.observed.attempts


@pytest.mark.parametrize("how", ["cordoned", "tainted", "unlabelled"])
def test_closed_hosts_get_nothing(fleet: SmallFleet, how: str) -> None:
    fleet.join("h1")
    spec = HostSpec(cordoned=how == "cordoned", taints=(Taint("x"),) if how == "tainted" else ())
    fleet.apply(Host(Meta("h1"), spec))
    env = environment()
    if how == "unlabelled":
        rules = replace(env.spec.placement, node_selector={"site": "a"})
        env = replace(env, spec=replace(env.spec, placement=rules))
    fleet.apply(env)
    assert not fleet.state.placements
    fleet.apply(Host(Meta("h1", labels={"site": "a"}), HostSpec()))
    assert len(fleet.state.placements) == 1


def test_a_host_that_says_it_is_not_ready_gets_nothing_until_it_is(fleet: SmallFleet) -> None:
    fleet.join("h1")

    def say(status: str) -> None:
        report = HostReport(conditions=(Condition("Ready", status, "Upgrading"),))
        fleet.do(HostFacts("h1", 1, Facts(2, host=report)))
        fleet.settle()

    say("False")
    fleet.apply(environment())
    assert not fleet.state.placements
    assert "not ready" in fleet.observed.attempts[only(fleet)].message
    say("True")
    assert len(fleet.state.placements) == 1


def test_ready_is_among_the_conditions_of_every_host(fleet: SmallFleet) -> None:
    def ready() -> tuple[str, str]:
        status = views.host_status(fleet.state, fleet.observed, fleet.state.hosts["h1"])
        (found,) = [c for c in status.conditions if c.type == "Ready"]
        return found.status, found.reason

    fleet.apply(Host(Meta("h1"), HostSpec()))
    assert ready() == ("False", "NeverJoined")
    fleet.join("h1")
    fleet.do(HostFacts("h1", 1, Facts(2, host=HostReport(conditions=(Condition("Hypervisor", "True"),)))))
    assert ready() == ("Unknown", "NotTold"), "an agent before this one says nothing of it"
    fleet.apply(environment())
    assert len(fleet.state.placements) == 1, "only what says that it is not ready gets nothing"
    fleet.do(HostFacts("h1", 1, Facts(3, host=HostReport(conditions=(Condition("Ready", "True", "Fine"),)))))
    assert ready() == ("True", "Fine")
    fleet.do(HostGone("h1", 1, "cut"))
    assert ready() == ("Unknown", "NotHeard")


def test_what_waits_is_placed_by_priority_and_then_by_age(fleet: SmallFleet) -> None:
    for name, priority in (("low", -5), ("old", 0), ("young", 0), ("high", 7)):
        fleet.apply(environment(name, cpus=2, priority=priority))
    fleet.join("h1")  # 4 CPUs, so two of the four
    placed = {fleet.state.instances[p.instance_uid].environment for p in fleet.state.placements.values()}
    assert placed == {"high", "old"}
    fleet.join("h2")
    assert len(fleet.state.placements) == 4


def test_a_gang_is_placed_whole_or_not_at_all(fleet: SmallFleet) -> None:
    fleet.join("h1")  # 4 CPUs
    fleet.apply(environment(cpus=3, replicas=2, gang=True))
    assert not fleet.state.placements
    told = [e for e in fleet.state.events.values() if e.reason == "Unschedulable"]
    assert [(e.regarding.kind, e.regarding.name, e.count) for e in told] == [("Environment", "hello", 1)]
    fleet.join("h2")
    assert {p.host for p in fleet.state.placements.values()} == {"h1", "h2"}


WIDE = "1s 64k/c 1t 256G disk=10T"


def large_gang(fleet: SmallFleet, replicas: int = 60) -> None:
    """A gang of more members than a batch takes, its instances made and none of them placed yet."""
    fleet.apply(environment("crowd", replicas=replicas, gang=True))
    assert len(fleet.state.instances) == replicas and not fleet.state.placements


def test_a_gang_larger_than_a_batch_is_reserved_first_and_told_all_at_once(fleet: SmallFleet) -> None:
    large_gang(fleet)
    fleet.hello("h1", 1)
    fleet.do(HostInventory("h1", 1, Inventory("digest", topology(WIDE))))
    fleet.do(HostFacts("h1", 1, Facts(1, True, (), (), HostReport())))
    batches = 0
    while len(fleet.state.placements) < 60:
        fleet.do(Advance("seed"))
        batches += 1
        keep, end = desired.whole(fleet.state, "h1")
        assert end == ()
        assert len(keep) == (60 if len(fleet.state.placements) == 60 else 0), "all of them or none"
        assert batches < 20
    assert batches > 2
    assert fleet.woken["h1"] == set(fleet.state.instances), "with the last its host hears of all"
    assert len(desired.since(fleet.state, "h1", fleet.state.revision - 1)[0]) == 60
    fleet.settle()
    fleet.obey("h1")
    # It grows by more than a batch: those that run are not disturbed, the new ones wait for one another.
    fleet.apply(environment("crowd", replicas=61, gang=True))
    assert len(desired.whole(fleet.state, "h1")[0]) == 61


def test_what_is_reserved_for_a_gang_is_given_back_where_somebody_was_faster(fleet: SmallFleet) -> None:
    large_gang(fleet)
    fleet.hello("h1", 1)
    fleet.do(HostInventory("h1", 1, Inventory("digest", topology(WIDE))))
    fleet.do(HostFacts("h1", 1, Facts(1, True, (), (), HostReport())))
    fleet.do(Advance("seed"))
    assert 0 < len(fleet.state.placements) < 60
    # The host turns out to be smaller while the rest of the gang waits.
    fleet.do(HostInventory("h1", 1, Inventory("other", topology("1s 32k/c 1t 256G disk=10T"))))
    fleet.settle()
    assert not fleet.state.placements
    assert desired.whole(fleet.state, "h1") == ((), ())
    reasons = {e.reason for e in fleet.state.events.values()}
    assert {"GangGivenBack", "Unschedulable"} <= reasons
    fleet.join("h2", line=WIDE)
    assert len(fleet.state.placements) == 60 and len(desired.whole(fleet.state, "h2")[0]) > 0


def test_a_gang_that_is_deleted_while_it_is_reserved_leaves_nothing(fleet: SmallFleet) -> None:
    large_gang(fleet)
    fleet.hello("h1", 1)
    fleet.do(HostInventory("h1", 1, Inventory("digest", topology(WIDE))))
    fleet.do(HostFacts("h1", 1, Facts(1, True, (), (), HostReport())))
    fleet.do(Advance("seed"))
    reserved = {p.instance_uid for p in fleet.state.placements.values()}
    fleet.delete("Environment", "crowd")
    keep, end = desired.whole(fleet.state, "h1")
    assert keep == () and set(end) == reserved
    fleet.obey("h1")
    assert not fleet.state.placements and not fleet.state.instances and not fleet.state.environments


def test_gangs_of_a_manager_before_this_one_go_on(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment(replicas=2, gang=True))
    (record,) = fleet.state.environments.values()
    assert record.gang_told == 2
    old = replace(record, gang_told=-1, told_revision=0)
    assert all(old.is_told(i) for i in fleet.state.instances.values())


def test_scale_down_ends_the_highest_ordinals(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment(replicas=3))
    fleet.obey("h1")
    fleet.apply(environment(replicas=1))
    keep, end = desired.whole(fleet.state, "h1")
    assert [i.name for i in keep] == ["hello-0"] and len(end) == 2
    fleet.obey("h1")
    assert [i.meta.name for i in fleet.state.instances.values()] == ["hello-0"]


def test_live_fields_reach_the_host_at_once_and_others_wait(fleet: SmallFleet) -> None:
    fleet.join("h1", line="1s 8k/c 1t 16G disk=100G")
    fleet.apply(environment())
    fleet.obey("h1")
    answer = fleet.apply(environment(cpus=2, ssh_keys=("ssh-ed25519 AAAAAAAAAAAAAAAAAAAAAAAA",), run="started"))
    assert len(answer.results[0].warnings) == 2
    assert {c.effect for c in answer.results[0].changes} == {"restart", "replace"}
    ((one,), _) = desired.whole(fleet.state, "h1")
    assert (one.cpus, one.ssh_keys, one.generation) == (1, (), 2)
    # Stopped, and the host says so: what needed a restart is in force; what needs a new instance still waits.
    stopped = environment(cpus=2, ssh_keys=("ssh-ed25519 AAAAAAAAAAAAAAAAAAAAAAAA",), run="stopped")
    fleet.apply(stopped)
    ((one,), _) = desired.whole(fleet.state, "h1")
    assert (one.cpus, one.run) == (1, Run.STOPPED)
    fleet.tell("h1", 1, told(one.uid, Phase.STOPPED, one.generation))
    ((one,), _) = desired.whole(fleet.state, "h1")
    assert (one.cpus, one.ssh_keys, one.placement.generation) == (2, (), 2)
    assert one.placement.claim.vcpus_max == 2
    # New instances have all of it.
    fleet.apply(replace(stopped, spec=replace(stopped.spec, replicas=2)))
    assert fleet.state.spec_of(fleet.state.instances[fleet.state.instance_names["default/hello-1"]]).ssh_keys


def test_word_of_an_earlier_stop_does_not_change_what_may_run_again(fleet: SmallFleet) -> None:
    fleet.join("h1", line="1s 8k/c 1t 16G disk=100G")
    fleet.apply(environment(cpus=4, run="stopped"))
    ((one,), _) = desired.whole(fleet.state, "h1")
    fleet.tell("h1", 1, told(one.uid, Phase.STOPPED, one.generation))
    fleet.apply(environment(cpus=4, run="started"))  # and it starts, which is not heard of yet
    fleet.apply(environment(cpus=2, run="stopped"))
    ((one,), _) = desired.whole(fleet.state, "h1")
    assert one.cpus == 4 and one.placement.claim.vcpus_max == 4
    fleet.tell("h1", 1, told(one.uid, Phase.STOPPED, one.generation))
    ((one,), _) = desired.whole(fleet.state, "h1")
    assert one.cpus == 2 and one.placement.claim.vcpus_max == 2


def test_a_waiting_instance_takes_every_change(fleet: SmallFleet) -> None:
    fleet.apply(environment(cpus=64))
    fleet.apply(environment(cpus=1, ssh_keys=("ssh-ed25519 AAAAAAAAAAAAAAAAAAAAAAAA",)))
    fleet.join("h1")
    ((one,), _) = desired.whole(fleet.state, "h1")
    assert one.cpus == 1 and one.ssh_keys


def test_an_interface_on_another_network_returns_its_address(fleet: SmallFleet) -> None:
    fleet.apply(network("other", "10.1.0.0/24"))
    fleet.apply(environment())
    mac = fleet.state.instances[only(fleet)].nics[0].mac
    fleet.apply(environment(nics=(NicSpec("other"), NicSpec("default"))))
    nics = fleet.state.instances[only(fleet)].nics
    assert [n.network for n in nics] == ["other", "default"] and nics[0].mac != mac
    assert len(fleet.state.addresses["default"]) == 1 and len(fleet.state.macs) == 2


def test_sessions_newer_supersedes_older_is_stale_same_is_a_clone(fleet: SmallFleet) -> None:
    fleet.join("h1", 5)
    stale = fleet.hello("h1", 4)
    assert isinstance(stale, Turned) and stale.reason == "StaleSession"
    batch = fleet.fold(apply(fleet.state, fleet.observed, _hello("h1", 6), fleet.now_s, fleet.rules))
    assert isinstance(batch.answer, Welcomed)
    assert [(e.session, e.reason) for e in batch.effects if isinstance(e, EndSession)] == [(5, "Superseded")]
    revision = fleet.state.revision
    fleet.tell("h1", 5, gone=("x",))
    assert fleet.state.revision == revision, "a superseded session changes nothing"
    clone = fleet.hello("h1", 6)
    assert isinstance(clone, Turned) and clone.reason == "Held"
    assert not fleet.observed.host("h1").connected
    assert isinstance(fleet.hello("h1", 7), Turned), "both are held"
    assert isinstance(SmallFleetOf(fleet).hello("h1", 8), Turned), "also after a restart"


def _hello(name: str, session: int):  # type: ignore[no-untyped-def]
    from casemate_manager.fleet.commands import HostHello
    from casemate_wire.stream import Hello

    return HostHello(Hello(name, "boot", 0, 0, "digest", session), "seed")


class SmallFleetOf(SmallFleet):
    """The same records under a new manager."""

    def __init__(self, fleet: SmallFleet) -> None:
        super().__init__()
        self.state = fleet.reload()
        self.now_s = fleet.now_s


def test_host_events_are_kept_once_and_counted(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment())
    uid = only(fleet)
    for name in ("1", "1", "2"):
        fleet.do(HostNote("h1", 1, HostEvent(name, uid, "web", "PodExited", "code 1", "Warning", fleet.now_s)))
    (event,) = [e for e in fleet.state.events.values() if e.reason == "PodExited"]
    assert (event.count, event.regarding.kind, event.regarding.name) == (2, "Pod", "hello-0.web")
    fleet.do(HostNote("h1", 1, HostEvent("3", "stranger", "", "Odd", "x")))
    (event,) = [e for e in fleet.state.events.values() if e.reason == "Odd"]
    assert event.regarding.kind == "Host"
    fleet.do(HostNote("h1", 1, Outcome("", uid, "Failed", "", "does not fit", True)))
    assert "PlacementRefused" in reasons(fleet)


def test_a_ledger_that_differs_is_named_once(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment())
    ((one,), _) = desired.whole(fleet.state, "h1")
    fleet.tell("h1", 1, replace(told(one.uid, Phase.READY), claim=one.placement.claim), snapshot=True)
    assert "ClaimDiffers" not in reasons(fleet)
    other = replace(one.placement.claim, disk_mib=one.placement.claim.disk_mib + 1)
    for _ in range(2):
        fleet.tell("h1", 1, replace(told(one.uid, Phase.READY), claim=other), snapshot=True)
    (event,) = [e for e in fleet.state.events.values() if e.reason == "ClaimDiffers"]
    assert event.count == 2


def test_events_are_bounded(fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_manager.fleet.machine.EVENTS_KEPT", 50)
    fleet.join("h1")
    for n in range(100):
        fleet.do(HostNote("h1", 1, HostEvent(str(n), "", "", "Said", str(n))))
    for _ in range(2):
        fleet.do(Expire())
    # one in twenty goes with the surplus, and then nothing until there are too many again
    assert len(fleet.state.events) == 48
    assert [e.message for e in fleet.state.events.values()][-1] == "99"
    assert not is_crowded(fleet.state)
    fleet.do(Expire())
    assert len(fleet.state.events) == 48


def test_answered_requests_are_bounded_and_the_newest_are_known(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casemate_manager.fleet.machine.REQUESTS_KEPT", 40)
    for n in range(60):
        fleet.apply(environment(f"e{n}"))
    newest = max(fleet.state.requests, key=lambda k: fleet.state.requests[k].at_s)
    assert list(fleet.reload().requests) == list(fleet.state.requests)  # both in the order of their answers
    assert is_crowded(fleet.state)
    while is_crowded(fleet.state):
        fleet.do(Expire())
    assert len(fleet.state.requests) == 38
    assert newest in fleet.state.requests
    fleet.now_s += REQUEST_KEPT_S + 1
    fleet.do(Expire())
    assert not fleet.state.requests


def test_a_resumed_host_is_told_what_changed_since(fleet: SmallFleet) -> None:
    fleet.join("h1")
    fleet.apply(environment("a"))
    fleet.apply(environment("b"))
    revision = fleet.state.revision
    assert desired.since(fleet.state, "h1", revision) == ((), ())
    fleet.apply(environment("b", run="stopped"))
    keep, end = desired.since(fleet.state, "h1", revision)
    assert [i.name for i in keep] == ["b-0"] and not end
    fleet.delete("Environment", "a")
    _, end = desired.since(fleet.state, "h1", fleet.state.revision)
    assert len(end) == 1, "instances to end are told until they are gone"


def test_what_is_told_as_a_delta_is_what_the_whole_would_be(fleet: SmallFleet) -> None:
    """The wake-ups of `affected` name every instance whose record changed."""
    fleet.join("h1", line="1s 16k/c 1t 64G disk=1T")
    before: dict[str, object] = {}
    mirror: dict[str, object] = {}

    def follow() -> None:
        for uid in fleet.woken.get("h1", ()):
            keep, end = desired.some(fleet.state, "h1", [uid])
            mirror.update({i.uid: i for i in keep})
            for gone in end:
                mirror.pop(gone, None)

    original = fleet.fold

    def fold(batch):  # type: ignore[no-untyped-def]
        folded = original(batch)
        follow()
        return folded

    fleet.fold = fold  # type: ignore[method-assign]
    for step in (
        lambda: fleet.apply(environment("a", replicas=2), environment("b")),
        lambda: fleet.apply(environment("a", replicas=4)),
        lambda: fleet.obey("h1"),
        lambda: fleet.apply(environment("a", replicas=1)),
        lambda: fleet.obey("h1"),
        lambda: fleet.apply(environment("b", run="stopped", cpus=2)),
        lambda: fleet.delete("Environment", "a"),
    ):
        step()
        before = {i.uid: i for i in desired.whole(fleet.state, "h1")[0]}
        assert mirror == before


class Fleet(RuleBasedStateMachine):
    """Any order of requests and of what hosts do; `SmallFleet` checks every invariant after each step.

    Never: two owners of a resource, an address or a MAC; a record that a new manager cannot load.
    """

    @initialize()
    def begin(self) -> None:
        self.fleet = SmallFleet()
        self.fleet.apply(image(), network("default", "10.99.0.0/28"))
        self.sessions = {"h1": 0, "h2": 0}
        self.answers: dict[str, object] = {}

    @rule(
        name=st.sampled_from("abc"),
        replicas=st.integers(0, 4),
        cpus=st.integers(1, 3),
        run=st.sampled_from(["started", "stopped", "paused"]),
        strategy=st.sampled_from([None, UpdateStrategy(), UpdateStrategy("all-at-once")]),
        lifetime_s=st.sampled_from([0, 0, 100]),
        key=st.integers(0, 5),
    )
    def apply(
        self, name: str, replicas: int, cpus: int, run: str, strategy: UpdateStrategy | None, lifetime_s: int, key: int
    ) -> None:
        one = environment(name, replicas=replicas, cpus=cpus, run=run, update_strategy=strategy, lifetime_s=lifetime_s)
        try:
            answer = self.fleet.apply(one, key=f"a{key}")
        except (Conflict, KeyReused):
            return
        assert self.answers.setdefault(f"a{key}", answer) == answer

    @rule(name=st.sampled_from("abc"))
    def delete(self, name: str) -> None:
        try:
            self.fleet.delete("Environment", name)
        except NotFound:
            assert f"default/{name}" not in self.fleet.state.environments

    @rule(host=st.sampled_from(["h1", "h2"]))
    def dial(self, host: str) -> None:
        self.sessions[host] += 1
        self.fleet.join(host, self.sessions[host], SMALL)

    @rule(host=st.sampled_from(["h1", "h2"]))
    def lose(self, host: str) -> None:
        self.fleet.do(HostGone(host, self.sessions[host], "cut"))
        self.fleet.settle()

    @rule(host=st.sampled_from(["h1", "h2"]))
    def obey(self, host: str) -> None:
        self.fleet.obey(host, self.sessions[host])

    @rule(
        name=st.sampled_from(["a", "a-0", "b", "b-1", "c"]),
        verb=st.sampled_from(list(Verb)),
        key=st.integers(0, 9),
    )
    def operate(self, name: str, verb: Verb, key: int) -> None:
        try:
            self.fleet.do(OperateInstances(f"o{key}", "default", name, verb.value, f"seed-{self.fleet.next()}"))
        except (Conflict, KeyReused, NotFound):
            return
        self.fleet.settle()

    @rule(
        host=st.sampled_from(["h1", "h2"]),
        phase=st.sampled_from([OrderPhase.RUNNING, OrderPhase.DONE, OrderPhase.FAILED]),
        seen=st.sampled_from([Phase.READY, Phase.STOPPED]),
    )
    def carry_out(self, host: str, phase: OrderPhase, seen: Phase) -> None:
        """The host says how far its orders are, and what its instances do, of the present generation."""
        keep, _ = desired.whole(self.fleet.state, host)
        states = []
        for one in keep:
            order = OrderState(one.order.uid, phase, "", "", 1.0, 2.0) if one.order else None
            states.append(replace(told(one.uid, seen, one.generation), order=order))
        self.fleet.tell(host, self.sessions[host], *states)

    @rule(passed_s=st.sampled_from([10.0, 100.0, 1000.0]))
    def wait(self, passed_s: float) -> None:
        self.fleet.now_s += passed_s
        self.fleet.do(Due())
        self.fleet.settle()

    @rule(host=st.sampled_from(["h1", "h2"]), phase=st.sampled_from(list(Phase)))
    def report(self, host: str, phase: Phase) -> None:
        keep, _ = desired.whole(self.fleet.state, host)
        self.fleet.tell(host, self.sessions[host], *(told(i.uid, phase) for i in keep))

    @rule(host=st.sampled_from(["h1", "h2"]), cordoned=st.booleans())
    def cordon(self, host: str, cordoned: bool) -> None:
        self.fleet.apply(Host(Meta(host), HostSpec(cordoned)))

    @rule()
    def restart(self) -> None:
        """A new manager on the same records: nothing is observed, everything else is the same."""
        old = self.fleet
        self.fleet = SmallFleetOf(old)
        self.fleet.counter = old.counter
        self.fleet.settle()

    @invariant()
    def loads_the_same(self) -> None:
        if not hasattr(self, "fleet"):
            return
        state, fresh = self.fleet.state, self.fleet.reload()
        for name in (
            "instances",
            "environment_instances",
            "instance_names",
            "instance_placements",
            "host_placements",
            "macs",
            "pending",
            "open_keys",
            "lifetimes",
        ):
            ours = {k: v for k, v in getattr(state, name).items() if v != {}}
            assert ours == {k: v for k, v in getattr(fresh, name).items() if v != {}}, name


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=100, stateful_step_count=40)
