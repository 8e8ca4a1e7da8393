"""The scheduler: it finds a place whenever one exists, never gives anything twice, and keeps every rule."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_core.claims import Claim, HostClaims
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Overcommit,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.spec.environment import Affinity, Toleration
from casemate_core.spec.fleet import Taint
from casemate_core.topology import ShareProfile, Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.columns import HostView, UnknownHost
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import (
    BALANCE,
    SPREAD,
    Decision,
    PlacementPolicy,
    PlacementRequest,
    Unplaceable,
)
from support.hosts import host, names
from support.small_hosts import requests, topologies

LINE = "2s 8k/c 2t 64G 1G=16 hk=1 iso=2 gpu=4xH200:141G@fabric/10m vf=2x4@fast+slow disk=1T name={}"


def plain(cpus: int = 1, memory_mib: int = 1024, **fields: object) -> Request:
    return Request(CpuRequest(cpus), MemoryRequest(memory_mib), **fields)  # type: ignore[arg-type]


def dedicated(cpus: int, memory_mib: int = 1024, **fields: object) -> Request:
    return Request(CpuRequest(cpus, policy=CpuPolicy.DEDICATED), MemoryRequest(memory_mib), **fields)  # type: ignore[arg-type]


MENU = (
    plain(2, 2048),
    plain(1, 512, disk_mib=300_000),
    dedicated(3),
    dedicated(4, 8192, gpus=(GpuRequest(1),)),
    dedicated(8, 8192, gpus=(GpuRequest(2, link=GpuLink.NVLINK),)),
    plain(1, 1024, gpus=(GpuRequest(1, share_milli=300),)),
    dedicated(2, 2048, nics=(NicRequest("fast"),)),
    Request(
        CpuRequest(2, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.REQUIRE),
        MemoryRequest(4096, page_kib=1048576, cells=CellPolicy.ONE),
    ),
    Request(
        CpuRequest(2, threads=ThreadPolicy.ISOLATE, realtime=True),
        MemoryRequest(2048, page_kib=1048576, cells=CellPolicy.ONE),
    ),
    dedicated(20, 40_000, gpus=(GpuRequest(4),)),
)


def scheduler(count: int = 3, line: str = LINE, **fields: object) -> Scheduler:
    made = Scheduler()
    for i in range(count):
        made.upsert_host(HostView(f"h{i}", from_line(line.format(f"h{i}")), HostClaims.empty(), **fields))  # type: ignore[arg-type]
    return made


def labelled(racks: list[str]) -> Scheduler:
    made = Scheduler()
    for i, rack in enumerate(racks):
        view = HostView(
            f"h{i}", from_line(LINE.format(f"h{i}")), HostClaims.empty(), labels={"rack": rack} if rack else {}
        )
        made.upsert_host(view)
    return made


def put(made: Scheduler, request: PlacementRequest, policy: PlacementPolicy | None = None) -> str:
    """Place and apply; the host's name."""
    found = made.place(request) if policy is None else made.place(request, policy)
    assert isinstance(found, Decision), found
    assert made.commit(found, request)
    return found.host


def healthy(made: Scheduler) -> None:
    """No double booking, and columns that say what the claims say."""
    fresh = Scheduler()
    for row in made.columns.live_rows():
        assert row.view.claims.check(row.view.topology) == []
        fresh.upsert_host(replace(row.view))
    for row in made.columns.live_rows():
        mine, other = made.columns, fresh.columns
        twin = other.row(row.view.name)
        order = [mine.dimensions.index(name) for name in other.dimensions]
        assert mine.hosts.free[order, row.number].tolist() == other.hosts.free[:, twin.number].tolist()
        for a, b in zip(row.bins, twin.bins, strict=True):
            assert mine.cells.free[order, a].tolist() == other.cells.free[:, b].tolist()
            assert sorted(mine.cells.gpu[:, a])[::-1][: len(other.cells.gpu)] == sorted(other.cells.gpu[:, b])[::-1]
        assert mine.hosts.total[row.number] == other.hosts.total[twin.number]


# --- slices and labels of GPUs ---


