"""The agent's process: the one place that picks real drivers.

``casemate-agent run`` is a plain foreground process. It ends cleanly on SIGTERM and SIGINT, and leaves every VM running.
With ``--relay`` it has no network: ``casemate-agent relay``, as another user, has it in its place. ``casemate-agent join`` makes
this machine a host, once. ``casemate-agent doctor`` says what the machine lacks.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from random import Random

from casemate_agent.agent import Agent
from casemate_agent.config import BadConfig, Config, load
from casemate_agent.doctor import command as doctor
from casemate_agent.drivers.passageports import Certify, Ends
from casemate_agent.drivers.ports import Drivers
from casemate_agent.enrolment import enrol
from casemate_agent.enrolment import identity as identities
from casemate_agent.enrolment.renewal import Renewal
from casemate_agent.fsck import command as fsck
from casemate_agent.ledger import witness
from casemate_agent.ledger.files import Files, MeasuredFiles
from casemate_agent.ledger.store import Ledger, Offload, Threaded
from casemate_agent.ledger.witness import Witness, chain_broken
from casemate_agent.logs import set_up
from casemate_agent.metrics.families import FAMILIES, LEDGER_FAILED, LEDGER_S
from casemate_agent.metrics.scrape import AgentMetrics
from casemate_agent.plan.converge import Settings
from casemate_agent.relay import trust
from casemate_agent.relay.pipe import SOCKET, USER, Relay, uid_of
from casemate_agent.uplink.link import Link
from casemate_agent.uplink.support import HostSupport
from casemate_agent.uplink.transport import GrpcTransport, Transport, checked_address
from casemate_core.errors import CallerError, CasemateError, MachineError, Unavailable, shown
from casemate_core.metrics import Meter, Rows, with_label
from casemate_core.spec.meta import NAME
from casemate_wire import coredump, exposition
from casemate_wire.notify import Notifier
from casemate_wire.token import Token, parse

log = logging.getLogger("casemate.agent")

#: File of the state folder that says where metrics are served.
METRICS_NOTE = "metrics-url"
#: Folder of the host's identity, inside the state folder.
IDENTITY = "identity"
#: File of the state folder that keeps the host's name, where the identity is the relay's.
HOST = "host"
#: State folder of the relay.
RELAY_STATE = "/var/lib/casemate-relay"
#: Simulated hosts that join at the same time.
JOINING = 8
CONFIG_HELP = "TOML file with settings, which flags go before; it may be missing where - stands before its path"
#: Characters that are read of standard input, for tokens.
MOST_TOKENS = 1 << 22


def version() -> str:
    """Of the installed package."""
    from importlib.metadata import version as installed

    return installed("casemate")


@contextlib.asynccontextmanager
async def drivers_of(config: Config, name: str, meter: Meter, certify: Certify) -> AsyncIterator[Drivers]:
    """This machine's drivers, or a whole host in memory."""
    if not config.simulated:
        from casemate_agent.machine import real_drivers  # libvirt and pyroute2, only where they are used

        async with real_drivers(config, meter, certify) as drivers:
            yield drivers
        return
    from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
    from casemate_core.topology_loaders import from_line

    # Identities of its parts follow from its name: hosts of one line have parts of their own.
    words = [word for word in config.simulated.split() if not word.startswith("name=")]
    topology = from_line(" ".join((*words, f"name={name}")))
    pace = SimulatedPace(boot_s=config.boot_s, pod_start_s=config.boot_s / 2)
    host = SimulatedHost(name, topology, time.time, pace)
    host.boots = int(time.time())  # it ends with this process: the next one is another boot
    yield host.drivers()


