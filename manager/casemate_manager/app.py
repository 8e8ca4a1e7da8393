"""A whole manager in one object: store, writer, sessions and services, joined; time and randomness are given.

The composition is here and not in ``__main__`` so that tests and the simulator run the very same manager.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc

from casemate_core.spec.fleet import Network, NetworkSpec
from casemate_core.spec.meta import Meta
from casemate_manager.access import Denied, Hidden
from casemate_manager.api import server, side
from casemate_manager.api.audits import AuditService, Scribe, SessionScribe
from casemate_manager.api.channels import ChannelsService
from casemate_manager.api.enrolment import Joining
from casemate_manager.api.feed import Feed
from casemate_manager.api.gate import Authenticate, ByTokenOrCertificate, Gate, actor, ticket_id
from casemate_manager.api.gpus import GpusService
from casemate_manager.api.hostcare import HostCareService
from casemate_manager.api.hostlink import Channels, HostLink
from casemate_manager.api.identities import IdentityService
from casemate_manager.api.metrics import ManagerMetrics
from casemate_manager.api.service import FleetService
from casemate_manager.api.support import SupportService
from casemate_manager.api.timing import Timing
from casemate_manager.api.tls import ServerTls
from casemate_manager.api.why import PlacerWhy
from casemate_manager.fleet.acts import Actor, By
from casemate_manager.fleet.commands import Answer, ApplyResources, Command
from casemate_manager.fleet.machine import Rules
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.placing import Placer
from casemate_manager.fleet.references import ObjectRules
from casemate_manager.fleet.state import State
from casemate_manager.keyring import Keyring
from casemate_manager.movecerts import MoveAuthority
from casemate_manager.notary import EVERY_S, sign_on
from casemate_manager.policy.cel import Cel
from casemate_manager.policy.expressions import check_policy
from casemate_manager.scheduler.placer import FleetPlacer
from casemate_manager.sessions import Sessions
from casemate_manager.store.ports import Store
from casemate_manager.tickets import Tickets
from casemate_manager.tokens import Bearers, Oidc, ShortTokens
from casemate_manager.vault import Vault
from casemate_manager.writer import Published, Writer
from casemate_wire import exposition
from casemate_wire.diff import changes
from casemate_wire.signing import Notary

#: Who administers the platform without a role binding: the first operator, whose certificate the manager writes.
ADMINS: Final = frozenset({"admin"})
#: Streams get so long to end when the manager stops.
GRACE_S: Final = 2.0
FIRST_START_KEY: Final = "casemate-first-start"


class Core:
    """What the operators' service sees of the manager."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.scribe = Scribe(writer)
        self.feed = Feed(writer.state)
        writer.subscribe(self._published)

    @property
    def state(self) -> State:
        """Committed records."""
        return self._writer.state

    @property
    def observed(self) -> Observed:
        """What hosts said."""
        return self._writer.observed

    def sessions_of(self, by: Actor) -> side.SessionLog:
        """Writes down the sessions of one caller."""
        return SessionScribe(self.scribe, by, ticket_id())

    async def submit(self, command: Command) -> Answer:
        """Carry a command out, in the name of who makes the present call; returns after its commit."""
        by = actor()
        if by is None:
            return await self._writer.submit(command)
        try:
            return await self._writer.submit(By(by, command))
        except (Denied, Hidden) as error:
            await self.scribe.denied(by, type(command).__name__, error)
            raise

    def _published(self, published: Published) -> None:
        if published.reset:
            self.feed.reset(published.state)
        self.feed.publish(published.batches, published.born)


def make_rules(placer: Placer | None = None, admins: frozenset[str] = ADMINS) -> Rules:
    """How objects are judged and placed."""
    language = Cel()
    judge = ObjectRules(changes, lambda policy: check_policy(language, policy))
    return Rules(judge, placer or FleetPlacer(language), admins)


class Manager:
    """A manager that runs. Made by `running`."""

    def __init__(
        self,
        writer: Writer,
        core: Core,
        sessions: Sessions,
        grpc_server: grpc.aio.Server,
        port: int,
        enrolment_port: int,
        metrics: ManagerMetrics,
    ) -> None:
        self.writer = writer
        self.core = core
        self.sessions = sessions
        self.server = grpc_server
        #: The port that it listens on.
        self.port = port
        self.metrics = metrics
        #: Where metrics are served; empty: nowhere.
        self.metrics_url = ""
        #: The port at which machines enrol; 0 without TLS.
        self.enrolment_port = enrolment_port
        #: Set when it must end, for another manager leads or the writer failed.
        self.failed = asyncio.Event()


