"""Read-only objects → messages: instances, pods, placements, events, changes."""

import json

from casemate_core.quantity import format_mib
from casemate_core.spec.instance import ContainerState, InstanceState, Nic, Phase
from casemate_core.spec.views import Change, EventView, InstanceView, OperationView, PlacementView, PodView
from casemate_wire.codec.basics import condition_to_message, meta_to_message, ref_to_message, struct, timestamp
from casemate_wire.codec.realtime import certificate_to_message, line_to_message
from casemate_wire.v1 import environment_pb2 as env_pb
from casemate_wire.v1 import fleet_pb2 as pb
from casemate_wire.v1 import operators_pb2 as op_pb

API = "casemate/v1"


def instance_to_message(view: InstanceView) -> env_pb.Instance:
    """An instance; what its host has not said is unset."""
    message = env_pb.Instance(
        api_version=API,
        kind="Instance",
        metadata=meta_to_message(view.meta),
        spec=env_pb.InstanceSpec(
            environment=view.environment,
            ordinal=view.ordinal,
            host=view.host,
            nics=[_nic(n) for n in view.nics],
            cpus=view.cpus,
            memory=format_mib(view.memory_mib),
            image=view.image,
            run=view.run,
            volumes=view.volumes,
        ),
        status=env_pb.InstanceStatus(
            phase=view.phase,
            conditions=[condition_to_message(c) for c in view.conditions],
            heard=timestamp(view.heard_s),
        ),
    )
    if state := view.state:
        status = message.status
        status.virtualisation = state.virtualisation
        status.guest_boot_id = state.guest_boot_id
        status.pid = state.pid
        status.starts = state.starts
        status.boot = boot_word(state)
        status.cloud_init = state.cloud_init if state.cloud_init != "none" else ""
        if since := timestamp(state.since_s):
            status.since.CopyFrom(since)
        status.pods.extend(p.name for p in state.pods)
        status.pods_ready = sum(p.ready for p in state.pods)
        status.profile.extend(map(line_to_message, state.profile))
        if state.certificate is not None:
            status.certificate.CopyFrom(certificate_to_message(state.certificate))
    return message


def boot_word(state: InstanceState) -> str:
    """How far a guest has come, by what is seen of it: a process, its kernel, its helper, cloud-init, its pods."""
    if not state.pid or state.phase in (Phase.STOPPED, Phase.PREPARING):
        return "off"
    if state.phase is Phase.READY:
        return "up"
    if not state.guest_ready:
        return "userland" if state.guest_boot_id else "kernel" if state.kernel else "firmware"
    return "cloud-init" if state.cloud_init == "running" else "pods"


def _nic(nic: Nic) -> env_pb.NicStatus:
    return env_pb.NicStatus(
        network=nic.network,
        mac=nic.mac,
        address=nic.address,
        prefix_length=nic.prefix_length,
        gateway=nic.gateway,
        type=nic.type,
    )


def pod_to_message(view: PodView) -> env_pb.Pod:
    """A pod; ``Pending`` until the guest speaks of it."""
    state = view.state
    return env_pb.Pod(
        api_version=API,
        kind="Pod",
        metadata=meta_to_message(view.meta),
        spec=env_pb.PodSpec(
            environment=view.environment, instance=view.instance, host=view.host, manifest=struct(view.manifest)
        ),
        status=env_pb.PodStatus(
            phase=state.phase if state else "Pending",
            ready=state.ready if state else False,
            reason=state.reason if state else "",
            message=state.message if state else "",
            started=timestamp(state.started_s) if state else None,
            containers=[container_to_message(c) for c in state.containers] if state else [],
        ),
    )


def container_to_message(state: ContainerState) -> env_pb.ContainerStatus:
    """A container."""
    return env_pb.ContainerStatus(
        name=state.name,
        image=state.image,
        state=state.state,
        ready=state.ready,
        restarts=state.restarts,
        exit_code=state.exit_code,
        reason=state.reason,
        message=state.message,
        started=timestamp(state.started_s),
        finished=timestamp(state.finished_s),
    )


def placement_to_message(view: PlacementView) -> pb.Placement:
    """A placement with its exact claim."""
    return pb.Placement(
        api_version=API,
        kind="Placement",
        metadata=meta_to_message(view.meta),
        spec=pb.PlacementSpec(
            instance=view.instance,
            instance_uid=view.instance_uid,
            host=view.host,
            epoch=view.epoch,
            generation=view.generation,
            role=view.role,
            claim=struct(view.claim),
        ),
    )


def operation_to_message(view: OperationView) -> pb.Operation:
    """An operation; times that have not come are unset."""
    return pb.Operation(
        api_version=API,
        kind="Operation",
        metadata=meta_to_message(view.meta),
        spec=pb.OperationSpec(
            verb=view.verb,
            target=ref_to_message(view.target),
            parameters=struct({} if view.grace_s is None else {"graceS": view.grace_s}),
            deadline=timestamp(view.deadline_s),
        ),
        status=pb.OperationStatus(
            phase=view.phase,
            reason=view.reason,
            message=view.message,
            started=timestamp(view.started_s),
            finished=timestamp(view.finished_s),
            host=view.host,
            certificate=certificate_to_message(view.certificate) if view.certificate else None,
            to_host=view.to_host,
        ),
    )


def event_to_message(view: EventView) -> pb.Event:
    """An event."""
    return pb.Event(
        api_version=API,
        kind="Event",
        metadata=meta_to_message(view.meta),
        regarding=ref_to_message(view.regarding),
        reason=view.reason,
        message=view.message,
        severity=view.severity,
        time=timestamp(view.time_s),
        source=view.source,
        cause=view.cause,
        count=view.count,
        last=timestamp(view.last_s),
    )


def change_to_message(change: Change) -> op_pb.Change:
    """One field that changes; values as compact JSON."""
    return op_pb.Change(
        path=change.path,
        before="" if change.before is None else json.dumps(change.before, separators=(",", ":"), ensure_ascii=False),
        after="" if change.after is None else json.dumps(change.after, separators=(",", ":"), ensure_ascii=False),
        effect=change.effect,
    )
