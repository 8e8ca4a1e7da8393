"""Signed messages: what a relay that was taken cannot make root believe, and that a roll-over reaches root."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings

from casemate_agent.enrolment import enrol
from casemate_agent.enrolment.identity import Identity
from casemate_agent.relay import trust
from casemate_agent.relay.pipe import Kind, Pipe, Relay
from casemate_agent.relay.server import RelayServer
from casemate_agent.relay.trust import NoAuthority, Trust, TrustDamaged, Trusted
from casemate_agent.uplink.transport import GrpcTransport
from casemate_core.errors import CasemateError, Unavailable
from casemate_manager import pki
from casemate_manager.api.tls import ServerTls
from casemate_manager.app import running
from casemate_manager.authority import Authorities
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire.channel import Eof, Resize, Stdin
from casemate_wire.codec.channels import frame_to_wire
from casemate_wire.signed import NotSigned, Opener, Purpose, Sealed, Signer, SigningKey, signer_of
from casemate_wire.stream import Checkpoint, Desired, Hello, OpenChannel, Operate, ToHost, Welcome
from casemate_wire.v1 import hosts_pb2 as pb
from support.tls_world import World, first

NOW = 1_800_000_000.0
NONCE = bytes(range(32))
PURPOSE = Purpose("session", "h7", "", NONCE)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> ServerTls:
    return ServerTls(Authorities(tmp_path_factory.mktemp("a") / "authorities", NOW), (), lambda: NOW)


def opened(
    messages: list[Sealed], pins: tuple[str, ...], purpose: Purpose = PURPOSE, now_s: float = NOW
) -> list[bytes]:
    opener = Opener(purpose, pins)
    return [opener.open(message, now_s) for message in messages]


def signed(tls: ServerTls, *messages: bytes, purpose: Purpose = PURPOSE) -> list[Sealed]:
    signer = Signer(tls.signing(), purpose)
    return [signer.sign(message) for message in messages]


def test_what_the_manager_signs_comes_as_it_was_said(fleet: ServerTls) -> None:
    assert opened(signed(fleet, b"a", b"", b"c" * 100_000), fleet.pins) == [b"a", b"", b"c" * 100_000]


Change = Callable[[list[Sealed]], list[Sealed]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: [replace(m[0], message=b"A"), *m[1:]], "not signed"),
        (lambda m: [m[0], replace(m[1], message=b"")], "not signed"),
        (lambda m: [m[0], m[2]], "3 of the manager came where 2"),
        (lambda m: [m[0], replace(m[2], number=2)], "not signed"),
        (lambda m: [m[0], m[0]], "1 of the manager came where 2"),
        (lambda m: [m[0], replace(m[0], number=2)], "not signed"),
        (lambda m: [m[1], m[0], m[2]], "2 of the manager came where 1"),
        (lambda m: [replace(m[0], signature=b"")], "not signed"),
        (lambda m: [replace(m[0], signature=bytes(64))], "not signed"),
        (lambda m: [replace(m[0], chain=())], "0 certificates"),
        (lambda m: [replace(m[0], chain=m[0].chain[1:])], "not a manager's"),
        (lambda m: [replace(m[0], chain=m[0].chain[:1])], "another fleet"),
        (lambda m: [replace(m[0], chain=(*m[0].chain, *[b"x"] * 80))], "certificates come"),
        (lambda m: [replace(m[0], chain=(b"no certificate", *m[0].chain))], "none that is understood"),
    ],
)
def test_what_was_changed_left_out_repeated_or_exchanged_is_not_believed(
    fleet: ServerTls, change: Change, says: str
) -> None:
    messages = signed(fleet, b"a", b"b", b"c")
    with pytest.raises(NotSigned, match=says):
        opened(change(messages), fleet.pins)


@pytest.mark.parametrize(
    "other",
    [
        replace(PURPOSE, nonce=bytes(32)),
        replace(PURPOSE, host="h8"),
        replace(PURPOSE, kind="channel"),
        replace(PURPOSE, topic="t"),
        replace(PURPOSE, host="h", topic="7"),
    ],
)
def test_what_was_signed_for_another_stream_is_not_believed(fleet: ServerTls, other: Purpose) -> None:
    with pytest.raises(NotSigned, match="for this stream of this host"):
        opened(signed(fleet, b"a", purpose=other), fleet.pins)


def test_who_has_another_certificate_of_the_fleet_signs_nothing(fleet: ServerTls) -> None:
    """A host's, a user's and a server's are of other uses; another fleet's manager is of another authority."""
    authority, ours, ec_key = fleet.authorities.signing, Ed25519PrivateKey.generate(), pki.new_key()
    leaves = (
        pki.sign_client(authority, ec_key.public_key(), "host", "h8", NOW, 3600),
        pki.sign_client(authority, ec_key.public_key(), "user", "admin", NOW, 3600),
        pki.sign_server(authority, ec_key.public_key(), ("manager",), NOW),
        pki.sign_client(authority, ours.public_key(), "host", "manager", NOW, 3600),  # type: ignore[arg-type]
        pki.sign_signer(pki.make_authority("casemate fleet authority 1", NOW), ours.public_key(), NOW),
    )
    for leaf in leaves:
        key = SigningKey(ours, (pki.der(leaf), pki.der(authority.certificate)))
        with pytest.raises(NotSigned):
            opened([Signer(key, PURPOSE).sign(b"a")], fleet.pins)
    good = pki.sign_signer(authority, ours.public_key(), NOW)
    key = SigningKey(ours, (pki.der(good), pki.der(authority.certificate)))
    assert opened([Signer(key, PURPOSE).sign(b"a")], fleet.pins) == [b"a"]
    # A manager's certificate vouches for nobody.
    beneath = pki.sign_signer(pki.Authority(good, ec_key), Ed25519PrivateKey.generate().public_key(), NOW)
    with pytest.raises(NotSigned, match="another fleet"):
        signer_of((pki.der(beneath), pki.der(good), pki.der(authority.certificate)), fleet.pins, NOW)


@pytest.mark.parametrize("now_s", [NOW - 3600, NOW + pki.SERVER_S + 1])
def test_a_certificate_of_another_time_is_not_believed(fleet: ServerTls, now_s: float) -> None:
    with pytest.raises(NotSigned, match="look at the clock"):
        opened(signed(fleet, b"a"), fleet.pins, now_s=now_s)


def test_no_tls_is_spoken_with_the_key_that_signs(fleet: ServerTls) -> None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    leaf = x509.load_der_x509_certificate(fleet.signing().chain[0])
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CODE_SIGNING
    ]


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            Sealed,
            st.binary(max_size=40),
            st.integers(-1, 3),
            st.binary(max_size=70),
            st.lists(st.binary(max_size=99)).map(tuple),
        ),
        max_size=4,
    ),
    st.data(),
)
def test_any_message_is_opened_or_refused(fleet: ServerTls, messages: list[Sealed], data: st.DataObject) -> None:
    good = signed(fleet, b"a", b"b")
    mixed = data.draw(st.permutations([*messages, *good]))
    opener = Opener(PURPOSE, fleet.pins)
    for message in mixed:
        try:
            assert opener.open(message, NOW) in (b"a", b"b")
        except NotSigned:
            pass


@settings(max_examples=300)
@given(st.data())
def test_a_chain_with_any_byte_changed_leads_to_the_same_key_or_nowhere(fleet: ServerTls, data: st.DataObject) -> None:
    chain = list(fleet.signing().chain)
    number = data.draw(st.integers(0, len(chain) - 1))
    at = data.draw(st.integers(0, len(chain[number]) - 1))
    chain[number] = (
        chain[number][:at] + bytes([chain[number][at] ^ data.draw(st.integers(1, 255))]) + chain[number][at + 1 :]
    )
    with pytest.raises(NotSigned):
        signer_of(chain, fleet.pins, NOW)


def test_a_new_authority_is_found_from_the_old_one_and_a_retired_one_is_not_needed(tmp_path: Path) -> None:
    tls = ServerTls(Authorities(tmp_path / "authorities", NOW), (), lambda: NOW)
    (old,) = tls.pins
    for _ in range(3):
        tls.authorities.roll(tls.authorities.signing.pin, NOW)
    pins = tls.pins
    assert len(pins) == 4
    for pin in pins:
        assert opened(signed(tls, b"a"), (pin,)) == [b"a"]
    for pin in pins[:-1]:
        tls.authorities.retire(pin)
    assert tls.pins == pins[-1:]
    # Who was away all the time knows the first alone; who was told knows the last alone.
    assert opened(signed(tls, b"a"), (old,)) == opened(signed(tls, b"a"), tls.pins) == [b"a"]


# --- encrypted for root ---


def test_what_is_encrypted_for_root_is_read_by_root_alone(fleet: ServerTls) -> None:
    root, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    signer = Signer(fleet.signing(), PURPOSE, root.public_key().public_bytes_raw())
    texts = [b"secret-text-1", b"secret-text-1", b"x" * 100_000]
    messages = [signer.sign(text) for text in texts]
    carried = b"".join(m.message + m.signature + m.ephemeral for m in messages)
    assert b"secret-text" not in carried and b"x" * 16 not in carried
    assert messages[0].message != messages[1].message, "the same said twice does not look the same"

    def opened_by(key: X25519PrivateKey | None, given: list[Sealed]) -> list[bytes]:
        opener = Opener(PURPOSE, fleet.pins, key)
        return [opener.open(message, NOW) for message in given]

    assert opened_by(root, messages) == texts
    with pytest.raises(NotSigned, match="another key"):
        opened_by(other, messages)
    with pytest.raises(NotSigned, match="has lost"):
        opened_by(None, messages)
    # Neither is it taken for plain, nor with another key of the exchange.
    for ephemeral in (b"", bytes(32), other.public_key().public_bytes_raw()):
        with pytest.raises(NotSigned, match="not signed"):
            opened_by(root, [replace(messages[0], ephemeral=ephemeral)])
    again = Signer(fleet.signing(), PURPOSE, root.public_key().public_bytes_raw()).sign(texts[0])
    assert again.message != messages[0].message, "nor in another stream"


async def test_a_secret_on_its_way_to_root_is_not_read_by_the_relay(world: World, tmp_path: Path) -> None:
    """Enrolled with the token, and used by the manager in sessions: what the relay's socket carries has no word of it."""
    root = trust.sealing_key(tmp_path)
    assert trust.sealing_key(tmp_path).private_bytes_raw() == root.private_bytes_raw(), "made once"
    assert (tmp_path / trust.SEALING).stat().st_mode & 0o777 == 0o600
    sealing = root.public_key().public_bytes_raw()
    token = await world.token()
    identity = await enrol.join(token, world.enrolment, world.folder / "h7", sealing)
    assert world.manager.writer.state.enrolments["h7"].sealing == sealing.hex()
    # A relay that was taken asks again with the token and the key that it has: root's key stays.
    stolen = X25519PrivateKey.generate().public_key().public_bytes_raw()
    pending = json.dumps({"token": token.id, "key": identity.key})
    (world.folder / "h7" / "identity.pending").write_text(pending)
    await enrol.join(token, world.enrolment, world.folder / "h7", stolen)
    assert world.manager.writer.state.enrolments["h7"].sealing == sealing.hex()
    trust.save(tmp_path, Trusted("h7", world.tls.pins))

    async def current() -> Identity:
        return identity

    transport = GrpcTransport(identity.manager, current)
    raw = await transport.raw("session")
    take, carried = raw.receive, []

    async def noted() -> Any:
        carried.append(await take())
        return carried[-1]

    raw.receive = noted  # type: ignore[method-assign]
    stream = Trust(tmp_path, time.time).session(raw)
    await stream.send(Hello("h7", "boot", 0, 0, "digest", 1))
    welcome = await first(stream)
    assert isinstance(welcome, Welcome) and welcome.authorities == world.tls.pins
    assert world.tls.pins[0].encode() not in b"".join(carried)
    await stream.close()
    with pytest.raises(enrol.JoinRefused, match="refused"):
        await enrol.join(await world.token("h8"), world.enrolment, tmp_path / "h8", b"short")
    (tmp_path / trust.SEALING).write_bytes(b"?")
    with pytest.raises(TrustDamaged, match="join again"):
        Trust(tmp_path, time.time).session(raw)
    await transport.close()


