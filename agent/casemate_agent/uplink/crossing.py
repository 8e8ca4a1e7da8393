"""Streams between the two hosts of a migration: TLS 1.3, both ends by certificates that were made for this one.

What may live here: certificates, dialling, listening. What runs through the streams is not read here.

Theory of operation (docs/adr/032). Each end makes a key for the migration, in memory, and asks the manager for a certificate
for it; the manager gives one to the two hosts of a migration that is under way, signed by an authority that signs for nothing
else, good for minutes. The other end must show the certificate of *the other end of the same migration at the host that the
order names*: a certificate of another migration, of the same end, of another host, an expired one, and any that a host has for
other purposes end the connection before a byte of it is used. Keys and certificates are handed to the library through memory
without a name, and are gone with the migration.

A stream begins with its name. What the manager signs meanwhile is asked anew when half of a certificate's life is over.
"""

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import Awaitable
from typing import Final

from casemate_agent.drivers.passageports import Bytes, Certify, Listening, PassageFailed, Serve, ports_of
from casemate_agent.enrolment.enrol import new_key, request_for
from casemate_core.errors import CasemateError
from casemate_core.spec.operation import Move, Order

log = logging.getLogger("casemate.agent.crossing")

#: Connecting, the handshake, and the name of a stream, in seconds.
DIAL_S: Final = 15.0
#: A certificate is asked anew after so long; it is good for twice as long (casemate_manager.movecerts).
RENEW_S: Final = 300.0
#: Streams of one migration at the same time; it needs four.
MOST_STREAMS: Final = 8
MAX_NAME: Final = 16


def identity(migration: str, end: str, host: str) -> str:
    """What the certificate of one end says."""
    return f"spiffe://casemate/migration/{migration}/{end}/{host}"


class TlsCrossings:
    """`Crossings` by this process's own network. ``where``: address of this host, and with ``:FIRST-LAST`` the ports that may be
    listened on; any free one without."""

    def __init__(self, where: str, certify: Certify | None = None) -> None:
        self.where = where
        #: How the manager is asked; there is no way before it is set.
        self.certify = certify

    async def listen(self, order: Order, serve: Serve) -> Listening:
        move = _move(order)
        address, ports = ports_of(self.where)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # a stream that is resumed would not show its certificate again
        await self._load(context, order, "target")
        listening = _Listening(identity(order.uid, "source", move.source), serve)
        for port in ports:
            try:
                await listening.begin(address, port, context)
                break
            except OSError as error:
                why = error.strerror or str(error)
        else:
            raise PassageFailed(f"passage {self.where}: none of its ports can be listened on: {why}")
        listening.keep(self._renewed(context, order))
        return listening

    async def _renewed(self, context: ssl.SSLContext, order: Order) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._load(context, order, "target")
            except CasemateError as error:
                log.warning("the certificate of migration %s is not renewed: %s", order.uid, error)

    async def dial(self, order: Order, name: str) -> Bytes:
        move = _move(order)
        host, _, port = move.address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # it is known by its identity, which says more than an address
        await self._load(context, order, "source")
        try:
            async with asyncio.timeout(DIAL_S):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
        except (OSError, ssl.SSLError, ValueError, TimeoutError) as error:
            raise PassageFailed(f"{move.target} at {move.address}: {_words(error)}") from None
        stream = _TlsBytes(reader, writer)
        try:
            check(writer, identity(order.uid, "target", move.target))
            await stream.write(f"{name}\n".encode())
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _load(self, context: ssl.SSLContext, order: Order, end: str) -> None:
        """Give a context a key of its own and a certificate for it."""
        if self.certify is None:
            raise PassageFailed("the manager, who signs for migrations, is not known yet")
        key = await asyncio.to_thread(new_key)
        ends = await self.certify(order.uid, request_for(key))
        if ends.end != end:
            raise PassageFailed(f"the manager says that this host is the {ends.end} of the migration, not its {end}")
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=ends.issuer.decode("ascii"))
        load_pair(context, key, ends.certificate)


def load_pair(context: ssl.SSLContext, key: bytes, certificate: bytes) -> None:
    """A key and its certificate into a context, by way of memory that has no name: the library reads files only."""
    memory = os.memfd_create("migration", os.MFD_CLOEXEC)
    try:
        os.write(memory, certificate + key)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)


def check(writer: asyncio.StreamWriter, expected: str) -> None:
    """Whether the other end is who it must be. Raises PassageFailed."""
    shown = writer.get_extra_info("ssl_object").getpeercert() or {}
    names = [value for kind, value in shown.get("subjectAltName", ()) if kind == "URI"]
    if names != [expected]:
        raise PassageFailed(f"the other end is {', '.join(names) or 'nobody'}, and must be {expected}")


def _move(order: Order) -> Move:
    if order.move is None:
        raise PassageFailed("the order says nothing of two hosts")
    return order.move


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {DIAL_S:g} s"
    return str(getattr(error, "strerror", "") or error) or type(error).__name__


class _TlsBytes:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, most: int) -> bytes:
        try:
            return await self._reader.read(most)
        except (OSError, ssl.SSLError) as error:
            raise PassageFailed(f"the other host broke off: {_words(error)}") from None

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (OSError, ssl.SSLError, RuntimeError) as error:
            raise PassageFailed(f"the other host broke off: {_words(error)}") from None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(DIAL_S):
                await self._writer.wait_closed()


class _Listening:
    def __init__(self, expected: str, serve: Serve) -> None:
        self._expected = expected
        self._serve = serve
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self.address = ""

    async def begin(self, address: str, port: int, context: ssl.SSLContext) -> None:
        self._server = await asyncio.start_server(
            self._accept, address, port, ssl=context, ssl_handshake_timeout=DIAL_S
        )
        bound = self._server.sockets[0].getsockname()[1]
        self.address = f"[{address}]:{bound}" if ":" in address else f"{address}:{bound}"

    def keep(self, work: Awaitable[None]) -> None:
        self._keeper = asyncio.ensure_future(work)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        stream = _TlsBytes(reader, writer)
        self._tasks.add(task)
        try:
            if len(self._tasks) > MOST_STREAMS:
                raise PassageFailed(f"more than {MOST_STREAMS} streams")
            check(writer, self._expected)
            async with asyncio.timeout(DIAL_S):
                name = await reader.readline()
            if not name.endswith(b"\n") or len(name) > MAX_NAME:
                raise PassageFailed("a stream begins with its name")
            await self._serve(name.decode("ascii", "replace").strip(), stream)
        except (CasemateError, OSError, ValueError, TimeoutError, ssl.SSLError) as error:
            log.warning("a stream of a migration ends: %s", error or type(error).__name__)
        except asyncio.CancelledError:
            pass  # the passage is closed; asyncio would report it as an error of this callback
        finally:
            self._tasks.discard(task)
            await stream.close()

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._keeper] if self._keeper is not None else [])]
        if self._server is not None:
            self._server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
