"""The host stream: values of `casemate_wire.stream` ⇄ messages of hosts.proto, total in both directions.

What arrives from the other end is checked here: words, digests and addresses have their shape afterwards or the message is
refused (`BadMessage`), which ends the session.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import TypeVar, assert_never

from casemate_core.checkpoint import Checkpoint, is_formed
from casemate_core.claims import Claim
from casemate_core.errors import CasemateError, shown
from casemate_core.spec.environment import MAX_RATE_MBPS, MAX_VLAN
from casemate_core.spec.instance import (
    DIGEST,
    ContainerState,
    DesiredInstance,
    File,
    HostNetwork,
    ImageRef,
    InstanceState,
    Nic,
    Peer,
    Phase,
    Placement,
    PodState,
    Run,
    Virtualisation,
)
from casemate_core.spec.operation import Move, Order, OrderPhase, OrderState, Stage, Verb
from casemate_core.spec.secret import SecretText
from casemate_core.spec.views import Condition
from casemate_core.topology import Topology
from casemate_wire import stream
from casemate_wire.codec import gpus, volume
from casemate_wire.codec.basics import UID, BadMessage, plain, seconds, struct, timestamp
from casemate_wire.codec.checkpoints import checkpoint_from_message, checkpoint_to_message
from casemate_wire.codec.realtime import (
    certificate_from_message,
    certificate_to_message,
    line_to_message,
    lines_from_messages,
)
from casemate_wire.codec.signed import checked_nonce, checked_pins
from casemate_wire.v1 import hosts_pb2 as pb

MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z", re.ASCII)
M = TypeVar("M")
V = TypeVar("V")


def _text(value: str, limit: int = 1024) -> str:
    if len(value) > limit or "\0" in value:
        raise BadMessage(f"text of {len(value)} characters, at most {limit} are taken")
    return value


def _uid(value: str) -> str:
    if not UID.match(value):
        raise BadMessage(f"{shown(value)!r} is not a uid")
    return value


# --- what the manager sends -------------------------------------------------------------------------------------------


def to_host_to_wire(value: stream.ToHost) -> pb.ToHost:
    """A message of the manager."""
    match value:
        case stream.Welcome():
            return pb.ToHost(
                welcome=pb.Welcome(
                    epoch=value.epoch,
                    since=value.since,
                    send_inventory=value.send_inventory,
                    reconnect_window_s=value.reconnect_window_s,
                    credit=value.credit,
                    authorities=value.authorities,
                )
            )
        case stream.Desired():
            return pb.ToHost(desired=_desired_to_message(value))
        case stream.Operate():
            return pb.ToHost(
                operate=pb.Operate(
                    operation=value.operation,
                    verb=value.verb,
                    instance=value.instance,
                    parameters=struct(value.parameters),
                    deadline=timestamp(value.deadline_s),
                )
            )
        case stream.OpenChannel():
            return pb.ToHost(
                open_channel=pb.OpenChannel(
                    ticket=value.ticket, kind=value.kind, instance=value.instance, parameters=struct(value.parameters)
                )
            )
        case stream.Credit():
            return pb.ToHost(credit=pb.Credit(messages=value.messages))
        case stream.Rejected():
            return pb.ToHost(
                rejected=pb.Rejected(reason=value.reason, message=value.message, retry_after_s=value.retry_after_s)
            )
        case stream.FactsAck():
            return pb.ToHost(facts_ack=pb.FactsAck(sequence=value.sequence))
        case Checkpoint():
            return pb.ToHost(checkpoint=checkpoint_to_message(value))
        case _:
            assert_never(value)


def to_host_from_wire(message: pb.ToHost) -> stream.ToHost:
    """A message of the manager, as the agent takes it. Raises BadMessage."""
    return _checked(_from_manager, message)


def _from_manager(message: pb.ToHost) -> stream.ToHost:
    match message.WhichOneof("message"):
        case "welcome":
            w = message.welcome
            return stream.Welcome(
                w.epoch, w.since, w.send_inventory, w.reconnect_window_s, w.credit, checked_pins(w.authorities)
            )
        case "desired":
            return _desired_from_message(message.desired)
        case "operate":
            o = message.operate
            return stream.Operate(o.operation, o.verb, _uid(o.instance), plain(o.parameters), seconds(o.deadline))
        case "open_channel":
            c = message.open_channel
            return stream.OpenChannel(
                ticket=_text(c.ticket), kind=c.kind, instance=_uid(c.instance), parameters=plain(c.parameters)
            )
        case "credit":
            return stream.Credit(message.credit.messages)
        case "rejected":
            r = message.rejected
            return stream.Rejected(r.reason, r.message, r.retry_after_s)
        case "facts_ack":
            return stream.FactsAck(message.facts_ack.sequence)
        case "checkpoint":
            checkpoint = checkpoint_from_message(message.checkpoint)
            if not is_formed(checkpoint):  # it is kept on disk, so what it can be is bounded
                raise BadMessage("what is sent to be witnessed is no checkpoint")
            return checkpoint
        case other:
            raise BadMessage(f"unknown message {other!r}")


def _desired_to_message(value: stream.Desired) -> pb.Desired:
    return pb.Desired(
        epoch=value.epoch,
        revision=value.revision,
        snapshot=value.snapshot,
        instances=[instance_to_message(i) for i in value.instances],
        removed=value.removed,
        networks=[
            pb.DesiredNetwork(name=n.name, type=n.type, subnet=n.subnet, gateway=n.gateway, mtu=n.mtu)
            for n in value.networks
        ],
        networks_removed=value.networks_removed,
        volumes_removed=value.volumes_removed,
        more=value.more,
        gpu_orders=None
        if value.gpu_orders is None
        else pb.GpuOrders(orders=[gpus.order_to_message(o) for o in value.gpu_orders]),
    )


def _desired_from_message(message: pb.Desired) -> stream.Desired:
    return stream.Desired(
        epoch=message.epoch,
        revision=message.revision,
        snapshot=message.snapshot,
        instances=tuple(instance_from_message(i) for i in message.instances),
        removed=tuple(_uid(u) for u in message.removed),
        networks=tuple(
            HostNetwork(
                _text(n.name, 63), n.type, str(ipaddress.IPv4Network(n.subnet)), _address(n.gateway), _mtu(n.mtu)
            )
            for n in message.networks
        ),
        networks_removed=tuple(_text(n, 63) for n in message.networks_removed),
        volumes_removed=tuple(_uid(u) for u in message.volumes_removed),
        more=message.more,
        gpu_orders=tuple(gpus.order_from_message(o) for o in message.gpu_orders.orders)
        if message.HasField("gpu_orders")
        else None,
    )


def _address(text: str) -> str:
    return str(ipaddress.IPv4Address(text))


def _mtu(value: int) -> int:
    if not 576 <= value <= 65521:
        raise BadMessage(f"mtu {value} is out of range")
    return value


def instance_to_message(value: DesiredInstance) -> pb.DesiredInstance:
    """One desired instance with its placement."""
    return pb.DesiredInstance(
        uid=value.uid,
        tenant=value.tenant,
        environment=value.environment,
        name=value.name,
        ordinal=value.ordinal,
        generation=value.generation,
        run=value.run.value,
        cpus=value.cpus,
        memory_mib=value.memory_mib,
        disk_mib=value.disk_mib,
        image=_image_to_message(value.image),
        archives=[_image_to_message(a) for a in value.archives],
        nics=[
            pb.HostNic(
                network=n.network,
                mac=n.mac,
                address=n.address,
                prefix_length=n.prefix_length,
                gateway=n.gateway,
                dns=n.dns,
                mtu=n.mtu,
                type=n.type,
                vlan=n.vlan,
                trust=n.trust,
                min_rate_mbps=n.min_rate_mbps,
                max_rate_mbps=n.max_rate_mbps,
                pod=n.pod,
            )
            for n in value.nics
        ],
        pods=[struct(p) for p in value.pods],
        secrets={
            place: pb.SecretText(fingerprint=s.fingerprint, text=s.text or "") for place, s in value.secrets.items()
        },
        ssh_keys=value.ssh_keys,
        user_data=value.user_data,
        virtualisation=value.virtualisation.value,
        claim=struct(value.placement.claim.to_dict()),
        placement_epoch=value.placement.epoch,
        placement_generation=value.placement.generation,
        role=value.placement.role,
        cause=value.cause,
        cpu_policy=value.cpu_policy,
        page_kib=value.page_kib,
        peers=[pb.Peer(name=p.name, address=p.address) for p in value.peers],
        order=_order_to_message(value.order) if value.order else None,
        disk=value.disk,
        on_crash=value.on_crash,
        crash_limit=value.crash_limit,
        stop_grace_s=value.stop_grace_s,
        volumes=volume.refs_to_message(value.volumes),
    )


def instance_from_message(m: pb.DesiredInstance) -> DesiredInstance:
    """One desired instance. Raises ValueError or CasemateError for what has no shape."""
    return DesiredInstance(
        uid=_uid(m.uid),
        tenant=_text(m.tenant, 63),
        environment=_text(m.environment, 63),
        name=_text(m.name, 80),
        ordinal=m.ordinal,
        generation=m.generation,
        run=Run(m.run),
        cpus=m.cpus,
        memory_mib=m.memory_mib,
        disk_mib=m.disk_mib,
        image=_image_from_message(m.image),
        placement=Placement(Claim.from_dict(plain(m.claim)), m.placement_epoch, m.placement_generation, m.role),
        archives=tuple(_image_from_message(a) for a in m.archives),
        nics=tuple(_nic_from_message(n) for n in m.nics),
        pods=tuple(plain(p) for p in m.pods),
        secrets={place: SecretText(s.fingerprint, s.text) for place, s in m.secrets.items()},
        ssh_keys=tuple(m.ssh_keys),
        user_data=m.user_data,
        virtualisation=Virtualisation(m.virtualisation),
        cause=_text(m.cause, 128),
        cpu_policy=m.cpu_policy,
        page_kib=m.page_kib,
        peers=tuple(Peer(_text(p.name, 80), _address(p.address)) for p in m.peers),
        order=_order_from_message(m.order) if m.HasField("order") else None,
        disk=_count(m.disk),
        on_crash=_crash_word(m.on_crash),
        crash_limit=_count(m.crash_limit),
        stop_grace_s=m.stop_grace_s if m.HasField("stop_grace_s") else None,
        volumes=volume.refs_from_message(m.volumes),
    )


def _count(value: int) -> int:
    if value < 0:
        raise BadMessage(f"count {value} is below 0")
    return value


def _crash_word(word: str) -> str:
    if word not in ("", "restart", "leave"):
        raise BadMessage(f"onCrash {shown(word)!r}")
    return word or "restart"  # of a manager that does not know it


def _order_to_message(value: Order) -> pb.Order:
    return pb.Order(
        uid=value.uid,
        verb=value.verb.value,
        deadline=timestamp(value.deadline_s),
        grace_s=value.grace_s,
        pid=value.pid,
        guest_boot_id=value.guest_boot_id,
        begun=value.begun,
        duration_s=value.duration_s,
        move=None if value.move is None else _move_to_message(value.move),
    )


def _move_to_message(value: Move) -> pb.Move:
    return pb.Move(source=value.source, target=value.target, stage=value.stage.value, address=value.address)


def _move_from_message(m: pb.Move) -> Move:
    return Move(_text(m.source, 253), _text(m.target, 253), Stage(m.stage), _text(m.address, 300))


def _order_from_message(m: pb.Order) -> Order:
    return Order(
        uid=_uid(m.uid),
        verb=Verb(m.verb),
        deadline_s=seconds(m.deadline),
        grace_s=m.grace_s if m.HasField("grace_s") else None,
        pid=m.pid,
        guest_boot_id=_text(m.guest_boot_id, 64),
        begun=m.begun,
        duration_s=m.duration_s,
        move=_move_from_message(m.move) if m.HasField("move") else None,
    )


def _nic_from_message(n: pb.HostNic) -> Nic:
    if not MAC.match(n.mac):
        raise BadMessage(f"{shown(n.mac)!r} is not a MAC address")
    if not 0 < n.prefix_length <= 32:
        raise BadMessage(f"prefix length {n.prefix_length} is out of range")
    return Nic(
        network=_text(n.network, 63),
        mac=n.mac,
        address=_address(n.address),
        prefix_length=n.prefix_length,
        gateway=_address(n.gateway),
        dns=tuple(str(ipaddress.ip_address(d)) for d in n.dns),
        mtu=_mtu(n.mtu),
        type=n.type,
        vlan=_bounded(n.vlan, MAX_VLAN, "VLAN"),
        trust=n.trust,
        min_rate_mbps=_bounded(n.min_rate_mbps, MAX_RATE_MBPS, "rate"),
        max_rate_mbps=_bounded(n.max_rate_mbps, MAX_RATE_MBPS, "rate"),
        pod=_text(n.pod, 63),
    )


def _bounded(number: int, most: int, what: str) -> int:
    if not 0 <= number <= most:
        raise BadMessage(f"{what} {number} is outside 0..{most}")
    return number


def _file_to_message(file: File | None) -> pb.HostFile | None:
    return pb.HostFile(source=file.source, digest=file.digest) if file else None


def _file_from_message(message: pb.HostFile) -> File:
    if not DIGEST.match(message.digest):
        raise BadMessage(f"{shown(message.digest)!r} is not a digest")
    return File(_text(message.source, 2048), message.digest)


def _image_to_message(image: ImageRef) -> pb.HostImage:
    return pb.HostImage(
        name=image.name,
        type=image.type,
        source=image.file.source,
        digest=image.file.digest,
        format=image.format,
        kernel=_file_to_message(image.kernel),
        initrd=_file_to_message(image.initrd),
        cmdline=image.cmdline,
    )


def _cmdline(value: str) -> str:
    """One printable line: what XML would not give back as it was written (a carriage return), or cannot hold, is none."""
    if not _text(value, 2000).isprintable():
        raise BadMessage(f"a kernel's command line that is not one printable line: {shown(value)!r}")
    return value


def _image_from_message(m: pb.HostImage) -> ImageRef:
    if m.type not in ("disk", "oci-archive") or m.format not in ("raw", "qcow2"):
        raise BadMessage(f"image of type {shown(m.type)!r} and format {shown(m.format)!r}")
    return ImageRef(
        name=_text(m.name, 63),
        type=m.type,
        file=_file_from_message(pb.HostFile(source=m.source, digest=m.digest)),
        format=m.format,
        kernel=_file_from_message(m.kernel) if m.HasField("kernel") else None,
        initrd=_file_from_message(m.initrd) if m.HasField("initrd") else None,
        cmdline=_cmdline(m.cmdline),
    )


# --- what a host sends ------------------------------------------------------------------------------------------------


def from_host_to_wire(value: stream.FromHost) -> pb.FromHost:
    """A message of an agent."""
    match value:
        case stream.Hello():
            return pb.FromHost(
                hello=pb.Hello(
                    host=value.host,
                    boot_id=value.boot_id,
                    epoch=value.epoch,
                    revision=value.revision,
                    inventory_digest=value.inventory_digest,
                    session=value.session,
                    agent_version=value.agent_version,
                    kernel=value.kernel,
                    virtualisation=value.virtualisation,
                    nonce=value.nonce,
                )
            )
        case stream.Inventory():
            return pb.FromHost(inventory=pb.Inventory(digest=value.digest, topology=struct(value.topology.to_dict())))
        case stream.Facts():
            return pb.FromHost(facts=_facts_to_message(value))
        case stream.Outcome():
            return pb.FromHost(
                outcome=pb.Outcome(
                    operation=value.operation,
                    instance=value.instance,
                    phase=value.phase,
                    reason=value.reason,
                    message=value.message,
                    placement_refused=value.placement_refused,
                )
            )
        case stream.HostEvent():
            return pb.FromHost(
                event=pb.HostEvent(
                    id=value.id,
                    instance=value.instance,
                    pod=value.pod,
                    reason=value.reason,
                    message=value.message,
                    severity=value.severity,
                    time=timestamp(value.time_s),
                    cause=value.cause,
                )
            )
        case stream.Measurement():
            return pb.FromHost(
                measurement=pb.Measurement(
                    time=timestamp(value.time_s),
                    cpu_used=value.cpu_used,
                    memory_used_mib=value.memory_used_mib,
                    instances=[
                        pb.InstanceMeasurement(uid=i.uid, cpu_time_ns=i.cpu_time_ns, memory_rss_mib=i.memory_rss_mib)
                        for i in value.instances
                    ],
                )
            )
        case stream.Ack():
            return pb.FromHost(ack=pb.Ack(epoch=value.epoch, revision=value.revision))
        case stream.Credit():
            return pb.FromHost(credit=pb.Credit(messages=value.messages))
        case stream.Bye():
            return pb.FromHost(bye=pb.Bye(reason=value.reason))
        case _:
            assert_never(value)


def from_host_from_wire(message: pb.FromHost) -> stream.FromHost:
    """A message of an agent, as the manager takes it. Raises BadMessage."""
    return _checked(_from_host, message)


def _from_host(message: pb.FromHost) -> stream.FromHost:
    match message.WhichOneof("message"):
        case "hello":
            h = message.hello
            return stream.Hello(
                host=_text(h.host, 63),
                boot_id=_text(h.boot_id, 64),
                epoch=h.epoch,
                revision=h.revision,
                inventory_digest=_text(h.inventory_digest, 128),
                session=h.session,
                agent_version=_text(h.agent_version, 64),
                kernel=_text(h.kernel, 256),
                virtualisation=_text(h.virtualisation, 16),
                nonce=checked_nonce(h.nonce),
            )
        case "inventory":
            i = message.inventory
            return stream.Inventory(_text(i.digest, 128), Topology.from_dict(plain(i.topology)))
        case "facts":
            return _facts_from_message(message.facts)
        case "outcome":
            o = message.outcome
            return stream.Outcome(
                operation=_text(o.operation, 64),
                instance=_text(o.instance, 64),
                phase=_text(o.phase, 32),
                reason=_text(o.reason, 64),
                message=_text(o.message),
                placement_refused=o.placement_refused,
            )
        case "event":
            e = message.event
            if e.severity not in ("Normal", "Warning"):
                raise BadMessage(f"severity {shown(e.severity)!r}")
            return stream.HostEvent(
                id=_text(e.id, 128),
                instance=_text(e.instance, 64),
                pod=_text(e.pod, 63),
                reason=_text(e.reason, 64),
                message=_text(e.message),
                severity=e.severity,
                time_s=seconds(e.time),
                cause=_text(e.cause, 128),
            )
        case "measurement":
            m = message.measurement
            return stream.Measurement(
                time_s=seconds(m.time),
                cpu_used=m.cpu_used,
                memory_used_mib=m.memory_used_mib,
                instances=tuple(
                    stream.InstanceMeasurement(_uid(i.uid), i.cpu_time_ns, i.memory_rss_mib) for i in m.instances
                ),
            )
        case "ack":
            return stream.Ack(message.ack.epoch, message.ack.revision)
        case "credit":
            return stream.Credit(message.credit.messages)
        case "bye":
            return stream.Bye(_text(message.bye.reason))
        case other:
            raise BadMessage(f"unknown message {other!r}")


def _facts_to_message(value: stream.Facts) -> pb.Facts:
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


def _facts_from_message(message: pb.Facts) -> stream.Facts:
    return stream.Facts(
        sequence=message.sequence,
        snapshot=message.snapshot,
        instances=tuple(_state_from_message(i) for i in message.instances),
        gone=tuple(_uid(u) for u in message.gone),
        host=_report_from_message(message.host) if message.HasField("host") else None,
        more=message.more,
    )


def _report_from_message(message: pb.HostFacts) -> stream.HostReport:
    return stream.HostReport(
        foreign=message.foreign,
        foreign_claims=tuple(Claim.from_dict(plain(c)) for c in message.foreign_claims),
        drift=tuple(_text(d) for d in message.drift),
        conditions=tuple(
            Condition(_text(c.type, 64), _text(c.status, 16), _text(c.reason, 64), _text(c.message), seconds(c.since))
            for c in message.conditions
        ),
        disk_free_mib=message.disk_free_mib,
        profile=lines_from_messages(message.profile),
        volumes=volume.facts_from_message(message),
        gpus=gpus.states_from_messages(message.gpus),
        passage=_text(message.passage, 300),
        cpu=_text(message.cpu, 128),
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
        uid=_uid(m.uid),
        phase=OrderPhase(m.phase),
        reason=_text(m.reason, 64),
        message=_text(m.message),
        started_s=seconds(m.started),
        finished_s=seconds(m.finished),
        certificate=certificate_from_message(m.certificate) if m.HasField("certificate") else None,
        address=_text(m.address, 300),
    )


def _state_from_message(m: pb.InstanceFacts) -> InstanceState:
    return InstanceState(
        uid=_uid(m.uid),
        generation=m.generation,
        phase=Phase(m.phase),
        reason=_text(m.reason, 64),
        message=_text(m.message),
        virtualisation=_text(m.virtualisation, 16),
        guest_boot_id=_text(m.guest_boot_id, 64),
        pid=m.pid,
        starts=m.starts,
        since_s=seconds(m.since),
        guest_ready=m.guest_ready,
        cloud_init=_text(m.cloud_init, 256),
        pods=tuple(_pod_from_message(p) for p in m.pods),
        placement_epoch=m.placement_epoch,
        placement_generation=m.placement_generation,
        claim=Claim.from_dict(plain(m.claim)) if m.HasField("claim") else None,
        order=_order_state_from_message(m.order) if m.HasField("order") else None,
        cloud_init_message=_text(m.cloud_init_message, 2048),
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
        name=_text(m.name, 63),
        phase=_text(m.phase, 32),
        ready=m.ready,
        reason=_text(m.reason, 64),
        message=_text(m.message),
        started_s=seconds(m.started),
        containers=tuple(
            ContainerState(
                name=_text(c.name, 63),
                image=_text(c.image),
                state=_text(c.state, 32),
                ready=c.ready,
                restarts=c.restarts,
                exit_code=c.exit_code,
                reason=_text(c.reason, 64),
                message=_text(c.message),
                started_s=seconds(c.started),
                finished_s=seconds(c.finished),
            )
            for c in m.containers
        ),
    )


# --- shared -----------------------------------------------------------------------------------------------------------


def _checked(decode: Callable[[M], V], message: M) -> V:
    """Whatever has no shape becomes BadMessage: the other end is at fault, and the session ends."""
    try:
        return decode(message)
    except BadMessage:
        raise
    except (CasemateError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadMessage(shown(f"{type(error).__name__}: {error}")) from error
