"""Certificates of a fleet, and a server that shows them: who is accepted, as whom, and in which version of TLS."""

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.errors import InvalidSpec
from casemate_manager import pki
from casemate_manager.api.peer import Host, Nobody, Peer, User, peer_of
from casemate_wire import tls
from casemate_wire.token import BadToken, parse

NOW_S = time.time()


@pytest.fixture(scope="module")
def old() -> pki.Authority:
    return pki.make_authority("old", NOW_S)


@pytest.fixture(scope="module")
def new(old: pki.Authority) -> pki.Authority:
    return pki.cross_sign(old, pki.make_authority("new", NOW_S), NOW_S)


class Asked(grpc.GenericRpcHandler):
    """Notes who calls."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:  # type: ignore[type-arg]
            self.peers.append(peer_of(context))
            return b""

        return grpc.unary_unary_rpc_method_handler(handle)  # type: ignore[arg-type]


@asynccontextmanager
async def served(
    authority: pki.Authority, trusted: tuple[pki.Authority, ...] = ()
) -> AsyncIterator[tuple[int, list[Peer]]]:
    """A server with a certificate of ``authority``, which asks for one of ``trusted`` (none asked where there are none)."""
    key = pki.new_key()
    chain = pki.pem(pki.sign_server(authority, key.public_key(), (), NOW_S), *filter(None, [authority.cross]))
    roots = pki.pem(*(a.certificate for a in trusted)) or None
    asked = Asked()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((asked,))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(pki.key_pem(key), chain)], roots, bool(trusted))
    )
    await server.start()
    try:
        yield port, asked.peers
    finally:
        await server.stop(0)


async def call(port: int, roots: bytes, key: bytes | None = None, chain: bytes | None = None) -> None:
    credentials = grpc.ssl_channel_credentials(roots, key, chain)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=[tls.TARGET_NAME]) as channel:
        await channel.unary_unary("/any/Method")(b"", timeout=5)


def client(authority: pki.Authority, kind: str, name: str, life_s: float = 3600.0) -> tuple[bytes, bytes]:
    key = pki.new_key()
    return pki.key_pem(key), pki.pem(pki.sign_client(authority, key.public_key(), kind, name, NOW_S, life_s))


async def test_a_peer_is_who_its_certificate_names(old: pki.Authority) -> None:
    async with served(old, (old,)) as (port, peers):
        roots = pki.pem(old.certificate)
        await call(port, roots, *client(old, "host", "h7"))
        await call(port, roots, *client(old, "user", "ann@example.org"))
        await call(port, roots, *client(old, "manager", "m1"))
    assert [(type(p), getattr(p, "name", "")) for p in peers] == [(Host, "h7"), (User, "ann@example.org"), (Nobody, "")]
    assert peers[2] == Nobody(secure=True)


async def test_without_a_certificate_a_peer_is_nobody(old: pki.Authority) -> None:
    async with served(old) as (port, peers):
        await call(port, pki.pem(old.certificate), *client(old, "host", "h7"))  # not asked for, so not shown
    assert peers == [Nobody(secure=True)]


async def test_strangers_and_those_who_are_out_of_date_are_not_let_in(old: pki.Authority) -> None:
    stranger = pki.make_authority("old", NOW_S)
    async with served(old, (old,)) as (port, peers):
        roots = pki.pem(old.certificate)
        for key, chain in (client(stranger, "host", "h7"), client(old, "host", "h7", life_s=-60.0), (None, None)):
            with pytest.raises(grpc.aio.AioRpcError):
                await call(port, roots, key, chain)
        with pytest.raises(grpc.aio.AioRpcError):  # and neither is a server of another authority believed
            await call(port, pki.pem(stranger.certificate), *client(old, "host", "h7"))
    assert peers == []


async def test_a_host_cannot_pose_as_a_manager(old: pki.Authority) -> None:
    key, chain = client(old, "host", "h7")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Asked(),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    await server.start()
    try:
        with pytest.raises(grpc.aio.AioRpcError):
            await call(port, pki.pem(old.certificate))
    finally:
        await server.stop(0)


async def test_after_a_roll_over_old_and_new_roots_accept_the_server(old: pki.Authority, new: pki.Authority) -> None:
    async with served(new, (old, new)) as (port, peers):
        await call(port, pki.pem(old.certificate), *client(old, "host", "h1"))
        await call(port, pki.pem(new.certificate), *client(new, "host", "h2"))
        await call(port, pki.pem(old.certificate, new.certificate), *client(old, "host", "h3"))
    assert [getattr(p, "name", "") for p in peers] == ["h1", "h2", "h3"]


async def test_only_tls_1_3_is_spoken(old: pki.Authority) -> None:
    def handshake(port: int, version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cadata=pki.pem(old.certificate).decode())
        context.check_hostname = False
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])

        with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain) as secured:
            return secured.version()

    async with served(old) as (port, _):
        assert await asyncio.to_thread(handshake, port, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(handshake, port, ssl.TLSVersion.TLSv1_2)
        argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2", "-tls1_2"]
        seen = await asyncio.to_thread(
            subprocess.run, argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        assert seen.returncode != 0
        assert b"Cipher is (NONE)" in seen.stdout


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anyone")])
    built = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return built.public_bytes(Encoding.DER)


GOOD_KEY = pki.new_key()
GOOD = request(GOOD_KEY)


def test_of_a_request_only_its_key_is_taken() -> None:
    key = pki.new_key()
    assert pki.key_id(pki.read_request(request(key))) == pki.key_id(key.public_key())


def test_requests_that_prove_nothing_are_refused() -> None:
    good = request(pki.new_key())
    forged = good[:-4] + bytes(4)
    for bad in (b"", b"\x30\x03abc", good[:-1], forged, bytes(5000), request(rsa.generate_private_key(65537, 2048))):
        with pytest.raises(InvalidSpec):
            pki.read_request(bad)
    with pytest.raises(InvalidSpec):
        pki.read_request(request(ec.generate_private_key(ec.SECP384R1())))


@given(st.binary(max_size=600))
def test_no_bytes_make_a_request_fail_otherwise(data: bytes) -> None:
    with pytest.raises(InvalidSpec):
        pki.read_request(data)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_request_that_was_altered_is_refused_or_asks_for_the_same_key(at: int, flip: int) -> None:
    altered = bytearray(GOOD)
    altered[at % len(altered)] ^= flip
    try:
        key = pki.read_request(bytes(altered))
    except InvalidSpec:
        return
    assert pki.key_id(key) == pki.key_id(GOOD_KEY.public_key())


@given(
    st.text(max_size=200)
    | st.from_regex(r"cmt1\.[a-z0-9-]{1,63}\.[0-9a-f]{12}\.[A-Za-z0-9_-]{32}\.[0-9a-f]{64}", fullmatch=True)
)
def test_a_token_is_read_back_as_it_was_written_or_refused(text: str) -> None:
    try:
        token = parse(text)
    except BadToken as bad:
        assert len(text) < 3 or text not in str(bad)
        return
    assert parse(str(token)) == token
    assert str(token) == text.strip()
