"""Disks, interfaces, console, channels. PURE."""

from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_agent.domain.names import bridge_name, channel_path, check_uid, tap_name
from casemate_agent.domain.shape import HostShape
from casemate_agent.drivers.ports import DomainFiles
from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance, Nic, VolumeRef

GUEST_AGENT_PORT = "org.qemu.guest_agent.0"
HELPER_PORT = "casemate.guest.0"
ROOT_SERIAL = "casemate-root"
SEED_SERIAL = "casemate-seed"
#: Where the guest has it. No firmware reads it, since nothing boots from it: who does is a kernel, which looks for partitions.
SEED_TARGET = "vdb"
#: Of archive disk n; the guest finds its disks by serial, never by the order in which they turn up.
ARCHIVE_SERIAL = "cm-ar-{}"
#: Formats of a backing file that the image store admits.
FORMATS = ("qcow2", "raw")


def console_log(shape: HostShape, uid: str) -> str:
    """File that holds what the guest wrote to its serial console."""
    return f"{shape.instances_dir}/{check_uid(uid)}/console.log"


def add_disks(
    devices: Element,
    files: DomainFiles,
    shape: HostShape,
    volumes: tuple[VolumeRef, ...] = (),
    *,
    iothread: bool = False,
) -> None:
    """The root disk, the seed, the archives and the volumes, in this order, each with a serial and nothing left to be probed.

    Formats are written for every file of a chain and the chain is closed by an empty ``<backingStore/>``: QEMU never
    looks into a tenant's disk to find out what it is. What a guest has flushed is on the host's disk, but for an emulated
    guest: that is for development, and waiting for the disk at each flush is a good part of its time.
    """
    for given in (files.root_format, files.backing_format):
        if given not in FORMATS:
            raise InternalError(f"disk format {given!r} is none of {', '.join(FORMATS)}")
    cache = "writeback" if shape.kind == "kvm" else "unsafe"
    options = {"cache": cache, "discard": "unmap"} | ({"iothread": "1"} if iothread else {})
    root = _disk(devices, 0, files.root, files.root_format, options)
    if files.backing:
        backing = add(root, "backingStore", {"type": "file"})
        add(backing, "format", {"type": files.backing_format})
        add(backing, "source", {"file": files.backing})
        add(backing, "backingStore")
    else:
        add(root, "backingStore")
    _identify(root, 0, ROOT_SERIAL)
    if not files.kernel:
        add(root, "boot", {"order": 1})
    read_only = [(files.seed, SEED_SERIAL)]
    read_only += [(path, ARCHIVE_SERIAL.format(n)) for n, path in enumerate(files.archives)]
    for index, (path, serial) in enumerate(read_only, start=1):
        disk = _disk(devices, index, path, "raw", {"cache": "writeback"})
        add(disk, "backingStore")
        _identify(disk, index, serial)
        add(disk, "readonly")
    if len(files.volumes) != len(volumes):
        raise InternalError(f"{len(files.volumes)} files for {len(volumes)} volumes")
    for index, (path, volume) in enumerate(zip(files.volumes, volumes, strict=True), start=1 + len(read_only)):
        if volume.format not in FORMATS:
            raise InternalError(f"volume format {volume.format!r} is none of {', '.join(FORMATS)}")
        # Unlike a root disk its data is kept: what the guest has flushed is on the host's disk, emulated or not.
        disk = _disk(devices, index, path, volume.format, options | {"cache": "writeback"})
        add(disk, "backingStore")
        _identify(disk, index, volume.serial)
        if volume.read_only:
            add(disk, "readonly")


def _disk(devices: Element, index: int, path: str, disk_format: str, options: dict[str, str]) -> Element:
    if not path.startswith("/"):
        raise InternalError(f"disk {index}: {path!r} is not an absolute path")
    disk = add(devices, "disk", {"type": "file", "device": "disk"})
    add(disk, "driver", {"name": "qemu", "type": disk_format} | options)
    add(disk, "source", {"file": path})
    return disk


def _identify(disk: Element, index: int, serial: str) -> None:
    add(disk, "target", {"dev": f"vd{_letters(index)}", "bus": "virtio"})
    add(disk, "serial", text=serial)


def _letters(index: int) -> str:
    """a … z, aa, ab …: how Linux counts disks."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def add_interfaces(devices: Element, nics: tuple[Nic, ...], uid: str, shape: HostShape) -> None:
    """One interface for each NIC: on its network's bridge, with our tap's fixed name, without a boot ROM."""
    for index, nic in enumerate(nics):
        interface = add(devices, "interface", {"type": "bridge"})
        add(interface, "mac", {"address": nic.mac})
        add(interface, "source", {"bridge": bridge_name(shape.scope, nic.network)})
        add(interface, "target", {"dev": tap_name(shape.scope, uid, index)})
        add(interface, "model", {"type": "virtio"})
        add(interface, "mtu", {"size": nic.mtu})
        add(interface, "rom", {"enabled": "no"})


def add_console(devices: Element, desired: DesiredInstance, shape: HostShape) -> None:
    """A serial console, of which the host keeps a log."""
    serial = add(devices, "serial", {"type": "pty"})
    add(serial, "log", {"file": console_log(shape, desired.uid), "append": "on"})
    add(add(serial, "target", {"type": "isa-serial", "port": 0}), "model", {"name": "isa-serial"})
    console = add(devices, "console", {"type": "pty"})
    add(console, "log", {"file": console_log(shape, desired.uid), "append": "on"})
    add(console, "target", {"type": "serial", "port": 0})


def add_channels(devices: Element, desired: DesiredInstance, shape: HostShape) -> None:
    """Port of QEMU's guest agent (libvirt speaks with it) and of our helper (we do)."""
    add(devices, "controller", {"type": "virtio-serial", "index": 0})
    agent = add(devices, "channel", {"type": "unix"})
    add(agent, "target", {"type": "virtio", "name": GUEST_AGENT_PORT})
    helper = add(devices, "channel", {"type": "unix"})
    add(helper, "source", {"mode": "bind", "path": channel_path(shape.run_dir, desired.uid)})
    add(helper, "target", {"type": "virtio", "name": HELPER_PORT})


def add_small(devices: Element) -> None:
    """Entropy, and the absence of USB, which libvirt would add by itself."""
    add(devices, "controller", {"type": "usb", "model": "none"})
    rng = add(devices, "rng", {"model": "virtio"})
    add(rng, "backend", {"model": "random"}, "/dev/urandom")
