"""Support bundles: files of the manager, and of each host that answers, without secrets and bounded in size.

What may live here: reading, leaving out (`casemate_core.redact`), and moving what hosts send. Theory of operation. Hosts are
asked for their files by a channel of kind ``support``, a few at a time and each under a deadline, and send one JSON object
of names and texts, with their secrets left out already; what comes is bounded, and its names are checked, for it comes from
another machine. A host that is not connected, is late, or sends something else is named in ``summary.json``.
"""

import asyncio
import json
import platform
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc

from casemate_core import redact
from casemate_core.errors import CasemateError, InvalidSpec, NotFound, Violation
from casemate_manager.api import side
from casemate_manager.api.errors import streaming
from casemate_manager.api.lookup import Reader
from casemate_manager.api.metrics import ManagerMetrics
from casemate_manager.fleet.state import State
from casemate_manager.writer import Writer
from casemate_wire import logtail, manifest, schema
from casemate_wire.exposition import rendered
from casemate_wire.v1 import support_pb2 as pb
from casemate_wire.v1 import support_pb2_grpc

HOST_TIMEOUT_S: Final = 30.0
LONGEST_TIMEOUT_S: Final = 300.0
MAX_BYTES: Final = 32 * 1024 * 1024
LARGEST_BYTES: Final = 256 * 1024 * 1024
#: Of one host; a little more than an agent sends by itself.
HOST_BYTES: Final = 8 * 1024 * 1024
HOSTS_AT_ONCE: Final = 8
#: A channel names an instance; this one is about the host itself.
NO_INSTANCE: Final = "00000000-0000-0000-0000-000000000000"
PIECE: Final = 512 * 1024
KINDS: Final = tuple(sorted({*schema.SERVED_KINDS, "Instance", "Pod", "Placement", "Operation", "Event"}))
#: Objects of a kind; more are counted.
MOST_OBJECTS: Final = 5000
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?\Z", re.ASCII)

Context = grpc.aio.ServicerContext[Any, Any]


class SupportService(support_pb2_grpc.SupportServicer):
    """casemate.v1.Support."""

    def __init__(self, writer: Writer, channels: side.Channels, metrics: ManagerMetrics, version: str) -> None:
        self._writer = writer
        self._channels = channels
        self._metrics = metrics
        self._version = version

    @streaming
    async def Collect(self, request: pb.CollectRequest, context: Context) -> AsyncIterator[pb.CollectPart]:
        """Files of the manager, of hosts as they answer, and the summary."""
        state = self._writer.state
        timeout_s, most = _checked(state, request)
        bundle = _Bundle(most)
        for part in bundle.parts(await self._of_the_manager()):
            yield part
        names = sorted(set(request.hosts) or state.hosts)
        silent: dict[str, str] = {}
        slots = asyncio.Semaphore(HOSTS_AT_ONCE)
        tasks = [asyncio.create_task(self._of_a_host(slots, name, timeout_s), name=f"support-{name}") for name in names]
        try:
            for next_done in asyncio.as_completed(tasks):
                name, answer = await next_done
                if isinstance(answer, str):
                    silent[name] = answer
                    continue
                for part in bundle.parts({f"hosts/{name}/{file}": text for file, text in answer.items()}):
                    yield part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        summary = {
            "hosts": len(names),
            "answered": sorted(set(names) - set(silent)),
            "silent": dict(sorted(silent.items())),
            "cutOff": bundle.cut_off,
            "manager": self._version,
        }
        bundle.left = max(bundle.left, PIECE * 4)  # this one is always there
        for part in bundle.parts({"summary.json": _json(summary)}):
            yield part

    async def _of_the_manager(self) -> dict[str, str]:
        state, observed = self._writer.state, self._writer.observed
        reader = Reader(state, observed)
        found = {
            "manager/versions.json": _json(
                {
                    "manager": self._version, "python": platform.python_version(), "kernel": platform.release(),
                    "epoch": state.epoch, "revision": state.revision, "leading": self._writer.leading,
                }
            ),
            "manager/metrics.txt": rendered(await self._metrics.rows()).decode(),
            "manager/log.txt": redact.text(logtail.kept()),
        }  # fmt: skip
        for kind in KINDS:
            shown: list[Any] = []
            for key in reader.keys(kind)[-MOST_OBJECTS:]:
                objects = (schema.object_of(each.show()) for each in reader.find(kind, key))
                shown += [redact.plain(manifest.message_to_plain(each)) for each in objects]
                if len(shown) % 64 == 0:
                    await asyncio.sleep(0)
            found[f"manager/objects/{kind}.json"] = _json(shown)
        return found

    async def _of_a_host(
        self, slots: asyncio.Semaphore, name: str, timeout_s: float
    ) -> tuple[str, dict[str, str] | str]:
        """A host's files, or why there are none."""
        async with slots:
            try:
                async with asyncio.timeout(timeout_s):
                    return name, await self._ask(name)
            except TimeoutError:
                return name, f"no answer within {timeout_s:g} s"
            except CasemateError as error:
                return name, redact.text(str(error))

    async def _ask(self, name: str) -> dict[str, str]:
        channel = await self._channels.open(name, "support", NO_INSTANCE, {})
        data = bytearray()
        try:
            async for frame in channel.frames():
                if frame.WhichOneof("frame") == "stdout":
                    data += frame.stdout
                    if len(data) > HOST_BYTES:
                        raise _Unusable(f"more than {HOST_BYTES} bytes")
                elif frame.WhichOneof("frame") == "eof":
                    break
        finally:
            await channel.close()
        return host_files(bytes(data))


class _Unusable(CasemateError):
    reason = "Unusable"


def host_files(data: bytes) -> dict[str, str]:
    """The files that a host sent, once more without secrets. Raises _Unusable for what has no such form."""
    try:
        files = json.loads(data)
    except ValueError as error:
        raise _Unusable(f"what it sent is no JSON: {error}") from None
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise _Unusable("what it sent are no files of text")
    bad = [name for name in files if not _NAME.match(name)]
    if bad:
        raise _Unusable(f"{len(bad)} of its files have names that are none")
    return {name: redact.text(text) for name, text in files.items()}


class _Bundle:
    """Pieces of files, within a bound."""

    def __init__(self, most: int) -> None:
        self.left = most
        self.cut_off: dict[str, int] = {}

    def parts(self, files: Mapping[str, str]) -> "list[pb.CollectPart]":
        """The files in pieces; one that does not fit is left out, and counted."""
        found = []
        for name, text in files.items():
            data = text.encode("utf-8", "replace")
            if len(data) > self.left:
                self.cut_off[name] = len(data)
                continue
            self.left -= len(data)
            starts = range(0, max(1, len(data)), PIECE)
            found += [pb.CollectPart(name=name, data=data[start : start + PIECE]) for start in starts]
        return found


def _checked(state: State, request: pb.CollectRequest) -> tuple[float, int]:
    timeout_s = request.host_timeout_s or HOST_TIMEOUT_S
    most = request.max_bytes or MAX_BYTES
    violations = []
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        violations.append(
            Violation("host_timeout_s", f"{timeout_s:g}", "is out of range", f"write 1 to {LONGEST_TIMEOUT_S:g}")
        )
    if not 0 < most <= LARGEST_BYTES:
        violations.append(Violation("max_bytes", str(most), "is out of range", f"write 1 to {LARGEST_BYTES}"))
    if violations:
        raise InvalidSpec(tuple(violations))
    for name in request.hosts:
        if name not in state.hosts:
            raise NotFound("Host", name)
    return timeout_s, most


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"
