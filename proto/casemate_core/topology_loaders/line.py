"""A host in one line of text.

What may live here: the grammar below and the host that follows from it. For tests, simulations and documents; a recorded
machine comes from ``libvirt`` instead.

Grammar: tokens between white space, in any order, each at most once but for ``gpu``, ``vf`` and ``dev``. Amounts of the
whole host are shared evenly over its cells with CPUs, the first cells take what is left over::

    2s            sockets                                     default 1
    2c/s          cells per socket                            default 1
    16k/c         cores per cell                              default 1
    2t            threads per core                            default 1
    8k/l3         cores per last-level cache                  default: all cores of a cell
    sib=pairs     siblings are 2k and 2k+1; sib=far: k and k + cores of the host (default)
    256G          memory of the host (M, G, T are binary)     default 4G
    rmem=4G       of which the host keeps for itself
    1G=64 2M=512  huge pages of the host, inside its memory
    hk=2          the first so many cores of each cell are housekeeping, all their threads
    iso=12        the last so many cores of each cell are isolated
    off=5,7-8     these threads are offline
    disk=2T       disk for instances                          default 100G
    mem=32x0      32 more cells without CPUs, with so much memory each
    gpu=8xH200    GPUs; then, each optional, in this order:
      :141G         memory of each                            default 80G
      @nvlink       all to all, no partition manager; @fabric: NVSwitch partitions 8/4/2/1; @pcie: none (default)
      /7            slices: seven of 1/7 (no slots); /10m: of any multiple of 10 thousandths; /mig: MIG profiles
    vf=4x32       PFs x VFs; then, each optional, in this order:
      @fronthaul+mgmt   networks that each PF reaches         default physnet0
      !vlan+rate        capabilities                          default vlan+trust+rate+spoofchk
    dev=2xfec     devices with the label ``type=fec``
    name=edge-1   name of the picture

GPUs, PFs and devices are dealt over the sockets' cells in order; the k-th GPU and the k-th PF of a cell share a PCI switch,
as on GPU servers with one NIC per GPU. Identities are derived from the line's counts and ``name``, so that the same line
is the same host.
"""

import re

from casemate_core.cpuset import CpuSet
from casemate_core.errors import CallerError, shown
from casemate_core.topology.model import (
    Cell,
    Core,
    Device,
    FabricPartition,
    Gpu,
    PagePool,
    PciPlace,
    PhysicalFunction,
    ShareProfile,
    Topology,
    VirtualFunction,
)
from casemate_core.topology.rules import check

_SIZE = re.compile(r"(\d+)([MGT])?")
_UNITS_MIB = {"M": 1, "G": 1024, "T": 1024 * 1024, None: 1}
_GPU = re.compile(r"(\d+)x([A-Za-z0-9 _.-]+?)(?::(\d+[MGT]))?(?:@(nvlink|fabric|pcie))?(?:/(\d+m|\d+|mig))?")
_VF = re.compile(r"(\d+)x(\d+)(?:@([\w.+-]+))?(?:!([\w+]+))?")
_DEV = re.compile(r"(\d+)x([\w.-]+)")
_COUNT = re.compile(r"(\d+)(s|c/s|k/c|t|k/l3)")
_PAGES = {"4K": 4, "2M": 2048, "1G": 1024 * 1024}
_MAX_THREADS = 4096

MIG_SLOTS = 8
MIG_PROFILES = (
    ("1g", 1, 1, range(7)),
    ("2g", 2, 2, (0, 2, 4)),
    ("3g", 3, 4, (0, 4)),
    ("4g", 4, 4, (0,)),
    ("7g", 7, 8, (0,)),
)
"""Name, sevenths of the compute, memory slices of eight, and where they may start: NVIDIA's MIG user guide, tables of
profile placements for A100 and H100. 7g is the whole GPU and left to whole requests."""


class BadLine(CallerError):
    """The line is no host; ``token`` is what is wrong with it."""

    reason = "BadTopologyLine"

    def __init__(self, token: str, problem: str) -> None:
        self.token = token
        super().__init__(f"{shown(token)!r}: {problem}")


