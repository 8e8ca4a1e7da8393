"""Volume: a disk that outlives the instance that uses it. Frozen types, the rules of meaning, and what each is called where.

A volume has four names. Its *uid* is its identity: files on hosts, serial numbers and claims carry it, so that a volume that was
deleted and applied again is another one. Its *name* is how its tenant calls it. An environment *mounts* it under the name
that its spec says, which is the volume's name where there is one instance, and the part before the ordinal where there are
several: so the pods of all instances name the same path. Its *serial* is what the guest finds the disk by.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from casemate_core.errors import Violation, shown
from casemate_core.quantity import format_mib
from casemate_core.spec.meta import Meta, check_meta, check_name

#: A file system of the smallest volume has room for its journal and something beside it.
MIN_VOLUME_MIB: Final = 16
MAX_VOLUME_MIB: Final = 64 * 1024 * 1024
#: Volumes of one instance.
MAX_VOLUMES: Final = 16
#: Where a guest mounts its volumes.
MOUNTS: Final = "/volumes"
#: A virtio disk tells at most so many characters of its serial number (VIRTIO_BLK_ID_BYTES of the virtio specification).
SERIAL_CHARS: Final = 20


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What is asked of a volume."""

    size_mib: int
    type: str = "local"


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume as it is applied."""

    meta: Meta
    spec: VolumeSpec


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A volume as an environment asks for it."""

    volume: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """A volume as one instance uses it: its name, the name that it is mounted under, and whether writes are refused."""

    volume: str
    mount: str
    read_only: bool = False


def check_volume(volume: Volume) -> Iterator[Violation]:
    """Violations of the rules of meaning."""
    yield from check_meta("Volume", volume.meta)
    size = volume.spec.size_mib
    if not MIN_VOLUME_MIB <= size <= MAX_VOLUME_MIB:
        yield Violation(
            "spec.size",
            format_mib(size),
            "is out of range",
            f"write {MIN_VOLUME_MIB}Mi to {format_mib(MAX_VOLUME_MIB)}",
        )
    if volume.spec.type != "local":
        yield Violation("spec.type", shown(volume.spec.type), "is not served by this release", "write local")


def check_mounts(mounts: tuple[VolumeMount, ...], replicas: int) -> Iterator[Violation]:
    """Violations in ``spec.volumes`` of an environment."""
    if len(mounts) > MAX_VOLUMES:
        yield Violation("spec.volumes", str(len(mounts)), "are too many entries", f"keep at most {MAX_VOLUMES}")
        return
    seen: dict[str, int] = {}
    for i, mount in enumerate(mounts):
        path = f"spec.volumes[{i}].volume"
        found = list(check_name(path, mount.volume))
        yield from found
        if mount.volume in seen:
            yield Violation(
                path, shown(mount.volume), f"is also spec.volumes[{seen[mount.volume]}]", "name each volume once"
            )
        elif not found and len(name_of(mount.volume, replicas - 1, replicas)) > 63:
            yield Violation(path, mount.volume, "leaves no room for the number of an instance", "use a shorter name")
        seen.setdefault(mount.volume, i)


def check_claims(pods: tuple[Mapping[str, Any], ...], mounts: tuple[VolumeMount, ...]) -> Iterator[Violation]:
    """Violations of checked pods that name volumes which their environment does not have."""
    known = {mount.volume for mount in mounts}
    for i, pod in enumerate(pods):
        for j, volume in enumerate(pod["spec"].get("volumes") or ()):
            claim = volume.get("persistentVolumeClaim")
            if claim is None:
                continue
            path = f"spec.pods[{i}].spec.volumes[{j}].persistentVolumeClaim.claimName"
            name = str(claim.get("claimName", "")) if isinstance(claim, Mapping) else ""
            if name not in known:
                remedy = f"name one of {', '.join(sorted(known))}" if known else "add the volume to spec.volumes"
                yield Violation(path, shown(name), "is no volume of this environment", remedy)


def name_of(mount: str, ordinal: int, replicas: int) -> str:
    """The volume that an instance uses where its environment says ``mount``."""
    return mount if replicas <= 1 else f"{mount}-{ordinal}"


def attached(mounts: tuple[VolumeMount, ...], ordinal: int, replicas: int) -> tuple[Attached, ...]:
    """The volumes of one instance."""
    return tuple(Attached(name_of(m.volume, ordinal, replicas), m.volume, m.read_only) for m in mounts)


def names(mounts: tuple[VolumeMount, ...], replicas: int) -> Iterator[tuple[int, str]]:
    """(index of the mount, volume) of all volumes that an environment of so many instances uses."""
    for i, mount in enumerate(mounts):
        for ordinal in range(max(replicas, 1)):
            yield i, name_of(mount.volume, ordinal, replicas)


def serial_of(uid: str) -> str:
    """Serial number of the volume's disk: the first 80 bits of its uid."""
    return uid.replace("-", "")[:SERIAL_CHARS]


def device_of(uid: str) -> str:
    """The volume's device in a guest, by the link that udev makes."""
    return f"/dev/disk/by-id/virtio-{serial_of(uid)}"


def with_paths(pod: Mapping[str, Any]) -> dict[str, Any]:
    """A checked pod with its volume claims as the folders of the guest in which the volumes are mounted."""
    spec = dict(pod["spec"])
    if "volumes" in spec:
        spec["volumes"] = [_with_path(volume) for volume in spec["volumes"] or ()]
    return {**pod, "spec": spec}


def _with_path(volume: Mapping[str, Any]) -> dict[str, Any]:
    claim = volume.get("persistentVolumeClaim")
    if not isinstance(claim, Mapping):
        return dict(volume)
    return {"name": volume.get("name"), "hostPath": {"path": f"{MOUNTS}/{claim['claimName']}", "type": "Directory"}}
