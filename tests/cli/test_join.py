"""Tokens, hosts and authorities from the command line, on a fleet with TLS; a machine that joins it as its line says."""

import json
import os
import pwd
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from casemate_agent.__main__ import join_as_relay
from casemate_agent.config import BadConfig
from casemate_agent.relay import trust
from support.fleet import Fleet

LINE = re.compile(r"echo (cmt1\.\S+) \| casemate-agent join --manager (127\.0\.0\.1:\d+)\n")


def join(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the line that was printed, with the agent of this checkout and a folder of the test's own."""
    program = f"{shlex.quote(sys.executable)} -m casemate_agent"
    text = line.replace("casemate-agent", program).strip() + f" --state-dir {shlex.quote(str(folder))}"
    return subprocess.run(["sh", "-c", text], capture_output=True, text=True, timeout=60, check=False)


def test_the_printed_line_joins_once(fleet: Fleet, tmp_path: Path) -> None:
    line = fleet.run("host", "token", "create", "box-1", "--print-command", "--label", "site=fra1").ok()
    assert LINE.fullmatch(line)
    done = join(line, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    identity = json.loads((tmp_path / "one/identity/identity.json").read_text())
    assert (identity["host"], identity["manager"]) == ("box-1", fleet.manager)
    again = join(line, tmp_path / "two")
    assert again.returncode == 2
    assert "used before" in again.stderr
    found = json.loads(fleet.run("get", "host", "box-1", "-o", "json").ok())
    assert found["metadata"]["labels"] == {"site": "fra1"}
    assert "box-1" in fleet.run("host", "token", "list").ok()
    assert fleet.run("host", "revoke", "box-1").ok() == "host box-1 revoked\n"
    fleet.run("delete", "host", "box-1").ok()


def test_a_token_that_was_taken_back_joins_nobody(fleet: Fleet, tmp_path: Path) -> None:
    line = fleet.run("host", "token", "create", "box-2", "--print-command").ok()
    found = LINE.fullmatch(line)
    assert found
    name = found[1].split(".")[2]
    assert "Revoked" in fleet.run("host", "token", "revoke", name).ok()
    assert "revoked" in join(line, tmp_path).stderr
    assert not (tmp_path / "identity/identity.json").exists()


def test_what_is_asked_without_sense_is_told(fleet: Fleet, tmp_path: Path) -> None:
    bad = fleet.run("host", "token", "create", "No_Name")
    assert (bad.code, "host" in bad.err) == (1, True)
    assert fleet.run("host", "token", "create", "box", "--for", "2h").code == 1
    assert fleet.run("host", "token", "create", "box", "--label", "x").code == 1
    assert fleet.run("host", "token", "revoke", "nothing").code == 4
    assert fleet.run("host", "revoke", "nobody").code == 4
    assert join("echo x | casemate-agent join --manager 127.0.0.1:1", tmp_path).returncode == 2


def test_authorities_are_listed_and_the_one_that_signs_is_not_retired(fleet: Fleet) -> None:
    row = fleet.run("ca", "list").ok().splitlines()[1].split()
    assert "Signing" in row
    refused = fleet.run("ca", "retire", row[0])
    assert refused.code == 7
    assert "casemate ca roll" in refused.err
    assert fleet.run("ca", "retire", "00000000").code == 4


def test_the_operators_key_is_for_its_owner_alone(fleet: Fleet) -> None:
    assert Path(fleet.environ["CASEMATE_CONFIG"]).stat().st_mode & 0o777 == 0o600
    other = Path(fleet.environ["CASEMATE_CONFIG"]).with_name("no-such-file.yaml")
    assert fleet.run("get", "hosts", CASEMATE_CONFIG=str(other), CASEMATE_INSECURE_LOOPBACK="0").code == 5


def test_a_machine_that_joined_knows_its_name_and_manager_and_is_gone_when_revoked(
    fleet: Fleet, tmp_path: Path
) -> None:
    line = fleet.run("host", "token", "create", "box-3", "--print-command", "--max-threads", "16").ok()
    assert join(line, tmp_path).returncode == 0
    argv = [sys.executable, "-m", "casemate_agent", "run", "--simulated", "1s 4k/c 2t 8G disk=100G"]
    argv += ["--state-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=dict(fleet.environ)) as agent:
        try:
            fleet.run("wait", "host/box-3", "--for", "phase=Ready", "--timeout", "40s").ok()
            fleet.run("host", "revoke", "box-3").ok()
            fleet.run("wait", "host/box-3", "--for", "phase=Unknown", "--timeout", "60s").ok()
        finally:
            agent.terminate()
            agent.wait(20)
    assert "Revoked" in fleet.run("events", "host/box-3").ok()
    fleet.run("delete", "host", "box-3").ok()


@pytest.mark.timeout(300)
def test_root_keeps_whom_it_believes_and_takes_no_other_manager(fleet: Fleet, tmp_path: Path) -> None:
    """The two halves as processes, over TLS: root reads the pin off the token, and what is not signed moves nothing."""
    me, state, relay_state, sock = pwd.getpwuid(os.geteuid()), tmp_path / "root", tmp_path / "relay", tmp_path / "sock"
    line = fleet.run("host", "token", "create", "split-1", "--print-command").ok()
    found = LINE.fullmatch(line)
    assert found
    with pytest.raises(BadConfig, match="2 tokens"):
        join_as_relay(found[2], [found[1]] * 2, state, relay_state, me)
    assert join_as_relay(found[2], [found[1]], state, relay_state, me) == 0
    pinned = trust.load(state)
    assert pinned is not None and pinned.host == "split-1"
    assert pinned.pins[0] in fleet.run("ca", "list", "--no-trunc").ok()
    assert join_as_relay(found[2], [found[1]], tmp_path / "other", tmp_path / "thief", me) == 2  # used
    assert not (tmp_path / "other" / trust.FILE).exists()

    log, started = tmp_path / "agent.log", []

    def start(*arguments: str) -> None:
        with log.open("ab") as out:
            started.append(subprocess.Popen([sys.executable, "-m", "casemate_agent", *arguments], stderr=out))

    def until(what: str, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end, f"not within a minute: {what}\n{log.read_text()}"
            time.sleep(0.05)

    def opened() -> int:
        return log.read_text().count("session open")

    agent = ("run", "--relay", str(sock), "--relay-user", me.pw_name, "--state-dir", str(state))
    agent += ("--run-dir", str(tmp_path / "run"), "--simulated", "1s 4k/c 2t 16G")
    try:
        start("relay", "--relay", str(sock), "--state-dir", str(relay_state))
        until("the relay listens", sock.exists)
        start(*agent)
        until("a session is open", lambda: opened() == 1)
        started[-1].terminate()
        assert started[-1].wait(60) == 0
        # The same relay and the same manager, and root was told of another fleet: it says so, and obeys nobody.
        typed = [sys.executable, "-m", "casemate_agent", "trust", "split-1", "0" * 64, "--state-dir", str(state)]
        assert subprocess.run(typed, check=False, timeout=60).returncode == 0
        start(*agent)
        until(
            "the manager is not believed", lambda: "no authority that this host knows vouches for it" in log.read_text()
        )
        assert opened() == 1
    finally:
        for process in started:
            process.kill()
            process.wait()
    fleet.run("host", "revoke", "split-1").ok()
    fleet.run("delete", "host", "split-1").ok()
