"""A private fleet brought up and ended by `casemate dev`, with real VMs, and a look at what it leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from casemate_agent import sandbox as sandboxes
from support.fleet import Done, casemate, clean_environment, free_port
from support.realfleet import free_subnet, tail, until


class DevFleet:
    """`casemate dev` in a folder of its own, and `casemate` beside it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "d"
        self.port = free_port()
        self.subnet = free_subnet(self.port)
        self.environ = clean_environment(folder, f"127.0.0.1:{self.port}")
        self.scope = sandboxes.scope_of(self.root / "virt")

    def run(self, *arguments: str, timeout_s: float = 120, stdin: str = "") -> Done:
        return casemate(*arguments, environ=self.environ, timeout_s=timeout_s, stdin=stdin)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Run `casemate ARGUMENTS` in the background, its output piped; the caller ends it."""
        return subprocess.Popen(
            [sys.executable, "-m", "casemate_cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environ,
        )

    def up(self, *more: str, timeout_s: float = 900) -> Done:
        where = ("--dir", str(self.root), "--port", str(self.port), "--subnet", self.subnet)
        done = self.run("dev", "up", *where, *more, timeout_s=timeout_s)
        if done.code:
            pytest.fail(f"dev up: exit {done.code}\n{done.out}\n{done.err}\n{self.tails()}", pytrace=False)
        return done

    def down(self) -> Done:
        return self.run("dev", "down", "--dir", str(self.root), timeout_s=240)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("dev", "status", "--dir", str(self.root), "-o", "json").ok())
        return found

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object; empty where there is none."""
        done = self.run("get", kind, name, "-o", "json")
        if done.code == 4:
            return {}
        found: dict[str, Any] = json.loads(done.ok())
        return found

    def tails(self) -> str:
        logs = [self.root / "logs/agent.log", self.root / "logs/manager.log"]
        return "\n".join(map(tail, [*logs, *sorted(self.root.glob("agent/instances/*/console.log"))]))

    def until(self, what: str, met: Any, timeout_s: float = 120) -> Any:
        return until(what, met, timeout_s, self.tails, every_s=1.0)

    def qemus(self) -> dict[str, int]:
        sandbox = sandboxes.status(self.root / "virt")
        assert sandbox is not None
        found = {}
        for pid in sandboxes._members(sandbox):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "qemu-system" in argv[0] and "-uuid" in argv:
                found[argv[argv.index("-uuid") + 1]] = pid
        return found
