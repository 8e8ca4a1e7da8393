"""The emulated server's tree and disk, each built once for its content.

What may live here: processes and file operations on folders below the cache. Root, no loop device, no daemon.

Theory of operation. ``tree-KEY`` is a Debian tree by mmdebstrap, with the kernel's package unpacked beside it; the QEMU in it
runs on this machine through the tree's own dynamic loader, so neither its version nor its libraries are this machine's.
``disk-KEY`` is what the server boots from: a copy of the tree with the agent's dependencies, decompressed modules (xz is
slow on an emulated processor), the configuration of `recipe`, written by ``mke2fs -d``. Our own wheel is not in it: it
changes with each commit, and is installed into the running server.
"""

import fcntl
import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from casemate_agent.guestimage import mirror
from support.hostlab import recipe

CACHE = Path("/var/cache/casemate/lab")
PROJECT = Path(__file__).resolve().parents[3]
LOCK = PROJECT / ".ci/requirements.lock"
TOOLS = ("mmdebstrap", "dpkg-deb", "mke2fs", "depmod", "modprobe", "cpio", "gcc", "ssh", "ssh-keygen")

Say = Callable[[str], None]


class LabFailed(RuntimeError):
    """The server could not be built or started; the text says which step failed and how."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a server boots from. ``key`` is the private half of the one key that it admits."""

    tree: Path
    disk: Path
    kernel: Path
    initrd: Path
    key: Path
    #: What libvirt found out about the server's QEMU, kept from the first server that ran on this disk; see `server`.
    probed: Path


def build(say: Say, cache: Path = CACHE) -> Parts:
    """The parts, built where they are not there. Raises LabFailed; what was begun then is removed."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LabFailed(f"missing tools: {', '.join(missing)}; remedy: .ci/apt-install build guest lab")
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / f"tree-{recipe.tree_key()}"
    disk = cache / f"disk-{recipe.disk_key(LOCK.read_text())}"
    with exclusive(cache, say):
        for leftover in cache.glob(".new-*"):
            # What was killed as it built a tree may have left /proc and /sys mounted there: nothing of those is to be removed.
            subprocess.run(["rm", "-rf", "--one-file-system", leftover], capture_output=True, check=False)
        if not tree.exists():
            say(f"Debian {recipe.SUITE} tree, some minutes")
            make(tree, cache, _build_tree)
        if not disk.exists():
            say("the server's disk")
            make(disk, cache, lambda work: _build_disk(tree, work))
    return Parts(
        tree / "root", disk / "lab.img", disk / "vmlinuz", disk / "initrd.gz", disk / "key", disk / "probed.tar"
    )


@contextmanager
def exclusive(folder: Path, say: Say) -> Iterator[None]:
    """Alone among the builds of this machine."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is under way, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(target: Path, cache: Path, fill: Callable[[Path], None]) -> None:
    """``target`` gets its name only when it is whole."""
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=cache))
    work.chmod(0o755)
    try:
        fill(work)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(command: Sequence[str | Path], *, stdin: bytes | None = None, cwd: Path | None = None) -> bytes:
    """A tool, to its end. Raises LabFailed with the end of what it said."""
    done = subprocess.run([str(word) for word in command], input=stdin, capture_output=True, check=False, cwd=cwd)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).decode(errors="replace").splitlines()[-15:])
        raise LabFailed(f"{command[0]} failed with status {done.returncode}:\n{tail}")
    return done.stdout


def tree_python(tree: Path, *arguments: str | Path) -> None:
    """Run the server's own Python on this machine, on files of this machine."""
    loader: list[str | Path] = [
        tree / "lib64/ld-linux-x86-64.so.2",
        "--library-path",
        tree / "usr/lib/x86_64-linux-gnu",
    ]
    environment = ["env", "-i", f"PYTHONHOME={tree}/usr", "PYTHONPATH=", "LANG=C.UTF-8"]
    run([*environment, *loader, tree / f"usr/bin/python{recipe.PYTHON}", *arguments])


# --- the tree ---------------------------------------------------------------------------------------------------------


def mirrors_here() -> mirror.Mirrors:
    """Where this machine gets its packages from."""
    release = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    return mirror.ask_apt(release[1] if release else "")


def _build_tree(work: Path) -> None:
    mirrors = mirrors_here()
    fetch_kernel = (
        'chroot "$1" sh -c \'mkdir /kernel && chown _apt /kernel && cd /kernel && apt-get -q download '
        f'$(apt-cache depends --important {recipe.KERNEL_META} | sed -n "s/.*Depends: *//p")\''
    )
    root = work / "root"
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=apt",
            "--format=directory",
            f"--include={','.join(recipe.PACKAGES)}",
            '--aptopt=APT::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={path}" for path in recipe.EXCLUDED_PATHS),
            f"--customize-hook={fetch_kernel}",
            recipe.SUITE,
            root,
            *mirror.sources(mirrors, recipe.SUITE, recipe.KEYRING),
        ]
    )
    packages = list((root / "kernel").glob("linux-image-*.deb"))
    if len(packages) != 1:
        raise LabFailed(f"expected one kernel package, found {[path.name for path in packages]}")
    run(["dpkg-deb", "-x", packages[0], work / "kernel"])
    shutil.rmtree(root / "kernel")


# --- the disk ---------------------------------------------------------------------------------------------------------


