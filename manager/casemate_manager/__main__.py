"""The manager's process: the one place that picks a real store, clock and randomness.

``casemate-manager serve`` is a plain foreground process. It ends cleanly on SIGTERM and SIGINT.
"""

import asyncio
import fcntl
import gc
import importlib
import logging
import os
import resource
import secrets
import signal
import sys
import time
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from casemate_core.errors import CasemateError
from casemate_manager.config import BadConfig, Config, load

if TYPE_CHECKING:
    from casemate_manager.tokens import Oidc

log = logging.getLogger("casemate.manager")

#: File of the state folder that says where metrics are served.
METRICS_NOTE = "metrics-url"
#: Folder of the authorities' keys, inside the state folder.
AUTHORITIES = "authorities"
#: Exit codes: what was asked has no meaning, or the machine does not do it.
USAGE, FAILED = 2, 1


class LazyGroup(click.Group):
    """Verbs whose modules are imported when they are asked for."""

    lazy: ClassVar = {"simulate": ("casemate_manager.simulation.cli", "simulate")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self.lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, name = self.lazy[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=LazyGroup)
@click.version_option(installed("casemate"), prog_name="casemate-manager")
def main() -> None:
    """The manager of a Casemate fleet."""


@main.command()
@click.option("--config", default="", metavar="FILE", help="Settings as TOML; flags go before them.")
@click.option("--state-dir", metavar="DIR", help="Folder of the store.  [default: /var/lib/casemate-manager]")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen.  [default: 127.0.0.1:7443]")
@click.option(
    "--listen-enrolment", metavar="HOST:PORT", help="Where machines join the fleet.  [default: the port after --listen]"
)
@click.option(
    "--names", metavar="NAMES", help="Names and addresses for the certificate, beside the one that agents check."
)
@click.option(
    "--insecure-loopback",
    is_flag=True,
    default=None,
    help="Plain text, without identities, on loopback only: for development.",
)
@click.option(
    "--default-subnet",
    metavar="CIDR",
    help="Subnet of the network 'default', made at the first start; empty: none.  [default: 10.99.0.0/16]",
)
@click.option(
    "--metrics-listen", metavar="HOST:PORT", help="Serve Prometheus metrics there; loopback only.  [default: off]"
)
@click.option("--log-format", type=click.Choice(["console", "json"]), help="Form of log lines.  [default: console]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
def serve(config: str, **flags: Any) -> None:
    """Serve the fleet until SIGTERM."""
    from casemate_manager.logs import set_up

    try:
        settings = load(config, flags)
    except BadConfig as error:
        raise click.UsageError(str(error)) from error
    set_up(settings.log_format, settings.log_level)
    try:
        asyncio.run(_serve(settings))
    except CasemateError as error:
        log.error("%s", error)
        sys.exit(FAILED)


@main.command()
@click.argument("name", default="admin")
@click.option(
    "--state-dir", metavar="DIR", default=Config().state_dir, show_default=True, help="Folder of the manager."
)
@click.option(
    "--manager", metavar="HOST:PORT", default="127.0.0.1:7443", show_default=True, help="Address to write down."
)
@click.option("--out", metavar="FILE", required=True, help="File of contexts to write, for CASEMATE_CONFIG; mode 0600.")
@click.option("--days", type=click.IntRange(1, 365), default=90, show_default=True, help="Life of the certificate.")
def operator(name: str, state_dir: str, manager: str, out: str, days: int) -> None:
    """Make a user's certificate with the keys in the manager's folder.

    For the first operator of a fleet, and for one who has lost his: who reads that folder is the fleet's owner. NAME is the
    user's (admin where none is given). The manager need not run.
    """
    from casemate_manager.operator import write_context

    try:
        write_context(Path(state_dir) / AUTHORITIES, name, manager, Path(out), days, time.time())
    except CasemateError as error:
        click.echo(f"casemate-manager: {error}", err=True)
        sys.exit(FAILED)
    click.echo(f"certificate of user {name} for {days} days in {out}", err=True)


async def _serve(settings: Config) -> None:
    from casemate_manager import keyring
    from casemate_manager.api.tls import ServerTls
    from casemate_manager.app import running
    from casemate_manager.authority import Authorities
    from casemate_manager.store.sqlite import SqliteStore
    from casemate_wire import coredump
    from casemate_wire.notify import Notifier

    state_dir = Path(settings.state_dir)
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _allow_descriptors()
    coredump.forbid()
    lock = _lock(state_dir / "manager.lock")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tls = None
    if not settings.insecure_loopback:
        authorities = Authorities(state_dir / AUTHORITIES, time.time())
        tls = ServerTls(authorities, filter(None, settings.names.split(",")), time.time)
    try:
        async with running(
            SqliteStore(state_dir / "fleet.db"),
            settings.listen,
            time.time,
            lambda: secrets.token_hex(16),
            version=installed("casemate"),
            default_subnet=settings.default_subnet,
            metrics_listen=settings.metrics_listen,
            metrics_note=state_dir / METRICS_NOTE,
            keyring=keyring.load(Path(settings.key_file) if settings.key_file else state_dir / "manager.key"),
            oidc=_oidc(settings),
            tls=tls,
            listen_enrolment=settings.listen_enrolment,
        ) as manager:
            gc.freeze()  # what was loaded lives as long as the process: no collector need look at it
            log.info(
                "epoch %d, revision %d, listening on %s",
                manager.writer.epoch,
                manager.writer.state.revision,
                f"{settings.listen.rpartition(':')[0]}:{manager.port}"
                + (f"; machines join on port {manager.enrolment_port}" if tls else ", in plain text"),
            )
            notifier = Notifier()
            notifier.ready(f"epoch {manager.writer.epoch}")
            waits = [asyncio.create_task(stop.wait()), asyncio.create_task(manager.failed.wait())]
            feeding = asyncio.create_task(notifier.feed(lambda: manager.writer.rounds), name="watchdog")
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                notifier.stopping()
                feeding.cancel()
                for wait in waits:
                    wait.cancel()
            log.info("stopping")
    finally:
        os.close(lock)


def _oidc(settings: Config) -> "Oidc | None":
    if not settings.oidc_issuer:
        return None
    from casemate_manager.fetching import fetch_json
    from casemate_manager.tokens import Oidc, OidcConfig

    config = OidcConfig(
        settings.oidc_issuer,
        settings.oidc_audience,
        settings.oidc_username_claim,
        settings.oidc_groups_claim,
        settings.oidc_prefix,
    )
    return Oidc(config, fetch_json)


def _allow_descriptors() -> None:
    """As many descriptors as this process may have: each host's stream takes one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError) as error:
        log.warning("the limit of descriptors stays as it is: %s", error)


def _lock(path: Path) -> int:
    """Hold the state folder for this process. Raises BadConfig where another manager has it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BadConfig(f"another manager runs on {path.parent}") from error
    return descriptor


if __name__ == "__main__":
    main()
