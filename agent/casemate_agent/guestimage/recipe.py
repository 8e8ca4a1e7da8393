"""What is in the guest image, as data. PURE.

A change to anything here, to ``files/`` or to the modules of this package gives the image a new key, and thus a new
build.
"""

import hashlib
from collections.abc import Mapping

SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

PACKAGES = (
    # The system.
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "netbase",
    "iproute2",
    "e2fsprogs",
    "procps",
    "ca-certificates",
    # Who speaks with the host: the agent of QEMU, our helper's interpreter, cloud-init for a tenant's user-data.
    "qemu-guest-agent",
    "python3-minimal",
    "libpython3-stdlib",
    "cloud-init",
    "openssh-server",
    # The container runtime. podman's other network and init tools are recommendations, so they are named.
    "podman",
    "crun",
    "conmon",
    "catatonit",
    "netavark",
    "aardvark-dns",
    "nftables",
    # cyclictest, for the latency certificate.
    "rt-tests",
)
# The meta package whose only dependency is the current kernel. The kernel is unpacked, not installed: installing it
# would build an initial RAM disk that is never used.
KERNEL_META = "linux-image-cloud-amd64"

# Left out of every package: nobody reads a manual in a guest.
EXCLUDED_PATHS = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/share/info/*",
)

# Kernel modules that the initial RAM disk loads itself. With an emulated processor every call of modprobe costs tens of
# milliseconds, so what each guest needs within its first seconds is loaded here, once, already decompressed.
INITRD_MODULES = ("virtio_blk", "virtio_net", "isofs", "overlay")

# The root disk is made this small; systemd-growfs grows it to the size of the instance's disk at its first boot.
ROOT_DISK_MIB = 2048

KERNEL_COMMAND_LINE = " ".join(
    (
        "root=/dev/vda",
        "console=ttyS0",
        "quiet",
        # Interfaces are told apart by MAC, so the kernel's own names do, and no udev rule has to rename them.
        "net.ifnames=0",
        # The self tests of the kernel's ciphers, and its search for partitions of a disk image that has none.
        "cryptomgr.notests",
        "systemd.gpt_auto=0",
        "random.trust_cpu=on",
        # Without bpf, whose hooks cost systemd two emulated seconds, and without profiles that nobody loads.
        "lsm=landlock,lockdown,yama",
    )
)

# Units that a guest of ours never needs, each a process or a wait at every boot.
MASKED_UNITS = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "cloud-init-hotplugd.socket",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "modprobe@.service",
    "netavark-dhcp-proxy.service",
    "netavark-dhcp-proxy.socket",
    "netavark-firewalld-reload.service",
    "podman-auto-update.timer",
    "podman-clean-transient.service",
    "podman-restart.service",
    "podman.socket",
    "remote-fs.target",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-boot-random-seed.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-machine-id-commit.service",
    "systemd-pcrmachine.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-sysusers.service",
    "systemd-timesyncd.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    # /tmp stays on the disk: what podman has there must not vanish when systemd arrives.
    "tmp.mount",
)

# Generators are programs that systemd runs before anything else, at every boot and at every reload.
MASKED_GENERATORS = (
    "cloud-init-generator",
    "podman-system-generator",
    "systemd-debug-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-ssh-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-tpm2-generator",
)

# Started before anything else when the image is built, to make in it what podman would otherwise make in every guest.
PRIME_COMMAND_LINE = "init=/usr/lib/casemate/prime"
PRIME_DONE = b"casemate-prime: done"

# unit -> the target that wants it.
ENABLED_UNITS = {
    "casemate-guest.service": "sysinit.target",
    "casemate-pods.service": "multi-user.target",
    "cloud-init.target": "multi-user.target",
    "ssh.socket": "sockets.target",
}
# Wanted by their packages, started by a socket or on demand instead.
DISABLED_WANTS = (
    "default.target.wants/netavark-dhcp-proxy.service",
    "multi-user.target.wants/ssh.service",
    "multi-user.target.wants/remote-fs.target",
    "sockets.target.wants/netavark-dhcp-proxy.socket",
)


def key(inputs: Mapping[str, bytes]) -> str:
    """The name of a build: 16 hexadecimal digits over the recipe's files, by name, and their contents."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(f"{name}\0{len(inputs[name])}\0".encode())
        digest.update(inputs[name])
    return digest.hexdigest()[:16]