def _build_disk(tree: Path, work: Path) -> None:
    root = work / "root"
    run(["cp", "-a", "--reflink=auto", tree / "root", root])
    version = _modules(tree / "kernel", root)
    shutil.copy(tree / f"kernel/boot/vmlinuz-{version}", work / "vmlinuz")
    _wheels(tree / "root", root)
    _configure(root, work)
    _guest(root)
    _initrd(root, version, work)
    image = work / "lab.img"
    with image.open("wb") as file:
        file.truncate(recipe.DISK_MIB * 1024 * 1024)
    # libvirt starts every emulator that it finds, to ask it what it can: the one that nobody uses costs seconds, or a minute.
    (root / "usr/bin/qemu-system-i386").unlink()
    options = ["-O", "^metadata_csum,^resize_inode", "-E", "lazy_itable_init=1,root_owner=0:0"]
    run(["mke2fs", "-q", "-t", "ext4", *options, "-m", "0", "-d", root, image])
    shutil.rmtree(root)


def _modules(kernel: Path, root: Path) -> str:
    modules = next(path for path in (kernel / "usr/lib/modules", kernel / "lib/modules") if path.is_dir())
    version = next(path.name for path in modules.iterdir())
    source, target = modules / version, root / "usr/lib/modules" / version
    target.mkdir(parents=True)
    for name in recipe.MODULES:
        found = source / name
        if not found.exists():
            continue  # built into the kernel in this version
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, target / name, dirs_exist_ok=True)
        else:
            shutil.copy(found, target / name)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / name, target / name)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_decompress, target.rglob("*.ko.xz")))
    run(["depmod", "-b", root, version])
    return version


def _decompress(packed: Path) -> None:
    packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()


def locked(lock: str, names: Sequence[str]) -> str:
    """The entries of a lock file with these names, word for word. Raises LabFailed for one that is not there."""
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lock.splitlines():
        if match := re.match(r"([a-z0-9-]+)==", line):
            current = entries.setdefault(match[1], [])
        if line and not line.lstrip().startswith("#"):
            current.append(line)
    if missing := [name for name in names if name not in entries]:
        raise LabFailed(f"the lock has no {', '.join(missing)}: recipe.WHEELS names what the agent no longer needs")
    return "\n".join(line for name in names for line in entries[name]) + "\n"


def _wheels(tree: Path, root: Path) -> None:
    """What the agent needs, as wheels of the server's Python, installed and compiled from outside."""
    target = root / f"usr/local/lib/python{recipe.PYTHON}/dist-packages"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write(locked(LOCK.read_text(), recipe.WHEELS))
        wanted.flush()
        platforms = ["--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64"]
        run(
            [
                PROJECT / ".venv/bin/python",
                "-m",
                "pip",
                "--disable-pip-version-check",
                "install",
                "-q",
                "--no-deps",
                "--require-hashes",
                "--only-binary=:all:",
                f"--python-version={recipe.PYTHON}",
                *platforms,
                f"--target={target}",
                "-r",
                wanted.name,
            ]
        )
    tree_python(tree, "-m", "compileall", "-q", "-s", root, target)


def _configure(root: Path, work: Path) -> None:
    for name, text in recipe.FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(text)
    units = root / "etc/systemd/system"
    for unit in recipe.MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", work / "key"])
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(work / "key.pub", ssh / "authorized_keys")
    for name in ("key", "key.pub"):
        host_key = root / "etc/ssh" / name.replace("key", "ssh_host_ed25519_key")
        host_key.unlink(missing_ok=True)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / "etc/ssh/ssh_host_ed25519_key"])


def _guest(root: Path) -> None:
    """The tiny guest, and an empty disk for it, in the folder that the agent may take images from."""
    library = root / "var/lib/casemate/library"
    library.mkdir(parents=True)
    tiny_guest(library / "guest.elf")
    with (library / "empty.img").open("wb") as file:
        file.truncate(16 * 1024 * 1024)


def tiny_guest(target: Path) -> None:
    """Compile guest.c, a multiboot kernel, to ``target``. Raises LabFailed."""
    source = Path(__file__).parent / "guest.c"
    flags = "-m32 -ffreestanding -nostdlib -fno-pic -fno-pie -no-pie -fno-stack-protector -fno-asynchronous-unwind-tables -O1 -static"
    flags += " -fcf-protection=none"
    script = "ENTRY(_start) SECTIONS { . = 1M; .text : { *(.multiboot) *(.text*) } .rodata : { *(.rodata*) } "
    script += (
        ".data : { *(.data*) } .bss : { *(.bss*) *(COMMON) } /DISCARD/ : { *(.note*) *(.eh_frame*) *(.comment) } }"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ld") as linker:
        linker.write(script)
        linker.flush()
        run(["gcc", *flags.split(), "-Wl,--build-id=none", "-T", linker.name, "-o", target, source])


def _initrd(root: Path, version: str, work: Path) -> None:
    folder = work / "initrd"
    for name in ("bin", "m", "proc", "sys", "dev", "new"):
        (folder / name).mkdir(parents=True)
    shutil.copy(root / "usr/bin/busybox", folder / "bin/busybox")
    (folder / "bin/sh").symlink_to("busybox")
    order: list[str] = []
    for module in recipe.INITRD_MODULES:
        for line in run(["modprobe", "-d", root, "-S", version, "--show-depends", module]).decode().splitlines():
            if line.startswith("insmod"):
                path = Path(line.split()[1])
                if path.name not in order:
                    order.append(path.name)
                    shutil.copy(path, folder / "m")
    init = recipe.INITRD.replace("@MODULES@", " ".join(order))
    init = init.replace("@ADDRESS@", recipe.ADDRESS).replace("@GATEWAY@", recipe.GATEWAY)
    (folder / "init").write_text(init)
    (folder / "init").chmod(0o755)
    names = b"\n".join(str(path.relative_to(folder)).encode() for path in sorted(folder.rglob("*")))
    archive = run(["cpio", "-o", "-H", "newc", "--quiet"], stdin=names, cwd=folder)
    (work / "initrd.gz").write_bytes(run(["gzip", "-1", "-c"], stdin=archive))
    shutil.rmtree(folder)
