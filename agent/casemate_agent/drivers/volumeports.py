"""The port of volumes: disks of this host that outlive the instances that use them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from casemate_core.spec.instance import VolumeRef


@dataclass(frozen=True, slots=True)
class StoredVolume:
    """The file of a volume: its size as a guest sees it, and what it takes of the host's disk."""

    path: str
    size_mib: int
    allocated_mib: int


class Volumes(Protocol):
    """Data that people rely on: it is made once, never made anew, never shrinks, and ends by ``remove`` alone.

    Nobody here ever looks into a volume to find out what it is: its format is told.
    """

    async def observe(self, deadline_s: float) -> Mapping[str, StoredVolume]:
        """All volumes whose data is here, by uid."""
        ...

    async def create(self, volume: VolumeRef, deadline_s: float) -> None:
        """Have the volume's disk, with an empty file system on it. One that is there stays as it is, whatever it holds."""
        ...

    async def grow(self, volume: VolumeRef, deadline_s: float) -> None:
        """Have the disk at least as large as asked. Raises NotFound where it is not here. Nobody may have it open."""
        ...

    async def remove(self, uid: str, deadline_s: float) -> None:
        """Delete the data."""
        ...

    def path(self, uid: str) -> str:
        """Where the file of a volume lies, or will lie."""
        ...
