"""The named machines of ``tests/hosts``: how they are written, read and constructed.

A machine is one JSON file with its ``provenance`` (recorded where, or constructed from which public document, and what of
it is assumed) and its ``topology``. ``python -m support.hosts`` (in ``tests``) writes the constructed ones anew; a test
compares.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from casemate_core.cpuset import CpuSet
from casemate_core.topology import Cell, Core, CoreKind, FabricPartition, PciPlace, Topology
from casemate_core.topology_loaders import from_line

FOLDER = Path(__file__).resolve().parent.parent / "hosts"
Machine = tuple[str, Topology]


@cache
def host(name: str) -> Topology:
    """A machine by name; the same object each time, so that its index is made once."""
    return Topology.from_dict(json.loads((FOLDER / f"{name}.json").read_text())["topology"])


def names() -> list[str]:
    """All machines."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def laptop() -> Machine:
    """Hybrid cores: performance cores with two threads, efficiency cores with one, in clusters of four."""
    cores = [Core(i, 0, 0, 0, CpuSet.of(2 * i, 2 * i + 1), CoreKind.PERFORMANCE) for i in range(6)]
    cores += [Core(i, 0, 0, 0, CpuSet.of(i + 6), CoreKind.EFFICIENCY) for i in range(6, 14)]
    return (
        "constructed from the specification of the Intel Core i7-12700H (6 performance cores with 2 threads, "
        "8 efficiency cores with 1, one last-level cache); thread numbers as Linux gives them; memory and disk assumed",
        Topology(
            (Cell(0, 32 * 1024, reserved_mib=4096, distances=(10,)),), tuple(cores), disk_mib=400 * 1024, name="laptop"
        ),
    )


def xeon_snc4() -> Machine:
    """Two sockets of four cells each, and a cell of high-bandwidth memory beside each of them."""
    base = from_line("2s 4c/s 14k/c 2t 512G 1G=128 rmem=16G hk=1 mem=8x16G vf=2x64@dc disk=3T name=xeon-snc4")
    return (
        "constructed from the Intel Xeon CPU Max Series Configuration and Tuning Guide (354227-002US): two Xeon CPU Max 9480 "
        "with 56 cores, SNC4, HBM in flat mode: 8 cells with CPUs, 8 of 16 GiB HBM without; DIMMs, NICs, pools assumed",
        base,
    )


def epyc_nps1() -> Machine:
    """Two sockets of 64 cores, one cell each, eight cores under each last-level cache."""
    return (
        "constructed from the specification of the AMD EPYC 9554 (64 cores, 8 dies with 8 cores and 32 MB of last-level "
        "cache each), two sockets, NPS1; memory, NICs and pools assumed",
        from_line("2s 64k/c 8k/l3 2t 768G 1G=256 rmem=16G hk=2 vf=2x64@dc disk=6T name=epyc-nps1"),
    )


def epyc_nps4() -> Machine:
    """The same processors cut into four cells a socket."""
    return (
        "constructed from an lscpu listing published at hackmd.io/@hlajungo/H1PJfTJxgg (two sockets of 64 cores, 8 cells, node 0 "
        "with CPUs 0-15,128-143, 504 GB); 8 cores per cache by the specification of AMD EPYC 7003; NICs and pools assumed",
        from_line("2s 4c/s 16k/c 8k/l3 2t 504G 1G=128 rmem=16G hk=1 vf=2x64@dc disk=6T name=epyc-nps4"),
    )


def hgx_h200() -> Machine:
    """Eight GPUs on NVSwitches, each behind one PCIe switch with its NIC; module ids that do not follow PCI order."""
    base = from_line(
        "2s 56k/c 2t 2048G 1G=1536 rmem=64G hk=2 gpu=8xH200:141G@fabric vf=8x16@compute disk=12T name=hgx-h200"
    )
    modules = (2, 4, 3, 1, 7, 5, 8, 6)
    gpus = tuple(replace(gpu, module_id=module) for gpu, module in zip(base.gpus, modules, strict=True))
    by_module = {gpu.module_id: gpu.uuid for gpu in gpus}
    groups = [
        (1, 2, 3, 4, 5, 6, 7, 8),
        (1, 2, 3, 4),
        (5, 6, 7, 8),
        (1, 3),
        (2, 4),
        (5, 7),
        (6, 8),
        *((i,) for i in range(1, 9)),
    ]
    partitions = tuple(FabricPartition(i, tuple(sorted(by_module[m] for m in group))) for i, group in enumerate(groups))
    return (
        "constructed from the DGX H100/H200 user guide (2 x 56 cores, 2 TB, 8 GPUs, 8 NICs beside them) and the NVIDIA Fabric "
        "Manager user guide (partitions of 8, 4, 2 and 1 GPUs by module id); assumed, for want of a recording: which modules "
        "pair up, the order of module ids along the PCI tree, pools and VF counts",
        replace(base, gpus=gpus, partitions=partitions),
    )


