"""`casemate ssh`: the system's ssh, through a forwarded port, with a key that is let in on the way."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casemate_cli import completing, options
from casemate_cli.failure import Exit, Failure
from casemate_cli.pipes import Outbox
from casemate_cli.settings import Settings
from casemate_cli.verbs.logs import parse_name

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

#: An emulated guest makes its host key when it is first asked for, and takes so long at most.
HOST_KEY_S = 90.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", metavar="ENVIRONMENT|INSTANCE", shell_complete=completing.names_of("Environment", "Instance"))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- SSH_OPTION|COMMAND...]")
@click.option("-i", "--identity", type=click.Path(path_type=Path), metavar="FILE", help="Private key to use.")
@options.connection
@click.pass_context
def ssh(ctx: click.Context, name: str, command: tuple[str, ...], identity: Path | None) -> int:
    """Log in to an instance as root by SSH.

    Runs the system's ssh through a forwarded port: the instance needs no network that you reach. The key is -i's, else one
    of ~/.ssh that the environment lists in its sshKeys, else one that this program makes for itself; it is let in through
    the guest's helper. The instance's host keys come the same way, so there is nothing to trust at first sight.

    \b
    Examples:
      casemate ssh hello
      casemate ssh hello-0 -- uname -a
      casemate ssh hello -- -L 8080:127.0.0.1:8080 -N
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

    if name.startswith("-"):  # ssh's own options are let through, behind the name
        raise click.NoSuchOption(name, ctx=ctx)
    program = shutil.which("ssh")
    if program is None:
        raise Failure("there is no ssh on this machine", remedy="install openssh-client, or use casemate exec -it --vm")
    instance, pod = parse_name(name)
    if pod:
        raise Failure(f"{name!r} is a pod", remedy=f"write casemate ssh {instance}, or casemate exec -it {name} -- sh")
    settings = options.settings(ctx)
    target = pb.ChannelTarget(tenant=settings.tenant, instance=instance)
    with Client(settings) as client:
        key = _key(client, instance, identity)
        known = _let_in(client, target, key)
    arguments = [program, *_options(settings, instance, key, known)]
    argv = list(command)
    while argv and argv[0].startswith("-"):  # ssh's own options go before the host
        takes = len(argv[0]) == 2 and argv[0][1] in "BbcDEeFIiJLlmOopQRSWw"
        arguments += argv[: 1 + takes]
        argv = argv[1 + takes :]
    sys.stdout.flush()
    os.execv(program, [*arguments, f"casemate-{known.uid}", *argv])


@dataclass(frozen=True, slots=True)
class _Known:
    """How the instance is known: its uid, and the file of its host keys."""

    uid: str
    path: Path


def _folder() -> Path:
    """``${XDG_STATE_HOME:-~/.local/state}/casemate/ssh``, ours alone."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "casemate" / "ssh"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(client: "Client", instance: str, identity: Path | None) -> Path:
    """The private key to use."""
    if identity is not None:
        if not identity.with_name(identity.name + ".pub").is_file() or not identity.is_file():
            raise Failure(
                f"{identity} or {identity}.pub is not there", code=Exit.NOT_FOUND, remedy="make it: ssh-keygen"
            )
        return identity
    listed = {" ".join(line.split()[:2]) for line in _listed(client, instance)}
    for public in sorted((Path.home() / ".ssh").glob("*.pub")):
        if public.with_suffix("").is_file() and " ".join(public.read_text(errors="replace").split()[:2]) in listed:
            return public.with_suffix("")
    own = _folder() / "id_ed25519"
    if not own.is_file():
        maker = shutil.which("ssh-keygen")
        if maker is None:
            raise Failure(
                "there is no ssh-keygen on this machine", remedy="install openssh-client, or name a key with -i"
            )
        # Made aside and renamed, so that two that begin at once both find a whole one.
        fresh = own.with_name(f"fresh-{os.getpid()}")
        subprocess.run([maker, "-q", "-t", "ed25519", "-N", "", "-C", "casemate", "-f", str(fresh)], check=True)
        fresh.with_name(fresh.name + ".pub").replace(own.with_name("id_ed25519.pub"))
        fresh.replace(own)
    return own


def _listed(client: "Client", name: str) -> list[str]:
    """Keys that the environment lists."""
    tenant = client.settings.tenant
    try:
        environment = client.get("Instance", name, tenant).instance.spec.environment
    except Failure as missing:
        if missing.code is not Exit.NOT_FOUND:
            raise
        environment = name
    return list(client.get("Environment", environment, tenant).environment.spec.ssh_keys)


def _let_in(client: "Client", target: "pb.ChannelTarget", key: Path) -> _Known:
    """Let the key in, and learn the host keys; an instance that nobody logged in to yet makes its own first."""
    from casemate_wire.v1 import channels_pb2 as pb

    public = key.with_name(key.name + ".pub").read_text().strip()
    give_up_s = time.monotonic() + HOST_KEY_S
    while True:
        answer = client.call(_admitted(client), pb.AuthorizeRequest(target=target, public_key=public))
        if answer.host_keys or time.monotonic() > give_up_s:
            break
        try:
            _knock(client, target)
        except Failure as refused:  # the guest still boots: its pods are ready before its SSH server is
            if refused.code is not Exit.CONFLICT or time.monotonic() > give_up_s:
                raise
            time.sleep(1.0)
    path = _folder() / f"known-{answer.instance_uid}"
    lines = "".join(f"casemate-{answer.instance_uid} {line}\n" for line in answer.host_keys)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(lines)
    fresh.replace(path)
    if not answer.host_keys:
        raise Failure(
            "the instance has no SSH host keys",
            remedy="does its image have an SSH server? casemate exec -it --vm needs none",
        )
    return _Known(answer.instance_uid, path)


def _admitted(client: "Client") -> "Callable[..., pb.AuthorizeResponse]":
    """The call that lets a key in; each try shows a ticket of its own."""
    authorize = client.channels.Authorize

    def call(request: "pb.AuthorizeRequest", timeout: float) -> "pb.AuthorizeResponse":
        request.target.ticket = client.ticket("authorize", request.target.tenant, request.target.instance)
        return authorize(request, timeout=timeout)

    return call


def _knock(client: "Client", target: "pb.ChannelTarget") -> None:
    """Connect once, as the first who logs in would: it starts the server. Raises Failure where nobody listens."""
    from casemate_wire.v1 import channels_pb2 as pb

    start = pb.ForwardInput(start=pb.ForwardStart(target=target, port=22))
    start.start.target.ticket = client.ticket("forward", target.tenant, target.instance)
    outbox = Outbox(start)
    try:
        for output in client.stream(client.channels.Forward, iter(outbox), timeout_s=HOST_KEY_S):
            if output.WhichOneof("output") in ("data", "closed"):
                return
    finally:
        outbox.end()


def _options(settings: Settings, instance: str, key: Path, known: _Known) -> list[str]:
    proxy = [sys.executable, "-m", "casemate_cli", "port-forward", "--stdio", instance, "22"]
    proxy += ["--manager", settings.manager, "--tenant", settings.tenant]
    told = {
        # A per cent sign would be read by ssh.
        "ProxyCommand": shlex.join(proxy).replace("%", "%%"),
        "HostKeyAlias": f"casemate-{known.uid}",
        "UserKnownHostsFile": str(known.path),
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "IdentityFile": str(key),
        "User": "root",
    }
    return [word for name, value in told.items() for word in ("-o", f"{name}={value}")]
