"""Operations, update strategies, lifetimes and protection, as the fleet decides them."""

from dataclasses import replace
from typing import Any

import pytest

from casemate_core.errors import Conflict, InvalidSpec, NotFound
from casemate_core.spec.environment import Environment, UpdateStrategy
from casemate_core.spec.instance import DesiredInstance, InstanceState, Phase, Run
from casemate_core.spec.operation import OrderPhase, OrderState
from casemate_manager import views
from casemate_manager.access import environment_in
from casemate_manager.fleet import desired
from casemate_manager.fleet.commands import Due, Expire, HostGone, OperateAnswer, OperateInstances
from casemate_manager.fleet.requests import KeyReused
from support.small_fleet import SmallFleet, environment, image, network


class Host(SmallFleet):
    """A fleet with one host that does what it should as far as a test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(image(), image("other"), network())
        self.join("h1")
        self.pids: dict[str, int] = {}

    def operate(self, name: str, verb: str, key: str = "", **more: Any) -> OperateAnswer:
        command = OperateInstances(key or self.next(), "default", name, verb, f"seed-{self.counter}", **more)
        answer = self.do(command)
        assert isinstance(answer, OperateAnswer)
        self.settle()
        return answer

    def wanted(self) -> dict[str, DesiredInstance]:
        return {i.name: i for i in desired.whole(self.state, "h1")[0]}

    def say(self, one: DesiredInstance, phase: Phase, order: OrderState | None = None) -> None:
        pid = self.pids.setdefault(one.uid, 100)
        self.tell("h1", 1, InstanceState(one.uid, one.generation, phase, pid=pid, guest_boot_id="b1", order=order))

    def up(self) -> None:
        """Everything that should run is Ready, everything else Stopped."""
        for one in self.wanted().values():
            self.say(one, Phase.READY if one.run is Run.STARTED else Phase.STOPPED)

    def ended(self, one: DesiredInstance, phase: OrderPhase = OrderPhase.DONE) -> None:
        """The host has carried its order out."""
        assert one.order is not None
        now_s = self.now_s
        self.say(one, Phase.READY, OrderState(one.order.uid, OrderPhase.RUNNING, started_s=now_s))
        self.say(one, Phase.READY, OrderState(one.order.uid, phase, "", "so it is", now_s, now_s + 1))

    def reasons(self) -> list[str]:
        return [e.reason for e in self.state.events.values()]


@pytest.fixture
def host() -> Host:
    return Host()


def test_an_operation_is_an_order_until_its_host_tells_the_end(host: Host) -> None:
    host.apply(environment())
    host.up()
    answer = host.operate("hello-0", "restart", grace_s=5.0, timeout_s=60.0)
    (ref,) = answer.operations
    one = host.wanted()["hello-0"]
    assert one.order is not None
    assert (one.order.uid, one.order.verb, one.order.grace_s, one.order.pid) == (ref.uid, "restart", 5.0, 100)
    assert (one.order.guest_boot_id, one.order.begun) == ("b1", False)
    assert host.now_s < one.order.deadline_s <= host.now_s + 60
    record = host.state.operations[f"default/{ref.name}"]
    assert views.operation_view(host.state, record).phase == "Pending"
    host.say(one, Phase.STOPPING, OrderState(ref.uid, OrderPhase.RUNNING, started_s=host.now_s))
    begun = host.wanted()["hello-0"].order
    assert begun is not None and begun.begun
    host.ended(one)
    assert host.wanted()["hello-0"].order is None
    view = views.operation_view(host.state, host.state.operations[f"default/{ref.name}"])
    assert (view.phase, view.message, view.target.name, view.host) == ("Done", "so it is", "hello-0", "h1")
    assert host.reasons().count("RestartAsked") == host.reasons().count("RestartDone") == 1
    host.say(one, Phase.READY, OrderState(ref.uid, OrderPhase.FAILED))  # word of what is over changes nothing
    assert host.state.operations[f"default/{ref.name}"].phase == "Done"
    assert host.reload().check() == []


def test_only_one_at_a_time_and_the_same_key_has_one_effect(host: Host) -> None:
    host.apply(environment())
    host.up()
    first = host.operate("hello-0", "reboot", key="k")
    assert host.operate("hello-0", "reboot", key="k") == first
    with pytest.raises(KeyReused):
        host.operate("hello-0", "reset", key="k")
    with pytest.raises(Conflict, match="under way"):
        host.operate("hello", "reset")
    assert len(host.state.operations) == 1


def test_what_cannot_be_is_refused_and_changes_nothing(host: Host) -> None:
    revision = host.state.revision
    for name, verb, more, error in (
        ("nowhere", "restart", {}, NotFound),
        ("nowhere", "explode", {}, InvalidSpec),
        ("nowhere", "reboot", {"grace_s": 1.0}, InvalidSpec),
        ("nowhere", "restart", {"grace_s": -1.0}, InvalidSpec),
        ("nowhere", "restart", {"timeout_s": 0.5}, InvalidSpec),
    ):
        with pytest.raises(error):
            host.operate(name, verb, **more)
    assert host.state.revision == revision
    host.apply(environment(), environment("big", memory_mib=10**6), environment("off", run="stopped"))
    host.up()
    for name, verb in (("hello", "stop"), ("off", "restart"), ("big-0", "restart")):
        with pytest.raises(Conflict):
            host.operate(name, verb)
    with pytest.raises(Conflict, match="uid"):
        host.operate("hello-0", "restart", uid="another")
    host.delete("Environment", "hello")
    with pytest.raises(Conflict, match="being deleted"):
        host.operate("hello-0", "restart")


def test_a_host_that_is_not_heard_makes_it_unknown_and_may_still_tell_the_end(host: Host) -> None:
    host.apply(environment())
    host.up()
    (ref,) = host.operate("hello-0", "restart", timeout_s=60.0).operations
    host.do(HostGone("h1", 1, "cut"))
    host.now_s += 50
    host.do(Due())
    key = f"default/{ref.name}"
    assert host.state.operations[key].phase == "Pending"
    host.now_s += 60
    host.do(Due())
    record = host.state.operations[key]
    assert (record.phase, record.reason, record.closed) == ("Unknown", "HostUnknown", False)
    assert "RestartUnknown" in host.reasons()
    revision = host.state.revision
    host.do(Due())
    assert host.state.revision == revision, "it is told once"
    host.hello("h1", 2)
    one = host.wanted()["hello-0"]
    assert one.order is not None
    state = OrderState(one.order.uid, OrderPhase.DONE, "", "done", 1.0, 2.0)
    host.tell("h1", 2, InstanceState(one.uid, one.generation, Phase.READY, order=state), snapshot=True)
    assert (host.state.operations[key].phase, host.state.operations[key].closed) == ("Done", True)


def test_with_its_instance_goes_what_was_asked_of_it_and_old_ones_are_forgotten(host: Host) -> None:
    host.apply(environment())
    host.up()
    (ref,) = host.operate("hello-0", "restart").operations
    host.delete("Environment", "hello")
    host.obey("h1")
    record = host.state.operations[f"default/{ref.name}"]
    assert (record.phase, record.reason, record.closed) == ("Failed", "InstanceGone", True)
    assert views.operation_view(host.state, record).target.name == "hello-0"
    host.now_s += 8 * 86400
    host.do(Expire())
    assert not host.state.operations


def test_a_rebuild_counts_disks_and_brings_what_needs_one(host: Host) -> None:
    host.apply(environment())
    host.up()
    host.apply(_from(environment(), "other"))
    before = host.wanted()["hello-0"]
    assert (before.image.name, before.disk) == ("debian", 0)
    host.operate("hello", "rebuild")
    after = host.wanted()["hello-0"]
    assert (after.image.name, after.disk) == ("other", 1)
    assert (after.uid, after.nics, after.placement) == (before.uid, before.nics, before.placement)
    host.ended(after)
    host.apply(_from(environment(disk_mib=9999), "other"))
    with pytest.raises(Conflict, match=r"spec\.disk\.size"):
        host.operate("hello", "rebuild")


def _from(one: Environment, name: str) -> Environment:
    return replace(one, spec=replace(one.spec, image=name))


ROLLING = UpdateStrategy("rolling", 1)


def test_an_operation_on_a_rolling_environment_takes_turns(host: Host) -> None:
    host.apply(environment(replicas=3, update_strategy=ROLLING))
    host.up()
    host.operate("hello", "restart")
    seen = []
    for _ in range(3):
        under_way = [one for one in host.wanted().values() if one.order is not None]
        assert len(under_way) == 1
        seen.append(under_way[0].name)
        host.say(under_way[0], Phase.STOPPING)
        assert len([one for one in host.wanted().values() if one.order is not None]) == 1
        host.ended(under_way[0])
    assert seen == ["hello-0", "hello-1", "hello-2"]
    assert {o.phase for o in host.state.operations.values()} == {"Done"}


def _change(replicas: int, strategy: UpdateStrategy, **fields: Any) -> Environment:
    return environment(replicas=replicas, update_strategy=strategy, memory_mib=768, **fields)


def test_a_rolling_update_stops_changes_and_starts_one_after_the_other(host: Host) -> None:
    host.apply(environment(replicas=3, update_strategy=ROLLING))
    host.up()
    before = host.wanted()
    host.apply(_from(_change(3, ROLLING), "other"))
    for turn in range(3):
        off = [one for one in host.wanted().values() if one.run is Run.STOPPED]
        assert [one.name for one in off] == [f"hello-{turn}"], turn
        assert off[0].memory_mib == 512, "it is changed only when it is off"
        host.say(off[0], Phase.STOPPING)
        host.say(off[0], Phase.STOPPED)
        new = host.wanted()[off[0].name]
        assert (new.run, new.memory_mib, new.image.name, new.disk) == (Run.STARTED, 768, "other", 1)
        assert (new.uid, new.nics) == (off[0].uid, off[0].nics)
        if turn < 2:
            host.say(new, Phase.STARTING)
            assert all(one.run is Run.STARTED for one in host.wanted().values()), "the next waits until it is ready"
        host.say(new, Phase.READY)
    assert {one.memory_mib for one in host.wanted().values()} == {768}
    assert all(one.run is Run.STARTED for one in host.wanted().values())
    assert {n: o.uid for n, o in before.items()} == {n: o.uid for n, o in host.wanted().items()}
    assert host.reload().check() == []


def test_all_at_once_stops_all_and_one_that_is_down_costs_a_rolling_update_nothing(host: Host) -> None:
    every = UpdateStrategy("all-at-once")
    host.apply(environment(replicas=3, update_strategy=every))
    host.up()
    host.apply(_change(3, every))
    assert {one.run for one in host.wanted().values()} == {Run.STOPPED}
    host.delete("Environment", "hello")
    host.obey("h1")
    host.apply(environment("other", replicas=2, update_strategy=ROLLING))
    for one in host.wanted().values():
        if one.environment == "other":
            host.say(one, Phase.FAILED)  # it has never come up
    host.apply(replace(_change(2, ROLLING), meta=environment("other").meta))
    assert [o.run for o in host.wanted().values() if o.environment == "other"] == [Run.STOPPED] * 2


def test_without_a_strategy_changes_wait_and_with_one_that_does_not_fit_it_goes_on_as_it_was(host: Host) -> None:
    host.apply(environment())
    host.up()
    host.apply(environment(memory_mib=768))
    assert host.wanted()["hello-0"].run is Run.STARTED
    host.apply(environment(memory_mib=10**6, update_strategy=ROLLING))
    one = host.wanted()["hello-0"]
    assert one.run is Run.STOPPED
    host.say(one, Phase.STOPPED)
    one = host.wanted()["hello-0"]
    assert (one.run, one.memory_mib) == (Run.STARTED, 512)
    assert "RestartPending" in host.reasons()
    host.say(one, Phase.READY)
    assert host.wanted()["hello-0"].run is Run.STARTED, "it is not tried again and again"
    host.apply(environment(update_strategy=ROLLING))
    assert host.wanted()["hello-0"].memory_mib == 512


def test_a_hold_ends_when_the_change_is_taken_back(host: Host) -> None:
    host.apply(environment(update_strategy=ROLLING))
    host.up()
    host.apply(_change(1, ROLLING))
    assert host.wanted()["hello-0"].run is Run.STOPPED
    host.apply(environment(update_strategy=ROLLING, run="stopped"))
    host.up()
    host.apply(environment(update_strategy=ROLLING))
    host.up()
    assert host.wanted()["hello-0"].run is Run.STARTED


def test_what_is_protected_is_not_deleted(host: Host) -> None:
    host.apply(environment(protected=True))
    with pytest.raises(Conflict, match="protected"):
        host.delete("Environment", "hello")
    host.apply(environment())
    host.delete("Environment", "hello")


def test_a_lifetime_ends_an_environment_with_notice(host: Host) -> None:
    host.apply(environment(lifetime_s=3000))
    created_s = host.now_s
    host.now_s = created_s + 2600
    host.do(Due())
    assert "LifetimeEnding" not in host.reasons()
    host.now_s = created_s + 2750
    host.do(Due())
    host.do(Due())
    assert host.reasons().count("LifetimeEnding") == 1
    record = host.state.environments["default/hello"]
    assert any(c.type == "Ending" for c in views.environment_status(host.state, host.observed, record).conditions)
    host.apply(environment(lifetime_s=9000))
    host.do(Due())
    assert "LifetimeExtended" in host.reasons()
    assert not host.state.environments["default/hello"].notice_end_s
    host.apply(environment(lifetime_s=60))  # over already: a notice first, all the same
    host.do(Due())
    assert not host.state.environments["default/hello"].environment.meta.deleting_s
    host.now_s += 40
    host.do(Due())
    assert host.state.environments["default/hello"].environment.meta.deleting_s
    host.settle()
    host.obey("h1")
    assert not host.state.environments and not host.state.lifetimes


def test_an_operation_is_of_its_environment(host: Host) -> None:
    host.apply(environment())
    host.up()
    (ref,) = host.operate("hello", "restart").operations
    assert ref.name.startswith("hello-0.restart-")
    assert environment_in("Operation", ref.name) == "hello"


def test_what_cloud_init_complains_about_is_a_condition(host: Host) -> None:
    host.apply(environment())
    one = host.wanted()["hello-0"]

    def told(status: str, message: str = "") -> tuple[str, str, str] | None:
        state = InstanceState(
            one.uid, one.generation, Phase.RUNNING, pid=1, cloud_init=status, cloud_init_message=message
        )
        host.tell("h1", 1, state)
        view = views.instance_view(host.state, host.observed, host.state.instances[one.uid])
        found = [(c.status, c.reason, c.message) for c in view.conditions if c.type == "CloudInit"]
        return found[0] if found else None

    assert told("none") is None
    assert told("running") == ("Unknown", "Running", "")
    assert told("done") == ("True", "Done", "")
    assert told("error", "no such module") == ("False", "Error", "no such module")
