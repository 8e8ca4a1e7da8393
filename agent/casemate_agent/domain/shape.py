"""What of the host the XML of its domains depends on. PURE."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostShape:
    """One host, as far as domains depend on it.

    ``kind`` is libvirt's domain type: ``kvm``, or ``qemu`` for emulation (TCG). ``machine`` is a versioned machine type
    (``pc-q35-7.2``): a domain keeps the one it was created with, whatever QEMU is installed later.
    """

    kind: str
    machine: str
    emulator: str = "/usr/bin/qemu-system-x86_64"
    #: The host has more than one cell, so that memory must be bound to be where it belongs.
    numa: bool = True
    #: Folder of the channels' sockets, and the folder under which each instance has its own.
    run_dir: str = "/run/casemate"
    instances_dir: str = "/var/lib/casemate/instances"
    scope: str = "main"
