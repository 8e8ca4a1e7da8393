"""The thread from a request to what hosts and guests did, over the whole fleet."""

from dataclasses import replace
from pathlib import Path

import grpc

from casemate_cli.verbs.describe import story
from casemate_core.cause import cause_of
from casemate_core.spec.views import EventView
from casemate_manager.fleet.commands import DeleteResource
from casemate_wire.v1 import operators_pb2 as pb
from casemate_wire.v1.operators_pb2_grpc import FleetStub
from support.agents import pod
from support.whole_fleet import WholeFleet, environment, until, whole_fleet

LINE = "1s 4k/c 1t 16G disk=1T"


def reasons(fleet: WholeFleet, cause: str) -> list[str]:
    events = [e for e in fleet.manager.writer.state.events.values() if e.cause == cause]
    return [e.reason for e in sorted(events, key=lambda e: e.time_s)]


def events_of(fleet: WholeFleet, reason: str) -> list[EventView]:
    return [e for e in fleet.manager.writer.state.events.values() if e.reason == reason]


async def test_what_follows_from_a_request_carries_its_cause_and_what_happens_by_itself_none(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        host = fleet.hosts["a"].host
        web = environment("web", pods=(pod("hello"),))
        await fleet.apply(web, key="make-web")
        made = cause_of("make-web")
        await until(lambda: "AsAsked" in reasons(fleet, made))
        told = reasons(fleet, made)
        assert told[:2] == ["Created", "Placed"]
        assert [r for r in told if r in ("ImageFetched", "Started", "GuestUp", "PodsApplied", "AsAsked")] == [
            "ImageFetched", "Started", "GuestUp", "PodsApplied", "AsAsked",
        ]  # fmt: skip
        placed = events_of(fleet, "Placed")[0]
        assert placed.message.startswith("placed on host a: 1 shared CPUs, 512 MiB")
        assert {e.source for e in fleet.manager.writer.state.events.values() if e.cause == made} == {"manager", "a"}
        assert "in 0." in events_of(fleet, "ImageFetched")[0].message

        # A guest that ends by itself is nobody's wish: started again, without a cause.
        uid = next(iter(host.domains))
        host.crash_domain(uid)
        await until(lambda: any(e.cause == "" for e in events_of(fleet, "Started")))
        assert len(events_of(fleet, "Started")) == 2
        await fleet.until_ready(1)

        # A change is another request; what it changes is named by its path, never by its value.
        await fleet.apply(replace(web, spec=replace(web.spec, pods=(pod("two"),))), key="change-web")
        await until(lambda: "AsAsked" in reasons(fleet, cause_of("change-web")))
        assert reasons(fleet, cause_of("change-web"))[0] == "Changed"
        assert events_of(fleet, "Changed")[0].message == "the manager changed spec.pods"

        # The service filters by cause, or by the key of the request.
        async with grpc.aio.insecure_channel(fleet.address) as channel:
            stub = FleetStub(channel)
            for asked in (made, "make-web"):
                found = [e async for e in stub.Events(pb.EventsRequest(cause=asked))]
                assert {e.cause for e in found} == {made}
                assert len(found) == len(reasons(fleet, made))
            assert [e async for e in stub.Events(pb.EventsRequest(cause="r-nobody"))] == []
            every = [e async for e in stub.Events(pb.EventsRequest(kind="Environment", name="web"))]
        lines = list(story(sorted(every, key=lambda e: e.last.seconds + e.last.nanos / 1e9)))
        assert lines[0] == f"request {made}:"
        assert "Created" in lines[1] and lines[1].startswith("  +0.0s")
        assert any(line == "by itself:" for line in lines)
        assert any(line == f"request {cause_of('change-web')}:" for line in lines)
        assert any("GuestUp" in line and "web-0: the guest answered" in line and line.endswith("(a)") for line in lines)

        await fleet.manager.writer.submit(DeleteResource("end-web", "Environment", "default", "web"))
        await until(lambda: not fleet.manager.writer.state.environments)
        ended = reasons(fleet, cause_of("end-web"))
        assert ended[0] == "Deleting"
        assert ended.count("Deleted") == 2


async def test_a_full_apply_still_fits_in_its_batch_and_tells_as_much_as_it_can(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        many = [environment(f"e{number}", run="stopped", disk_mib=10240) for number in range(60)]
        await fleet.apply(*many)
        changed = [replace(one, spec=replace(one.spec, disk_mib=one.spec.disk_mib * 2)) for one in many]
        answer = await fleet.apply(*changed, key="change-all")
        assert [result.action for result in answer.results] == ["changed"] * 60
        records = fleet.manager.writer.state.environments.values()
        assert {record.cause for record in records} == {cause_of("change-all")}
        assert 0 < reasons(fleet, cause_of("change-all")).count("Changed") <= 60
