"""The far end of the guest helper in tests: podman and crun, as far as the helper uses them, on ordinary processes.

Run as ``fake_podman.py ROOT podman|crun ARGUMENTS``. A container is a process of this machine with a monitor beside it
that does what conmon does: it writes the log in conmon's format, and the exit status into ``ROOT/run/libpod/exits``.
State lies in ``ROOT/fake``: ``containers/<id>/`` with ``facts.json``, ``config.json``, ``ctr.log`` and ``pid``, and
``calls``, one line for each call. Devices are resolved by the specifications in ``ROOT/etc/cdi`` as podman does, and a
container has a cgroup of plain files in ``ROOT/sys/fs/cgroup``.
"""

import contextlib
import hashlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import fake_net

Facts = dict[str, Any]
#: Looks of 5 ms at what another call is about to write: a minute and more. Nothing here outlives its test by spinning.
PATIENCE = 15_000


def until(path: Path) -> None:
    """Wait for a file."""
    for _ in range(PATIENCE):
        if path.exists():
            return
        time.sleep(0.005)
    raise RuntimeError(f"there never was {path}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def folders(root: Path) -> list[Path]:
    """Those of containers that are whole: others are being made or removed by another call."""
    base = root / "fake/containers"
    return sorted(f for f in base.iterdir() if f.suffix == "") if base.exists() else []


def facts_of(folder: Path) -> Facts:
    """Pod "" for a container that is removed meanwhile. One has ended once its monitor has said so, as with conmon."""
    for _ in range(PATIENCE):
        if not folder.exists():
            return {"Id": "", "Name": "", "Pod": ""}
        with contextlib.suppress(FileNotFoundError):
            facts: Facts = json.loads((folder / "facts.json").read_text())
            if (folder / "created").exists():
                return facts | {"State": {"Running": False, "ExitCode": 0, "Pid": 0}}
            code = (folder / "code").read_text() if (folder / "code").exists() else ""
            pid = 0 if code else int((folder / "pid").read_text())
            return facts | {"State": {"Running": not code, "ExitCode": int(code or 0), "Pid": pid}}
        time.sleep(0.005)  # it is being started
    raise RuntimeError(f"{folder} is half a container")


def write_whole(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def start(root: Path, folder: Path) -> None:
    """Run the container's command under a monitor that outlives us."""
    process = json.loads((folder / "config.json").read_text())["process"]
    if (folder / "pid").exists():
        until(folder / "code")  # the monitor of the run before is at its last line
    (folder / "pid").unlink(missing_ok=True)
    (folder / "code").unlink(missing_ok=True)
    (folder / "created").unlink(missing_ok=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                monitor(root, folder, process)
        os._exit(0)
    os.wait()
    until(folder / "pid")


def monitor(root: Path, folder: Path, process: Facts) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    pipes = [os.pipe(), os.pipe()]
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(pipes[0][1], 1)
        os.dup2(pipes[1][1], 2)
        os.closerange(3, 64)
        os.execvpe(process["args"][0], process["args"], dict(e.split("=", 1) for e in process["env"]))
    in_cgroup(root, folder.name, json.loads((folder / "facts.json").read_text()), child)
    record = root / "run/crun" / folder.name
    record.mkdir(parents=True, exist_ok=True)
    write_whole(record / "status", json.dumps({"pid": child}))
    write_whole(folder / "pid", str(child))
    for _, write in pipes:
        os.close(write)
    names = {pipes[0][0]: "stdout", pipes[1][0]: "stderr"}
    rest: dict[int, bytes] = dict.fromkeys(names, b"")
    with (folder / "ctr.log").open("ab", buffering=0) as log:
        while names:
            for fd in select.select(list(names), [], [])[0]:
                data = os.read(fd, 65536)
                *lines, rest[fd] = (rest[fd] + data).split(b"\n")
                stamp = datetime.now(UTC).isoformat(timespec="microseconds").encode()
                for line in lines:
                    log.write(b"%s %s F %s\n" % (stamp, names[fd].encode(), line))
                if not data:
                    if rest[fd]:
                        log.write(b"%s %s P %s\n" % (stamp, names[fd].encode(), rest[fd]))
                        log.write(b"%s %s F \n" % (stamp, names[fd].encode()))
                    del names[fd]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = code if code >= 0 else 128 - code
    exits = root / "run/libpod/exits"
    exits.mkdir(parents=True, exist_ok=True)
    temporary = exits / f".{folder.name}"
    temporary.write_text(str(code))
    temporary.rename(exits / folder.name)
    # Last: who reads that it has ended finds the exit file there.
    write_whole(folder / "code", str(code))


def in_cgroup(root: Path, number: str, facts: Facts, pid: int) -> None:
    """Where a process of a container is, with the files that crun and the kernel make there."""
    inside = f"libpod_parent/{facts['Pod']}/libpod-{number}"
    cgroup = root / "sys/fs/cgroup" / inside
    cgroup.mkdir(parents=True, exist_ok=True)
    for name, text in (("cpuset.cpus", facts.get("Cpuset", "")), ("cpuset.cpus.partition", "member")):
        (cgroup / name).write_text(text)
    (root / f"proc/{pid}").mkdir(parents=True, exist_ok=True)
    (root / f"proc/{pid}/cgroup").write_text(f"0::/{inside}\n")


def unresolvable(root: Path, manifest: Facts) -> list[str]:
    """Devices that no specification has; and what podman 5.4 would silently leave away, which must not reach it."""
    known = set()
    for file in (root / "etc/cdi").glob("*.json"):
        specification = json.loads(file.read_text())
        known |= {f"{specification['kind']}={device['name']}" for device in specification["devices"]}
    lost = []
    for container in [*manifest["spec"].get("initContainers", []), *manifest["spec"]["containers"]]:
        limits = container.get("resources", {}).get("limits", {})
        lost += [key for key in limits if "/" in key and key not in known]
        lost += [key for key in limits if key.startswith("hugepages-")]
    media = [(v.get("emptyDir") or {}).get("medium") or "" for v in manifest["spec"].get("volumes", [])]
    return lost + [medium for medium in media if medium.startswith("HugePages")]


def kube_play(root: Path, *, begin: bool) -> int:
    manifest = json.load(sys.stdin)
    name = manifest["metadata"]["name"]
    (root / f"fake/played-{name}.json").write_text(json.dumps(manifest))
    if lost := unresolvable(root, manifest):
        sys.stderr.write(f"Error: setting up CDI devices: unresolvable CDI devices {', '.join(lost)}\n")
        return 125
    if any(facts_of(folder)["Pod"] == name for folder in folders(root)):
        sys.stderr.write(f"Error: pod {name} exists\n")
        return 125
    for container in manifest["spec"]["containers"]:
        if "missing" in container["image"]:
            sys.stderr.write(f"Error: {container['image']}: image not known\n")
            return 125
        if "Probe" in json.dumps(container) or manifest["spec"]["restartPolicy"] != "Never":
            sys.stderr.write("Error: the helper must keep probes and restarts to itself\n")
            return 125
    pod_id = hashlib.sha256(name.encode()).hexdigest()
    say(f"Pod:\n{pod_id}\nContainers:")
    if not begin:
        # What holds the pod's network; of no interest where the pod is started at once.
        create(root, name, f"{pod_id[:12]}-infra", ["sleep", "1000"], [f"PATH={os.environ['PATH']}"])
    for container in manifest["spec"]["containers"]:
        env = [f"PATH={os.environ['PATH']}", *(f"{e['name']}={e['value']}" for e in container.get("env", ()))]
        args = [*container.get("command", ()), *container.get("args", ())]
        folder = create(root, name, f"{name}-{container['name']}", args, env)
        mounts = [manifest["spec"].get("volumes", []), container.get("volumeMounts", [])]
        (folder / "mounts.json").write_text(json.dumps(mounts))
        if begin:
            start(root, folder)
        say(folder.name)
    return 0


def create(root: Path, pod: str, name: str, args: list[str], env: list[str]) -> Path:
    """A container that does not run yet."""
    number = hashlib.sha256(f"{name}/{time.time_ns()}".encode()).hexdigest()
    whole = root / "fake/containers" / number
    folder = whole.with_suffix(".new")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"process": {"args": args, "env": env, "cwd": "/"}}))
    (folder / "ctr.log").touch()
    (folder / "created").touch()
    facts: Facts = {"Id": number, "Name": name, "Pod": pod}
    facts["HostConfig"] = {"LogConfig": {"Path": str(whole / "ctr.log")}}
    (folder / "facts.json").write_text(json.dumps(facts))
    folder.rename(whole)
    return whole


