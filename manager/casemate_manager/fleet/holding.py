"""PURE. GPUs that are to be given to nobody, as claims of nobody's, so that whoever finds places needs to know no states."""

from collections.abc import Mapping

from casemate_core.claims import Claim, HostClaims
from casemate_core.gpu import GpuOrder, GpuVerb, hold
from casemate_core.topology import Topology
from casemate_wire.stream import HostReport


def holds(
    topology: Topology, report: HostReport, orders: Mapping[str, GpuOrder], claims: HostClaims
) -> tuple[Claim, ...]:
    """Claims on the GPUs of a host that are not clean, not told, or that an operator wants out of use. Those that an instance
    has are its own."""
    told, taken, found = {state.uuid: state for state in report.gpus}, claims.usage.gpus, []
    for gpu in topology.gpus:
        if gpu.uuid in taken:
            continue
        said, order = told.get(gpu.uuid), orders.get(gpu.uuid)
        if said is None:
            found.append(hold(gpu.uuid, "not told by its host yet"))
        elif said.held:
            found.append(hold(gpu.uuid, said.held))
        elif order is not None and order.verb is GpuVerb.QUARANTINE and order.uid != said.order:
            found.append(hold(gpu.uuid, "to be quarantined, an operator said"))
    return tuple(found)
