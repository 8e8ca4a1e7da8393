"""netdevsim for an emulated server: a kernel module that plays a NIC with devlink and an eswitch. Built once for each kernel.

What may live here: the build of that one module, kept by content beside the server's other parts, and its way into a server that
runs. Debian's kernels have it not; their source package does, and their headers build it, in a Debian tree of its own that is thrown
away (Debian's tools for it do not run on another release). It is no part of the server's disk: one test wants it.
"""

import hashlib
import lzma
import re
import shutil
from pathlib import Path

from casemate_agent.guestimage import mirror
from support.hostlab import recipe
from support.hostlab.build import CACHE, Say, exclusive, make, mirrors_here, run
from support.hostlab.machine import Machine

MODULE = "netdevsim.ko"
SOURCE = "drivers/net/netdevsim"
#: What it needs of the kernel's own modules, which the server's disk has not.
NEEDED = ("kernel/net/psample/psample.ko.xz", "kernel/drivers/net/macsec.ko.xz")
DEVICES = "/sys/bus/netdevsim"


def load(machine: Machine, say: Say, cache: Path = CACHE) -> None:
    """Have the module loaded in a server. Raises LabFailed."""
    folder = build(machine.parts.tree.parent / "kernel", say, cache)
    for name in (*(Path(needed).name.removesuffix(".xz") for needed in NEEDED), MODULE):
        machine.write(f"/root/{name}", (folder / name).read_bytes())
        plain = name.removesuffix(".ko")
        machine.run(f"grep -q ^{plain} /proc/modules || insmod /root/{name}")


def build(kernel: Path, say: Say, cache: Path = CACHE) -> Path:
    """The folder with the modules for a kernel's unpacked package, built where it is not there. Raises LabFailed."""
    modules = next(path for path in (kernel / "usr/lib/modules", kernel / "lib/modules") if path.is_dir())
    source = next(modules.iterdir())
    key = hashlib.sha256(f"{source.name}\0{Path(__file__).read_text()}".encode()).hexdigest()[:16]
    folder = cache / f"netdevsim-{key}"
    with exclusive(cache, say):
        if not folder.exists():
            say("netdevsim, a module of its kernel, some minutes")
            make(folder, cache, lambda work: _fill(source, work, mirrors_here()))
    return folder


def _fill(kernel: Path, work: Path, mirrors: mirror.Mirrors) -> None:
    version = kernel.name
    series = re.match(r"\d+\.\d+", version)
    assert series is not None, version
    source, plain = f"linux-source-{series[0]}", version.rpartition("-")[0]
    root = work / "root"
    # Unpacked, not installed: the headers depend on a kernel that makes itself an initial RAM disk.
    fetched = f"{source} linux-headers-{version} linux-headers-{plain}-common linux-kbuild-{plain}"
    script = (
        f"mkdir /src && chown _apt /src && cd /src && apt-get -q download {fetched} && "
        "for package in *.deb; do dpkg -x $package /; done && "
        f"tar -xf /usr/src/{source}.tar.xz {source}/{SOURCE} && "
        f"make -s -C /usr/src/linux-headers-{version} M=/src/{source}/{SOURCE} "
        "CONFIG_NETDEVSIM=m CONFIG_DEBUG_INFO_BTF_MODULES= modules && "
        f"cp {source}/{SOURCE}/{MODULE} /"
    )
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=apt",
            "--format=directory",
            "--include=gcc-14,libelf1t64,make,xz-utils",
            '--aptopt=APT::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={path}" for path in recipe.EXCLUDED_PATHS),
            f"--customize-hook=chroot \"$1\" sh -ec '{script}'",
            recipe.SUITE,
            root,
            *mirror.sources(mirrors, recipe.SUITE, recipe.KEYRING),
        ]
    )
    shutil.copy(root / MODULE, work / MODULE)
    shutil.rmtree(root)
    for needed in NEEDED:
        packed = kernel / needed
        (work / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
