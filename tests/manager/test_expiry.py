"""Streams end with what they were opened by: a certificate or token that expires, a key or user disabled, a role taken away."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from casemate_agent.enrolment import enrol
from casemate_core.spec.access import FLEET, Scope, User
from casemate_core.spec.meta import Meta
from casemate_manager import sessions
from casemate_manager.api import gate
from casemate_manager.app import running
from casemate_manager.pki import key_id_of
from casemate_manager.sessions import Identity
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire.stream import Welcome
from casemate_wire.v1 import identity_pb2, operators_pb2
from casemate_wire.v1.identity_pb2_grpc import IdentityStub
from casemate_wire.v1.operators_pb2_grpc import FleetStub
from support.gatekeeping import as_user, bind, house
from support.tls_world import World, first, session, until_rejected


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    it = World(tmp_path)
    store = SqliteStore(tmp_path / "fleet.db")
    async with running(store, "127.0.0.1:0", it.now, it.seed, version="t", tls=it.tls) as it.manager:
        yield it
    del it.manager  # pytest holds on to what a fixture gave, and gRPC's thread goes with its last object


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def watching(channel: Any, **more: Any) -> Any:
    """A watch that has told all there is."""
    stream = FleetStub(channel).Watch(operators_pb2.WatchRequest(kind="Environment"), **more)
    while (await stream.read()).type != operators_pb2.WatchEvent.BOOKMARK:
        pass
    return stream


async def end_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends."""
    async with asyncio.timeout(90):
        try:
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code(), str(error.details())
        return await stream.code(), str(await stream.details())


def test_one_looks_often_enough() -> None:
    assert gate.RECHECK_S <= 2.5 and sessions.RECHECK_S <= 2.5, "five seconds are promised"


async def test_a_users_certificate_ends_what_it_opened(world: World) -> None:
    async with world.dialled() as channel:
        stream = await watching(channel)
        world.skew_s = 3700.0
        code, message = await end_of(stream)
        assert code is grpc.StatusCode.UNAUTHENTICATED and "the certificate has expired" in message
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # the connection is as old as the certificate
            await FleetStub(channel).Version(operators_pb2.VersionRequest(), timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    denied = [r for r in await world.manager.writer.audit(0, 100) if r.outcome == "denied"]
    assert denied[0].actor == "admin" and "the open stream was ended" in denied[0].targets[0]


@pytest.mark.parametrize("what", ["token expires", "key expires", "key disabled", "key rotated", "user disabled"])
async def test_a_token_or_key_that_is_good_no_more_ends_what_it_opened(world: World, what: str) -> None:
    submit = world.manager.core.submit
    from casemate_manager.fleet.commands import ApplyResources

    await submit(ApplyResources("u", (User(Meta("ci"), "service"), bind("ci", "viewer", FLEET, "ci")), "s"))
    async with world.dialled() as channel:
        stub = IdentityStub(channel)
        made = await stub.CreateKey(
            identity_pb2.CreateKeyRequest(request_key="key-of-ci-1", user="ci", lifetime_s=7200), timeout=60
        )
        issued = await stub.IssueToken(identity_pb2.IssueTokenRequest(user="ci", lifetime_s=600), timeout=60)
        shown = issued.token if what == "token expires" else made.secret
        stream = await watching(channel, metadata=bearer(shown))
        match what:
            case "token expires":
                world.skew_s = 700.0
            case "key expires":
                world.skew_s = 7300.0
            case "key disabled":
                change = identity_pb2.ChangeKeyRequest.DISABLE
                await stub.ChangeKey(identity_pb2.ChangeKeyRequest(request_key="c", id=made.key.id, change=change))
            case "key rotated":
                await stub.RotateKey(identity_pb2.RotateKeyRequest(request_key="rotate-it-1", id=made.key.id))
            case "user disabled":
                await submit(ApplyResources("d", (User(Meta("ci"), "service", disabled=True),), "s"))
        code, _ = await end_of(stream)
        assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_role_that_is_taken_away_ends_what_it_opened_and_no_other() -> None:
    async with house() as found:
        await found.put(bind("a", "viewer", Scope("own"), "ann"), bind("b", "viewer", Scope("own"), "bob"))
        stream = await watching(found.channel, metadata=as_user("ann"))
        other = await watching(found.channel, metadata=as_user("bob"))
        request = operators_pb2.DeleteRequest(request_key="d", kind="RoleBinding", name="a")
        await found.stub.Delete(request, metadata=as_user("root"))
        assert (await end_of(stream))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert not other.done()
        other.cancel()


async def test_a_host_whose_last_certificate_expired_is_let_go_and_one_that_renews_is_not(world: World) -> None:
    identity = await world.join()
    async with session(identity) as stream:
        assert isinstance(await first(stream), Welcome)
        world.skew_s = 20 * 3600.0
        fresh = await enrol.renew(identity)
        enrolment = world.manager.writer.state.enrolments["h7"]
        there = Identity("h7", enrolment.key)
        judge = world.manager.sessions._has_expired
        assert not judge(there, world.now() + 23 * 3600.0) and judge(there, world.now() + 25 * 3600.0)
        assert not judge(Identity("h7", "other"), world.now() + 25 * 3600.0)
        world.skew_s = 45 * 3600.0
        told = await until_rejected(stream)
    assert (told.reason, told.retry_after_s) == ("CertificateExpired", 0.0)
    again = await enrol.renew(fresh)
    assert again.not_after_s > fresh.not_after_s
    assert key_id_of(_der(again.certificate)) == enrolment.key


def _der(pem: str) -> bytes:
    import ssl

    return ssl.PEM_cert_to_DER_cert(pem[: pem.index("-----END CERTIFICATE-----")] + "-----END CERTIFICATE-----\n")