# --- root's file ------------------------------------------------------------------------------------------------------


def test_what_is_pinned_is_kept_for_root_alone(tmp_path: Path) -> None:
    assert trust.load(tmp_path) is None
    trust.save(tmp_path, Trusted("h7", ("a" * 64, "b" * 64)))
    assert trust.load(tmp_path) == Trusted("h7", ("a" * 64, "b" * 64))
    assert (tmp_path / trust.FILE).stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [trust.FILE]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"host": "h7"}', '{"host": "h7", "pins": []}', '{"host": "../h", "pins": ["' + "a" * 64 + '"]}',
     '{"host": "h7", "pins": ["x"]}', '{"host": "h7", "pins": [1]}', '{"host": 7, "pins": ["' + "a" * 64 + '"]}'],
)  # fmt: skip
def test_a_damaged_file_believes_nobody_and_says_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / trust.FILE).write_text(text)
    with pytest.raises(TrustDamaged, match="casemate-agent trust HOST PIN"):
        trust.load(tmp_path)


def test_what_an_operator_types_is_checked() -> None:
    assert trust.checked("h7", "a" * 64) == Trusted("h7", ("a" * 64,))
    with pytest.raises(NoAuthority, match="64 hex digits"):
        trust.checked("h7", "a" * 16)
    with pytest.raises(NoAuthority, match="no name of a host"):
        trust.checked("H 7", "a" * 64)


