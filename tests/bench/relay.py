"""What the second half of a split agent costs: memory of the processes, time of a message, and CPU of the relay.

    python tests/bench/relay.py [--changes 150]

A manager in plain text on loopback, and simulated hosts beside it, all as processes. Memory is what a process has of its own
(RssAnon), after it has had a session for a while: one agent alone, and the two halves. Time is from a host's telling of a change to
the acknowledgement, one change each 40 ms, directly and by way of a relay, in turns. CPU is that of the relay's process while a
host tells as fast as it may.

Prints a table, then one line of JSON; exits 0.
"""

import argparse
import asyncio
import json
import os
import pwd
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.joins import AHEAD, Agent, flood, free_port, running, until
from casemate_agent.enrolment.identity import Identity
from casemate_agent.relay.pipe import Relay
from casemate_agent.uplink.transport import GrpcTransport

LOOPBACK = ("--insecure-loopback",)
LINE = "2s 32k/c 2t 256G disk=4T"


class Process:
    """One of ours, ended with the stack."""

    def __init__(self, stack: ExitStack, log: Path, *arguments: str) -> None:
        with log.open("ab") as out:
            self._child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=out, stderr=out)
        stack.callback(self._end)

    def _end(self) -> None:
        self._child.terminate()
        self._child.wait(60)

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return float(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(folder: Path, changes: int) -> dict[str, Any]:
    port = free_port()
    address, sock, log = f"127.0.0.1:{port}", folder / "relay.sock", folder / "log"
    plain = ("--manager", address, "--insecure-loopback")

    def sessions() -> int:
        return log.read_text().count("session open") if log.exists() else 0

    with ExitStack() as stack:
        listen = ("--state-dir", str(folder / "m"), "--listen", address, "--insecure-loopback")
        Process(stack, folder / "manager.log", "casemate_manager", "serve", *listen)
        where = ("--simulated", LINE, "--state-dir", str(folder / "alone"), "--run-dir", str(folder / "run1"))
        alone = Process(stack, log, "casemate_agent", "run", "--name", "alone", *where, *plain)
        await until(lambda: sessions() == 1, 120, "the agent alone has a session")
        state = ("--relay", str(sock), "--state-dir", str(folder / "r"), "--name", "split")
        relay = Process(stack, folder / "relay.log", "casemate_agent", "relay", *state, *plain)
        await until(sock.exists, 120, "the relay listens")
        user = pwd.getpwuid(os.geteuid()).pw_name
        where = ("--simulated", LINE, "--state-dir", str(folder / "split"), "--run-dir", str(folder / "run2"))
        root = Process(
            stack, log, "casemate_agent", "run", "--relay", str(sock), "--relay-user", user, *where, *LOOPBACK
        )
        await until(lambda: sessions() == 2, 120, "the split agent has a session")
        await asyncio.sleep(5)
        result: dict[str, Any] = {
            "alone_mb": round(alone.memory_mb(), 1),
            "root_mb": round(root.memory_mb(), 1),
            "relay_mb": round(relay.memory_mb(), 1),
        }
        direct, relayed = _agent("direct", address), _agent("relayed", address)
        direct._transport = GrpcTransport(address)
        relayed._transport = Relay(sock, os.geteuid())
        async with running([direct.run(), relayed.run()]):
            await until(lambda: direct.joined.is_set() and relayed.joined.is_set(), 120, "both have joined")
            for agent in (direct, relayed):
                agent.took_ms.clear()
            for _ in range(changes):
                for agent in (direct, relayed):
                    agent.change()
                    await asyncio.sleep(0.02)
            await asyncio.sleep(1)
            result |= {
                "direct_p50_ms": round(statistics.median(direct.took_ms), 2),
                "relayed_p50_ms": round(statistics.median(relayed.took_ms), 2),
                "changes": len(relayed.took_ms),
            }
            cpu, told = relay.cpu_s(), relayed.acked
            begin = time.perf_counter()
            await flood([relayed], relay, 4.0, lambda agent: agent.change(AHEAD))
            used, done = relay.cpu_s() - cpu, relayed.acked - told
        return result | {
            "messages_per_relay_cpu_s": round(done / max(used, 0.01)),
            "messages_per_s": round(done / (time.perf_counter() - begin)),
        }


def _agent(name: str, address: str) -> Agent:
    return Agent(Identity(name, address, address, "", "", "", 0.0, 0.0), Random(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=150)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = asyncio.run(measure(Path(name), options.changes))
    for key, value in result.items():
        print(f"{key:28} {value:>10}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
