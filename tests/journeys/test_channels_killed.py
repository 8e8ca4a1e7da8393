"""Whatever hangs on a side stream is cut cleanly when the agent or the manager is SIGKILLed, and begins anew afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fleet import Fleet, casemate, clean_environment, free_port

MANIFEST = """
apiVersion: casemate/v1
kind: Environment
metadata: {name: cut}
spec:
  cpu: {count: 1}
  memory: {size: 256Mi}
  image: debian-13
  pods:
    - apiVersion: v1
      kind: Pod
      metadata: {name: web}
      spec: {containers: [{name: app, image: "localhost/hello:1", ports: [{containerPort: 8080}]}]}
"""
WITHIN_S = 60.0


class Mortal(Fleet):
    """A fleet whose processes may be killed."""

    def up(self) -> None:
        where = ("--dir", str(self.folder / "dev"), "--port", self.manager.rpartition(":")[2])
        self.run("dev", "up", "--simulated", "1", "--no-example", *where, timeout_s=100).ok()

    def kill(self, name: str) -> None:
        pid = json.loads((self.folder / f"dev/pids/{name}.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Mortal]:
    address = f"127.0.0.1:{free_port()}"
    fleet = Mortal(address, tmp_path, clean_environment(tmp_path, address))
    try:
        fleet.up()
        yield fleet
    finally:
        casemate("dev", "down", "--dir", str(tmp_path / "dev"), environ=fleet.environ, timeout_s=100).ok()


def opened(fleet: Fleet, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "casemate_cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(fleet.environ),
    )


def answers(child: "subprocess.Popen[bytes]", said: bytes, answer: bytes) -> None:
    assert child.stdin and child.stdout
    child.stdin.write(said)
    child.stdin.flush()
    assert child.stdout.readline() == answer


def closed(child: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """Exit code and what was told, once it has ended by itself."""
    assert child.stdin and child.stdout and child.stderr
    code = child.wait(WITHIN_S)
    told = child.stderr.read().decode()
    for stream in (child.stdin, child.stdout, child.stderr):
        stream.close()
    return code, told


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["agent", "manager"])
def test_streams_are_cut_and_begin_anew(mortal: Mortal, victim: str) -> None:
    mortal.run("apply", "-f", "-", stdin=MANIFEST).ok()
    mortal.run("wait", "env/cut", "--for", "ready", "--timeout", "60s").ok()
    console, command, single = (
        opened(mortal, "console", "cut"),
        opened(mortal, "exec", "-i", "cut", "--", "cat"),
        opened(mortal, "port-forward", "--stdio", "cut-0.web", "8080"),
    )
    forward = mortal.start("port-forward", "cut-0.web", "0:8080")
    assert forward.stdout and forward.stderr
    port = int(forward.stdout.readline().split()[0].rpartition(":")[2])
    try:
        answers(console, b"hi\r", b"hi\n")
        answers(command, b"one\n", b"one\n")
        answers(single, b"two\n", b"two\n")
        with socket.create_connection(("127.0.0.1", port), WITHIN_S) as sock:
            sock.sendall(b"three")
            assert sock.recv(5) == b"three"
            mortal.kill(victim)
            assert sock.recv(1) == b"", "the local connection is closed, not left hanging"
        for child in (console, command, single):
            code, told = closed(child)
            assert code == 8, told
            assert told.startswith("error: ") and told.count("error: ") == 1, told
            assert "Traceback" not in told
            says = "agent was stopped" if victim == "agent" else "no manager answers"
            assert says in told or "exit code" in told, told
        assert forward.stderr.readline().startswith("error: ")
        assert forward.poll() is None, "the next connection is waited for"
        mortal.up()
        mortal.run("wait", "env/cut", "--for", "ready", "--timeout", "90s", timeout_s=120).ok()
        give_up_s = time.monotonic() + WITHIN_S
        while True:
            with socket.create_connection(("127.0.0.1", port), WITHIN_S) as sock:
                sock.sendall(b"four")
                if sock.recv(4) == b"four":
                    break
            assert time.monotonic() < give_up_s
        again = opened(mortal, "console", "cut")
        answers(again, b"back\r", b"back\n")
        again.send_signal(signal.SIGINT)
        assert closed(again)[0] == 130
    finally:
        forward.send_signal(signal.SIGTERM)
        assert forward.wait(WITHIN_S) == 0
        forward.stdout.close()
        forward.stderr.close()
        for child in (console, command, single):
            if child.poll() is None:
                child.kill()
                child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    stream.close()


@pytest.mark.timeout(400)
def test_watches_and_operations_go_on_when_the_manager_is_killed(mortal: Mortal) -> None:
    mortal.run("apply", "-f", "-", stdin=MANIFEST).ok()
    mortal.run("wait", "env/cut", "--for", "ready", "--timeout", "60s").ok()
    watch = opened(mortal, "get", "env", "-w", "-o", "jsonpath={.metadata.labels.tier}")
    events = opened(mortal, "events", "-f", "-o", "json")
    doing = {
        verb: opened(mortal, verb, "inst/cut-0", "--timeout", "200s", *more)
        for verb, more in (("rebuild", ("--yes",)),)
    }
    try:
        assert watch.stdout and watch.stdin
        assert watch.stdout.readline() == b"\n", "it has no such label yet"
        # Whoever has heard of the manager waits for it; whoever has not does not.
        assert events.stdout
        named = [_named(events.stdout.readline())]
        for verb, child in doing.items():
            assert child.stderr
            while verb not in (line := child.stderr.readline().decode()) or "cut-0:" not in line:
                assert line, f"{verb} ended before it was followed"
        mortal.kill("manager")
        mortal.up()
        for verb, child in doing.items():
            told = child.communicate(timeout=200)
            assert child.returncode == 0, told
            assert f"instance/cut-0: {verb} done" in told[0].decode()
        operations = json.loads(mortal.run("get", "operations", "-o", "json").ok())["items"]
        assert [(o["spec"]["verb"], o["status"]["phase"]) for o in operations] == [("rebuild", "Done")]
        assert mortal.run("get", "inst", "cut-0", "-o", "jsonpath={.status.starts}").ok() == "2\n"
        mortal.run("label", "env", "cut", "tier=web").ok()
        while watch.stdout.readline() != b"web\n":
            assert watch.poll() is None
        while True:
            heard = events.stdout.readline()
            assert heard, events.stderr and events.stderr.read()
            named.append(_named(heard))
            event = json.loads(heard)
            if event["reason"] == "Changed" and "labels" in event["message"]:
                break
        assert len(set(named)) == len(named), "one was told twice"
        for child in (watch, events):
            child.send_signal(signal.SIGINT)
            code, said = closed(child)
            assert code == 0 and "Traceback" not in said, said
    finally:
        for child in (watch, events, *doing.values()):
            if child.poll() is None:
                child.kill()
                child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream and not stream.closed:
                    stream.close()


def _named(line: bytes) -> tuple[str, int]:
    event = json.loads(line)
    return event["metadata"]["name"], event.get("count", 1)


PINGS = MANIFEST.replace("name: cut}", "name: pings}").replace(
    "ports: [{containerPort: 8080}]", "command: [ping, -i, '0.02', nowhere]"
)


@pytest.mark.timeout(240)
def test_a_followed_log_misses_no_line_when_the_manager_is_killed(mortal: Mortal) -> None:
    mortal.run("apply", "-f", "-", stdin=PINGS).ok()
    mortal.run("wait", "env/pings", "--for", "ready", "--timeout", "60s").ok()
    follower = opened(mortal, "logs", "pings", "-f")
    assert follower.stdout
    seen = [follower.stdout.readline() for _ in range(50)]
    for _ in range(2):
        mortal.kill("manager")
        mortal.up()
        # Far beyond what was in flight.
        last = int(seen[-1].partition(b"=")[2])
        while int(seen[-1].partition(b"=")[2]) < last + 300:
            seen.append(follower.stdout.readline())
    follower.send_signal(signal.SIGINT)
    code, told = closed(follower)
    assert code == 0
    assert "lost" not in told
    assert seen[0] == b"app started\n"
    assert seen[1:] == [b"seq=%d\n" % number for number in range(1, len(seen))]


@pytest.mark.timeout(240)
def test_a_followed_log_says_where_lines_may_be_missing(mortal: Mortal) -> None:
    """A simulated host ends with its agent, and its containers are made anew: what they wrote last is nobody's to tell."""
    mortal.run("apply", "-f", "-", stdin=PINGS).ok()
    mortal.run("wait", "env/pings", "--for", "ready", "--timeout", "60s").ok()
    follower = opened(mortal, "logs", "pings", "-f")
    assert follower.stdout
    seen = [follower.stdout.readline() for _ in range(20)]
    mortal.kill("agent")
    time.sleep(1.5)
    mortal.up()
    while seen[-1] != b"app started\n":
        seen.append(follower.stdout.readline())
    follower.send_signal(signal.SIGINT)
    code, told = closed(follower)
    assert code == 0
    assert "(the log is interrupted: " in told and "(the log goes on)" in told
    assert told.count("(app was made anew here; what it had written last may be missing)") == 1
    assert seen[1:-1] == [b"seq=%d\n" % number for number in range(1, len(seen) - 1)]
