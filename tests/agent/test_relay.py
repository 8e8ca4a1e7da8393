"""The two halves of a split agent: what passes between them, who may be at either end, and what root believes."""

import asyncio
import hashlib
import os
import pwd
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import psutil
import pytest
from aiohttp import ClientSession, web

from casemate_agent.config import BadConfig, load
from casemate_agent.drivers.fetch import SourceRules
from casemate_agent.drivers.http import SourceFailed
from casemate_agent.drivers.image import ImageStore
from casemate_agent.drivers.imageformat import ImageRefused
from casemate_agent.relay.pipe import MAX_PAYLOAD, Kind, Relay, WrongPeer
from casemate_agent.relay.server import RelayServer
from casemate_agent.uplink.transport import BrokenOff, GrpcTransport
from casemate_core.errors import Unavailable
from casemate_core.spec.instance import File, ImageRef
from casemate_manager.app import running
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire import exposition
from casemate_wire.stream import Hello, Welcome

ME = os.geteuid()


def relay_server(manager: str = "127.0.0.1:1", allowed: int = ME) -> RelayServer:
    return RelayServer("h7", GrpcTransport(manager), frozenset({allowed}))


async def test_who_is_not_the_relay_is_told_nothing(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()

    path = tmp_path / "s"
    server = await asyncio.start_unix_server(accept, str(path))
    async with server:
        with pytest.raises(WrongPeer, match=f"listens user {ME}, and the relay is user {ME + 1}; nothing was said"):
            await Relay(path, ME + 1).session()
        async with asyncio.timeout(60):
            while not heard:
                await asyncio.sleep(0.01)
    assert heard == [b""]


async def test_who_is_not_root_is_not_let_in(tmp_path: Path) -> None:
    async with relay_server(allowed=ME + 1).listening(tmp_path / "s"):
        with pytest.raises(BrokenOff):
            await Relay(tmp_path / "s", ME).host()
    assert not (tmp_path / "s").exists()


async def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with relay_server().listening(tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        assert await Relay(tmp_path / "s", ME).host() == "h7"


async def test_without_a_relay_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no relay at .*: No such file"):
        await Relay(tmp_path / "s", ME).session()


@asynccontextmanager
async def lying_relay(path: Path, said: bytes) -> AsyncIterator[Relay]:
    """A relay of the right user that answers with these bytes, whatever it is asked, and hangs up."""

    over = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(5)
        writer.write(said)
        writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        over.set()

    server = await asyncio.start_unix_server(accept, str(path))
    async with server:
        yield Relay(path, ME)
        async with asyncio.timeout(60):
            await over.wait()


def frame(kind: int, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("!IB", len(payload) if length is None else length, kind) + payload


OPENED = frame(Kind.OPENED, b"{}")


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"", "hangs up"),
        (frame(Kind.OPENED, b"[]"), "no JSON object"),
        (frame(Kind.OPENED, b"\xff"), "no JSON object"),
        (frame(Kind.FAILED, b"no \x1b[2J way"), "no .\\[2J way"),
        (frame(Kind.MESSAGE), "does not answer but MESSAGE"),
        (frame(Kind.OPENED, length=MAX_PAYLOAD + 1), "does not keep to frames"),
        (frame(99), "does not keep to frames: 0 bytes of kind 99"),
        (frame(Kind.OPENED, b"{", length=9), "within a frame"),
        (b"\0\0", "within a frame"),
        (OPENED, "the relay has hung up"),
        (OPENED + frame(Kind.MESSAGE, b"\xff\xff\xff"), "no message of the schema"),
        (OPENED + frame(Kind.MESSAGE, length=MAX_PAYLOAD + 1), "does not keep to frames"),
        (OPENED + frame(Kind.ORDER), "sends ORDER within a stream"),
        (OPENED + frame(Kind.FAILED, b"UNAVAILABLE: away"), "UNAVAILABLE: away"),
    ],
)
async def test_what_a_relay_makes_up_ends_the_session_and_nothing_else(tmp_path: Path, said: bytes, says: str) -> None:
    async with lying_relay(tmp_path / "s", said) as relay:
        with pytest.raises(Unavailable, match=says):
            stream = await relay.session()
            try:
                await stream.receive()
            finally:
                await stream.close()


