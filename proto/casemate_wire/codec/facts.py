"""What a host says of itself and its instances ⇄ messages of hosts.proto, total in both directions.

What arrives is checked here as in :mod:`casemate_wire.codec.hosts`.
"""

from casemate_core.claims import Claim
from casemate_core.spec.instance import (
    ContainerState,
    InstanceState,
    Phase,
    PodState,
)
from casemate_core.spec.operation import OrderPhase, OrderState
from casemate_core.spec.views import Condition
from casemate_wire import stream
from casemate_wire.codec import gpus, volume
from casemate_wire.codec.basics import checked_text, checked_uid, plain, seconds, struct, timestamp
from casemate_wire.codec.realtime import (
    certificate_from_message,
    certificate_to_message,
    line_to_message,
    lines_from_messages,
)
from casemate_wire.v1 import hosts_pb2 as pb


def facts_to_message(value: stream.Facts) -> pb.Facts:
    return pb.Facts(
        sequence=value.sequence,
        snapshot=value.snapshot,
        instances=[_state_to_message(i) for i in value.instances],
        gone=value.gone,
        host=_report_to_message(value.host) if value.host else None,
        more=value.more,
    )


def _report_to_message(report: stream.HostReport) -> pb.HostFacts:
    return pb.HostFacts(
        foreign=report.foreign,
        foreign_claims=[struct(c.to_dict()) for c in report.foreign_claims],
        drift=report.drift,
        conditions=[
            pb.HostCondition(
                type=c.type, status=c.status, reason=c.reason, message=c.message, since=timestamp(c.since_s)
            )
            for c in report.conditions
        ],
        disk_free_mib=report.disk_free_mib,
        profile=[line_to_message(line) for line in report.profile],
        volumes=volume.facts_to_message(report.volumes),
        volumes_known=report.volumes is not None,
        gpus=[gpus.state_to_message(g) for g in report.gpus],
        passage=report.passage,
        cpu=report.cpu,
    )


def facts_from_message(message: pb.Facts) -> stream.Facts:
    return stream.Facts(
        sequence=message.sequence,
        snapshot=message.snapshot,
        instances=tuple(_state_from_message(i) for i in message.instances),
        gone=tuple(checked_uid(u) for u in message.gone),
        host=_report_from_message(message.host) if message.HasField("host") else None,
        more=message.more,
    )


def _report_from_message(message: pb.HostFacts) -> stream.HostReport:
    return stream.HostReport(
        foreign=message.foreign,
        foreign_claims=tuple(Claim.from_dict(plain(c)) for c in message.foreign_claims),
        drift=tuple(checked_text(d) for d in message.drift),
        conditions=tuple(
            Condition(
                checked_text(c.type, 64),
                checked_text(c.status, 16),
                checked_text(c.reason, 64),
                checked_text(c.message),
                seconds(c.since),
            )
            for c in message.conditions
        ),
        disk_free_mib=message.disk_free_mib,
        profile=lines_from_messages(message.profile),
        volumes=volume.facts_from_message(message),
        gpus=gpus.states_from_messages(message.gpus),
        passage=checked_text(message.passage, 300),
        cpu=checked_text(message.cpu, 128),
    )


def _state_to_message(value: InstanceState) -> pb.InstanceFacts:
    return pb.InstanceFacts(
        uid=value.uid,
        generation=value.generation,
        phase=value.phase.value,
        reason=value.reason,
        message=value.message,
        virtualisation=value.virtualisation,
        guest_boot_id=value.guest_boot_id,
        pid=value.pid,
        starts=value.starts,
        since=timestamp(value.since_s),
        guest_ready=value.guest_ready,
        cloud_init=value.cloud_init,
        pods=[_pod_to_message(p) for p in value.pods],
        placement_epoch=value.placement_epoch,
        placement_generation=value.placement_generation,
        claim=struct(value.claim.to_dict()) if value.claim else None,
        order=_order_state_to_message(value.order) if value.order else None,
        cloud_init_message=value.cloud_init_message,
        kernel=value.kernel,
        profile=[line_to_message(line) for line in value.profile],
        certificate=certificate_to_message(value.certificate) if value.certificate else None,
    )


def _order_state_to_message(value: OrderState) -> pb.OrderState:
    return pb.OrderState(
        uid=value.uid,
        phase=value.phase.value,
        reason=value.reason,
        message=value.message,
        started=timestamp(value.started_s),
        finished=timestamp(value.finished_s),
        certificate=certificate_to_message(value.certificate) if value.certificate else None,
        address=value.address,
    )


def _order_state_from_message(m: pb.OrderState) -> OrderState:
    return OrderState(
        uid=checked_uid(m.uid),
        phase=OrderPhase(m.phase),
        reason=checked_text(m.reason, 64),
        message=checked_text(m.message),
        started_s=seconds(m.started),
        finished_s=seconds(m.finished),
        certificate=certificate_from_message(m.certificate) if m.HasField("certificate") else None,
        address=checked_text(m.address, 300),
    )


def _state_from_message(m: pb.InstanceFacts) -> InstanceState:
    return InstanceState(
        uid=checked_uid(m.uid),
        generation=m.generation,
        phase=Phase(m.phase),
        reason=checked_text(m.reason, 64),
        message=checked_text(m.message),
        virtualisation=checked_text(m.virtualisation, 16),
        guest_boot_id=checked_text(m.guest_boot_id, 64),
        pid=m.pid,
        starts=m.starts,
        since_s=seconds(m.since),
        guest_ready=m.guest_ready,
        cloud_init=checked_text(m.cloud_init, 256),
        pods=tuple(_pod_from_message(p) for p in m.pods),
        placement_epoch=m.placement_epoch,
        placement_generation=m.placement_generation,
        claim=Claim.from_dict(plain(m.claim)) if m.HasField("claim") else None,
        order=_order_state_from_message(m.order) if m.HasField("order") else None,
        cloud_init_message=checked_text(m.cloud_init_message, 2048),
        kernel=m.kernel,
        profile=lines_from_messages(m.profile),
        certificate=certificate_from_message(m.certificate) if m.HasField("certificate") else None,
    )


def _pod_to_message(value: PodState) -> pb.PodFacts:
    return pb.PodFacts(
        name=value.name,
        phase=value.phase,
        ready=value.ready,
        reason=value.reason,
        message=value.message,
        started=timestamp(value.started_s),
        containers=[
            pb.ContainerFacts(
                name=c.name,
                image=c.image,
                state=c.state,
                ready=c.ready,
                restarts=c.restarts,
                exit_code=c.exit_code,
                reason=c.reason,
                message=c.message,
                started=timestamp(c.started_s),
                finished=timestamp(c.finished_s),
            )
            for c in value.containers
        ],
    )


def _pod_from_message(m: pb.PodFacts) -> PodState:
    return PodState(
        name=checked_text(m.name, 63),
        phase=checked_text(m.phase, 32),
        ready=m.ready,
        reason=checked_text(m.reason, 64),
        message=checked_text(m.message),
        started_s=seconds(m.started),
        containers=tuple(
            ContainerState(
                name=checked_text(c.name, 63),
                image=checked_text(c.image),
                state=checked_text(c.state, 32),
                ready=c.ready,
                restarts=c.restarts,
                exit_code=c.exit_code,
                reason=checked_text(c.reason, 64),
                message=checked_text(c.message),
                started_s=seconds(c.started),
                finished_s=seconds(c.finished),
            )
            for c in m.containers
        ),
    )
