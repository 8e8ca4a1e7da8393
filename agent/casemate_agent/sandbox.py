"""A private libvirtd for development and tests: ``python -m casemate_agent.sandbox up|down|status --dir DIR``.

For: ``casemate dev up`` on a machine whose own libvirt must not be touched (or that has none running), and the tests that
need a real hypervisor. What may live here: starting, finding and ending that one daemon; nothing that speaks libvirt's
API beyond its socket.

Theory of operation. ``up`` enters a new mount and UTS namespace, binds folders of DIR over /etc/libvirt, /var/lib/libvirt,
/run/libvirt, /var/log/libvirt and /var/cache/libvirt, writes the daemons' configuration there, and becomes libvirtd, which
daemonises once its sockets listen. So libvirt finds its usual paths and the machine's own are never opened. Each sandbox
has its own host name and host UUID; several run side by side. QEMU keeps the network namespace of the machine, because
bridges and taps belong to the agent and are seen from outside.

Every process of a sandbox lives in its mount namespace and nobody else does, so that ``down`` finds what is its own
(QEMU included, also after libvirtd was killed) by the namespace and the time of start that ``up`` recorded, and ends
nothing else. The namespace's mounts vanish with its last process. Bridges and firewall tables that an agent made under
the sandbox's ``scope`` are removed, and DIR at the end.

Needs root and the packages libvirt-daemon, libvirt-daemon-driver-qemu and qemu-system-x86; systemd is neither needed nor
asked. libvirtd looks up the user ``libvirt-qemu`` at its start, whatever its configuration says; where the machine has
none (Debian's libvirt-daemon-system makes it, and pulls in systemd), the sandbox sees a passwd file of its own with it.
The first connection probes QEMU for seconds; the result is kept in ``--cache`` for all sandboxes of the machine.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from casemate_core.errors import CallerError, MachineError

DEFAULT_CACHE = Path("/var/cache/casemate/libvirt")
RECORD = "sandbox.json"
#: Longest path of a unix socket (sun_path is 108 bytes, the last one NUL).
MAX_SOCKET_PATH = 107

#: The number that Debian reserves for this user (base-passwd, "Users and groups").
LIBVIRT_QEMU_ID = 64055

QEMU_CONF = """\
# Of a sandbox: one user, no confinement of QEMU beyond what root's own processes have. A host keeps libvirt's defaults.
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
stdio_handler = "{stdio}"
"""
LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = 0
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_dir = "{sock}"
host_uuid = "{host_uuid}"
log_outputs = "3:file:{log}"
# A connection that died without a word is noticed within 15 s.
keepalive_interval = 5
keepalive_count = 2
"""
VIRTLOGD_CONF = """\
log_outputs = "3:file:{log}"
max_size = 2097152
max_backups = 1
"""
# $1 folder, $2 host name, $3 1 where virtlogd runs. Runs inside the new namespaces; the mounts are private to them.
ENTER = """\
set -e
hostname "$2"
for pair in etc:/etc/libvirt lib:/var/lib/libvirt run:/run/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
  mkdir -p "${pair#*:}"
  mount --bind "$1/${pair%%:*}" "${pair#*:}"
done
for file in passwd group; do
  [ ! -e "$1/$file" ] || mount --bind "$1/$file" "/etc/$file"
done
[ "$3" = 0 ] || virtlogd -d -f "$1/virtlogd.conf" -p "$1/virtlogd.pid"
exec libvirtd -d -f "$1/libvirtd.conf" -p "$1/libvirtd.pid"
"""


class SandboxUnusable(CallerError):
    """The machine lacks something that a sandbox needs; the text names the remedy."""

    reason = "SandboxUnusable"


