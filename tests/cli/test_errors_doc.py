"""docs/errors.md is a transcript: its files are written, its commands run, and every line is compared.

The page holds the commands and the files; what the commands say is compared, or written anew with --regenerate.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.fleet import Fleet

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
#: How far something is, in lines that come as it moves: no error, and never the same twice.
PROGRESS = re.compile(r"^(?!error:).*waiting for (phase|deletion).*\n", re.MULTILINE)
BLOCK = re.compile(r"```(\w+)(?: file=(\S+))?\n(.*?)```\n", re.DOTALL)


def say(fleet: Fleet, folder: Path, command: str) -> str:
    """What one command line prints on both outputs, and its exit code where it is not 0."""
    program = f'casemate() {{ {shlex.quote(sys.executable)} -m casemate_cli "$@"; }}\nset -o pipefail\n{command}'
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env={**fleet.environ, "NO_COLOR": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout if done.stdout.endswith("\n") or not done.stdout else done.stdout + "\n"
    said = PROGRESS.sub("", said)
    return said + (f"(exit {done.returncode})\n" if done.returncode else "")


def replay(fleet: Fleet, folder: Path, text: str) -> str:
    """The page with what its commands say now."""

    def block(match: re.Match[str]) -> str:
        language, name, body = match.groups()
        if name:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
            return match.group()
        if language != "console":
            return match.group()
        commands = [line[2:] for line in body.splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"$ {c}\n{say(fleet, folder, c)}" for c in commands) + "```\n"

    return BLOCK.sub(block, text)


@pytest.fixture
def images(fleet: Fleet) -> None:
    """The images that the page's manifests name are known to every fleet of `casemate dev`."""
    assert "image/debian-13" in fleet.run("get", "images", "-o", "name").ok()


@pytest.mark.usefixtures("images")
def test_the_transcript(fleet: Fleet, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    after = replay(fleet, tmp_path, PAGE.read_text())
    if request.config.getoption("--regenerate"):
        PAGE.write_text(after)
    assert after == PAGE.read_text()
