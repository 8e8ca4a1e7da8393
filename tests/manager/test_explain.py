"""``why``: every host is counted, near misses have numbers, and each suggestion, when applied, places the request."""

import random
from dataclasses import replace

import numpy as np
import pytest

from casemate_core.claims import HostClaims
from casemate_core.fit import CellPolicy, CpuPolicy, CpuRequest, GpuLink, GpuRequest, MemoryRequest, NicRequest, Request
from casemate_core.fit import ThreadPolicy as Threads
from casemate_core.spec.environment import Affinity
from casemate_core.spec.fleet import Taint
from casemate_core.topology_loaders import from_line
from casemate_manager.columns import HostView
from casemate_manager.scheduler.explain import Change, Explanation, elsewhere, explain
from casemate_manager.scheduler.explain_gang import explain_gang
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import DEFAULT_POLICY, Decision, PlacementPolicy, PlacementRequest, Unplaceable

LINE = "2s 8k/c 2t 64G 1G=16 hk=1 iso=2 gpu=4xH200:141G@fabric vf=1x2@fast disk=1T name={}"
DEDICATED = CpuPolicy.DEDICATED


def fleet(count: int = 3) -> Scheduler:
    made = Scheduler()
    for i in range(count):
        view = HostView(f"h{i}", from_line(LINE.format(f"h{i}")), HostClaims.empty(), labels={"rack": f"r{i}"})
        made.upsert_host(view)
    return made


def apply(made: Scheduler, request: PlacementRequest, change: Change) -> Decision | object:
    """Do what a suggestion says, then place. Moves are read from its sentence, as a person would."""
    words = change.sentence.split()
    if change.topology is not None:
        made.upsert_host(replace(made.columns.row(change.host).view, topology=change.topology))
        return made.place(change.request or request)
    if change.request is not None:
        return made.place(change.request)
    if words[0] == "uncordon":
        made.upsert_host(replace(made.columns.row(words[-1]).view, cordoned=False))
        return made.place(request)
    assert words[0] == "move", change.sentence
    uid, target = words[2], words[6]
    claim = made.release(change.host, uid)
    moved = made.place(KNOWN[uid], only=target)
    assert isinstance(moved, Decision) and claim.owner == uid
    made.apply_claim(moved.host, moved.claim, KNOWN[uid])
    return made.place(request)


KNOWN: dict[str, PlacementRequest] = {}


def known(uid: str) -> tuple[PlacementRequest, str] | None:
    return (KNOWN[uid], uid) if uid in KNOWN else None


def put(made: Scheduler, uid: str, request: Request, only: str = "") -> None:
    asked = KNOWN[uid] = PlacementRequest(uid, request)
    found = made.place(asked, only=only)
    assert isinstance(found, Decision)
    made.apply_claim(found.host, found.claim, asked)


def proved(made: Scheduler, request: PlacementRequest, answer: Explanation) -> None:
    """Each suggestion alone, on the fleet as it was, places the request."""
    assert answer.changes, answer
    views = [row.view for row in made.columns.live_rows()]
    for change in answer.changes:
        copy = Scheduler()
        for view in views:
            copy.upsert_host(view)
        assert isinstance(apply(copy, request, change), Decision), change


def test_what_fits_is_told_to_fit() -> None:
    answer = explain(fleet(), PlacementRequest("x", Request()), DEFAULT_POLICY)
    assert answer.decision is not None and answer.changes == () and answer.reasons == ()


def test_too_many_gpus_are_too_many_and_fewer_would_do() -> None:
    made = fleet()
    request = PlacementRequest(
        "x", Request(CpuRequest(2, policy=DEDICATED), MemoryRequest(1024), gpus=(GpuRequest(6),))
    )
    answer = explain(made, request, DEFAULT_POLICY)
    assert sum(count for _, count, _ in answer.reasons) == answer.hosts == 3
    assert len(answer.nearest) == 3 and any("6" in text for text in answer.nearest[0].messages)
    assert any(c.request is not None and c.request.request.gpus[0].count == 4 for c in answer.changes)
    proved(made, request, answer)


def test_a_cordoned_host_that_has_room_is_named_first() -> None:
    made = fleet()
    for i in range(3):
        put(
            made,
            f"g{i}",
            Request(CpuRequest(2, policy=DEDICATED), MemoryRequest(1024), gpus=(GpuRequest(1 + 2 * (i < 2)),)),
            f"h{i}",
        )
    made.upsert_host(replace(made.columns.row("h2").view, cordoned=True))
    request = PlacementRequest("x", Request(CpuRequest(2), MemoryRequest(1024), gpus=(GpuRequest(3),)))
    answer = explain(made, request, DEFAULT_POLICY)
    assert answer.changes[0] == Change("uncordon host h2", "h2", "casemate uncordon h2")
    proved(made, request, answer)