# --- through a relay --------------------------------------------------------------------------------------------------


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    it = World(tmp_path)
    store = SqliteStore(tmp_path / "fleet.db")
    async with running(store, "127.0.0.1:0", it.now, it.seed, version="t", tls=it.tls) as it.manager:
        yield it
    del it.manager


@asynccontextmanager
async def relayed(identity: Identity, folder: Path) -> AsyncIterator[Relay]:
    """An honest relay, and root's end of it."""

    async def current() -> Identity:
        return identity

    server = RelayServer(identity.host, GrpcTransport(identity.manager, current), frozenset({os.geteuid()}))
    async with server.listening(folder / "relay.sock"):
        yield Relay(folder / "relay.sock", os.geteuid(), Trust(folder, time.time))


async def welcomed(relay: Relay, counter: int) -> Welcome:
    stream = await relay.session()
    try:
        await stream.send(Hello("h7", "boot", 0, 0, "digest", counter))
        message = await first(stream)
        assert isinstance(message, Welcome), message
        return message
    finally:
        await stream.close()


async def test_root_knows_its_manager_and_follows_a_roll_over(world: World, tmp_path: Path) -> None:
    identity = await world.join()
    (pin,) = world.tls.pins
    async with relayed(identity, tmp_path) as relay:
        with pytest.raises(NoAuthority, match="casemate-agent trust"):
            await relay.session()
        trust.save(tmp_path, Trusted("h7", (pin,)))
        assert (await welcomed(relay, 1)).authorities == (pin,)
        after = world.authorities.roll(pin, time.time()).pin
        assert (await welcomed(relay, 2)).authorities == (pin, after)
        assert trust.load(tmp_path) == Trusted("h7", (pin, after))
        world.authorities.retire(pin)
        # The relay's own certificate is renewed by itself; here its connection of before goes on.
        assert (await welcomed(relay, 3)).authorities == (after,)
        assert trust.load(tmp_path) == Trusted("h7", (after,))
        trust.save(tmp_path, Trusted("h7", ("0" * 64,)))
        with pytest.raises(NotSigned, match="another fleet"):
            await welcomed(relay, 4)
        trust.save(tmp_path, Trusted("h8", (after,)))  # signed for h7, and root is h8
        with pytest.raises(NotSigned, match="for this stream of this host"):
            await welcomed(relay, 5)


