"""Connections to ports of pods and of the guest."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket

from .frames import CHUNK, OUT_LOW, STDIN_WINDOW
from .kernel import LIBC
from .streams import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .helper import Helper

DIAL_S = 10.0  # for a port to take a connection
CLONE_NEWNET = 0x40000000


class DialStream(Stream):
    """A TCP connection to a port on the loopback of the guest, or of a pod's network."""

    def __init__(self, helper: Helper, number: int, credit: int, sock: socket.socket, port: int) -> None:
        super().__init__(helper, number, credit)
        self._sock, self._port = sock, port
        self._opened = self._read_ended = self._write_ended = False
        self._input = bytearray()
        self._input_ended = False
        self._timer = helper.loop.after(DIAL_S, self._late)
        problem = sock.connect_ex(("127.0.0.1", port))
        if problem not in (0, errno.EINPROGRESS):
            raise OSError(problem, os.strerror(problem))
        helper.loop.watch(sock.fileno(), select.EPOLLOUT, lambda _: self._connected())

    def _late(self) -> None:
        if not self._opened:
            self._fail(errno.ETIMEDOUT)

    def _fail(self, problem: int) -> None:
        self.end(code=1, error=f"port {self._port}: {os.strerror(problem)}")

    def _connected(self) -> None:
        problem = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._fail(problem)
            return
        self._opened = True
        self.helper.loop.cancel(self._timer)
        self.helper.tell({"t": "opened", "s": self.number})
        self._arm()

    def _arm(self) -> None:
        if self.closed or not self._opened:
            return
        events = 0
        if not self._read_ended and self.credit > 0 and self.helper.port.queued < OUT_LOW:
            events |= select.EPOLLIN
        if self._input:
            events |= select.EPOLLOUT
        self.helper.loop.watch(self._sock.fileno(), events, self._turn)

    def _turn(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._write()
        if not self.closed and events & ~select.EPOLLOUT:
            while self.pull():
                pass
        self._arm()

    def pull(self) -> bool:
        if not self._opened or self._read_ended or self.credit <= 0 or self.helper.port.queued >= OUT_LOW:
            return False
        try:
            data = self._sock.recv(min(CHUNK, self.credit))
        except BlockingIOError:
            self._arm()
            return False
        except OSError as error:
            self._fail(error.errno or errno.EIO)
            return False
        if not data:
            self._read_ended = True
            self.helper.tell({"t": "eof", "s": self.number})
            self._settle()
            return False
        self.credit -= len(data)
        self.helper.port.send({"t": "data", "s": self.number, "ch": "out"}, data)
        return True

    def grant(self, amount: int) -> None:
        super().grant(amount)
        self._arm()

    def data(self, payload: bytes) -> None:
        if len(self._input) + len(payload) > STDIN_WINDOW:
            self.end(code=1, error="the host sent more than it was granted")
            return
        self._input += payload
        self._write()
        self._arm()

    def eof(self) -> None:
        self._input_ended = True
        self._write()
        self._arm()

    def _write(self) -> None:
        written = 0
        try:
            while self._opened and self._input:
                count = self._sock.send(self._input[:CHUNK])
                del self._input[:count]
                written += count
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error.errno or errno.EIO)
            return
        if written:
            self.helper.tell({"t": "credit", "s": self.number, "n": written})
        if self._opened and self._input_ended and not self._input and not self._write_ended:
            self._write_ended = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        self._settle()

    def _settle(self) -> None:
        if self._read_ended and self._write_ended:
            self.end(code=0)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.helper.loop.cancel(self._timer)
            self.helper.loop.unwatch(self._sock.fileno())
            self._sock.close()


def socket_in(pid: int) -> socket.socket:
    """A TCP socket in the network of a process; in our own where ``pid`` is 0. Raises OSError.

    A socket stays in the network that its maker was in, and we have one thread, so nobody sees us elsewhere.
    """
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if pid:
            other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.path.samestat(os.fstat(own), os.fstat(other)):
                    pid = 0
                elif LIBC.setns(other, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(other)
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        finally:
            if pid and LIBC.setns(own, CLONE_NEWNET) != 0:
                os._exit(70)  # in a pod's network we must not stay; what started us starts us anew
    finally:
        os.close(own)
    sock.setblocking(False)
    return sock
