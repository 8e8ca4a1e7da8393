"""What goes on beside a simulated guest's pods: its serial console, its ports, its files, its keys.

What may live here: things in memory that answer as a small guest would. The console says who it is and repeats what is
typed; a port that a container of the pod names, and 22 for SSH, sends back what it gets; files are a tree of bytes.
"""

import asyncio
import io
import posixpath
import tarfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from casemate_agent.drivers.console import Reader
from casemate_agent.drivers.ports import GuestRefused
from casemate_agent.drivers.sideports import EOF, CopyRequest

SSH_PORT = 22
BANNER = b"SSH-2.0-casemate_simulated\r\n"
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHNpbXVsYXRlZHNpbXVsYXRlZHNpbXVsYXRlZA=="
#: Bytes of what a tree of files or an archive may take.
MAX_BYTES = 64 << 20


class SimulatedConsole:
    """A serial console: a prompt, and what is typed comes back."""

    def __init__(self, name: str) -> None:
        self._prompt = f"{name} login: ".encode()
        self.readers: set[Reader] = set()
        self._line = b""

    def open(self) -> "SimulatedConsoleSession":
        """One reader more."""
        reader = Reader()
        self.readers.add(reader)
        return SimulatedConsoleSession(self, reader)

    def print(self, data: bytes) -> None:
        """The guest prints."""
        for reader in self.readers:
            reader.put(data)

    def type(self, data: bytes) -> None:
        """Somebody types."""
        for byte in data:
            if byte in b"\r\n":
                said = b"\r\n" + (b"Login incorrect\r\n" if self._line else b"") + self._prompt
                self._line = b""
                self.print(said)
            else:
                self._line = (self._line + bytes([byte]))[-256:]
                self.print(bytes([byte]))

    def end(self) -> None:
        """The guest's QEMU is gone."""
        for reader in self.readers:
            reader.end()
        self.readers.clear()


class SimulatedConsoleSession:
    """One reader's hold."""

    def __init__(self, console: SimulatedConsole, reader: Reader) -> None:
        self._console, self._reader = console, reader

    def output(self) -> AsyncIterator[bytes | int]:
        return self._reader.output()

    async def input(self, data: bytes) -> None:
        self._console.type(data)

    async def close(self) -> None:
        self._console.readers.discard(self._reader)
        self._reader.end()


class SimulatedTunnel:
    """A connection to a port that sends back what it gets. Ends when the guest does."""

    def __init__(self, banner: bytes = b"") -> None:
        self._data: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._exit_code: int | None = None
        if banner:
            self._data.put_nowait(banner)

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        while (data := await self._data.get()) is not None:
            yield "stdout", data
        yield EOF, b""
        self._exit_code = 0

    async def stdin(self, data: bytes) -> None:
        self._data.put_nowait(data)

    async def close_stdin(self) -> None:
        self._data.put_nowait(None)

    async def resize(self, rows: int, columns: int) -> None:
        """Not for a connection."""

    async def signal(self, number: int) -> None:
        """Not for a connection."""

    async def close(self) -> None:
        self._data.put_nowait(None)


@dataclass(slots=True)
class Node:
    """A file, or a folder where ``content`` is None."""

    mode: int
    content: bytes | None = None


@dataclass(slots=True)
class SimulatedFiles:
    """A tree of files by absolute path."""

    nodes: dict[str, Node] = field(
        default_factory=lambda: {
            **{path: Node(0o755) for path in ("/", "/etc", "/root", "/srv", "/tmp", "/var", "/var/log")},
            "/etc/hostname": Node(0o644, b"simulated\n"),
            "/var/log/cloud-init.log": Node(0o640, b"simulated: nothing was done\n"),
        }
    )

    def archive(self, path: str) -> bytes:
        """What is at ``path`` as a tar whose root is ``x``. Raises FileNotFoundError."""
        path = posixpath.normpath(path)
        if path not in self.nodes:
            raise FileNotFoundError(path)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            below = path.rstrip("/") + "/"
            for here in sorted(n for n in self.nodes if n == path or n.startswith(below)):
                node = self.nodes[here]
                member = tarfile.TarInfo("x" + here[len(path.rstrip("/")) :].rstrip("/"))
                member.mode = node.mode
                member.type = tarfile.DIRTYPE if node.content is None else tarfile.REGTYPE
                member.size = len(node.content or b"")
                tar.addfile(member, io.BytesIO(node.content or b""))
        return out.getvalue()

    def extract(self, archive: bytes, path: str, name: str) -> None:
        """Make ``path``, or ``name`` within it. Raises OSError, tarfile.TarError."""
        wanted, path = path, posixpath.normpath(path)
        node = self.nodes.get(path)
        if node is not None and node.content is None:
            path = posixpath.join(path, name)
        elif wanted.endswith("/") or posixpath.dirname(path) not in self.nodes:
            raise FileNotFoundError(f"{wanted if wanted.endswith('/') else posixpath.dirname(path)}: is no folder")
        made: dict[str, Node] = {}
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r") as tar:
            for member in tar:
                parts = member.name.split("/")
                if parts[0] != "x" or any(p in ("", ".", "..") for p in parts[1:]):
                    raise PermissionError(f"{member.name}: is refused: neither a file nor a folder of the copy")
                if not (member.isreg() or member.isdir()):
                    raise PermissionError(f"{member.name}: is refused: neither a file nor a folder of the copy")
                file = tar.extractfile(member)
                made["/".join([path, *parts[1:]])] = Node(member.mode & 0o7777, None if file is None else file.read())
        self.nodes |= made


class SimulatedCopy:
    """A copy that runs; see `sideports.GuestSides.copy`."""

    def __init__(self, request: CopyRequest, files: Callable[[], SimulatedFiles]) -> None:
        self._request, self._files = request, files
        self._input: list[bytes] = []
        self._size = 0
        self._whole = asyncio.Event()
        self._closed = False
        self._exit_code: int | None = None

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        request = self._request
        try:
            if request.into:
                await self._whole.wait()
                if self._closed:
                    raise GuestRefused("the copy was given up")
                self._files().extract(b"".join(self._input), request.path, request.name)
            else:
                archive = self._files().archive(request.path)
                for at in range(0, len(archive), 32768):
                    yield "stdout", archive[at : at + 32768]
            self._exit_code = 0
        except FileNotFoundError as error:
            text = str(error) if request.into else f"{request.path}: No such file or directory"
            yield "stderr", f"{text}\n".encode()
            self._exit_code = 4
        except (OSError, tarfile.TarError) as error:
            yield "stderr", f"{error}\n".encode()
            self._exit_code = 1

    async def stdin(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_BYTES:
            raise GuestRefused(f"a simulated guest takes at most {MAX_BYTES >> 20} MiB at once")
        self._input.append(data)

    async def close_stdin(self) -> None:
        self._whole.set()

    async def resize(self, rows: int, columns: int) -> None:
        """Not for a copy."""

    async def signal(self, number: int) -> None:
        """Not for a copy."""

    async def close(self) -> None:
        self._closed = self._closed or not self._whole.is_set()
        self._whole.set()