MESSAGES: list[ToHost] = [
    Welcome(9, 0, False, 1.0, 64),
    Desired(1, 1, snapshot=True),
    Operate("o", "restart", "0b6e1c2a-0000-4000-8000-000000000001"),
    OpenChannel("t", "exec", "0b6e1c2a-0000-4000-8000-000000000001", {"argv": ["id"]}),
    Checkpoint(1, "a" * 64, 1, "b" * 64, "c" * 128),
]


@asynccontextmanager
async def lying(folder: Path, *said: bytes) -> AsyncIterator[Relay]:
    """A relay that was taken: whatever root asks, it answers with these messages, and waits."""
    over = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = Pipe(reader, writer)
        await pipe.get()
        await pipe.put(Kind.OPENED, json.dumps({"host": "h7"}).encode())
        await pipe.get()
        for message in said:
            await pipe.put(Kind.MESSAGE, message)
        await reader.read()
        await pipe.close()
        over.set()

    server = await asyncio.start_unix_server(accept, str(folder / "lying.sock"))
    async with server:
        yield Relay(folder / "lying.sock", os.geteuid(), Trust(folder, time.time))
        async with asyncio.timeout(60):
            await over.wait()


def test_everything_that_a_host_acts_upon_is_signed() -> None:
    """Of the messages of the schema each is signed, or named as one with which nothing is gained."""
    from typing import get_args

    from casemate_manager.api.hostlink import SIGNED

    assert set(get_args(ToHost)) == {*SIGNED, *trust.UNSIGNED}
    assert {type(message) for message in MESSAGES} == set(SIGNED)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
