"""The agent's process: settings, a clean end, and a footprint that leaves the host to its VMs."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casemate_agent.config import BadConfig, Config, load

LINE = "1s 4k/c 2t 16G"


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('name = "a"\nlog_level = "debug"\nstop_grace_s = 5\nimage_folders = ["/srv/images"]\n')
    config = load(str(path), {"name": "b", "log_format": None})
    assert config == Config(name="b", log_level="debug", stop_grace_s=5, image_folders=("/srv/images",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('nmae = "a"', "nmae: there is no such setting"),
        ("name = 7", "name: expected str, got 7"),
        ('name = "a"\nconcurrency = true', "concurrency: expected int"),
        ('name = "a"\nlog_format = "xml"', "neither console nor json"),
        ('name = "a"\nhosts = 3', "only with --simulated"),
        ('name = "a"\nimage_folders = ["relative"]', "absolute"),
        ("", "name: say which host this is"),
        ("= =", "agent.toml"),
    ],
)
def test_a_setting_without_a_meaning_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=says):
        load(str(path), {})


def agent(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "casemate_agent", *arguments]


@pytest.mark.parametrize("manager", ["192.0.2.1:7443", "manager.example:7443"])
def test_it_does_not_dial_beyond_loopback(tmp_path: Path, manager: str) -> None:
    flags = [
        "--name",
        "h",
        "--simulated",
        LINE,
        "--state-dir",
        str(tmp_path),
        "--manager",
        manager,
        "--insecure-loopback",
    ]
    ended = subprocess.run(agent("run", *flags), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "only a loopback address" in ended.stderr
    assert ended.stdout == ""


def test_it_ends_cleanly_when_it_is_asked_to(tmp_path: Path) -> None:
    flags = ["--name", "h", "--simulated", LINE, "--hosts", "3", "--state-dir", str(tmp_path), "--log-format", "json"]
    # a port on which nobody listens: the link is in its back-off
    process = subprocess.Popen(
        agent("run", *flags, "--manager", "127.0.0.1:1", "--insecure-loopback"), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert '"message": "casemate-agent' in line
        deadline = time.monotonic() + 20
        while not (tmp_path / "h-3/ledger/host.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert "instances go on" in rest


def test_what_a_simulated_agent_imports_is_little() -> None:
    code = (
        "import sys, casemate_agent.__main__, casemate_agent.drivers.simulated\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'numpy', 'pydantic', 'aiohttp', 'libvirt', 'pyroute2', 'pycdlib', 'psutil', 'yaml', 'grpc', 'google', 'rich'}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


def test_it_tells_its_supervisor_when_it_has_looked_around_and_when_it_stops(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(30)
        environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
        flags = [
            "--name",
            "h",
            "--simulated",
            LINE,
            "--state-dir",
            str(tmp_path / "s"),
            "--run-dir",
            str(tmp_path / "r"),
        ]
        with subprocess.Popen(agent("run", *flags), stderr=subprocess.DEVNULL, env=environ) as process:
            try:
                heard = [supervisor.recv(4096).decode() for _ in range(2)]
                process.terminate()
                heard.append(supervisor.recv(4096).decode())
            finally:
                process.kill()
    assert heard == ["READY=1\nSTATUS=h", "WATCHDOG=1", "STOPPING=1"]
