"""Cards between tenants, on a real kernel: bound by vfio-pci, reset, proved, given, held, pulled out. What stands for GPUs is
`support.hostlab.machine.GPUS`; they are declared by rules, since no library tells them.
"""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import gpus_contract
from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

#: By the way through the slots, which is the name of a card without a serial number (see `machine`: root port N of cell C is slot N).
V0, V1 = "GPU-1af4:1050@0000:20/04.0/00.0", "GPU-1af4:1050@0000:60/04.0/00.0"
E, M = "GPU-1234:11e8@0000:20/05.0/00.0", "GPU-1af4:1110@0000:60/02.0/00.0"
SHARED = "GPU-1234:11e8@0000:60/05.0/00.0/01.0"
CLEAN = (V0, V1, E, M)


@pytest.fixture(autouse=True)
def fleet(server: Server) -> None:
    server.make_fleet()
    all_clean(server)


# --- what is seen -----------------------------------------------------------------------------------------------------


def gpus(server: Server) -> dict[str, dict[str, Any]]:
    """Status of each GPU, by name."""
    items = json.loads(server.casemate("get", "gpus", "-o", "json").ok())["items"]
    return {item["metadata"]["name"]: item["status"] for item in items}


def is_in(server: Server, uuid: str, *phases: str) -> bool:
    return gpus(server).get(uuid, {}).get("phase") in phases


def all_clean(server: Server) -> None:
    server.until("each is clean", lambda: all(is_in(server, uuid, "Free", "HostOwned") for uuid in CLEAN))


def passport(server: Server, uuid: str) -> dict[str, Any]:
    """The newest."""
    status: dict[str, Any] = json.loads(server.casemate("get", "gpu", uuid, "-o", "json").ok())["status"]
    found: dict[str, Any] = status["passports"][0]
    return found


def rungs(of: dict[str, Any]) -> dict[str, str]:
    return {step["rung"]: step["result"] for step in of["steps"]}


def driver(server: Server, address: str) -> str:
    """As the kernel says it."""
    return server.machine.run(f"basename $(readlink /sys/bus/pci/devices/{address}/driver) 2>/dev/null || true").strip()


def ordered(server: Server, verb: str, uuid: str, *more: str) -> None:
    server.casemate("gpu", verb, uuid, *more).ok()


@contextmanager
def held_open(server: Server, path: str) -> Iterator[None]:
    """A process of the server has a file open."""
    program = f"import os, time; f = os.open({path!r}, os.O_RDWR); print('open', flush=True); time.sleep(600)"
    server.machine.run(f"systemd-run -q --unit=holder python3 -c {shlex.quote(program)}")
    try:
        said = "journalctl -u holder -o cat --no-pager -n 3"
        server.until("it has it open", lambda: "open" in server.machine.run(said))
        yield
    finally:
        server.machine.run("systemctl stop holder", check=False)


# --- cards that nobody has --------------------------------------------------------------------------------------------


def test_each_card_is_cleaned_as_its_kernel_can_and_one_that_shares_its_group_is_held(server: Server) -> None:
    seen = gpus(server)
    assert set(seen) == {*CLEAN, SHARED}
    for uuid, reset, proof in (
        (V0, "function-reset", "mask of its MSI-X"),
        (E, "bus-reset", "address of its MSI"),
        (M, "bus-reset", "no register of it shows that it was reset"),
    ):
        told = passport(server, uuid)
        assert told["clean"] and {"released", reset, "proved"} <= set(rungs(told)), told
        (proved,) = [step for step in told["steps"] if step["rung"] == "proved"]
        assert proof in proved["evidence"]
    held = seen[SHARED]
    assert held["phase"] == "Quarantined" and "GroupNotViable" in held["reason"]
    assert f"{held['pciAddress'][:-4]}02.0 (virtio-pci) too" in held["reason"]
    wide = server.casemate("get", "gpus", "-o", "wide").ok()
    assert "vfio-pci" in wide and "GroupNotViable" in wide
    story = server.casemate("describe", "gpu", V0).ok()
    for words in (
        "reset-seen    passed",
        "that its memory was emptied: nothing overwrote it",
        "link-width    passed   x1 of x1",
    ):
        assert words in story, story


