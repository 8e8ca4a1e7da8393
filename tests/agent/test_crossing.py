"""Streams between two hosts: only the two ends of one migration meet, by certificates made for it."""

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from casemate_agent.drivers.passageports import Bytes, Ends, PassageFailed, ports_of
from casemate_agent.uplink.crossing import TlsCrossings
from casemate_core.spec.operation import Move, Order, Verb
from casemate_manager import pki
from casemate_manager.movecerts import MOVE_S, sign_end

ONE, OTHER = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"


def order(address: str = "", uid: str = ONE, source: str = "h1", target: str = "h2") -> Order:
    return Order(uid, Verb.MIGRATE, 0.0, move=Move(source, target, address=address))


@dataclass
class Signer:
    """A manager that signs whatever it is told to: who a host claims to be, and when."""

    end: str
    host: str
    migration: str = ONE
    authority: pki.Authority = field(default_factory=lambda: pki.make_authority("casemate migrations", time.time()))
    late_s: float = 0.0
    claims: str = ""

    async def __call__(self, migration: str, request: bytes) -> Ends:
        key, now_s = pki.read_request(request), time.time() - self.late_s
        certificate = sign_end(self.authority, key, self.migration, self.end, self.host, now_s)
        return Ends(pki.pem(certificate), pki.pem(self.authority.certificate), self.claims or self.end)


async def echo(name: str, stream: Bytes) -> None:
    await stream.write(name.encode() + b":")
    while piece := await stream.read(4096):
        await stream.write(piece)


async def said(source: Signer, target: Signer, dialled: Order | None = None) -> bytes:
    """What comes back of a stream between these two ends."""
    listening = await TlsCrossings("127.0.0.1", target).listen(order(), echo)
    try:
        asked = dialled or order()
        assert asked.move is not None
        asked = order(listening.address, asked.uid, asked.move.source, asked.move.target)
        stream = await TlsCrossings("", source).dial(asked, "mem")
        try:
            await stream.write(b"hello")
            found = b""
            async with asyncio.timeout(30):
                while len(found) < 9 and (piece := await stream.read(100)):
                    found += piece
            return found
        finally:
            await stream.close()
    finally:
        await listening.close()


def ends(**changes: object) -> tuple[Signer, Signer]:
    """Both ends, signed by one authority."""
    source = Signer("source", "h1", **changes)  # type: ignore[arg-type]
    return source, Signer("target", "h2", authority=source.authority)


async def test_the_two_ends_of_one_migration_meet() -> None:
    assert await said(*ends()) == b"mem:hello"


async def refused(source: Signer, target: Signer, dialled: Order | None = None) -> None:
    """No byte comes back."""
    try:
        assert await said(source, target, dialled) == b""
    except PassageFailed:
        return


@pytest.mark.parametrize(
    "source",
    [
        {"migration": OTHER},
        {"late_s": MOVE_S + 400.0},
        {"late_s": -3600.0},
    ],
    ids=["of another migration", "expired", "not yet good"],
)
async def test_a_source_with_another_certificate_is_refused(source: dict[str, object]) -> None:
    await refused(*ends(**source))


async def test_another_host_is_refused_as_source_and_as_target() -> None:
    source, target = ends()
    await refused(Signer("source", "h3", authority=source.authority), target)
    await refused(source, Signer("target", "h3", authority=source.authority))


async def test_a_target_cannot_dial_and_a_source_cannot_be_dialled() -> None:
    source, target = ends()
    await refused(Signer("target", "h2", authority=source.authority, claims="source"), target)
    await refused(source, Signer("source", "h1", authority=source.authority, claims="target"))


async def test_another_authority_is_refused() -> None:
    source, _ = ends()
    await refused(source, Signer("target", "h2"))
    await refused(Signer("source", "h1"), Signer("target", "h2"))


async def test_a_hosts_own_certificate_is_refused() -> None:
    fleet = pki.make_authority("casemate", time.time())
    _, target = ends()

    async def host(migration: str, request: bytes) -> Ends:
        key = pki.read_request(request)
        made = pki.sign_client(fleet, key, "host", "h1", time.time(), 3600.0)
        return Ends(pki.pem(made), pki.pem(target.authority.certificate), "source")

    listening = await TlsCrossings("127.0.0.1", target).listen(order(), echo)
    try:
        with pytest.raises(PassageFailed):
            stream = await TlsCrossings("", host).dial(order(listening.address), "mem")
            try:
                if await stream.read(100) == b"":
                    raise PassageFailed("nothing came")
            finally:
                await stream.close()
    finally:
        await listening.close()


async def test_a_host_that_is_told_to_be_the_other_end_says_so() -> None:
    with pytest.raises(PassageFailed, match="is the source of the migration, not its target"):
        await TlsCrossings("127.0.0.1", Signer("source", "h1")).listen(order(), echo)


async def test_nobody_there() -> None:
    with pytest.raises(PassageFailed, match=r"h2 at 127\.0\.0\.1:1"):
        await TlsCrossings("", ends()[0]).dial(order("127.0.0.1:1"), "mem")


def test_addresses_and_their_ports() -> None:
    assert ports_of("10.0.0.7") == ("10.0.0.7", range(1))
    assert ports_of("10.0.0.7:4000-4003") == ("10.0.0.7", range(4000, 4004))
    assert ports_of("[fd00::1]:4000-4000") == ("fd00::1", range(4000, 4001))
    assert ports_of("fd00::1") == ("fd00::1", range(1))
    for wrong in ("10.0.0.7:x", "10.0.0.7:9-3", "10.0.0.7:1-70000"):
        with pytest.raises(PassageFailed, match="passage"):
            ports_of(wrong)
