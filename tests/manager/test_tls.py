"""A whole manager with TLS and real connections: joining, who is let in where, roll-over and revocation."""

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from casemate_agent.enrolment import enrol
from casemate_agent.enrolment.identity import Identity
from casemate_agent.relay.pipe import Relay
from casemate_agent.relay.server import RelayServer
from casemate_agent.uplink.transport import BrokenOff, GrpcTransport
from casemate_core.errors import InvalidSpec
from casemate_manager import pki
from casemate_manager.api.tls import ServerTls
from casemate_manager.app import running
from casemate_manager.authority import Authorities, AuthorityDamaged
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire.stream import Hello, Rejected, Welcome
from casemate_wire.token import BadToken, Token, parse
from casemate_wire.v1 import join_pb2 as pb
from casemate_wire.v1 import operators_pb2, operators_pb2_grpc
from casemate_wire.v1.enrolment_pb2_grpc import EnrolmentStub
from casemate_wire.v1.join_pb2_grpc import HostAccessStub
from support.tls_world import World, first, session, until_rejected


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    it = World(tmp_path)
    store = SqliteStore(tmp_path / "fleet.db")
    async with running(store, "127.0.0.1:0", it.now, it.seed, version="t", tls=it.tls) as it.manager:
        yield it
    del it.manager  # pytest holds on to what a fixture gave, and gRPC's thread goes with its last object


async def test_a_machine_joins_by_one_token_and_its_stream_is_taken(world: World) -> None:
    identity = await world.join()
    assert identity.host == "h7"
    async with session(identity) as stream:
        assert isinstance(await first(stream), Welcome)


async def test_through_the_relay_a_stream_is_the_same_and_root_holds_no_key(world: World, tmp_path: Path) -> None:
    identity = await world.join()

    async def current() -> Identity:
        return identity

    server = RelayServer(identity.host, GrpcTransport(identity.manager, current), frozenset({os.geteuid()}))
    async with server.listening(tmp_path / "relay.sock"):
        relay = Relay(tmp_path / "relay.sock", os.geteuid())
        assert await relay.host() == "h7"
        stream = await relay.session()
        await stream.send(Hello("h7", "boot", 0, 0, "digest", 1))
        assert isinstance(await first(stream), Welcome)
        await stream.close()
        # Who says another name than the certificate's is told so, as without a relay.
        stream = await relay.session()
        await stream.send(Hello("h8", "boot", 0, 0, "digest", 2))
        with contextlib.suppress(BrokenOff):
            assert isinstance(await first(stream), Rejected)
        await stream.close()


async def test_fifty_at_once_use_a_token_and_one_wins(world: World) -> None:
    token = await world.token()

    async def attempt(number: int) -> Identity | None:
        try:
            return await enrol.join(token, world.enrolment, world.folder / f"thief-{number}")
        except enrol.JoinRefused:
            return None

    async with asyncio.timeout(60):
        won = [i for i in await asyncio.gather(*map(attempt, range(50))) if i]
    assert len(won) == 1
    async with session(won[0]) as stream:
        assert isinstance(await first(stream), Welcome)