def gpu_hosts() -> Scheduler:
    """Two hosts: one whose GPUs are cut in vGPUs of one size at a time, one with bare MIG instances; labels tell GPUs apart."""
    sizes = (ShareProfile("A100-10C", 250, 10240), ShareProfile("A100-20C", 500, 20480))
    made = Scheduler()
    for name, profiles, alike in (
        ("alike", sizes, True),
        ("mig", tuple(replace(p, bare=True) for p in sizes), False),
    ):
        topology = from_line(f"1s 8k/c 2t 64G gpu=2xA100:40G disk=1T name={name}")
        gpus = tuple(
            replace(g, share_profiles=profiles, share_alike=alike, labels=(("pool", f"{name}-{i}"),))
            for i, g in enumerate(topology.gpus)
        )
        made.upsert_host(HostView(name, replace(topology, gpus=gpus), HostClaims.empty()))
    return made


def asked(uid: str, **gpu: object) -> PlacementRequest:
    return PlacementRequest(uid, plain(gpus=(GpuRequest(**gpu),)))  # type: ignore[arg-type]


def test_slices_of_one_size_share_a_gpu_and_no_bare_mig_instance_is_promised() -> None:
    made = gpu_hosts()
    for n, size in enumerate(("A100-10C", "A100-20C", "A100-10C", "A100-20C")):
        assert put(made, asked(f"i{n}", share_profile=size)) == "alike"
        healthy(made)
    on = [share.gpu for n in (0, 2) for share in _claim(made, f"i{n}").shares]
    assert len(set(on)) == 1, "both small ones on one GPU, both large ones on the other"
    refused = made.place(asked("more", share_profile="A100-20C"))
    assert isinstance(refused, Unplaceable)
    made.release("alike", "i1")
    assert put(made, asked("more", share_profile="A100-20C")) == "alike"


def _claim(made: Scheduler, owner: str) -> Claim:
    return next(claim for claim in made.columns.row("alike").claims if claim.owner == owner)


def test_gpus_are_found_by_their_labels_on_whichever_host() -> None:
    made = gpu_hosts()
    for n, pool in enumerate(("mig-1", "alike-1", "alike-0", "mig-0")):
        assert put(made, asked(f"i{n}", labels=(("pool", pool),))) == pool.partition("-")[0]
        healthy(made)
    assert isinstance(made.place(asked("none", labels=(("pool", "other"),))), Unplaceable)


# --- it finds a place whenever one exists ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_places_exactly_when_some_host_fits(data: st.DataObject) -> None:
    """The slow twin asks every host; the vector filter must never lose one, whatever the machine."""
    made = Scheduler()
    machines = data.draw(st.lists(topologies(), min_size=1, max_size=4))
    for i, topology in enumerate(machines):
        made.upsert_host(HostView(f"h{i}", topology, HostClaims.empty()))
    placed: list[tuple[str, str]] = []
    overcommit = data.draw(st.sampled_from((Overcommit(), Overcommit(400, 150))))
    policy = PlacementPolicy(overcommit=overcommit)
    for step in range(data.draw(st.integers(1, 10))):
        request = data.draw(requests())
        fitting = {
            row.view.name
            for row in made.columns.live_rows()
            if isinstance(fit(row.view.topology, row.view.claims, request, owner="x", overcommit=overcommit), Fit)
        }
        found = made.place(PlacementRequest(f"i{step}", request), policy)
        if isinstance(found, Unplaceable):
            assert fitting == set(), (request, found)
            assert sum(found.counts.values()) == found.hosts == len(machines)
        else:
            assert found.host in fitting
            made.apply_claim(found.host, found.claim)
            placed.append((found.host, found.claim.owner))
        if placed and data.draw(st.booleans()):
            made.release(*placed.pop(data.draw(st.integers(0, len(placed) - 1))))
        healthy(made)


@pytest.mark.parametrize("name", names())
def test_a_named_machine_is_filled_until_nothing_fits(name: str) -> None:
    topology = host(name)
    made = Scheduler()
    made.upsert_host(HostView(name, topology, HostClaims.empty()))
    rng, step = random.Random(name), 0
    open_menu = list(MENU)
    while open_menu and step < 400:
        step += 1
        request = rng.choice(open_menu)
        row = made.columns.row(name)
        twin = fit(row.view.topology, row.view.claims, request, owner="x")
        found = made.place(PlacementRequest(f"i{step}", request))
        assert isinstance(found, Decision) == isinstance(twin, Fit)
        if isinstance(found, Decision):
            made.apply_claim(name, found.claim)
        else:
            open_menu.remove(request)
    assert made.columns.row(name).claims.check(topology) == []