def start_all(root: Path, chosen: list[Path]) -> int:
    """Start those of them that do not run."""
    for folder in chosen:
        if not facts_of(folder)["State"]["Running"]:
            start(root, folder)
    return 0 if chosen else 125


def remove(root: Path, name: str, grace_s: float) -> int:
    for folder in folders(root):
        facts = facts_of(folder)
        if facts["Pod"] != name:
            continue
        if facts["State"]["Running"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(facts["State"]["Pid"], signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while facts_of(folder)["State"]["Running"] and time.monotonic() < deadline:
            time.sleep(0.01)
        if facts_of(folder)["State"]["Running"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(facts["State"]["Pid"], signal.SIGKILL)
        if facts["State"]["Pid"]:
            until(folder / "code")
        fake_net.gone(root, facts["State"]["Pid"])
        shutil.rmtree(folder.rename(folder.with_suffix(".old")))
    return 0


def podman(root: Path, words: list[str]) -> int:
    match words:
        case ["load", "--quiet", "--input", device]:
            text = Path(device).read_text()
            if "damaged" in text:
                sys.stderr.write("Error: payload does not match any of the supported image formats\n")
                return 125
            say(f"Loaded image: {text.strip()}")
            return 0
        case ["kube", "play", "--quiet", "-"]:
            return kube_play(root, begin=True)
        case ["kube", "play", "--quiet", "--start=false", "-"]:
            return kube_play(root, begin=False)
        case ["update", "--cpuset-cpus", cpus, name]:
            (folder,) = [f for f in folders(root) if facts_of(f)["Name"] == name]
            facts = facts_of(folder) | {"Cpuset": cpus}
            del facts["State"]
            write_whole(folder / "facts.json", json.dumps(facts))
            return 0
        case ["container", "inspect", *names]:
            found = [facts_of(f) for f in folders(root)]
            chosen = [f for f in found if f["Id"] in names or f["Name"] in names]
            say(json.dumps(chosen))
            return 0 if len(chosen) == len(names) else 125
        case ["start", name]:
            return start_all(root, [f for f in folders(root) if name in (f.name, facts_of(f)["Name"])])
        case ["pod", "start", name]:
            return start_all(root, [f for f in folders(root) if facts_of(f)["Pod"] == name])
        case ["pod", "rm", "--force", "--ignore", "--time", grace, name]:
            return remove(root, name, float(grace))
    sys.stderr.write(f"Error: fake podman does not know {words}\n")
    return 125


def crun(root: Path, words: list[str]) -> int:
    match words:
        case ["exec", "--process", process_path, "--pid-file", pid_path, "--console-socket", console, _]:
            process = json.loads(Path(process_path).read_text())
            child, master = pty.fork()
            if child == 0:
                os.execvpe(process["args"][0], process["args"], dict(e.split("=", 1) for e in process["env"]))
            Path(pid_path).write_text(str(child))
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(console)
                socket.send_fds(peer, [b"/dev/ptmx"], [master])
            os.close(master)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return code if code >= 0 else 128 - code
        case ["exec", "--process", process_path, "--pid-file", pid_path, _]:
            process = json.loads(Path(process_path).read_text())
            if shutil.which(process["args"][0]) is None:
                sys.stderr.write(f"executable file `{process['args'][0]}` not found in $PATH\n")
                return 127
            child = os.fork()
            if child == 0:
                os.execvpe(process["args"][0], process["args"], dict(e.split("=", 1) for e in process["env"]))
            Path(pid_path).write_text(str(child))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return code if code >= 0 else 128 - code
    sys.stderr.write(f"fake crun does not know {words}\n")
    return 1


def main() -> int:
    root, program, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    (root / "fake").mkdir(exist_ok=True)
    with (root / "fake/calls").open("a") as calls:
        calls.write(f"{program} {' '.join(words)}\n")
    code = {"podman": podman, "crun": crun}[program](root, words)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
