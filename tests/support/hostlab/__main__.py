# ruff: noqa: T201 (a command line)
"""``make lab`` and ``make lab-shell``: the emulated server from the command line.

``build`` makes its parts; ``test`` runs tests/lab on a fresh server and prints a table; ``shell`` gives a shell in one, joined to
a manager, with ``casemate`` at hand there. Whatever was started is ended.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from support.hostlab.build import PROJECT, LabFailed, build
from support.hostlab.server import server_up

MOTD = """
This is an emulated server. Its agent has joined a manager outside; `casemate get hosts` asks that manager.
  journalctl -fu casemate-agent     the agent's log
  casemate describe host lab        what the agent found here
Leave the shell, and the server and its manager are gone.
"""


def say(text: str) -> None:
    """One line of progress."""
    print(f"lab: {text}", flush=True)


def test(arguments: list[str]) -> int:
    """The suite, and then its table: one line a test, with its time. ``-m lab_faults`` or ``-m two_labs`` among the arguments
    asks for those."""
    parts_s = time.monotonic()
    build(say)
    say(f"parts are there after {time.monotonic() - parts_s:.0f} s")
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "lab and not lab_faults and not two_labs",
            f"--junitxml={report.name}",
        ]
        where = [] if any(word.startswith("tests/") for word in arguments) else ["tests/lab"]
        code = subprocess.run([*command, *arguments, *where], cwd=PROJECT, check=False).returncode
        table(Path(report.name))
    return code


def table(report: Path) -> None:
    """The results as a table."""
    if not report.stat().st_size:
        return
    rows = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        rows.append((name, "FAILED" if failed else "held", float(case.get("time", "0"))))
    width = max((len(name) for name, _, _ in rows), default=0)
    print(f"\n{'on the emulated server':<{width}}  RESULT   SECONDS")
    for name, result, seconds in rows:
        print(f"{name:<{width}}  {result:<7}  {seconds:7.1f}")


def shell() -> int:
    """A shell for a person."""
    with tempfile.TemporaryDirectory(prefix="casemate-lab-") as folder, server_up(Path(folder), say) as server:
        server.machine.write("/etc/motd", MOTD.encode())
        return server.machine.shell()


def main() -> int:
    """Exit codes: 0 all held, 1 something did not, 2 the server could not be made."""
    parser = argparse.ArgumentParser(prog="hostlab", description=__doc__)
    parser.add_argument("verb", choices=["build", "test", "shell"])
    parser.add_argument("arguments", nargs="*", help="for pytest")
    given = parser.parse_args()
    try:
        if given.verb == "build":
            build(say)
            return 0
        return shell() if given.verb == "shell" else test(given.arguments)
    except LabFailed as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