async def test_what_a_relay_makes_up_is_not_believed(tmp_path: Path, message: ToHost) -> None:
    from casemate_wire.codec.hosts import to_host_to_wire

    trust.save(tmp_path, Trusted("h7", ("a" * 64,)))
    async with lying(tmp_path, to_host_to_wire(message).SerializeToString()) as relay:
        stream = await relay.session()
        await stream.send(Hello("h7", "boot", 0, 0, "digest", 1))
        with pytest.raises(Unavailable, match="came unsigned"):
            await first(stream)
        await stream.close()


async def test_a_session_that_a_relay_has_kept_is_not_believed_again(world: World, tmp_path: Path) -> None:
    """All that the manager has signed for this host, byte for byte, in another session."""
    identity = await world.join()
    trust.save(tmp_path, Trusted("h7", world.tls.pins))
    kept: list[bytes] = []

    async def current() -> Identity:
        return identity

    transport = GrpcTransport(identity.manager, current)
    raw = await transport.raw("session")
    session = Trust(tmp_path, time.time).session(raw)
    take = raw.receive

    async def noted() -> Any:
        kept.append(await take())
        return kept[-1]

    raw.receive = noted  # type: ignore[method-assign]
    await session.send(Hello("h7", "boot", 0, 0, "digest", 1))
    assert isinstance(await first(session), Welcome)
    await session.close()
    await transport.close()
    async with lying(tmp_path, *kept) as relay:
        stream = await relay.session()
        await stream.send(Hello("h7", "boot", 0, 0, "digest", 2))
        with pytest.raises(NotSigned):
            await first(stream)
        await stream.close()


async def test_frames_of_a_channel_are_the_managers_and_of_its_own_ticket(fleet: ServerTls, tmp_path: Path) -> None:
    trust.save(tmp_path, Trusted("h7", fleet.pins))
    trusted = trust.load(tmp_path)
    assert trusted is not None

    class Raw:
        """A relay's stream, on values."""

        def __init__(self) -> None:
            self.sent: list[bytes] = []
            self.coming: list[bytes] = []

        async def send(self, message: bytes) -> None:
            self.sent.append(message)

        async def receive(self) -> bytes | None:
            return self.coming.pop(0) if self.coming else None

        async def close(self) -> None: ...

    async def channel(ticket: str, *frames: Any, topic: str = "", plain: bool = False) -> list[Any]:
        from casemate_wire.channel import Ticket

        raw = Raw()
        stream = trust.SignedChannel(raw, trusted, None, lambda: NOW)
        await stream.send(Ticket(ticket))
        asked = pb.ChannelFrame.FromString(raw.sent[0])
        signer = Signer(fleet.signing(), Purpose("channel", "h7", topic or asked.ticket, asked.nonce))
        for frame in frames:
            data = frame_to_wire(frame).SerializeToString()
            if not plain:
                s = signer.sign(data)
                data = pb.ChannelFrame(
                    signed=pb.Signed(message=s.message, number=s.number, signature=s.signature, chain=s.chain)
                ).SerializeToString()
            raw.coming.append(data)
        return [await stream.receive() for _ in frames]

    typed = (Stdin(b"ls\n"), Resize(24, 80), Eof())
    assert await channel("t1", *typed) == list(typed)
    with pytest.raises(Unavailable, match="unsigned"):
        await channel("t1", *typed, plain=True)
    with pytest.raises(NotSigned):  # what another operator types, into this guest
        await channel("t1", *typed, topic="t2")
    with pytest.raises(CasemateError, match="before the ticket"):
        raw = Raw()
        raw.coming.append(b"")
        await trust.SignedChannel(raw, trusted, None, lambda: NOW).receive()
