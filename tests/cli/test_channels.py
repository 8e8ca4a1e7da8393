"""Console, ports, files and ssh against a real manager and simulated hosts, as a person uses them."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.fleet import Fleet, free_port
from support.terminal import Terminal

MANIFEST = """
apiVersion: casemate/v1
kind: Environment
metadata: {name: side}
spec:
  cpu: {count: 1}
  memory: {size: 256Mi}
  image: debian-13
  pods:
    - apiVersion: v1
      kind: Pod
      metadata: {name: web}
      spec: {containers: [{name: app, image: "localhost/hello:1", ports: [{containerPort: 8080}, {containerPort: 8081}]}]}
"""
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def side(fleet: Fleet) -> Iterator[Fleet]:
    """A fleet with the environment `side`, Ready."""
    fleet.run("apply", "-f", "-", stdin=MANIFEST).ok()
    fleet.run("wait", "env/side", "--for", "ready", "--timeout", "60s").ok()
    yield fleet
    fleet.run("delete", "env/side").ok()


# --- console ----------------------------------------------------------------------------------------------------------


def test_two_sit_at_one_console_and_leave_it(side: Fleet) -> None:
    first, second = Terminal(side, "console", "side"), Terminal(side, "console", "side-0")
    for terminal in (first, second):
        terminal.until(b"Ctrl-] leaves")
    first.type(b"who")
    for terminal in (first, second):
        terminal.until(b"who")
    second.type(b"\x03\x04\x1b[A!")  # all of it is the guest's
    first.until(b"\x03\x04\x1b[A!")
    first.type(b"\x1d")
    assert first.end() == 0
    second.type(b"\r")
    second.until(b"Login incorrect")
    second.type(b"more\x1drest")
    assert second.end() == 0


def test_a_console_in_a_pipe_is_escaped_and_ends_when_it_is_interrupted(side: Fleet) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "casemate_cli", "console", "side"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(side.environ),
    )
    assert child.stdin and child.stdout and child.stderr
    child.stdin.write(b"a\x1b[31m\x07\x9b\r")
    child.stdin.close()
    assert child.stdout.readline() == b"a\\x1b[31m\\x07\\x9b\n"
    assert child.stdout.readline() == b"Login incorrect\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(WITHIN_S) == 130
    child.stdout.close()
    child.stderr.close()


def test_a_console_ends_with_its_instance(fleet: Fleet) -> None:
    fleet.run("apply", "-f", "-", stdin=MANIFEST.replace("side", "short")).ok()
    fleet.run("wait", "env/short", "--for", "ready", "--timeout", "60s").ok()
    terminal = Terminal(fleet, "console", "short")
    terminal.until(b"Ctrl-] leaves")
    terminal.type(b"x")
    terminal.until(b"x")
    fleet.run("delete", "env/short").ok()
    assert terminal.end() == 0
    assert b"the console is gone" in terminal.screen


def test_consoles_that_are_not_there(side: Fleet) -> None:
    nobody = side.run("console", "nobody")
    assert (nobody.code, nobody.out) == (4, "")
    pod = side.run("console", "side-0.web")
    assert pod.code == 1 and "pods have no console" in pod.err


# --- ports ------------------------------------------------------------------------------------------------------------


def exchange(port: int, data: bytes) -> bytes:
    """Send all of it, and get what comes until the other end is done."""
    with socket.create_connection(("127.0.0.1", port), WITHIN_S) as sock:

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        found = b""
        while piece := sock.recv(65536):
            found += piece
        sending.join(WITHIN_S)
    return found


def test_several_ports_are_led_through_until_interrupted(side: Fleet) -> None:
    taken = free_port()
    child = side.start("port-forward", "side-0.web", "0:8080", f"{taken}:8081", "0:9")
    assert child.stdout and child.stderr
    try:
        lines = [child.stdout.readline() for _ in range(3)]
        ports = [int(line.split()[0].removeprefix("127.0.0.1:")) for line in lines]
        assert lines[1] == f"127.0.0.1:{taken} -> side-0.web 8081\n"
        data = os.urandom(300_000)
        results: dict[int, bytes] = {}
        threads = [
            threading.Thread(target=lambda n=n: results.update({n: exchange(ports[n % 2], data)}))  # type: ignore[misc]
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)
        assert [results[n] == data for n in range(4)] == [True] * 4
        assert exchange(ports[2], b"x") == b""
        assert "error: port 9: Connection refused" in child.stderr.readline()
        assert exchange(ports[0], b"still there") == b"still there"
    finally:
        child.send_signal(signal.SIGINT)
        code = child.wait(WITHIN_S)
        child.stdout.close()
        child.stderr.close()
    assert code == 0


ONLOOKER = """
apiVersion: casemate/v1
kind: User
metadata: {name: onlooker}
spec: {type: service}
---
apiVersion: casemate/v1
kind: RoleBinding
metadata: {name: onlooker}
spec: {role: viewer, users: [onlooker], scope: tenant/default}
"""


def test_ports_are_led_through_as_whoever_shows_a_token(side: Fleet) -> None:
    """The connections are calls too: who may only look finds the instance, and gets through to nothing."""
    side.run("apply", "-f", "-", stdin=ONLOOKER).ok()
    shown = {"CASEMATE_TOKEN": side.run("key", "create", "onlooker").ok().strip()}
    child = replace(side, environ={**side.environ, **shown}).start("port-forward", "side-0.web", "0:8080")
    assert child.stdout and child.stderr
    try:
        port = int(child.stdout.readline().split()[0].removeprefix("127.0.0.1:"))
        assert exchange(port, b"x") == b""
        assert child.stderr.readline().startswith("error: onlooker may not exec")
    finally:
        child.send_signal(signal.SIGINT)
        assert child.wait(WITHIN_S) == 0
        child.stdout.close()
        child.stderr.close()
        side.run("delete", "rolebinding", "onlooker").ok()
        side.run("delete", "user", "onlooker").ok()


def test_ports_that_cannot_be_led_through(side: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = side.run("port-forward", "side", f"{port}:8080")
    assert taken.code == 1 and f"cannot listen on 127.0.0.1:{port}" in taken.err
    assert side.run("port-forward", "nobody", "0:8080").code == 4
    for text in ("http", "0", "1:2:3", "70000", "1:0", "-1"):
        wrong = side.run("port-forward", "side", "--", text)
        assert wrong.code == 1 and wrong.err.startswith("error: a port is wrong"), text
    refused = side.run("port-forward", "--stdio", "side", "9")
    assert (refused.code, refused.out) == (7, "")
    assert refused.err.startswith("error: port 9: Connection refused")


def test_one_connection_on_standard_input_and_output(side: Fleet) -> None:
    done = side.run("port-forward", "--stdio", "side", "22", stdin="SSH-2.0-me\r\n")
    assert done.ok() == "SSH-2.0-casemate_simulated\nSSH-2.0-me\n"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_goes_in_and_comes_out_with_its_modes(side: Fleet, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (site / "run").write_bytes(b"#!/bin/sh\n")
    (site / "run").chmod(0o750)
    (site / "sub/ü, 'x'").write_bytes(bytes(range(256)) * 1000)
    (site / "sub").chmod(0o700)
    assert side.run("cp", str(site), "side:/tmp").ok() == ""
    side.run("cp", "side-0.web:/tmp/site", str(tmp_path / "back")).ok()
    found = {p.relative_to(tmp_path / "back"): p for p in (tmp_path / "back").rglob("*")}
    wanted = {p.relative_to(site): p for p in site.rglob("*")}
    assert found.keys() == wanted.keys()
    for name, path in found.items():
        assert path.stat().st_mode == wanted[name].stat().st_mode
        assert path.is_dir() or path.read_bytes() == wanted[name].read_bytes()
    side.run("cp", "side:/tmp/site/run", str(tmp_path)).ok()
    assert (tmp_path / "run").read_bytes() == b"#!/bin/sh\n"
    assert not list(tmp_path.rglob("*.part"))
    # The VM's files are others than the container's.
    assert side.run("cp", "--vm", "side:/tmp/site", str(tmp_path / "no")).code == 4


def test_one_file_goes_through_standard_input_and_output(side: Fleet, tmp_path: Path) -> None:
    side.run("cp", "-", "side:/tmp/words", stdin="one\ntwo\n").ok()
    assert side.run("cp", "side:/tmp/words", "-", cwd=tmp_path).ok() == "one\ntwo\n"
    assert not list(tmp_path.iterdir()), "no file called -"
    side.run("cp", "side:/tmp/words", str(tmp_path / "words")).ok()
    assert (tmp_path / "words").stat().st_mode & 0o777 == 0o644
    refused = side.run("cp", "side:/tmp", "-")
    assert (refused.code, refused.out) == (1, "")
    assert "error: /tmp is a folder" in refused.err and "not -" in refused.err
    side.run("cp", "-", "side:/tmp", stdin="x").ok()
    assert side.run("cp", "side:/tmp/stdin", "-").ok() == "x"
    assert side.run("cp", "side:/nothing", "-").code == 4


def test_copies_that_cannot_be(side: Fleet, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links/out").symlink_to("/etc/passwd")
    (tmp_path / "links/in").write_text("in\n")
    partly = side.run("cp", str(tmp_path / "links"), "side:/tmp/links")
    assert partly.code == 1
    assert "error: not everything was copied" in partly.err and "links/out: is a symbolic link" in partly.err
    side.run("cp", "side:/tmp/links/in", str(tmp_path / "in")).ok()
    for arguments, code, says in (
        (("side:/nothing", str(tmp_path / "x")), 4, "error: /nothing: No such file or directory"),
        (("side:/etc/hostname", str(tmp_path / "no/such")), 4, "no folder"),
        ((str(tmp_path / "nothing"), "side:/tmp"), 4, "no such file"),
        ((str(tmp_path / "in"), "side:/no/such/folder"), 4, "no folder"),
        ((str(tmp_path / "in"), "side:relative"), 1, "no absolute path"),
        (("one", "two"), 1, "one side must be local"),
        (("side:/a", "side:/b"), 1, "one side must be local"),
        (("nobody:/etc/hostname", "."), 4, "not found"),
        (("-p", "none", "side:/etc/hostname", "."), 4, "not found"),
    ):
        done = side.run("cp", *arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done.err)
        assert done.err.startswith("error: ") and says in done.err, (arguments, done.err)
    assert not (tmp_path / "x").exists()


# --- ssh --------------------------------------------------------------------------------------------------------------


def test_ssh_runs_the_systems_ssh_with_a_key_and_known_hosts(side: Fleet, tmp_path: Path) -> None:
    for name, text in (
        (
            "ssh",
            'printf "%s\\n" "$@" > "$HOME/arguments"\n'
            "for a; do case $a in ProxyCommand=*) p=${a#*=};; esac; done\n"
            'echo SSH-2.0-me | sh -c "$p"; exit 3',
        ),
        ("ssh-keygen", 'for a; do f=$a; done; echo private > "$f"; echo ssh-ed25519 AAAAmine casemate > "$f.pub"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    home = {
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = side.run("ssh", "side", "--", "-p", "22", "-v", "uname", "-a", **home)
    assert done.code == 3, done.err
    assert done.out == "SSH-2.0-casemate_simulated\nSSH-2.0-me\n"
    arguments = (tmp_path / "arguments").read_text().splitlines()
    uid = side.run("get", "inst/side-0", "-o", "jsonpath={.metadata.uid}").ok().strip()
    assert arguments[-6:] == ["-p", "22", "-v", f"casemate-{uid}", "uname", "-a"]
    assert "StrictHostKeyChecking=yes" in arguments and "User=root" in arguments
    known = tmp_path / f"state/casemate/ssh/known-{uid}"
    assert known.read_text().startswith(f"casemate-{uid} ssh-ed25519 ")
    key = tmp_path / "state/casemate/ssh/id_ed25519"
    assert key.read_text() == "private\n" and key.parent.stat().st_mode & 0o777 == 0o700
    # A person's own key is taken where -i names it.
    (tmp_path / "mine").write_text("mine\n")
    (tmp_path / "mine.pub").write_text("not a key\n")
    refused = side.run("ssh", "-i", str(tmp_path / "mine"), "side", **home)
    assert refused.code == 1 and "public_key" in refused.err
    assert side.run("ssh", "nobody", **home).code == 4
    assert side.run("ssh", "side", PATH="/nowhere").code == 1
