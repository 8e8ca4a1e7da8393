"""Volumes of a simulated host.

What may live here: the simulated form of :class:`casemate_agent.drivers.volumeports.Volumes`, and the disks behind it. Like a
real host it keeps them over the death of agents and its own reboot. What a guest writes is a text, so that a test can tell
data that was kept from a disk that was made anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from casemate_agent.drivers.volumeports import StoredVolume
from casemate_core.errors import MachineError, NotFound
from casemate_core.spec.instance import VolumeRef

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


@dataclass(slots=True)
class SimulatedVolume:
    """The disk of a volume. ``written`` is what guests wrote to it."""

    size_mib: int
    written: str = ""


def volume_path(uid: str) -> str:
    """Where the file of a simulated volume would lie."""
    return f"/simulated/volumes/{uid}"


class SimulatedVolumes:
    """``volumeports.Volumes`` of one simulated host."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease
        self._host = lease.host

    def path(self, uid: str) -> str:
        return volume_path(uid)

    async def observe(self, deadline_s: float) -> Mapping[str, StoredVolume]:
        def look() -> dict[str, StoredVolume]:
            disks = self._host.volumes
            return {uid: StoredVolume(volume_path(uid), v.size_mib, 1 + len(v.written)) for uid, v in disks.items()}

        return await self._lease.call("volumes", "observe", look, deadline_s)

    async def create(self, volume: VolumeRef, deadline_s: float) -> None:
        def create() -> None:
            if self._host.faults.disk_full:
                raise MachineError("no space left on device")
            if volume.uid not in self._host.volumes:
                self._host.volumes[volume.uid] = SimulatedVolume(volume.size_mib)
                self._host.volumes_made[volume.uid] += 1

        await self._lease.call("volumes", "create", create, deadline_s)

    async def grow(self, volume: VolumeRef, deadline_s: float) -> None:
        def grow() -> None:
            disk = self._host.volumes.get(volume.uid)
            if disk is None:
                raise NotFound("volume", volume.uid)
            if self._host.volume_users(volume.uid):
                raise MachineError(f"volume {volume.uid} is open")
            disk.size_mib = max(disk.size_mib, volume.size_mib)

        await self._lease.call("volumes", "grow", grow, deadline_s)

    async def remove(self, uid: str, deadline_s: float) -> None:
        def remove() -> None:
            if self._host.volume_users(uid):
                raise MachineError(f"volume {uid} is open")
            self._host.volumes.pop(uid, None)

        await self._lease.call("volumes", "remove", remove, deadline_s)
