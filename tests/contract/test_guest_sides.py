"""What goes on beside a guest's pods: connections to ports, files in and out, keys. Simulated guest and real helper alike."""

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from casemate_agent.drivers.ports import ExecSession, GuestRefused
from casemate_agent.drivers.sideports import EOF, CopyRequest
from casemate_core.errors import Unavailable
from support.fleet import free_port
from support.guest_bench import WITHIN_S, GuestBench, guest_bench, pod

SLEEP = ("sleep", "1000")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4 me"


@pytest.fixture(params=["simulated", "real"])
async def guest(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GuestBench]:
    """A guest that runs no pods yet, attached."""
    async with guest_bench(request.param, tmp_path) as made:
        yield made


@pytest.fixture
async def echo(guest: GuestBench) -> AsyncIterator[int]:
    """A port of a pod `web` that sends back what it gets; the network of the real helper's guest is this machine's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    manifest = pod("web", *SLEEP)
    manifest["spec"]["containers"][0]["ports"] = [{"containerPort": port}]
    await guest.apply("a", manifest)
    await guest.ready("web")
    yield port
    server.close()
    await server.wait_closed()


async def whole(session: ExecSession, data: bytes | None = None) -> tuple[dict[str, bytes], int | None]:
    """A session to its end, given all of ``data`` meanwhile: its outputs by name, and its exit code."""
    out: dict[str, bytes] = {}

    async def give() -> None:
        if data is not None:
            for at in range(0, len(data), 50_000):
                await session.stdin(data[at : at + 50_000])
            await session.close_stdin()

    giving = asyncio.create_task(give())
    try:
        async with asyncio.timeout(WITHIN_S):
            async for name, piece in session.output():
                out[name] = out.get(name, b"") + piece
    finally:
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
        await session.close()
    return out, session.exit_code


# --- ports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "web"])
async def test_a_port_takes_and_gives_until_both_ends_are_done(guest: GuestBench, echo: int, where: str) -> None:
    data = bytes(range(256)) * 2000  # more than every window on the way
    out, code = await whole(await guest.guests.dial(guest.uid, where, "", echo, WITHIN_S), data)
    assert (out["stdout"] == data, out[EOF], code) == (True, b"", 0)


async def test_several_connections_at_once(guest: GuestBench, echo: int) -> None:
    async def one(number: int) -> None:
        data = bytes([number]) * 70_000
        out, code = await whole(await guest.guests.dial(guest.uid, "web", "", echo, WITHIN_S), data)
        assert (out["stdout"] == data, code) == (True, 0)

    await asyncio.gather(*map(one, range(8)))


async def test_a_port_that_nobody_listens_on_is_refused(guest: GuestBench, echo: int) -> None:
    port = free_port()
    with pytest.raises(GuestRefused, match=f"port {port}: Connection refused"):
        await guest.guests.dial(guest.uid, "", "", port, WITHIN_S)
    with pytest.raises(GuestRefused, match="no pod none"):
        await guest.guests.dial(guest.uid, "none", "", echo, WITHIN_S)


async def test_a_connection_that_is_given_up_leaves_nothing(guest: GuestBench, echo: int) -> None:
    session = await guest.guests.dial(guest.uid, "", "", echo, WITHIN_S)
    await session.stdin(b"half")
    await session.close()
    out, code = await whole(await guest.guests.dial(guest.uid, "", "", echo, WITHIN_S), b"next")
    assert (out["stdout"], code) == (b"next", 0)


async def test_a_detached_guest_has_no_ports_files_or_keys(guest: GuestBench, echo: int) -> None:
    await guest.guests.detach(guest.uid)
    with pytest.raises(Unavailable):
        await guest.guests.dial(guest.uid, "", "", echo, 1.0)
    with pytest.raises(Unavailable):
        await guest.guests.copy(guest.uid, CopyRequest("/etc/hostname", into=False), 1.0)
    with pytest.raises(Unavailable):
        await guest.guests.authorize(guest.uid, KEY, 1.0)


# --- files ------------------------------------------------------------------------------------------------------------


def archive(*members: tuple[str, bytes | None, int]) -> bytes:
    """A tar of files (with content) and folders, with modes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, mode in members:
            member = tarfile.TarInfo(name)
            member.mode, member.size = mode, len(content or b"")
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(content or b""))
    return out.getvalue()


def contents(data: bytes) -> dict[str, tuple[int, bytes | None]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name: (m.mode & 0o7777, None if (f := tar.extractfile(m)) is None else f.read()) for m in tar}


