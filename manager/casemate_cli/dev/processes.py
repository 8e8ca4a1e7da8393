"""Processes of a private fleet: started in sessions of their own, found again, and ended, by identity and never by name.

A process is known by its pid, the time of its start (field 22 of /proc/PID/stat, in ticks since boot) and the machine's boot
id, because pids come again. Linux only.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from casemate_cli.dev.state import Folder

MARK = "CASEMATE_DEV_DIR"


@dataclass(frozen=True, slots=True)
class Process:
    """One process that was started, as its pid file records it."""

    name: str
    pid: int
    start_ticks: int
    boot_id: str


def boot_id() -> str:
    """The machine's boot id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process started, in ticks since boot; None where there is none (or only its remains)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    # After the name: state is the 3rd field of the file, the time of start the 22nd (proc_pid_stat(5)).
    return None if fields[0] in "ZX" else int(fields[19])


def alive(process: Process) -> bool:
    """Whether that very process runs still."""
    return process.boot_id == boot_id() and start_ticks(process.pid) == process.start_ticks


def recorded(folder: Folder, name: str) -> Process | None:
    """The process of that name, as recorded; None where there is no readable record."""
    try:
        return Process(**json.loads((folder.pids / f"{name}.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def running(folder: Folder, name: str) -> Process | None:
    """The process of that name, if it runs."""
    process = recorded(folder, name)
    return process if process is not None and alive(process) else None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, so that no process is started that is not recorded. The child gets the usual handling: a handler,
    unlike a mask, is not inherited."""
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def environment(folder: Folder) -> dict[str, str]:
    """Our environment with the folder's mark."""
    return {**os.environ, MARK: str(folder.root)}


def start(folder: Folder, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
    """Start a process that outlives us, its output in the folder's logs, and record it. Raises OSError."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    folder.pids.mkdir(parents=True, exist_ok=True)
    with _uninterrupted(), folder.log(name).open("ab") as log:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment(folder) | dict(env or {}),
            start_new_session=True,
        )
        process = Process(name, child.pid, start_ticks(child.pid) or 0, boot_id())
        fresh = folder.pids / f"{name}.new"
        fresh.write_text(json.dumps(asdict(process)))
        fresh.replace(folder.pids / f"{name}.json")
        # The child is not waited for: it outlives this program. Python must not warn of that.
        child.returncode = 0
    return process


def end(process: Process, grace_s: float) -> bool:
    """Ask the process to end, and kill it after `grace_s`; whether it went when it was asked. An ended one is no error."""
    if not alive(process):
        return True
    _send(process, signal.SIGTERM)
    if _gone_within(process, grace_s):
        return True
    _send(process, signal.SIGKILL)
    _gone_within(process, 10.0)
    return False


def _send(process: Process, number: signal.Signals) -> None:
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # Looked at again through the handle, which pins the process: the pid cannot have come again in between.
        if alive(process):
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _gone_within(process: Process, seconds: float) -> bool:
    give_up_s = time.monotonic() + seconds
    while alive(process):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.05)
    _reap(process.pid)
    return True


def _reap(pid: int) -> None:
    """Take the exit of a child of ours, so that it does not remain as a zombie."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def marked(folder: Folder) -> list[Process]:
    """Processes that carry this folder's mark in their environment, whoever recorded them; never ourselves."""
    wanted = f"{MARK}={folder.root}".encode()
    found: list[Process] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environ = (entry / "environ").read_bytes()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if wanted in environ.split(b"\0"):
            ticks = start_ticks(int(entry.name))
            if ticks is not None:
                found.append(Process("marked", int(entry.name), ticks, boot_id()))
    return found


def tail(path: Path, lines: int = 12) -> list[str]:
    """The last lines of a log; none where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