def gb200() -> Machine:
    """Two cells with CPUs, and eight for each of four GPUs, which have no CPU and, without the driver, no memory."""
    base = from_line(
        "2s 72k/c 1t 960G rmem=32G hk=2 mem=32x0M gpu=4xGB200:186G@nvlink vf=4x16@compute disk=6T name=gb200"
    )
    return (
        "constructed from kubernetes/kubernetes#135581 (34 NUMA nodes, 2 of them with CPUs) and NVIDIA's GB200 description (two "
        "Grace CPUs with 72 cores, cores 0-71 and GPUs 0,1 on node 0); memory, NICs and VFs assumed; distances assumed",
        base,
    )


def ran_edge() -> Machine:
    """One socket, nearly all of it isolated; FEC cards and four ports with many VFs."""
    base = from_line(
        "1s 32k/c 2t 256G 1G=192 rmem=8G hk=2 iso=28 vf=2x32@fronthaul vf=2x32@mgmt+midhaul dev=2xfec disk=900G name=ran-edge"
    )
    return (
        "constructed from the specification of the Intel Xeon Gold 6421N (32 cores), the DPDK guide of the ACC100 FEC card and "
        "common 5G DU sizing; 4 ports x 32 VFs, isolation and pools assumed",
        base,
    )


def offlined() -> Machine:
    """A sibling and a whole core are offline: cores of one and of two threads beside each other."""
    return (
        "constructed: a small two-socket server on which an operator took CPUs 5, 21 and 30 offline",
        from_line("2s 8k/c 2t 64G 2M=4096 off=5,21,30 disk=500G name=offlined"),
    )


def uneven() -> Machine:
    """Cells with different memory, cores and pools, and one with memory alone."""
    base = from_line("2s 8k/c 2t 96G vf=2x8 dev=3xnvme disk=1T name=uneven")
    cells = (
        Cell(0, 65536, base.cells[0].pools, 2048, (10, 32, 28)),
        Cell(2, 16384, (), 0, (32, 10, 40)),
        Cell(5, 131072, (), 0, (28, 40, 10)),
    )
    moved = tuple(replace(core, cell=(0, 2)[core.cell]) for core in base.cores[:13])

    def home(place: PciPlace) -> PciPlace:
        return replace(place, cell=(0, 2)[place.cell])

    return (
        "constructed: cells 0, 2 and 5 (numbers with gaps), 8 and 5 cores, 64, 16 and 128 GiB, the last a CXL expander",
        replace(
            base,
            cells=cells,
            cores=moved,
            pfs=tuple(replace(pf, place=home(pf.place)) for pf in base.pfs),
            devices=tuple(replace(d, place=home(d.place)) for d in base.devices),
        ),
    )


CONSTRUCTED: dict[str, Callable[[], Machine]] = {
    "laptop": laptop,
    "xeon-snc4": xeon_snc4,
    "epyc-nps1": epyc_nps1,
    "epyc-nps4": epyc_nps4,
    "hgx-h200": hgx_h200,
    "gb200": gb200,
    "ran-edge": ran_edge,
    "offlined": offlined,
    "uneven": uneven,
}


def text_of(machine: Machine) -> str:
    """The file of a machine: one record a line, so that a difference is read as one."""
    provenance, topology = machine
    lines = ["{", f'"provenance": {json.dumps(provenance)},', '"topology": {']
    plain = topology.to_dict()
    for position, (key, value) in enumerate(plain.items()):
        comma = "," if position + 1 < len(plain) else ""
        if isinstance(value, list) and value:
            lines += [f'  "{key}": [', ",\n".join(f"    {json.dumps(item)}" for item in value), f"  ]{comma}"]
        else:
            lines.append(f'  "{key}": {json.dumps(value)}{comma}')
    return "\n".join([*lines, "}", "}", ""])


def main() -> None:
    """Write the constructed machines."""
    for name, construct in CONSTRUCTED.items():
        (FOLDER / f"{name}.json").write_text(text_of(construct()))


if __name__ == "__main__":
    main()
