"""A libvirtd that hangs while it is asked, again and again: a program, since what it looks for is the end of its process.

Run as ``python virt_hang.py FOLDER URI SCOPE PID``: stops libvirtd (PID) until its client gives up on it, lets it go on, and
asks until it answers. Two threads within one connection end this process with SIGSEGV on libvirt 9.0. Exit status 0: it
answered in the end.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from casemate_agent.drivers import virtlines
from casemate_agent.drivers.libvirt import LibvirtHypervisor, LibvirtSettings
from casemate_core.errors import CasemateError

GIVE_UP_S = 60.0
ASKERS = 6


async def hang(settings: LibvirtSettings, pid: int) -> None:
    async with LibvirtHypervisor(settings) as hypervisor, asyncio.timeout(GIVE_UP_S):
        await hypervisor.domains(20)
        os.kill(pid, signal.SIGSTOP)
        try:
            ends_s = asyncio.get_running_loop().time() + 6
            while asyncio.get_running_loop().time() < ends_s:
                asked = (hypervisor.domains(0.5) for _ in range(ASKERS))
                answers = await asyncio.gather(*asked, return_exceptions=True)
                assert all(isinstance(answer, CasemateError) for answer in answers), answers
                await asyncio.sleep(0.1)
        finally:
            os.kill(pid, signal.SIGCONT)
        while True:
            try:
                await hypervisor.domains(5)
                return
            except CasemateError:
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    virtlines.KEEPALIVE_INTERVAL_S, virtlines.KEEPALIVE_COUNT = 1, 2
    folder = Path(sys.argv[1])
    asyncio.run(
        hang(
            LibvirtSettings(
                uri=sys.argv[2],
                run_dir=str(folder / "r"),
                instances_dir=str(folder / "i"),
                probe_cache=str(folder / "kvm.json"),
                scope=sys.argv[3],
            ),
            int(sys.argv[4]),
        )
    )
