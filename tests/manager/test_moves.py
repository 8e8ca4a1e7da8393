"""What may be migrated, who may ask, and how each stage follows from what two hosts say. The whole is in tests/journeys."""

from dataclasses import replace
from typing import Any

import pytest

from casemate_core.claims import GpuShare, VfClaim
from casemate_core.errors import Conflict, InvalidSpec, NotFound
from casemate_core.spec.access import Scope
from casemate_core.spec.instance import InstanceState, Phase
from casemate_core.spec.operation import OrderPhase, OrderState, Stage
from casemate_core.spec.volume import Attached
from casemate_manager.access import Denied, Grants, Principal
from casemate_manager.fleet import acts, desired
from casemate_manager.fleet.commands import Due, OperateAnswer, OperateInstances
from casemate_manager.fleet.moves import CannotMove
from casemate_manager.fleet.records import OperationRecord
from casemate_wire.stream import HostReport
from support.small_fleet import SmallFleet, environment, image, network

REPORTS = {name: HostReport(passage=f"{name}.example", cpu="Model A") for name in ("h1", "h2", "h3")}


def fleet(*hosts: str, **spec: object) -> SmallFleet:
    """Hosts that take part, and one instance that runs on the first that fits."""
    made = SmallFleet()
    made.apply(image(), network())
    for name in hosts or ("h1", "h2"):
        made.join(name)
        made.tell(name, 1, report=REPORTS[name])
    made.apply(environment(**spec))  # type: ignore[arg-type]
    say(made, here(made), Phase.READY)
    return made


def uid(made: SmallFleet) -> str:
    (found,) = made.state.instances
    return found


def here(made: SmallFleet) -> str:
    placement = made.state.placement_of(uid(made))
    assert placement is not None
    return placement.host


def say(made: SmallFleet, host: str, phase: Phase, order: OrderState | None = None) -> None:
    made.tell(host, 1, InstanceState(uid(made), 1, phase, order=order), report=REPORTS[host])


def migrate(made: SmallFleet, to: str = "", name: str = "hello-0", key: str = "", timeout_s: float = 600.0) -> str:
    command = OperateInstances(key or made.next(), "default", name, "migrate", "seed", None, timeout_s, to_host=to)
    answer = made.do(command)
    assert isinstance(answer, OperateAnswer)
    return answer.operations[0].name


def record(made: SmallFleet) -> OperationRecord:
    (found,) = made.state.operations.values()
    return found


def roles(made: SmallFleet) -> dict[str, str]:
    return {p.host: p.role for p in made.state.instance_placements[uid(made)].values()}


def order(made: SmallFleet, host: str) -> str:
    """The stage that a host is told."""
    keep, end = desired.whole(made.state, host)
    if uid(made) in end:
        return "end"
    found = [i.order for i in keep if i.uid == uid(made)]
    return found[0].move.stage.value if found and found[0] and found[0].move else ""


def test_the_stages_of_a_migration() -> None:
    made = fleet()
    source = here(made)
    target = "h2" if source == "h1" else "h1"
    migrate(made)
    assert roles(made) == {source: "active", target: "incoming"}
    assert (order(made, source), order(made, target)) == ("prepare", "prepare")
    told = OrderState(record(made).meta.uid, OrderPhase.RUNNING)
    say(made, target, Phase.PREPARING, replace(told, address="10.0.0.2:4000"))
    assert record(made).stage == Stage.TRANSFER and record(made).address == "10.0.0.2:4000"
    assert (order(made, source), order(made, target)) == ("transfer", "transfer")
    say(made, source, Phase.STOPPING, replace(told, phase=OrderPhase.DONE))
    assert order(made, target) == "settle" and roles(made)[target] == "incoming"
    # that it waits, said before it was asked whether it has arrived, is no answer to that
    say(made, target, Phase.PREPARING, replace(told, address="10.0.0.2:4000"))
    assert roles(made)[target] == "incoming"
    say(made, target, Phase.PREPARING, replace(told, phase=OrderPhase.DONE))
    assert roles(made) == {source: "outgoing", target: "active"}
    assert record(made).phase == "Done" and record(made).closed
    assert (order(made, source), order(made, target)) == ("end", "")
    made.tell(source, 1, gone=(uid(made),), report=REPORTS[source])
    assert roles(made) == {target: "active"} and len(made.state.claims[source]) == 0