async def put(guest: GuestBench, data: bytes, path: str, name: str = "", **where: str) -> tuple[int | None, str]:
    request = CopyRequest(path, into=True, name=name, **where)
    out, code = await whole(await guest.guests.copy(guest.uid, request, WITHIN_S), data)
    return code, out.get("stderr", b"").decode()


async def get(guest: GuestBench, path: str, **where: str) -> tuple[int | None, bytes, str]:
    out, code = await whole(await guest.guests.copy(guest.uid, CopyRequest(path, into=False, **where), WITHIN_S))
    return code, out.get("stdout", b""), out.get("stderr", b"").decode()


@pytest.mark.parametrize("where", [{}, {"pod": "web"}])
async def test_files_go_in_and_come_out_with_their_modes(
    guest: GuestBench, tmp_path: Path, where: dict[str, str]
) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    base = f"{tmp_path}/t" if guest.path.startswith(str(tmp_path)) else "/tmp"
    Path(base).mkdir(exist_ok=True)
    big = bytes(range(256)) * 1200
    tree = {"x": (0o750, None), "x/run": (0o755, b"#!/bin/sh\n"), "x/sub": (0o700, None), "x/sub/big": (0o640, big)}
    packed = archive(*((name, content, mode) for name, (mode, content) in tree.items()))
    assert await put(guest, packed, f"{base}/one", **where) == (0, "")
    code, out, told = await get(guest, f"{base}/one", **where)
    assert (code, told, contents(out)) == (0, "", tree)
    # What is a folder already gets the copy inside.
    assert await put(guest, archive(("x", b"one\n", 0o600)), f"{base}/one", "note", **where) == (0, "")
    code, out, _ = await get(guest, f"{base}/one/note", **where)
    assert (code, contents(out)) == (0, {"x": (0o600, b"one\n")})


async def test_files_that_are_not_there(guest: GuestBench, tmp_path: Path) -> None:
    code, out, told = await get(guest, f"{tmp_path}/nothing")
    assert (code, out) == (4, b"")
    assert "nothing: No such file or directory" in told
    code, told = await put(guest, archive(("x", b"", 0o600)), f"{tmp_path}/no/such/folder")
    assert code == 4
    assert "no folder" in told


@pytest.mark.parametrize("name", ["y", "x/../../out", "/x", "x//a", "x/./a", "..", "x/.."])
async def test_a_hostile_archive_is_refused(guest: GuestBench, tmp_path: Path, name: str) -> None:
    base = str(tmp_path) if guest.path.startswith(str(tmp_path)) else "/tmp"
    code, told = await put(guest, archive((name, b"bad", 0o600)), f"{base}/target")
    assert code == 1
    assert "is refused" in told
    assert not (tmp_path / "out").exists() and not (tmp_path.parent / "out").exists()


async def test_what_is_no_archive_is_refused(guest: GuestBench, tmp_path: Path) -> None:
    code, told = await put(guest, b"not an archive at all" * 100, "/tmp/t")
    assert code == 1
    assert told


async def test_files_of_containers_that_are_not_there(guest: GuestBench) -> None:
    await guest.apply("a", pod("job", "true", policy="Never"))
    await guest.until(lambda: (p := guest.pod("job")) and p.phase == "Succeeded")
    for where, why in (({"pod": "job"}, "app is terminated"), ({"pod": "none"}, "no pod none")):
        with pytest.raises(GuestRefused, match=why):
            await guest.guests.copy(guest.uid, CopyRequest("/etc/hostname", into=False, **where), WITHIN_S)


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_is_let_in_once_and_host_keys_are_told(guest: GuestBench, tmp_path: Path) -> None:
    real = guest.path.startswith(str(tmp_path))
    if real:
        (tmp_path / "etc/ssh").mkdir(parents=True)
        (tmp_path / "etc/ssh/ssh_host_ed25519_key.pub").write_text("ssh-ed25519 " + "A" * 68 + " root@guest\n")
        (tmp_path / "etc/ssh/ssh_host_bad_key.pub").write_text("\x1b[2Jnot a key\n")
    told = [await guest.guests.authorize(guest.uid, KEY, WITHIN_S) for _ in range(2)]
    assert told[0] == told[1]
    (host_key,) = told[0]
    assert host_key.startswith("ssh-ed25519 ") and host_key.count(" ") == 1
    if real:
        path = tmp_path / "root/.ssh/authorized_keys"
        assert path.read_text() == f"{KEY}\n"
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(GuestRefused):
        await guest.guests.authorize(guest.uid, "two\nlines", WITHIN_S)