class SandboxFailed(MachineError):
    """libvirtd did not start or did not end; the text holds the tail of its log."""

    reason = "SandboxFailed"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A running sandbox, as recorded in ``DIR/sandbox.json``."""

    directory: str
    hostname: str
    host_uuid: str
    #: libvirtd's process, and its time of start in clock ticks since boot (field 22 of /proc/PID/stat).
    pid: int
    start_ticks: int
    #: Inode of the mount namespace that all its processes share.
    namespace: int
    boot_id: str
    #: Time of start of the oldest process of the namespace, in the same ticks.
    born_ticks: int

    @property
    def uri(self) -> str:
        """For ``libvirt.open``."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def socket(self) -> str:
        """libvirtd's read-write socket."""
        return f"{self.directory}/sock/libvirt-sock"

    @property
    def scope(self) -> str:
        """Scope of the names of bridges, taps and tables (see ``casemate_agent.domain.names``)."""
        return scope_of(Path(self.directory))


def scope_of(directory: Path) -> str:
    """The scope of a sandbox's names follows from its folder alone, so that they are found again whatever was lost."""
    return hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:8]


def check_machine() -> None:
    """Raise SandboxUnusable, with a remedy, where a sandbox cannot run."""
    if os.geteuid() != 0:
        raise SandboxUnusable("a private libvirtd needs root; run this as root")
    for program, package in (
        ("libvirtd", "libvirt-daemon"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("unshare", "util-linux"),
        ("mount", "mount"),
    ):
        if shutil.which(program, path=_path()) is None:
            raise SandboxUnusable(f"{program} is not installed; apt-get install --no-install-recommends {package}")


def up(directory: Path, hostname: str = "", host_uuid: str = "", cache: Path = DEFAULT_CACHE) -> Sandbox:
    """Start the sandbox of ``directory``, or return the one that runs there; guests of a dead libvirtd live on.

    Raises SandboxUnusable, SandboxFailed.
    """
    directory = directory.absolute()
    check_machine()
    if len(f"{directory}/sock/libvirt-sock-ro") > MAX_SOCKET_PATH:
        raise SandboxUnusable(f"{directory}: too long for a unix socket; use a folder with a shorter path")
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        known = status(directory)
        if known is not None:
            return known
        recorded = _recorded(directory)
        if recorded is not None and (inside := _members(recorded)):
            return _restart(recorded, inside[0])
        if recorded is None:
            _kill_stray(directory)  # of an ``up`` that was itself killed
        return _start(directory, hostname or f"casemate-{_digest(directory)}", host_uuid, cache)


def status(directory: Path) -> Sandbox | None:
    """The running sandbox of ``directory``, if there is one."""
    recorded = _recorded(directory.absolute())
    if recorded is None or not _is_same_process(recorded.pid, recorded.start_ticks, recorded.boot_id):
        return None
    return recorded


def down(directory: Path, keep: bool = False) -> None:
    """End the sandbox: its domains, daemons, bridges, firewall tables, and files (unless ``keep``); nothing where none is."""
    directory = directory.absolute()
    if not directory.exists():
        return
    recorded = _recorded(directory)
    if recorded is None and any(directory.iterdir()) and not (directory / "libvirtd.conf").exists():
        raise SandboxUnusable(f"{directory} is no sandbox's folder; nothing was removed")
    with _locked(directory):
        _end_processes(recorded)
        if recorded is not None:
            # Here, not above: netlink costs half a second to import, which only the end of a sandbox should pay.
            from casemate_agent.drivers.network import remove_scope

            remove_scope(recorded.scope)
        if not keep:
            shutil.rmtree(directory)


def _start(directory: Path, hostname: str, host_uuid: str, cache: Path) -> Sandbox:
    for name in ("etc", "lib", "run", "log", "cache", "sock"):
        (directory / name).mkdir(mode=0o755, exist_ok=True)
    # QEMU's capabilities, as libvirt probed them, depend on the binaries and the kernel, and libvirt checks both.
    probed = cache / "qemu" / "capabilities"
    if probed.is_dir() and not (directory / "cache/qemu/capabilities").exists():
        shutil.copytree(probed, directory / "cache/qemu/capabilities")
    logd = shutil.which("virtlogd", path=_path()) is not None
    # virtlogd bounds what a guest can write to its console's log. Without it QEMU writes the file itself, unbounded.
    (directory / "etc/qemu.conf").write_text(QEMU_CONF.format(stdio="logd" if logd else "file"))
    (directory / "virtlogd.conf").write_text(VIRTLOGD_CONF.format(log=directory / "virtlogd.log"))
    (directory / "libvirtd.conf").write_text(
        LIBVIRTD_CONF.format(
            sock=directory / "sock", host_uuid=host_uuid or uuid.uuid4(), log=directory / "libvirtd.log"
        )
    )
    _provide_user(directory)
    for stale in ("libvirtd.pid", "virtlogd.pid"):
        (directory / stale).unlink(missing_ok=True)
    argv = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", ENTER, "sh"]
    _run_daemon([*argv, str(directory), hostname, str(int(logd))], directory)
    sandbox = _write_record(directory, hostname)
    _keep_probed(directory, cache)
    return sandbox


def _restart(recorded: Sandbox, inside: int) -> Sandbox:
    """libvirtd ended, its guests did not: start it again in their namespaces, where it takes them up."""
    directory = Path(recorded.directory)
    (directory / "libvirtd.pid").unlink(missing_ok=True)
    enter = ["nsenter", "--target", str(inside), "--mount", "--uts"]
    _run_daemon(
        [*enter, "libvirtd", "-d", "-f", f"{directory}/libvirtd.conf", "-p", f"{directory}/libvirtd.pid"], directory
    )
    return _write_record(directory, recorded.hostname, recorded.born_ticks)


def _run_daemon(argv: list[str], directory: Path) -> None:
    """Run what becomes libvirtd; returns when it listens."""
    try:
        done = subprocess.run(
            argv,
            env={"PATH": _path(), "LC_ALL": "C", "HOME": "/root"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        _kill_stray(directory)
        raise SandboxFailed(f"libvirtd did not listen within 60 s: {_tail(directory)}") from None
    if done.returncode != 0:
        _kill_stray(directory)
        raise SandboxFailed(f"libvirtd did not start: {done.stderr.strip()[-400:]} {_tail(directory)}")


def _write_record(directory: Path, hostname: str, born_ticks: int = 0) -> Sandbox:
    pid = int((directory / "libvirtd.pid").read_text())
    namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
    sandbox = Sandbox(
        directory=str(directory),
        hostname=hostname,
        host_uuid=next(
            line.split('"')[1]
            for line in (directory / "libvirtd.conf").read_text().splitlines()
            if line.startswith("host_uuid")
        ),
        pid=pid,
        start_ticks=_start_ticks(pid) or 0,
        namespace=namespace,
        boot_id=_boot_id(),
        born_ticks=born_ticks or min(_start_ticks(member) or 0 for member in _in_namespace(namespace)),
    )
    temporary = directory / f"{RECORD}.new"
    temporary.write_text(json.dumps(asdict(sandbox)))
    temporary.replace(directory / RECORD)
    return sandbox


def _provide_user(directory: Path) -> None:
    """Have the names libvirt-qemu resolve inside the sandbox; the machine's user database is not changed."""
    for database, name, entry in (
        (
            "passwd",
            "libvirt-qemu",
            f"libvirt-qemu:x:{LIBVIRT_QEMU_ID}:{LIBVIRT_QEMU_ID}::/nonexistent:/usr/sbin/nologin",
        ),
        ("group", "libvirt-qemu", f"libvirt-qemu:x:{LIBVIRT_QEMU_ID}:"),
    ):
        text = Path("/etc", database).read_text()
        if not any(line.startswith(f"{name}:") for line in text.splitlines()):
            (directory / database).write_text(f"{text.rstrip()}\n{entry}\n")


def _keep_probed(directory: Path, cache: Path) -> None:
    """Make libvirt probe QEMU now, and keep the result for the next sandbox (about 8 s saved)."""
    subprocess.run(
        ["virsh", "-c", f"qemu+unix:///system?socket={directory}/sock/libvirt-sock", "-q", "domcapabilities"],
        env={"PATH": _path(), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    made = directory / "cache/qemu/capabilities"
    if not made.is_dir():
        return
    kept = cache / "qemu" / "capabilities"
    kept.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        temporary = kept / f".{file.name}.{os.getpid()}"
        shutil.copy2(file, temporary)
        temporary.replace(kept / file.name)


def _end_processes(recorded: Sandbox | None) -> None:
    """End what runs in the sandbox's mount namespace: first libvirtd, that it starts nothing anew, then the rest."""
    if recorded is None or recorded.boot_id != _boot_id():
        return
    if _is_same_process(recorded.pid, recorded.start_ticks, recorded.boot_id):
        _signal_and_wait([recorded.pid], recorded, signal.SIGTERM, 10)
    # QEMU flushes its disks upon SIGTERM; virtlogd leaves too.
    members = _members(recorded)
    _signal_and_wait(members, recorded, signal.SIGTERM, 5)
    _signal_and_wait(_members(recorded), recorded, signal.SIGKILL, 5)
    if left := _members(recorded):
        raise SandboxFailed(f"processes {left} of {recorded.directory} do not end")


def _members(recorded: Sandbox) -> list[int]:
    """Processes in the sandbox's mount namespace, not older than it (an inode number may be used again)."""
    if recorded.boot_id != _boot_id():
        return []
    inside = _in_namespace(recorded.namespace)
    return [pid for pid in inside if (_start_ticks(pid) or -1) >= recorded.born_ticks]


def _in_namespace(inode: int) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and os.stat(f"/proc/{entry.name}/ns/mnt").st_ino == inode:
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or a zombie, which has no namespace any more
    return found


def _signal_and_wait(pids: list[int], recorded: Sandbox, number: int, seconds: float) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
            # A process that was stopped takes the signal once it goes on.
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and set(pids) & set(_members(recorded)):
        time.sleep(0.05)


def _kill_stray(directory: Path) -> None:
    """After a failed start: end the daemons that wrote their pid files into our folder."""
    for name in ("libvirtd.pid", "virtlogd.pid"):
        try:
            pid = int((directory / name).read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if str(directory).encode() in command:
            os.kill(pid, signal.SIGKILL)


def _recorded(directory: Path) -> Sandbox | None:
    try:
        return Sandbox(**json.loads((directory / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise SandboxFailed(f"{directory / RECORD} is damaged: {error}") from error


def _is_same_process(pid: int, start_ticks: int, boot_id: str) -> bool:
    return boot_id == _boot_id() and _start_ticks(pid) == start_ticks


def _start_ticks(pid: int) -> int | None:
    """Time of start of a process in clock ticks since boot; None where there is no such process, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may itself hold spaces and parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _digest(directory: Path) -> str:
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]


def _path() -> str:
    """PATH with the system folders, which a plain user's shell (and a CI runner's) often lacks."""
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _tail(directory: Path) -> str:
    try:
        return (directory / "libvirtd.log").read_text()[-800:].strip()
    except OSError:
        return "(it wrote no log)"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One ``up`` or ``down`` at a time. The lock lies beside the folder, which ``down`` removes."""
    path = directory.with_name(f".{directory.name}.lock")
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it before has removed it: what we locked may no longer be what the next one opens.
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def main(argv: list[str] | None = None) -> int:
    """Entry point. Data goes to stdout as one line of JSON, talk to stderr."""
    parser = argparse.ArgumentParser(prog="python -m casemate_agent.sandbox", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("up", "start it"), ("down", "end it and remove its files"), ("status", "does it run?")):
        command = verbs.add_parser(verb, help=text)
        command.add_argument("--dir", type=Path, required=True)
        if verb == "up":
            command.add_argument("--hostname", default="")
            command.add_argument("--host-uuid", default="")
            command.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
        if verb == "down":
            command.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args(argv)
    try:
        if options.verb == "up":
            sandbox: Sandbox | None = up(options.dir, options.hostname, options.host_uuid, options.cache)
        elif options.verb == "down":
            down(options.dir, keep=options.keep)
            # Bridges and firewall tables are the agent's, which may have been killed before it could take them away.
            from casemate_agent.drivers.network import remove_scope

            remove_scope(scope_of(options.dir))
            return 0
        else:
            sandbox = status(options.dir)
    except (CallerError, MachineError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if sandbox is None:
        sys.stderr.write("not running\n")
        return 1
    sys.stdout.write(json.dumps(asdict(sandbox) | {"uri": sandbox.uri, "scope": sandbox.scope}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