def _sealing_of(writer: Writer, host: str) -> bytes:
    """The key that root at a host has enrolled."""
    enrolment = writer.state.enrolments.get(host)
    return bytes.fromhex(enrolment.sealing) if enrolment is not None else b""


@asynccontextmanager
async def running(
    store: Store,
    listen: str,
    clock: Callable[[], float],
    seed: Callable[[], str],
    *,
    version: str,
    default_subnet: str = "",
    rules: Rules | None = None,
    authenticate: Authenticate | None = None,
    metrics_listen: str = "",
    metrics_note: Path | None = None,
    keyring: Keyring | None = None,
    oidc: Oidc | None = None,
    tls: ServerTls | None = None,
    listen_enrolment: str = "127.0.0.1:0",
    trace: Callable[[str], None] = lambda step: None,
    sign_every_s: float = EVERY_S,
) -> AsyncIterator[Manager]:
    """Run a manager while the context is open. Raises what opening the store and the port raise.

    Without ``tls`` it speaks plain text, on loopback only.
    """
    if tls is None:
        server.check_loopback(listen)
    rules = rules or make_rules()
    writer = Writer(store, rules, clock, seed, trace=trace)
    await writer.open()
    core = Core(writer)
    ring = keyring or Keyring.fresh()
    vault = Vault(ring)
    sessions = Sessions(writer, seed, reveal=vault.revealed)
    work = asyncio.create_task(writer.run(), name="writer")
    try:
        vault.check(writer.state.secrets.values())
        if default_subnet and writer.state.revision == 0:
            network = Network(Meta("default"), NetworkSpec("nat", default_subnet))
            await writer.submit(ApplyResources(FIRST_START_KEY, (network,), seed()))
        channels, why = Channels(sessions), PlacerWhy(rules.placer)
        service = FleetService(core, channels, why, version, seed, vault.seal)
        tickets = Tickets(clock)
        sides = ChannelsService(core, channels, tickets)
        short = ShortTokens(ring.key("tokens"))
        bearers = Bearers(lambda: writer.state, short, clock, oidc)
        identity = IdentityService(core, short, ring.key("access-keys"), clock)
        known = authenticate or ByTokenOrCertificate(bearers.read, clock)
        gate = Gate(lambda: writer.state, known, core.scribe.denied, clock, seed, rules.admins, tickets=tickets)
        notary = Notary(ring.key("audit-checkpoints"))
        audit = AuditService(writer, lambda: core.feed, notary.public, channels, lambda: sessions.hosts)
        joining = Joining(core.submit, lambda: writer.state, tls, clock, seed) if tls is not None else None
        metrics = ManagerMetrics(writer, sessions, core.feed, version)
        ending = [
            asyncio.create_task(gate.end_what_may_no_more(), name="gate-recheck"),
            asyncio.create_task(sessions.end_what_has_expired(clock), name="host-expiry"),
        ]
        signing = asyncio.create_task(sign_on(writer, notary, sessions.witness, clock, sign_every_s), name="notary")
        gpus = GpusService(core.submit, seed)
        support = SupportService(writer, channels, metrics, version)
        care = HostCareService(core, channels, core.scribe)
        gates = Timing(lambda: writer.meter, time.monotonic), gate
        grpc_server, port = await server.serve(
            listen,
            service,
            sides,
            HostLink(sessions, MoveAuthority(lambda: writer.state, clock), tls, lambda host: _sealing_of(writer, host)),
            support,
            care,
            gates,
            audit,
            identity,
            gpus,
            joining,
            listen_enrolment,
        )
        warming = asyncio.create_task(why.keep_warm(lambda: (core.state, core.observed)), name="why-warm")
        manager = Manager(writer, core, sessions, grpc_server, port, joining.enrolment_port if joining else 0, metrics)
        work.add_done_callback(lambda _: manager.failed.set())
        try:
            async with exposition.noted(metrics_listen, metrics.rows, metrics_note) as manager.metrics_url:
                yield manager
        finally:
            warming.cancel()
            for task in (signing, *ending):
                task.cancel()
            await asyncio.gather(warming, signing, *ending, return_exceptions=True)
            sessions.close("the manager stops")
            await grpc_server.stop(GRACE_S)
    finally:
        work.cancel()
        result = await asyncio.gather(work, return_exceptions=True)
        await writer.close()
        if isinstance(result[0], Exception):
            raise result[0]