async def run_host(
    config: Config, name: str, state_dir: Path, scraped: dict[str, AgentMetrics], agents: dict[str, Agent]
) -> None:
    """One host's agent and its link, until cancelled. Its metrics are in ``scraped`` meanwhile, itself in ``agents``."""
    meter = Meter.of(FAMILIES)

    loop = asyncio.get_running_loop()

    def synced(took_s: float, failed: bool) -> None:
        """In the ledger's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads it any more
            if failed:
                loop.call_soon_threadsafe(meter.add, LEDGER_FAILED)
            else:
                loop.call_soon_threadsafe(meter.observe, LEDGER_S, took_s)

    with contextlib.closing(Threaded()) as thread:
        files = MeasuredFiles(state_dir / "ledger", synced)
        ledger = await Ledger.load(files, thread)
        await _run_agent(config, name, ledger, (files, thread), state_dir / IDENTITY, meter, scraped, agents)


def _relay(config: Config) -> Relay:
    believed = None if config.insecure_loopback else trust.Trust(Path(config.state_dir), time.time)
    return Relay(Path(config.relay), uid_of(config.relay_user), believed)


def _way(config: Config, name: str, folder: Path, group: asyncio.TaskGroup) -> Transport | None:
    """How the manager is dialled; None where there is none."""
    if config.relay:
        return _relay(config)
    identity = None if config.insecure_loopback else identities.load(folder)
    if identity is None:
        return GrpcTransport(config.manager) if config.manager else None
    if identity.host != name:
        raise BadConfig(f"name: this host joined its fleet as {identity.host}, not as {name}")

    async def save(fresh: identities.Identity) -> None:
        await asyncio.to_thread(identities.save, folder, fresh)

    renewal = Renewal(identity, enrol.renew, save, time.time, Random())
    group.create_task(renewal.run(), name=f"renewal-{identity.host}")
    return GrpcTransport(identity.manager, renewal.current)


async def _run_agent(
    config: Config,
    name: str,
    ledger: Ledger,
    disk: tuple[Files, Offload],
    folder: Path,
    meter: Meter,
    scraped: dict[str, AgentMetrics],
    agents: dict[str, Agent],
) -> None:
    ways: list[Transport] = []

    async def certify(migration: str, request: bytes) -> Ends:
        for way in ways:
            if isinstance(way, GrpcTransport):
                return await way.certify(name, migration, request)
        raise Unavailable("no manager is known that signs for migrations")

    async with drivers_of(config, name, meter, certify) as drivers, asyncio.TaskGroup() as group:
        settings = Settings(
            config.stop_grace_s,
            repair_affinities=config.affinity_drift == "repair",
            repair_pages=config.page_drift == "repair",
            realtime=config.realtime,
            gpu=config.gpu,
        )
        agent = Agent(name, drivers, ledger, time.time, settings, concurrency=config.concurrency, meter=meter)
        group.create_task(agent.run(), name=f"agent-{name}")
        link = None
        if (transport := _way(config, name, folder, group)) is not None:
            ways.append(transport)
            link = Link(agent, transport, time.time, Random(), version())
            group.create_task(link.run(), name=f"link-{name}")
        scraped[name] = metrics = AgentMetrics(agent, link, version())
        if link is not None:
            link.support = HostSupport(drivers, ledger, metrics.rows, version())
            link.witness = Witness(*disk, time.time, lambda doubt: agent.note(chain_broken(doubt)))
        agents[name] = agent


async def all_rows(scraped: Mapping[str, AgentMetrics]) -> list[Rows]:
    """Metrics of all hosts of this process; told apart by a label where there are several."""
    found = exposition.process_rows()
    for name, metrics in list(scraped.items()):
        rows = await metrics.rows()
        found += rows if len(scraped) == 1 else with_label(rows, "host", name)
    return found


async def run(config: Config) -> None:
    """All hosts of this process, until SIGTERM or SIGINT."""
    if config.manager:
        checked_address(config.manager)
    state_dir = Path(config.state_dir)
    state_dir.mkdir(parents=True, exist_ok=True)
    name = config.name or await _joined_name(config, state_dir)
    names = [name] if config.hosts == 1 else [f"{name}-{number}" for number in range(1, config.hosts + 1)]
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    scraped: dict[str, AgentMetrics] = {}
    agents: dict[str, Agent] = {}
    hosts = []
    for name in names:
        where = state_dir if config.hosts == 1 else state_dir / name
        hosts.append(asyncio.create_task(run_host(config, name, where, scraped, agents), name=f"host-{name}"))
    log.info("casemate-agent %s: %s", version(), ", ".join(names[:8]) + (" …" if len(names) > 8 else ""))
    stopping = asyncio.create_task(stop.wait(), name="stop")
    telling = asyncio.create_task(_tell(agents, len(names)), name="notify")
    try:
        async with _scraped(config, lambda: all_rows(scraped), state_dir / METRICS_NOTE):
            done, _ = await asyncio.wait({stopping, *hosts}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
    finally:
        Notifier().stopping()
        stopping.cancel()
        for task in (telling, *hosts):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(stopping, telling, *hosts, return_exceptions=True)
    log.info("stopped; instances go on")


async def _tell(agents: Mapping[str, Agent], count: int) -> None:
    """Tell systemd that all hosts have looked around once, and from then on that their rounds go on."""
    notifier = Notifier()
    while len(agents) < count or not all(agent.rounds for agent in agents.values()):  # noqa: ASYNC110 - hosts have no event in common
        await asyncio.sleep(0.2)
    notifier.ready(f"{count} hosts" if count > 1 else next(iter(agents)))
    # The slowest counts: one that hangs is not covered by the others.
    await notifier.feed(lambda: min(agent.rounds for agent in agents.values()))


@contextlib.asynccontextmanager
async def _scraped(config: Config, rows: Callable[[], Awaitable[list[Rows]]], note: Path) -> AsyncIterator[None]:
    """Metrics can be asked for while the context is open: here, or at the relay."""
    if not config.relay:
        async with exposition.noted(config.metrics_listen, rows, note):
            yield
        return

    async def rendered() -> bytes:
        return exposition.rendered(await rows())

    task = asyncio.create_task(_relay(config).be_scraped(rendered, Random()), name="be-scraped")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _joined_name(config: Config, state_dir: Path) -> str:
    """The name under which this host joined. Raises BadConfig, and Unavailable where a relay is not there to be asked."""
    if config.relay:
        pinned = trust.load(state_dir)
        return pinned.host if pinned else await _name_by_relay(_relay(config), state_dir / HOST)
    identity = identities.load(state_dir / IDENTITY)
    if identity is None:
        raise BadConfig("name: this host has not joined a fleet (casemate-agent join); say which host it is (--name)")
    return identity.host


async def _name_by_relay(relay: Relay, kept: Path) -> str:
    """What the relay says, or said when it was last there: what runs here is looked after without it."""
    try:
        name = await relay.host()
    except CasemateError as error:
        if not kept.exists():
            raise Unavailable(f"the relay was never asked which host this is, and is not there: {error}") from error
        return kept.read_text().strip()
    if not NAME.match(name):
        raise BadConfig(
            f"name: the relay says {shown(name)}, which is no name of a host; say which host it is (--name)"
        )
    kept.write_text(name + "\n")
    return name


async def join(address: str, state_dir: Path, words: list[str], *, each: bool, sealing: bytes = b"") -> None:
    """Join by tokens. Raises BadConfig, BadToken, and what `enrol.join` raises."""
    if not words:
        raise BadConfig("no token on standard input: pipe what casemate host token create has printed")
    if len(words) > 1 and not each:
        raise BadConfig("more than one token on standard input: one host joins once")
    places = asyncio.Semaphore(JOINING)

    async def one(token: Token) -> None:
        where = state_dir / token.host if each else state_dir
        async with places:
            identity = await enrol.join(token, address, where / IDENTITY, sealing)
        print(f"joined as host {identity.host}; its manager is {identity.manager}", file=sys.stderr)  # noqa: T201

    ended = await asyncio.gather(*map(one, list(map(parse, words))), return_exceptions=True)
    if failed := [error for error in ended if error is not None]:
        raise failed[0]


def join_as_relay(address: str, words: list[str], state_dir: Path, folder: Path, user: pwd.struct_passwd) -> int:
    """Join in the relay's folder as its user: what is said to the network, and the key, are never root's. What root keeps is the
    pin of the token, in ``state_dir``. The exit code. Raises BadConfig, BadToken, OSError."""
    if len(words) != 1:
        raise BadConfig(f"{len(words)} tokens on standard input: this machine joins by one")
    token = parse(words[0])
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
        os.chown(folder, user.pw_uid, user.pw_gid)
    # gRPC and its threads begin in the child alone.
    arguments = [sys.executable, "-m", "casemate_agent", "join", "--manager", address, "--state-dir", str(folder)]
    arguments += ["--sealing-key", trust.sealing_key(state_dir).public_key().public_bytes_raw().hex()]
    groups: list[int] | None = [] if os.geteuid() == 0 else None  # root alone may change its groups
    done = subprocess.run(
        arguments,
        input=words[0].encode(),
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=groups,
        cwd="/",
        check=False,
    )
    if done.returncode == 0:
        trust.save(state_dir, trust.Trusted(token.host, (token.pin,)))
    return done.returncode if done.returncode >= 0 else 1


def join_here(address: str, given: str | None, words: list[str], *, each: bool, sealing: str) -> int:
    """Join in a folder, or where this machine's agent looks. Raises what joining raises."""
    state_dir = Path(Config().state_dir)
    if given is None and not each:
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(USER)
            if os.geteuid() == 0:
                return join_as_relay(address, words, state_dir, Path(RELAY_STATE), user)
            state_dir = Path(RELAY_STATE)
    try:
        key = bytes.fromhex(sealing)
    except ValueError:
        raise BadConfig("sealing_key: a public key of X25519, 64 hex digits") from None
    asyncio.run(join(address, state_dir if given is None else Path(given), words, each=each, sealing=key))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="casemate-agent", description="Runs the instances of one host.")
    top.add_argument("--version", action="version", version=f"casemate-agent {version()}")
    verbs = top.add_subparsers(dest="verb", required=True)
    run_verb = verbs.add_parser("run", help="run in the foreground")
    run_verb.add_argument("--config", default="", help=CONFIG_HELP)
    run_verb.add_argument("--name", help="name of this host")
    run_verb.add_argument("--manager", help="host:port of a manager on loopback, with --insecure-loopback")
    run_verb.add_argument(
        "--insecure-loopback",
        action="store_true",
        default=None,
        help="dial --manager in plain text, without an identity: for development",
    )
    run_verb.add_argument("--state-dir", help="where the ledger, images and disks are (default /var/lib/casemate)")
    run_verb.add_argument("--run-dir", help="where sockets are (default /run/casemate)")
    run_verb.add_argument("--libvirt-uri", help="libvirt to use (default qemu:///system)")
    run_verb.add_argument(
        "--passage", metavar="ADDRESS[:FIRST-LAST]", help="address (and ports) that other hosts reach for migrations"
    )
    run_verb.add_argument("--moves-dir", help="this process's view of libvirt's /var/lib/libvirt/qemu/casemate")
    run_verb.add_argument("--scope", help="tells several agents of one machine apart (default main)")
    run_verb.add_argument(
        "--image-folder",
        "--image-dir",
        action="append",
        dest="image_folders",
        metavar="DIR",
        help="folder that file:// images may lie in; may be given again (default /var/lib/casemate/library)",
    )
    run_verb.add_argument("--relay", metavar="SOCKET", help="have no network: the relay on this socket has it")
    run_verb.add_argument("--relay-user", help=f"the user that the relay must be (default {USER})")
    run_verb.add_argument("--simulated", metavar="LINE", help='simulate hosts, such as "2s 16k/c 2t 256G"')
    run_verb.add_argument("--hosts", type=int, help="how many simulated hosts")
    run_verb.add_argument("--boot-s", type=float, help="seconds that a simulated guest boots")
    run_verb.add_argument("--stop-grace-s", type=float, help="seconds for a guest to power off before it is ended")
    run_verb.add_argument("--metrics-listen", metavar="HOST:PORT", help="serve Prometheus metrics there, on loopback")
    run_verb.add_argument("--log-format", choices=["console", "json"])
    run_verb.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    relay_verb = verbs.add_parser("relay", help="have the network in the place of an agent that is root")
    relay_verb.add_argument("--config", default="", help=CONFIG_HELP)
    relay_verb.add_argument("--relay", default=SOCKET, metavar="SOCKET", help=f"where to listen (default {SOCKET})")
    relay_verb.add_argument(
        "--state-dir", default=RELAY_STATE, help=f"where the identity is (default {RELAY_STATE}), not the agent's"
    )
    relay_verb.add_argument("--name", help="as for run, with --insecure-loopback")
    relay_verb.add_argument("--manager", help="as for run")
    relay_verb.add_argument("--insecure-loopback", action="store_true", default=None, help="as for run")
    relay_verb.add_argument("--metrics-listen", metavar="HOST:PORT", help="as for run")
    relay_verb.add_argument("--log-format", choices=["console", "json"])
    relay_verb.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    join_verb = verbs.add_parser("join", help="make this machine a host of a fleet, by the token on standard input")
    join_verb.add_argument("--manager", required=True, metavar="HOST:PORT", help="where machines join the fleet")
    join_verb.add_argument(
        "--state-dir",
        help=f"as for run or relay (default {RELAY_STATE}, as user {USER}, where there is that user, else /var/lib/casemate)",
    )
    join_verb.add_argument(
        "--each", action="store_true", help="several tokens, each host in a folder of its own: for simulated hosts"
    )
    join_verb.add_argument(
        "--sealing-key",
        default="",
        metavar="HEX",
        help="what this host is told is encrypted for this X25519 public key",
    )
    trust_verb = verbs.add_parser(
        "trust", help="say which authority vouches for this host's manager, where the host joined before that was kept"
    )
    trust_verb.add_argument("host", metavar="HOST", help="the name under which this host joined")
    trust_verb.add_argument("pin", metavar="PIN", help="the authority's, of casemate ca list --no-trunc")
    trust_verb.add_argument(
        "--state-dir", default=Config().state_dir, help=f"the agent's, not the relay's (default {Config().state_dir})"
    )
    doctor.add_parser(verbs)
    fsck.add_parser(verbs)
    witness.add_parser(verbs)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 ended as asked, 1 error or a host that is not fit, 2 wrong settings."""
    flags = vars(parser().parse_args(arguments))
    verb = flags.pop("verb")
    coredump.forbid()
    try:
        if verb == "doctor":
            return doctor.main(flags)
        if verb == "join":
            words = sys.stdin.read(MOST_TOKENS).split()
            return join_here(
                flags["manager"], flags["state_dir"], words, each=flags["each"], sealing=flags["sealing_key"]
            )
        if verb == "trust":
            trust.save(Path(flags["state_dir"]), trust.checked(flags["host"], flags["pin"]))
            return 0
        if verb == "fsck":
            return fsck.main(flags)
        if verb == "witness":
            return witness.main(flags)
        config = load(flags.pop("config"), flags, needs_name=False)
        set_up(config.log_format, config.log_level)
        if verb == "relay":
            from casemate_agent.relay.server import serve  # gRPC and HTTP, only where they are spoken

            asyncio.run(serve(config))
        else:
            asyncio.run(run(config))
    except CallerError as error:
        print(f"casemate-agent: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (MachineError, OSError) as error:
        print(f"casemate-agent: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except (CasemateError, ExceptionGroup) as error:
        log.error("%s", error, exc_info=error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
