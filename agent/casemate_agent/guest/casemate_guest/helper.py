"""The helper: what the host's messages do."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import deque

from .children import run
from .commands import ExecStream, window_edge
from .dial import DialStream, socket_in
from .files import log, read_text, write_text
from .frames import MAX_STREAMS, MAX_TEXT, OUT_LOW, PROTOCOL, VERSION
from .kernel import Inotify
from .logs import LogStream, tail_position
from .loop import Loop, Signal
from .network import hosts_file, instance_env
from .pods import Pods
from .port import PORT_NAME, Port
from .system import System
from .volumes import Volumes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .containers import Container
    from .files import Paths
    from .frames import Message
    from .streams import Stream

POWER_TRIES = 60  # a guest that is emulated on a busy host may take half a minute to its systemd
POWER_AGAIN_S = 1.0


class Helper:
    """What the host's messages do."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.loop = Loop()
        self.boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
        self.session = ""
        self.session_count = 0
        self.streams: dict[int, Stream] = {}
        self.power_action = ""
        self.inotify = Inotify(self.loop)
        self.port = Port(self.loop, self.on_frame, self.on_lost, self.fill)
        self.volumes = Volumes(self)
        self.pods = Pods(self)
        self.system = System(self)
        self.cloud_init_changed = Signal(self.loop)
        self._pods_told = True
        self._notes: deque[Message] = deque(maxlen=256)  # for the next session; the oldest go first
        self._jobs: deque[tuple[Message, bytes]] = deque()
        self._job_wake = Signal(self.loop)
        self._filling = False
        self._notes_wanted = False  # by a host that has taken our hello: to another they would be lost

    def start(self, socket_path: str) -> None:
        """Begin: the loop does the rest."""
        os.makedirs(self.paths.run, mode=0o700, exist_ok=True)
        self.system.start()
        self.volumes.start()
        self.pods.restore()
        self.loop.start(self._work())
        if socket_path:
            self.port.listen(socket_path)
        elif not self.port.open_device(self.paths.sys, self.paths.dev):
            log(f"no port {PORT_NAME} yet")

    def release_boot(self) -> None:
        """Let the rest of the system boot: on an emulated processor it waits for the first pods (the image's init)."""
        write_text(f"{self.paths.run}/go", "")

    def port_appeared(self) -> None:
        """The kernel has a new virtio port: perhaps it is ours."""
        if self.port.open_device(self.paths.sys, self.paths.dev):
            log(f"found the port {PORT_NAME}")

    # To the host.

    def tell(self, message: Message) -> None:
        """Send a control message, if there is a host."""
        if self.session:
            self.port.send(message)

    def note(self, pod: str, container: str, reason: str, message: str, severity: str = "Normal") -> None:
        """Something that the host may want to keep as an event. Kept for the next session when there is none."""
        text = {"t": "note", "pod": pod, "container": container, "reason": reason, "message": message[:MAX_TEXT]}
        self._notes.append({**text, "severity": severity, "time": time.time()})
        self._send_notes()

    def _send_notes(self) -> None:
        while self._notes_wanted and self._notes and self.port.queued < OUT_LOW:
            self.port.send(self._notes.popleft())

    def pods_changed(self) -> None:
        """The host is told of the pods, once for all the changes of a moment."""
        if self._pods_told:
            self._pods_told = False
            self.loop.after(0.02, self._tell_pods)

    def _tell_pods(self) -> None:
        if self.port.queued >= OUT_LOW:
            return  # told by `fill`, once there is room
        self._pods_told = True
        if self.session:
            reports = [pod.report() for pod in self.pods.pods.values()]
            self.port.send({"t": "pods", "revision": self.pods.revision}, json.dumps(reports).encode())

    def fill(self) -> None:
        """There is room on the port: what is urgent first, then one chunk of each stream in turn."""
        if self._filling or not self.session:
            return
        self._filling = True
        try:
            if not self._pods_told and self.port.queued < OUT_LOW:
                self._tell_pods()
            self._send_notes()
            sent = True
            while sent and self.port.queued < OUT_LOW:
                sent = False
                for stream in list(self.streams.values()):
                    if not stream.closed and self.port.queued < OUT_LOW:
                        sent = stream.pull() or sent
        finally:
            self._filling = False

    def log_complete(self, container: Container) -> None:
        """Nothing is added to this log any more: who follows it gets the rest, and its end."""
        for stream in self.streams.values():
            if isinstance(stream, LogStream) and stream.container is container:
                stream.follow = False
        self.loop.after(0.0, self.fill)

    # From the host.

    def on_lost(self) -> None:
        """The host has left: its streams end, and everything that would be told waits for the next."""
        self.session = ""
        self._notes_wanted = False
        for stream in list(self.streams.values()):
            stream.close()

    def on_frame(self, header: Message, payload: bytes) -> None:
        """One message. Nothing that it holds may end the helper."""
        try:
            handler = self.HANDLERS.get(header["t"])
            if header["t"] == "hello":
                self._hello(header)
            elif not self.session:
                return  # of a session that has ended
            elif handler is None:
                self.tell(
                    {"t": "done", "id": header.get("id", 0), "ok": False, "error": f"unknown: {header['t']}"[:80]}
                )
            else:
                handler(self, header, payload)
        except (KeyError, ValueError, TypeError, LookupError, OSError, AttributeError) as error:
            text = f"{header.get('t')}: {error}"[:MAX_TEXT]
            if isinstance(header.get("s"), int):
                stream = self.streams.get(header["s"])
                if stream is not None:
                    stream.close()
                self.tell({"t": "end", "s": header["s"], "error": text})
            else:
                self.tell({"t": "done", "id": header.get("id", 0), "ok": False, "error": text})

    def _hello(self, header: Message) -> None:
        self.on_lost()
        self._jobs.clear()
        self.session_count += 1
        self.session = str(header["session"])[:64]
        write_text(f"{self.paths.run}/greeted", "")
        self.tell(
            {
                "t": "hello",
                "v": PROTOCOL,
                "session": self.session,
                "boot_id": self.boot_id,
                "helper": VERSION,
                "revision": self.pods.revision,
                "cloud_init": self.system.cloud,
                "addresses": self.system.addresses,
                "network_error": self.system.network_error,
            }
        )
        self._pods_told = True
        self._tell_pods()

    def _want_notes(self, _: Message, __: bytes) -> None:
        self._notes_wanted = True
        self._send_notes()

    def _ping(self, header: Message, _: bytes) -> None:
        self.tell({"t": "pong", "id": header["id"]})

    def _queue(self, header: Message, payload: bytes) -> None:
        if len(self._jobs) >= 64:
            raise ValueError("too much is queued already")
        self._jobs.append((header, payload))
        self._job_wake.set()

    async def _work(self) -> None:
        """Loads and sets of pods, one after the other, so that images are there before the pods that need them."""
        while True:
            while not self._jobs:
                await self._job_wake.wait(None)
            header, payload = self._jobs.popleft()
            session = self.session
            error = ""
            try:
                if header["t"] == "load":
                    error = await self._load(header)
                else:
                    if header.get("after_cloud_init"):
                        while self.system.cloud["status"] == "running":
                            await self.cloud_init_changed.wait(None)
                    self._hosts(header.get("hosts") or {})
                    self.pods.apply(json.loads(payload), str(header["revision"]))
                    self.pods.settle()
            except (KeyError, ValueError, TypeError, OSError) as problem:
                error = f"{header['t']}: {problem!r}"
            if self.session == session:
                done = {"t": "done", "id": header.get("id", 0), "ok": not error}
                self.tell(done | ({"error": error[:MAX_TEXT]} if error else {}))

    async def _load(self, header: Message) -> str:
        for serial in map(str, header["serials"]):
            device = self.disk(serial)
            if not device:
                return f"no disk with the serial number {serial}"
            ended = await self.pods.load(device)
            if ended.code != 0:
                return f"podman load of {serial}: {ended.reason()}"
        return ""

    def disk(self, serial: str) -> str:
        """Device of the disk with this serial number; empty where there is none."""
        folder = f"{self.paths.sys}/block"
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(folder)):
                if read_text(f"{folder}/{name}/serial").strip() == serial:
                    return f"{self.paths.dev}/{name}"
        return ""

    def meta(self) -> Message:
        """The seed's meta-data."""
        try:
            meta = json.loads(read_text(f"{self.paths.seed}/meta-data") or "{}")
        except ValueError:
            return {}
        return meta if isinstance(meta, dict) else {}

    def _hosts(self, hosts: Message) -> None:
        names = {str(name): str(address) for name, address in hosts.items()}
        if any(c.isspace() or c == "#" for pair in names.items() for text in pair for c in text):
            raise ValueError("a host's name or address holds a blank")
        old = read_text(self.paths.hosts)
        new = hosts_file(old, names)
        if new != old:
            write_text(self.paths.hosts, new)
        text = instance_env(self.meta(), names)
        if read_text(self.paths.instance) != text:
            write_text(self.paths.instance, text)

    def _new_stream(self, header: Message) -> int:
        number = header["s"]
        if not isinstance(number, int) or number in self.streams:
            raise ValueError("a stream needs a number of its own")
        if len(self.streams) >= MAX_STREAMS:
            raise ValueError(f"{MAX_STREAMS} streams are open already")
        return number

    def _logs(self, header: Message, _: bytes) -> None:
        number = self._new_stream(header)
        container = self.pods.find(str(header["pod"]), str(header.get("container", "")))
        if not container.log_path or not os.path.exists(container.log_path):
            raise LookupError("the container has not been started yet")
        start, tail = header.get("from", 0), header.get("tail", -1)
        if isinstance(tail, int) and tail >= 0:
            start = max(int(start), tail_position(container.log_path, tail))
        stream = LogStream(
            self, number, int(header["credit"]), container, max(0, int(start)), bool(header.get("follow"))
        )
        if container.over():
            stream.follow = False
        self.streams[number] = stream
        opened = {"t": "opened", "s": number, "container": container.name}
        self.tell(opened | {"container_id": container.id, "starts": container.starts})
        self.fill()

    def _exec(self, header: Message, _: bytes) -> None:
        number = self._new_stream(header)
        container_id = None
        if header.get("pod"):
            container = self.pods.find(str(header["pod"]), str(header.get("container", "")))
            if container.state != "running":
                raise LookupError(f"container {container.name} is {container.state}")
            container_id = container.id
        stream = ExecStream(self, number, int(header["credit"]))
        self.streams[number] = stream
        stream.start(header, container_id)
        if not stream.closed:
            self.tell({"t": "opened", "s": number})
        self.fill()

    def _pid(self, header: Message, any_container: bool) -> int:
        """The process that stands for the pod and container of a request; 0 for the guest itself."""
        if not header.get("pod"):
            return 0
        pod, name = str(header["pod"]), str(header.get("container", ""))
        if any_container and not name and pod in self.pods.pods:  # they share the pod's network
            running = [c for c in self.pods.pods[pod].containers.values() if c.state == "running"]
            if running:
                return self.pods.pid_of(running[0])
        return self.pods.pid_of(self.pods.find(pod, name))

    def _dial(self, header: Message, _: bytes) -> None:
        number, port = self._new_stream(header), header["port"]
        if not isinstance(port, int) or not 0 < port < 65536:
            raise ValueError(f"no port {port}"[:80])
        sock = socket_in(self._pid(header, any_container=True))
        try:
            self.streams[number] = DialStream(self, number, int(header["credit"]), sock, port)
        except OSError as error:
            sock.close()
            raise OSError(f"port {port}: {error.strerror}") from error

    def _copy(self, header: Message, _: bytes) -> None:
        """Files in or out: a process of its own, since it changes its root and waits for disks."""
        number, pid = self._new_stream(header), self._pid(header, any_container=False)
        argv = [
            sys.executable,
            "-I",
            "-S",
            "-E",
            os.path.abspath(sys.argv[0]),
            f"copy={'in' if header.get('into') else 'out'}",
        ]
        argv += [f"path={header['path']}", f"name={header.get('name', '')}", f"in=/proc/{pid}/root" if pid else "in=/"]
        stream = ExecStream(self, number, int(header["credit"]))
        self.streams[number] = stream
        stream.start({"argv": argv}, None)
        if not stream.closed:
            self.tell({"t": "opened", "s": number})
        self.fill()

    def _authorize(self, header: Message, _: bytes) -> None:
        """A key may log in as root; told are the keys by which the guest itself is known."""
        key = str(header["key"]).strip()
        if not key or "\n" in key or len(key) > 16384:
            raise ValueError("a key is one line")
        self.system.authorize([key])
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = sorted(
                n for n in os.listdir(self.paths.host_keys) if n.startswith("ssh_host_") and n.endswith(".pub")
            )
        found = [read_text(f"{self.paths.host_keys}/{name}", 4096).strip() for name in names]
        self.tell({"t": "done", "id": header["id"], "ok": True, "text": "\n".join(found)[:8192]})

    def _stream(self, header: Message, payload: bytes) -> None:
        stream = self.streams.get(header["s"])
        if stream is None:
            return  # it has just ended, and the host does not know yet
        kind = header["t"]
        if kind == "data":
            stream.data(payload)
        elif kind == "eof":
            stream.eof()
        elif kind == "credit":
            stream.grant(int(header["n"]))
        elif kind == "close":
            stream.close()
        elif isinstance(stream, ExecStream) and kind == "resize":
            stream.resize(window_edge(header, "rows", 24), window_edge(header, "cols", 80))
        elif isinstance(stream, ExecStream) and kind == "signal":
            number = int(header["sig"])
            if not 1 <= number <= 64:
                raise ValueError(f"no signal {number}")
            stream.signal(number)

    def _power(self, header: Message, _: bytes) -> None:
        under_way, self.power_action = self.power_action, {"shutdown": "poweroff", "reboot": "reboot"}[header["action"]]
        # Answered before it is done: then there may be nobody left to answer.
        self.tell({"t": "done", "id": header.get("id", 0), "ok": True})
        if not under_way:
            self.loop.start(self._power_down())

    async def _power_down(self) -> None:
        """What was asked for last. This helper is there before systemd is: until that listens it is asked again."""
        for _ in range(POWER_TRIES):
            ended = await run(self.loop, ["systemctl", self.power_action])
            if ended.code == 0:
                break
            await self.loop.sleep(POWER_AGAIN_S)
        else:
            self.note("", "", "PowerFailed", ended.reason(), "Warning")
        self.power_action = ""

    HANDLERS: Mapping[str, Callable[[Helper, Message, bytes], None]] = {
        "notes": _want_notes,
        "ping": _ping,
        "load": _queue,
        "apply": _queue,
        "logs": _logs,
        "exec": _exec,
        "dial": _dial,
        "copy": _copy,
        "authorize": _authorize,
        "power": _power,
        "data": _stream,
        "eof": _stream,
        "credit": _stream,
        "close": _stream,
        "resize": _stream,
        "signal": _stream,
    }
