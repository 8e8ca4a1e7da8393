"""Which GPUs, virtual functions and devices, given where the CPUs would lie.

What may live here: choices among PCI functions. Which cells the instance has is decided in ``cells``; ``solve`` asks here
once per layout and compares.

Theory of operation. What is free is a mask of GPUs, a mask of VFs per PF, a list of devices; that is found once per fit. A
GPU request has candidates: sets of GPUs out of the ordered list of the host's shape, or fabric partitions, or GPUs with
room for a slice. For a layout, candidates are compared by ``GpuKey``; NICs are then given to ports for the best candidates
only, since they matter for the order only where the terms before them are equal. Devices depend on the layout alone.

``FunctionKey``, smaller is better::

    gpus_remote     GPUs in a cell where the instance has no CPU
    gpu_spread      cells, root complexes, switches over which each request's GPUs lie, beyond the first
    nic_far         sum over NICs of the distance to the nearest of the instance's GPUs (to its cells, without GPUs)
    devices_remote  devices in a cell where the instance has no CPU
    broken          free fabric partitions that would lose a GPU without being used
    left            GPUs (in thousandths of one) that stay free beside the chosen ones: the tightest place first
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from casemate_core.claims import GpuShare, VfClaim
from casemate_core.cpuset import bits
from casemate_core.fit.request import GpuLink, GpuRequest, Near, NicRequest, Request
from casemate_core.fit.view import View
from casemate_core.topology import Gpu
from casemate_core.topology.functions import ELSEWHERE, SAME_CELL, SAME_ROOT, SAME_SWITCH

FunctionKey = tuple[int, int, int, int, int, int, int, int]
_FARTHEST = {Near.ANY: ELSEWHERE, Near.CELL: SAME_CELL, Near.ROOT: SAME_ROOT, Near.SWITCH: SAME_SWITCH}


class Candidate(NamedTuple):
    """One way to meet one GPU request."""

    mask: int
    spread: tuple[int, int, int] = (0, 0, 0)
    partition: int | None = None


class Functions(NamedTuple):
    """The functions chosen for one layout."""

    key: FunctionKey
    gpus: tuple[Candidate, ...] = ()
    """One per GPU request."""
    ports: tuple[int, ...] = ()
    """Position of the PF for each NIC."""
    devices: tuple[int, ...] = ()
    """Positions, in the order of the requests."""


NOTHING = Functions((0, 0, 0, 0, 0, 0, 0, 0))
"""For a request without GPUs, NICs and devices."""


class FreeFunctions:
    """What is free of the host's functions, and the candidates of each GPU request; found once per fit."""

    __slots__ = (
        "candidates",
        "devices",
        "free",
        "nic_ports",
        "partitions",
        "request",
        "room",
        "shared",
        "taken_by_groups",
        "vfs",
        "view",
    )

    def __init__(self, view: View, request: Request) -> None:
        self.view = view
        self.request = request
        self.taken_by_groups = _taken_by_groups(view)
        self.free = 0
        self.shared = 0
        self.room: dict[int, int] = {}
        self.partitions: tuple[int, ...] = ()
        if request.gpus:
            self._find_gpus()
        self.candidates = [self._candidates(gpus) for gpus in request.gpus]
        self.vfs = [self._free_vfs(i) for i in range(len(view.topology.pfs))] if request.nics else []
        # per NIC, (-free VFs, port) of the ports that could serve it
        self.nic_ports = [
            [
                (-self.vfs[port].bit_count(), port)
                for port in view.topology.functions.ports(view.topology, nic.network, nic.needs)
                if self.vfs[port]
            ]
            for nic in request.nics
        ]
        self.devices = self._free_devices() if request.devices else []

    # GPUs

    def _find_gpus(self) -> None:
        topology, usage = self.view.topology, self.view.usage
        mask_of = topology.functions.gpu_mask
        left = (1 << len(topology.gpus)) - 1 & ~self.view.gpus_held
        for name in self.taken_by_groups:
            left &= ~mask_of.get(name, 0)
        for uuid in usage.share_milli:
            self.shared |= mask_of.get(uuid, 0)
        self.shared &= left
        self.free = left & ~self.shared
        if any(asked.is_share for asked in self.request.gpus):
            gpus = topology.gpus
            self.room = {i: 1000 - usage.share_milli.get(gpus[i].uuid, 0) for i in bits(left)}
        free, taken = self.free, usage.partitions
        self.partitions = tuple(
            [
                mask
                for partition, mask in topology.functions.partitions
                if not mask & ~free and partition.id not in taken
            ]
        )

    def eligible(self, asked: GpuRequest) -> int:
        """GPUs that could serve the request by themselves: of the model, free, or with a slice left."""
        mask = self.view.topology.functions.model_mask(self.view.topology, asked.model, asked.labels)
        if not asked.is_share:
            return mask & self.free
        mask &= self.free | self.shared
        for i in bits(mask):
            if self.slice_of(i, asked) is None:
                mask &= ~(1 << i)
        return mask

    def slice_of(self, i: int, asked: GpuRequest) -> GpuShare | None:
        """The slice that GPU ``i`` would give: the smallest that is enough, at the highest slot where it may lie.

        High slots first: the larger profiles of a MIG GPU start at low ones.
        """
        gpu = self.view.topology.gpus[i]
        taken = self.view.usage.share_slots.get(gpu.uuid, 0)
        only = self.view.usage.share_profile.get(gpu.uuid) if gpu.share_alike else None
        if asked.share_milli and not asked.share_profile and gpu.share_step_milli:
            milli = -(-asked.share_milli // gpu.share_step_milli) * gpu.share_step_milli
            return GpuShare(gpu.uuid, milli) if milli < 1000 and milli <= self.room[i] else None
        for profile in sorted(gpu.share_profiles, key=lambda p: (p.milli, p.slots, p.name)):
            wanted = profile.name == asked.share_profile if asked.share_profile else profile.milli >= asked.share_milli
            if (
                not wanted
                or profile.bare
                or profile.milli > self.room[i]
                or (only is not None and profile.name != only)
            ):
                continue
            if not profile.slots:
                return GpuShare(gpu.uuid, profile.milli, profile.name)
            for start in sorted(profile.starts, reverse=True):
                if not taken & ((1 << profile.slots) - 1) << start:
                    return GpuShare(gpu.uuid, profile.milli, profile.name, start, profile.slots)
        return None

    def _candidates(self, asked: GpuRequest) -> list[Candidate]:
        functions = self.view.topology.functions
        eligible = self.eligible(asked)
        if eligible.bit_count() < asked.count:
            return []
        if asked.is_share:
            return [Candidate(s.mask) for s in functions.sets(asked.count) if not s.mask & ~eligible]
        if asked.link is GpuLink.NVLINK and functions.partitions:
            free = set(self.partitions)
            return [
                Candidate(mask, partition=partition.id)
                for partition, mask in functions.partitions
                if mask in free and not mask & ~eligible and mask.bit_count() == asked.count
            ]
        found = (s for s in functions.sets(asked.count) if not s.mask & ~eligible)
        if asked.link is GpuLink.NVLINK:
            found = (s for s in found if functions.all_linked(s.mask))
        elif asked.link is GpuLink.PCIE:
            found = (s for s in found if s.one_root)
        return [Candidate(s.mask, s.spread) for s in found]

    def together(self) -> Iterator[tuple[Candidate, ...]]:
        """One candidate for every GPU request, no GPU twice, at most one partition."""
        if not self.candidates:
            yield ()
            return
        if len(self.candidates) == 1:
            for candidate in self.candidates[0]:
                yield (candidate,)
            return
        for chosen in product(*self.candidates):
            mask, partitions = 0, 0
            for candidate in chosen:
                if mask & candidate.mask:
                    break
                mask |= candidate.mask
                partitions += candidate.partition is not None
            else:
                if partitions <= 1:  # a claim names one
                    yield chosen

    # VFs and devices

    def _free_vfs(self, i: int) -> int:
        pf = self.view.topology.pfs[i]
        mask = self.view.topology.functions.vf_mask[i] & ~self.view.usage.vfs.get(pf.mac, 0)
        if self.taken_by_groups:
            for index in bits(mask):
                if f"{pf.mac}/{index}" in self.taken_by_groups:
                    mask &= ~(1 << index)
        return mask

    def _free_devices(self) -> list[int]:
        return [
            i
            for i, device in enumerate(self.view.topology.devices)
            if device.id not in self.view.usage.devices and device.id not in self.taken_by_groups
        ]

    # all of them for one layout

    def best(self, cell_mask: int, bound: FunctionKey | None = None) -> Functions | None:
        """The best choice for an instance whose CPUs lie in these cells (a mask of positions), or None. One that is worse
        than ``bound`` by the GPUs alone may be left out."""
        for found in self.ranked(cell_mask, bound):
            return found
        return None

    def ranked(self, cell_mask: int, bound: FunctionKey | None = None) -> Iterator[Functions]:
        """Choices for that layout, best first."""
        request = self.request
        devices = self._devices(cell_mask)
        if devices is None:
            return
        remote_devices, chosen_devices = devices
        if not request.gpus:
            ports = self._ports((), cell_mask)
            if ports is not None:
                yield Functions((0, 0, 0, 0, ports[0], remote_devices, 0, 0), (), ports[1], chosen_devices)
            return
        near = 0
        for position, mask in self.view.topology.functions.gpus_of_cell.items():
            if cell_mask >> position & 1:
                near |= mask
        keyed: list[tuple[tuple[int, int, int, int], tuple[Candidate, ...]]] = []
        if len(request.gpus) == 1:
            local = request.gpus[0].local
            for candidate in self.candidates[0]:
                far = (candidate.mask & ~near).bit_count()
                if not (far and local):
                    keyed.append(((far, *candidate.spread), (candidate,)))
        else:
            for several in self.together():
                first = self._gpu_key(several, near)
                if first is not None:
                    keyed.append((first, several))
        keyed.sort(key=lambda item: item[0])
        waiting: list[Functions] = []
        prefix: tuple[int, ...] = ()
        for first, chosen in keyed:
            if bound is not None and first > bound[:4]:
                break
            if first != prefix:
                yield from sorted(waiting, key=lambda f: f.key)
                waiting, prefix = [], first
            ports = self._ports(chosen, cell_mask)
            if ports is not None:
                key = (*first, ports[0], remote_devices, *self._waste(chosen))
                waiting.append(Functions(key, chosen, ports[1], chosen_devices))
        yield from sorted(waiting, key=lambda f: f.key)

    def _gpu_key(self, chosen: tuple[Candidate, ...], near: int) -> tuple[int, int, int, int] | None:
        remote = cells = roots = switches = 0
        for asked, candidate in zip(self.request.gpus, chosen, strict=True):
            far = (candidate.mask & ~near).bit_count()
            if far and asked.local:
                return None
            remote += far
            cells += candidate.spread[0]
            roots += candidate.spread[1]
            switches += candidate.spread[2]
        return (remote, cells, roots, switches)

    def _waste(self, chosen: tuple[Candidate, ...]) -> tuple[int, int]:
        mask = 0
        for candidate in chosen:
            mask |= candidate.mask
        broken = 0
        for free in self.partitions:
            if free & mask and free & ~mask:
                broken += 1
        if any(asked.is_share for asked in self.request.gpus):
            return broken, sum(self.room.get(i, 0) for i in bits(mask))
        left = 0
        for here in self.view.topology.functions.gpus_of_cell.values():
            if here & mask:
                left += (here & self.free & ~mask).bit_count()
        return broken, 1000 * left

    def _ports(self, chosen: tuple[Candidate, ...], cell_mask: int) -> tuple[int, tuple[int, ...]] | None:
        """Ports for the NICs: the least sum of distances. First each to its nearest; if that asks too much of a port, by
        trying them out, with what was found for the same rest of NICs and VFs remembered."""
        nics = self.request.nics
        if not nics:
            return 0, ()
        mask = 0
        for candidate in chosen:
            mask |= candidate.mask
        options = []
        for nic, ports_of_nic in zip(nics, self.nic_ports, strict=True):
            found = self._port_options(nic, ports_of_nic, mask, cell_mask)
            if not found:
                return None
            options.append(found)
        if len(options) == 1:
            far, _, port = options[0][0]
            return far, (port,)
        room = [mask.bit_count() for mask in self.vfs]
        total = 0
        ports: list[int] = []
        for found in options:
            # Of ports that are as near, one that serves none of this request yet: each link, and each GPU, has its NIC.
            far, _, port = min(found, key=lambda option: (option[0], ports.count(option[2]), option[1:]))
            total += far
            ports.append(port)
        if all(room[port] >= ports.count(port) for port in set(ports)):
            return total, tuple(ports)
        return _assign(options, tuple(min(count, len(nics)) for count in room))

    def _port_options(
        self, nic: NicRequest, ports: list[tuple[int, int]], gpus: int, cell_mask: int
    ) -> list[tuple[int, int, int]]:
        """(distance, -free VFs, port), nearest first; of equal ones the port with most VFs left, to share out the link."""
        functions = self.view.topology.functions
        farthest = _FARTHEST[nic.near]
        found = []
        for free, port in ports:
            if gpus:
                switch, root, cell = functions.pf_rings[port]
                far = 0 if gpus & switch else 1 if gpus & root else 2 if gpus & cell else 3
            else:
                home = functions.pf_cell[port]
                far = 0 if home >= 0 and cell_mask >> home & 1 else ELSEWHERE
            if far <= farthest:
                found.append((far, free, port))
        found.sort()
        return found

    def _devices(self, cell_mask: int) -> tuple[int, tuple[int, ...]] | None:
        """Devices for the requests: as many beside the CPUs as can be, by augmenting paths over those first."""
        if not self.request.devices:
            return 0, ()
        asked = [d for d in self.request.devices for _ in range(d.count)]
        topology = self.view.topology
        cells = topology.functions.device_cell
        local = {i for i in self.devices if cells[i] >= 0 and cell_mask >> cells[i] & 1}
        fitting = [[i for i in self.devices if set(want.labels) <= set(topology.devices[i].labels)] for want in asked]
        beside = [[i for i in found if i in local] for found in fitting]
        anywhere = [near if want.local else found for want, near, found in zip(asked, beside, fitting, strict=True)]
        holder: dict[int, int] = {}
        _match(beside, holder)
        # augmenting never frees a device that is held, so what the first pass found beside the CPUs stays in use
        _match(anywhere, holder)
        if len(holder) < len(asked):
            return None
        chosen = {k: i for i, k in holder.items()}
        devices = tuple(chosen[k] for k in range(len(asked)))
        return sum(i not in local for i in devices), devices

    # into a claim

    def shares_of(self, chosen: tuple[Candidate, ...]) -> tuple[GpuShare, ...]:
        """The slices of those candidates that are slices."""
        found = []
        for asked, candidate in zip(self.request.gpus, chosen, strict=True):
            if asked.is_share:
                for i in bits(candidate.mask):
                    share = self.slice_of(i, asked)
                    if share is not None:
                        found.append(share)
        return tuple(found)

    def whole_of(self, chosen: tuple[Candidate, ...]) -> tuple[Gpu, ...]:
        """The whole GPUs, in the order of the requests."""
        gpus = self.view.topology.gpus
        return tuple(
            gpus[i]
            for asked, candidate in zip(self.request.gpus, chosen, strict=True)
            if not asked.is_share
            for i in bits(candidate.mask)
        )

    def vfs_of(self, ports: tuple[int, ...]) -> tuple[VfClaim, ...]:
        """The lowest free VF of each port, in the order of the NICs."""
        left = list(self.vfs)
        found = []
        for nic, port in enumerate(ports):
            low = left[port] & -left[port]
            left[port] ^= low
            found.append(VfClaim(self.view.topology.pfs[port].mac, low.bit_length() - 1, nic))
        return tuple(found)


def _taken_by_groups(view: View) -> frozenset[str]:
    """Functions that share an IOMMU group with one that somebody holds."""
    groups = view.index.shared_groups
    if not groups:
        return frozenset()
    usage = view.usage
    taken: set[str] = set()
    for names in groups.values():
        for name in names:
            pf, slash, index = name.partition("/")
            held = name in usage.gpus or name in usage.devices
            if held or (slash and usage.vfs.get(pf, 0) >> int(index) & 1):
                taken.update(names)
                break
    return frozenset(taken)


def _assign(
    options: Sequence[Sequence[tuple[int, int, int]]], room: tuple[int, ...]
) -> tuple[int, tuple[int, ...]] | None:
    """The cheapest port for each NIC with at most ``room`` NICs a port; None where there is no way."""
    known: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None] = {}

    def rest(nic: int, room: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
        if nic == len(options):
            return 0, ()
        if (nic, room) in known:
            return known[nic, room]
        best: tuple[int, tuple[int, ...]] | None = None
        for far, _, port in options[nic]:
            if room[port] and (best is None or far < best[0]):
                after = rest(nic + 1, (*room[:port], room[port] - 1, *room[port + 1 :]))
                if after is not None and (best is None or far + after[0] < best[0]):
                    best = (far + after[0], (port, *after[1]))
        known[nic, room] = best
        return best

    return rest(0, room)


def _match(fitting: list[list[int]], holder: dict[int, int]) -> None:
    """Extend ``holder`` (thing to asker) to as many askers as can be served (Kuhn's augmenting paths)."""

    def seat(k: int, seen: set[int]) -> bool:
        for i in fitting[k]:
            if i not in seen:
                seen.add(i)
                if i not in holder or seat(holder[i], seen):
                    holder[i] = k
                    return True
        return False

    served = set(holder.values())
    for k in range(len(fitting)):
        if k not in served:
            seat(k, set())