def test_a_bus_with_others_on_it_is_not_reset(server: Server) -> None:
    """The kernel names the method: it looked when nothing else was on that bus yet."""
    address = gpus(server)[SHARED]["pciAddress"]
    other = f"{address[:-4]}02.0"
    assert "bus" in server.machine.read(f"/sys/bus/pci/devices/{address}/reset_method")
    server.machine.run(f"echo {other} > /sys/bus/pci/drivers/virtio-pci/unbind")
    try:
        ordered(server, "release", SHARED)
        said = f"a bus reset would reset others on its bus too: {other} (no driver)"
        server.until("it is held for that", lambda: said in gpus(server)[SHARED].get("reason", ""))
        assert rungs(passport(server, SHARED)) == {"released": "passed"}
    finally:
        server.machine.run(f"echo {other} > /sys/bus/pci/drivers_probe")
    assert driver(server, other) == "virtio-pci"
    # It is on vfio-pci itself now, and is not taken for given: the group is looked at again.
    ordered(server, "release", SHARED)
    server.until("as before", lambda: "GroupNotViable" in gpus(server)[SHARED].get("reason", ""))


CARDS = """
import asyncio, sys, tempfile
from pathlib import Path
from casemate_agent.config import load
from casemate_agent.drivers.gpucards import HostCards
from casemate_agent.drivers.gpus import HostGpus
async def main(work):
    config = load("/etc/casemate/agent.toml", {}, needs_name=False)
    with tempfile.TemporaryDirectory() as name:
        gpus = HostGpus(Path(name), rules=config.gpus)
        cards = HostCards(gpus, scrubber=("/bin/true",))
        try:
            await gpus.look(60)
            await work(cards)
        finally:
            await cards.aclose()
            await gpus.aclose()
"""
STORY = """
async def told(cards):
    for uuid in sys.argv[1:]:
        await cards.unbind(uuid, 60)
        print(uuid, (await cards.look(60))[uuid].driver or "nobody")
        await story(cards, uuid)
asyncio.run(main(told))
"""
REFUSALS = """
async def told(cards):
    (uuid,) = sys.argv[1:]
    for work in (cards.bind, cards.unbind, lambda *a: cards.reset(a[0], Rung.FUNCTION_RESET, a[1])):
        try:
            print("done", await work(uuid, 60))
        except CasemateError as error:
            print(error.reason, error)
    print("holders", *(await cards.card(uuid, 60)).holders)
asyncio.run(main(told))
"""


def test_the_real_cards_keep_the_contract(server: Server) -> None:
    """The suite of tests/contract, on three cards, with the agent away: it would record what it sees."""
    server.stop_agent()
    try:
        source = Path(gpus_contract.__file__).read_text() + CARDS + STORY
        said = server.machine.run(f"python3 - {V0} {E} {M}", stdin=source.encode(), timeout_s=240)
    finally:
        server.start_agent()
    assert said.splitlines() == [f"{V0} virtio-pci", f"{E} nobody", f"{M} nobody"]
    server.until("it has joined again", server.joined)
    server.until("what was left with the host is the host's own", lambda: is_in(server, V0, "HostOwned"))
    ordered(server, "sanitise", V0)
    server.until("it is clean", lambda: is_in(server, V0, "Free"))


def test_who_holds_a_card_is_named_after_the_time_that_he_is_given(server: Server) -> None:
    address = gpus(server)[V0]["pciAddress"]
    folder = f"/sys/bus/pci/devices/{address}"
    group = server.machine.run(f"basename $(readlink {folder}/iommu_group)").strip()
    for owner, path in (("vfio-pci", f"/dev/vfio/{group}"), ("virtio-pci", "")):
        if owner != "vfio-pci":  # the host's own driver takes it
            server.machine.run(
                f"echo {address} > /sys/bus/pci/drivers/vfio-pci/unbind; echo > {folder}/driver_override; "
                f"echo {address} > /sys/bus/pci/drivers_probe; udevadm settle"
            )
            server.until("it is the host's own", lambda: is_in(server, V0, "HostOwned"))
            path = "/dev/dri/" + server.machine.run(f"ls {folder}/drm | grep card").strip()
        assert driver(server, address) == owner
        with held_open(server, path):
            ordered(server, "sanitise", V0)
            server.until("it is held back", lambda: is_in(server, V0, "Quarantined"))
            told = gpus(server)[V0]["reason"]
            assert "still held: python3 (" in told and "for 8 s" in told
            assert rungs(passport(server, V0)) == {"released": "failed"}
            assert driver(server, address) == owner, "nothing was taken from him"
        ordered(server, "release", V0)
        server.until("it is clean", lambda: is_in(server, V0, "Free"))
        assert driver(server, address) == "vfio-pci"