def test_moving_one_instance_makes_room() -> None:
    made = fleet(2)
    one = Request(CpuRequest(2, policy=DEDICATED), MemoryRequest(1024), gpus=(GpuRequest(1),))
    put(made, "a", one, "h0")
    put(made, "b", one, "h1")
    request = PlacementRequest("x", Request(CpuRequest(2), MemoryRequest(1024), gpus=(GpuRequest(4),)))
    answer = explain(made, request, DEFAULT_POLICY, movable=known)
    assert answer.changes[0].sentence in ("move instance a from h0 to h1", "move instance b from h1 to h0")
    proved(made, request, answer)


def test_rules_that_stand_in_the_way_are_told_and_loosened() -> None:
    made = fleet()
    for i in range(3):
        made.upsert_host(replace(made.columns.row(f"h{i}").view, taints=(Taint("gpu", "only"),)))
    request = PlacementRequest("x", Request())
    answer = explain(made, request, DEFAULT_POLICY)
    assert [c.sentence for c in answer.changes] == ["tolerate the taint gpu=only"]
    proved(made, request, answer)
    made = fleet()
    selected = PlacementRequest("x", Request(), node_selector={"rack": "r9"})
    answer = explain(made, selected, DEFAULT_POLICY)
    assert "drop the node selector rack=r9" in [c.sentence for c in answer.changes]
    assert "has rack=r0" in answer.nearest[0].messages[0]
    proved(made, selected, answer)
    near = PlacementRequest("x", Request(), affinity=(Affinity("near", {"app": "none"}, "host", True),))
    answer = explain(made, near, DEFAULT_POLICY)
    proved(made, near, answer)


def test_more_pages_on_the_cell_that_lacks_them_are_told_and_do_help() -> None:
    made = fleet(1)
    pages = Request(CpuRequest(2), MemoryRequest(6 * 1024, page_kib=1048576, cells=CellPolicy.ONE))
    for uid in ("a", "b"):  # one on each cell, each of which has eight pages
        put(made, uid, pages)
    request = PlacementRequest("x", replace(pages, memory=replace(pages.memory, size_mib=4 * 1024)))
    answer = explain(made, request, DEFAULT_POLICY)
    told = [c for c in answer.changes if c.topology is not None]
    assert {c.sentence for c in told} == {
        f"set aside 2 more pages of 1Gi on cell {cell} of the host (host h0)" for cell in (0, 1)
    }
    assert all(claim.memory_mib == 6 * 1024 for claim in made.columns.row("h0").claims)
    proved(made, request, answer)


def test_a_gang_is_told_how_far_it_came_and_changes_hold_for_all_of_it() -> None:
    made = fleet(3)  # 4 GPUs each
    made.upsert_host(replace(made.columns.row("h2").view, cordoned=True))
    asked = Request(CpuRequest(2, policy=DEDICATED), MemoryRequest(1024), gpus=(GpuRequest(3),))
    members = [PlacementRequest(f"x{i}", asked, "g") for i in range(3)]
    before = [row.view.claims for row in made.columns.live_rows()]
    answer = explain_gang(made, members, DEFAULT_POLICY)
    assert [row.view.claims for row in made.columns.live_rows()] == before
    assert answer.decision is None and answer.group.startswith("2 of 3 instances")
    sentences = [change.sentence for change in answer.changes]
    assert sentences[0] == "uncordon host h2" and "ask for 2 replicas" in sentences
    for change in answer.changes:
        copy = Scheduler()
        for row in made.columns.live_rows():
            opened = row.view.name == "h2" and change.sentence.startswith("uncordon")
            copy.upsert_host(replace(row.view, cordoned=row.view.cordoned and not opened))
        wanted = members
        if change.request is not None:
            wanted = [replace(change.request, uid=member.uid) for member in members]
        if change.sentence.startswith("ask for 2 replicas"):
            wanted = members[:2]
        assert not isinstance(copy.place_gang(wanted), Unplaceable), change
    # two more hosts would be needed now: what helps only the next one is not told
    five = [PlacementRequest(f"y{i}", asked, "g") for i in range(5)]
    assert "uncordon host h2" not in [c.sentence for c in explain_gang(made, five, DEFAULT_POLICY).changes]
    # each of them alone would fit, and so would all of two
    assert explain_gang(made, members[:2], DEFAULT_POLICY).decision is not None


