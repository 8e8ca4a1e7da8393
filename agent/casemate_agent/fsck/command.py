"""``casemate-agent fsck``: virtual functions and devices of this host, what is left of somebody, and its repair.

What may live here: the verb's flags, its output and its exit code. It asks the machine itself, not the agent, and may run
beside one: both lock a function before they touch it.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from casemate_agent.config import Config, load
from casemate_agent.fsck.leaks import Finding, Found, look


def add_parser(verbs: Any) -> None:
    """Its place among the agent's verbs."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        "fsck",
        help="show virtual functions that are left in somebody's state, and repair them",
        description="Reads every virtual function and device that may be given away, from the kernel. Exit codes: 0 nothing "
        "is left of anybody (any more), 1 something is, 2 wrong flags.",
    )
    verb.add_argument("--repair", action="store_true", help="clean what nobody has")
    verb.add_argument("-o", "--output", choices=["text", "json"], default="text", help="form of the output")
    verb.add_argument("--config", default="/etc/casemate/agent.toml", help="TOML file with the agent's settings")
    verb.add_argument("--run-dir", help="where the agent's stamps are (default /run/casemate)")


def main(flags: dict[str, Any]) -> int:
    """Run it. Raises CallerError for settings without a meaning, CasemateError for a machine that does not answer."""
    repair, output = flags.pop("repair"), flags.pop("output")
    config = load(flags.pop("config"), flags, needs_name=False)
    found = asyncio.run(_look(config, repair=repair))
    if output == "json":
        findings = [asdict(finding) for finding in found.findings]
        text = json.dumps({**asdict(found.facts), "leaks": list(found.facts.leaks()), "findings": findings}, indent=2)
    else:
        text = "\n".join([*map(_line, found.findings), _sum(found)])
    sys.stdout.write(text + "\n")
    return 0 if found.clean else 1


def _line(finding: Finding) -> str:
    owner = f" by {finding.owner}," if finding.kind == "held" else f" of {finding.owner}" if finding.owner else ":"
    return f"{finding.kind}: {finding.function}{owner} {finding.detail}" if finding.function else finding.detail


def _sum(found: Found) -> str:
    return f"{len(found.facts.vfs)} virtual functions, {len(found.facts.devices)} devices, {found.free} free"


async def _look(config: Config, *, repair: bool) -> Found:
    from casemate_agent.drivers.partitions import CgroupPartitions
    from casemate_agent.drivers.sriov import HostFunctions  # pyroute2, only where it is used

    functions = HostFunctions(Path(config.run_dir), config.ports, config.devices)
    partitions = CgroupPartitions()
    try:
        return await look(functions, partitions, config.isolate, repair=repair)
    finally:
        await functions.aclose()
        await partitions.aclose()
