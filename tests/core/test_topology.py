"""Topologies: named machines, the plain form, the rules, the one-line grammar and the derived masks."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from casemate_core.cpuset import CpuSet
from casemate_core.plain import BadPlain
from casemate_core.topology import (
    Cell,
    Core,
    CoreKind,
    FabricPartition,
    PagePool,
    PciPlace,
    ShareProfile,
    Topology,
    TopologyRule,
    VirtualFunction,
    check,
)
from casemate_core.topology.functions import distance
from casemate_core.topology_loaders import BadLine, from_line
from support.hosts import CONSTRUCTED, FOLDER, host, names, text_of
from support.small_hosts import topologies

SMALL = "1s 2c/s 4k/c 2t 16G 2M=64 hk=1 iso=1 gpu=4xL4@nvlink/mig vf=2x4 dev=2xfec name=small"


@pytest.mark.parametrize("name", sorted(CONSTRUCTED))
def test_constructed_machine_is_what_its_file_says(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == text_of(CONSTRUCTED[name]())


@pytest.mark.parametrize("name", names())
def test_machine_is_sound_and_tells_where_it_is_from(name: str) -> None:
    assert check(host(name)) == []
    assert len(json.loads((FOLDER / f"{name}.json").read_text())["provenance"]) > 20
    assert host(name).name == name


def test_machines_are_what_their_names_promise() -> None:
    gb200 = host("gb200")
    assert len(gb200.cells) == 34
    assert [c.id for c in gb200.index.cpu_cells] == [0, 1]
    snc4 = host("xeon-snc4")
    assert (len(snc4.cells), len(snc4.index.cpu_cells)) == (16, 8)
    assert len(host("epyc-nps1").index.cells[0].l3) == 8
    assert [len(cell.l3) for cell in host("epyc-nps4").index.cells] == [2] * 8
    assert {core.kind for core in host("laptop").cores} == {CoreKind.PERFORMANCE, CoreKind.EFFICIENCY}
    hgx = host("hgx-h200")
    assert [g.module_id for g in hgx.gpus] != sorted(g.module_id for g in hgx.gpus)
    assert sorted(len(p.gpus) for p in hgx.partitions) == [1] * 8 + [2] * 4 + [4, 4, 8]
    assert all(distance(g.place, p.place) == 0 for g, p in zip(hgx.gpus, hgx.pfs, strict=True))
    ran = host("ran-edge")
    assert [len(pf.vfs) for pf in ran.pfs] == [32] * 4
    assert len(ran.devices) == 2
    assert {len(core.threads) for core in host("offlined").cores} == {1, 2}
    assert host("offlined").offline == CpuSet.parse("5,21,30")
    assert [c.id for c in host("uneven").cells] == [0, 2, 5]


@pytest.mark.parametrize("name", names())
def test_plain_form_returns(name: str) -> None:
    topology = host(name)
    again = Topology.from_dict(json.loads(json.dumps(topology.to_dict())))
    assert again == topology
    assert again.name == topology.name


@settings(max_examples=50)
@given(topologies())
def test_plain_form_of_any_topology_returns(topology: Topology) -> None:
    assert Topology.from_dict(json.loads(json.dumps(topology.to_dict()))) == topology


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"colour": "red"}, "colour"),
        ({"cells": 3}, "cells"),
        ({"cells": [{"id": 0}]}, "cells[0].memory_mib"),
        ({"cells": [{"id": 0, "memory_mib": True}]}, "cells[0].memory_mib"),
        ({"cells": [{"id": 0, "memory_mib": 1, "size": 2}]}, "cells[0].size"),
        ({"disk_mib": "1"}, "disk_mib"),
        ({"pfs": [{"mac": "a", "networks": [], "vfs": [{"index": 10**12}]}]}, "pfs[0].vfs"),
        ({"gpus": [{"uuid": "a", "model": "a", "memory_mib": 1, "share_slots": 10**12}]}, "gpus[0]"),
        ({"gpus": [{"uuid": 1, "model": "a", "memory_mib": 1}]}, "gpus[0].uuid"),
    ],
)
def test_plain_form_is_strict(change: dict[str, Any], path: str) -> None:
    with pytest.raises(BadPlain) as caught:
        Topology.from_dict({**from_line(SMALL).to_dict(), **change})
    assert caught.value.path == path


def test_plain_form_needs_its_parts() -> None:
    plain = from_line(SMALL).to_dict()
    del plain["cores"]
    with pytest.raises(BadPlain, match="cores"):
        Topology.from_dict(plain)
    with pytest.raises(BadPlain):
        Topology.from_dict([])


def broken_ones() -> dict[TopologyRule, Topology]:
    """For each rule a topology that breaks it."""
    t = from_line(SMALL)
    cells, cores, gpus, pfs = t.cells, t.cores, t.gpus, t.pfs
    return {
        TopologyRule.AMOUNTS: replace(t, disk_mib=-1),
        TopologyRule.CELL_IDS: replace(t, cells=(cells[1], cells[0])),
        TopologyRule.CELL_MEMORY: replace(t, cells=(replace(cells[0], pools=(PagePool(1 << 20, 9),)), cells[1])),
        TopologyRule.CELL_DISTANCES: replace(t, cells=(replace(cells[0], distances=(10,)), cells[1])),
        TopologyRule.CORE_IDS: replace(t, cores=(cores[1], cores[0], *cores[2:])),
        TopologyRule.CORE_THREADS: replace(t, cores=(*cores, Core(99, 0, 0, 0, cores[0].threads))),
        TopologyRule.CORE_CELL: replace(t, cores=(replace(cores[0], cell=7), *cores[1:])),
        TopologyRule.CACHE_GROUP: replace(t, cores=(replace(cores[0], socket=1), *cores[1:])),
        TopologyRule.OFFLINE: replace(t, offline=CpuSet.of(0)),
        TopologyRule.THREAD_SETS: replace(t, reserved=CpuSet.of(900)),
        TopologyRule.IDENTITIES: replace(t, pfs=(pfs[0], replace(pfs[1], mac=pfs[0].mac))),
        TopologyRule.PLACES: replace(t, gpus=(replace(gpus[0], place=PciPlace(cell=9)), *gpus[1:])),
        TopologyRule.FABRIC: replace(t, partitions=(FabricPartition(0, ("GPU-of-nobody",)),)),
        TopologyRule.SHARES: replace(
            t, gpus=(replace(gpus[0], share_profiles=(ShareProfile("a", 1000, 1),)), *gpus[1:])
        ),
    }


@pytest.mark.parametrize("rule", TopologyRule)
def test_each_rule_is_enforced(rule: TopologyRule) -> None:
    found = check(broken_ones()[rule])
    assert {violation.rule for violation in found} == {rule}
    assert rule.value in str(found[0])


def test_more_ways_to_break_a_rule() -> None:
    t = from_line(SMALL)
    one_sided = replace(t, gpus=(replace(t.gpus[0], peers=()), *t.gpus[1:]))
    twice = replace(t, cells=(replace(t.cells[0], pools=t.cells[0].pools * 2), t.cells[1]))
    both = replace(t, isolated=t.isolated | t.reserved)
    backwards = replace(t, pfs=(replace(t.pfs[0], vfs=(VirtualFunction(1), VirtualFunction(0))), t.pfs[1]))
    none = replace(t, cores=(*t.cores, Core(99, 0, 0, 0, CpuSet())))
    negative = replace(t, cells=(Cell(0, -1), t.cells[1]))
    wide = replace(t, gpus=(replace(t.gpus[0], share_step_milli=1000), *t.gpus[1:]))
    assert all(check(bad) for bad in (one_sided, twice, both, backwards, none, negative, wide))


def test_line_says_all_it_can() -> None:
    t = from_line(
        "2s 2c/s 4k/c 2k/l3 2t 64G rmem=4G 1G=8 2M=1024 hk=1 iso=2 off=3 disk=2T mem=2x8G sib=pairs name=all "
        "gpu=2xH200:141G@fabric gpu=1xL4/250m gpu=1xA2/4 vf=2x4@a+b!vlan dev=1xfec dev=2xnvme"
    )
    assert (len(t.cells), len(t.cores), t.name, t.disk_mib) == (6, 16, "all", 2 << 20)
    assert t.memory_mib == (64 + 16) * 1024
    assert [p.count for p in t.cells[0].pools] == [256, 2]
    assert t.cells[0].reserved_mib == 1024
    assert t.cores[1].threads == CpuSet.of(2)
    assert {core.l3 for core in t.cores} == set(range(8))
    assert t.reserved == CpuSet.parse("0-1,8-9,16-17,24-25")
    assert t.isolated == CpuSet.parse("4-7,12-15,20-23,28-31")
    assert sorted({g.model for g in t.gpus}) == ["A2", "H200", "L4"]
    assert [p.gpus for p in t.partitions if len(p.gpus) == 2]
    assert t.pfs[0].networks == ("a", "b")
    assert t.pfs[0].capabilities == ("vlan",)
    assert [dict(d.labels)["type"] for d in t.devices] == ["fec", "nvme", "nvme"]
    assert t.cells[0].distances == (10, 12, 32, 32, 40, 40)
    assert from_line("name=all 2s") == from_line("2s name=all")


@pytest.mark.parametrize(
    "line",
    [
        "banana",
        "2s 3s",
        "0s",
        "16G 16G",
        "hk=3 2k/c",
        "gpu=H200",
        "gpu=1xH200/1",
        "vf=4",
        "dev=fec",
        "mem=4",
        "off=9-1",
        "sib=odd",
        "1G=99 4G",
        "9999k/c",
        "disk=lots",
        "hk=one",
        "name=a name=b",
    ],
)
def test_bad_lines_are_refused(line: str) -> None:
    with pytest.raises(BadLine):
        from_line(line)


def test_index_of_mixed_cores() -> None:
    index = host("offlined").index
    # 16 cores with siblings k and k+16; threads 5, 21 (both of core 5) and 30 (of core 14) are offline
    shapes = [[(shape.offsets, shape.first.bit_count()) for shape in cell.classes] for cell in index.cells]
    assert shapes == [[((16,), 7)], [((16,), 7), ((), 1)]]
    assert index.smt_width == 2
    assert index.online.bit_count() == 29
    assert 5 not in index.siblings
    assert index.siblings[14] == 1 << 14


def test_half_isolated_core_is_for_nobody() -> None:
    t = from_line("1s 4k/c 2t 4G name=half")
    index = replace(t, isolated=CpuSet.of(0, 1, 5)).index
    assert CpuSet(index.isolated) == CpuSet.of(1, 5)
    assert CpuSet(index.pool) == CpuSet.parse("2-4,6-7")  # 0 is in neither, its sibling stays in the pool


def test_distance_follows_the_tree() -> None:
    a = PciPlace(("r0", "s0"), 0)
    assert distance(a, PciPlace(("r0", "s0", "s1"), 0)) == 0
    assert distance(a, PciPlace(("r0", "s9"), 0)) == 1
    assert distance(a, PciPlace(("r0",), 0)) == 1
    assert distance(a, PciPlace(("r1", "s0"), 0)) == 2
    assert distance(a, PciPlace((), 1)) == 3
    assert distance(PciPlace(), PciPlace()) == 3
