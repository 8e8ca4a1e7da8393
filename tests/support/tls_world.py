"""A manager with TLS whose clock can be moved, and the two ends of streams to it: what tests of certificates stand on."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from casemate_agent.enrolment import enrol
from casemate_agent.enrolment.identity import Identity
from casemate_agent.uplink.transport import GrpcTransport
from casemate_manager import pki
from casemate_manager.api.tls import ServerTls
from casemate_manager.app import Manager
from casemate_manager.authority import Authorities
from casemate_wire.stream import Hello, Rejected
from casemate_wire.tls import TARGET_NAME
from casemate_wire.token import Token, parse
from casemate_wire.v1 import join_pb2 as pb
from casemate_wire.v1.join_pb2_grpc import HostAccessStub


class World:
    """A manager, its authorities, and a clock that can be moved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skew_s = 0.0
        self.authorities = Authorities(folder / "authorities", time.time())
        self.tls = ServerTls(self.authorities, ("127.0.0.1",), self.now)
        self.manager: Manager
        self.seeds = 0
        self.operator = pki.new_key()

    def now(self) -> float:
        return time.time() + self.skew_s

    def seed(self) -> str:
        self.seeds += 1
        return f"seed-{self.seeds}"

    @property
    def enrolment(self) -> str:
        return f"127.0.0.1:{self.manager.enrolment_port}"

    @asynccontextmanager
    async def dialled(
        self, kind: str = "user", port: int = 0, roots: bytes = b"", name: str = "admin"
    ) -> AsyncIterator[grpc.aio.Channel]:
        """A channel of an operator (or a host) whose certificate this fleet's authority signed."""
        signing = self.authorities.signing
        chain = pki.pem(pki.sign_client(signing, self.operator.public_key(), kind, name, time.time(), 3600.0))
        credentials = grpc.ssl_channel_credentials(roots or self.authorities.roots, pki.key_pem(self.operator), chain)
        where = f"127.0.0.1:{port or self.manager.port}"
        async with grpc.aio.secure_channel(where, credentials, options=[TARGET_NAME]) as channel:
            yield channel

    async def token(self, host: str = "h7", **more: Any) -> Token:
        async with self.dialled() as channel:
            made = await HostAccessStub(channel).CreateHostToken(
                pb.CreateHostTokenRequest(request_key=self.seed(), host=host, **more), timeout=60
            )
        assert made.enrolment_port == self.manager.enrolment_port
        return parse(made.secret)

    async def join(self, host: str = "h7") -> Identity:
        return await enrol.join(await self.token(host), self.enrolment, self.folder / host)


@asynccontextmanager
async def session(identity: Identity, host: str = "", counter: int = 1) -> AsyncIterator[Any]:
    """An open stream that has said Hello."""

    async def current() -> Identity:
        return identity

    transport = GrpcTransport(identity.manager, current)
    stream = await transport.session()
    try:
        await stream.send(Hello(host or identity.host, "boot", 0, 0, "digest", counter))
        yield stream
    finally:
        await stream.close()
        await transport.close()


async def first(stream: Any) -> Any:
    async with asyncio.timeout(60):
        return await stream.receive()


async def until_rejected(stream: Any) -> Rejected:
    async with asyncio.timeout(60):
        while not isinstance(message := await stream.receive(), Rejected):
            pass
    return message
