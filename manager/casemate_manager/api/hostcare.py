"""What is looked at and put right on one host, on request.

What may live here: asking the host by a channel, and reading its answer strictly, for it comes from another machine.
Theory of operation. The host does it in one go and sends one JSON object. A repair is written down before it is asked for.
It may be asked for again at will: it cleans what nobody has, and what is clean stays so.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final, Protocol

import grpc

from casemate_core.errors import CasemateError, InvalidSpec, NotFound, Unavailable, Violation, shown
from casemate_manager.api import side
from casemate_manager.api.errors import unary
from casemate_manager.api.gate import caller
from casemate_manager.fleet.acts import Actor
from casemate_manager.fleet.state import State
from casemate_wire.v1 import hostcare_pb2 as pb
from casemate_wire.v1 import hostcare_pb2_grpc

TIMEOUT_S: Final = 60.0
LONGEST_TIMEOUT_S: Final = 600.0
HOST_BYTES: Final = 4 * 1024 * 1024
#: A channel names an instance; this one is about the host itself.
NO_INSTANCE: Final = "00000000-0000-0000-0000-000000000000"
KINDS: Final = ("held", "lost", "leak", "problem", "repaired", "unrepaired")
MOST: Final = 2000
MOST_TEXT: Final = 1000

Context = grpc.aio.ServicerContext[Any, Any]


class Core(Protocol):
    """What is read of the manager."""

    @property
    def state(self) -> State: ...


class ActLog(Protocol):
    """Writes down what is done on a host."""

    async def on_host(self, by: Actor, act: str, host: str, detail: str) -> None:
        """Raises Unavailable where it cannot be written: then it is not done."""
        ...


class _Unusable(CasemateError):
    reason = "Unusable"


class HostCareService(hostcare_pb2_grpc.HostCareServicer):
    """casemate.v1.HostCare."""

    def __init__(self, core: Core, channels: side.Channels, acts: ActLog) -> None:
        self._core = core
        self._channels = channels
        self._acts = acts

    @unary
    async def Fsck(self, request: pb.FsckRequest, context: Context) -> pb.FsckResponse:
        """What is left of somebody on a host, after its repair where one is asked for."""
        timeout_s = request.timeout_s or TIMEOUT_S
        if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
            problem = f"write 1 to {LONGEST_TIMEOUT_S:g}"
            raise InvalidSpec((Violation("timeout_s", f"{timeout_s:g}", "is out of range", problem),))
        if request.host not in self._core.state.hosts:
            raise NotFound("Host", request.host)
        if request.repair:
            await self._acts.on_host(caller().actor, "fsck", request.host, "repair")
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._ask(request.host, {"repair": request.repair})
        except TimeoutError:
            raise Unavailable(
                f"host {request.host} has not answered within {timeout_s:g} s: ask again, a repair goes on where it was"
            ) from None
        return answer(data, self._name_of)

    def _name_of(self, uid: str) -> str:
        """Tenant and name of an instance; empty where it is unknown here."""
        record = self._core.state.instances.get(uid)
        return f"{record.meta.tenant}/{record.meta.name}" if record is not None else ""

    async def _ask(self, host: str, parameters: dict[str, Any]) -> bytes:
        channel = await self._channels.open(host, "fsck", NO_INSTANCE, parameters)
        data = bytearray()
        try:
            async for frame in channel.frames():
                match frame.WhichOneof("frame"):
                    case "stdout":
                        data += frame.stdout
                        if len(data) > HOST_BYTES:
                            raise _Unusable(f"host {host} sent more than {HOST_BYTES} bytes")
                    case "error":
                        raise Unavailable(f"host {host}: {shown(frame.error)}")
                    case "eof":
                        return bytes(data)
            raise Unavailable(f"host {host} ended the channel before its answer was whole: ask again")
        finally:
            await channel.close()


def answer(data: bytes, name_of: Any) -> pb.FsckResponse:
    """What a host sent, as the answer. Raises _Unusable for what has no such form."""
    try:
        told = json.loads(data)
        findings = [_finding(each, name_of) for each in told["findings"][:MOST]]
        counts = {key: int(told[key]) for key in ("virtual_functions", "devices", "free", "left_off")}
        return pb.FsckResponse(findings=findings, **counts)
    except (ValueError, KeyError, TypeError) as error:
        raise _Unusable(f"what the host sent is no answer: {shown(repr(error))}") from None


def _finding(value: Mapping[str, Any], name_of: Any) -> pb.FsckFinding:
    kind, owner = value["kind"], str(value["owner"])[:64]
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}")
    return pb.FsckFinding(
        kind=kind,
        function=str(value["function"])[:MOST_TEXT],
        detail=str(value["detail"])[:MOST_TEXT],
        owner_uid=owner,
        owner=name_of(owner) if owner else "",
    )
