"""Environment ⇄ message. Both directions are total over the fields that this release serves."""

import re

from casemate_core.quantity import (
    format_bytes,
    format_mib,
    format_seconds,
    parse_bits_per_second,
    parse_bytes,
    parse_mib,
    parse_seconds,
)
from casemate_core.spec.environment import (
    Affinity,
    Cpu,
    DeviceSpec,
    Environment,
    EnvironmentSpec,
    GpuSpec,
    Memory,
    NicSpec,
    PlacementRules,
    Toleration,
    UpdateStrategy,
)
from casemate_core.spec.views import EnvironmentStatus
from casemate_wire.codec.basics import condition_to_message, meta_from_message, meta_to_message, plain, struct
from casemate_wire.codec.volume import mounts_from_message, mounts_to_message
from casemate_wire.v1 import environment_pb2 as pb


def from_message(message: pb.Environment) -> Environment:
    """A checked message as a value. Raises InvalidSpec only for what the schema's checks cannot see."""
    spec = message.spec
    rules = spec.placement
    return Environment(
        meta_from_message("Environment", message.metadata),
        EnvironmentSpec(
            replicas=spec.replicas if spec.HasField("replicas") else 1,
            cpu=Cpu(
                count=spec.cpu.count,
                policy=spec.cpu.policy or "shared",
                threads=spec.cpu.threads or "any",
                emulator=spec.cpu.emulator or "share",
                realtime=spec.cpu.realtime,
            ),
            memory=Memory(
                size_mib=parse_mib(spec.memory.size),
                hugepages_kib=parse_bytes(spec.memory.hugepages) // 1024 if spec.memory.hugepages else 0,
                cells=spec.memory.cells or "prefer",
            ),
            nics=tuple(map(_nic_from_message, spec.nics)) or (() if spec.isolated else (NicSpec(),)),
            isolated=spec.isolated,
            devices=tuple(DeviceSpec(dict(d.labels), d.count or 1, d.near) for d in spec.devices),
            gpus=tuple(map(_gpu_from_message, spec.gpus)),
            volumes=mounts_from_message(spec.volumes),
            image=spec.image,
            archives=tuple(spec.archives),
            disk_mib=parse_mib(spec.disk.size) if spec.disk.size else 0,
            pods=tuple(plain(p) for p in spec.pods),
            ssh_keys=tuple(spec.ssh_keys),
            user_data=spec.user_data,
            run=spec.run or "started",
            placement=PlacementRules(
                node_selector=dict(rules.node_selector),
                tolerations=tuple(
                    Toleration(t.key, t.operator or "Equal", t.value, t.effect) for t in rules.tolerations
                ),
                affinity=tuple(
                    Affinity(a.kind or "near", dict(a.match), a.topology or "host", a.required) for a in rules.affinity
                ),
                spread_by=rules.spread_by,
            ),
            priority=spec.priority,
            virtualisation=spec.virtualisation or "prefer",
            gang=spec.gang,
            on_crash=spec.on_crash or "restart",
            crash_limit=spec.crash_limit,
            stop_grace_s=parse_seconds(spec.stop_grace) if spec.stop_grace else None,
            lifetime_s=parse_seconds(spec.lifetime) if spec.lifetime else 0,
            protected=spec.protected,
            update_strategy=UpdateStrategy(
                spec.update_strategy.type or "rolling", spec.update_strategy.max_unavailable or 1
            )
            if spec.HasField("update_strategy")
            else None,
        ),
    )


def _nic_from_message(message: pb.Nic) -> NicSpec:
    return NicSpec(
        message.network,
        message.type or "bridge",
        message.vlan,
        message.trust,
        _mbps(message.min_rate),
        _mbps(message.max_rate),
        message.pod,
    )


def _gpu_from_message(message: pb.GpuRequest) -> GpuSpec:
    part = re.fullmatch(r"([1-9][0-9]{0,2})m", message.share, re.ASCII)
    return GpuSpec(
        message.model or "*",
        message.count or 1,
        message.link or "any",
        "" if part else message.share,
        int(part[1]) if part else 0,
        message.near,
        dict(message.labels),
    )