def from_line(line: str) -> Topology:
    """The host that a line describes. Raises BadLine."""
    counts: dict[str, int] = {}
    memory: list[int] = []
    pages: dict[int, int] = {}
    options: dict[str, str] = {}
    many: dict[str, list[str]] = {"gpu": [], "vf": [], "dev": []}
    for token in line.split():
        key, equals, value = token.partition("=")
        if match := _COUNT.fullmatch(token):
            _once(counts, match[2], int(match[1]), token)
        elif not equals and (match := _SIZE.fullmatch(token)) and match[2]:
            if memory:
                raise BadLine(token, "memory is given twice")
            memory.append(_size_mib(token, token))
        elif key in _PAGES and value.isdecimal():
            _once(pages, _PAGES[key], int(value), token)
        elif key in many and value:
            many[key].append(value)
        elif key in ("rmem", "hk", "iso", "off", "disk", "mem", "name", "sib") and value:
            _once(options, key, value, token)
        else:
            raise BadLine(token, "no such part of a host; write e.g. 2s 1c/s 16k/c 2t 256G 1G=64 gpu=8xH200 vf=4x32")
    return _Host(counts, memory[0] if memory else 4096, pages, options, many).build()


def _once(table: "dict[str, int] | dict[int, int] | dict[str, str]", key: object, value: object, token: str) -> None:
    if key in table:
        raise BadLine(token, "given twice")
    table[key] = value  # type: ignore[index, assignment]