def test_nothing_is_given_twice_under_churn() -> None:
    made, rng = scheduler(4), random.Random(7)
    live: list[tuple[str, str]] = []
    for step in range(600):
        if live and rng.random() < 0.4:
            made.release(*live.pop(rng.randrange(len(live))))
        found = made.place(PlacementRequest(f"i{step}", rng.choice(MENU)))
        if isinstance(found, Decision):
            assert made.commit(found)
            live.append((found.host, found.claim.owner))
        if step % 50 == 0:
            healthy(made)
    assert len(live) > 20
    healthy(made)


# --- decisions and commits ------------------------------------------------------------------------------------------------


def test_the_same_fleet_and_request_give_the_same_decision() -> None:
    def story() -> list[object]:
        made = scheduler(5)
        told: list[object] = []
        for step in range(60):
            found = made.place(PlacementRequest(f"i{step}", MENU[step % len(MENU)]))
            told.append(found)
            if isinstance(found, Decision):
                made.apply_claim(found.host, found.claim)
        return told

    assert story() == story()


def test_a_question_changes_nothing() -> None:
    made = scheduler()
    before = [row.view for row in made.columns.live_rows()]
    first = made.place(PlacementRequest("a", MENU[3]), note=False)
    assert made.place(PlacementRequest("a", MENU[3]), note=False) == first
    assert [row.view for row in made.columns.live_rows()] == before


def test_a_decision_that_was_overtaken_is_not_committed() -> None:
    made = scheduler(1)
    whole = dedicated(8, 8192, gpus=(GpuRequest(4),))
    first, second = made.place(PlacementRequest("a", whole)), made.place(PlacementRequest("b", whole))
    assert isinstance(first, Decision) and isinstance(second, Decision)
    assert made.commit(first) and not made.commit(second)
    healthy(made)


def test_a_decision_beside_an_unrelated_change_still_holds() -> None:
    made = scheduler(1)
    small = made.place(PlacementRequest("a", plain()))
    put(made, PlacementRequest("b", dedicated(8, 8192, gpus=(GpuRequest(4),))))
    assert isinstance(small, Decision) and made.commit(small)
    made.upsert_host(replace(made.columns.row("h0").view, cordoned=True, generation=99))
    late = made.place(PlacementRequest("c", plain()))
    assert isinstance(late, Unplaceable)


def test_what_was_refused_is_asked_again_when_the_host_changed() -> None:
    made = scheduler(1)
    whole = dedicated(4, gpus=(GpuRequest(4),))
    put(made, PlacementRequest("a", whole))
    assert isinstance(made.place(PlacementRequest("b", whole)), Unplaceable)
    made.release("h0", "a")
    assert isinstance(made.place(PlacementRequest("b", whole)), Decision)


def test_refusals_count_each_host_once_by_what_rejects_it() -> None:
    made = labelled(["a", "b", ""])
    made.upsert_host(replace(made.columns.row("h1").view, cordoned=True))
    found = made.place(PlacementRequest("x", dedicated(2, 10**7), node_selector={"rack": "a"}))
    assert isinstance(found, Unplaceable)
    assert found.counts == {
        "are not open to new instances": 1,
        "lack a label of the node selector": 1,
        "have too little memory": 1,
    }
    assert found.samples["have too little memory"] == "h0"
    assert "0 of 3 hosts" in found.sentence


def test_things_that_nobody_has_are_named() -> None:
    made = scheduler(2)
    absent = made.place(PlacementRequest("x", plain(gpus=(GpuRequest(1, model="B300"),))))
    assert isinstance(absent, Unplaceable) and absent.counts == {"have no GPU of model B300": 2}
    pages = made.place(PlacementRequest("x", Request(memory=MemoryRequest(2048, page_kib=2048))))
    assert isinstance(pages, Unplaceable) and pages.counts == {"have no pages of 2048 KiB": 2}
    assert isinstance(made.place(PlacementRequest("x", plain(nics=(NicRequest("none"),)))), Unplaceable)


