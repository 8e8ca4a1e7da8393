"""Volume ⇄ messages: of users, and of hosts."""

from collections.abc import Iterable

from casemate_core.errors import shown
from casemate_core.quantity import format_mib, parse_mib
from casemate_core.spec.instance import VolumeRef
from casemate_core.spec.meta import NAME
from casemate_core.spec.views import VolumeStatus
from casemate_core.spec.volume import MAX_VOLUMES, Volume, VolumeMount, VolumeSpec
from casemate_wire.codec.basics import UID, BadMessage, meta_from_message, meta_to_message
from casemate_wire.stream import VolumeFacts
from casemate_wire.v1 import environment_pb2 as env_pb
from casemate_wire.v1 import fleet_pb2 as pb
from casemate_wire.v1 import hosts_pb2 as host_pb

API = "casemate/v1"
#: Volumes whose data one host may tell of.
MOST_TOLD = 16_384


def volume_from_message(message: pb.Volume) -> Volume:
    """A checked message as a value."""
    spec = message.spec
    return Volume(meta_from_message("Volume", message.metadata), VolumeSpec(parse_mib(spec.size), spec.type or "local"))


def volume_to_message(volume: Volume, status: VolumeStatus | None = None) -> pb.Volume:
    """The value, and its status where there is one."""
    spec = volume.spec
    return pb.Volume(
        api_version=API,
        kind="Volume",
        metadata=meta_to_message(volume.meta),
        spec=pb.VolumeSpec(size=format_mib(spec.size_mib), type=spec.type),
        status=_status_to_message(status) if status else None,
    )


def _status_to_message(status: VolumeStatus) -> pb.VolumeStatus:
    return pb.VolumeStatus(
        phase=status.phase,
        host=status.host,
        environment=status.environment,
        instance=status.instance,
        allocated="" if status.allocated_mib is None else format_mib(status.allocated_mib),
        capacity="" if status.capacity_mib is None else format_mib(status.capacity_mib),
        format=status.format,
        device=status.device,
        message=status.message,
    )


def mounts_from_message(messages: Iterable[env_pb.VolumeMount]) -> tuple[VolumeMount, ...]:
    """``spec.volumes`` of an environment."""
    return tuple(VolumeMount(m.volume, m.read_only) for m in messages)


def mounts_to_message(mounts: Iterable[VolumeMount]) -> list[env_pb.VolumeMount]:
    """The same, as messages."""
    return [env_pb.VolumeMount(volume=m.volume, read_only=m.read_only) for m in mounts]


def refs_from_message(messages: Iterable[host_pb.HostVolume]) -> tuple[VolumeRef, ...]:
    """Volumes of a desired instance. Raises BadMessage: what comes here names a file and a folder."""
    refs = tuple(map(_ref_from_message, messages))
    if len(refs) > MAX_VOLUMES or len({r.uid for r in refs}) != len(refs) or len({r.name for r in refs}) != len(refs):
        raise BadMessage(f"{len(refs)} volumes, too many or one of them twice")
    return refs


def _ref_from_message(m: host_pb.HostVolume) -> VolumeRef:
    if not UID.match(m.uid) or not NAME.match(m.name):
        raise BadMessage(f"volume {shown(m.uid)!r} named {shown(m.name)!r}")
    if m.format != "raw" or m.size_mib <= 0:
        raise BadMessage(f"volume of format {shown(m.format)!r} and {m.size_mib} MiB")
    return VolumeRef(m.uid, m.name, m.size_mib, m.format, m.read_only, m.made)


def refs_to_message(refs: Iterable[VolumeRef]) -> list[host_pb.HostVolume]:
    """The same, as messages."""
    return [
        host_pb.HostVolume(
            uid=r.uid, name=r.name, size_mib=r.size_mib, format=r.format, read_only=r.read_only, made=r.made
        )
        for r in refs
    ]


def facts_from_message(message: host_pb.HostFacts) -> tuple[VolumeFacts, ...] | None:
    """What a host says of volumes; None where it does not know."""
    if not message.volumes_known:
        return None
    if len(message.volumes) > MOST_TOLD:
        raise BadMessage(f"{len(message.volumes)} volumes on one host")
    for m in message.volumes:
        if not UID.match(m.uid) or m.size_mib < 0 or m.allocated_mib < 0:
            raise BadMessage(f"facts of volume {shown(m.uid)!r}")
    return tuple(VolumeFacts(m.uid, m.size_mib, m.allocated_mib) for m in message.volumes)


def facts_to_message(facts: tuple[VolumeFacts, ...] | None) -> list[host_pb.VolumeFacts]:
    """The same, as messages."""
    return [host_pb.VolumeFacts(uid=f.uid, size_mib=f.size_mib, allocated_mib=f.allocated_mib) for f in facts or ()]
