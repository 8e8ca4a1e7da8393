"""The manager is SIGKILLed again and again, between each of its steps; callers retry; each request has one effect."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from casemate_wire.v1 import environment_pb2 as env_pb
from casemate_wire.v1 import fleet_pb2 as fleet_pb
from casemate_wire.v1 import meta_pb2
from casemate_wire.v1 import operators_pb2 as pb
from casemate_wire.v1.operators_pb2_grpc import FleetStub
from support.manager_process import ManagerProcess

APPLIES = 1000
CALLERS = 40
STEPS = ("before-commit", "after-commit", "before-reply")


def image() -> pb.Resource:
    return pb.Resource(
        image=fleet_pb.Image(
            api_version="casemate/v1",
            kind="Image",
            metadata=meta_pb2.Meta(name="debian"),
            spec=fleet_pb.ImageSpec(source="file:///d.qcow2", digest="sha256:" + "0" * 64, format="qcow2", size="1Gi"),
        )
    )


def environment(name: str) -> pb.Resource:
    return pb.Resource(
        environment=env_pb.Environment(
            api_version="casemate/v1",
            kind="Environment",
            metadata=meta_pb2.Meta(name=name),
            spec=env_pb.EnvironmentSpec(cpu=env_pb.Cpu(count=1), memory=env_pb.Memory(size="512Mi"), image="debian"),
        )
    )


async def until_answered(stub: FleetStub, request: pb.ApplyRequest, lost: list[str]) -> pb.ApplyResponse:
    """What a careful caller does: the same request with the same key until there is an answer."""
    while True:
        try:
            return await stub.Apply(request, timeout=60, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), error
            lost.append(request.request_key)
            await asyncio.sleep(0.05)


async def supervise(manager: ManagerProcess, done: asyncio.Event) -> list[str]:
    """Starts the manager whenever it is dead; each of its lives ends at another step."""
    seed = random.Random(11)
    deaths: list[str] = []
    while not done.is_set():
        if not manager.alive:
            step = STEPS[len(deaths) % len(STEPS)]
            deaths.append(step)
            # Soon at each step once, then as it comes: a fast machine needs few lives for a thousand applies.
            count = seed.randint(2, 9) if len(deaths) <= len(STEPS) else seed.randint(20, 60)
            await asyncio.to_thread(manager.start, step, count)
        await asyncio.sleep(0.02)
    return deaths


async def pages(stub: FleetStub, kind: str) -> list[pb.Resource]:
    found: list[pb.Resource] = []
    token = ""
    while True:
        page = await stub.List(pb.ListRequest(kind=kind, page_size=300, page_token=token), timeout=60)
        found.extend(page.resources)
        token = page.next_page_token
        if not token:
            return found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ManagerProcess]:
    manager = ManagerProcess(tmp_path / "manager")
    yield manager
    manager.kill()


@pytest.mark.timeout(240)
async def test_a_thousand_applies_over_a_manager_that_is_killed_are_a_thousand_instances(
    manager: ManagerProcess,
) -> None:
    done = asyncio.Event()
    supervisor = asyncio.create_task(supervise(manager, done))
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    lost: list[str] = []
    async with grpc.aio.insecure_channel(manager.address, options=options) as channel:
        stub = FleetStub(channel)
        await until_answered(stub, pb.ApplyRequest(request_key="image", resources=[image()]), lost)
        numbers = iter(range(APPLIES))

        async def caller() -> None:
            for number in numbers:
                request = pb.ApplyRequest(request_key=f"key-{number}", resources=[environment(f"e{number}")])
                answer = await until_answered(stub, request, lost)
                assert [r.action for r in answer.results] == ["created"], "a retry gets the first answer"

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())
        done.set()
        deaths = await supervisor
        # Once more, and now it lives.
        await asyncio.to_thread(manager.kill)
        await asyncio.to_thread(manager.start)
        assert set(deaths) == set(STEPS), "it died at each step at least once"
        assert lost, "callers noticed"
        # What follows from the requests is done by now or soon.
        await stub.Version(pb.VersionRequest(), timeout=60, wait_for_ready=True)
        for _ in range(200):
            instances = await pages(stub, "Instance")
            if len(instances) >= APPLIES:
                break
            await asyncio.sleep(0.1)
        assert sorted(r.instance.metadata.name for r in instances) == sorted(f"e{n}-0" for n in range(APPLIES))
        assert len({r.instance.metadata.uid for r in instances}) == APPLIES
        assert len({r.instance.spec.nics[0].address for r in instances}) == APPLIES
        assert len({r.instance.spec.nics[0].mac for r in instances}) == APPLIES
        environments = await pages(stub, "Environment")
        assert len(environments) == APPLIES
    assert manager.stop() == 0