def test_hosts_come_change_and_go() -> None:
    made = scheduler(0)
    assert isinstance(made.place(PlacementRequest("x", plain())), Unplaceable)
    for i in range(200):  # past several sizes of the arrays
        made.upsert_host(HostView(f"h{i}", from_line(f"1s 2k/c 4G name=h{i}"), HostClaims.empty()))
    made.upsert_host(HostView("big", from_line(LINE.format("big")), HostClaims.empty()))
    assert put(made, PlacementRequest("g", plain(gpus=(GpuRequest(1),)))) == "big"
    made.remove_host("big")
    assert isinstance(made.place(PlacementRequest("g2", plain(gpus=(GpuRequest(1),)))), Unplaceable)
    for i in range(199):
        made.remove_host(f"h{i}")
    assert put(made, PlacementRequest("p", plain())) == "h199"
    with pytest.raises(UnknownHost):
        made.remove_host("h0")
    bigger = from_line("1s 4k/c 8G name=h199")
    made.upsert_host(replace(made.columns.row("h199").view, topology=bigger))
    assert put(made, PlacementRequest("q", plain(3))) == "h199"
    healthy(made)


def test_one_host_may_be_asked_for() -> None:
    made = scheduler(3)
    found = made.place(PlacementRequest("a", plain()), only="h2")
    assert isinstance(found, Decision) and found.host == "h2"


# --- rules ----------------------------------------------------------------------------------------------------------------


def test_selectors_taints_and_cordons_keep_away() -> None:
    made = labelled(["a", "b", "b"])
    assert put(made, PlacementRequest("1", plain(), node_selector={"rack": "b"})) in ("h1", "h2")
    taint = Taint("gpu", "yes")
    for name in ("h0", "h1"):
        made.upsert_host(replace(made.columns.row(name).view, taints=(taint,)))
    assert put(made, PlacementRequest("2", plain())) == "h2"
    tolerant = (Toleration("gpu", "Equal", "yes"),)
    rack_a = PlacementRequest("3", plain(), node_selector={"rack": "a"}, tolerations=tolerant)
    assert put(made, rack_a) == "h0"
    assert isinstance(made.place(replace(rack_a, tolerations=(Toleration("gpu", "Equal", "no"),))), Unplaceable)
    assert isinstance(made.place(replace(rack_a, tolerations=(Toleration(),))), Decision)
    made.upsert_host(replace(made.columns.row("h2").view, available=False))
    assert isinstance(made.place(PlacementRequest("4", plain())), Unplaceable)


def test_a_taint_that_prefers_only_pushes() -> None:
    made = labelled(["", ""])
    made.upsert_host(replace(made.columns.row("h0").view, taints=(Taint("old", "", "PreferNoSchedule"),)))
    assert put(made, PlacementRequest("a", plain())) == "h1"
    made.upsert_host(replace(made.columns.row("h1").view, cordoned=True))
    assert put(made, PlacementRequest("b", plain())) == "h0"


def test_required_distance_holds_both_ways_and_ends_with_the_instance() -> None:
    made = labelled(["a", "a", "b"])
    apart = (Affinity("apart", {"app": "db"}, "rack", True),)
    db = PlacementRequest("db-0", plain(), labels={"app": "db"}, affinity=apart)
    first = put(made, db)
    second = put(made, replace(db, uid="db-1"))
    racks = {made.columns.row(h).view.labels["rack"] for h in (first, second)}
    assert racks == {"a", "b"}
    assert isinstance(made.place(replace(db, uid="db-2")), Unplaceable)
    # one that asks for nothing is kept away from those that asked for distance from its like
    assert isinstance(made.place(PlacementRequest("db-3", plain(), labels={"app": "db"})), Unplaceable)
    assert isinstance(made.place(PlacementRequest("web", plain(), labels={"app": "web"})), Decision)
    made.release(second, "db-1")
    assert isinstance(made.place(replace(db, uid="db-2")), Decision)


