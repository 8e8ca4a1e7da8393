"""A container image with one static program in it, as a docker-archive, without any container tool.

PURE: bytes in, bytes out, and the same input gives the same bytes (sorted members, zero times, fixed owners). The form
is that of ``docker save``: a ``manifest.json`` that names the configuration and the layers, the configuration by its
digest, and one uncompressed layer. `podman load` reads it.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

HELLO_IMAGE = "localhost/hello:1"
HELLO_PORT = 8080

_HELLO = b"""#!/bin/sh
# Answers every request on port 8080 with a greeting and the name of the pod that gave it.
echo "Hello from $(hostname)" > /www/index.html
echo "hello: serving on port 8080 as $(hostname)"
# The first process of a container hears no signal that it does not ask for; a server that does would wait for its grace.
trap 'kill $server' TERM
httpd -f -v -p 8080 -h /www &
server=$!
wait $server
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the layer. ``link`` makes it a symbolic link, ``data`` None a folder."""

    path: str
    mode: int = 0o755
    data: bytes | None = None
    link: str | None = None


def _tar(members: Sequence[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.path)
            info.mode = member.mode
            if member.link is not None:
                info.type, info.linkname = tarfile.SYMTYPE, member.link
                tar.addfile(info)
            elif member.data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(member.data)
                tar.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def docker_archive(name: str, members: Sequence[Member], command: Sequence[str]) -> bytes:
    """Return the archive of an image called ``name`` with one layer and one command."""
    layer = _tar(members)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {"Env": ["PATH=/bin"], "Cmd": list(command), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "casemate"}],
    }
    config_bytes = json.dumps(config, sort_keys=True).encode()
    config_name = hashlib.sha256(config_bytes).hexdigest() + ".json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    return _tar(
        [
            Member(config_name, 0o644, config_bytes),
            Member("layer.tar", 0o644, layer),
            Member("manifest.json", 0o644, json.dumps(manifest, sort_keys=True).encode()),
        ]
    )


def hello(busybox: bytes) -> bytes:
    """The container of the first example: a web server that greets with the pod's name."""
    tools = (
        "cat",
        "echo",
        "env",
        "false",
        "hostname",
        "httpd",
        "id",
        "ls",
        "ps",
        "sh",
        "sleep",
        "stty",
        "true",
        "wget",
    )
    members = [
        Member("bin"),
        Member("bin/busybox", 0o755, busybox),
        *(Member(f"bin/{tool}", 0o777, link="busybox") for tool in tools),
        Member("dev"),
        Member("etc"),
        Member("proc"),
        Member("sys"),
        Member("tmp", 0o1777),
        Member("www"),
        Member("hello", 0o755, _HELLO),
    ]
    return docker_archive(HELLO_IMAGE, members, ["/hello"])
