"""Why a gang has no place: how many of it fit, what stands in the way of the next, and what would place all of them. PURE.

May live here: the questions about several instances that are placed together or not at all. One instance is ``explain``.

Theory of operation. The members are placed one after another on the columns, as the fleet does it, and taken back in the end.
The first that finds no place is explained as one instance is, with those before it in their places. A change helps only if
with it *all* members are placed: what helps the one is tried on all, and what does not stand that test is not told.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from casemate_core.fit.remedies import apply_request
from casemate_core.reasons import FewerCpus
from casemate_manager.scheduler.explain import MAX_SUGGESTIONS, Change, Explanation, explain
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import Decision, PlacementPolicy, PlacementRequest, Unplaceable

#: Members of a gang for which the number of CPUs is halved until it fits: each try places all of them.
MAX_HALVED = 64


def explain_gang(
    scheduler: Scheduler, members: Sequence[PlacementRequest], policy: PlacementPolicy, *, epoch: int = 0
) -> Explanation:
    """Why ``members`` of one gang are not placed. Leaves the scheduler as it was, caches apart.

    ``epoch``: of the fleet, for claims that stand on hosts while it is tried.
    """
    with _placed(scheduler, members, policy, epoch) as decisions:
        if len(decisions) == len(members):
            return Explanation(decisions[0], len(scheduler.columns))
        stuck = members[len(decisions)]
        told = explain(scheduler, stuck, policy)
    fitting = len(decisions)
    changes = [
        change for found in told.changes if (change := _for_all(scheduler, members, policy, epoch, found)) is not None
    ]
    if (fewer := _fewer_cpus(scheduler, members, policy, epoch)) is not None:
        asked = members[0].request
        changes = [
            c for c in changes if c.request is None or replace(c.request.request, cpu=asked.cpu) != asked
        ]  # the others that take CPUs away take more of them
        changes.insert(0, fewer)
    if fitting:
        changes.append(Change(f"ask for {fitting} replicas" if fitting > 1 else "ask for 1 replica", decisions[0].host))
    return replace(
        told,
        changes=tuple(changes[:MAX_SUGGESTIONS]),
        group=f"{fitting} of {len(members)} instances that are placed together or not at all find a place, the next does not",
    )


@contextmanager
def _placed(
    scheduler: Scheduler, members: Sequence[PlacementRequest], policy: PlacementPolicy, epoch: int
) -> Iterator[list[Decision]]:
    """As many of the members as fit, in their places meanwhile."""
    decisions: list[Decision] = []
    try:
        for member in members:
            found = scheduler.place(member, policy, epoch=epoch, note=False)
            if isinstance(found, Unplaceable):
                break
            scheduler.apply_claim(found.host, found.claim, member)
            decisions.append(found)
        yield decisions
    finally:
        for decision in reversed(decisions):
            scheduler.release(decision.host, decision.uid)


def _fewer_cpus(
    scheduler: Scheduler, members: Sequence[PlacementRequest], policy: PlacementPolicy, epoch: int
) -> Change | None:
    """The largest number of vCPUs with which all members are placed, by halving; None where fewer of them do not help."""
    if len(members) > MAX_HALVED:
        return None
    asked = members[0].request
    fits, fails = 0, asked.cpu.reserved_count
    found: Change | None = None
    while fails - fits > 1:
        count = (fits + fails) // 2 if fits else 1
        remedy = FewerCpus(count)
        smaller = apply_request(remedy, asked)
        if smaller is None:
            return None
        wanted = [replace(member, request=smaller) for member in members]
        with _placed(scheduler, wanted, policy, epoch) as decisions:
            if len(decisions) == len(members):
                fits, found = count, Change(remedy.sentence, decisions[0].host, request=wanted[0])
            elif not fits:
                return None
            else:
                fails = count
    return found


def _for_all(
    scheduler: Scheduler, members: Sequence[PlacementRequest], policy: PlacementPolicy, epoch: int, change: Change
) -> Change | None:
    """The change, if with it all members are placed; None where that was not so, or cannot be tried here."""
    if change.topology is not None:
        return None
    asked = change.request
    if asked is not None:
        members = [replace(asked, uid=member.uid) for member in members]
        with _placed(scheduler, members, policy, epoch) as decisions:
            return replace(change, host=decisions[0].host) if len(decisions) == len(members) else None
    if not change.command.startswith("casemate uncordon "):
        return None  # a move, as more pages: of one instance that is known to help, of many it is not
    view = scheduler.columns.row(change.host).view
    scheduler.upsert_host(replace(view, cordoned=False))
    try:
        with _placed(scheduler, members, policy, epoch) as decisions:
            return change if len(decisions) == len(members) else None
    finally:
        scheduler.upsert_host(replace(scheduler.columns.row(change.host).view, cordoned=True))
