"""What a host is told to have: desired instances ⇄ messages of hosts.proto, total in both directions.

What arrives is checked here as in :mod:`casemate_wire.codec.hosts`.
"""

import ipaddress
import re

from casemate_core.claims import Claim
from casemate_core.errors import shown
from casemate_core.spec.environment import MAX_RATE_MBPS, MAX_VLAN
from casemate_core.spec.instance import (
    DIGEST,
    DesiredInstance,
    File,
    HostNetwork,
    ImageRef,
    Nic,
    Peer,
    Placement,
    Run,
    Virtualisation,
)
from casemate_core.spec.operation import Move, Order, Stage, Verb
from casemate_core.spec.secret import SecretText
from casemate_wire import stream
from casemate_wire.codec import gpus, volume
from casemate_wire.codec.basics import BadMessage, checked_text, checked_uid, plain, seconds, struct, timestamp
from casemate_wire.v1 import hosts_pb2 as pb

MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z", re.ASCII)


def desired_to_message(value: stream.Desired) -> pb.Desired:
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


def desired_from_message(message: pb.Desired) -> stream.Desired:
    return stream.Desired(
        epoch=message.epoch,
        revision=message.revision,
        snapshot=message.snapshot,
        instances=tuple(instance_from_message(i) for i in message.instances),
        removed=tuple(checked_uid(u) for u in message.removed),
        networks=tuple(
            HostNetwork(
                checked_text(n.name, 63), n.type, str(ipaddress.IPv4Network(n.subnet)), _address(n.gateway), _mtu(n.mtu)
            )
            for n in message.networks
        ),
        networks_removed=tuple(checked_text(n, 63) for n in message.networks_removed),
        volumes_removed=tuple(checked_uid(u) for u in message.volumes_removed),
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
        uid=checked_uid(m.uid),
        tenant=checked_text(m.tenant, 63),
        environment=checked_text(m.environment, 63),
        name=checked_text(m.name, 80),
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
        cause=checked_text(m.cause, 128),
        cpu_policy=m.cpu_policy,
        page_kib=m.page_kib,
        peers=tuple(Peer(checked_text(p.name, 80), _address(p.address)) for p in m.peers),
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
    return Move(checked_text(m.source, 253), checked_text(m.target, 253), Stage(m.stage), checked_text(m.address, 300))


def _order_from_message(m: pb.Order) -> Order:
    return Order(
        uid=checked_uid(m.uid),
        verb=Verb(m.verb),
        deadline_s=seconds(m.deadline),
        grace_s=m.grace_s if m.HasField("grace_s") else None,
        pid=m.pid,
        guest_boot_id=checked_text(m.guest_boot_id, 64),
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
        network=checked_text(n.network, 63),
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
        pod=checked_text(n.pod, 63),
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
    return File(checked_text(message.source, 2048), message.digest)


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
    if not checked_text(value, 2000).isprintable():
        raise BadMessage(f"a kernel's command line that is not one printable line: {shown(value)!r}")
    return value


def _image_from_message(m: pb.HostImage) -> ImageRef:
    if m.type not in ("disk", "oci-archive") or m.format not in ("raw", "qcow2"):
        raise BadMessage(f"image of type {shown(m.type)!r} and format {shown(m.format)!r}")
    return ImageRef(
        name=checked_text(m.name, 63),
        type=m.type,
        file=_file_from_message(pb.HostFile(source=m.source, digest=m.digest)),
        format=m.format,
        kernel=_file_from_message(m.kernel) if m.HasField("kernel") else None,
        initrd=_file_from_message(m.initrd) if m.HasField("initrd") else None,
        cmdline=_cmdline(m.cmdline),
    )
