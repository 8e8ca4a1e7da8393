"""Reasons, remedies and suggestions: closed, told in words, and proved by fitting again."""

import typing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_core import reasons
from casemate_core.claims import Claim, HostClaims, PlainMemory, verify_claim
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Refusal,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.fit.remedies import apply, apply_all, suggestions
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from support.hosts import host
from support.small_hosts import requests, topologies

GIB = 1024
REASONS = typing.get_args(reasons.Reason)
REMEDIES = typing.get_args(reasons.Remedy)


def test_the_sets_are_closed_and_complete() -> None:
    public = {getattr(reasons, name) for name in reasons.__all__} - {reasons.Reason, reasons.Remedy}
    assert public == set(REASONS) | set(REMEDIES)
    for kind in (*REASONS, *REMEDIES):
        assert kind.__doc__
        assert isinstance(kind.sentence, property)
    for kind in REASONS:
        assert isinstance(kind.remedies, property)


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        (reasons.ThreadsShort(4, 2, 1), "4 dedicated threads asked, 2 free on cell 1"),
        (reasons.PagesShort(16, 14, 1 << 20, 1), "16 pages of 1Gi asked, 14 free on cell 1"),
        (reasons.MemoryShort(2048, 512), "2Gi of memory asked, 512Mi free"),
        (reasons.SharedCpuShort(1500, 250, 1, 0), "1.5 shared CPUs asked (after overcommit), 0.25 free on cell 0"),
        (reasons.GpusShort(0, 4, 1, "*H200*", 8), "4 GPUs *H200* asked, 1 free of 8"),
        (reasons.NoPagePool(2048, ()), "huge pages of 2Mi asked, this host has pools of: none"),
        (reasons.MorePages(1, 1 << 20, 2), "set aside 2 more pages of 1Gi on cell 1 of the host"),
    ],
)
def test_sentences(reason: reasons.Reason | reasons.Remedy, sentence: str) -> None:
    assert reason.sentence == sentence


def refusal_of(topology: Topology, claims: HostClaims, request: Request) -> Refusal:
    found = fit(topology, claims, request)
    assert isinstance(found, Refusal)
    return found


def ways_out(
    topology: Topology, request: Request, claims: HostClaims | None = None
) -> list[tuple[reasons.Remedy, ...]]:
    beside = claims or HostClaims.empty()
    found = suggestions(topology, beside, request, refusal_of(topology, beside, request))
    for way in found:
        assert way.sentence
        assert verify_claim(way.topology, beside, replace(way.fit.claim, owner="new")) == []
    return [way.remedies for way in found]


def test_two_more_pages() -> None:
    request = Request(memory=MemoryRequest(18 * GIB, page_kib=1 << 20, cells=CellPolicy.ONE))
    assert (reasons.MorePages(0, 1 << 20, 2),) in ways_out(host("epyc-nps4"), request)


def test_share_the_siblings_or_ask_for_fewer() -> None:
    small = from_line("1s 4k/c 2t 8G hk=1 name=s")
    isolate = CpuRequest(4, policy=CpuPolicy.DEDICATED, threads=ThreadPolicy.ISOLATE)
    found = ways_out(small, Request(isolate))
    assert found[:2] == [(reasons.RelaxThreads(),), (reasons.FewerCpus(3),)]


def test_other_gpus() -> None:
    hgx = host("hgx-h200")
    taken = HostClaims.of([Claim("x", gpus=(hgx.gpus[0].uuid,)), Claim("y", gpus=(hgx.gpus[7].uuid,))])
    found = ways_out(hgx, Request(gpus=(GpuRequest(4, link=GpuLink.NVLINK),)), taken)
    assert (reasons.RelaxLink(0),) in found
    assert (reasons.AnyModel(0),) in ways_out(hgx, Request(gpus=(GpuRequest(1, "B200"),)))


def test_two_changes_where_one_is_not_enough() -> None:
    small = from_line("1s 4k/c 8G hk=1 disk=10G name=s")
    found = ways_out(small, Request(CpuRequest(4, policy=CpuPolicy.DEDICATED), disk_mib=20 * GIB))
    assert found[0] == (reasons.LessDisk(10 * GIB), reasons.FewerCpus(3))


def test_no_way_out_is_no_suggestion() -> None:
    assert ways_out(host("laptop"), Request(gpus=(GpuRequest(1),), nics=(NicRequest("moon"),) * 4)) == []


def test_pages_are_not_taken_from_under_others() -> None:
    small = from_line("1s 4k/c 4G 1G=1 name=s")
    full = HostClaims.of([Claim("x", memory=(PlainMemory(0, 3 * GIB, 0, 3 * GIB),))])
    request = Request(memory=MemoryRequest(2 * GIB, page_kib=1 << 20, cells=CellPolicy.ONE))
    assert not any(isinstance(r, reasons.MorePages) for way in ways_out(small, request, full) for r in way)


@settings(max_examples=40)
@given(topologies(), st.lists(requests(), max_size=2), requests())
def test_every_suggestion_holds_and_none_contains_another(
    topology: Topology, before: list[Request], request: Request
) -> None:
    claims = HostClaims.empty()
    for number, one in enumerate(before):
        found = fit(topology, claims, one, owner=f"i{number}")
        if isinstance(found, Fit):
            claims = claims.add(found.claim)
    refusal = fit(topology, claims, request, owner="new")
    if isinstance(refusal, Fit):
        return
    ways = suggestions(topology, claims, request, refusal)
    for way in ways:
        assert verify_claim(way.topology, claims, replace(way.fit.claim, owner="new")) == []
        assert apply_all(way.remedies, request, topology) == (way.request, way.topology)
        assert all(apply(remedy, request, topology) is not None for remedy in way.remedies)
        assert isinstance(fit(way.topology, claims, way.request), Fit)
    sets = [set(way.remedies) for way in ways]
    assert not any(a < b for a in sets for b in sets)
