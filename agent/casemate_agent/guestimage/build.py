"""The build itself: mmdebstrap, the files laid over its result, and the packing of the artefacts.

Shell. Every step is a process or a file operation on folders below the output folder; nothing outside of it changes, no
loop device is used, and no daemon has to run. It must run as root, because files of other users are made.

What a build leaves in ``OUT/<key>/``: ``root.qcow2``, ``vmlinux``, ``initrd``, ``hello.tar``, and the two manifests of
kind Image, ``image.yaml`` and ``hello-image.yaml``, whose digests were taken from the finished files. ``OUT/current``
points to the newest build.
"""

import fcntl
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casemate_agent.guestimage import archive, cpio, kernel, mirror, recipe

ARTEFACTS = ("root.qcow2", "vmlinux", "initrd", "hello.tar", "image.yaml", "hello-image.yaml")
# Debian package that brings each tool, for the message about a missing one.
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "depmod": "kmod",
    "zstd": "zstd",
}
BUSYBOX = Path("/bin/busybox")
# A boot and a pod took 20 s on a quiet machine, 90 s on one with four times as much to do as it has processors.
PRIME_TIMEOUT_S = 600.0

Say = Callable[[str], None]


class BuildFailed(RuntimeError):
    """The image could not be built; the text says what is missing, or which step failed and how."""


def inputs() -> dict[str, bytes]:
    """Everything that decides what is built, for `recipe.key`: this package's own files, and the static busybox."""
    here = Path(__file__).parent
    found = {str(path.relative_to(here)): path for path in sorted(here.glob("*.py"))}
    found |= {str(path.relative_to(here)): path for path in sorted((here / "files").rglob("*")) if path.is_file()}
    contents = {name: path.read_bytes() for name, path in found.items()}
    # The address of the mirror does not change what is built; the suite and the packages are in the recipe.
    if BUSYBOX.exists():
        contents["busybox"] = BUSYBOX.read_bytes()
    return contents