async def test_what_root_makes_up_ends_its_connection_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with relay_server().listening(path):
        for said in (
            b"\0",
            frame(Kind.MESSAGE),
            frame(Kind.ORDER, b"{"),
            frame(Kind.ORDER, b'{"kind": "shell"}'),
            frame(77),
        ):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(said)
            writer.write_eof()
            async with asyncio.timeout(60):
                assert (await reader.read())[4:5] in (b"", bytes([Kind.FAILED]))
            writer.close()
            await writer.wait_closed()
        assert await Relay(path, ME).host() == "h7"


async def test_a_session_passes_through_and_ends_with_either_end(tmp_path: Path) -> None:
    seeds = iter(range(1000))
    store = SqliteStore(tmp_path / "fleet.db")
    async with running(store, "127.0.0.1:0", time.time, lambda: f"seed-{next(seeds)}", version="t") as manager:
        async with relay_server(f"127.0.0.1:{manager.port}").listening(tmp_path / "s"):
            relay = Relay(tmp_path / "s", ME)
            stream = await relay.session()
            await stream.send(Hello("h7", "boot", 0, 0, "digest", 1))
            async with asyncio.timeout(60):
                assert isinstance(await stream.receive(), Welcome)
            await stream.close()
            stream = await relay.session()
            await stream.send(Hello("h7", "boot", 0, 0, "digest", 2))
            async with asyncio.timeout(60):
                assert isinstance(await stream.receive(), Welcome)
        # The relay has ended: the stream is broken off, not silent.
        with pytest.raises(BrokenOff):
            async with asyncio.timeout(60):
                while True:
                    await stream.receive()
        await stream.close()


