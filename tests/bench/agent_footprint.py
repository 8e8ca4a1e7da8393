"""What an agent takes of its host: memory and CPU, with and without VMs.

Starts ``casemate-agent`` on one simulated host, first with an empty ledger, then with one that wants 100 instances, and
reads the process's figures once all of them run. The simulated machine lives in the same process, so what is printed is
an upper bound. Prints a table; exits 0.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from casemate_agent.ledger.files import OsFiles
from casemate_agent.ledger.store import Ledger, inline
from casemate_core.claims import Claim, PlainMemory, SharedCpu
from casemate_wire.stream import Desired
from support.agents import NETWORK, instance, uid

VMS = 100
SETTLED_S = 40.0
WATCHED_S = 30.0
LINE = "2s 32k/c 2t 256G disk=4T"


def figures(pid: int) -> tuple[float, float]:
    """Resident memory in MB, CPU seconds used so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return resident_kb / 1000, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def claim(number: int) -> Claim:
    """Half a thread and a GiB, on one cell or the other."""
    cell = number % 2
    return Claim(
        owner=uid(number),
        vcpus_online=1,
        vcpus_max=1,
        shared=(SharedCpu(cell, 500),),
        memory=(PlainMemory(cell, 1024, 0, 1024),),
    )


async def want(folder: Path, vms: int) -> None:
    ledger = await Ledger.load(OsFiles(folder / "ledger"), inline)
    desired = tuple(instance(number, nics=(), claim=claim(number)) for number in range(1, vms + 1))
    await ledger.accept(Desired(1, 1, True, desired, networks=(NETWORK,)))


def measure(vms: int) -> tuple[float, float]:
    """Resident MB and per cent of one core, at rest."""
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(want(Path(name), vms))
        command = [
            sys.executable,
            "-m",
            "casemate_agent",
            "run",
            "--name",
            "h",
            "--simulated",
            LINE,
            "--state-dir",
            name,
        ]
        # a manager that is away: what the link and gRPC take is counted too
        command += ["--manager", "127.0.0.1:1", "--insecure-loopback", "--log-level", "error"]
        process = subprocess.Popen(command)
        try:
            time.sleep(SETTLED_S)
            _, before = figures(process.pid)
            time.sleep(WATCHED_S)
            resident, after = figures(process.pid)
        finally:
            process.terminate()
            process.wait()
    return resident, 100 * (after - before) / WATCHED_S


def main() -> None:
    none, many = measure(0), measure(VMS)
    print(f"{'VMs':>5} {'RSS MB':>8} {'% of a core':>12}")
    print(f"{0:>5} {none[0]:>8.1f} {none[1]:>12.2f}")
    print(f"{VMS:>5} {many[0]:>8.1f} {many[1]:>12.2f}")
    print(f"a VM: {(many[0] - none[0]) / VMS * 1000 / 1024:.3f} MiB (goal 0.2); RSS goal 60 MB, CPU goal 0.3 %")


if __name__ == "__main__":
    main()
