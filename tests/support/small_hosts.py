"""Hypothesis strategies for small hosts and the requests that they can just, or just not, take."""

from typing import cast

from hypothesis import strategies as st

from casemate_core.cpuset import CpuSet
from casemate_core.fit import (
    CellPolicy,
    CoreChoice,
    CpuPolicy,
    CpuRequest,
    DeviceRequest,
    EmulatorPolicy,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    Near,
    NicRequest,
    Request,
    ThreadPolicy,
)
from casemate_core.topology import (
    Cell,
    Core,
    CoreKind,
    Device,
    FabricPartition,
    Gpu,
    PagePool,
    PciPlace,
    PhysicalFunction,
    ShareProfile,
    Topology,
    VirtualFunction,
    check,
)

PAGE_KIB = 2048
SHARES = (
    (0, (), 0),
    (0, (), 250),
    (0, (ShareProfile("half", 500, 1),), 0),
    (4, (ShareProfile("1s", 250, 1, 1, (0, 1, 2, 3)), ShareProfile("2s", 500, 2, 2, (0, 2))), 0),
)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Up to three cells with a few cores of one, two or four threads, perhaps a memory cell, up to three GPUs, two ports, three devices."""
    cell_count = draw(st.integers(1, 3))
    cores: list[Core] = []
    thread = 0
    for cell in range(cell_count):
        for n in range(draw(st.integers(1, (4, 3, 2)[cell_count - 1]))):
            width = draw(st.sampled_from((1, 2, 2, 4)))
            kind = draw(st.sampled_from((CoreKind.UNIFORM, CoreKind.UNIFORM, CoreKind.PERFORMANCE)))
            threads = CpuSet.from_ids(range(thread, thread + width))
            thread += width
            cores.append(Core(len(cores), cell, cell, cell * 2 + draw(st.integers(0, 1)), threads, kind))
            if n >= 3:
                break
    online = [t for core in cores for t in core.threads]
    reserved = CpuSet.from_ids(draw(st.sets(st.sampled_from(online), max_size=2)))
    quiet = draw(st.sets(st.sampled_from(range(len(cores))), max_size=3))
    isolated = CpuSet.from_ids(t for i in quiet for t in cores[i].threads) - reserved
    cells = []
    for cell in range(cell_count + draw(st.integers(0, 1))):
        pools = draw(st.integers(0, 3))
        memory = draw(st.integers(0, 8)) + 2 * pools
        cells.append(Cell(cell, memory, (PagePool(PAGE_KIB, pools),) if pools else ()))
    places = st.builds(
        PciPlace,
        path=st.sampled_from(((), ("r0",), ("r0", "s0"), ("r0", "s1"), ("r1", "s2"), ("r1", "s2", "s3"))),
        cell=st.integers(-1, cell_count - 1),
        iommu_group=st.sampled_from((-1, -1, -1, 1, 2)),
    )
    gpus: list[Gpu] = []
    gpu_count = draw(st.integers(0, 3))
    linked = draw(st.booleans())
    for i in range(gpu_count):
        slots, profiles, step = draw(st.sampled_from(SHARES))
        peers = tuple(f"g{j}" for j in range(gpu_count) if j != i) if linked else ()
        model = draw(st.sampled_from(("H200", "L4")))
        gpus.append(Gpu(f"g{i}", model, 8, draw(places), i, peers, slots, profiles, step))
    partitions: tuple[FabricPartition, ...] = ()
    if draw(st.booleans()) and gpus:
        subsets = draw(
            st.lists(st.sets(st.sampled_from([g.uuid for g in gpus]), min_size=1), max_size=3, unique_by=frozenset)
        )
        partitions = tuple(FabricPartition(i, tuple(sorted(s))) for i, s in enumerate(subsets))
    pfs = tuple(
        PhysicalFunction(
            f"02:00:00:00:00:0{i}",
            draw(st.sampled_from((("n0",), ("n0", "n1"), ("n1",)))),
            tuple(VirtualFunction(v, draw(st.sampled_from((-1, -1, 1)))) for v in range(draw(st.integers(0, 2)))),
            draw(st.sampled_from(((), ("vlan",), ("trust", "vlan")))),
            draw(places),
        )
        for i in range(draw(st.integers(0, 2)))
    )
    devices = tuple(
        Device(f"d{i}", draw(st.sampled_from(((("type", "fec"),), (("size", "big"), ("type", "fec"))))), draw(places))
        for i in range(draw(st.integers(0, 3)))
    )
    topology = Topology(
        tuple(cells), tuple(cores), CpuSet(), reserved, isolated, 10, tuple(gpus), partitions, pfs, devices
    )
    assert not check(topology), check(topology)
    return topology


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Requests of the size of those hosts, each feature there now and then."""
    rare = st.sampled_from((False, False, False, True))
    count = draw(st.integers(1, 5))
    cpu = CpuRequest(
        count=count,
        max=draw(st.sampled_from((0, 0, count + 1))),
        policy=draw(st.sampled_from((CpuPolicy.DEDICATED, CpuPolicy.DEDICATED, CpuPolicy.SHARED))),
        threads=draw(st.sampled_from(ThreadPolicy)),
        emulator=draw(st.sampled_from(EmulatorPolicy)),
        realtime=draw(rare),
        shared_milli=draw(st.sampled_from((0, 300))),
    )
    if draw(rare) and cpu.policy is CpuPolicy.DEDICATED:
        cpu = CpuRequest(cpu.count, cpu.max, cpu.policy, cpu.threads, cpu.emulator, cores=CoreChoice.PERFORMANCE)
    size = draw(st.integers(1, 8))
    memory = MemoryRequest(
        size,
        draw(st.sampled_from((0, size + 1))),
        draw(st.sampled_from((0, 0, PAGE_KIB))),
        draw(st.sampled_from(CellPolicy)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from((0, 0, 1))),
    )
    gpus = draw(st.lists(gpu_requests(), max_size=2)) if draw(st.booleans()) else []
    nears = st.sampled_from(Near) if gpus else st.just(Near.ANY)
    nics = draw(
        st.lists(
            st.builds(NicRequest, st.sampled_from(("n0", "n1")), near=nears, needs=st.sampled_from(((), ("vlan",)))),
            max_size=3,
        )
    )
    devices = draw(
        st.lists(
            st.builds(
                DeviceRequest,
                st.sampled_from(((("type", "fec"),), (("size", "big"),))),
                count=st.integers(1, 2),
                local=rare,
            ),
            max_size=2,
        )
    )
    return Request(
        cpu,
        memory,
        draw(st.integers(0, 4)),
        tuple(gpus),
        tuple(nics) if draw(st.booleans()) else (),
        tuple(devices) if draw(rare) else (),
    )


@st.composite
def gpu_requests(draw: st.DrawFn) -> GpuRequest:
    """Whole GPUs or slices."""
    what = draw(st.sampled_from(("whole", "whole", "milli", "profile")))
    local = draw(st.sampled_from((False, False, True)))
    model = draw(st.sampled_from(("*", "H*", "L4")))
    count = draw(st.integers(1, 3))
    if what == "milli":
        return GpuRequest(count, model, local=local, share_milli=draw(st.sampled_from((100, 250, 300, 500, 600))))
    if what == "profile":
        return GpuRequest(count, model, local=local, share_profile=draw(st.sampled_from(("half", "1s", "2s"))))
    return GpuRequest(count, model, cast(GpuLink, draw(st.sampled_from(GpuLink))), local)
