"""`casemate cp`: files and folders to and from a container, or the VM itself."""

import contextlib
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from casemate_cli import options
from casemate_cli.failure import Detail, Exit, Failure
from casemate_cli.pipes import CHUNK
from casemate_cli.verbs.logs import parse_name

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

#: `hello:/etc`, `hello-0.web:/etc`, `env/hello:/etc`; a local name with a colon is written ./like:this.
_REMOTE = re.compile(r"((?:[a-z]+/)?[a-z0-9][a-z0-9.-]*):(.*)\Z", re.DOTALL)
#: Standard input or output, where a file is named.
STANDARD = "-"
NOT_THERE = 4
"""What a copy ends with where there is no such file (channels.proto)."""


@dataclass(frozen=True, slots=True)
class _Side:
    name: str
    path: str


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION")
@click.option("-p", "--pod", default="", metavar="NAME", help="Pod; needed where the instance has several.")
@click.option("-c", "--container", default="", metavar="NAME", help="Container; needed where the pod has several.")
@click.option("--vm", is_flag=True, help="Of the VM itself, of no container.")
@options.connection
@click.pass_context
def cp(ctx: click.Context, source: str, destination: str, pod: str, container: str, vm: bool) -> int:
    """Copy a file or a folder to or from a container, or with --vm the VM itself.

    One side is written NAME:/PATH, NAME being an environment, an instance, or INSTANCE.POD. An existing folder gets the copy
    inside. For one file, - is standard input or output (in a folder it is called stdin). Modes and times are kept. Symbolic
    links and devices within a folder are not copied: each is named on standard error, and the exit code is 1. The container
    needs no tar.

    \b
    Examples:
      casemate cp hello:/etc/hostname .
      casemate cp site/ hello-0.web:/srv/site
      casemate cp --vm hello:/var/log/cloud-init.log boot.log
      casemate cp hello:/etc/hostname -
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

    remote, local, into = _sides(source, destination)
    instance, named_pod = parse_name(remote.name)
    settings = options.settings(ctx)
    target = pb.ChannelTarget(tenant=settings.tenant, instance=instance, pod=pod or named_pod, container=container)
    with Client(settings) as client:
        if not vm and not target.pod:
            target.pod = _only_pod(client, instance)
        if vm:
            target.pod = target.container = ""
        if into and local == STANDARD:
            with _spooled() as file:
                return _into(client, target, Path(file.name), remote.path, name="stdin")
        if into:
            return _into(client, target, Path(local), remote.path, Path(os.path.abspath(local)).name)
        return _out(client, target, remote.path, local)


def _sides(source: str, destination: str) -> tuple[_Side, str, bool]:
    """The remote side, the local path, and whether the copy goes into the instance."""
    found = [_REMOTE.match(text) for text in (source, destination)]
    if (found[0] is None) == (found[1] is None):
        raise Failure(
            "one side must be local and the other NAME:/PATH",
            details=[
                Detail("sides", f"{source} {destination}", "are both local" if found[0] is None else "are both remote")
            ],
            remedy="write for example hello:/etc/hostname; a local name with a colon as ./a:b",
        )
    match = found[0] or found[1]
    assert match is not None
    if not match[2].startswith("/"):
        raise Failure(
            f"{match[2]!r} is no absolute path",
            remedy=f"write {match[1]}:/{match[2]}: containers have no home of yours",
        )
    return _Side(match[1], match[2]), destination if found[0] else source, found[0] is None


def _only_pod(client: "Client", name: str) -> str:
    """The pod of an instance, or of an environment with one instance, that has one."""
    pods = client.listed("Pod", tenant=client.settings.tenant, owner=name)
    names = {r.pod.metadata.name.partition(".")[2] for r in pods}
    if len(names) == 1:
        return names.pop()
    if not names:
        client.get("Environment", name, client.settings.tenant)
        raise Failure(f"{name} has no pods", code=Exit.NOT_FOUND, remedy="copy to the VM itself with --vm")
    raise Failure(f"{name} has {len(names)} pods", remedy=f"name one with --pod: {', '.join(sorted(names)[:8])}")


@contextlib.contextmanager
def _spooled() -> "Iterator[IO[bytes]]":
    """All of standard input as a file: an archive says the length before the data."""
    with tempfile.NamedTemporaryFile(prefix="casemate-cp-") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        yield file


def _into(client: "Client", target: "pb.ChannelTarget", local: Path, path: str, name: str) -> int:
    import grpc

    from casemate_cli import failure
    from casemate_cli.tarball import pack
    from casemate_wire.v1 import channels_pb2 as pb

    if not os.path.lexists(local) or not local.exists():
        raise Failure(f"{local}: no such file or folder", code=Exit.NOT_FOUND)
    left_out: list[str] = []
    failed: list[BaseException] = []

    def sent() -> "Iterator[pb.CopyInput]":
        yield pb.CopyInput(start=pb.CopyStart(target=target, into=True, path=path, name=name))
        try:
            for piece in pack(local, left_out.append):
                for at in range(0, len(piece), CHUNK):
                    yield pb.CopyInput(data=piece[at : at + CHUNK])
        except (OSError, Failure) as error:
            failed.append(error)  # in gRPC's thread
            call.cancel()  # without an end of the data, what is half there is not kept
            return
        yield pb.CopyInput(eof=True)

    code: int | None = None
    told = b""
    target.ticket = client.ticket("copy", target.tenant, target.instance)
    call = client.channels.Copy(sent())
    try:
        for output in call:
            match output.WhichOneof("output"):
                case "message":
                    told += output.message
                case "exit_code":
                    code = output.exit_code
    except grpc.RpcError as error:
        if not failed:  # else what we could not read comes first
            raise failure.from_rpc(error, client.settings.manager, f"copy to {path}") from None
    finally:
        call.cancel()
    if failed:
        raise failed[0] if isinstance(failed[0], Failure) else Failure(f"cannot read: {failed[0]}")
    return _end(code, told, [f"{text}, and was not copied" for text in left_out])


def _out(client: "Client", target: "pb.ChannelTarget", path: str, destination: str) -> int:
    from casemate_cli.tarball import unpack, unpack_file
    from casemate_wire.v1 import channels_pb2 as pb

    target.ticket = client.ticket("copy", target.tenant, target.instance)
    start = pb.CopyInput(start=pb.CopyStart(target=target, path=path))
    code: list[int] = []
    told: list[bytes] = []

    def pieces() -> Iterator[bytes]:
        for output in client.stream(client.channels.Copy, iter([start]), f"copy of {path}"):
            match output.WhichOneof("output"):
                case "data":
                    yield output.data
                case "message":
                    told.append(output.message)
                case "exit_code":
                    code.append(output.exit_code)

    arriving = pieces()
    first = next(arriving, b"")  # nothing is made here for what is not there
    if first:

        def all_pieces() -> Iterator[bytes]:
            yield first
            yield from arriving

        name = posixpath.basename(posixpath.normpath(path))
        if destination == STANDARD:
            unpack_file(all_pieces(), sys.stdout.buffer, path)
        else:
            unpack(all_pieces(), destination, name)
    return _end(code[0] if code else None, b"".join(told), [])


def _end(code: int | None, told: bytes, left_out: list[str]) -> int:
    """How it ended. Raises Failure unless all was copied."""
    lines = [*told.decode(errors="replace").splitlines(), *left_out]
    if code == 0 and not lines:
        return Exit.OK
    if code is None:
        raise Failure("the copy was cut off before its end", code=Exit.UNREACHABLE, remedy="copy it again")
    if (code == 1 and all(line.endswith("was not copied") for line in lines)) or code == 0:
        raise Failure("not everything was copied", log=lines)
    what, *more = lines or ["the copy failed"]
    raise Failure(what, code=Exit.NOT_FOUND if code == NOT_THERE else Exit.ERROR, log=more)
