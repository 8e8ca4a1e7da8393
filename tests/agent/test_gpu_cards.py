"""The driver of real cards, on folders of files: what is marked, reset, proved, scrubbed, and who holds a card."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from casemate_agent.drivers import pcireset
from casemate_agent.drivers.gpucards import HostCards, ScrubFailed
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.pcireset import ResetFailed
from casemate_agent.drivers.vfio import HeldByOther
from casemate_agent.hardware.rules import GpuRule
from casemate_core.errors import DeadlineExceeded, Unavailable
from casemate_core.gpu import Rung

CARD = "0000:17:00.0"
MSI, MSIX = 0x50, 0x70


def config(*, msi: bool = True, msi_on: bool = False, msix: bool = False, dead: bool = False) -> bytes:
    """Configuration space of a display adapter with these capabilities."""
    data = bytearray(256)
    if dead:
        return b"\xff" * 256
    data[0:4] = bytes.fromhex("02103023")
    at = [place for place, there in ((MSI, msi), (MSIX, msix)) if there]
    if at:
        data[0x06], data[0x34] = 0x10, at[0]
    if msi:
        data[MSI], data[MSI + 1], data[MSI + 2] = 0x05, MSIX if msix else 0, int(msi_on)
    if msix:
        data[MSIX] = 0x11
    return bytes(data)


def card(root: Path, address: str = CARD, driver: str = "amdgpu", space: bytes | None = None) -> Path:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in (
        ("vendor", "0x1002"), ("device", "0x2330"), ("class", "0x030000"), ("reset", ""), ("driver_override", "(null)"),
        ("reset_method", "flr bus"), ("aer_dev_fatal", "TOTAL_ERR_FATAL 0"), ("max_link_width", "16"), ("current_link_width", "16"),
    ):  # fmt: skip
        (folder / name).write_text(text)
    (folder / "config").write_bytes(config() if space is None else space)
    if driver:
        (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)
    group = root / "sys/kernel/iommu_groups/7/devices"
    group.mkdir(parents=True, exist_ok=True)
    (folder / "iommu_group").symlink_to(group.parent)
    return folder


async def cards_of(root: Path, state: Path, *scrubber: str) -> tuple[HostCards, HostGpus, str]:
    gpus = HostGpus(state, root, rules=(GpuRule("Radeon", pci_class="0300", memory_mib=1024),))
    (found,) = (await gpus.look(5)).gpus
    assert (found.model, found.memory_mib, found.address) == ("Radeon", 1024, CARD)
    return HostCards(gpus, root, root / "proc", tuple(scrubber)), gpus, found.uuid


@pytest.fixture
async def root(tmp_path: Path) -> AsyncIterator[Path]:
    (tmp_path / "proc").mkdir()
    yield tmp_path


@pytest.mark.parametrize(
    ("space", "name", "at"),
    [
        (config(), "address of its MSI", MSI + 4),
        (config(msi_on=True, msix=True), "mask of its MSI-X", MSIX + 2),
        (config(msi=False), "", 0),
        (config(msi_on=True), "", 0),
    ],
)
def test_a_mark_is_set_where_only_a_reset_clears_it(root: Path, space: bytes, name: str, at: int) -> None:
    folder = card(root, space=space)
    before = pcireset.identity(folder)
    assert before == "1002:2330"
    mark = pcireset.mark(folder)
    if not name:
        assert mark is None and (folder / "config").read_bytes() == space
        assert pcireset.prove(folder, before, None).kept is None
        return
    assert mark is not None and (mark.name, mark.at) == (name, at)
    assert pcireset.prove(folder, before, mark).kept is True, "nothing has reset it"
    (folder / "config").write_bytes(space)
    proof = pcireset.prove(folder, before, mark)
    assert proof.answers and proof.kept is False and proof.found == proof.expected


def test_a_card_that_does_not_answer_any_more(root: Path) -> None:
    folder = card(root)
    mark = pcireset.mark(folder)
    (folder / "config").write_bytes(config(dead=True))
    assert not pcireset.prove(folder, "1002:2330", mark).answers


def test_the_reset_that_is_meant_is_made_and_the_list_put_back(root: Path) -> None:
    folder = card(root)
    assert pcireset.reset(folder, Rung.BUS_RESET) == f"bus of {CARD}"
    assert (folder / "reset").read_text() == "1"
    assert (folder / "reset_method").read_text() == "flr bus"
    (folder / "reset_method").write_text("pm")
    with pytest.raises(ResetFailed, match="the kernel knows no reset by flr \\(pm\\)"):
        pcireset.reset(folder, Rung.FUNCTION_RESET)
    (folder / "reset_method").unlink()
    assert pcireset.methods(folder) == ()


async def test_others_on_its_bus_keep_it_from_a_bus_reset(root: Path, tmp_path: Path) -> None:
    card(root)
    own, stranger = card(root, "0000:17:00.1", ""), card(root, "0000:17:01.0", "snd_hda_intel")
    for folder in (own, stranger):
        (folder / "class").write_text("0x040300")
    cards, gpus, uuid = await cards_of(root, tmp_path / "state")
    assert (await cards.card(uuid, 5)).strangers == ("0000:17:01.0 (snd_hda_intel)",), "its own audio goes with it"
    with pytest.raises(ResetFailed, match=r"0000:17:01\.0 \(snd_hda_intel\) would be reset too"):
        await cards.reset(uuid, Rung.BUS_RESET, 5)
    await cards.reset(uuid, Rung.FUNCTION_RESET, 5)
    await cards.aclose()
    await gpus.aclose()


async def test_who_holds_it_is_named_and_it_is_left_alone(root: Path, tmp_path: Path) -> None:
    folder = card(root)
    (folder / "drm/renderD128").mkdir(parents=True)
    process = root / "proc/4711"
    (process / "fd").mkdir(parents=True)
    (process / "comm").write_text("python3\n")
    (process / "fd/3").symlink_to("/dev/dri/renderD128")
    cards, gpus, uuid = await cards_of(root, tmp_path / "state")
    assert (await cards.card(uuid, 5)).holders == ("python3 (4711)",)
    for work in (cards.bind(uuid, 5), cards.reset(uuid, Rung.FUNCTION_RESET, 5)):
        with pytest.raises(HeldByOther, match="held open by python3 \\(4711\\)"):
            await work
    assert (folder / "driver_override").read_text() == "(null)"
    with pytest.raises(Unavailable, match="was not reset by this agent"):
        await cards.prove(uuid, 5)
    await cards.aclose()
    await gpus.aclose()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "$CASEMATE_GPU_ADDRESS: 1024 MiB"', f"ended with 0: {CARD}: 1024 MiB"),
        ("true", "ended with 0: nothing"),
        ("echo almost; exit 3", ""),
        ("exec sleep 600", ""),
    ],
)
async def test_the_scrubber_of_the_administrator(root: Path, tmp_path: Path, script: str, said: str) -> None:
    card(root, driver="")
    (root / "sys/bus/pci/drivers_probe").write_text("")
    cards, gpus, uuid = await cards_of(root, tmp_path / "state", "/bin/sh", "-c", script)
    if said:
        assert (await cards.scrub(uuid, 60)).endswith(said)
    elif "sleep" in script:
        with pytest.raises(DeadlineExceeded, match="was killed"):
            await cards.scrub(uuid, 0.3)
    else:
        with pytest.raises(ScrubFailed, match="/bin/sh ended with 3: almost"):
            await cards.scrub(uuid, 60)
    await cards.aclose()
    await gpus.aclose()


async def test_without_a_scrubber_nothing_is_scrubbed(root: Path, tmp_path: Path) -> None:
    card(root)
    cards, gpus, uuid = await cards_of(root, tmp_path / "state")
    with pytest.raises(ScrubFailed, match=r"no scrubber is configured: name one as gpu\.scrub"):
        await cards.scrub(uuid, 5)
    await cards.aclose()
    await gpus.aclose()
