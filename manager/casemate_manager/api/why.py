"""Why an instance is where it is, or nowhere: every host counted, the nearest with numbers, and changes that were tried.

Theory of operation. The question is asked of a placer of its own, with columns of its own, so that it disturbs neither the
writer's caches nor the learnt mix. The columns are brought in line on the loop, from one state; the search runs in a thread,
one question at a time.
"""

import asyncio

from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.placing import Overlay, Placed, Placer, stamp_for
from casemate_manager.fleet.records import InstanceRecord
from casemate_manager.fleet.state import State
from casemate_manager.policy.cel import Cel
from casemate_manager.scheduler.placer import FleetPlacer
from casemate_wire.v1 import operators_pb2 as pb


class PlacerWhy:
    """Answers for instances that wait, and for hosts that an instance is not on."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer.twin() if isinstance(placer, FleetPlacer) else FleetPlacer(Cel())
        self._one_at_a_time = asyncio.Lock()

    async def why(self, state: State, observed: Observed, instance: InstanceRecord, host: str) -> pb.WhyResponse:
        """The answer for one instance; ``host`` asks about that host only."""
        placement = state.placement_of(instance.meta.uid)
        environment = state.environment_of(instance).environment
        spec, stamp = state.spec_of(instance), stamp_for(state, instance)
        response = pb.WhyResponse(hosts=1 if host else len(state.hosts))
        if placement is not None and host in ("", placement.host):
            response.placed = True
            response.host = placement.host
            return response
        async with self._one_at_a_time:
            overlay = Overlay(state, observed)
            self._placer.sync(overlay)
            if host and host not in self._placer.scheduler.columns:
                found = self._placer.refit(overlay, host, environment, spec, stamp)
                texts = [] if isinstance(found, Placed) else [text for _, _, text in found.reasons]
                response.nearest.append(pb.WhyMiss(host=host, messages=texts))
                return response
            answer = await asyncio.to_thread(self._placer.explain_synced, state, environment, spec, stamp.owner, host)
            joining = len(state.hosts) - len(self._placer.scheduler.columns)
        if answer.decision is not None:
            response.host = answer.decision.host
            response.suggestions.append(
                pb.WhySuggestion(change=f"it fits on {response.host} now and will be placed", host=response.host)
            )
            return response
        for reason, hosts, message in answer.reasons:
            response.reasons.append(pb.WhyReason(reason=reason, hosts=hosts, message=message or f"hosts {reason}"))
        if joining > 0 and not host:
            told = "hosts that have not told what they are made of"
            response.reasons.append(pb.WhyReason(reason="are joining", hosts=joining, message=told))
        for miss in answer.nearest:
            response.nearest.append(pb.WhyMiss(host=miss.host, messages=miss.messages))
        for change in answer.changes:
            response.suggestions.append(
                pb.WhySuggestion(change=change.sentence, host=change.host, command=change.command)
            )
        return response
