"""``casemate-agent doctor``: look, judge, print.

What may live here: the verb's flags, its output and its exit code. It needs no name, no manager and no running agent.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from casemate_agent.config import Config, load
from casemate_agent.doctor.facts import HostSurvey
from casemate_agent.doctor.verdicts import CHECKS, REQUIRED, diagnose, lines, plain, required_of

#: One question may take so long; the probe guest is the slowest.
DEADLINE_S = 20.0


def add_parser(verbs: Any) -> None:
    """Its place among the agent's verbs."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        "doctor",
        help="say what this host lacks, and the remedy",
        description="Looks at this machine and says what it lacks to run guests, and the remedy. Changes nothing. "
        f"Checks: {', '.join(CHECKS)}. Exit codes: 0 what is required is there, 1 something of it is not, 2 wrong flags.",
    )
    verb.add_argument("-o", "--output", choices=["text", "json"], default="text", help="form of the output")
    verb.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="CHECK",
        help=f"count this check too; may be given again (usual: {', '.join(name for name in CHECKS if name in REQUIRED)})",
    )
    verb.add_argument(
        "--optional", action="append", default=[], metavar="CHECK", help="do not count this check; may be given again"
    )
    verb.add_argument("--config", default="", help="TOML file with the agent's settings; flags go before it")
    verb.add_argument("--state-dir", help="whose disk is looked at (default /var/lib/casemate)")
    verb.add_argument("--libvirt-uri", help="libvirt to ask (default qemu:///system)")


def main(flags: dict[str, Any]) -> int:
    """Run it. Raises CallerError for flags without a meaning."""
    output, require, optional = flags.pop("output"), flags.pop("require"), flags.pop("optional")
    required = required_of(require, optional)
    config = load(flags.pop("config"), flags, needs_name=False)
    survey = asyncio.run(_look(config))
    findings = diagnose(survey, required)
    fit = not any(finding.blocks for finding in findings)
    if output == "json":
        document = {"host": survey.hostname, "kernel": survey.kernel, "fit": fit, "findings": plain(findings)}
        text = json.dumps(document, indent=2)
    else:
        lacking = ", ".join(finding.check for finding in findings if finding.blocks)
        end = "what is required is there" if fit else f"not fit to run guests as required: {lacking}"
        text = "\n".join([*lines(findings), "", f"{survey.hostname}: {end}"])
    sys.stdout.write(text + "\n")
    return 0 if fit else 1


async def _look(config: Config) -> HostSurvey:
    from casemate_agent.drivers.survey import HostSurveyor  # libvirt and pyroute2, only where they are used

    surveyor = HostSurveyor(Path(config.state_dir), config.libvirt_uri, config.scope)
    try:
        return await surveyor.look(DEADLINE_S)
    finally:
        await surveyor.aclose()
