# ruff: noqa: SIM905 (lists of many short words read better as text)
"""What the emulated server is made of. Values only; whatever here changes makes another server (`tree_key`, `disk_key`).

Debian trixie, because its QEMU 10 emulates a NIC with SR-IOV (igb) and the server's own kernel drives it. The same tree is
both: the programs that run on this machine to emulate the server, and the server's root file system.
"""

import hashlib
from pathlib import Path

SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
KERNEL_META = "linux-image-amd64"
PYTHON = "3.13"

PACKAGES = (
    "busybox-static,ca-certificates,cpio,dbus,ethtool,iproute2,kmod,less,libvirt-clients,libvirt-daemon-driver-qemu,"
    "libvirt-daemon-system,nftables,numactl,openssh-server,pciutils,procps,python3,python3-libvirt,qemu-system-x86,"
    "qemu-utils,rt-tests,systemd,systemd-sysv,udev,util-linux,zstd"
).split(",")
EXCLUDED_PATHS = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")

#: Of the project's lock, what the agent needs and Debian does not bring. libvirt-python is published as source only: the
#: server has Debian's own.
WHEELS = (
    "aiohappyeyeballs aiohttp aiosignal attrs cffi click cryptography frozenlist googleapis-common-protos grpcio grpcio-status idna "
    "markdown-it-py mdurl msgspec multidict nvidia-ml-py prometheus-client propcache protobuf psutil pycdlib pycparser pygments "
    "pyroute2 pyyaml rich typing-extensions yarl"
).split()

#: Folders and files below ``lib/modules/VERSION``; what they depend on is found among them.
MODULES = (
    "kernel/arch kernel/crypto kernel/lib kernel/block kernel/virt kernel/fs/ext4 kernel/fs/jbd2 kernel/fs/mbcache.ko.xz "
    "kernel/fs/9p kernel/fs/netfs kernel/fs/overlayfs kernel/fs/isofs kernel/fs/configfs kernel/fs/autofs kernel/net/9p "
    "kernel/fs/nls kernel/net/8021q kernel/net/802 kernel/net/bridge kernel/net/ipv4 kernel/net/ipv6 kernel/net/netfilter "
    "kernel/net/sched kernel/net/llc kernel/net/core kernel/net/packet kernel/net/unix kernel/net/vmw_vsock "
    "kernel/drivers/vfio kernel/drivers/iommu kernel/drivers/virtio kernel/drivers/vhost kernel/drivers/nvme "
    "kernel/drivers/dca kernel/drivers/ptp kernel/drivers/pps kernel/drivers/pci "
    "kernel/drivers/net/ethernet/intel/igb kernel/drivers/net/ethernet/intel/igbvf kernel/drivers/net/tun.ko.xz "
    "kernel/drivers/net/tap.ko.xz kernel/drivers/net/virtio_net.ko.xz kernel/drivers/net/net_failover.ko.xz "
    "kernel/drivers/net/veth.ko.xz kernel/drivers/net/macvlan.ko.xz kernel/drivers/net/dummy.ko.xz "
    "kernel/drivers/gpu/drm/drm.ko.xz kernel/drivers/gpu/drm/drm_kms_helper.ko.xz "
    "kernel/drivers/gpu/drm/drm_shmem_helper.ko.xz kernel/drivers/gpu/drm/virtio kernel/drivers/i2c kernel/drivers/char/hw_random kernel/drivers/block/virtio_blk.ko.xz "
    "kernel/drivers/block/loop.ko.xz"
).split()

#: Units that cost seconds of an emulated boot and serve nothing here.
MASKED_UNITS = (
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer logrotate.timer e2scrub_all.timer "
    "man-db.timer systemd-pstore.service systemd-update-utmp.service systemd-random-seed.service "
    "systemd-journal-flush.service systemd-tpm2-setup.service systemd-tpm2-setup-early.service ldconfig.service "
    "systemd-hwdb-update.service systemd-journal-catalog-update.service systemd-firstboot.service "
    "systemd-machine-id-commit.service systemd-binfmt.service getty@tty1.service sshd-keygen.service "
    "serial-getty@ttyS0.service libvirt-guests.service systemd-logind.service systemd-timesyncd.service "
    "e2scrub_reap.service "
    "systemd-remount-fs.service dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount "
    "sys-fs-fuse-connections.mount sys-kernel-config.mount modprobe@configfs.service modprobe@drm.service "
    "modprobe@efi_pstore.service modprobe@fuse.service polkit.service remote-fs.target"
).split()

HOSTNAME = "lab"
#: The address that QEMU's user network gives its first guest, and that of the machine around it (QEMU manual, -netdev user).
ADDRESS, GATEWAY = "10.0.2.15", "10.0.2.2"
DISK_MIB = 3072

FILES = {
    "etc/hostname": f"{HOSTNAME}\n",
    "etc/hosts": f"127.0.0.1 localhost {HOSTNAME}\n",
    "etc/machine-id": "1234567890abcdef1234567890abcdef\n",
    "etc/fstab": "",
    "etc/resolv.conf": "",
    "etc/ssh/sshd_config.d/lab.conf": "UseDNS no\nUsePAM no\nPermitRootLogin prohibit-password\nPrintLastLog no\n"
    "MaxSessions 64\nHostKey /etc/ssh/ssh_host_ed25519_key\n",
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\n",
    "etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultTimeoutStartSec=300s\nDefaultDeviceTimeoutSec=300s\n",
    # Python is started often and each start looks for byte code: it is all there already.
    "etc/environment": "PYTHONDONTWRITEBYTECODE=1\n",
}

#: Modules of the initial RAM disk: the root disk, its file system, the management NIC.
INITRD_MODULES = ("virtio_blk", "ext4", "virtio_net")
INITRD = """#!/bin/sh
export PATH=/bin; B=/bin/busybox
$B mount -t proc p /proc; $B mount -t sysfs s /sys; $B mount -t devtmpfs d /dev
for m in @MODULES@; do $B insmod /m/$m; done
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; $B sleep 0.2; done
$B mount -t ext4 -o noatime,nobarrier /dev/vda /new || exec $B sh
for n in /sys/class/net/*; do [ -e $n/device ] && n=${n##*/} && $B ip link set $n name mgmt0 2>/dev/null; done
$B ip addr add @ADDRESS@/24 dev mgmt0; $B ip link set mgmt0 up; $B ip route add default via @GATEWAY@
$B umount /proc; $B umount /sys; $B mount --move /dev /new/dev
exec $B switch_root /new /sbin/init
"""

KERNEL_LINE = (
    "console=ttyS0,115200 quiet rw mitigations=off intel_iommu=on iommu=pt tsc=reliable no_timer_check nowatchdog audit=0 "
    "random.trust_cpu=on net.ifnames=1 systemd.show_status=0 cryptomgr.notests transparent_hugepage=never "
    "hugepagesz=2M hugepages=0:64,1:128"
)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def tree_key() -> str:
    """Of the Debian tree."""
    return _digest(SUITE, KERNEL_META, *PACKAGES, *EXCLUDED_PATHS)


def disk_key(lock: str) -> str:
    """Of the disk made from the tree; ``lock`` is the text of the project's lock file."""
    here = Path(__file__).parent
    sources = [(here / name).read_text() for name in ("build.py", "recipe.py", "guest.c")]
    return _digest(tree_key(), lock, *sources)
