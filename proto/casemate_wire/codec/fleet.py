"""Image, Network, Host, Policy ⇄ messages."""

from casemate_core.quantity import format_mib, format_millicpus, parse_mib
from casemate_core.spec.fleet import (
    Host,
    HostSpec,
    Image,
    ImageSpec,
    Network,
    NetworkSpec,
    Policy,
    PolicySpec,
    Preference,
    Taint,
)
from casemate_core.spec.instance import File
from casemate_core.spec.views import HostStatus, ImageStatus, NetworkStatus
from casemate_wire.codec.basics import condition_to_message, meta_from_message, meta_to_message, struct, timestamp
from casemate_wire.codec.realtime import line_to_message
from casemate_wire.v1 import fleet_pb2 as pb

API = "casemate/v1"


def image_from_message(message: pb.Image) -> Image:
    """A checked message as a value."""
    spec = message.spec
    return Image(
        meta_from_message("Image", message.metadata),
        ImageSpec(
            file=File(spec.source, spec.digest),
            format=spec.format,
            type=spec.type or "disk",
            kernel=File(spec.kernel.source, spec.kernel.digest) if spec.HasField("kernel") else None,
            initrd=File(spec.initrd.source, spec.initrd.digest) if spec.HasField("initrd") else None,
            cmdline=spec.cmdline,
            size_mib=parse_mib(spec.size) if spec.size else 0,
        ),
    )


def image_to_message(image: Image, status: ImageStatus | None = None) -> pb.Image:
    """The value, and its status where there is one."""
    spec = image.spec
    return pb.Image(
        api_version=API,
        kind="Image",
        metadata=meta_to_message(image.meta),
        spec=pb.ImageSpec(
            type=spec.type,
            source=spec.file.source,
            digest=spec.file.digest,
            format=spec.format,
            kernel=pb.BootFile(source=spec.kernel.source, digest=spec.kernel.digest) if spec.kernel else None,
            initrd=pb.BootFile(source=spec.initrd.source, digest=spec.initrd.digest) if spec.initrd else None,
            cmdline=spec.cmdline,
            size=format_mib(spec.size_mib) if spec.size_mib else "",
        ),
        status=pb.ImageStatus(hosts=status.hosts, environments=status.environments) if status else None,
    )


def network_from_message(message: pb.Network) -> Network:
    """A checked message as a value."""
    spec = message.spec
    return Network(
        meta_from_message("Network", message.metadata),
        NetworkSpec(
            type=spec.type, subnet=spec.subnet, gateway=spec.gateway, dns=tuple(spec.dns), mtu=spec.mtu or 1500
        ),
    )


def network_to_message(network: Network, status: NetworkStatus | None = None) -> pb.Network:
    """The value, and its status where there is one."""
    spec = network.spec
    return pb.Network(
        api_version=API,
        kind="Network",
        metadata=meta_to_message(network.meta),
        spec=pb.NetworkSpec(type=spec.type, subnet=spec.subnet, gateway=spec.gateway, dns=spec.dns, mtu=spec.mtu),
        status=pb.NetworkStatus(addresses_used=status.addresses_used, addresses=status.addresses) if status else None,
    )


def host_from_message(message: pb.Host) -> Host:
    """What operators say of a host."""
    return Host(
        meta_from_message("Host", message.metadata),
        HostSpec(
            cordoned=message.spec.cordoned,
            taints=tuple(Taint(t.key, t.value, t.effect or "NoSchedule") for t in message.spec.taints),
        ),
    )


def host_to_message(host: Host, status: HostStatus | None = None) -> pb.Host:
    """The value, and its status where there is one."""
    return pb.Host(
        api_version=API,
        kind="Host",
        metadata=meta_to_message(host.meta),
        spec=pb.HostSpec(
            cordoned=host.spec.cordoned,
            taints=[pb.Taint(key=t.key, value=t.value, effect=t.effect) for t in host.spec.taints],
        ),
        status=_host_status(status) if status else None,
    )


def _host_status(status: HostStatus) -> pb.HostStatus:
    return pb.HostStatus(
        phase=status.phase,
        conditions=[condition_to_message(c) for c in status.conditions],
        agent_version=status.agent_version,
        boot_id=status.boot_id,
        kernel=status.kernel,
        virtualisation=status.virtualisation,
        cells=status.cells,
        cores=status.cores,
        threads=status.threads,
        memory=format_mib(status.memory_mib),
        disk=format_mib(status.disk_mib),
        gpus=status.gpus,
        vfs=status.vfs,
        cpus_used=format_millicpus(status.cpus_used_milli),
        memory_used=format_mib(status.memory_used_mib),
        instances=status.instances,
        foreign=status.foreign,
        heard=timestamp(status.heard_s),
        drift=status.drift,
        profile=[line_to_message(line) for line in status.profile],
        topology=struct(status.topology) if status.topology is not None else None,
    )


def policy_from_message(message: pb.Policy) -> Policy:
    """A checked message as a value."""
    spec = message.spec
    return Policy(
        meta_from_message("Policy", message.metadata),
        PolicySpec(
            match_labels=dict(spec.match_labels),
            match=spec.match,
            precedence=spec.precedence,
            require=tuple(spec.require),
            prefer=tuple(Preference(p.when, p.weight) for p in spec.prefer),
            strategy=spec.strategy,
            spread_by=spec.spread_by,
            cpu_overcommit=spec.cpu_overcommit,
            memory_overcommit=spec.memory_overcommit,
            reserve=spec.reserve,
        ),
    )


def policy_to_message(policy: Policy) -> pb.Policy:
    """The value."""
    spec = policy.spec
    return pb.Policy(
        api_version=API,
        kind="Policy",
        metadata=meta_to_message(policy.meta),
        spec=pb.PolicySpec(
            match_labels=spec.match_labels,
            match=spec.match,
            precedence=spec.precedence,
            require=spec.require,
            prefer=[pb.Preference(when=p.when, weight=p.weight) for p in spec.prefer],
            strategy=spec.strategy,
            spread_by=spec.spread_by,
            cpu_overcommit=spec.cpu_overcommit,
            memory_overcommit=spec.memory_overcommit,
            reserve=spec.reserve,
        ),
    )
