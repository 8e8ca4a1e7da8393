"""The agent killed once at each step of a card's way from one tenant to the next, on real drivers and with nested VMs.

The same at random a thousand times is tests/journeys/test_gpus_killed.py, on a simulated host.
"""

import json
import sys
from typing import Any

import pytest

from support.hostlab import mortal
from support.hostlab.server import Server

pytestmark = [
    pytest.mark.lab,
    pytest.mark.lab_faults,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("mortal_agent"),
]

CARDS = ("GPU-1af4:1050@0000:20/04.0/00.0", "GPU-1af4:1050@0000:60/04.0/00.0")
WORK, VFIO = "casemate_agent.execute.gpuwork", "casemate_agent.drivers.vfio:Vfio"
RESET, LIBVIRT = "casemate_agent.drivers.pcireset", "casemate_agent.drivers.libvirt:LibvirtHypervisor"
#: Where the agent dies while a card is given, and where while it comes back.
STEPS = (
    (f"before {WORK}:moved", f"before {WORK}:moved"),  # before the record Prepared; before the record Returned
    (f"before {VFIO}.bind", f"before {VFIO}.bind"),  # recorded, not bound; Sanitising, before the first rung
    (f"after {VFIO}.bind", f"after {RESET}:mark"),  # bound, not attached; marked, not reset
    (f"before {LIBVIRT}.start", f"after {RESET}:reset"),  # Attached, and no domain; reset, not proved
    (f"during {LIBVIRT}.start", f"after {RESET}:prove"),  # QEMU begins; proved, and the passport is not written
)


def cards(server: Server) -> dict[str, dict[str, Any]]:
    items = json.loads(server.casemate("get", "gpus", "-o", "json").ok())["items"]
    return {item["metadata"]["name"]: item["status"] for item in items if item["metadata"]["name"] in CARDS}


def clean(server: Server) -> bool:
    found = [status["phase"] for status in cards(server).values()]
    return len(found) == len(CARDS) and set(found) <= {"Free", "HostOwned"}


def test_killed_once_at_each_step_no_card_is_leaked_doubled_or_given_dirty(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.make_fleet()
    server.until("both are clean", lambda: clean(server))
    leaked = doubled = dirty = 0
    for way_up, way_down in STEPS:
        climbs = {uuid: status["passports"][0]["climb"] for uuid, status in cards(server).items()}
        before = mortal.arm(server, way_up)
        server.apply("train", '  gpus: [{model: "Emulated V1"}]')
        mortal.until_dead(server, before)
        uid = server.started("train")["metadata"]["uid"]
        server.until("the record is there", lambda: "Attached" in [c["phase"] for c in cards(server).values()])
        (held,) = [uuid for uuid, status in cards(server).items() if status.get("instance")]
        # of the hostdevs of all domains, by the kernel's own word
        open_by = server.machine.run(
            "ls -l /proc/[0-9]*/fd 2>/dev/null | grep -o '/dev/vfio/[0-9][0-9]*' | sort | uniq -c"
        )
        doubled += len(open_by.splitlines()) != 1
        before = mortal.arm(server, way_down)
        server.casemate("delete", "env", "train", "--no-wait").ok()
        mortal.until_dead(server, before)
        server.until("it is gone", lambda: not server.get("env", "train"))
        server.until("both are clean", lambda: clean(server))
        dirty += cards(server)[held]["passports"][0]["climb"] <= climbs[held]
        leaked += uid in server.machine.run("virsh list --all --uuid")
        leaked += "/dev/vfio/" in server.machine.run("ls -l /proc/[0-9]*/fd 2>/dev/null | grep /dev/vfio/[0-9] || true")
    with capsys.disabled():
        sys.stdout.write(f"\nlab: {2 * len(STEPS)} kills: leaked {leaked}, doubled {doubled}, given dirty {dirty}\n")
    assert (leaked, doubled, dirty) == (0, 0, 0)