# --- cards that somebody has ------------------------------------------------------------------------------------------


def console(server: Server, uid: str) -> list[str]:
    return server.machine.run(f"cat /var/lib/casemate/instances/{uid}/console.log", check=False).splitlines()


def test_a_card_goes_to_a_guest_and_comes_back_clean(server: Server) -> None:
    server.apply("train", '  gpus: [{model: "Emulated V1"}]\n  nics: [{network: fronthaul, type: sriov}]')
    try:
        started = server.started("train")
        uid, pid = started["metadata"]["uid"], started["status"]["pid"]
        (uuid,) = [name for name, status in gpus(server).items() if status.get("instance")]
        server.until("it is attached", lambda: is_in(server, uuid, "Attached"))
        address = gpus(server)[uuid]["pciAddress"]
        # Under one expander where they share a root of the host, each on a root port of its own; the GPU with all of its memory.
        server.until("the guest has listed", lambda: "GUEST-READY" in console(server, uid))
        card, vf = (seen_as(console(server, uid), which) for which in ("1af4:1050", "8086:10ca"))
        ports = {
            line.rpartition(" to ")[2]: line.split(" at ")[1][:2] for line in console(server, uid) if " to " in line
        }
        given = server.machine.run(f"virsh dumpxml {uid} | grep -A3 '<source>' | grep -o \"bus='0x..'\"").split()
        together = len({int(bus[7:9], 16) // 0x40 for bus in given}) == 1  # bus 0x20 and up, or 0x60 and up
        assert (ports[card[:2]] == ports[vf[:2]]) == together and min(ports[card[:2]], ports[vf[:2]]) >= "40", given
        (line,) = [line for line in console(server, uid) if "1af4:1050" in line]
        place = int(line.rpartition("bar4 0000000020000000@")[2], 16)
        assert place >= 1 << 32 and place % (512 << 20) == 0, line
        # 64 MiB of the guest and 1 GiB beside it, as bytes
        locked = server.machine.run(f"grep 'Max locked memory' /proc/{pid}/limits").split()
        assert locked[3:5] == [str((64 + 1024) << 20)] * 2
        # No act on it while the VM has it, whoever asks: the driver itself, beside the agent.
        source = (
            "from casemate_core.errors import CasemateError\nfrom casemate_core.gpu import Rung\n" + CARDS + REFUSALS
        )
        said = server.machine.run(f"python3 - {uuid}", stdin=source.encode(), timeout_s=120).splitlines()
        assert said[0] == f"done {address}", "it is bound already: nothing was done"
        assert [line.split()[0] for line in said[1:3]] == ["HeldByOther"] * 2, said
        assert all(f"({pid})" in line and "qemu" in line for line in said[1:]), said
        ordered(server, "quarantine", uuid, "--reason", "smells of smoke")
        server.until("it is to be held back", lambda: gpus(server)[uuid].get("reason") == "smells of smoke")
        assert is_in(server, uuid, "Attached") and server.get("instance", "train-0")["status"]["pid"] == pid
    finally:
        server.deleted("train")
    server.until("it is held back", lambda: is_in(server, uuid, "Quarantined"))
    ordered(server, "release", uuid)
    server.until("it is clean", lambda: is_in(server, uuid, "Free"))
    told = passport(server, uuid)
    assert told["clean"] and told["tenant"] == "default"
    assert rungs(told) == {"released": "passed", "function-reset": "passed", "proved": "passed"}


def seen_as(lines: list[str], which: str) -> str:
    """Where the guest has the one function of this kind, ``bus:slot.function``."""
    (found,) = [line.split(" at ")[1].split()[0] for line in lines if line.startswith(f"PCI {which} ")]
    return found


def test_a_dirty_card_goes_to_nobody(server: Server) -> None:
    server.apply("first", '  gpus: [{model: "Emulated V1", count: 2}]')
    try:
        server.started("first")
        server.apply("second", '  gpus: [{model: "Emulated V1", count: 2}]')
        server.until("it waits", lambda: "0 free of 2" in server.casemate("why", "env/second").out)
        server.deleted("first")
        uid = server.started("second")["metadata"]["uid"]
        log = server.log(400).splitlines()
        given = next(n for n, line in enumerate(log) if f"PrepareGpus {uid} done" in line)
        for uuid in (V0, V1):
            cleaned = [n for n, line in enumerate(log) if f"SanitiseGpu gpu:{uuid} done" in line]
            assert cleaned and cleaned[-1] < given, "it was clean before it was given"
            assert passport(server, uuid)["clean"] and is_in(server, uuid, "Attached")
    finally:
        server.deleted("first")
        server.deleted("second")


# --- a card's memory --------------------------------------------------------------------------------------------------

SCRUBBER = """#!/usr/bin/python3
import mmap, os
folder = f"/sys/bus/pci/devices/{os.environ['CASEMATE_GPU_ADDRESS']}"
open(f"{folder}/enable", "w").write("1")
with open(f"{folder}/resource2", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    memory[:] = bytes(len(memory))
    print(len(memory), "bytes overwritten")
open(f"{folder}/enable", "w").write("0")
"""
PEEK = """
import mmap, sys
folder, what = sys.argv[1:]
open(f"{folder}/enable", "w").write("1")
with open(f"{folder}/resource2", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    if what:
        memory[4096:4096 + len(what)] = what.encode()
    print(bytes(memory[4096:4102]))
"""


def peek(server: Server, address: str, write: str = "") -> str:
    """Of its memory: what stands there; written first, where given."""
    command = f"python3 -c {shlex.quote(PEEK)} /sys/bus/pci/devices/{address} {shlex.quote(write)}"
    return server.machine.run(command).strip()


def test_a_reset_leaves_what_was_in_its_memory_and_a_scrubber_does_not(server: Server) -> None:
    address = gpus(server)[M]["pciAddress"]
    assert peek(server, address, "secret") == "b'secret'"
    before = passport(server, M)["climb"]
    ordered(server, "sanitise", M)
    server.until("it climbed", lambda: passport(server, M)["climb"] > before and is_in(server, M, "Free"))
    told = passport(server, M)
    assert told["clean"] and "that its memory was emptied: nothing overwrote it" in told["notProven"]
    assert peek(server, address) == "b'secret'", "and so it is: it says what it does not prove"

    server.machine.write("/usr/local/sbin/scrub-gpu", SCRUBBER.encode())
    config = server.machine.read("/etc/casemate/agent.toml")
    scrubbing = config.replace("[gpu]\n", '[gpu]\nscrub = ["/usr/local/sbin/scrub-gpu"]\nrequired = ["scrub"]\n')
    assert scrubbing != config
    server.machine.write("/etc/casemate/agent.toml", scrubbing.encode())
    try:
        server.machine.run("chmod 755 /usr/local/sbin/scrub-gpu; systemctl restart casemate-agent", timeout_s=180)
        ordered(server, "sanitise", M)
        server.until("it climbed", lambda: rungs(passport(server, M)).get("scrub") and is_in(server, M, "Free"))
        told = passport(server, M)
        assert "16777216 bytes overwritten" in next(s for s in told["steps"] if s["rung"] == "scrub")["evidence"]
        assert peek(server, address) == repr(bytes(6))
    finally:
        server.machine.write("/etc/casemate/agent.toml", f"{config}\n".encode())
        server.machine.run("rm -f /usr/local/sbin/scrub-gpu; systemctl restart casemate-agent", timeout_s=180)
        server.until("it has joined again", server.joined)


# --- its link, and whether it is there --------------------------------------------------------------------------------


def hmp(server: Server, line: str) -> str:
    return str(server.machine.monitor("human-monitor-command", **{"command-line": line}))


def counted(server: Server) -> dict[str, float]:
    """PCIe errors of the second card, as the agent's metrics tell them."""
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9470/metrics', timeout=60).read().decode())"
    told = server.machine.run(f"python3 -c {shlex.quote(ask)}")
    lines = [line for line in told.splitlines() if line.startswith("casemate_gpu_pcie_errors_total{") and V1 in line]
    return {line.split('severity="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def test_errors_of_its_link_are_counted_by_the_kernel_and_judged(server: Server) -> None:
    before = counted(server)
    for error in ("-c gpu1 0x40", "gpu1 COMP_TIME"):  # a bad packet that was corrected; a completion that never came
        assert hmp(server, f"pcie_aer_inject_error {error}").startswith("OK")
    server.until("it is suspect", lambda: gpus(server)[V1]["health"] == "suspect")
    told = gpus(server)[V1]
    assert told["healthReasons"] == ["1 PCIe errors that were not corrected"]
    after = counted(server)
    assert {word: after[word] - before[word] for word in after} == {"corrected": 1, "nonfatal": 1, "fatal": 0}
    assert "not corrected" in server.casemate("describe", "gpu", V1).ok()
    assert "GpuHealth" in server.casemate("events", f"host/{HOST}").ok()
    # At the next climb they count against it, and an operator's word takes that away.
    ordered(server, "sanitise", V1)
    server.until("it is held back", lambda: is_in(server, V1, "Quarantined"))
    assert "pcie-nonfatal" in gpus(server)[V1]["reason"]
    ordered(server, "release", V1)
    server.until("it is clean", lambda: is_in(server, V1, "Free"))


def test_a_card_that_is_pulled_is_told_and_is_dirty_when_it_is_back(server: Server) -> None:
    def told(reason: str) -> int:
        return server.casemate("events", f"host/{HOST}", "-o", "json").ok().count(f'"{reason}"')

    before = passport(server, E)["climb"]
    server.machine.monitor("device_del", id="gpu2")
    server.until("it is gone", lambda: E not in gpus(server))
    assert told("GpuGone")
    server.machine.monitor("device_add", driver="edu", id="gpu2", bus="rp05")
    server.until("it was found and cleaned", lambda: is_in(server, E, "Free") and passport(server, E)["climb"] > before)
    assert told("GpuFound")


def test_a_card_that_is_pulled_from_under_a_guest_is_told_and_stays_the_guests(server: Server) -> None:
    server.apply("held", '  gpus: [{model: "Emulated E1"}]')
    try:
        pid = server.started("held")["status"]["pid"]
        server.until("it is attached", lambda: is_in(server, E, "Attached"))
        before = passport(server, E)["climb"]
        server.machine.monitor("device_del", id="gpu2")
        # The kernel has unbound it, and waits for the guest, which does not hear.
        said = ["it is being pulled out while a guest has it"]
        server.until("it is told", lambda: gpus(server)[E].get("healthReasons") == said)
        status = gpus(server)[E]
        assert status["phase"] == "Attached" and not status.get("driver")
        assert server.get("instance", "held-0")["status"]["pid"] == pid
        source = (
            "from casemate_core.errors import CasemateError\nfrom casemate_core.gpu import Rung\n" + CARDS + REFUSALS
        )
        refused = server.machine.run(f"python3 - {E}", stdin=source.encode(), timeout_s=120).splitlines()
        assert all(f"({pid})" in line for line in refused), refused
    finally:
        server.deleted("held")
        server.until("it is gone", lambda: E not in gpus(server))
        server.machine.monitor("device_add", driver="edu", id="gpu2", bus="rp05")
    server.until("it is back", lambda: is_in(server, E, "Free", "Quarantined"))
    if is_in(server, E, "Quarantined"):  # its climb had begun when it went
        assert "is not there" in gpus(server)[E]["reason"]
        ordered(server, "release", E)
    server.until("it is clean", lambda: is_in(server, E, "Free"))
    assert passport(server, E)["climb"] > before and passport(server, E)["tenant"] == "default"
