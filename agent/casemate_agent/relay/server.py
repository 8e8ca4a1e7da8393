"""The half of a split agent that has the network, and may nothing else: the relay.

What may live here: accepting root's connections, and doing the one thing that each asks for. It holds the host's key and
speaks TLS, HTTP/2 and HTTP; it reads no message of the manager, knows no instance and no device, and drives nothing. What
root believes of it is in :mod:`casemate_agent.relay.pipe`.

Theory of operation. A connection is for one thing. ``session`` and ``channel`` become a call to the manager whose messages go
both ways as they are, one at a time in each direction, so that whoever is slow slows the other end down. ``fetch`` brings a
file. ``metrics`` is the way back to root for who scrapes this host. ``ping`` is answered, and is how the relay watches itself:
its watchdog is fed by its own dialling, through the same door as root's. Only root may come in, and the relay itself.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

from casemate_agent.config import Config
from casemate_agent.drivers.http import http_download
from casemate_agent.enrolment import enrol
from casemate_agent.enrolment import identity as identities
from casemate_agent.enrolment.renewal import Renewal
from casemate_agent.relay.pipe import ANSWER_S, MAX_WORDS, PIECE, Kind, Pipe, Relay, peer_uid
from casemate_agent.uplink.transport import BrokenOff, GrpcTransport, Stream
from casemate_core.errors import CasemateError, Unavailable
from casemate_wire import exposition
from casemate_wire.notify import Notifier

log = logging.getLogger("casemate.agent.relay")

#: The session, 64 channels, the transfers of images, a scraper, and room for those that are just ending.
MOST_CONNECTIONS: Final = 128
#: Looks at itself so often, in seconds; four times within the watchdog's time at least.
LOOK_S: Final = 5.0
#: Folder of the identity, inside the state folder.
IDENTITY: Final = "identity"
ROOT: Final = 0


class RelayServer:
    """See the module. ``host`` is who this machine joined as, ``transport`` reaches the manager, ``allowed`` are users that may
    come in."""

    def __init__(self, host: str, transport: GrpcTransport, allowed: frozenset[int]) -> None:
        self._host = host
        self._transport = transport
        self._open: set[asyncio.Task[None]] = set()
        self._scraped: Pipe | None = None
        self._way_over = asyncio.Event()
        self._allowed = allowed

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        """Serve on a socket of this path while the context is open."""
        path.unlink(missing_ok=True)  # of one that was killed
        server = await asyncio.start_unix_server(self._accept, str(path))
        path.chmod(0o600)
        try:
            yield
        finally:
            server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
            await server.wait_closed()
            await self._transport.close()
            path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        pipe = Pipe(reader, writer)
        uid = peer_uid(writer.get_extra_info("socket"))
        if uid not in self._allowed or len(self._open) >= MOST_CONNECTIONS:
            log.warning("a connection of user %d is closed: %d are open", uid, len(self._open))
            await pipe.close()
            return
        self._open.add(task)
        try:
            await self._serve(pipe)
        except CasemateError as error:
            log.info("a connection ends: %s", error)
            with contextlib.suppress(BrokenOff):
                await pipe.put(Kind.FAILED, str(error).encode()[:MAX_WORDS])
        except asyncio.CancelledError:
            pass  # the relay ends; asyncio would report it as an error of this callback
        finally:
            self._open.discard(task)
            await pipe.close()

    async def _serve(self, pipe: Pipe) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                frame = await pipe.get()
        except TimeoutError:
            raise BrokenOff("a connection begins with what it is for") from None
        if frame is None:
            return
        order = _order(*frame)
        match order.get("kind"):
            case "ping":
                await _opened(pipe, host=self._host)
            case "session" | "channel" as kind:
                stream = await self._transport.raw(kind)
                try:
                    await _opened(pipe, host=self._host)
                    await _both_ways(pipe, stream)
                finally:
                    await stream.close()
            case "fetch":
                await _fetch(pipe, order)
            case "metrics":
                await self._be_way_back(pipe)
            case other:
                raise BrokenOff(f"nothing is called {other!r} here")

    # --- metrics ------------------------------------------------------------------------------------------------------

    async def _be_way_back(self, pipe: Pipe) -> None:
        """Keep root's connection until another takes its place, or it fails."""
        await _opened(pipe)
        self._let_go()
        self._scraped, self._way_over = pipe, asyncio.Event()
        await self._way_over.wait()

    def _let_go(self) -> None:
        self._scraped = None
        self._way_over.set()

    async def scrape(self) -> bytes:
        """What root tells of itself and its hosts. Raises Unavailable."""
        pipe = self._scraped
        if pipe is None:
            raise Unavailable("the agent has not come to be scraped yet")
        try:
            await pipe.put(Kind.MESSAGE)
            match await pipe.get():
                case (Kind.MESSAGE, body):
                    return body
            raise BrokenOff("the agent does not answer")
        except BaseException:
            # Half an exchange: the next answer would be of this question.
            if self._scraped is pipe:
                self._let_go()
            raise