def test_the_source_goes_on_where_it_has_not_left() -> None:
    made = fleet()
    source = here(made)
    target = "h2" if source == "h1" else "h1"
    migrate(made)
    told = OrderState(record(made).meta.uid, OrderPhase.RUNNING)
    say(made, target, Phase.PREPARING, replace(told, address="10.0.0.2:4000"))
    said = replace(told, phase=OrderPhase.FAILED, reason="PassageFailed", message="no answer")
    say(made, source, Phase.READY, said)
    assert roles(made) == {source: "active", target: "outgoing"}
    assert record(made).phase == "Failed" and record(made).message == f"it goes on at {source}: no answer"
    with pytest.raises(CannotMove, match="has not yet let go of it"):
        migrate(made)
    made.tell(target, 1, gone=(uid(made),), report=REPORTS[target])
    migrate(made)
    assert roles(made) == {source: "active", target: "incoming"}


def test_the_source_is_started_again_only_when_the_target_holds_no_trace() -> None:
    made = fleet()
    source = here(made)
    target = "h2" if source == "h1" else "h1"
    migrate(made)
    told = OrderState(record(made).meta.uid, OrderPhase.RUNNING)
    say(made, target, Phase.PREPARING, replace(told, address="10.0.0.2:4000"))
    say(made, source, Phase.STOPPING, replace(told, phase=OrderPhase.DONE))
    say(made, target, Phase.PREPARING, replace(told, phase=OrderPhase.FAILED, reason="NotArrived", message="not here"))
    assert order(made, source) == "settle", "it holds still"
    assert order(made, target) == "end" and not record(made).closed
    made.tell(target, 1, gone=(uid(made),), report=REPORTS[target])
    assert order(made, source) == "" and roles(made) == {source: "active"}
    assert record(made).phase == "Failed" and f"started again at {source}" in record(made).message


def test_what_takes_too_long_is_cancelled_and_waits_for_the_sources_word() -> None:
    made = fleet()
    source = here(made)
    target = "h2" if source == "h1" else "h1"
    migrate(made, timeout_s=30.0)
    told = OrderState(record(made).meta.uid, OrderPhase.RUNNING)
    say(made, target, Phase.PREPARING, replace(told, address="10.0.0.2:4000"))
    made.now_s += 60.0
    made.do(Due())
    assert order(made, source) == "cancel" and roles(made)[target] == "incoming"
    say(made, source, Phase.READY, replace(told, phase=OrderPhase.FAILED, reason="Cancelled", message="given up"))
    assert record(made).phase == "Failed" and "not done in 30 s" in record(made).message
    assert roles(made) == {source: "active", target: "outgoing"}


def test_before_anything_was_sent_it_is_given_up_at_once() -> None:
    made = fleet()
    migrate(made, timeout_s=30.0)
    made.now_s += 60.0
    made.do(Due())
    assert record(made).phase == "Failed" and record(made).closed


def test_an_instance_that_ends_meanwhile_ends_at_both_hosts() -> None:
    made = fleet()
    migrate(made)
    name = uid(made)
    made.delete("Environment", "hello")
    for host in ("h1", "h2"):
        assert desired.whole(made.state, host)[1] == (name,)
        made.tell(host, 1, gone=(name,), report=REPORTS[host])
    assert not made.state.instances and not made.state.placements and record(made).closed


def test_both_placements_and_the_operation_outlive_the_manager() -> None:
    made = fleet()
    migrate(made)
    again = made.reload()
    assert {p.role for p in again.placements.values()} == {"active", "incoming"}
    assert [r.stage for r in again.open_operations()] == ["prepare"]


# --- what is refused, and why -----------------------------------------------------------------------------------------


def test_the_same_request_has_one_effect() -> None:
    made = fleet()
    assert migrate(made, key="once") == migrate(made, key="once")
    with pytest.raises(Conflict, match="under way"):
        migrate(made)


def test_where_there_is_no_other_host() -> None:
    made = fleet("h1")
    with pytest.raises(CannotMove, match="there is no other host"):
        migrate(made)


