"""A test that leaves something behind fails: asyncio tasks, threads, descriptors, processes.

Theory of operation: one fixture wraps every test. It is set up before the test's own fixtures and torn down after them,
takes stock at both ends and compares. What a module's or the session's fixtures hold was there before and does not
count. Things that go away by themselves (a closing channel's thread) get a short grace, and only a test that has a
difference pays for it. Tasks are counted inside the event loop, which is gone by the time the outer guard looks.

Processes that have moved out of the family (a daemon, the QEMU that it started) are looked for once, when the session
ends: those that carry this run's mark in their environment, or name its temporary folder in their arguments.
"""

import asyncio
import gc
import inspect
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

GRACE_S = 2.0
"""How long something may take to go away by itself."""

MARK = "CASEMATE_TEST_RUN"
"""Environment variable by which a session finds the processes that it started."""

PROCESS_WIDE = ("anon_inode:[eventfd]", "anon_inode:[eventpoll]", "/dev/null", "/dev/urandom", "/dev/random")
"""Descriptors that libraries open once per process and keep; a leak of these shows as a leaked thread or task too."""

LASTING: set[int] = set()
"""Processes that belong to a fixture of the session and may be replaced within a test: a server that is switched off and on. Who
made them ends them, and the look at the end of the session finds them as any other."""

HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Processes that the standard library starts once and keeps until the interpreter ends."""


def open_descriptors() -> set[tuple[int, str]]:
    """Every open descriptor of this process that counts, with what it points to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of this very listing
        if target not in PROCESS_WIDE:
            found.add((int(name), target))
    return found


def running_threads() -> set[threading.Thread]:
    """Threads that count: not those of an event loop's own executor, which end with the loop, after this guard looked."""
    return {thread for thread in threading.enumerate() if thread.is_alive() and not thread.name.startswith("asyncio_")}


def child_processes() -> set[psutil.Process]:
    """Children of this process, zombies included: a child that nobody waited for is a leak as well."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()  # no child at all: the usual case, and far cheaper than walking /proc
    found = set()
    for child in psutil.Process().children():
        if child.pid in LASTING:
            continue
        try:
            if not any(helper in argument for argument in child.cmdline() for helper in HELPERS):
                found.add(child)
        except psutil.ZombieProcess:
            found.add(child)
        except psutil.NoSuchProcess:
            continue
    return found


def described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[:200]}"
    except psutil.ZombieProcess:
        return f"{process.pid} zombie"
    except psutil.NoSuchProcess:
        return f"{process.pid} gone"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaks a thread, a descriptor or a process."""
    descriptors, threads, processes = open_descriptors(), running_threads(), child_processes()
    yield
    deadline = time.monotonic() + GRACE_S
    while leaks := (
        sorted(f"descriptor {fd}: {target}" for fd, target in open_descriptors() - descriptors)
        + sorted(f"thread {thread.name}" for thread in running_threads() - threads)
        + sorted(f"process {described(process)}" for process in child_processes() - processes)
    ):
        if time.monotonic() > deadline:
            pytest.fail("left behind by the test:\n  " + "\n  ".join(leaks), pytrace=False)
        gc.collect()
        time.sleep(0.02)


@pytest.fixture
async def no_task_left_behind() -> AsyncIterator[None]:
    """Fail the test that leaks an asyncio task; given to every asynchronous test."""
    before = asyncio.all_tasks()
    yield
    deadline = time.monotonic() + GRACE_S
    while leaks := {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}:
        if time.monotonic() > deadline:
            names = sorted(f"task {task.get_name()}: {task.get_coro()}" for task in leaks)
            pytest.fail("left behind by the test:\n  " + "\n  ".join(names), pytrace=False)
        await asyncio.sleep(0.01)


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(inspect.unwrap(item.function)):
        # First, so that it is torn down after everything that the test itself asked for.
        item.fixturenames.insert(0, "no_task_left_behind")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = f"{os.getpid()}-{time.time_ns()}"


def strays(folder: Path | None) -> list[psutil.Process]:
    """Processes of this session that still run: they carry its mark, or name its temporary folder."""
    mark, found = os.environ[MARK], []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            arguments = process.cmdline()
            named = folder is not None and any(str(folder) in argument for argument in arguments)
            helps = any(helper in argument for argument in arguments for helper in HELPERS)
            if (named or process.environ().get(MARK) == mark) and not helps:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    factory = getattr(session.config, "_tmp_path_factory", None)
    folder = getattr(factory, "_basetemp", None)  # None: no test asked for a temporary folder
    left = strays(folder)
    if not left:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for process in left:
        if reporter is not None:
            reporter.write_line(f"left running by the session, ended now: {described(process)}", red=True)
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