def test_a_gang_is_told_the_most_cpus_that_all_of_it_can_have() -> None:
    made = fleet(3)  # 26 threads each for dedicated CPUs: a core of each cell is the host's, and two cores are isolated
    asked = Request(CpuRequest(20, policy=DEDICATED), MemoryRequest(1024))
    members = [PlacementRequest(f"x{i}", asked, "g") for i in range(4)]
    answer = explain_gang(made, members, DEFAULT_POLICY)
    told = answer.changes[0]
    assert told.request is not None
    most = told.request.request.cpu.count
    assert told.sentence.startswith(f"ask for at most {most} vCPUs")
    for count, fits in ((most, True), (most + 1, False)):
        tried = [replace(m, request=replace(asked, cpu=replace(asked.cpu, count=count))) for m in members]
        assert isinstance(made.place_gang(tried), Unplaceable) != fits
    assert sum("vCPUs" in change.sentence for change in answer.changes) == 1


def test_other_hosts_of_a_placed_instance_are_counted() -> None:
    made = fleet(4)
    put(made, "a", Request(CpuRequest(2), MemoryRequest(1024), gpus=(GpuRequest(4),)), "h0")
    put(made, "b", Request(CpuRequest(2), MemoryRequest(1024), gpus=(GpuRequest(2),)), "h1")
    made.upsert_host(replace(made.columns.row("h2").view, cordoned=True))
    answer = elsewhere(made, KNOWN["a"], DEFAULT_POLICY, "h0")
    assert answer.hosts == 3
    assert {text: count for text, count, _ in answer.reasons} == {
        "have too few free GPUs": 1,
        "are not open to new instances": 1,
        "have enough as well": 1,
    }


def test_policy_is_named_and_not_argued_with() -> None:
    made = fleet(2)
    rows = len(made.columns.available)
    allowed = [False] * rows
    policy = PlacementPolicy(
        allowed=np.array(allowed),
        denied=np.zeros(rows, dtype=np.int64),
        reasons=("policy gold (require[0])",),
    )
    answer = explain(made, PlacementRequest("x", Request()), policy)
    assert answer.changes == () and answer.nearest[0].messages == ("denied by policy gold (require[0])",)


def test_one_host_can_be_asked_about() -> None:
    made = fleet()
    put(made, "a", Request(CpuRequest(2), MemoryRequest(1024), gpus=(GpuRequest(4),)), "h1")
    request = PlacementRequest("x", Request(CpuRequest(2), MemoryRequest(1024), gpus=(GpuRequest(1),)))
    answer = explain(made, request, DEFAULT_POLICY, host="h1", movable=known)
    assert answer.decision is None and [m.host for m in answer.nearest] == ["h1"] and answer.hosts == 1
    assert explain(made, request, DEFAULT_POLICY, host="h0").decision is not None


@pytest.mark.parametrize("seed", range(4))
def test_every_suggestion_places_it_on_fleets_that_are_full(seed: int) -> None:
    rng = random.Random(seed)
    menu = (
        Request(CpuRequest(rng.randint(1, 6), policy=DEDICATED), MemoryRequest(2048), gpus=(GpuRequest(1),)),
        Request(CpuRequest(4, policy=DEDICATED, threads=Threads.ISOLATE), MemoryRequest(4096)),
        Request(CpuRequest(2), MemoryRequest(4096, page_kib=1048576, cells=CellPolicy.ONE)),
        Request(CpuRequest(2), MemoryRequest(1024), nics=(NicRequest("fast"),)),
        Request(CpuRequest(6, policy=DEDICATED), MemoryRequest(2048), gpus=(GpuRequest(2, link=GpuLink.NVLINK),)),
    )
    made = fleet(4)
    KNOWN.clear()
    for i in range(200):
        request = PlacementRequest(f"i{i}", rng.choice(menu))
        found = made.place(request)
        if isinstance(found, Decision):
            KNOWN[request.uid] = request
            made.apply_claim(found.host, found.claim, request)
            continue
        if rng.random() < 0.8:
            continue
        before = [row.view for row in made.columns.live_rows()]
        answer = explain(made, request, DEFAULT_POLICY, movable=known)
        assert [row.view for row in made.columns.live_rows()] == before
        assert answer.decision is None and sum(count for _, count, _ in answer.reasons) == 4
        if answer.changes:
            proved(made, request, answer)