async def _opened(pipe: Pipe, **more: Any) -> None:
    await pipe.put(Kind.OPENED, json.dumps(more).encode())


def _order(kind: Kind, payload: bytes) -> Mapping[str, Any]:
    try:
        order = json.loads(payload) if kind is Kind.ORDER else None
    except ValueError:
        order = None
    if not isinstance(order, dict):
        raise BrokenOff("a connection begins with what it is for")
    return order


async def _both_ways(pipe: Pipe, stream: Stream[bytes, bytes]) -> None:
    """Until either end has had enough. Raises BrokenOff where it was the manager's, with its words."""

    async def up() -> None:
        while (frame := await pipe.get()) is not None:
            kind, payload = frame
            if kind is not Kind.MESSAGE:
                raise BrokenOff(f"{kind.name} within a stream")
            await stream.send(payload)

    async def down() -> None:
        while (message := await stream.receive()) is not None:
            await pipe.put(Kind.MESSAGE, message)
        await pipe.put(Kind.END)

    tasks = [asyncio.create_task(up(), name="relay-up"), asyncio.create_task(down(), name="relay-down")]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _fetch(pipe: Pipe, order: Mapping[str, Any]) -> None:
    source, deadline_s = order.get("source"), order.get("deadline_s")
    if not isinstance(source, str) or not isinstance(deadline_s, int | float):
        raise BrokenOff("a file is asked for by source and deadline_s")
    async with http_download(source, deadline_s) as (length, chunks):
        await _opened(pipe, length=length)
        async for chunk in chunks:
            for start in range(0, len(chunk), PIECE):
                await pipe.put(Kind.MESSAGE, chunk[start : start + PIECE])
        await pipe.put(Kind.END)


async def serve(config: Config) -> None:
    """The relay's process, until SIGTERM or SIGINT. Raises NotJoined, and what the identity raises."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    folder = Path(config.state_dir) / IDENTITY
    path = Path(config.relay)
    identity = None if config.insecure_loopback else identities.load(folder)
    if identity is None and not config.insecure_loopback:
        raise identities.NotJoined(f"{folder}: this host has not joined a fleet (casemate-agent join)")
    notifier = Notifier()
    allowed = frozenset({ROOT, os.geteuid()})  # and itself: it looks whether it answers
    renewal = None
    if identity is None:
        server = RelayServer(config.name, GrpcTransport(config.manager), allowed)
    else:

        async def save(fresh: identities.Identity) -> None:
            await asyncio.to_thread(identities.save, folder, fresh)

        renewal = Renewal(identity, enrol.renew, save, time.time, Random())
        server = RelayServer(identity.host, GrpcTransport(identity.manager, renewal.current), allowed)
    async with asyncio.TaskGroup() as group, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(server.listening(path))
        if config.metrics_listen:
            url = await stack.enter_async_context(exposition.passed_on(config.metrics_listen, server.scrape))
            log.info("metrics of the agent on %s", url)
        answers = [0]
        await _answer(path, answers)
        notifier.ready(identity.host if identity else config.name)
        tasks = [
            group.create_task(_look(path, answers), name="look"),
            group.create_task(notifier.feed(lambda: answers[0]), name="notify"),
        ]
        if renewal is not None:
            tasks.append(group.create_task(renewal.run(), name="renewal"))
        log.info("relay on %s", path)
        await stop.wait()
        notifier.stopping()
        for task in tasks:
            task.cancel()
    log.info("relay stopped")


async def _answer(path: Path, answers: list[int]) -> None:
    """Count an answer of the relay at its own door."""
    await Relay(path, os.geteuid()).host()
    answers[0] += 1


async def _look(path: Path, answers: list[int]) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            await _answer(path, answers)
        except CasemateError as error:
            log.warning("the relay does not answer itself: %s", error)
