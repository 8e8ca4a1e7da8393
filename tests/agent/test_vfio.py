"""Who keeps a PCI function from being given away: the others of its IOMMU group, and processes. On a folder with the kernel's layout."""

import os
import tempfile
from pathlib import Path

import pytest

from casemate_agent.drivers.vfio import BindFailed, GroupNotViable, Vfio
from casemate_core.errors import Unavailable

CARD, AUDIO, BRIDGE = "0000:21:00.0", "0000:21:00.1", "0000:20:01.0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A card whose audio function is bound to the host's driver, and the bridge above them, in one group."""
    pci = tmp_path / "sys/bus/pci"
    group = tmp_path / "sys/kernel/iommu_groups/7/devices"
    group.mkdir(parents=True)
    for address, kind, driver in (
        (CARD, "0x030200", ""),
        (AUDIO, "0x040300", "snd_hda_intel"),
        (BRIDGE, "0x060400", "pcieport"),
    ):
        folder = pci / "devices" / address
        folder.mkdir(parents=True)
        (folder / "class").write_text(f"{kind}\n")
        (folder / "iommu_group").symlink_to(group.parent)
        (group / address).symlink_to(folder)
        if driver:
            (pci / "drivers" / driver).mkdir(parents=True)
            (folder / "driver").symlink_to(pci / "drivers" / driver)
    return tmp_path


def test_a_group_is_given_whole_or_the_others_are_named(root: Path) -> None:
    vfio = Vfio(root)
    assert vfio.others_of_group(CARD) == ((AUDIO, "snd_hda_intel"),), "a bridge is no obstacle"
    with pytest.raises(GroupNotViable, match=rf"group 7 of {CARD} holds {AUDIO} \(snd_hda_intel\) too"):
        vfio.bind(CARD)
    assert not (root / f"sys/bus/pci/devices/{CARD}/driver_override").exists(), "nothing was touched"
    bound = root / f"sys/bus/pci/devices/{CARD}/driver"
    (root / "sys/bus/pci/drivers/vfio-pci").mkdir()
    bound.symlink_to(root / "sys/bus/pci/drivers/vfio-pci")
    with pytest.raises(GroupNotViable):
        vfio.bind(CARD)  # bound already: somebody has come to the group since
    bound.unlink()
    (root / f"sys/bus/pci/devices/{CARD}/iommu_group").unlink()
    with pytest.raises(BindFailed, match="switch the IOMMU on"):
        vfio.group(CARD)
    with pytest.raises(Unavailable, match="is gone"):
        vfio.function("0000:99:00.0")


def test_processes_that_have_a_function_open_are_named(root: Path, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    for pid, name, files in (
        (41, "qemu-system-x86", ["/dev/vfio/7", "/dev/null"]),
        (42, "sh", ["/dev/vfio/8"]),
        (43, "perf", []),
    ):
        (proc / f"{pid}/fd").mkdir(parents=True)
        (proc / f"{pid}/comm").write_text(f"{name}\n")
        for number, target in enumerate(files):
            os.symlink(target, proc / f"{pid}/fd/{number}")
    (proc / "self").mkdir()
    vfio = Vfio(root, proc)
    assert vfio.holders(CARD) == ("qemu-system-x86 (41)",), (
        "bound to nothing: the kernel is pulling it from under somebody"
    )
    assert vfio.holders(AUDIO) == (), "bound to another driver: nobody can hold it by VFIO"
    (root / "sys/bus/pci/drivers/vfio-pci").mkdir()
    (root / f"sys/bus/pci/devices/{CARD}/driver").symlink_to(root / "sys/bus/pci/drivers/vfio-pci")
    assert vfio.holders(CARD) == ("qemu-system-x86 (41)",)
    assert vfio.holders("0000:99:00.0") == ()


def test_where_a_process_cannot_be_looked_into_nobody_says_that_a_function_is_free(root: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        proc = Path(name)
        proc.chmod(0o755)
        (proc / "41").mkdir(mode=0o755)
        (proc / "41/fd").mkdir(mode=0o700)
        (proc / "41/fd").chmod(0)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)  # for root there is no such folder
        try:
            with pytest.raises(
                Unavailable, match=r"who has /dev/vfio/7 open is unknown.*let the agent have CAP_SYS_PTRACE"
            ):
                Vfio(root, proc).open_by({"/dev/vfio/7"})
        finally:
            os.seteuid(me)
        (proc / "41/fd").chmod(0o700)
        (proc / "41/fd").rmdir()
        assert Vfio(root, proc).open_by({"/dev/vfio/7"}) == (), "it has ended"
