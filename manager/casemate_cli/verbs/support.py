"""`casemate support-bundle`: one file with what helps to find out what is wrong."""

import gzip
import io
import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casemate_cli import options, term
from casemate_cli.failure import Failure

if TYPE_CHECKING:
    from casemate_wire.v1 import support_pb2 as pb

SUMMARY = "summary.json"


@click.command("support-bundle")
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path),
    help="File to write.  [default: casemate-support-DATE.tar.gz]",
)
@click.option(
    "--host", "hosts", multiple=True, metavar="NAME", help="Ask this host only; may be given again.  [default: all]"
)
@click.option("--host-timeout", type=options.SPAN, default="30s", show_default=True, help="Longest wait for one host.")
@options.connection
@click.pass_context
def support_bundle(ctx: click.Context, path: Path | None, hosts: tuple[str, ...], host_timeout: float) -> None:
    """Write one file with what helps to find out what is wrong, for people without access to the fleet.

    Versions, objects, events, logs and metrics of the manager; findings of the doctor, ledger, domains, logs and metrics of
    each host. Secrets are left out where they are: user data, values of variables, commands, annotations, credentials.

    \b
    Examples:
      casemate support-bundle
      casemate support-bundle --host h1 -o h1.tar.gz
    """
    from casemate_cli.client import Client
    from casemate_wire.v1 import support_pb2 as pb
    from casemate_wire.v1 import support_pb2_grpc

    path = path or Path(time.strftime("casemate-support-%Y%m%d-%H%M%S.tar.gz"))
    if path.exists():
        raise Failure(f"{path} is there already", remedy="name another file with -o")
    request = pb.CollectRequest(hosts=hosts, host_timeout_s=host_timeout)
    with Client(options.settings(ctx)) as client, term.Progress("support bundle") as progress:
        stub = support_pb2_grpc.SupportStub(client.channel)
        summary = write(path, client.stream(stub.Collect, request), progress.update)
        progress.done(
            f"{path}: {path.stat().st_size / 1024:.0f} KiB, {len(summary['answered'])} of {summary['hosts']} hosts"
        )
    for host, why in summary["silent"].items():
        term.say(term.clean(f"host {host} did not answer: {why}"), "yellow")
    for name in summary["cutOff"]:
        term.say(term.clean(f"{name} did not fit"), "yellow")
    term.out(str(path))


def files(parts: "Iterable[pb.CollectPart]") -> Iterator[tuple[str, bytes]]:
    """Whole files, from pieces that follow each other."""
    name, data = "", bytearray()
    for part in parts:
        if name and part.name != name:
            yield name, bytes(data)
            data = bytearray()
        name = part.name
        data += part.data
    if name:
        yield name, bytes(data)


def write(path: Path, parts: "Iterable[pb.CollectPart]", tell: "object") -> dict[str, dict[str, str]]:
    """Write the bundle, whole or not at all, for its owner's eyes; its summary."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    summary = None
    top = path.name.removesuffix(".tar.gz").removesuffix(".tgz")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with (
            os.fdopen(descriptor, "wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for name, data in files(parts):
                if name.startswith("/") or ".." in name.split("/"):
                    raise Failure(f"the manager sent a file named {term.clean(name)}")
                if callable(tell):
                    tell(name)
                if name == SUMMARY:
                    summary = json.loads(data)
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
                archive.addfile(entry, io.BytesIO(data))
        if summary is None:
            raise Failure("the manager ended before the bundle was whole", remedy="try again")
        unfinished.rename(path)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}", remedy="name another file with -o") from None
    finally:
        unfinished.unlink(missing_ok=True)
    found: dict[str, dict[str, str]] = summary
    return found
