"""Capacity as operators get it: of a host, of a fleet, and the same after changes as if it had never been asked before."""

from collections import Counter
from typing import Any

import pytest

from casemate_core.claims import Claim, HostClaims, PlainMemory, SharedCpu
from casemate_core.cpuset import CpuSet
from casemate_core.errors import InvalidSpec, NotFound
from casemate_core.topology import Topology
from casemate_manager.api import top as module
from casemate_manager.api.top import Top
from casemate_manager.fleet.commands import HostFacts
from casemate_manager.scheduler.capacity import capacity
from casemate_manager.scheduler.headroom import COUNT, Group, Summaries, summarise
from casemate_wire.stream import Facts, HostReport
from casemate_wire.v1 import top_pb2 as pb
from support.hosts import host, names
from support.small_fleet import SmallFleet, environment, image, network

LINE = "1s 4k/c 2t 8G hk=1 disk=100G"


def fleet() -> SmallFleet:
    made = SmallFleet()
    made.apply(image(), network())
    for name in ("h1", "h2"):
        made.join(name, line=LINE)
    made.hello("h3", 1)
    return made


async def ask(made: SmallFleet, top: Top | None = None, **request: Any) -> pb.TopResponse:
    return await (top or Top()).top(made.state, made.observed, pb.TopRequest(**request))


def amounts(found: pb.CapacityGroup | pb.HostCapacity | pb.HostHeadroom) -> dict[str, tuple[int, int, int, int]]:
    return {a.name: (a.amount.total, a.amount.used, a.amount.free, a.amount.stranded) for a in found.amounts}


async def test_a_fleet_counts_what_it_knows_and_what_it_does_not() -> None:
    made = fleet()
    found = (await ask(made)).fleet
    (whole,) = found.groups
    assert (whole.all, whole.hosts, whole.unknown, whole.closed) == (True, 3, 1, 1)
    assert amounts(whole)["threads"] == (12, 0, 12, 0)
    assert [(c.kind, c.cells) for c in whole.cells] == [("cpu", 2)]
    assert sorted(h.name for h in found.hosts) == ["h1", "h2"]


async def test_numbers_that_are_kept_are_those_that_are_made_anew() -> None:
    made, kept = fleet(), Top()
    for step in range(6):
        if step in (1, 2, 3):
            made.apply(environment(f"e{step}", cpus=step))
        elif step == 4:
            made.delete("Environment", "e2")
            made.obey("h1")
            made.obey("h2")
        elif step == 5:
            claim = Claim("foreign:x", memory=(PlainMemory(0, 1024, 0, 1024),), shared=(SharedCpu(0, 1500),))
            made.do(HostFacts("h2", 1, Facts(2, True, (), (), HostReport(foreign=1, foreign_claims=(claim,)))))
            assert amounts((await ask(made, kept, host="h2")).host)["memory_mib"][1] >= 1024
        questions: tuple[dict[str, Any], ...] = ({}, {"group_by": "rack"}, {"host": "h1"})
        for request in questions:
            assert await ask(made, kept, **request) == await ask(made, **request), step
    used = amounts((await ask(made, kept)).fleet.groups[0])["memory_mib"][1]
    assert used == sum(
        m.charged_mib for h in ("h1", "h2") for c in made.state.host_claims(h, made.observed) for m in c.memory
    )


async def test_a_host_names_who_holds_what() -> None:
    made = fleet()
    made.apply(environment("one", cpus=2))
    (placement,) = made.state.placements.values()
    found = (await ask(made, host=placement.host)).host
    assert [(h.tenant, h.instance) for h in found.holders] == [("default", "one-0")]
    states = Counter(t.state for cell in found.cells for cache in cell.caches for c in cache.cores for t in c.threads)
    assert states["housekeeping"] == 2
    assert states["held"] + states["shared"] == 2
    assert sum(states.values()) == 8


async def test_what_cannot_be_told() -> None:
    made = fleet()
    with pytest.raises(NotFound):
        await ask(made, host="nobody")
    with pytest.raises(InvalidSpec, match="has not told"):
        await ask(made, host="h3")
    with pytest.raises(InvalidSpec):
        await ask(made, selector="a in (")


async def test_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fleet()
    assert [g.value for g in (await ask(made, group_by="rack")).fleet.groups] == ["", ""]
    monkeypatch.setattr(module, "MAX_GROUPS", 0)
    with pytest.raises(InvalidSpec, match="values"):
        await ask(made, group_by="rack")


def test_sums_are_the_sums() -> None:
    """All machines together, against sums made by hand."""
    group, summaries = Group(), Summaries()
    machines: list[Topology] = [host(name) for name in names()]
    for topology in (*machines, *machines):
        group.add(summaries.of(topology.name, topology, HostClaims.empty()), closed=False)
    group.add(None, closed=True)
    assert (group.hosts, group.unknown, group.closed) == (2 * len(machines) + 1, 1, 1)
    found = group.amounts()
    assert found[""]["threads"].total == 2 * sum((t.index.pool | t.index.isolated).bit_count() for t in machines)
    assert found[""]["gpus"].total == 2 * sum(len(t.gpus) for t in machines)
    assert sum(found[kind][COUNT].total for kind in ("cpu", "gpu", "memory")) == 2 * sum(len(t.cells) for t in machines)
    assert (
        sum(found[kind]["memory_mib"].total for kind in ("cpu", "gpu", "memory") if kind in found)
        == found[""]["memory_mib"].total
    )


def test_hosts_are_ordered_by_what_is_stranded() -> None:
    topology = host("hgx-h200")
    taken = tuple(CpuSet(topology.index.cells[0].pool))
    claims = HostClaims.of([Claim("a", vcpus=taken, vcpus_online=len(taken), vcpus_max=len(taken))])
    assert summarise(capacity(topology, HostClaims.empty())).stranded_milli == 0
    # of memory, pages, GPUs and VFs a half each, and no thread
    assert summarise(capacity(topology, claims)).stranded_milli == 4 * 500


def test_a_host_that_is_gone_is_forgotten() -> None:
    summaries = Summaries()
    topology = host("laptop")
    first = summaries.of("a", topology, HostClaims.empty())
    summaries.keep(["a", "b"])
    assert summaries.of("a", topology, HostClaims.empty()) is first
    summaries.keep(["b"])
    assert summaries.of("a", topology, HostClaims.empty()) is not first
