"""A host with GPUs, and instances that are given some of them."""

from typing import Any

from casemate_agent.gpu.passport import Hygiene
from casemate_agent.gpu.records import GpuPolicy
from casemate_agent.plan.converge import Settings
from casemate_core.claims import Claim, PlainMemory, SharedCpu
from casemate_core.spec.instance import DesiredInstance, Placement
from casemate_core.topology_loaders import from_line
from support.agents import SETTINGS, Rig, instance, uid

HOST = from_line("1s 8k/c 2t 64G disk=1T gpu=3xH200 name=box")
GPUS = tuple(gpu.uuid for gpu in HOST.gpus)
SCRUBBED = GpuPolicy(Hygiene(scrub=True), held_limit_s=5.0, scrubber=("/simulated",))
GPU_SETTINGS = Settings(
    stop_grace_s=SETTINGS.stop_grace_s,
    stop_ask_again_s=SETTINGS.stop_ask_again_s,
    backoff_cap_s=SETTINGS.backoff_cap_s,
    stable_s=SETTINGS.stable_s,
    gpu=SCRUBBED,
)


def with_gpus(number: int, *gpus: str, generation: int = 1, **changes: Any) -> DesiredInstance:
    """An instance whose placement has these GPUs."""
    name = uid(number)
    claim = Claim(
        owner=name,
        epoch=1,
        generation=generation,
        vcpus_online=1,
        vcpus_max=1,
        shared=(SharedCpu(0, 1000),),
        memory=(PlainMemory(0, 1024, 0, 1024),),
        disk_mib=4096,
        gpus=gpus,
    )
    tenant = changes.pop("tenant", f"tenant-{number}")
    return instance(number, claim=claim, tenant=tenant, placement=Placement(claim, 1, generation), **changes)


def gpu_states(rig: Rig) -> dict[str, str]:
    """State of each GPU, as the agent tells it."""
    assert rig.agent is not None
    return {state.uuid: str(state.phase) for state in rig.agent.feed.report.gpus}


def told_of(rig: Rig, uuid: str) -> Any:
    """What the agent tells of one GPU."""
    assert rig.agent is not None
    return next(state for state in rig.agent.feed.report.gpus if state.uuid == uuid)
