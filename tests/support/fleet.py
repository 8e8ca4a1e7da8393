"""A fleet of real processes for tests of the command line: a manager, simulated hosts, and `casemate` beside them.

It is brought up and ended by `casemate dev`, as a person does it, in a temporary folder and on a port of its own; once a
session, since it takes seconds. Tests share it, so each uses names of its own and deletes what it made.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS = 3


@dataclass(frozen=True, slots=True)
class Done:
    """One run of `casemate`."""

    code: int
    out: str
    err: str

    def ok(self) -> str:
        """Standard output of a run that ended well; fails the test of any other."""
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self.out


@dataclass(frozen=True, slots=True)
class Fleet:
    """A manager that answers, and how to speak to it."""

    manager: str
    folder: Path
    environ: Mapping[str, str]

    def run(self, *arguments: str, stdin: str = "", timeout_s: float = 60, **environ: str) -> Done:
        """Run `casemate ARGUMENTS`."""
        return casemate(*arguments, stdin=stdin, timeout_s=timeout_s, environ={**self.environ, **environ})

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Run `casemate ARGUMENTS` in the background, both outputs piped; the caller ends it."""
        return subprocess.Popen(
            [sys.executable, "-m", "casemate_cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(self.environ),
        )


def casemate(*arguments: str, environ: Mapping[str, str], stdin: str = "", timeout_s: float = 60) -> Done:
    """Run the program as a person does."""
    done = subprocess.run(
        [sys.executable, "-m", "casemate_cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=dict(environ),
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def clean_environment(folder: Path, manager: str = "") -> dict[str, str]:
    """The environment without a person's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CASEMATE_", "XDG_")) or k == "CASEMATE_TEST_RUN"}
    kept |= {"CASEMATE_CONFIG": str(folder / "no-config.yaml"), "XDG_STATE_HOME": str(folder / "state")}
    # Where a fleet speaks TLS its certificate is in the file of contexts and is used; others are in plain text.
    kept |= {"CASEMATE_INSECURE_LOOPBACK": "1"}
    kept |= {"CASEMATE_MANAGER": manager} if manager else {}
    return kept


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three simulated hosts, without an environment."""
    folder = tmp_path_factory.mktemp("fleet")
    port = free_port()
    environ = clean_environment(folder, f"127.0.0.1:{port}")
    where = ("--dir", str(folder / "dev"))
    up = casemate(
        "dev",
        "up",
        "--simulated",
        str(HOSTS),
        "--port",
        str(port),
        "--no-example",
        *where,
        environ=environ,
        timeout_s=100,
    )
    try:
        up.ok()
        yield Fleet(f"127.0.0.1:{port}", folder, environ)
    finally:
        casemate("dev", "down", *where, environ=environ, timeout_s=100).ok()
