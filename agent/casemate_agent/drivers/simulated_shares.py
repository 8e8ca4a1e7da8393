"""vGPUs of a simulated machine, as strict as a real driver: no more than a board has room for, all of one kind where it says so,
none on a board that the host's driver has not, and none destroyed under a domain that runs with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_agent.drivers.simulated_gpus import DRIVER
from casemate_agent.gpu.shares import Share, ShareFacts
from casemate_core.errors import MachineError, Unavailable
from casemate_core.topology import Gpu

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


class ShareFailed(MachineError):
    """The board has no room, or the vGPU is another one, or in use."""

    reason = "ShareFailed"


class SimulatedShares:
    """``gpuports.GpuShares`` of a host in memory."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease
        self._host = lease.host

    async def look(self, deadline_s: float) -> Mapping[str, ShareFacts]:
        return await self._lease.call("shares", "look_at_shares", lambda: dict(self._host.vgpus), deadline_s)

    async def create(self, share: Share, deadline_s: float) -> ShareFacts:
        return await self._lease.call("shares", "create_share", lambda: self._create(share), deadline_s)

    def _create(self, share: Share) -> ShareFacts:
        host = self._host
        gpu = next((gpu for gpu in host.topology.gpus if gpu.uuid == share.gpu), None)
        if gpu is None:
            raise Unavailable(f"GPU {share.gpu} is not there")
        asked = ShareFacts(share.id, share.gpu, share.profile, share.owner)
        if (there := host.vgpus.get(share.id)) is not None:
            if there != asked:
                raise ShareFailed(f"vGPU {share.id} is there as {there.profile} of {there.gpu}")
            return there
        if host.board(share.gpu).driver != DRIVER:
            raise ShareFailed(f"GPU {share.gpu} is not with the host's driver")
        if not self._has_room(gpu, share.profile):
            raise ShareFailed(f"GPU {share.gpu} has no room for a vGPU {share.profile} now")
        host.vgpus[share.id] = asked
        return asked

    def _has_room(self, gpu: Gpu, profile: str) -> bool:
        kinds = {p.name: p for p in gpu.share_profiles if not p.bare}
        on_it = [kinds.get(facts.profile) for facts in self._host.vgpus.values() if facts.gpu == gpu.uuid]
        if profile not in kinds:
            return not profile and bool(gpu.share_step_milli)
        if gpu.share_alike and any(kind is None or kind.name != profile for kind in on_it):
            return False
        milli = sum(kind.milli for kind in on_it if kind is not None)
        same = sum(kind is not None and kind.name == profile for kind in on_it)
        places = len(kinds[profile].starts) or 1000
        return milli + kinds[profile].milli <= 1000 and same < places

    async def remove(self, id: str, deadline_s: float) -> None:
        def remove() -> None:
            for domain in self._host.domains.values():
                if id in domain.shares and domain.facts.phase in ACTIVE:
                    raise ShareFailed(f"vGPU {id} is open in domain {domain.facts.name}")
            self._host.vgpus.pop(id, None)

        await self._lease.call("shares", "remove_share", remove, deadline_s)