def _size_mib(text: str, token: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadLine(token, "is not a size such as 512M, 64G or 2T")
    return int(match[1]) * _UNITS_MIB[match[2]]


def _shared_out(total: int, places: int) -> list[int]:
    """``total`` over ``places``, evenly, the first ones take one more."""
    each, more = divmod(total, places)
    return [each + (i < more) for i in range(places)]


class _Host:
    """One line being turned into a topology."""

    def __init__(
        self,
        counts: dict[str, int],
        memory_mib: int,
        pages: dict[int, int],
        options: dict[str, str],
        many: dict[str, list[str]],
    ) -> None:
        self.sockets = self._positive(counts.get("s", 1), "sockets")
        self.cells_each = self._positive(counts.get("c/s", 1), "cells")
        self.cores_each = self._positive(counts.get("k/c", 1), "cores")
        self.width = self._positive(counts.get("t", 1), "threads")
        self.l3_each = self._positive(counts.get("k/l3", self.cores_each), "cores per cache")
        self.cpu_cells = self.sockets * self.cells_each
        if self.cpu_cells * self.cores_each * self.width > _MAX_THREADS:
            raise BadLine("k/c", f"makes more than {_MAX_THREADS} threads")
        self.memory_mib = memory_mib
        self.pages = pages
        self.options = options
        self.many = many
        self.name = options.get("name", "host")

    @staticmethod
    def _positive(count: int, what: str) -> int:
        if count < 1:
            raise BadLine("0", f"a host has at least one of its {what}")
        return count

    def _number(self, key: str) -> int:
        text = self.options.get(key, "0")
        if not text.isdecimal():
            raise BadLine(f"{key}={text}", "is not a count")
        return int(text)

    def build(self) -> Topology:
        offline = self._offline()
        cores, reserved, isolated = self._cores(offline)
        gpus, partitions = self._gpus()
        topology = Topology(
            cells=self._cells(),
            cores=cores,
            offline=offline,
            reserved=reserved,
            isolated=isolated,
            disk_mib=_size_mib(self.options.get("disk", "100G"), "disk"),
            gpus=gpus,
            partitions=partitions,
            pfs=self._pfs(),
            devices=self._devices(),
            name=self.name,
        )
        if broken := check(topology):
            raise BadLine(self.name, "; ".join(map(str, broken)))
        return topology

    def _offline(self) -> CpuSet:
        try:
            return CpuSet.parse(self.options.get("off", ""))
        except ValueError as error:
            raise BadLine(f"off={self.options['off']}", str(error)) from error

    def _threads(self, core: int) -> list[int]:
        total = self.cpu_cells * self.cores_each
        if self.options.get("sib", "far") == "pairs":
            return [core * self.width + i for i in range(self.width)]
        if self.options.get("sib", "far") == "far":
            return [core + i * total for i in range(self.width)]
        raise BadLine(f"sib={self.options['sib']}", "is neither pairs nor far")

    def _cores(self, offline: CpuSet) -> tuple[tuple[Core, ...], CpuSet, CpuSet]:
        housekeeping, quiet = self._number("hk"), self._number("iso")
        if housekeeping + quiet > self.cores_each:
            raise BadLine(f"iso={quiet}", f"a cell has {self.cores_each} cores, {housekeeping} of them housekeeping")
        cores: list[Core] = []
        reserved, isolated = CpuSet(), CpuSet()
        caches_each = -(-self.cores_each // self.l3_each)
        for number in range(self.cpu_cells * self.cores_each):
            cell, within = divmod(number, self.cores_each)
            threads = CpuSet.from_ids(self._threads(number)) - offline
            if not threads:
                continue
            cores.append(
                Core(
                    id=number,
                    socket=cell // self.cells_each,
                    cell=cell,
                    l3=cell * caches_each + within // self.l3_each,
                    threads=threads,
                )
            )
            if within < housekeeping:
                reserved |= threads
            elif within >= self.cores_each - quiet:
                isolated |= threads
        return tuple(cores), reserved, isolated

    def _cells(self) -> tuple[Cell, ...]:
        memory = _shared_out(self.memory_mib, self.cpu_cells)
        kept = _shared_out(_size_mib(self.options.get("rmem", "0"), "rmem"), self.cpu_cells)
        pools = {size: _shared_out(count, self.cpu_cells) for size, count in sorted(self.pages.items())}
        extra = re.fullmatch(r"(\d+)x(\d+[MGT]?)", self.options.get("mem", "0x0"))
        if extra is None:
            raise BadLine(f"mem={self.options['mem']}", "is not a count and a size such as 2x64G")
        total = self.cpu_cells + int(extra[1])
        return tuple(
            Cell(
                id=i,
                memory_mib=memory[i] if i < self.cpu_cells else _size_mib(extra[2], "mem"),
                pools=tuple(PagePool(size, counts[i]) for size, counts in pools.items()) if i < self.cpu_cells else (),
                reserved_mib=kept[i] if i < self.cpu_cells else 0,
                distances=tuple(self._distance(i, j) for j in range(total)),
            )
            for i in range(total)
        )

    def _distance(self, a: int, b: int) -> int:
        """Home 10, the same socket 12, another 32, a memory cell 40 (as on current two-socket servers)."""
        if a == b:
            return 10
        if max(a, b) >= self.cpu_cells:
            return 40
        return 12 if a // self.cells_each == b // self.cells_each else 32

    def _dealt(self, count: int, base: int) -> list[tuple[PciPlace, int]]:
        """Places for ``count`` functions, over the cells in order; functions with the same rank share a switch."""
        places: list[tuple[PciPlace, int]] = []
        for cell, here in enumerate(_shared_out(count, self.cpu_cells)):
            for rank in range(here):
                bus = 0x10 + cell * 0x10 + rank
                places.append(
                    (
                        PciPlace(
                            path=(f"pci{cell:04x}:{bus:02x}", f"switch{cell}.{rank}"),
                            cell=cell,
                            iommu_group=base + len(places),
                            address=f"{cell:04x}:{bus:02x}:{base % 31:02x}.0",
                        ),
                        rank,
                    )
                )
        return places

    def _gpus(self) -> tuple[tuple[Gpu, ...], tuple[FabricPartition, ...]]:
        gpus: list[Gpu] = []
        partitions: list[FabricPartition] = []
        for number, text in enumerate(self.many["gpu"]):
            match = _GPU.fullmatch(text)
            if match is None:
                raise BadLine(f"gpu={text}", "is not e.g. 8xH200:141G@fabric")
            count, model, link = int(match[1]), match[2], match[4]
            memory = _size_mib(match[3] or "80G", text)
            names = [f"GPU-{self.name}-{number}-{i:02d}" for i in range(count)]
            slots, profiles, step = _share(match[5], memory)
            for i, (place, _) in enumerate(self._dealt(count, 1000 + 100 * number)):
                peers = tuple(n for n in names if n != names[i]) if link == "nvlink" else ()
                gpus.append(Gpu(names[i], model, memory, place, -1, peers, slots, profiles, step))
            if link == "fabric":
                partitions += _partitions(names, len(partitions))
        return tuple(sorted(gpus, key=lambda g: g.uuid)), tuple(partitions)

    def _pfs(self) -> tuple[PhysicalFunction, ...]:
        pfs: list[PhysicalFunction] = []
        for number, text in enumerate(self.many["vf"]):
            match = _VF.fullmatch(text)
            if match is None:
                raise BadLine(f"vf={text}", "is not e.g. 4x32@fronthaul+mgmt!vlan")
            networks = tuple(sorted((match[3] or "physnet0").split("+")))
            needs = tuple(sorted((match[4] or "vlan+trust+rate+spoofchk").split("+")))
            for place, _ in self._dealt(int(match[1]), 2000 + 100 * number):
                ordinal = len(pfs)
                base = 10_000 + ordinal * 256
                vfs = tuple(
                    VirtualFunction(i, base + i, f"{place.address[:-4]}{1 + i // 8:02x}.{i % 8}")
                    for i in range(int(match[2]))
                )
                pfs.append(PhysicalFunction(_mac(self.name, ordinal), networks, vfs, needs, place, 100_000))
        return tuple(sorted(pfs, key=lambda p: p.mac))

    def _devices(self) -> tuple[Device, ...]:
        devices: list[Device] = []
        for number, text in enumerate(self.many["dev"]):
            match = _DEV.fullmatch(text)
            if match is None:
                raise BadLine(f"dev={text}", "is not e.g. 2xfec")
            for i, (place, _) in enumerate(self._dealt(int(match[1]), 3000 + 100 * number)):
                devices.append(Device(f"{match[2]}-{self.name}-{number}-{i}", (("type", match[2]),), place))
        return tuple(sorted(devices, key=lambda d: d.id))


def _mac(name: str, ordinal: int) -> str:
    """A locally administered address from the host's name (FNV-1a, so that it needs no import) and a port's ordinal."""
    digest = 0x811C9DC5
    for byte in name.encode():
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    octets = (0x02, *digest.to_bytes(4, "big"), ordinal)
    return ":".join(f"{octet:02x}" for octet in octets)


def _share(text: str | None, memory_mib: int) -> tuple[int, tuple[ShareProfile, ...], int]:
    if text is None:
        return 0, (), 0
    if text == "mig":
        profiles = tuple(
            ShareProfile(
                f"{name}.{memory_mib * size // MIG_SLOTS // 1024}gb",
                1000 * sevenths // 7,
                memory_mib * size // MIG_SLOTS,
                size,
                tuple(starts),
            )
            for name, sevenths, size, starts in MIG_PROFILES
            if sevenths < 7
        )
        return MIG_SLOTS, profiles, 0
    if text.endswith("m"):
        return 0, (), int(text[:-1])
    parts = int(text)
    if parts < 2:
        raise BadLine(f"/{text}", "a shared GPU has at least two slices")
    return 0, (ShareProfile(f"1/{parts}", 1000 // parts, memory_mib // parts),), 0


def _partitions(names: list[str], first_id: int) -> list[FabricPartition]:
    """All, halves, quarters ... singles: the shape of the partitions that a fabric manager offers on HGX boards."""
    found: list[FabricPartition] = []
    size = len(names)
    while size:
        for start in range(0, len(names) - size + 1, size):
            found.append(FabricPartition(first_id + len(found), tuple(sorted(names[start : start + size]))))
        size //= 2
    return found
