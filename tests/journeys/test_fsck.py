"""`fsck host`: an operator sees what is left of somebody on a host, and has it cleaned, from where he sits."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from casemate_agent.hardware.functions import VfState
from casemate_core.errors import CasemateError
from casemate_manager.api.hostcare import answer
from casemate_wire.v1 import audit_pb2
from casemate_wire.v1 import hostcare_pb2 as pb
from casemate_wire.v1.audit_pb2_grpc import AuditStub
from casemate_wire.v1.hostcare_pb2_grpc import HostCareStub
from support.whole_fleet import WholeFleet, whole_fleet

LINE = "1s 4k/c 1t 16G disk=1T vf=1x4@fronthaul dev=1xfec"


async def fsck(fleet: WholeFleet, **request: Any) -> pb.FsckResponse:
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        answered: pb.FsckResponse = await HostCareStub(channel).Fsck(pb.FsckRequest(**request))
        return answered


async def test_a_leak_is_shown_and_repaired_and_the_repair_is_written_down(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE, "b": LINE}) as fleet:
        cards = fleet.hosts["a"].host.cards
        first, second = (f"{fleet.hosts['a'].host.topology.pfs[0].mac}/{index}" for index in range(2))
        left = VfState("52:54:00:00:00:01", 7)
        cards.states |= {first: left, second: left}
        found = await fsck(fleet, host="a")
        assert [(finding.kind, finding.function) for finding in found.findings] == [("leak", first), ("leak", second)]
        assert (
            found.findings[0].detail == "mac is 52:54:00:00:00:01, should be 00:00:00:00:00:00; vlan is 7, should be 0"
        )
        assert (found.virtual_functions, found.devices, found.free) == (4, 1, 5)
        assert cards.states[first] == left, "looking changes nothing"
        assert not (await fsck(fleet, host="b")).findings
        for kinds in (["repaired", "repaired"], []):
            repaired = await fsck(fleet, host="a", repair=True)
            assert [finding.kind for finding in repaired.findings] == kinds, "asking again does nothing more"
            assert not cards.states
        assert await acts(fleet) == [("fsck", "host/a", "repair")] * 2, "what is looked at is no act"


async def acts(fleet: WholeFleet) -> list[tuple[str, str, str]]:
    """What was written down of repairs."""
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        entries = [entry async for entry in AuditStub(channel).Records(audit_pb2.AuditRequest())]
    return [(entry.act, entry.targets[0], entry.detail) for entry in entries if entry.act == "fsck"]


async def test_a_host_that_is_silent_unknown_or_talks_nonsense_is_named(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        for wrong, code in (
            ({"host": "nobody"}, grpc.StatusCode.NOT_FOUND),
            ({"host": "a", "timeout_s": -1.0}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await fsck(fleet, **wrong)
            assert refused.value.code() is code
        fleet.hosts["a"].host.faults.hung.add("functions")
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await fsck(fleet, host="a", timeout_s=0.3)
        assert late.value.code() is grpc.StatusCode.UNAVAILABLE and "host a" in str(late.value.details())
        fleet.hosts["a"].host.faults.hung.clear()


NOTHING: dict[str, Any] = {"findings": [], "virtual_functions": 0, "devices": 0, "free": 0, "left_off": 0}


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"[]", b"{}", b"nonsense",
        json.dumps(NOTHING | {"findings": [{"kind": "made-up", "function": "", "detail": "", "owner": ""}]}).encode(),
        json.dumps(NOTHING | {"free": "many"}).encode(),
        json.dumps(NOTHING | {"free": 2**40}).encode(),
        json.dumps(NOTHING | {"findings": {"a": 1}}).encode(),
    ],
)  # fmt: skip
def test_what_a_host_sends_is_read_strictly(sent: bytes) -> None:
    with pytest.raises(CasemateError, match="no answer"):
        answer(sent, lambda uid: "")
    assert answer(json.dumps(NOTHING).encode(), lambda uid: "") == pb.FsckResponse()
