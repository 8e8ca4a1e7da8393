"""The guards of the suite bite: a test session with every kind of offence in it, each told by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent

PLUGINS = ("-p", "no:cacheprovider", "-p", "support.guards", "-p", "support.golden", "-p", "support.groups")

OFFENCES = """
import asyncio, os, subprocess, threading, time
import pytest

def test_clean(tmp_path): (tmp_path / "file").write_text("")
async def test_clean_too(): await asyncio.to_thread(time.sleep, 0.001)

def test_leaks():
    os.open("/etc/passwd", os.O_RDONLY)
    threading.Thread(target=time.sleep, args=(4,), daemon=True, name="forgotten").start()
    if os.fork() == 0:
        os._exit(0)

async def test_leaks_a_task():
    globals()["task"] = asyncio.create_task(asyncio.sleep(60), name="forgotten-task")

@pytest.mark.skip(reason="too hard")
def test_skipped(): pass

def test_without_golden_file(golden): golden("nowhere/to/be/found.txt", "text")

def test_daemon(tmp_path):
    subprocess.run(["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $! > pid"], cwd=os.environ["HERE"], check=True)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *PLUGINS, "-o", "asyncio_mode=auto", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TESTS), "HERE": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_offence_is_told(tmp_path: Path) -> None:
    (tmp_path / "test_offences.py").write_text(OFFENCES)
    done = run(tmp_path, "-k", "not daemon")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    for told in (
        "descriptor",
        "/etc/passwd",
        "thread forgotten",
        "zombie",
        "task forgotten-task",
        "too hard",
        "no golden file tests/golden/nowhere/to/be/found.txt",
        "1 failed, 4 passed, 1 deselected, 3 errors",
    ):
        assert told in done.stdout, done.stdout


def test_a_daemon_is_found_and_ended_with_the_session(tmp_path: Path) -> None:
    (tmp_path / "test_offences.py").write_text(OFFENCES)
    done = run(tmp_path, "-k", "daemon")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "left running by the session" in done.stdout
    assert "1 passed" in done.stdout
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_nothing_is_told_of_clean_tests(tmp_path: Path) -> None:
    (tmp_path / "test_offences.py").write_text(OFFENCES)
    done = run(tmp_path, "-k", "clean")
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    assert "2 passed" in done.stdout


def test_regenerating_is_refused_in_ci(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "support.golden", "--regenerate", str(tmp_path)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TESTS), "CI": "true"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "never written" in done.stderr