def test_to_a_host_that_does_not_exist_or_is_its_own() -> None:
    made = fleet()
    with pytest.raises(NotFound):
        migrate(made, "h9")
    with pytest.raises(CannotMove, match=f"cannot move to {here(made)}: it is there already"):
        migrate(made, here(made))


def test_hosts_that_take_part_in_none() -> None:
    made = fleet()
    source = here(made)
    target = "h2" if source == "h1" else "h1"
    made.tell(target, 1, report=HostReport())
    with pytest.raises(CannotMove, match="1: host takes part in no migrations"):
        migrate(made)


def test_a_full_host_by_the_schedulers_own_words() -> None:
    made = fleet("h1", "h2", memory_mib=5000)
    made.apply(environment("other", memory_mib=5000))
    with pytest.raises(CannotMove, match="memory"):
        migrate(made, name="hello-0")


@pytest.mark.parametrize(
    "taken, told",
    [
        ({"gpus": ("GPU-1", "GPU-2")}, "it has 2 GPUs passed through"),
        ({"shares": (GpuShare("GPU-1", 500),)}, "it has 1 shares of GPUs passed through"),
        ({"vfs": (VfClaim("52:54:00:00:00:01", 0),)}, "it has 1 virtual functions of a NIC passed through"),
        ({"devices": ("fec-1",)}, "it has 1 devices passed through"),
    ],
)
def test_what_holds_a_part_of_its_host(taken: dict[str, Any], told: str) -> None:
    made = fleet()
    held = made.state.instance_placements[uid(made)]
    for key, placement in held.items():
        held[key] = replace(placement, claim=replace(placement.claim, **taken))
    with pytest.raises(CannotMove, match=told):
        migrate(made)
    assert not made.state.operations and len(held) == 1


def test_what_has_volumes_on_its_host() -> None:
    made = fleet()
    made.state.instances[uid(made)] = replace(made.state.instances[uid(made)], volumes=(Attached("data", "data"),))
    with pytest.raises(CannotMove, match=r"its volumes \(data\) are on its host's own disk"):
        migrate(made)


@pytest.mark.parametrize(
    "theirs, cpu, told", [("tcg", "Model A", "runs guests by tcg, not by kvm"), ("kvm", "Model B", "another CPU")]
)
def test_a_guest_stays_with_the_processor_that_it_sees(theirs: str, cpu: str, told: str) -> None:
    made = fleet()
    source = here(made)
    target = "h2" if source == "h1" else "h1"
    for host, how in ((source, "kvm"), (target, theirs)):
        made.state.hosts[host] = replace(made.state.hosts[host], virtualisation=how)
    held = made.state.instance_placements[uid(made)]
    for key, placement in held.items():
        held[key] = replace(placement, claim=replace(placement.claim, vcpus=(0,)))
    made.tell(target, 1, report=HostReport(passage="elsewhere.example", cpu=cpu))
    with pytest.raises(CannotMove, match=told):
        migrate(made, target)


def test_what_does_not_run() -> None:
    made = fleet()
    say(made, here(made), Phase.STOPPED)
    with pytest.raises(CannotMove, match=r"does not run \(Stopped\)"):
        migrate(made)


def test_several_instances_at_once() -> None:
    made = fleet(replicas=1)
    made.apply(environment(replicas=2))
    with pytest.raises(InvalidSpec, match="name one of them"):
        migrate(made, name="hello")


def test_a_target_means_nothing_to_another_verb() -> None:
    made = fleet()
    with pytest.raises(InvalidSpec, match="toHost"):
        made.do(OperateInstances(made.next(), "default", "hello-0", "restart", "seed", to_host="h2"))


def test_who_may_change_an_environment_may_not_choose_between_hosts() -> None:
    made = fleet()
    command = OperateInstances(made.next(), "default", "hello-0", "migrate", "seed")
    tenant = Grants(Principal("ann", "key"), (("operator", Scope("default")),))
    with pytest.raises(Denied, match="ann may not operate hosts"):
        acts.check(made.state, tenant, command)
    acts.check(made.state, Grants(Principal("pia", "key"), (("operator", Scope()),)), command)
