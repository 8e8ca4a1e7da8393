"""Slices of GPUs: the story of the port, on a simulated host and on both ways in which the kernel offers vGPUs."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.simulated import SimulatedHost, SimulatedPace
from casemate_agent.drivers.vgpu import CURRENT, MDEV, PCI, ShareFailed, carried
from casemate_core.topology import ShareProfile
from casemate_core.topology_loaders import from_line
from support import mock_nvml, shares_contract, vgpus
from support.mock_nvml import HEALTHY, Boards
from support.shares_contract import share
from support.vgpus import CARD, Kernel, KilledError

GPU = HEALTHY["uuid"]
PROFILE, OTHER = "A100D-40C", "A100D-20C"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    mock_nvml.load(mock_nvml.build(tmp_path_factory.mktemp("nvml")))


@asynccontextmanager
async def host(root: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> AsyncIterator[Kernel]:
    """A host with one GPU, and the driver on it; the same folder again is the same host after the agent's death."""
    if not (root / PCI).exists():
        vgpus.card(root, vfs=4 if way == "functions" else 0)
        getattr(vgpus, way)(root)
    boards = Boards(root / "boards", gpus=[HEALTHY | {"vgpus": vgpus.VGPUS, "memory": "81920"}])
    boards.write()
    monkeypatch.setenv("MOCK_NVML", str(boards.path))
    gpus = HostGpus(root / "state", root)
    (facts,) = (await gpus.look(10)).gpus
    assert [p.name for p in facts.share_profiles] == [OTHER, PROFILE] and facts.share_alike
    shares = Kernel(gpus, root / "state", root)
    yield shares
    await shares.aclose()
    await gpus.aclose()


WAYS = pytest.mark.parametrize("way", ["mediated", "functions"])


async def test_on_a_simulated_host() -> None:
    topology = from_line("1s 8k/c 2t 64G disk=1T gpu=1xA100 name=box")
    profiles = (ShareProfile(OTHER, 250, 20480), ShareProfile(PROFILE, 500, 40960))
    (gpu,) = topology.gpus
    topology = replace(topology, gpus=(replace(gpu, share_profiles=profiles, share_alike=True),))
    simulated = SimulatedHost("box", topology, time.time, SimulatedPace(call_s=0.0))
    await shares_contract.story(simulated.drivers().shares, gpu.uuid, PROFILE, OTHER)


@WAYS
async def test_over_sysfs(library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    async with host(tmp_path, monkeypatch, way) as shares:
        await shares_contract.story(shares, GPU, PROFILE, OTHER)
        made = await shares.create(share("instance-1", GPU, PROFILE), 10)
        assert bool(made.address) == (way == "functions")
        assert len(carried(tmp_path, CARD)) == 1, "its GPU is not taken from the host's driver"


@WAYS
@pytest.mark.parametrize("dies_at", [1, -1, 2, -2])
async def test_killed_before_and_after_each_write(
    library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, dies_at: int
) -> None:
    one = share("instance-1", GPU, PROFILE)
    async with host(tmp_path, monkeypatch, way) as shares:
        shares.dies_at = dies_at
        with pytest.raises(KilledError):
            await shares.create(one, 10)
            await shares.remove(one.id, 10)
    async with host(tmp_path, monkeypatch, way) as shares:
        there = await shares.look(10)
        assert all(facts.owner == "instance-1" for facts in there.values()), "whose it is outlives the process"
        assert bool(there) == (dies_at in (-1, 2))
        made = await shares.create(one, 10)
        assert await shares.look(10) == {one.id: made}
        await shares.remove(one.id, 10)
        assert await shares.look(10) == {} and carried(tmp_path, CARD) == ()


@WAYS
async def test_what_the_kernel_does_not_do_is_not_believed(
    library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    one = share("instance-1", GPU, PROFILE)
    async with host(tmp_path, monkeypatch, way) as shares:
        shares.deaf = True
        with pytest.raises(ShareFailed, match="is read back as None"):
            await shares.create(one, 10)
        shares.deaf = False
        await shares.create(one, 10)
        shares.deaf = True
        with pytest.raises(ShareFailed, match="was destroyed, and is still there"):
            await shares.remove(one.id, 10)
        assert set(await shares.look(10)) == {one.id}


@WAYS
async def test_one_that_somebody_else_has_made_is_nobodys_here(
    library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async with host(tmp_path, monkeypatch, way) as shares:
        if way == "mediated":
            create = tmp_path / PCI / CARD / "mdev_supported_types/nvidia-471/create"
            vgpus.act(tmp_path, create, "11111111-2222-3333-4444-555555555555")
        else:
            vgpus.act(tmp_path, tmp_path / PCI / "0000:17:00.5" / CURRENT, "471")
        (found,) = (await shares.look(10)).values()
        assert (found.gpu, found.owner) == (GPU, "")
        assert found.profile == PROFILE, "a number is named by what can still be made"
        made = await shares.create(share("instance-1", GPU, PROFILE), 10)
        assert made.address != found.address or not made.address
        with pytest.raises(ShareFailed, match="no room"):
            await shares.create(share("instance-2", GPU, PROFILE), 10)


async def test_a_record_that_cannot_be_read_makes_them_somebody_elses(
    library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = share("instance-1", GPU, PROFILE)
    async with host(tmp_path, monkeypatch, "mediated") as shares:
        await shares.create(one, 10)
    (tmp_path / "state/shares.json").write_text("{")
    async with host(tmp_path, monkeypatch, "mediated") as shares:
        assert (await shares.look(10))[one.id].owner == ""
        assert (await shares.create(one, 10)).owner == "instance-1", "its name says that it is that instance's"
        assert (await shares.look(10))[one.id].owner == "instance-1"
        assert (tmp_path / MDEV / one.id).exists()