def _gpu_to_message(gpu: GpuSpec) -> pb.GpuRequest:
    share = f"{gpu.share_milli}m" if gpu.share_milli else gpu.share
    return pb.GpuRequest(model=gpu.model, count=gpu.count, link=gpu.link, share=share, near=gpu.near, labels=gpu.labels)


def _mbps(text: str) -> int:
    """A rate in whole Mbit/s, rounded up: a limit that a guest asked for is not lowered."""
    return -(-parse_bits_per_second(text) // 10**6) if text else 0


def _nic_to_message(nic: NicSpec) -> pb.Nic:
    return pb.Nic(
        network=nic.network,
        type=nic.type,
        vlan=nic.vlan,
        trust=nic.trust,
        min_rate=f"{nic.min_rate_mbps}Mbit" if nic.min_rate_mbps else "",
        max_rate=f"{nic.max_rate_mbps}Mbit" if nic.max_rate_mbps else "",
        pod=nic.pod,
    )


def to_message(env: Environment, status: EnvironmentStatus | None = None) -> pb.Environment:
    """The value with all its defaults written out, and its status where there is one."""
    spec = env.spec
    message = pb.Environment(
        api_version="casemate/v1",
        kind="Environment",
        metadata=meta_to_message(env.meta),
        spec=pb.EnvironmentSpec(
            replicas=spec.replicas,
            cpu=pb.Cpu(
                count=spec.cpu.count,
                policy=spec.cpu.policy,
                threads=spec.cpu.threads,
                emulator=spec.cpu.emulator,
                realtime=spec.cpu.realtime,
            ),
            memory=pb.Memory(
                size=format_mib(spec.memory.size_mib),
                hugepages=format_bytes(spec.memory.hugepages_kib * 1024) if spec.memory.hugepages_kib else "",
                cells=spec.memory.cells,
            ),
            nics=[_nic_to_message(n) for n in spec.nics],
            devices=[pb.DeviceRequest(labels=d.labels, count=d.count, near=d.near) for d in spec.devices],
            gpus=[_gpu_to_message(g) for g in spec.gpus],
            volumes=mounts_to_message(spec.volumes),
            image=spec.image,
            archives=spec.archives,
            pods=[struct(p) for p in spec.pods],
            ssh_keys=spec.ssh_keys,
            user_data=spec.user_data,
            run=spec.run,
            priority=spec.priority,
            virtualisation=spec.virtualisation,
            gang=spec.gang,
            on_crash=spec.on_crash,
            crash_limit=spec.crash_limit,
            stop_grace="" if spec.stop_grace_s is None else format_seconds(spec.stop_grace_s),
            lifetime=format_seconds(spec.lifetime_s) if spec.lifetime_s else "",
            protected=spec.protected,
            isolated=spec.isolated,
        ),
    )
    if spec.update_strategy is not None:
        message.spec.update_strategy.type = spec.update_strategy.type
        message.spec.update_strategy.max_unavailable = spec.update_strategy.max_unavailable
    if spec.disk_mib:
        message.spec.disk.size = format_mib(spec.disk_mib)
    if spec.placement != PlacementRules():
        message.spec.placement.CopyFrom(_rules_to_message(spec.placement))
    if status is not None:
        message.status.CopyFrom(_status_to_message(status))
    return message


def _rules_to_message(rules: PlacementRules) -> pb.PlacementRules:
    return pb.PlacementRules(
        node_selector=rules.node_selector,
        tolerations=[
            pb.Toleration(key=t.key, operator=t.operator, value=t.value, effect=t.effect) for t in rules.tolerations
        ],
        affinity=[
            pb.Affinity(kind=a.kind, match=a.match, topology=a.topology, required=a.required) for a in rules.affinity
        ],
        spread_by=rules.spread_by,
    )


def _status_to_message(status: EnvironmentStatus) -> pb.EnvironmentStatus:
    return pb.EnvironmentStatus(
        phase=status.phase,
        conditions=[condition_to_message(c) for c in status.conditions],
        observed_generation=status.observed_generation,
        wanted=status.wanted,
        placed=status.placed,
        running=status.running,
        ready=status.ready,
        instances=status.instances,
    )
