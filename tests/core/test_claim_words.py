"""What a claim holds, in words."""

from dataclasses import replace

from casemate_core.claims import Claim, GpuShare, HostClaims
from casemate_core.claims.words import holdings
from casemate_core.cpuset import CpuSet
from casemate_core.fit import (
    CellPolicy,
    CpuPolicy,
    CpuRequest,
    DeviceRequest,
    EmulatorPolicy,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.topology_loaders import from_line

HOST = from_line("1s 2c/s 8k/c 2t 32G 2M=1024 hk=1 gpu=2xH200@fabric vf=2x4 dev=2xfec disk=1T name=w")


def held(request: Request) -> Claim:
    found = fit(HOST, HostClaims.empty(), request, owner="a")
    assert isinstance(found, Fit), found
    return found.claim


def test_a_rich_claim_is_told_whole() -> None:
    claim = held(
        Request(
            CpuRequest(2, 3, CpuPolicy.DEDICATED, ThreadPolicy.ISOLATE, EmulatorPolicy.ISOLATE),
            MemoryRequest(100, 200, 2048, CellPolicy.ONE),
            1024,
            (GpuRequest(2, link=GpuLink.NVLINK),),
            (NicRequest("physnet0"),),
            (DeviceRequest((("type", "fec"),)),),
        )
    )
    lines = holdings(claim, HOST)
    cell = claim.cells[0]
    on = CpuSet.from_ids(claim.vcpus)
    assert lines[0] == f"3 vCPUs on threads {on} of cell {cell}, their siblings {claim.held} idle"
    assert lines[1] == f"emulator on thread {claim.emulator}"
    assert lines[2] == "of its 3 vCPUs 2 are online, the rest is room to grow"
    assert lines[3] == f"50 pages of 2048 KiB of cell {cell} and 50 more of room to grow"
    assert lines[4] == "1024 MiB of disk"
    assert lines[5] == f"GPU {claim.gpus[0]} (H200)" and lines[6] == f"GPU {claim.gpus[1]} (H200)"
    assert lines[7] == f"fabric partition {claim.partition}"
    assert lines[8] == f"VF {claim.vfs[0].index} of {claim.vfs[0].pf} (physnet0)"
    assert lines[9:] == [f"device {claim.devices[0]}"]


def test_a_shared_claim_and_what_is_gone() -> None:
    claim = held(Request(CpuRequest(2), MemoryRequest(512, 1024)))
    assert holdings(claim, HOST) == [
        f"2 CPUs of the pool of cell {claim.shared[0].cell}",
        f"512 MiB of cell {claim.memory[0].cell} and 512 MiB of room to grow",
    ]
    gone = replace(claim, gpus=("GPU-x",), shares=(GpuShare("GPU-y", 142),))
    assert holdings(gone, HOST)[2:] == ["GPU GPU-x (not there any more)", "14.2 % of GPU GPU-y (not there any more)"]
