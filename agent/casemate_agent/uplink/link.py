"""The agent's end of the stream to the manager.

What may live here: dialling, reconnecting, and moving values between the stream's protocol (``casemate_wire.session``,
PURE) and the agent. No decisions about instances.

Theory of operation. One session at a time. A session raises the counter on disk, dials, says Hello with what is on disk,
and after Welcome tells everything; from then on what the agent's feed has merged goes up whenever there is credit, and
desired state that comes down is acknowledged when the ledger has it. Whatever goes wrong ends the session, and the next is
dialled after a random part of the window that the manager stated: full jitter, so that a fleet that lost its manager does
not come back at once. Channels for logs and commands are dialled when asked for, each its own task, bounded in number.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from math import inf
from random import Random

from casemate_agent.agent import Agent
from casemate_agent.drivers.ports import MachineFacts
from casemate_agent.ledger.witness import Witness
from casemate_agent.uplink.channels import TOO_MANY, serve_channel
from casemate_agent.uplink.support import HostSupport
from casemate_agent.uplink.transport import BrokenOff, Stream, Transport
from casemate_core.checkpoint import Checkpoint
from casemate_core.errors import CallerError, CasemateError
from casemate_core.topology import Topology
from casemate_wire.session import HostEnd, Refused
from casemate_wire.stream import (
    Desired,
    FromHost,
    Hello,
    Inventory,
    OpenChannel,
    Operate,
    Outcome,
    ToHost,
    Welcome,
)

log = logging.getLogger("casemate.agent.link")

#: Before a manager has stated one, in seconds.
WINDOW_S = 2.0
#: A manager that does not answer is dialled less and less often, down to this window, in seconds.
LONGEST_WINDOW_S = 10.0
#: A manager that forbids coming back is asked again so rarely, in seconds: someone may have acted.
FORBIDDEN_S = 60.0
#: Changes within so many seconds go up together.
GATHER_S = 0.02
#: Channels open at the same time.
MOST_CHANNELS = 64


def inventory_digest(topology: Topology) -> str:
    """Names what a host is made of."""
    text = json.dumps(topology.to_dict(), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class Link:
    """Keeps an agent connected. ``random`` spreads reconnects; ``version`` is the agent's."""

    def __init__(
        self, agent: Agent, transport: Transport, now: Callable[[], float], random: Random, version: str = ""
    ) -> None:
        self._agent = agent
        self._transport = transport
        self._now = now
        self._random = random
        self._version = version
        self._window_s = WINDOW_S
        self._channels: set[asyncio.Task[None]] = set()
        self._digest = ""
        self._topology: Topology | None = None
        self._failures = 0
        self.connected = False
        #: What this host tells for a support bundle.
        self.support: HostSupport | None = None
        #: Keeps places of the manager's audit chain.
        self.witness: Witness | None = None

    async def run(self) -> None:
        """Until cancelled; says good-bye then."""
        try:
            while True:
                retry_s = await self._one_session()
                await asyncio.sleep(retry_s)
        finally:
            for task in self._channels:
                task.cancel()
            await asyncio.gather(*self._channels, return_exceptions=True)
            await self._transport.close()

    async def _one_session(self) -> float:
        """One session from dial to end; seconds to wait before the next."""
        stream: Stream[FromHost, ToHost] | None = None
        try:
            await self._ready()
            end = HostEnd(await self._hello(), self._agent.feed.outbox)
            stream = await self._transport.session()
            refused = await self._converse(end, stream)
        except CasemateError as error:
            # the first time is news; that the manager is still away is not
            log.log(logging.DEBUG if self._failures else logging.WARNING, "session ended: %s", error)
            refused = None
        finally:
            self.connected = False
            if stream is not None:
                await stream.close()
        if refused is not None:
            log.warning("the manager refuses this session: %s: %s", refused.reason, refused.message)
            if refused.retry_after_s < 0:
                return FORBIDDEN_S
            return refused.retry_after_s + self._random.uniform(0, self._window_s)
        window_s = max(self._window_s, min(LONGEST_WINDOW_S, self._window_s * 2.0 ** min(self._failures, 8)))
        self._failures += 1
        return self._random.uniform(0, window_s)

    async def _ready(self) -> None:
        """Until the agent has something whole to tell."""
        feed = self._agent.feed
        while not feed.whole:
            feed.news.clear()
            await feed.news.wait()

    def _take_inventory(self, machine: MachineFacts) -> bool:
        """Name the inventory as it is now; whether it is another one than before."""
        if self._topology == machine.topology:
            return False
        before, self._topology = self._digest, machine.topology
        self._digest = inventory_digest(machine.topology)
        return self._digest != before

    async def _hello(self) -> Hello:
        agent = self._agent
        machine = agent.machine
        assert machine is not None  # a whole observation has it
        self._take_inventory(machine)
        session = await agent.ledger.next_session(self._now())
        host = agent.ledger.host
        return Hello(
            host=agent.name,
            boot_id=machine.boot_id,
            epoch=host.epoch,
            revision=host.revision if host.complete else 0,
            inventory_digest=self._digest,
            session=session,
            agent_version=self._version,
            kernel=machine.kernel,
            virtualisation=agent.virtualisation,
        )

    async def _converse(self, end: HostEnd, stream: Stream[FromHost, ToHost]) -> Refused | None:
        """Both directions until either ends."""
        self._agent.resync.clear()
        receiver = asyncio.create_task(self._receive(end, stream), name="session-receive")
        sender = asyncio.create_task(self._send(end, stream), name="session-send")
        try:
            await asyncio.wait({receiver, sender}, return_when=asyncio.FIRST_COMPLETED)
            if receiver.done():
                return receiver.result()
            sender.result()
            return None
        except asyncio.CancelledError:
            # the agent ends: leave on purpose, so that the manager knows at once
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            end.bye("agent stops")
            with contextlib.suppress(CasemateError, TimeoutError):  # the manager notices by itself, only later
                async with asyncio.timeout(1.0):
                    await self._flush(end, stream)
            raise
        finally:
            receiver.cancel()
            sender.cancel()
            await asyncio.gather(receiver, sender, return_exceptions=True)

    async def _flush(self, end: HostEnd, stream: Stream[FromHost, ToHost]) -> None:
        for message in end.take():
            await stream.send(message)

    async def _send(self, end: HostEnd, stream: Stream[FromHost, ToHost]) -> None:
        feed = self._agent.feed
        loop = asyncio.get_running_loop()
        sent_s = -inf
        while True:
            # What follows closely on the last goes up together: the first word is told at once, a crowd in one message.
            if (wait_s := sent_s + GATHER_S - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            feed.news.clear()
            machine = self._agent.machine
            if self.connected and machine is not None and self._take_inventory(machine):
                end.tell_inventory(Inventory(self._digest, machine.topology))
            states, gone, report = feed.take()
            end.changed(states, gone, report)
            await self._flush(end, stream)
            if self._agent.resync.is_set():
                end.bye("the ledger lost something; the whole state is needed")
                await self._flush(end, stream)
                return
            sent_s = loop.time()
            await feed.news.wait()

    async def _receive(self, end: HostEnd, stream: Stream[FromHost, ToHost]) -> Refused | None:
        agent, feed = self._agent, self._agent.feed
        while (message := await stream.receive()) is not None:
            value = end.receive(message)
            match value:
                case Welcome():
                    self._window_s = max(0.1, value.reconnect_window_s)
                    self.connected = True
                    self._failures = 0
                    log.info("session open, epoch %d, resumed from revision %d", value.epoch, value.since)
                    if value.send_inventory and self._topology is not None:
                        end.tell_inventory(Inventory(self._digest, self._topology))
                    feed.take()  # all of it is in what follows
                    end.whole(feed.states.values(), feed.report)
                case Desired():
                    await agent.accept(value)
                    end.persisted(value.revision)
                    end.consumed()
                case Checkpoint():
                    await self._keep(value)
                case OpenChannel():
                    self._open_channel(value)
                    end.consumed()
                case Operate():
                    feed.note(
                        Outcome(
                            value.operation,
                            value.instance,
                            "Failed",
                            "Unsupported",
                            f"{value.verb} is not an operation",
                        )
                    )
                    end.consumed()
                case Refused():
                    return value
                case None:
                    pass
            feed.news.set()
        raise BrokenOff("the manager closed the session")

    async def _keep(self, checkpoint: Checkpoint) -> None:
        """Witness a place of the manager's audit chain. Where the disk does not take it, the session goes on without."""
        if self.witness is None:
            return
        try:
            await self.witness.take(checkpoint)
        except OSError as error:
            log.error("record %d of the audit chain is not witnessed: %s", checkpoint.sequence, error)
        self._agent.doubt = self.witness.doubt
        self._agent.wake()

    def _open_channel(self, request: OpenChannel) -> None:
        if len(self._channels) >= MOST_CHANNELS:
            log.warning("a channel of kind %s is not served: %d are open", request.kind, len(self._channels))
            request = replace(request, kind=TOO_MANY)  # dialled all the same, so that the caller is told
        task = asyncio.create_task(self._channel(request), name=f"channel-{request.kind}")
        self._channels.add(task)
        task.add_done_callback(self._channels.discard)

    async def _channel(self, request: OpenChannel) -> None:
        try:
            stream = await self._transport.channel()
            try:
                await serve_channel(request, stream, self._agent.drivers, self.support, self.witness)
            finally:
                await stream.close()
        except CallerError as error:
            log.info("channel of kind %s ended: %s", request.kind, error)
        except CasemateError as error:
            log.info("channel of kind %s broke off: %s", request.kind, error)
