"""Tables over the PCI functions of a topology: GPUs as bits, distances, and which sets of GPUs hang together.

What may live here: whatever follows from the records alone, for ``fit`` to look up.

Theory of operation. GPUs are bits of one integer, in the order of the topology. The sets of ``n`` GPUs that a request may
get are listed once per *shape* (who shares a switch, a root, a cell with whom, who is NVLink peer of whom) and not per
host: hosts of one kind share their lists. The lists are ordered by how near the GPUs of a set are to each other, so a
fit walks down the list until a set is free. Up to 16 GPUs, which is the largest board there is, every set is listed.
Beyond that only runs of neighbours in PCI order are.

Distance between two functions, ``near`` below: 0 the same switch, 1 the same root complex, 2 the same cell, 3 elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Self

from casemate_core.topology.model import FabricPartition, PciPlace, PhysicalFunction

if TYPE_CHECKING:
    from casemate_core.topology.model import Topology

SAME_SWITCH, SAME_ROOT, SAME_CELL, ELSEWHERE = range(4)
MAX_LISTED_SETS = 12_870
"""Sets of one size that are listed: 16 choose 8."""
_MAX_CACHED_QUESTIONS = 256
"""Model globs and network questions kept per host; tenants write them, so they are bounded."""

Shape = tuple[tuple[int, int, int], ...]
"""Per GPU: ordinals of its switch, root and cell, in order of first appearance (a GPU without a switch has its own)."""


@dataclass(frozen=True, slots=True)
class GpuSet:
    """GPUs that could be given together. ``spread`` is (cells, roots, switches) beyond the first of each."""

    mask: int
    spread: tuple[int, int, int]

    @property
    def one_root(self) -> bool:
        """Peer-to-peer traffic stays under one root complex."""
        return self.spread[1] == 0


def distance(a: PciPlace, b: PciPlace) -> int:
    """0 the same switch, 1 the same root complex, 2 the same cell, 3 elsewhere or not known."""
    if len(a.path) > 1 and len(b.path) > 1 and a.path[:2] == b.path[:2]:
        return SAME_SWITCH
    if a.path and b.path and a.path[0] == b.path[0]:
        return SAME_ROOT
    return SAME_CELL if a.cell == b.cell and a.cell >= 0 else ELSEWHERE


@lru_cache(maxsize=256)
def gpu_sets(shape: Shape, count: int) -> tuple[GpuSet, ...]:
    """All sets of ``count`` GPUs of a shape, nearest together first, then in the order of the GPUs."""
    places = range(len(shape))
    if comb(len(shape), count) <= MAX_LISTED_SETS:
        chosen = list(combinations(places, count))
    else:
        chosen = [tuple(range(start, start + count)) for start in range(len(shape) - count + 1)]
    found = []
    for members in chosen:
        switches, roots, cells = (len({shape[i][level] for i in members}) - 1 for level in range(3))
        found.append(GpuSet(sum(1 << i for i in members), (cells, roots, switches)))
    found.sort(key=lambda s: s.spread)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class FunctionIndex:
    """Everything that ``fit`` looks up about PCI functions."""

    shape: Shape
    gpu_bit: Mapping[str, int]
    """UUID to position."""
    gpu_mask: Mapping[str, int]
    """UUID to the mask with that GPU alone."""
    gpus_of_cell: Mapping[int, int]
    """Position of a cell to the mask of its GPUs; GPUs of no known cell are in none."""
    peers: tuple[int, ...]
    """Per GPU, the mask of its NVLink peers."""
    partitions: tuple[tuple[FabricPartition, int], ...]
    """With the mask of each."""
    pf_position: Mapping[str, int]
    """MAC to position."""
    device_position: Mapping[str, int]
    partition_ids: frozenset[int]
    pf_cell: tuple[int, ...]
    """Per PF, the position of its cell, -1 where not known."""
    pf_rings: tuple[tuple[int, int, int], ...]
    """Per PF, the masks of the GPUs at distance 0, 1 and 2 from it."""
    vf_mask: tuple[int, ...]
    """Per PF, the mask of the indices of its VFs."""
    device_cell: tuple[int, ...]
    _models: dict[tuple[str, tuple[tuple[str, str], ...]], int] = field(default_factory=dict)
    _ports: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, topology: "Topology") -> Self:
        """Derive it."""
        position = {cell.id: i for i, cell in enumerate(topology.cells)}
        gpu_bit = {gpu.uuid: i for i, gpu in enumerate(topology.gpus)}
        gpus_of_cell: dict[int, int] = {}
        for i, gpu in enumerate(topology.gpus):
            if gpu.place.cell in position:
                where = position[gpu.place.cell]
                gpus_of_cell[where] = gpus_of_cell.get(where, 0) | 1 << i
        return cls(
            shape=_shape([gpu.place for gpu in topology.gpus]),
            gpu_bit=gpu_bit,
            gpu_mask={uuid: 1 << i for uuid, i in gpu_bit.items()},
            gpus_of_cell=gpus_of_cell,
            peers=tuple(sum(1 << gpu_bit[peer] for peer in gpu.peers) for gpu in topology.gpus),
            partitions=tuple((p, sum(1 << gpu_bit[uuid] for uuid in p.gpus)) for p in topology.partitions),
            pf_position={pf.mac: i for i, pf in enumerate(topology.pfs)},
            device_position={device.id: i for i, device in enumerate(topology.devices)},
            partition_ids=frozenset(p.id for p in topology.partitions),
            pf_cell=tuple(position.get(pf.place.cell, -1) for pf in topology.pfs),
            pf_rings=tuple(_rings(pf.place, [gpu.place for gpu in topology.gpus]) for pf in topology.pfs),
            vf_mask=tuple(sum(1 << vf.index for vf in pf.vfs) for pf in topology.pfs),
            device_cell=tuple(position.get(device.place.cell, -1) for device in topology.devices),
        )

    def sets(self, count: int) -> tuple[GpuSet, ...]:
        """The sets of so many GPUs, nearest together first."""
        return gpu_sets(self.shape, count) if 0 < count <= len(self.shape) else ()

    def model_mask(self, topology: "Topology", glob: str, labels: tuple[tuple[str, str], ...] = ()) -> int:
        """GPUs whose model matches, and that carry all of the labels."""
        mask = self._models.get((glob, labels))
        if mask is None:
            wanted = set(labels)
            mask = sum(
                1 << i
                for i, gpu in enumerate(topology.gpus)
                if fnmatchcase(gpu.model, glob) and wanted.issubset(gpu.labels)
            )
            if len(self._models) >= _MAX_CACHED_QUESTIONS:
                self._models.clear()
            self._models[glob, labels] = mask
        return mask

    def ports(self, topology: "Topology", network: str, needs: tuple[str, ...]) -> tuple[int, ...]:
        """Positions of the PFs that reach the network and can do what is needed."""
        found = self._ports.get((network, needs))
        if found is None:
            found = tuple(i for i, pf in enumerate(topology.pfs) if network in pf.networks and _can(pf, needs))
            if len(self._ports) >= _MAX_CACHED_QUESTIONS:
                self._ports.clear()
            self._ports[network, needs] = found
        return found

    def all_linked(self, mask: int) -> bool:
        """Every GPU of the mask is NVLink peer of every other."""
        left = mask
        while left:
            low = left & -left
            if mask & ~low & ~self.peers[low.bit_length() - 1]:
                return False
            left ^= low
        return True


def _rings(place: PciPlace, others: list[PciPlace]) -> tuple[int, int, int]:
    masks = [0, 0, 0, 0]
    for i, other in enumerate(others):
        masks[distance(place, other)] |= 1 << i
    return masks[SAME_SWITCH], masks[SAME_ROOT], masks[SAME_CELL]


def _can(pf: PhysicalFunction, needs: tuple[str, ...]) -> bool:
    return all(need in pf.capabilities for need in needs)


def _shape(places: list[PciPlace]) -> Shape:
    seen: tuple[dict[object, int], dict[object, int], dict[object, int]] = ({}, {}, {})
    shape = []
    for i, place in enumerate(places):
        keys: tuple[object, object, object] = (
            place.path[:2] if len(place.path) > 1 else ("alone", i),
            place.path[0] if place.path else ("alone", i),
            place.cell if place.cell >= 0 else ("nowhere", i),
        )
        switch, root, cell = (table.setdefault(key, len(table)) for table, key in zip(seen, keys, strict=True))
        shape.append((switch, root, cell))
    return tuple(shape)