async def test_nothing_is_said_to_another_authority(world: World, tmp_path: Path) -> None:
    token = await world.token()
    other = Token(token.id, token.secret, token.host, "0" * 64)
    with pytest.raises(enrol.OtherAuthority, match="nothing was sent"):
        await enrol.join(other, world.enrolment, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not world.manager.writer.state.enrolments  # and the token is still good
    await enrol.join(token, world.enrolment, tmp_path / "x")


async def test_a_host_is_who_its_certificate_says(world: World) -> None:
    identity = await world.join("h7")
    await world.join("h8")
    async with session(identity, "h8") as stream:
        told = await first(stream)
        assert isinstance(told, Rejected)
        assert told.reason == "OtherHost"


async def test_streams_of_hosts_are_for_hosts(world: World) -> None:
    identity = await world.join()
    async with world.dialled() as channel:
        from casemate_wire.v1.hosts_pb2_grpc import HostLinkStub

        for method in (HostLinkStub(channel).Session, HostLinkStub(channel).Channel):
            call: Any = method()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async with asyncio.timeout(60):
                    await call.read()
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    # Without a certificate: the port of enrolment lets connect, and takes no stream.
    open_port = Identity(**{**_fields(identity), "manager": world.enrolment})
    with pytest.raises(BrokenOff, match="PERMISSION_DENIED"):
        async with session(open_port) as stream:
            await first(stream)


async def test_revoking_a_host_ends_its_open_stream(world: World) -> None:
    identity = await world.join()
    async with session(identity) as stream:
        assert isinstance(await first(stream), Welcome)
        async with world.dialled() as channel:
            await HostAccessStub(channel).RevokeHost(pb.RevokeHostRequest(host="h7"), timeout=60)
        told = await until_rejected(stream)
    assert (told.reason, told.retry_after_s) == ("Revoked", -1.0)
    async with session(identity, counter=2) as stream:
        assert (await first(stream)).reason == "NotEnrolled"
    with pytest.raises(enrol.JoinRefused, match="revoked"):
        await enrol.renew(identity)


async def test_a_host_renews_by_its_key_however_long_it_was_away(world: World) -> None:
    identity = await world.join()
    world.skew_s = -40 * 86400.0  # its certificate, made forty days ago, ended long since
    old = await enrol.renew(identity)
    world.skew_s = 0.0
    assert old.not_after_s < time.time()
    with pytest.raises(BrokenOff):
        async with session(old) as stream:
            await first(stream)
    fresh = await enrol.renew(old)
    async with session(fresh) as stream:
        assert isinstance(await first(stream), Welcome)
    stranger = Identity(**{**_fields(identity), "key": enrol.new_key().decode()})
    with pytest.raises(enrol.JoinRefused, match="with this key"):
        await enrol.renew(stranger)


async def test_a_roll_over_drops_no_host(world: World) -> None:
    before = await world.join("h1")
    away = await world.join("h2")
    async with session(before) as stream:
        assert isinstance(await first(stream), Welcome)
        old_roots = world.authorities.roots
        async with world.dialled() as channel:
            stub = HostAccessStub(channel)
            [one] = (await stub.ListAuthorities(pb.ListAuthoritiesRequest(), timeout=60)).authorities
            two = await stub.RollAuthority(pb.RollAuthorityRequest(pin=one.pin), timeout=60)
            again = await stub.RollAuthority(pb.RollAuthorityRequest(pin=one.pin), timeout=60)
            assert (two.state, again.pin) == ("Signing", two.pin)
            with pytest.raises(grpc.aio.AioRpcError, match="still good"):
                await stub.RetireAuthority(pb.RetireAuthorityRequest(pin=one.pin), timeout=60)
        # The open stream goes on; who has only the old root dials with its old certificate.
        async with world.dialled(roots=old_roots) as channel:
            await operators_pb2_grpc.FleetStub(channel).Version(operators_pb2.VersionRequest(), timeout=60)
        async with session(away) as other:
            assert isinstance(await first(other), Welcome)
        renewed = await enrol.renew(before)
        assert renewed.roots.encode() == world.authorities.roots != old_roots
    async with session(renewed, counter=2) as stream:
        assert isinstance(await first(stream), Welcome)
    async with world.dialled() as channel:
        stub = HostAccessStub(channel)
        states = (await stub.ListAuthorities(pb.ListAuthoritiesRequest(), timeout=60)).authorities
        assert [(a.state, a.hosts) for a in states] == [("Trusted", 1), ("Signing", 1)]
        await stub.RetireAuthority(pb.RetireAuthorityRequest(pin=one.pin, force=True), timeout=60)
    # The old certificate is accepted no more; its holder, who knows only the old root, finds the manager and renews.
    with pytest.raises(BrokenOff):
        async with session(away, counter=2) as stream:
            await first(stream)
    back = await enrol.renew(away)
    async with session(back, counter=3) as stream:
        assert isinstance(await first(stream), Welcome)
    store = SqliteStore(world.folder / "fleet.db")
    acts = {(a.actor, a.act) for a in store.audit(0, 1000)}
    store.close()
    assert acts >= {
        ("admin", "roll authority"),
        ("admin", "retire authority"),
        ("admin", "CreateToken"),
        ("manager", "UseToken"),
    }
    loaded = Authorities(world.folder / "authorities", time.time())
    assert (loaded.roots, loaded.chain) == (world.authorities.roots, world.authorities.chain)


async def test_who_has_no_role_lets_nobody_in_and_hosts_are_no_operators(world: World) -> None:
    """And neither is who shows nothing, at the port where nothing is asked for."""
    await world.join()
    for kind, name, port, code in (
        ("user", "eve", 0, grpc.StatusCode.PERMISSION_DENIED),
        ("host", "h7", 0, grpc.StatusCode.UNAUTHENTICATED),
        ("user", "admin", world.manager.enrolment_port, grpc.StatusCode.UNAUTHENTICATED),
    ):
        async with world.dialled(kind, port, name=name) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await HostAccessStub(channel).CreateHostToken(pb.CreateHostTokenRequest(host="h9"), timeout=60)
        assert refused.value.code() is code
    assert [t.host for t in world.manager.writer.state.tokens.values()] == ["h7"]


async def test_a_token_is_for_tokens_and_secrets_are_not_kept(world: World) -> None:
    token = await world.token()
    async with world.dialled() as channel:
        stub = HostAccessStub(channel)
        [shown] = (await stub.ListHostTokens(pb.ListHostTokensRequest(), timeout=60)).tokens
        assert (shown.id, shown.host, shown.state) == (token.id, "h7", "Waiting")
        revoked = await stub.RevokeHostToken(pb.RevokeHostTokenRequest(id=token.id), timeout=60)
        assert revoked.state == "Revoked"
    assert token.secret not in repr(token)
    assert token.secret.encode() not in b"".join(p.read_bytes() for p in world.folder.glob("fleet.db*"))
    for text in ("", "cmt1.x", str(token)[:-1], str(token) + " y"):
        with pytest.raises(BadToken) as bad:
            parse(text)
        assert token.secret not in str(bad.value)


async def test_the_server_renews_its_own_certificate(world: World) -> None:
    first_pair = world.tls.pair()
    assert world.tls.pair() == first_pair
    world.skew_s = 5 * 86400.0
    assert world.tls.pair() != first_pair
    world.skew_s = 0.0


async def test_garbage_to_enrolment_is_told_what_is_wrong(world: World) -> None:
    from casemate_wire.v1 import enrolment_pb2

    async with world.dialled(port=world.manager.enrolment_port) as channel:
        stub = EnrolmentStub(channel)
        for request in (b"", b"\x00" * 100, b"\x30" * 5000):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Renew(enrolment_pb2.RenewRequest(host="h", certificate_request=request), timeout=60)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_tls_nothing_but_loopback_is_listened_on(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="insecure-loopback"):
        async with running(SqliteStore(tmp_path / "f.db"), "0.0.0.0:0", time.time, lambda: "s", version="t"):
            pass


async def test_with_tls_every_address_may_be_listened_on(tmp_path: Path) -> None:
    tls = ServerTls(Authorities(tmp_path / "a", time.time()), (), time.time)
    store = SqliteStore(tmp_path / "f.db")
    async with running(
        store, "0.0.0.0:0", time.time, lambda: "s", version="t", tls=tls, listen_enrolment="0.0.0.0:0"
    ) as manager:
        assert manager.port != manager.enrolment_port


def _fields(identity: Identity) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(identity)


def test_a_roll_over_that_was_cut_leaves_the_authority_that_signed(tmp_path: Path) -> None:
    before = Authorities(tmp_path / "a", time.time())
    pin = before.signing.pin
    # Key and cross certificate are written, the certificate that makes them an authority is not.
    (tmp_path / "a/2.key").write_bytes(pki.key_pem(pki.new_key()))
    (tmp_path / "a/2.cross").write_bytes(b"torn")
    again = Authorities(tmp_path / "a", time.time())
    assert (again.signing.pin, again.roots) == (pin, before.roots)
    rolled = again.roll(pin, time.time())
    assert Authorities(tmp_path / "a", time.time()).signing.pin == rolled.pin


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    Authorities(tmp_path / "a", time.time())
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()} == {0o600}
    (tmp_path / "a/1.key").write_bytes(pki.key_pem(pki.new_key()))
    with pytest.raises(AuthorityDamaged, match=r"1\.key"):
        Authorities(tmp_path / "a", time.time())


async def test_neither_port_speaks_an_older_version(world: World) -> None:
    for port in (world.manager.port, world.manager.enrolment_port):
        argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2", "-tls1_2"]
        seen = await asyncio.to_thread(
            subprocess.run, argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        assert seen.returncode != 0
        assert b"Cipher is (NONE)" in seen.stdout