def test_required_nearness_follows_and_the_first_of_a_group_may_start() -> None:
    made = labelled(["a", "b", ""])
    near = (Affinity("near", {"app": "cache"}, "rack", True),)
    assert isinstance(made.place(PlacementRequest("w", plain(), affinity=near)), Unplaceable)
    pair = PlacementRequest("c-0", plain(), labels={"app": "cache"}, affinity=near)
    start = put(made, pair, PlacementPolicy())
    assert start in ("h0", "h1")
    assert put(made, PlacementRequest("w", plain(), affinity=near)) == start


def test_preferred_rules_give_way() -> None:
    made = labelled(["a", "b"])
    put(made, PlacementRequest("x", plain(), labels={"app": "noisy"}, node_selector={"rack": "a"}))
    apart = (Affinity("apart", {"app": "noisy"}, "host", False),)
    near = (Affinity("near", {"app": "noisy"}, "host", False),)
    assert put(made, PlacementRequest("y", plain(), affinity=apart)) == "h1"
    assert put(made, PlacementRequest("z", plain(), affinity=near)) == "h0"
    only_a = PlacementRequest("q", plain(), affinity=apart, node_selector={"rack": "a"})
    assert put(made, only_a) == "h0"


def test_spreading_evens_out_over_a_label() -> None:
    made = labelled(["a", "a", "a", "b", "c"])
    counts: dict[str, int] = {}
    for i in range(9):
        name = put(made, PlacementRequest(f"s{i}", plain(), group="env", spread_by="rack"))
        rack = made.columns.row(name).view.labels["rack"]
        counts[rack] = counts.get(rack, 0) + 1
    assert counts == {"a": 3, "b": 3, "c": 3}
    hosts = {
        put(made, PlacementRequest(f"t{i}", plain(), group="e2"), PlacementPolicy(strategy=SPREAD)) for i in range(5)
    }
    assert len(hosts) == 5


def test_balance_goes_to_the_emptiest_and_pack_does_not() -> None:
    made = scheduler(4)
    balanced = [
        put(made, PlacementRequest(f"b{i}", plain(4, 4096)), PlacementPolicy(strategy=BALANCE)) for i in range(4)
    ]
    assert sorted(balanced) == ["h0", "h1", "h2", "h3"]
    made = scheduler(4)
    assert len({put(made, PlacementRequest(f"p{i}", plain(1, 1024))) for i in range(8)}) == 1


def test_overcommit_is_the_policys() -> None:
    made = scheduler(1, "1s 4k/c 8G name={}")
    assert isinstance(made.place(PlacementRequest("a", plain(8))), Unplaceable)
    assert isinstance(
        made.place(PlacementRequest("a", plain(8)), PlacementPolicy(overcommit=Overcommit(200, 100))), Decision
    )


def test_a_gang_is_placed_whole_or_not_at_all() -> None:
    made = scheduler(2)
    members = [PlacementRequest(f"g{i}", dedicated(4, gpus=(GpuRequest(2),)), group="g") for i in range(4)]
    found = made.place_gang(members)
    assert isinstance(found, tuple) and [d.uid for d in found] == [m.uid for m in members]
    assert all(len(row.claims) == 0 for row in made.columns.live_rows())
    for decision, member in zip(found, members, strict=True):
        assert made.commit(decision, member)
    healthy(made)
    assert isinstance(made.place_gang([replace(m, uid=m.uid + "x") for m in members[:1]]), Unplaceable)
    two = scheduler(2)
    too_many = [PlacementRequest(f"g{i}", dedicated(4, gpus=(GpuRequest(2),))) for i in range(5)]
    assert isinstance(two.place_gang(too_many), Unplaceable)
    assert all(len(row.claims) == 0 for row in two.columns.live_rows())


def test_many_cells_cost_no_more_than_their_number() -> None:
    """34 cells, two with CPUs: no subset is enumerated, so this returns at all."""
    topology: Topology = host("gb200")
    made = Scheduler()
    made.upsert_host(HostView("gb", topology, HostClaims.empty()))
    total = topology.memory_mib
    found = made.place(PlacementRequest("a", plain(8, total // 2)))
    assert isinstance(found, Decision | Unplaceable)
