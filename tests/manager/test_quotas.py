"""Quotas: no batch leaves a tenant with more than it may have, and what is over already may shrink or stay."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.claims import Claim
from casemate_core.errors import CallerError, Conflict, InvalidSpec
from casemate_core.gpu import GpuPhase, GpuState
from casemate_core.spec.access import Tenant, check_tenant
from casemate_core.spec.environment import Cpu, Environment
from casemate_core.spec.meta import Meta
from casemate_core.topology import Topology
from casemate_manager.fleet import quotas
from casemate_manager.fleet.commands import HostFacts, HostInventory
from casemate_manager.fleet.machine import Rules
from casemate_manager.fleet.placing import Placed, Unplaced
from casemate_manager.fleet.quotas import QuotaExceeded
from casemate_wire.codec import resources
from casemate_wire.stream import Facts, HostReport, Inventory
from support.hosts import host
from support.small_fleet import SmallFleet, environment, image, network


def tenant(name: str = "default", **amounts: int) -> Tenant:
    return Tenant(Meta(name), {k.replace("_", "/"): v for k, v in amounts.items()})


def fleet(*objects: Any) -> SmallFleet:
    made = SmallFleet()
    made.apply(image(), network(), *objects)
    return made


def test_an_environment_over_a_quota_is_refused_with_numbers_and_nothing_is_written() -> None:
    made = fleet(tenant(cpus=4000, memory=4096, environments=2))
    made.apply(environment("a", cpus=2))
    before = made.state.revision
    with pytest.raises(QuotaExceeded, match=r"tenant default would have 5 of cpus, and its quota is 4"):
        made.apply(environment("b", cpus=3))
    with pytest.raises(QuotaExceeded, match="5Gi of memory"):
        made.apply(environment("b", memory_mib=4608))
    assert made.state.revision == before
    made.apply(environment("b"))
    with pytest.raises(QuotaExceeded, match="3 of environments"):
        made.apply(environment("c", memory_mib=64))


def test_growth_room_and_replicas_count() -> None:
    made = fleet(tenant(cpus=8000))
    grown = environment("a", replicas=2)
    with pytest.raises(QuotaExceeded, match="16 of cpus"):
        made.apply(_with_cpu(grown, Cpu(2, max=8)))
    made.apply(_with_cpu(grown, Cpu(2, max=4)))


def _with_cpu(one: Environment, cpu: Any) -> Environment:
    return replace(one, spec=replace(one.spec, cpu=cpu))


def test_one_request_counts_all_of_its_objects_and_its_own_tenant() -> None:
    made = fleet()
    with pytest.raises(QuotaExceeded):
        made.apply(tenant(cpus=2000), environment("a", cpus=1), environment("b", cpus=2))
    assert not made.state.environments and not made.state.tenants
    made.apply(tenant(cpus=3000), environment("a", cpus=1), environment("b", cpus=2))


def test_what_is_over_a_lowered_quota_may_shrink_or_stay() -> None:
    made = fleet(environment("a", cpus=3), environment("b", cpus=3))
    made.apply(tenant(cpus=4000))
    made.apply(environment("a", cpus=3, run="stopped"))
    made.apply(environment("a", cpus=2))
    with pytest.raises(QuotaExceeded):
        made.apply(environment("a", cpus=3))


def test_a_quota_of_another_tenant_is_another_matter() -> None:
    made = fleet(tenant("other", cpus=1000))
    made.apply(environment("a", cpus=64))


def test_the_highest_priority_is_a_quota() -> None:
    made = fleet(tenant(priority=10))
    made.apply(environment("a", priority=10))
    with pytest.raises(InvalidSpec, match=r"spec.priority: '11' is above what tenant default may ask for"):
        made.apply(environment("a", priority=11))


def test_a_tenant_with_environments_is_not_deleted() -> None:
    made = fleet(tenant(), environment("a"))
    with pytest.raises(Conflict, match="used by environment default/a"):
        made.delete("Tenant", "default")


class Giving:
    """A placer that gives so many GPUs of the first host."""

    def __init__(self, topology: Topology, each: int) -> None:
        self.free = [g.uuid for g in topology.gpus]
        self.each = each

    def place(self, fleet: Any, environment: Any, spec: Any, stamp: Any) -> Placed | Unplaced:
        took, self.free = self.free[: self.each], self.free[self.each :]
        return Placed("h1", Claim(stamp.owner, stamp.epoch, stamp.generation, gpus=tuple(took)))

    def refit(self, fleet: Any, host: str, environment: Any, spec: Any, stamp: Any) -> Placed | Unplaced:
        return self.place(fleet, environment, spec, stamp)


@pytest.mark.parametrize("gang", [False, True])
def test_gpus_by_model_are_judged_in_the_batch_that_places(gang: bool) -> None:
    topology = host("hgx-h200")
    model = topology.gpus[0].model
    made = fleet()
    made.join("h1")
    made.do(HostInventory("h1", 1, Inventory("gpus", topology)))
    free = tuple(GpuState(gpu.uuid, GpuPhase.FREE) for gpu in topology.gpus)
    made.do(HostFacts("h1", 1, Facts(100, host=HostReport(gpus=free))))
    made.rules = Rules(made.rules.objects, Giving(topology, 2))
    made.apply(Tenant(Meta("default"), {f"gpus/{model}": 5}))
    made.apply(environment("train", replicas=3, gang=gang))
    placed = len(made.state.placements)
    assert placed == (0 if gang else 2)
    (waiting,) = [e for e in made.state.events.values() if e.reason == "Unschedulable"][-1:]
    assert f"would have 6 of gpus/{model}, and its quota is 5" in waiting.message
    assert quotas.used(made.state, "default", [f"gpus/{model}"])[f"gpus/{model}"] == 2 * placed
    made.apply(Tenant(Meta("default"), {f"gpus/{model}": 6}))
    assert len(made.state.placements) == 3


@given(st.data())
def test_whatever_is_applied_and_deleted_a_tenant_never_grows_past_its_quota(data: st.DataObject) -> None:
    made = fleet(tenant(cpus=10_000, memory=8192, environments=4))
    for _ in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from("abcdef"))
        try:
            if data.draw(st.integers(0, 3)):
                cpus, memory = data.draw(st.integers(1, 8)), data.draw(st.integers(64, 6000))
                made.apply(environment(name, cpus=cpus, memory_mib=memory, replicas=data.draw(st.integers(0, 3))))
            else:
                made.delete("Environment", name)
        except CallerError:
            pass
        now = quotas.used(made.state, "default")
        assert now["cpus"] <= 10_000 and now["memory"] <= 8192 and now["environments"] <= 4


def test_quotas_are_read_in_the_units_of_their_names() -> None:
    message = resources.to_message(Tenant(Meta("t"), {"cpus": 2500, "memory": 2048, "gpus/H200": 3}))
    assert dict(message.tenant.spec.quotas) == {"cpus": "2500m", "memory": "2Gi", "gpus/H200": "3"}
    assert resources.from_message(message) == Tenant(Meta("t"), {"cpus": 2500, "memory": 2048, "gpus/H200": 3})


@pytest.mark.parametrize(("name", "text"), [("cpus", "x"), ("memory", "many"), ("environments", "1.5"), ("vfs", "-1")])
def test_a_quota_that_is_no_amount_is_named(name: str, text: str) -> None:
    message = resources.to_message(Tenant(Meta("t")))
    message.tenant.spec.quotas[name] = text
    with pytest.raises(InvalidSpec) as refused:
        resources.from_message(message)
    assert refused.value.violations[0].path == f"spec.quotas[{name}]"


def test_a_quota_that_nobody_keeps_is_refused() -> None:
    (found,) = check_tenant(Tenant(Meta("t"), {"horses": 1}))
    assert found.path == "spec.quotas[horses]"
