"""Commands in containers and in the guest, with standard streams or a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import termios

from .children import BASE_ENV, Child
from .files import read_text, remove_folder, write_text
from .frames import CHUNK, OUT_LOW, STDIN_WINDOW
from .streams import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .frames import Message
    from .helper import Helper


class ExecStream(Stream):
    """A running command: in a container through crun, which gives us the terminal or the pipes, or in the guest itself."""

    def __init__(self, helper: Helper, number: int, credit: int) -> None:
        super().__init__(helper, number, credit)
        self.folder = f"{helper.paths.run}/exec/{helper.session_count}-{number}"
        self.child: Child | None = None
        self.master = -1
        self.in_container = False
        self._stdin = bytearray()
        self._stdin_ended = False
        self._open_outputs: dict[int, str] = {}  # descriptor -> "out" or "err", until end of file

    def start(self, request: Message, container_id: str | None) -> None:
        """Start the command. Raises OSError and ValueError."""
        loop = self.helper.loop
        argv, env = list(request["argv"]), {str(k): str(v) for k, v in dict(request.get("env", {})).items()}
        tty = bool(request.get("tty"))
        if not argv or not all(isinstance(word, str) for word in argv):
            raise ValueError("argv must be a list of texts")
        if container_id is not None:
            self.in_container = True
            os.makedirs(self.folder, mode=0o700)
            process = self.helper.pods.process_of(container_id)
            process.update(args=argv, terminal=tty)
            process["env"] = [*process.get("env", ()), *(f"{k}={v}" for k, v in env.items())]
            if tty:
                process["env"] = [e for e in process["env"] if not e.startswith("TERM=")] + [
                    f"TERM={env.get('TERM', 'xterm')}"
                ]
                process["consoleSize"] = {
                    "height": window_edge(request, "rows", 24),
                    "width": window_edge(request, "cols", 80),
                }
            write_text(f"{self.folder}/process.json", json.dumps(process))
            crun = [self.helper.paths.crun, "exec", "--process", f"{self.folder}/process.json"]
            crun += ["--pid-file", f"{self.folder}/pid"]
            if tty:
                self._window = (window_edge(request, "rows", 24), window_edge(request, "cols", 80))
                self._await_console()
                crun += ["--console-socket", f"{self.folder}/console"]
            self.child = Child(loop, [*crun, container_id], env=BASE_ENV, stdin=not tty)
        elif tty:
            self.master, slave = os.openpty()
            self.resize(window_edge(request, "rows", 24), window_edge(request, "cols", 80))
            try:
                path = os.ttyname(slave)
                self.child = Child(loop, argv, env=BASE_ENV | {"TERM": "xterm"} | env, terminal=path)
            finally:
                os.close(slave)
            self._take_master()
        else:
            self.child = Child(loop, argv, env=BASE_ENV | env)
        if self.child.fds:
            if not tty:
                self._open_outputs[self.child.fds[1]] = "out"
                if self.child.fds[0] >= 0:
                    loop.watch(self.child.fds[0], 0, lambda _: self._write())
            self._open_outputs[self.child.fds[2]] = "err"
            for fd in self._open_outputs:
                loop.watch(fd, select.EPOLLIN, lambda _: self._readable())
        self.child.ended.then(self._ended)

    def _await_console(self) -> None:
        """crun hands over the terminal's controlling end on this socket."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.bind(f"{self.folder}/console")
        listener.listen(1)

        async def receive() -> None:
            loop = self.helper.loop
            try:
                if not await loop.ready(listener.fileno(), select.EPOLLIN, 30.0) or self.closed:
                    return
                peer, _ = listener.accept()
                with peer:
                    await loop.ready(peer.fileno(), select.EPOLLIN, 30.0)
                    _, ancillary, _, _ = peer.recvmsg(4096, socket.CMSG_SPACE(4))
                for _, kind, data in ancillary:
                    if kind == socket.SCM_RIGHTS and len(data) >= 4:
                        (fd,) = struct.unpack("i", data[:4])
                        if self.closed:
                            os.close(fd)
                        else:
                            self.master = fd
                            self._take_master()
            finally:
                listener.close()

        self.helper.loop.start(receive())

    def _take_master(self) -> None:
        os.set_blocking(self.master, False)
        self._open_outputs[self.master] = "out"
        self.helper.loop.watch(self.master, select.EPOLLIN, lambda events: self._master_turn(events))
        if self._window is not None:
            self.resize(*self._window)
        self._write()

    _window: tuple[int, int] | None = None

    def _master_turn(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._write()
        if events & select.EPOLLHUP and self.credit <= 0:
            self._stdin.clear()  # nobody is left to read it; what is left to read waits for credit
            self.helper.loop.unwatch(self.master)
        elif events & ~select.EPOLLOUT:
            self._readable()

    def _readable(self) -> None:
        """Output waits: sent if there is credit, else left in its pipe, which holds up the command and nobody else."""
        while self.pull():
            pass
        if not self.closed:
            self._arm()

    def _arm(self) -> None:
        reading = select.EPOLLIN if self.credit > 0 and self.helper.port.queued < OUT_LOW else 0
        for fd in self._open_outputs:
            if fd == self.master:
                writing = select.EPOLLOUT if self._stdin else 0
                self.helper.loop.watch(fd, reading | writing, lambda events: self._master_turn(events))
            else:
                self.helper.loop.watch(fd, reading, lambda _: self._readable())

    def pull(self) -> bool:
        sent = False
        for fd, channel in list(self._open_outputs.items()):
            if self.credit <= 0 or self.helper.port.queued >= OUT_LOW:
                break
            try:
                data = os.read(fd, min(CHUNK, self.credit))
            except BlockingIOError:
                continue
            except OSError:  # a terminal whose last user has gone
                data = b""
            if data:
                self.credit -= len(data)
                self.helper.port.send({"t": "data", "s": self.number, "ch": channel}, data)
                sent = True
            else:
                # A terminal stays open until the command has ended: closed sooner, it would be hung up while it exits.
                del self._open_outputs[fd]
                self.helper.loop.unwatch(fd)
        if not self._open_outputs:
            self._ended()
        elif not self.closed:
            self._arm()
        return sent

    def _ended(self) -> None:
        """Both the command and what it wrote have come to their end."""
        if self.closed or self.child is None or not self.child.ended.done:
            return
        if self._open_outputs and not self._lingered:
            # A descendant may hold the pipes for ever: what is there now is sent, then it is over.
            self._lingered = True
            self.helper.loop.after(0.0, self._linger)
        elif not self._open_outputs:
            self.end(code=self.child.ended.value)

    _lingered = False

    def _linger(self) -> None:
        if self.closed or self.child is None:
            return
        if self.credit > 0 and not self.pull() and not self.closed:
            self.end(code=self.child.ended.value)
        elif not self.closed:
            self.helper.loop.after(0.05 if self.credit <= 0 else 0.0, self._linger)

    def grant(self, amount: int) -> None:
        super().grant(amount)
        if not self.closed:
            self._arm()

    def data(self, payload: bytes) -> None:
        if len(self._stdin) + len(payload) > STDIN_WINDOW:
            self.end(code=-1, error="the host sent more input than it was granted")
            return
        self._stdin += payload
        self._write()

    def eof(self) -> None:
        self._stdin_ended = True
        self._write()

    def _write(self) -> None:
        fd = self.master if self.master >= 0 else self.child.fds[0] if self.child and self.child.fds else -1
        if fd < 0:
            if self.child is not None and self.child.fds and self.master < 0 and not self._console_pending():
                self._consumed(len(self._stdin))  # nobody reads it any more
            return
        written = 0
        try:
            while self._stdin:
                count = os.write(fd, self._stdin[:CHUNK])
                del self._stdin[:count]
                written += count
        except BlockingIOError:
            pass
        except OSError:
            written += len(self._stdin)
            self._stdin.clear()
        if written:
            self.helper.tell({"t": "credit", "s": self.number, "n": written})
        if fd == self.master:
            if self._stdin_ended and not self._stdin:
                self._stdin_ended = False
                with contextlib.suppress(OSError):
                    os.write(fd, b"\x04")  # what a user types to end the input of a terminal
            self._arm()
        elif self._stdin_ended and not self._stdin and self.child is not None:
            self.child.close_fd(0)
        else:
            self.helper.loop.watch(fd, select.EPOLLOUT if self._stdin else 0, lambda _: self._write())

    def _console_pending(self) -> bool:
        return self.in_container and os.path.exists(f"{self.folder}/console") and self.master < 0

    def _consumed(self, amount: int) -> None:
        self._stdin.clear()
        if amount:
            self.helper.tell({"t": "credit", "s": self.number, "n": amount})

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size."""
        self._window = (rows, columns)
        if self.master >= 0:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number: int, tries: int = 40) -> None:
        """Send a signal to the command."""
        if self.in_container:
            pid = read_text(f"{self.folder}/pid").strip()
            if pid.isdigit():
                with contextlib.suppress(OSError):
                    os.kill(int(pid), number)
            elif tries and self.child is not None and not self.child.ended.done:
                # The command runs an instant before crun has written its number down.
                self.helper.loop.after(0.05, lambda: self.signal(number, tries - 1))
        elif self.child is not None:
            self.child.kill(number)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        loop = self.helper.loop
        for fd in self._open_outputs:
            loop.unwatch(fd)
        if self.master >= 0:
            loop.unwatch(self.master)
            os.close(self.master)
            self.master = -1
        child = self.child
        if child is not None:
            child.close()
            if not child.ended.done:
                self.signal(signal.SIGHUP)
                loop.after(2.0, lambda: None if child.ended.done else self._kill(child))
        if self.in_container and (child is None or child.ended.done):
            remove_folder(self.folder)

    def _kill(self, child: Child) -> None:
        self.signal(signal.SIGKILL)
        child.kill(signal.SIGKILL)
        remove_folder(self.folder)


def window_edge(request: Message, name: str, default: int) -> int:
    """Rows or columns of a terminal's window, as a request names them."""
    value = request.get(name, default)
    return value if isinstance(value, int) and 0 < value < 10000 else default
