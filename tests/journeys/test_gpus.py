"""GPUs from the spec to the instance, and between tenants: a manager, agents on simulated hosts, and the command line."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from casemate_core.spec.environment import GpuSpec
from casemate_manager.fleet.commands import DeleteResource
from casemate_wire.v1 import audit_pb2, operators_pb2
from casemate_wire.v1.audit_pb2_grpc import AuditStub
from casemate_wire.v1.operators_pb2_grpc import FleetStub
from support.whole_fleet import WholeFleet, environment, until, whole_fleet

LINE = "1s 8k/c 1t 32G disk=1T gpu=2xH200 name=a"
GPU = "GPU-a-0-00"


async def soon(condition: Callable[[], bool]) -> None:
    await until(condition, 60.0)


async def casemate(fleet: WholeFleet, *arguments: str, fails: bool = False) -> str:
    """What the program says; it must end well, or fail."""
    environ = os.environ | {"CASEMATE_MANAGER": fleet.address, "CASEMATE_INSECURE_LOOPBACK": "1", "NO_COLOR": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "casemate_cli", *arguments,
        env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert bool(process.returncode) is fails, out.decode()
    return out.decode()


def phase(fleet: WholeFleet, uuid: str = GPU) -> str:
    from casemate_manager.fleet import gpus

    view = gpus.view(fleet.manager.writer.state, fleet.manager.writer.observed, uuid)
    return view.phase if view is not None else ""


def has_figures(fleet: WholeFleet) -> bool:
    from casemate_manager.fleet import gpus

    view = gpus.view(fleet.manager.writer.state, fleet.manager.writer.observed, GPU)
    return view is not None and view.state is not None and view.state.figures is not None


async def test_from_one_tenant_to_the_next(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        host = fleet.hosts["a"].host
        await fleet.apply(environment("train", gpus=(GpuSpec("*H200*", 2),)))
        await soon(lambda: fleet.phases() == ["Ready"])
        (domain,) = host.domains.values()
        assert sorted(domain.gpus) == [GPU, "GPU-a-0-01"] and host.check() == []
        await soon(lambda: phase(fleet) == "Attached")
        wide = await casemate(fleet, "get", "gpus", "-o", "wide")
        assert GPU in wide and "Attached" in wide and "default/train-0" in wide and "vfio-pci" in wide
        await fleet.apply(environment("next", gpus=(GpuSpec(),)))
        await soon(lambda: "0 free of 2" in fleet_waits(fleet))
        await fleet.manager.writer.submit(DeleteResource("delete-1", "Environment", "default", "train"))
        await soon(lambda: any(d.facts.name.startswith("next") for d in host.domains.values()))
        await soon(lambda: fleet.phases() == ["Ready"])
        assert host.check() == []
        await soon(lambda: phase(fleet, "GPU-a-0-01") in ("Free", "HostOwned"))
        told = await casemate(fleet, "describe", "gpu", "GPU-a-0-01")
        for words in (
            "after tenant default: clean", "released        passed", "function-reset  passed", "proved          passed",
            "reset-seen    passed", "checks          passed", "Not proven:",
            "that its memory was emptied: nothing overwrote it", "that its firmware is what its maker shipped",
        ):  # fmt: skip
            assert words in told, (words, told)


def fleet_waits(fleet: WholeFleet) -> str:
    return " ".join(attempt.message for attempt in fleet.manager.writer.observed.attempts.values())


async def test_what_operators_say(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        await soon(lambda: phase(fleet) == "HostOwned")
        assert "is held back" in await casemate(fleet, "gpu", "quarantine", GPU, "--reason", "smells of smoke")
        await soon(lambda: phase(fleet) == "Quarantined")
        assert "is in quarantine already" in await casemate(
            fleet, "gpu", "quarantine", GPU, "--reason", "smells of smoke"
        )
        await fleet.apply(environment("train", gpus=(GpuSpec(count=2),)))
        await soon(lambda: f"{GPU} is Quarantined: smells of smoke" in fleet_waits(fleet))
        assert "is let out" in await casemate(fleet, "gpu", "release", GPU)
        await soon(lambda: fleet.phases() == ["Ready"])
        async with grpc.aio.insecure_channel(fleet.address) as channel:
            entries = [entry async for entry in AuditStub(channel).Records(audit_pb2.AuditRequest())]
        acts = [(e.act, e.outcome, t, e.detail) for e in entries for t in e.targets if t.startswith("gpu/")]
        assert ("gpu", "done", f"gpu/{GPU}", "quarantine: smells of smoke") in acts, acts
        assert ("gpu", "done", f"gpu/{GPU}", "release") in acts, acts


async def test_slices_of_one_gpu_for_several(tmp_path: Path) -> None:
    line = "1s 8k/c 1t 32G disk=1T gpu=1xA100:40G/4 name=a"
    async with whole_fleet(tmp_path, {"a": line}) as fleet:
        host = fleet.hosts["a"].host
        for name in ("one", "two"):
            await fleet.apply(environment(name, gpus=(GpuSpec("A100", share_milli=250),)))
        await soon(lambda: fleet.phases() == ["Ready", "Ready"])
        assert len(host.vgpus) == 2 and host.check() == []
        told = await casemate(fleet, "describe", "gpu", GPU)
        for words in ("slices:", "default/one-0", "default/two-0", "milli: 250"):
            assert words in told, (words, told)
        assert "default/one-0,default/two-0" in await casemate(fleet, "get", "gpus")
        assert "carries 2 slices: it is sanitised once nobody has one" in await casemate(
            fleet, "gpu", "sanitise", GPU, fails=True
        )
        await soon(lambda: has_figures(fleet))
        told = await casemate(fleet, "describe", "gpu", GPU)
        for words in ("toldBy: host", "temperatureC: 30", "linkWidth: 16", "linkErrors:"):
            assert words in told, (words, told)
        await fleet.apply(environment("whole", gpus=(GpuSpec(),)))
        await soon(lambda: "0 free of 1" in fleet_waits(fleet))
        for name in ("one", "two"):
            await fleet.manager.writer.submit(DeleteResource(f"delete-{name}", "Environment", "default", name))
        await soon(lambda: any(d.facts.name.startswith("whole") for d in host.domains.values()))
        await soon(lambda: fleet.phases() == ["Ready"])
        assert host.vgpus == {} and host.check() == []


async def test_a_watch_tells_what_becomes_of_a_gpu(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        await soon(lambda: phase(fleet) == "HostOwned")
        async with grpc.aio.insecure_channel(fleet.address) as channel:
            stub = FleetStub(channel)
            page = await stub.List(operators_pb2.ListRequest(kind="GPU"), timeout=60)  # type: ignore[misc]
            assert sorted(r.gpu.metadata.name for r in page.resources) == [GPU, "GPU-a-0-01"]
            request = operators_pb2.WatchRequest(kind="GPU", resume_token=page.resume_token)
            stream: Any = stub.Watch(request, timeout=60)
            await casemate(fleet, "gpu", "quarantine", GPU, "--reason", "its fan is loud")
            while True:
                event = await stream.read()
                assert event is not grpc.aio.EOF, "the watch ended"
                if event.resource.gpu.metadata.name == GPU and event.resource.gpu.status.phase == "Quarantined":
                    break
            assert event.type == operators_pb2.WatchEvent.CHANGED
            assert event.resource.gpu.status.reason == "its fan is loud"
            stream.cancel()
