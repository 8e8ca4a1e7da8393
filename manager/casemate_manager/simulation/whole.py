"""The strategy ``scheduler`` of a replay: not the packing score alone, but the whole scheduler that a fleet has.

May live here: nodes of a trace as hosts with topologies, its requests as placement requests. Every arrival goes through the
filter, the score and ``fit``, and becomes an exact claim that is applied, as in production; the replay keeps the sums of the
trace beside it, so a claim of other amounts than were asked would be noticed.

Requests that name several models are steered by a mask of hosts, as a policy would do it: a request has one glob.
"""

import numpy as np
from numpy.typing import NDArray

from casemate_core.claims import HostClaims
from casemate_core.fit import CpuRequest, GpuRequest, MemoryRequest, Request
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.columns import HostView
from casemate_manager.scheduler.mix import Shape
from casemate_manager.scheduler.place import Scheduler
from casemate_manager.scheduler.request import Decision, PlacementPolicy, PlacementRequest
from casemate_manager.scheduler.value import WHOLE_MILLI
from casemate_manager.simulation.openb import Nodes


def topologies(nodes: Nodes) -> list[Topology]:
    """A host for each node: one cell, each CPU a core, GPUs that can be cut into thousandths. Raises BadLine."""
    kinds: dict[tuple[int, int, int, int], Topology] = {}
    found = []
    for i in range(len(nodes.gpus)):
        cpu, memory, gpus, model = (int(v) for v in (*nodes.capacity[:, i], nodes.gpus[i], nodes.model[i]))
        kind = (cpu, memory, gpus, model)
        if kind not in kinds:
            cards = f" gpu={gpus}x{nodes.models[model] or 'any'}/1m" if gpus else ""
            kinds[kind] = from_line(f"{cpu // 1000}k/c 1t {memory}M{cards}")
        found.append(kinds[kind])
    return found


class WholeScheduler:
    """See the module."""

    def __init__(self, nodes: Nodes) -> None:
        self._scheduler = Scheduler()
        self._models = nodes.models
        self._node_model = nodes.model
        machines = topologies(nodes)
        for i, machine in enumerate(machines):
            self._scheduler.upsert_host(HostView(str(i), machine, HostClaims.empty()))
        self._slots = [{gpu.uuid: slot for slot, gpu in enumerate(machine.gpus)} for machine in machines]
        self._known: dict[Shape, Request] = {}
        self._policies: dict[int, PlacementPolicy] = {}
        self._count = 0

    def place(self, shape: Shape) -> tuple[int, tuple[int, ...]] | None:
        """See `casemate_manager.simulation.replay.Strategy`."""
        asked = self._known.get(shape)
        if asked is None:
            asked = self._known[shape] = self._request(shape)
        self._count += 1
        request = PlacementRequest(f"p{self._count}", asked)
        found = self._scheduler.place(request, self._policy(shape.models))
        if not isinstance(found, Decision):
            return None
        self._scheduler.apply_claim(found.host, found.claim)
        held = (*found.claim.gpus, *(share.gpu for share in found.claim.shares))
        number = int(found.host)
        return number, tuple(self._slots[number][uuid] for uuid in held)

    def _request(self, shape: Shape) -> Request:
        cpu_milli, memory_mib = shape.need
        gpus: tuple[GpuRequest, ...] = ()
        if shape.gpus:
            named = [name for i, name in enumerate(self._models) if shape.models >> i & 1]
            model = named[0] if len(named) == 1 else "*"
            gpus = (GpuRequest(shape.gpus, model, share_milli=shape.share_milli % WHOLE_MILLI),)
        return Request(CpuRequest(shared_milli=max(cpu_milli, 1)), MemoryRequest(max(memory_mib, 1)), gpus=gpus)

    def _policy(self, models: int) -> PlacementPolicy:
        if not models:
            return _EVERYWHERE
        policy = self._policies.get(models)
        if policy is None:
            allowed: NDArray[np.bool_] = np.zeros(len(self._scheduler.columns.available), dtype=np.bool_)
            for row in self._scheduler.columns.live_rows():
                allowed[row.number] = models >> int(self._node_model[int(row.view.name)]) & 1
            policy = self._policies[models] = PlacementPolicy(allowed=allowed)
        return policy


_EVERYWHERE = PlacementPolicy()