def build(out: Path, say: Say) -> Path:
    """Build the image unless ``out`` holds it already; return the folder of the artefacts.

    ``say`` gets one line for each step. Raises `BuildFailed`, `mirror.NoMirror`, `kernel.BadKernel`; what was made
    until then is removed.
    """
    key = recipe.key(inputs())
    finished = out / key
    if is_complete(finished):
        say(f"guest image {key} is built already")
        _point(out, key)
        return finished
    if os.geteuid() != 0:
        raise BuildFailed("building the guest image makes files of several users: run it as root")
    _check_tools()
    out.mkdir(parents=True, exist_ok=True)
    with _exclusive(out, say):
        if is_complete(finished):  # somebody else built it while we waited
            return finished
        for leftover in out.glob(".build-*"):  # of a build that was killed: we hold the lock, so nobody uses it
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=out))
        try:
            _Build(work, finished, say).run()
            result = work / "result"
            if finished.exists():
                shutil.rmtree(finished)
            result.rename(finished)
            _sync(out)
            _point(out, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return finished


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every artefact. A folder gets its name only once all of them are written."""
    return all((folder / name).is_file() for name in ARTEFACTS)


def _check_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not BUSYBOX.exists() or b"/ld-linux" in BUSYBOX.read_bytes()[:4096]:
        missing.append("busybox-static")
    if not Path(recipe.KEYRING).exists():
        missing.append("debian-archive-keyring")
    if missing:
        raise BuildFailed(f"missing Debian packages: apt-get install --no-install-recommends {' '.join(missing)}")


@contextmanager
def _exclusive(out: Path, say: Say) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is under way, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _point(out: Path, key: str) -> None:
    """Make ``out/current`` point to ``key``, in one step."""
    link = out / "current"
    if link.is_symlink() and os.readlink(link) == key:
        return
    fresh = out / f".current-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(key)
    fresh.rename(link)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class _Build:
    """One build in a work folder. ``final`` is where the result will be: the manifests name it."""

    def __init__(self, work: Path, final: Path, say: Say) -> None:
        self.work = work
        self.final = final
        self.say = say
        self.root = work / "root"
        self.result = work / "result"
        self.began = time.monotonic()

    def run(self) -> None:
        self.result.mkdir()
        self._step(1, f"fetch and unpack Debian {recipe.SUITE}")
        self._debootstrap()
        self._step(2, "unpack the kernel and its modules")
        version = self._kernel()
        self._step(3, "lay the guest's files over it")
        self.customise()
        self._step(4, "pack the initial RAM disk")
        self._initrd(version)
        self._step(5, "pack the root disk")
        self._disk()
        self._step(6, "boot it once, so that podman makes what it makes at its first pod")
        (self.result / "hello.tar").write_bytes(archive.hello(BUSYBOX.read_bytes()))
        self._prime()
        self._step(7, "write the manifests")
        self._manifests()
        for name in ARTEFACTS:
            _sync(self.result / name)
        self.say(f"guest image built in {time.monotonic() - self.began:.0f} s")

    def _step(self, number: int, what: str) -> None:
        self.say(f"[{number}/7] {time.monotonic() - self.began:4.0f} s  {what}")

    def _run(self, command: Sequence[str | Path], *, stdin: bytes | None = None) -> bytes:
        """Run a tool to its end; its output is quoted only when it fails. Raises `BuildFailed`."""
        done = subprocess.run([str(word) for word in command], input=stdin, capture_output=True, check=False)
        if done.returncode != 0:
            tail = b"\n".join(done.stderr.strip().splitlines()[-15:]).decode(errors="replace")
            raise BuildFailed(f"{command[0]} failed with status {done.returncode}:\n{tail}")
        return done.stdout

    def _debootstrap(self) -> None:
        mirrors = mirror.ask_apt(_host_codename())
        # Inside the new system, with its verified package lists: name the kernel behind the meta package, fetch it.
        fetch_kernel = (
            'chroot "$1" sh -c \'mkdir /kernel && chown _apt /kernel && cd /kernel && apt-get -q download '
            f'$(apt-cache depends --important {recipe.KERNEL_META} | sed -n "s/.*Depends: *//p")\''
        )
        command = [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            "--format=directory",
            f"--include={','.join(recipe.PACKAGES)}",
            '--aptopt=APT::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt=path-exclude={path}" for path in recipe.EXCLUDED_PATHS),
            f"--customize-hook={fetch_kernel}",
            recipe.SUITE,
            str(self.root),
            *mirror.sources(mirrors, recipe.SUITE, recipe.KEYRING),
        ]
        log: list[str] = []
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None  # asked for above
            for line in process.stderr:
                log.append(line.rstrip())
                if line.startswith("I: ") and "hook" not in line:
                    self.say(f"      {time.monotonic() - self.began:4.0f} s    {line[3:].strip()}")
        if process.returncode != 0:
            tail = "\n".join(log[-15:])
            raise BuildFailed(
                f"mmdebstrap failed with status {process.returncode} (if a signature is the reason, upgrade "
                f"debian-archive-keyring):\n{tail}"
            )

    def _kernel(self) -> str:
        packages = list((self.root / "kernel").glob("linux-image-*.deb"))
        if len(packages) != 1:
            raise BuildFailed(f"expected one kernel package, found {[path.name for path in packages]}")
        unpacked = self.work / "kernel"
        self._run(["dpkg-deb", "-x", packages[0], unpacked])
        shutil.rmtree(self.root / "kernel")
        images = list((unpacked / "boot").glob("vmlinuz-*"))
        if len(images) != 1:
            raise BuildFailed(f"expected one kernel, found {[path.name for path in images]}")
        version = images[0].name.removeprefix("vmlinuz-")
        part = kernel.payload(images[0].read_bytes())
        plain = kernel.unpack(part)
        if plain is None:
            # "-d" of either tool reads the frame format that the kernel's build wrote.
            plain = self._run([part.packing, "-dcq"], stdin=part.data)
        (self.result / "vmlinux").write_bytes(kernel.check_unpacked(plain, part))
        modules = next(path for path in (unpacked / "usr/lib/modules", unpacked / "lib/modules") if path.is_dir())
        # Decompressed here, once: an emulated processor needs tens of milliseconds for each module.
        for packed in modules.rglob("*.ko.xz"):
            packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
            packed.unlink()
        target = self.root / "usr/lib/modules"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(modules / version, target / version, symlinks=True)
        self._run(["depmod", "-b", self.root, version])
        return version

    def customise(self) -> None:
        """Lay ``files/rootfs`` over the new root, enable and mask what `recipe` names, drop what the build needed."""
        shutil.copytree(Path(__file__).parent / "files" / "rootfs", self.root, dirs_exist_ok=True)
        units = self.root / "etc/systemd/system"
        for unit in recipe.DISABLED_WANTS:
            (units / unit).unlink(missing_ok=True)
        for unit in recipe.MASKED_UNITS:
            _replace_link(units / unit, "/dev/null")
        for generator in recipe.MASKED_GENERATORS:
            _replace_link(self.root / "etc/systemd/system-generators" / generator, "/dev/null")
        for unit, target in recipe.ENABLED_UNITS.items():
            where = next(
                folder
                for folder in ("etc/systemd/system", "usr/lib/systemd/system")
                if (self.root / folder / unit).exists()
            )
            _replace_link(units / f"{target}.wants" / unit, f"/{where}/{unit}")
        # cloud-init holds up the whole boot by default; here the rest of the boot does not wait for it.
        for stage in ("cloud-init-local.service", "cloud-init-network.service"):
            lines = (self.root / "usr/lib/systemd/system" / stage).read_text().splitlines(keepends=True)
            (units / stage).write_text("".join(line for line in lines if line.strip() != "Before=sysinit.target"))
        _replace_link(units / "default.target", "/usr/lib/systemd/system/multi-user.target")
        (self.root / "etc/hostname").write_text("casemate\n")
        # An empty id is filled at every boot, from the UUID of the virtual machine; the server's keys at their first use.
        (self.root / "etc/machine-id").write_text("")
        for secret in (self.root / "etc/ssh").glob("ssh_host_*"):
            secret.unlink()
        (self.root / "etc/resolv.conf").unlink(missing_ok=True)
        (self.root / "etc/resolv.conf").write_text("")
        for folder in ("var/lib/apt/lists", "var/cache/apt", "var/log", "tmp"):
            for path in (self.root / folder).iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _initrd(self, version: str) -> None:
        shown = [
            self._run(["modprobe", "-d", self.root, "-S", version, "--show-depends", module]).decode()
            for module in recipe.INITRD_MODULES
        ]
        paths: dict[str, Path] = {}  # in load order, without repetition
        for line in "".join(shown).splitlines():
            word, _, path = line.strip().partition(" ")
            if word == "insmod":
                paths.setdefault(Path(path.strip()).name, Path(path.strip()))
        order = "".join(f"{name}\n" for name in paths)
        entries = [cpio.folder(name) for name in ("bin", "dev", "modules", "proc", "root", "sys")]
        entries.append(cpio.regular("bin/busybox", BUSYBOX.read_bytes(), 0o755))
        entries += [cpio.regular(f"modules/{name}", path.read_bytes()) for name, path in paths.items()]
        entries.append(cpio.regular("modules/order", order.encode()))
        entries.append(cpio.regular("init", (Path(__file__).parent / "files/initrd/init").read_bytes(), 0o755))
        (self.result / "initrd").write_bytes(cpio.archive(entries))

    def _disk(self) -> None:
        raw = self.work / "root.raw"
        with raw.open("wb") as file:
            file.truncate(recipe.ROOT_DISK_MIB << 20)
        self._run(
            [
                *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-J", "size=16"),
                *("-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", "-d", self.root, raw),
            ]
        )

    def _prime(self) -> None:
        """Boot the disk under an emulated processor, which every machine has, with an init that primes podman and ends.

        It proves, too, that what was packed boots.
        """
        raw, console = self.work / "root.raw", self.work / "console"
        command = [
            *("qemu-system-x86_64", "-M", "q35,usb=off", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
            *("-m", "1024", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", self.result / "vmlinux", "-initrd", self.result / "initrd"),
            *("-append", f"{recipe.KERNEL_COMMAND_LINE} {recipe.PRIME_COMMAND_LINE}"),
            *("-drive", f"file={raw},if=none,id=root,format=raw,cache=unsafe", "-device", "virtio-blk-pci,drive=root"),
            *("-drive", f"file={self.result / 'hello.tar'},if=none,id=hello,format=raw,readonly=on"),
            *("-device", "virtio-blk-pci,drive=hello", "-serial", f"file:{console}"),
        ]
        try:
            subprocess.run([str(word) for word in command], capture_output=True, timeout=PRIME_TIMEOUT_S, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            raise BuildFailed(f"the image did not boot: {error}; its console ends with:\n{_tail(console)}") from error
        if recipe.PRIME_DONE not in console.read_bytes():
            raise BuildFailed(f"the image booted, but did not do its work; its console ends with:\n{_tail(console)}")
        # What the journal of the file system still holds is written, so that every guest starts from a clean disk. Its
        # exit status 1 says that it did so.
        checked = subprocess.run(["e2fsck", "-f", "-p", str(raw)], capture_output=True, check=False)
        if checked.returncode not in (0, 1):
            raise BuildFailed(f"the root disk is damaged: {checked.stdout.decode(errors='replace')[-500:]}")
        self._run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, self.result / "root.qcow2"])
        raw.unlink()

    def _manifests(self) -> None:
        def part(name: str) -> dict[str, str]:
            return {"source": f"file://{self.final / name}", "digest": _digest(self.result / name)}

        guest = {
            "type": "disk",
            **part("root.qcow2"),
            "format": "qcow2",
            "size": f"{recipe.ROOT_DISK_MIB}Mi",
            "kernel": part("vmlinux"),
            "initrd": part("initrd"),
            "cmdline": recipe.KERNEL_COMMAND_LINE,
        }
        hello = {"type": "oci-archive", **part("hello.tar"), "format": "raw"}
        (self.result / "image.yaml").write_text(image_manifest("debian-13", guest))
        (self.result / "hello-image.yaml").write_text(image_manifest("hello", hello))


def image_manifest(name: str, spec: dict[str, Any]) -> str:
    """An Image manifest as YAML. Scalars are written as JSON strings, which YAML reads the same, whatever they hold."""
    lines = ["apiVersion: casemate/v1", "kind: Image", "metadata:", f"  name: {name}", "spec:"]
    for field, value in spec.items():
        if isinstance(value, dict):
            lines.append(f"  {field}:")
            lines += [f"    {inner}: {json.dumps(text)}" for inner, text in value.items()]
        else:
            lines.append(f"  {field}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _tail(path: Path) -> str:
    text = path.read_bytes().decode(errors="replace") if path.exists() else "(nothing)"
    return "\n".join(text.splitlines()[-15:])


def _replace_link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _host_codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise BuildFailed("/etc/os-release names no VERSION_CODENAME: the guest image is built on Debian 12 or 13")
