"""PURE. GPUs that are to be given to nobody, as claims of nobody's, so that whoever finds places needs to know no states."""

from collections.abc import Mapping

from casemate_core.claims import Claim, HostClaims
from casemate_core.gpu import GpuOrder, GpuVerb, hold, hold_rest
from casemate_core.topology import Topology
from casemate_wire.stream import HostReport


def holds(
    topology: Topology, report: HostReport, orders: Mapping[str, GpuOrder], claims: HostClaims
) -> tuple[Claim, ...]:
    """Claims on the GPUs of a host that are not clean, not told, or that an operator wants out of use. Those that an instance
    has are its own."""
    told, taken, found = {state.uuid: state for state in report.gpus}, claims.usage.gpus, list[Claim]()
    for gpu in topology.gpus:
        if gpu.uuid in taken:
            continue
        said, order = told.get(gpu.uuid), orders.get(gpu.uuid)
        if said is None:
            why = "not told by its host yet"
        elif said.held:
            why = said.held
        elif order is not None and order.verb is GpuVerb.QUARANTINE and order.uid != said.order:
            why = "to be quarantined, an operator said"
        else:
            continue
        used_milli = claims.usage.share_milli.get(gpu.uuid, 0)
        if not used_milli:
            found.append(hold(gpu.uuid, why))
        elif used_milli < 1000:
            found.append(hold_rest(gpu.uuid, why, used_milli))
    return tuple(found)
