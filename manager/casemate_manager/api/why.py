"""Why an instance is where it is, or nowhere: every host counted, the nearest with numbers, and changes that were tried.

Theory of operation. The question is asked of a placer of its own, with columns of its own, so that it disturbs neither the
writer's caches nor the learnt mix. On the loop only references are taken: a copy of the tables of records that the search
reads, which are frozen and do not change under it. All else (bringing the columns in line, searching, wording) runs in a
thread, one question at a time, and the writer goes on meanwhile. The columns are kept warm between questions, some hosts at a
time: else the first question on a large fleet, or one after much has changed, would wait for all of them to be written.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from casemate_core.claims import Claim
from casemate_core.claims.words import holdings
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.placing import Overlay, Placed, Placer, Stamp, stamp_for
from casemate_manager.fleet.records import InstanceRecord
from casemate_manager.fleet.state import State
from casemate_manager.policy.cel import Cel
from casemate_manager.scheduler.explain import Explanation
from casemate_manager.scheduler.placer import FleetPlacer
from casemate_wire.v1 import operators_pb2 as pb

#: Seconds between two rounds of keeping the columns warm, and hosts that are written in one. A round of that many takes
#: about 0.1 s of a core that the writer may want.
WARM_S: Final = 2.0
WARM_HOSTS: Final = 500


class PlacerWhy:
    """Answers for instances that wait, for where others are, and for hosts that an instance is not on."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer.twin() if isinstance(placer, FleetPlacer) else FleetPlacer(Cel())
        self._one_at_a_time = asyncio.Lock()

    async def why(self, state: State, observed: Observed, instance: InstanceRecord, host: str) -> pb.WhyResponse:
        """The answer for one instance; ``host`` asks about that host only."""
        async with self._one_at_a_time:
            asked = _Question(state, observed, instance, host)
            return await asyncio.to_thread(self._answer, asked)

    async def keep_warm(self, now: Callable[[], tuple[State, Observed]]) -> None:
        """Follow the fleet until cancelled; ``now`` gives what is committed and observed."""
        seen: tuple[int, int] | None = None
        while True:
            await asyncio.sleep(WARM_S)
            state, observed = now()
            version = (state.revision, observed.hosts_version)
            if version != seen and await self.warm(state, observed):
                seen = version

    async def warm(self, state: State, observed: Observed) -> bool:
        """Bring some hosts in line. Returns whether all are."""
        async with self._one_at_a_time:
            overlay = Overlay(_readable(state), _readable_hosts(observed))
            return await asyncio.to_thread(self._placer.sync, overlay, WARM_HOSTS)

    def _answer(self, asked: "_Question") -> pb.WhyResponse:
        state, host, instance, placer = asked.state, asked.host, asked.instance, self._placer
        overlay = Overlay(state, asked.observed)
        placer.sync(overlay)
        record = state.environment_of(instance)
        spec = state.spec_of(instance)
        response = pb.WhyResponse(hosts=1 if host else len(state.hosts))
        joining = len(state.hosts) - len(placer.scheduler.columns)
        if asked.claim is not None and host in ("", asked.on):
            response.placed = True
            response.host = asked.on
            inventory = state.inventories.get(asked.on)
            response.holds.extend(holdings(asked.claim, inventory.topology) if inventory is not None else ())
            if not host:
                answer = placer.explain_elsewhere(state, record.environment, spec, instance.meta.uid, asked.on)
                _tell(response, answer, joining)
            return response
        if host and host not in placer.scheduler.columns:
            found = placer.refit(overlay, host, record.environment, spec, asked.stamp)
            texts = [] if isinstance(found, Placed) else [text for _, _, text in found.reasons]
            response.nearest.append(pb.WhyMiss(host=host, messages=texts))
            return response
        answer = placer.explain_synced(state, record.environment, spec, instance.meta.uid, host, asked.waiting)
        _tell(response, answer, 0 if host else joining)
        return response


class _Question:
    """What is asked, of the state as it is at this moment. Made on the loop: cheap, and nothing in it changes later."""

    def __init__(self, state: State, observed: Observed, instance: InstanceRecord, host: str) -> None:
        self.instance, self.host = instance, host
        placement = state.placement_of(instance.meta.uid)
        self.claim: Claim | None = placement.claim if placement is not None else None
        self.on = placement.host if placement is not None else ""
        self.stamp: Stamp = stamp_for(state, instance)
        #: Instances of the same environment that wait with it, itself included.
        self.waiting = tuple(
            other.meta.uid for other in state.instances_of(instance.environment_uid) if other.meta.uid in state.pending
        )
        self.state = _readable(state)
        self.observed = _readable_hosts(observed)


def _readable(state: State) -> State:
    """What a search reads of a state, as it is now."""
    return State(
        state.epoch,
        state.revision,
        environments=dict(state.environments),
        specs=dict(state.specs),
        instances=dict(state.instances),
        hosts=dict(state.hosts),
        inventories=dict(state.inventories),
        policies=dict(state.policies),
        volumes=dict(state.volumes),
        environment_keys=dict(state.environment_keys),
        claims=dict(state.claims),
    )


def _readable_hosts(observed: Observed) -> Observed:
    return Observed(hosts=dict(observed.hosts), hosts_version=observed.hosts_version)


def _tell(response: pb.WhyResponse, answer: Explanation, joining: int) -> None:
    """An explanation as the message that operators get."""
    if answer.decision is not None:
        response.host = answer.decision.host
        response.suggestions.append(
            pb.WhySuggestion(change=f"it fits on {response.host} now and will be placed", host=response.host)
        )
        return
    for reason, hosts, message in answer.reasons:
        response.reasons.append(pb.WhyReason(reason=reason, hosts=hosts, message=message or f"hosts {reason}"))
    if joining > 0:
        told = "hosts that have not told what they are made of"
        response.reasons.append(pb.WhyReason(reason="are joining", hosts=joining, message=told))
    if answer.group:
        response.group = answer.group
    for miss in answer.nearest:
        response.nearest.append(pb.WhyMiss(host=miss.host, messages=miss.messages))
    for change in answer.changes:
        response.suggestions.append(pb.WhySuggestion(change=change.sentence, host=change.host, command=change.command))
