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
from casemate_agent.functions import FunctionFacts
from casemate_core.errors import CasemateError

DEADLINE_S = 60.0


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
    facts, told = asyncio.run(_check(config, repair=repair))
    leaks = facts.leaks()
    if output == "json":
        text = json.dumps({**asdict(facts), "leaks": list(leaks)}, indent=2)
    else:
        text = "\n".join([*told, *_lines(facts), *(f"leak: {leak}" for leak in leaks)])
    sys.stdout.write(text + "\n")
    return 1 if leaks or facts.problems or facts.lost else 0


def _lines(facts: FunctionFacts) -> list[str]:
    """What is somebody's, and what is not as configured."""
    lines = [
        f"held: {key} by {stamp.owner}, placement {stamp.epoch}.{stamp.generation}"
        for key, stamp in sorted(facts.stamped().items())
    ]
    lines += [f"lost: {key} of {stamp.owner} is not on this host any more" for key, stamp in sorted(facts.lost.items())]
    free = sum(vf.stamp is None for vf in facts.vfs.values()) + sum(d.stamp is None for d in facts.devices.values())
    return [*lines, *facts.problems, f"{len(facts.vfs)} virtual functions, {len(facts.devices)} devices, {free} free"]


async def _check(config: Config, *, repair: bool) -> tuple[FunctionFacts, list[str]]:
    from casemate_agent.drivers.sriov import HostFunctions  # pyroute2, only where it is used

    functions = HostFunctions(Path(config.run_dir), config.ports, config.devices)
    told = []
    try:
        facts = await functions.observe(DEADLINE_S)
        if repair:
            for key, vf in sorted(facts.vfs.items()):
                if vf.stamp is not None or vf.is_clean:
                    continue
                try:
                    await functions.clean(key, DEADLINE_S)
                    told.append(f"cleaned: {key}")
                except CasemateError as error:
                    told.append(f"not cleaned: {key}: {error}")
            facts = await functions.observe(DEADLINE_S)
        return facts, told
    finally:
        await functions.aclose()
