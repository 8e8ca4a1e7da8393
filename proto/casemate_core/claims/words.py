"""What a claim holds, in words.

What may live here: sentences for people, derived from a claim and the topology that it is on. Nothing decides by them.
"""

from casemate_core.claims.model import Claim
from casemate_core.cpuset import CpuSet
from casemate_core.topology import Topology


def holdings(claim: Claim, topology: Topology) -> list[str]:
    """One line for each kind of thing that the claim holds: threads, memory by cell, GPUs, functions, disk."""
    return [*_cpus(claim, topology), *_memory(claim), *_functions(claim, topology)]


def _cpus(claim: Claim, topology: Topology) -> list[str]:
    lines = []
    if claim.vcpus:
        cells = [cell.id for cell in topology.index.cells if cell.mask & claim.owned_mask]
        line = f"{_count(len(claim.vcpus), 'vCPU')} on threads {CpuSet.from_ids(claim.vcpus)} of {_cells(cells)}"
        if claim.held:
            line += f", their siblings {claim.held} idle"
        lines.append(line + (", real-time" if claim.realtime else ""))
        if claim.emulator_owned:
            lines.append(f"emulator on thread {claim.emulator}")
    lines += [f"{shared.milli / 1000:g} CPUs of the pool of cell {shared.cell}" for shared in claim.shared]
    if claim.vcpus_online < claim.vcpus_max:
        lines.append(f"of its {claim.vcpus_max} vCPUs {claim.vcpus_online} are online, the rest is room to grow")
    return lines


def _memory(claim: Claim) -> list[str]:
    lines = [
        f"{m.size_mib} MiB of cell {m.cell}" + (f" and {m.growth_mib} MiB of room to grow" if m.growth_mib else "")
        for m in claim.memory
        if m.size_mib or m.growth_mib
    ]
    for p in claim.pages:
        line = f"{_count(p.count, 'page')} of {p.page_kib} KiB of cell {p.cell}"
        lines.append(line + (f" and {p.growth} more of room to grow" if p.growth else ""))
    if claim.disk_mib:
        lines.append(f"{claim.disk_mib} MiB of disk")
    return lines


def _functions(claim: Claim, topology: Topology) -> list[str]:
    models = {gpu.uuid: gpu.model for gpu in topology.gpus}
    networks = {pf.mac: ", ".join(pf.networks) for pf in topology.pfs}
    lines = [f"GPU {uuid} ({models.get(uuid, 'not there any more')})" for uuid in claim.gpus]
    lines += [
        f"{share.milli / 10:g} % of GPU {share.gpu} ({models.get(share.gpu, 'not there any more')})"
        for share in claim.shares
    ]
    if claim.partition is not None:
        lines.append(f"fabric partition {claim.partition}")
    lines += [f"VF {vf.index} of {vf.pf} ({networks.get(vf.pf, 'not there any more')})" for vf in claim.vfs]
    return lines + [f"device {device}" for device in claim.devices]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cells(ids: list[int]) -> str:
    return f"cell {ids[0]}" if len(ids) == 1 else f"cells {', '.join(map(str, ids))}"
