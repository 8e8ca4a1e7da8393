"""Fit against its dumb twin: it finds a way whenever there is one, and never a worse one by the documented order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_core.claims import HostClaims, verify_claim
from casemate_core.fit import CellPolicy, Fit, Overcommit, Request, fit, fits
from casemate_core.topology import Topology
from support.dumb_fit import best_key
from support.small_hosts import requests, topologies

FUNCTIONS = 6
"""Terms of the functions' key that the twin knows: the two on what is left over for others it does not."""


def comparable(topology: Topology, request: Request, found: Fit) -> tuple[int, ...]:
    """The part of a fit's key that is promised to be the smallest there is (see ``fit.solve`` and ``fit.cores``)."""
    key = found.key
    cells, functions, (use, caches, a, b) = key[0], key[1 : 1 + FUNCTIONS], key[9:13]
    # several cells: CPUs on the fewest (or as many as asked), memory wherever that leaves it; no more is promised
    if not found.claim.one_cell or request.memory.cells is CellPolicy.SPREAD:
        return (cells,)
    if use == 2 or topology.index.smt_width > 2:
        return (cells, *functions, use)
    return (cells, *functions, use, caches) if caches > 1 else (cells, *functions, use, caches, a, b)


def occupied(topology: Topology, before: list[Request]) -> HostClaims:
    claims = HostClaims.empty()
    for number, request in enumerate(before):
        found = fit(topology, claims, request, owner=f"i{number}")
        if isinstance(found, Fit):
            assert not verify_claim(topology, claims, found.claim)
            claims = claims.add(found.claim)
    assert claims.check(topology) == []
    return claims


@settings(max_examples=120)
@given(topologies(), st.lists(requests(), max_size=3), requests(), st.sampled_from((100, 150, 400)))
def test_fit_is_complete_and_best(
    topology: Topology, before: list[Request], request: Request, cpu_percent: int
) -> None:
    overcommit = Overcommit(cpu_percent)
    claims = occupied(topology, before)
    found = fit(topology, claims, request, owner="new", overcommit=overcommit)
    best = best_key(topology, claims, request, overcommit)
    if best is None:
        assert not isinstance(found, Fit), found
        assert found.reasons
        assert found.sentence
        return
    assert isinstance(found, Fit), (found, best)
    assert verify_claim(topology, claims, found.claim) == []
    promised = comparable(topology, request, found)
    assert promised == best[: len(promised)]


@settings(max_examples=25)
@given(topologies(), st.lists(requests(), max_size=2), requests())
def test_fits_starts_with_fit_and_all_of_them_hold(topology: Topology, before: list[Request], request: Request) -> None:
    claims = occupied(topology, before)
    one = fit(topology, claims, request, owner="new")
    many = fits(topology, claims, request, limit=5, owner="new")
    assert len(many) <= 5
    assert [way.key for way in many] == sorted(way.key for way in many)
    for way in many:
        assert verify_claim(topology, claims, way.claim) == []
    assert many[:1] == ([one] if isinstance(one, Fit) else [])
