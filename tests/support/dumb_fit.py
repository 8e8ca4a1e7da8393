"""The dumb twin of ``casemate_core.fit``: tries everything, on hosts small enough for that.

It works on the records of a topology and on claims, never on indices, masks or sums of the core, and enumerates subsets
wherever the core reasons. ``ways`` yields the documented key of every way that a request fits; tests compare the
smallest with what the core found, and "there is none" with a refusal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations, permutations, product

from casemate_core.claims import HostClaims
from casemate_core.fit import (
    CellPolicy,
    CoreChoice,
    CpuPolicy,
    EmulatorPolicy,
    GpuLink,
    GpuRequest,
    Near,
    Overcommit,
    Request,
    ThreadPolicy,
)
from casemate_core.topology import Core, Gpu, PciPlace, Topology

Key = tuple[int, ...]
FAR = {Near.SWITCH: 0, Near.ROOT: 1, Near.CELL: 2, Near.ANY: 3}


@dataclass(frozen=True)
class CpuWay:
    """Threads taken, by what; key is (isolated_use, caches, a, b)."""

    cells: frozenset[int]
    taken: frozenset[int]
    key: Key


class Twin:
    """One request on one host with its claims."""

    def __init__(self, topology: Topology, claims: HostClaims, request: Request, overcommit: Overcommit) -> None:
        self.t = topology
        self.claims = list(claims)
        self.r = request
        self.o = overcommit
        self.owned = {thread for claim in claims for thread in claim.owned}
        self.cores = {thread: core for core in topology.cores for thread in core.threads}
        self.isolated = {
            thread
            for core in topology.cores
            if core.threads <= topology.isolated
            for thread in core.threads
            if thread not in topology.reserved
        }
        self.pool = {t for t in self.cores if t not in topology.reserved and t not in topology.isolated}
        self.free = (self.pool | self.isolated) - self.owned
        if request.cpu.cores is not CoreChoice.ANY:
            kind = request.cpu.cores.value
            self.kind = {t for t in self.free if self.cores[t].kind.value == kind}
        else:
            self.kind = self.free
        self.vcpus = max(request.cpu.count, request.cpu.max)
        self.size = max(request.memory.size_mib, request.memory.max_mib)
        self.dedicated = request.cpu.policy is CpuPolicy.DEDICATED or request.cpu.realtime
        self.width = max(len(core.threads) for core in topology.cores)

    # amounts

    def plain_free(self, cell: int) -> int:
        record = next(c for c in self.t.cells if c.id == cell)
        pools = sum(-(-p.page_kib * p.count // 1024) for p in record.pools)
        used = sum(m.charged_mib for c in self.claims for m in c.memory if m.cell == cell)
        return record.memory_mib - record.reserved_mib - pools - used

    def pages_free(self, cell: int) -> int:
        record = next(c for c in self.t.cells if c.id == cell)
        size = self.r.memory.page_kib
        used = sum(p.count + p.growth for c in self.claims for p in c.pages if (p.cell, p.page_kib) == (cell, size))
        return sum(p.count for p in record.pools if p.page_kib == size) - used

    def charged(self, cell: int) -> int:
        return sum(s.milli for c in self.claims for s in c.shared if s.cell == cell)

    def pool_of(self, cell: int) -> set[int]:
        return {t for t in self.pool - self.owned if self.cores[t].cell == cell}

    def charge(self, size: int) -> int:
        return -(-size * 100 // self.o.memory_percent)

    def memory_in(self, cell: int, size: int, pages: int, overhead: int) -> bool:
        if self.r.memory.page_kib:
            return self.pages_free(cell) >= pages and self.plain_free(cell) >= overhead
        return self.plain_free(cell) >= self.charge(size) + overhead

    @property
    def page_count(self) -> int:
        size = self.r.memory.page_kib
        return -(-self.size * 1024 // size) if size else 0

    def memory_anywhere(self) -> bool:
        cells = [c.id for c in self.t.cells]
        plain = sum(max(0, self.plain_free(c)) for c in cells)
        if self.r.memory.page_kib:
            return sum(self.pages_free(c) for c in cells) >= self.page_count and plain >= self.r.memory.overhead_mib
        return plain >= self.size + self.r.memory.overhead_mib

    # CPUs

    def sound(self, taken: frozenset[int]) -> bool:
        """What the pools keep when ``taken`` is gone."""
        left = self.pool - self.owned - taken
        for cell in self.t.cells:
            if 1000 * sum(self.cores[t].cell == cell.id for t in left) < self.charged(cell.id):
                return False
        return bool(self.t.reserved) or bool(left)

    def mode(self) -> str:
        threads = self.r.cpu.threads
        if self.r.cpu.realtime and threads in (ThreadPolicy.ANY, ThreadPolicy.PREFER):
            return "whole"
        return threads.value

    def cpu_ways(self, count: int, cells: frozenset[int], emulator: bool) -> Iterator[CpuWay]:
        """Ways for ``count`` dedicated vCPUs within cells, all of which get one, the emulator in one of them."""
        allowed = {t for t in self.kind if self.cores[t].cell in cells}
        if self.r.cpu.realtime:
            allowed &= self.isolated
        for taken, vcpus in self.thread_sets(count, allowed):
            if {self.cores[t].cell for t in vcpus} != cells:
                continue
            rest: list[frozenset[int]] = [frozenset()]
            if emulator:
                rest = [frozenset({t}) for t in self.free - taken if self.cores[t].cell in cells]
            if any(self.sound(taken | extra) for extra in rest):
                yield CpuWay(cells, taken, self.cpu_key(taken, vcpus))

    def thread_sets(self, count: int, allowed: set[int]) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
        """(threads taken, those of vCPUs); of vCPUs on a core that is held it does not matter which thread."""
        mode = self.mode()
        if mode in ("any", "prefer"):
            for vcpus in combinations(sorted(allowed), count):
                yield frozenset(vcpus), frozenset(vcpus)
            return
        whole = [
            c
            for c in self.t.cores
            if set(c.threads) <= allowed and (mode != "require" or (len(c.threads) == self.width and self.width > 1))
        ]
        for n in range(1, len(whole) + 1):
            for cores in combinations(whole, n):
                taken = frozenset(t for c in cores for t in c.threads)
                if mode == "isolate":
                    if n == count:
                        yield taken, frozenset(c.threads.first for c in cores)
                elif n <= count <= len(taken):
                    yield taken, taken

    def cpu_key(self, taken: frozenset[int], vcpus: frozenset[int]) -> Key:
        quiet = len(taken & self.isolated)
        use = 0 if not quiet else 1 if quiet == len(taken) else 2
        cores = {self.cores[t].id: self.cores[t] for t in taken}
        caches = len({(c.cell, c.l3) for c in cores.values()})

        def was_whole(core: Core) -> bool:
            # a core is whole where all of its threads could be had by this very kind of request
            side = self.isolated if core.threads.first in self.isolated else self.pool
            return set(core.threads) <= self.kind & side

        broken = sum(was_whole(c) for c in cores.values())
        mode = self.mode()
        if mode == "any":
            return (use, caches, broken, len(cores))
        if mode == "prefer":
            return (use, caches, len(cores), broken)
        return (use, caches, len(taken), len(cores))

    # functions

    def held(self) -> set[str]:
        names = {u for c in self.claims for u in c.gpus} | {d for c in self.claims for d in c.devices}
        names |= {f"{v.pf}/{v.index}" for c in self.claims for v in c.vfs}
        groups = {name: group for name, group in self.groups().items() if group >= 0}
        taken = {groups[name] for name in names if name in groups}
        return names | {name for name, group in groups.items() if group in taken}

    def groups(self) -> dict[str, int]:
        found = {g.uuid: g.place.iommu_group for g in self.t.gpus}
        found |= {d.id: d.place.iommu_group for d in self.t.devices}
        found |= {f"{p.mac}/{v.index}": v.iommu_group for p in self.t.pfs for v in p.vfs}
        return found

    def gpu_sets(self, asked: GpuRequest) -> Iterator[tuple[tuple[Gpu, ...], int | None]]:
        sliced = {s.gpu for c in self.claims for s in c.shares}
        held = self.held()
        fitting = [
            g
            for g in self.t.gpus
            if fnmatchcase(g.model, asked.model)
            and g.uuid not in held
            and (self.has_slice(g, asked) if asked.is_share else g.uuid not in sliced)
        ]
        active = {c.partition for c in self.claims}
        for gpus in combinations(fitting, asked.count):
            uuids = {g.uuid for g in gpus}
            if asked.is_share or asked.link is GpuLink.ANY:
                yield gpus, None
            elif asked.link is GpuLink.PCIE:
                if len({g.place.path[0] if g.place.path else g.uuid for g in gpus}) == 1:
                    yield gpus, None
            elif self.t.partitions:
                for p in self.t.partitions:
                    if set(p.gpus) == uuids and p.id not in active:
                        yield gpus, p.id
            elif all(b.uuid in a.peers for a, b in combinations(gpus, 2)):
                yield gpus, None

    def has_slice(self, gpu: Gpu, asked: GpuRequest) -> bool:
        mine = [s for c in self.claims for s in c.shares if s.gpu == gpu.uuid]
        left = 1000 - sum(s.milli for s in mine)
        busy = {slot for s in mine for slot in range(s.start, s.start + s.slots)}
        if not asked.share_profile and gpu.share_step_milli:
            steps = [m for m in range(gpu.share_step_milli, 1000, gpu.share_step_milli) if m >= asked.share_milli]
            return any(m <= left for m in steps)
        return any(
            p.milli <= left
            and (p.name == asked.share_profile if asked.share_profile else p.milli >= asked.share_milli)
            and (not p.slots or any(not busy & set(range(a, a + p.slots)) for a in p.starts))
            for p in gpu.share_profiles
        )

    def function_keys(self, cells: frozenset[int]) -> Iterator[Key]:
        """(gpus_remote, cells, roots, switches, nic_far, devices_remote) of every choice."""
        remote_devices = self.devices_remote(cells)
        if remote_devices is None:
            return
        for chosen in product(*(list(self.gpu_sets(asked)) for asked in self.r.gpus)):
            gpus = [g for one, _ in chosen for g in one]
            if len({g.uuid for g in gpus}) != len(gpus) or sum(p is not None for _, p in chosen) > 1:
                continue
            if any(
                asked.local and any(g.place.cell not in cells for g in one)
                for asked, (one, _) in zip(self.r.gpus, chosen, strict=True)
            ):
                continue
            far = self.nics_far(gpus, cells)
            if far is None:
                continue
            spread = [0, 0, 0]
            for asked, (one, _) in zip(self.r.gpus, chosen, strict=True):
                if asked.is_share or (asked.link is GpuLink.NVLINK and self.t.partitions):
                    continue
                for level, extra in enumerate(self.spread([g.place for g in one])):
                    spread[level] += extra
            yield (sum(g.place.cell not in cells for g in gpus), *spread, far, remote_devices)

    @staticmethod
    def spread(places: list[PciPlace]) -> tuple[int, int, int]:
        cells = {p.cell if p.cell >= 0 else f"?{i}" for i, p in enumerate(places)}
        roots = {p.path[0] if p.path else f"?{i}" for i, p in enumerate(places)}
        switches = {p.path[:2] if len(p.path) > 1 else f"?{i}" for i, p in enumerate(places)}
        return len(cells) - 1, len(roots) - 1, len(switches) - 1

    def nics_far(self, gpus: list[Gpu], cells: frozenset[int]) -> int | None:
        held = self.held()
        free = {p.mac: sum(f"{p.mac}/{v.index}" not in held for v in p.vfs) for p in self.t.pfs}
        best: int | None = None
        for ports in product(self.t.pfs, repeat=len(self.r.nics)):
            total = 0
            for nic, port in zip(self.r.nics, ports, strict=True):
                able = nic.network in port.networks and set(nic.needs) <= set(port.capabilities)
                far = min(
                    (self.distance(port.place, g.place) for g in gpus), default=0 if port.place.cell in cells else 3
                )
                if not able or far > FAR[nic.near]:
                    break
                total += far
            else:
                if all(ports.count(p) <= free[p.mac] for p in ports) and (best is None or total < best):
                    best = total
        return best

    @staticmethod
    def distance(a: PciPlace, b: PciPlace) -> int:
        if len(a.path) > 1 and len(b.path) > 1 and a.path[:2] == b.path[:2]:
            return 0
        if a.path and b.path and a.path[0] == b.path[0]:
            return 1
        return 2 if a.cell == b.cell >= 0 else 3

    def devices_remote(self, cells: frozenset[int]) -> int | None:
        held = self.held()
        slots = [want for want in self.r.devices for _ in range(want.count)]
        free = [d for d in self.t.devices if d.id not in held]
        best: int | None = None
        for chosen in product(free, repeat=len(slots)):
            if len({d.id for d in chosen}) != len(chosen):
                continue
            if all(
                set(want.labels) <= set(d.labels) and (not want.local or d.place.cell in cells)
                for want, d in zip(slots, chosen, strict=True)
            ):
                remote = sum(d.place.cell not in cells for d in chosen)
                best = remote if best is None else min(best, remote)
        return best

    # all together

    def ways(self) -> Iterator[Key]:
        """(cells, functions' six terms, cpu's four) of every way; in several cells only the number of cells counts."""
        if sum(c.disk_mib for c in self.claims) + self.r.disk_mib > self.t.disk_mib:
            return
        one_only = (
            self.r.cpu.realtime
            or self.r.memory.cells is CellPolicy.ONE
            or any(g.local for g in self.r.gpus)
            or any(d.local for d in self.r.devices)
        )
        cpu_cells = sorted({self.cores[t].cell for t in self.pool | self.isolated})
        if self.r.memory.cells is CellPolicy.SPREAD and not one_only:
            count = self.r.memory.cell_count or len(cpu_cells)
            if 0 < count <= self.vcpus:
                for chosen in combinations(cpu_cells, count):
                    if self.spreads_over(chosen):
                        for functions in self.function_keys(frozenset(chosen)):
                            yield (count, *functions)
            return
        found = False
        for cell in cpu_cells:
            for cpu in self.in_one(cell):
                found = True
                for functions in self.function_keys(frozenset({cell})):
                    yield (1, *functions, *cpu)
        if not found and not one_only and self.memory_anywhere():
            for n in range(1, len(cpu_cells) + 1):
                for chosen in combinations(cpu_cells, n):
                    if self.cpu_over(frozenset(chosen)):
                        for functions in self.function_keys(frozenset(chosen)):
                            yield (n, *functions)

    def in_one(self, cell: int) -> Iterator[Key]:
        emulator = self.r.cpu.emulator is EmulatorPolicy.ISOLATE
        if not self.memory_in(cell, self.size, self.page_count, self.r.memory.overhead_mib):
            return
        if not self.dedicated:
            if 1000 * len(self.pool_of(cell)) - self.charged(cell) >= self.milli(self.vcpus):
                yield (0, 0, 0, 0)
            return
        has_housekeeping = any(self.cores[t].cell == cell for t in self.t.reserved)
        if self.r.cpu.realtime and not has_housekeeping and not emulator:
            return
        for way in self.cpu_ways(self.vcpus, frozenset({cell}), emulator):
            yield way.key

    def milli(self, vcpus: int) -> int:
        return -(-vcpus * (self.r.cpu.shared_milli or 1000) * 100 // self.o.cpu_percent)

    def cpu_over(self, cells: frozenset[int]) -> bool:
        """Do the CPUs fit over exactly these cells (the emulator anywhere)?"""
        if not self.dedicated:
            room = [1000 * len(self.pool_of(c)) - self.charged(c) for c in cells]
            return min(room) > 0 and sum(room) >= self.milli(self.vcpus)
        emulator = self.r.cpu.emulator is EmulatorPolicy.ISOLATE
        allowed = {t for t in self.kind if self.cores[t].cell in cells}
        for taken, vcpus in self.thread_sets(self.vcpus, allowed):
            if {self.cores[t].cell for t in vcpus} != cells:
                continue
            rest = [frozenset({t}) for t in self.free - taken] if emulator else [frozenset[int]()]
            if any(self.sound(taken | extra) for extra in rest):
                return True
        return False

    def spreads_over(self, cells: tuple[int, ...]) -> bool:
        """Equal parts over exactly these cells, in some order."""
        n = len(cells)
        emulator = self.r.cpu.emulator is EmulatorPolicy.ISOLATE and self.dedicated

        def even(total: int) -> list[int]:
            return [total // n + (i < total % n) for i in range(n)]

        rows = list(
            zip(
                even(self.vcpus),
                even(0 if self.dedicated else self.milli(self.vcpus)),
                even(self.size),
                even(self.page_count),
                even(self.r.memory.overhead_mib),
                strict=True,
            )
        )
        for order in permutations(cells):
            if not all(
                self.memory_in(c, size, pages, extra) for c, (_, _, size, pages, extra) in zip(order, rows, strict=True)
            ):
                continue
            if not self.dedicated:
                if all(
                    1000 * len(self.pool_of(c)) - self.charged(c) >= milli
                    for c, (_, milli, *_) in zip(order, rows, strict=True)
                ):
                    return True
                continue
            options = [
                [taken for taken, vcpus in self.thread_sets(count, {t for t in self.kind if self.cores[t].cell == c})]
                for c, (count, *_) in zip(order, rows, strict=True)
            ]
            for chosen in product(*options):
                taken = frozenset(t for one in chosen for t in one)
                rest = (
                    [frozenset({t}) for t in self.free - taken if self.cores[t].cell in cells]
                    if emulator
                    else [frozenset[int]()]
                )
                if any(self.sound(taken | extra) for extra in rest):
                    return True
        return False


def best_key(topology: Topology, claims: HostClaims, request: Request, overcommit: Overcommit) -> Key | None:
    """The smallest key of all ways, None where there is none."""
    return min(Twin(topology, claims, request, overcommit).ways(), default=None)