async def test_a_manager_that_is_away_is_told_in_words(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        async with relay_server(f"127.0.0.1:{taken.getsockname()[1]}").listening(tmp_path / "s"):
            stream = await Relay(tmp_path / "s", ME).session()
            with pytest.raises(BrokenOff, match="UNAVAILABLE"):
                async with asyncio.timeout(60):
                    await stream.receive()
            await stream.close()


# --- files ----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def web_server(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/image", handler)
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/image"
    finally:
        await runner.cleanup()


DATA = bytes(range(256)) * 20_000  # more than one piece


def image(source: str, data: bytes = DATA) -> ImageRef:
    file = File(source, f"sha256:{hashlib.sha256(data).hexdigest()}")
    return ImageRef("image", type="disk", format="raw", file=file)


async def test_an_image_comes_by_the_relay_and_is_checked_by_root(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=DATA)

    async with relay_server().listening(tmp_path / "s"), web_server(answer) as source:
        download = Relay(tmp_path / "s", ME).download
        store = ImageStore(tmp_path / "state", SourceRules(), download=download)
        try:
            await store.fetch(image(source), 60)
            stored = await store.observe(60)
            assert [Path(path).read_bytes() for path in stored.images.values()] == [DATA]
            with pytest.raises(ImageRefused, match="has the digest"):
                await store.fetch(image(source, DATA + b"!"), 60)
        finally:
            await store.aclose()


async def test_what_a_server_refuses_is_told_with_its_words(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async with relay_server().listening(tmp_path / "s"), web_server(answer) as source:
        store = ImageStore(tmp_path / "state", SourceRules(), download=Relay(tmp_path / "s", ME).download)
        try:
            with pytest.raises(SourceFailed, match="the server answers 404"):
                await store.fetch(image(source), 60)
            assert not (await store.observe(60)).strays
        finally:
            await store.aclose()


# --- metrics --------------------------------------------------------------------------------------------------------------


async def test_who_scrapes_the_relay_is_answered_by_root(tmp_path: Path) -> None:
    server = relay_server()

    async def rendered() -> bytes:
        return b"casemate_up 1\n"

    async with (
        server.listening(tmp_path / "s"),
        exposition.passed_on("127.0.0.1:0", server.scrape) as url,
        ClientSession() as client,
    ):
        async with client.get(url) as response:
            assert response.status == 503
        root = asyncio.create_task(Relay(tmp_path / "s", ME).be_scraped(rendered, Random(1)))
        try:
            async with asyncio.timeout(60):
                while True:
                    async with client.get(url) as response:
                        if response.status == 200:
                            assert await response.text() == "casemate_up 1\n"
                            break
                    await asyncio.sleep(0.01)
        finally:
            root.cancel()
            await asyncio.gather(root, return_exceptions=True)
        async with client.get(url) as response:
            assert response.status == 503


# --- as processes -----------------------------------------------------------------------------------------------------------


def until(what: str, met: Callable[[], object], processes: list[subprocess.Popen[bytes]], within_s: float = 90) -> None:
    give_up_s = time.monotonic() + within_s
    while not met():
        assert time.monotonic() < give_up_s, what
        assert all(process.poll() is None for process in processes), f"{what}: a process has ended"
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_the_half_that_is_root_opens_no_socket_of_the_network(tmp_path: Path) -> None:
    """A manager, a relay and an agent, each a process: the agent joins, outlives its relay, and has no network of its own."""
    me = pwd.getpwuid(ME).pw_name
    sock, state = tmp_path / "relay.sock", tmp_path / "state"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = [sys.executable, "-m"]
    plain = ["--manager", f"127.0.0.1:{port}", "--insecure-loopback"]
    log = tmp_path / "agent.log"
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            process = subprocess.Popen([*python, *arguments], stderr=out, stdout=subprocess.DEVNULL)
        started.append(process)
        return process

    def relay() -> subprocess.Popen[bytes]:
        where = ["--relay", str(sock), "--state-dir", str(tmp_path / "relay"), "--name", "h7"]
        return start("casemate_agent", "relay", *where, *plain)

    def sessions() -> int:
        return log.read_text().count("session open")

    try:
        manager = start(
            "casemate_manager",
            *("serve", "--state-dir", str(tmp_path / "m"), "--listen", f"127.0.0.1:{port}", "--insecure-loopback"),
        )
        first = relay()
        until("the relay listens", sock.exists, [manager, first])
        where = [
            "--relay",
            str(sock),
            "--relay-user",
            me,
            "--state-dir",
            str(state),
            "--run-dir",
            str(tmp_path / "run"),
        ]
        agent = start("casemate_agent", "run", *where, "--insecure-loopback", "--simulated", "1s 4k/c 2t 16G")
        until("the agent has a session", lambda: sessions() == 1, [manager, first, agent])
        assert (state / "host").read_text() == "h7\n"
        assert psutil.Process(agent.pid).net_connections(kind="inet") == []
        assert psutil.Process(first.pid).net_connections(kind="inet") != []
        loaded = {Path(m.path).name for m in psutil.Process(agent.pid).memory_maps()}
        assert not any(name.startswith(("cygrpc", "_http_parser")) for name in loaded)
        first.kill()
        first.wait()
        second = relay()
        until("it has another session by another relay", lambda: sessions() == 2, [manager, second, agent])
        for process in (agent, second, manager):
            process.send_signal(signal.SIGTERM)
        assert (agent.wait(60), second.wait(60), manager.wait(60)) == (0, 0, 0)
        assert not sock.exists()
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


def test_settings_of_a_relay_have_a_meaning(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="relay: the absolute path"):
        load("", {"name": "a", "relay": "here.sock"})
    assert load(f"-{tmp_path}/missing.toml", {"name": "a"}).name == "a"
    with pytest.raises(BadConfig, match=r"missing\.toml"):
        load(f"{tmp_path}/missing.toml", {"name": "a"})
    ended = subprocess.run(
        [sys.executable, "-m", "casemate_agent", "run", "--relay", "/nowhere", "--relay-user", "no-such-user"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "relay_user: there is no user no-such-user" in ended.stderr
