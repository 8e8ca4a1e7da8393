"""Why an instance is where it is, or nowhere: the placer's own words, host by host."""

import asyncio

from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.placing import Overlay, Placed, Placer, stamp_for
from casemate_manager.fleet.records import InstanceRecord
from casemate_manager.fleet.state import State
from casemate_wire.v1 import operators_pb2 as pb

MAX_NEAREST = 5


class PlacerWhy:
    """Asks the placer again, for the whole fleet and for single hosts."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer

    async def why(self, state: State, observed: Observed, instance: InstanceRecord, host: str) -> pb.WhyResponse:
        """The answer for one instance; ``host`` asks about that host only."""
        placement = state.placement_of(instance.meta.uid)
        environment = state.environment_of(instance).environment
        spec = state.spec_of(instance)
        response = pb.WhyResponse(hosts=len(state.hosts))
        if placement is not None and host in ("", placement.host):
            response.placed = True
            response.host = placement.host
            return response
        overlay = Overlay(state, observed)
        stamp = stamp_for(state, instance)
        if host:
            found = self._placer.refit(overlay, host, environment, spec, stamp)
            response.hosts = 1
        else:
            found = self._placer.place(overlay, environment, spec, stamp)
        await asyncio.sleep(0)
        if isinstance(found, Placed):
            response.host = found.host
            response.suggestions.append(
                pb.WhySuggestion(change=f"it fits on {found.host} now and will be placed", host=found.host)
            )
            return response
        for reason, hosts, message in found.reasons:
            response.reasons.append(pb.WhyReason(reason=reason, hosts=hosts, message=message))
        for name in sorted(state.hosts)[:MAX_NEAREST] if not host else []:
            alone = self._placer.refit(overlay, name, environment, spec, stamp)
            if not isinstance(alone, Placed):
                response.nearest.append(pb.WhyMiss(host=name, messages=[text for _, _, text in alone.reasons]))
        return response
